"""Reading: changed bits, web addresses, folders, and what a file is if it is no plain ViT."""

import argparse
import random
import threading
import zipfile

import pytest
import torch
from export_utils import make_mae, make_vit, run_export, save_mae, save_vit
from safetensors.torch import save_file

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import predict
from util.errors import UserError
from util.export.files import write_safetensors
from util.run import checkpoint, resume
from util.weights.describe import describe
from util.weights.encoder import load_into
from util.weights.files import fetch, read_file
from util.weights.state import model_state


def flip(path, at, bits=1):
    """Changes a bit of a file, or zeroes 4 KiB with `bits` 0."""
    data = bytearray(path.read_bytes())
    if bits:
        data[at] ^= bits
    else:
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    path.write_bytes(data)


def places(path) -> dict[str, int]:
    """Where the tensors, the pickle and the directory of an archive are."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename.split("/", 1)[1]: record.header_offset for record in archive.infolist()}
        tensor = max(archive.infolist(), key=lambda record: record.file_size)
        return {
            "tensor": tensor.header_offset + tensor.file_size // 2,
            "pickle": records["data.pkl"] + 600,
            "directory": archive.start_dir + 30,
        }


@pytest.mark.parametrize("place", ["tensor", "pickle", "directory"])
@pytest.mark.parametrize("bits", [0, 1, 0x80])
def test_a6_a_flipped_bit_and_zeroed_bytes_are_noticed(tmp_path, place, bits):
    path, _ = save_mae(tmp_path, data_path="x" * 5000)
    flip(path, places(path)[place], bits)
    with pytest.raises(UserError, match=r"checkpoint-7\.pth: cannot be read .*(flipped|damaged)"):
        read_file(path)


def test_a6_no_flipped_bit_of_a_file_changes_what_is_read(tmp_path):
    path = tmp_path / "a.pth"
    good = {"model": {"a": torch.arange(2000.0)}, "args": {"lr": 0.1, "mean": [0.1, 0.2]}}
    torch.save(good, path)
    data, noticed, generator = path.read_bytes(), 0, random.Random(0)
    for at in range(0, len(data), 31):
        path.write_bytes(data)
        flip(path, at, 1 << generator.randrange(8))
        try:  # one in a date or in padding is harmless
            content = read_file(path)
            assert torch.equal(content["model"]["a"], good["model"]["a"]) and content["args"] == good["args"]
        except UserError:
            noticed += 1
    assert noticed > 0.7 * len(data) / 31


def test_a_good_file_is_read_whatever_its_threads_do(tmp_path, monkeypatch):
    """In Python 3.12 and 3.13 threads that share an archive read at each other's places: "Bad CRC-32"."""
    path, users, opened = tmp_path / "a.pth", {}, zipfile.ZipFile.open
    content = {"model": {f"b{i}": torch.full((37, 1 + i % 50), float(i)) for i in range(300)}}
    torch.save(content, path)

    def noted(archive, *args, **more):
        users.setdefault(archive, set()).add(threading.get_ident())  # kept, so that no id is given twice
        return opened(archive, *args, **more)

    monkeypatch.setattr("util.weights.files.default_workers", lambda: 4)
    monkeypatch.setattr(zipfile.ZipFile, "open", noted)
    for _ in range(5):
        assert read_file(path)["model"].keys() == content["model"].keys()
    assert len(users) >= 20 and all(len(threads) == 1 for threads in users.values())


def test_a6_auto_passes_on_to_the_one_before(tmp_path, capsys):
    model = make_mae().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    args = argparse.Namespace(output_dir=str(tmp_path), resume="auto", batch_size=2, accum_iter=1)
    for epoch in (0, 1):
        checkpoint.save_model(args, epoch, model, model, optimizer, None)
        checkpoint.finish_saving()
    newest = tmp_path / "checkpoint-1.pth"
    flip(newest, places(newest)["tensor"])
    resume.load_model(args, model, optimizer, None)
    assert args.start_epoch == 1 and "checkpoint-1.pth: cannot be read" in capsys.readouterr().err
    args.no_verify = True
    resume.load_model(args, model, optimizer, None)
    assert args.start_epoch == 2


