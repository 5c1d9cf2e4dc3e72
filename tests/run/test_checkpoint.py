"""Checkpoints: whole or not at all, nothing executed, clear words on what does not fit."""

import argparse
import os
import pickle

import pytest
import torch
from golden_utils import GOLDEN, TINY_MAE

import models_mae
from util.errors import UserError
from util.run import checkpoint, resume
from util.weights import files
from util.weights import state as state_module


def make_model(**changes):
    return models_mae.mae_vit(TINY_MAE, **changes)


def make_args(folder, **changes):
    return argparse.Namespace(
        **{"output_dir": str(folder), "resume": "auto", "batch_size": 2, "accum_iter": 1, **changes}
    )


def save(folder, epoch, step=0, model=None, **args):
    model = model or make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    path = checkpoint.save_model(make_args(folder, **args), epoch, model, model, optimizer, None, step=step)
    checkpoint._writer.wait()
    return path


def names(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith(".run."))


def test_round_trip_and_reference_keys(tmp_path):
    model = make_model()
    path = save(tmp_path, 3, model=model, lr=0.1)
    content = files.read_file(path)
    assert set(content) == {"model", "optimizer", "epoch", "scaler", "args"}
    assert content["epoch"] == 3 and content["args"]["lr"] == 0.1 and type(content["args"]) is dict
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in content["model"].items())
    assert names(tmp_path) == ["checkpoint-3.pth"]


def test_resume_auto_takes_the_newest_readable_one(tmp_path, capsys):
    for epoch in (0, 9, 10):
        save(tmp_path, epoch)
    (tmp_path / "checkpoint-10.pth").write_bytes((tmp_path / "checkpoint-10.pth").read_bytes()[:5000])
    (tmp_path / "checkpoint-11.pth").write_bytes(b"")
    args = make_args(tmp_path)
    resume.load_model(args, make_model(), None, None)
    assert args.start_epoch == 10 and args.start_step == 0
    out = capsys.readouterr()
    assert "checkpoint-9.pth, going on at epoch 10" in out.out
    assert "checkpoint-11.pth" in out.err and "checkpoint-10.pth" in out.err and "passed over" in out.err


def test_resume_auto_without_checkpoints_starts_afresh(tmp_path, capsys):
    args = make_args(tmp_path / "new", start_epoch=0)
    assert resume.load_model(args, make_model(), None, None) is None and args.start_epoch == 0
    assert "starting from scratch" in capsys.readouterr().out


def test_a_checkpoint_inside_an_epoch_is_newer_than_the_epoch_before_and_replaced_by_its_end(tmp_path):
    save(tmp_path, 0)
    save(tmp_path, 1, step=5)
    save(tmp_path, 1, step=7)
    assert names(tmp_path) == ["checkpoint-0.pth", "checkpoint-1-step7.pth"]
    args = make_args(tmp_path)
    resume.load_model(args, make_model(), None, None)
    assert (args.start_epoch, args.start_step) == (1, 7)
    save(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-0.pth", "checkpoint-1.pth"]


def test_keep_checkpoints(tmp_path):
    for epoch in range(5):
        save(tmp_path, epoch, keep_checkpoints=2)
    assert names(tmp_path) == ["checkpoint-3.pth", "checkpoint-4.pth"]


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_nothing_in_a_file_is_executed(tmp_path, writer):
    path, trap = tmp_path / "evil.pth", tmp_path / "executed"
    if writer == "torch":
        torch.save({"model": {}, "args": Malice(trap)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Malice(trap)}))
    with pytest.raises(UserError, match=r"evil\.pth: cannot be read as a checkpoint") as error:
        files.read_file(path)
    assert not trap.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04" + b"x" * 200])