def test_a6_files_without_checksums_are_read(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_file(tmp_path / "old.pth")["model"]["a"].tolist() == [1, 1]
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "none.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_file(tmp_path / "none.pth")["model"]["a"].tolist() == [1, 1]


def test_a6_safetensors_of_ours_have_a_digest(tmp_path):
    state = {"a": torch.arange(600.0), "b": torch.ones(3, 4, dtype=torch.bfloat16), "c": torch.tensor(2)}
    path = tmp_path / "a.safetensors"
    write_safetensors(path, state, args={"lr": 0.5})
    content, data = read_file(path), path.read_bytes()
    assert all(torch.equal(content["model"][key], value) for key, value in state.items())
    for at in (data.index(b"0.5"), len(data) - 1000, data.index(b'"a"') + 1):
        path.write_bytes(data)
        flip(path, at)
        with pytest.raises(UserError, match="the file was changed after it was written"):
            read_file(path)
        assert "model" in read_file(path, verify=False)
    save_file(state, path)  # another program's have none
    assert torch.equal(read_file(path)["model"]["a"], state["a"])


def test_a6_every_script_that_reads_weights_has_the_flag(tmp_path):
    path, _ = save_vit(tmp_path, True)
    flip(path, places(path)["tensor"])
    for script in (main_pretrain, main_finetune, main_linprobe, main_knn, predict):
        assert "--no_verify" in script.get_args_parser().format_help()
    words = ("--resume", path, "--to", "safetensors", "--output", tmp_path / "out")
    with pytest.raises(SystemExit):
        run_export(*words)
    run_export(*words, "--no_verify")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web of files by their addresses, and torch's cache; returns both."""
    files, asked = {}, []

    def download(url, path, hash_prefix=None, progress=True):
        asked.append(url)
        with open(path, "wb") as file:
            file.write(files[url])

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    return files, asked


def test_a14_the_cache_goes_by_the_whole_address(tmp_path, web):
    files, asked = web
    for host, value in (("A", 1.0), ("B", 2.0)):
        torch.save({"model": {"x": torch.tensor(value)}}, tmp_path / "x.pth")
        files[f"https://{host}/checkpoint-2.pth"] = (tmp_path / "x.pth").read_bytes()
    files["https://A/checkpoint-2.pth?v=2"] = files["https://B/checkpoint-2.pth"]
    for address, value in ((a, 1.0 if a.endswith("A/checkpoint-2.pth") else 2.0) for a in files):
        assert read_file(address, "--resume")["model"]["x"] == value
    assert len(asked) == 3
    assert read_file("https://A/checkpoint-2.pth")["model"]["x"] == 1 and len(asked) == 3  # from the cache
    with pytest.raises(UserError, match="only https://"):
        fetch("http://A/checkpoint-2.pth")


def test_a14_a_damaged_download_is_fetched_again(tmp_path, web, capsys):
    files, asked = web
    torch.save({"model": {"x": torch.zeros(2000)}}, tmp_path / "x.pth")
    files["https://A/x.pth"] = (tmp_path / "x.pth").read_bytes()[:5000]
    with pytest.raises(UserError, match=r"--resume https://A/x\.pth: cannot be read .*damaged"):
        read_file("https://A/x.pth", "--resume")
    files["https://A/x.pth"] = (tmp_path / "x.pth").read_bytes()
    assert "x" in read_file("https://A/x.pth")["model"] and len(asked) == 2
    del files["https://A/x.pth"]
    read_file("https://A/x.pth")
    assert "https://A/x.pth: taken from " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--resume https://A/y\.pth: cannot be downloaded"):
        read_file("https://A/y.pth", "--resume")


VIT = make_vit().state_dict()
OTHERS = {
    "relative positions": (
        VIT | {f"blocks.{i}.attn.relative_position_bias_table": torch.zeros(9, 3) for i in (0, 1)},
        "a BEiT or alike",
    ),
    "half of BEiT's biases": (VIT | {"blocks.0.attn.q_bias": torch.zeros(24)}, "a BEiT or alike"),
    "a Swin": (
        {"patch_embed.proj.weight": torch.zeros(24, 3, 4, 4), "layers.0.blocks.0.norm1.bias": torch.ones(4)},
        r"whose class token \(cls_token\) is not in the file",
    ),
    "video": (VIT | {"patch_embed.proj.weight": torch.zeros(24, 3, 2, 8, 8)}, r"a model of videos .*Conv3d"),
    "no positions": ({k: v for k, v in VIT.items() if k != "pos_embed"}, r"positional embedding \(pos_embed"),
    "Hugging Face's others": ({"dinov2.embeddings.cls_token": VIT["cls_token"]}, "Hugging Face's dinov2"),
    "layer scale": (VIT | {"blocks.0.ls1.gamma": torch.zeros(24)}, "no plain ViT|not a plain ViT"),
    "no bias": ({k: v for k, v in VIT.items() if "qkv.bias" not in k}, "no plain ViT|not a plain ViT"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_c8_the_right_reason_for_other_models(tmp_path, name):
    state, reason = OTHERS[name]
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "a.pth")
    content = read_file(tmp_path / "a.pth")
    with pytest.raises(UserError, match=reason) as error:
        load_into(make_vit(), str(tmp_path / "a.pth"))
    text = str(error.value)
    assert "does not fit" not in text and "is Hugging Face ViT" not in text and "Check --model" not in text
    if "plain" not in reason:
        with pytest.raises(UserError, match=reason):
            describe(content, "a.pth", argparse.Namespace(), "encoder")


def test_c8_tensors_under_another_name(tmp_path):
    with pytest.raises(UserError, match=r"a\.pth: its tensors are under 'module' \(as DeepSpeed's are\)"):
        model_state({"module": VIT, "optimizer": {}}, "a.pth")  # a run goes on from its own files only
    torch.save({"net": {"conv1.weight": torch.zeros(3)}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: its tensors are under 'net', not under 'model'"):
        load_into(make_vit(), str(tmp_path / "a.pth"))


def test_c8_folders(tmp_path):
    (tmp_path / "run").mkdir()
    path, _ = save_mae(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"--resume .*run: is a folder of checkpoints; pass one .*checkpoint-7"
    ):
        read_file(tmp_path / "run", "--resume")
    path.rename(tmp_path / "run" / ".metadata")
    with pytest.raises(UserError, match=r"torch\.distributed\.checkpoint"):
        read_file(tmp_path / "run")
    (tmp_path / "run" / ".metadata").unlink()
    with pytest.raises(UserError, match=r"without model.safetensors .*; it holds log.txt"):
        read_file(tmp_path / "run")


def test_c8_a_large_model_in_parts(tmp_path):
    """Also parts of torch's, which are bare dicts."""
    names = {key: f"pytorch_model-{i % 2}.bin" for i, key in enumerate(VIT)}
    for part in set(names.values()):
        torch.save({key: VIT[key] for key in VIT if names[key] == part}, tmp_path / part)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(str({"weight_map": names}).replace("'", '"'))
    assert read_file(tmp_path)["model"].keys() == VIT.keys()
    for text in ('{"weight_map": ["x"]}', '{"weight_map": {"a": "../x.bin"}}', "{}", "[" * 10**5):
        index.write_text(text)
        with pytest.raises(UserError, match=r"index\.json"):
            read_file(tmp_path)


def test_c7_names_of_tensors_are_escaped_and_shortened(tmp_path, capsys):
    odd = {"decoder_\x1b[2J\n": torch.zeros(1), "decoder_" + "n" * 10**6: torch.zeros(1)}
    torch.save({"model": VIT | odd}, tmp_path / "a.pth")
    text = str(load_into(make_vit(), str(tmp_path / "a.pth")))
    assert len(text) < 1000 and text.replace("\n", "").isprintable() and "decoder_\\x1b[2J\\n" in text
    torch.save({"model": {"\x1b[31m": VIT["cls_token"], "n" * 10**6: VIT["cls_token"]}}, tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        load_into(make_vit(), str(tmp_path / "a.pth"))
    assert len(str(error.value)) < 1000 and str(error.value).isprintable()