def test_rubbish(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth: cannot be read as a checkpoint"):
        files.read_file(tmp_path / "x.pth")


def test_missing_files_other_addresses_and_other_content(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        files.read_file(tmp_path / "none.pth")
    with pytest.raises(UserError, match="only https"):
        files.read_file("http://example.org/x.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        files.read_file(tmp_path / "list.pth")


def test_a_failed_save_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch, capsys):
    save(tmp_path, 0)
    before = (tmp_path / "checkpoint-0.pth").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    save(tmp_path, 0)
    assert (tmp_path / "checkpoint-0.pth").read_bytes() == before and names(tmp_path) == ["checkpoint-0.pth"]
    assert "NO CHECKPOINT WAS WRITTEN" in capsys.readouterr().err


def test_another_architecture_is_named(tmp_path):
    path = save(tmp_path, 0, model=make_model(decoder_embed_dim=32, decoder_depth=3))
    with pytest.raises(UserError) as error:
        resume.load_model(make_args(tmp_path, resume=str(path)), make_model(), None, None)
    text = str(error.value)
    assert "another architecture" in text and "decoder_pred.weight" not in text.split("unexpected")[1]
    assert (
        "(192, 32) in the file, (192, 16) in the model" in text
        or "mask_token: (1, 1, 32) in the file" in text
    )
    assert "12 unexpected keys (decoder_blocks.2.norm1.weight" in text and "\n" not in text


@pytest.mark.parametrize("head", [{}, {"head.0.running_mean": 24, "head.1.weight": 3}])
def test_encoder_only_files_are_refused_with_their_kind(tmp_path, head):
    """A probe's as well."""
    state = {k: v for k, v in make_model().state_dict().items() if "decoder" not in k and k != "mask_token"}
    state |= {key: torch.zeros(size, *([24] * key.endswith("weight"))) for key, size in head.items()}
    torch.save({"model": state}, tmp_path / "encoder.pth")
    with pytest.raises(UserError, match=r"encoder\.pth: holds an encoder only; .*decoder is needed"):
        resume.load_model(make_args(tmp_path, resume=str(tmp_path / "encoder.pth")), make_model(), None, None)


def test_kinds_and_prefixes():
    state = make_model().state_dict()
    assert state_module.describe_kind(state) == "full MAE (encoder and decoder)"
    wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()}
    assert list(state_module.strip_prefixes(wrapped)) == list(state)
    assert state_module.describe_kind({"head.weight": 0, "patch_embed.proj.weight": 0}).startswith(
        "classifier"
    )
    assert state_module.describe_kind({"x": 0}) == "not a vision transformer"


def test_the_references_checkpoint_loads_with_a_plain_dict_of_args():
    content = files.read_file(GOLDEN / "checkpoint-0.pth")
    assert content["epoch"] == 0 and content["args"]["accum_iter"] == 2 and type(content["args"]) is dict


def test_what_a_killed_save_left_is_removed(tmp_path):
    save(tmp_path, 0)
    (tmp_path / ".checkpoint-1.pth.tmp-123").write_bytes(b"half")
    checkpoint.prepare_output_dir(str(tmp_path), make_model())
    assert names(tmp_path) == ["checkpoint-0.pth"]


def test_auto_where_the_folder_is_a_file(tmp_path):
    """Nothing is found; that it cannot be written is said later, in one line."""
    (tmp_path / "afile").write_text("x")
    for folder in (tmp_path / "afile", tmp_path / "afile" / "x"):
        assert resume.read_resume(make_args(folder)) is None


def test_unwritable_and_full_output_folders(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*cannot be written"):
        checkpoint.prepare_output_dir(str(tmp_path / "file" / "x"), make_model())
    usage = checkpoint.shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="0 MB are free, a checkpoint needs"):
        checkpoint.prepare_output_dir(str(tmp_path / "out"), make_model())


def optimizer_after_a_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def mutate(content, change):
    if change == "shape":
        content["optimizer"]["state"][0]["exp_avg"] = torch.ones(2)
    elif change == "integers":
        content["optimizer"]["state"][0]["exp_avg"] = content["optimizer"]["state"][0]["exp_avg"].int()
    elif change == "missing":
        del content["optimizer"]["state"][3]
    elif change == "betas":
        content["optimizer"]["param_groups"][0]["betas"] = "x"
    elif change == "optimizer":
        content["optimizer"] = {}
    else:
        content.update(change)


DAMAGES = ["shape", "integers", "missing", "betas", "optimizer", {"epoch": "x"}, {"epoch": -7}, {"meters": 5},
           {"step": "a"}, {"step": 2, "samples": "x"}, {"step": 2, "samples": 8}, {"best_acc1": "x"},
           {"args": [1]}, {"stats": {"loss": "x"}}, {"model": None}, {"model_info": 3}]  # fmt: skip


@pytest.mark.parametrize("change", DAMAGES, ids=str)
def test_entries_that_no_run_has_written_are_refused(tmp_path, change):
    """torch's fused AdamW would write beside moments of another shape."""
    model = make_model()
    content = {"model": model.state_dict(), "optimizer": optimizer_after_a_step(model).state_dict()}
    content |= {"epoch": 3, "scaler": {}, "args": {}}
    path = tmp_path / "checkpoint-3.pth"
    torch.save(content, path)
    args = make_args(tmp_path, resume=str(path))
    fresh = make_model()
    resume.load_model(args, fresh, torch.optim.AdamW(fresh.parameters(), fused=True), None)
    mutate(content, change)
    torch.save(content, path)
    with pytest.raises(UserError, match=r"--resume .*checkpoint-3\.pth"):
        fresh = make_model()
        resume.load_model(args, fresh, torch.optim.AdamW(fresh.parameters(), fused=True), None)


def test_a_fresh_run_overwrites_neither_its_start_nor_another_scripts_checkpoints(tmp_path, capsys):
    path = save(tmp_path, 0, mask_ratio=0.75)
    for finetune in (str(path), "elsewhere.pth"):
        args = make_args(tmp_path, resume="", mixup=0.8, finetune=finetune)
        with pytest.raises(UserError, match="another folder"):
            resume.load_model(args, make_model(), None, None)
    resume.load_model(make_args(tmp_path, resume="", mask_ratio=0.5), make_model(), None, None)
    assert "which this fresh one will overwrite" in capsys.readouterr().out


def test_a_complete_run_says_so(tmp_path, capsys):
    save(tmp_path, 5)
    resume.load_model(make_args(tmp_path, epochs=3), make_model(), None, None)
    assert "complete: nothing left to do at epoch 6" in capsys.readouterr().out


def test_a6_a_record_that_is_marked_as_a_folder_is_noticed(tmp_path):
    """torch reads nothing then, and the tensor holds what was in memory."""
    path = tmp_path / "weights.pth"
    torch.save({"model": {"weight": torch.arange(100.0)}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1) + 38] |= 0x10
    path.write_bytes(content)
    with pytest.raises(UserError, match="was changed after it was written"):
        files.read_file(path)
