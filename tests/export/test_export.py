"""export.py: timm, safetensors and torch.export; folders, model card and mistakes. Other libraries:
test_export_extra.py.
"""

import inspect
import re
import shutil
import sys
from argparse import Namespace

import pytest
import timm
import torch
from export_utils import (
    MEAN,
    STD,
    make_mae,
    make_vit,
    refused,
    run_export,
    save_mae,
    save_segmenter,
    save_vit,
)
from safetensors.torch import load_file
from torch import nn

import export
import main_finetune
import main_pretrain
import models_vit
from util.evaluate.features import encoder_features
from util.export import checkpoint
from util.export import timm as export_timm
from util.export.source import read_source
from util.files import read_json
from util.recipes.classifier import resume_classifier
from util.run.resume import load_model
from util.weights.encoder import load_into
from util.weights.files import read_file
from util.weights.hugging_face import to_hugging_face

MODELS = models_vit.MODELS
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def one_named_model(monkeypatch):
    """Files without a name are compared with each named model: the small one is enough, and quick."""
    monkeypatch.setattr(models_vit, "MODELS", {"vit_tiny_patch16": models_vit.vit_tiny_patch16})


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def printed_model(text: str) -> nn.Module:
    """What the line that the script printed makes."""
    line = next(line for line in text.splitlines() if line.startswith("model = timm"))
    return eval(line.removeprefix("model = "), {"timm": timm})


def test_encoder_of_a_full_mae_for_timm(tmp_path, capsys):
    path, mae = save_mae(tmp_path)
    run_export("--resume", path, "--to", "timm", "--output", tmp_path / "out")
    text = capsys.readouterr().out
    assert "exporting the encoder" in text and "largest difference: " in text
    model = printed_model(text)
    tokens = model.forward_features(IMAGES)
    close(tokens[:, 0], encoder_features(mae, IMAGES, global_pool=False))
    close(tokens[:, 1:].mean(1), encoder_features(mae, IMAGES, global_pool=True))
    files = ["README.md", "config.json", "model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == files
    if hasattr(timm.models._hub, "load_state_dict"):  # those that read it
        close(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)(IMAGES), tokens[:, 0])
    config = read_file(str(tmp_path / "out"))["config"]
    assert config["pretrained_cfg"]["mean"] == MEAN and config["pretrained_cfg"]["std"] == STD


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("global_pool", [False, True])
def test_classifiers_for_timm(tmp_path, capsys, global_pool, probe):
    path, vit = save_vit(tmp_path, global_pool, probe)
    run_export("--resume", path, "--to", "timm", "--output", tmp_path / "out")
    model = printed_model(capsys.readouterr().out)
    close(model(IMAGES), vit(IMAGES))
    close(model.forward_head(model.forward_features(IMAGES), pre_logits=True), vit.forward_features(IMAGES))


@pytest.mark.parametrize("global_pool", [False, True])
def test_encoder_of_a_classifier(tmp_path, capsys, global_pool):
    path, vit = save_vit(tmp_path, global_pool)
    run_export("--resume", path, "--to", "timm", "--encoder_only", "--output", tmp_path / "out")
    close(printed_model(capsys.readouterr().out)(IMAGES), vit.forward_features(IMAGES))


def test_other_sizes_and_channels_for_timm(tmp_path, capsys):
    path, mae = save_mae(tmp_path, make_mae(img_size=(16, 48), in_chans=4))
    run_export("--resume", path, "--to", "timm", "--output", tmp_path / "out")
    images = torch.randn(2, 4, 16, 48)
    model = printed_model(capsys.readouterr().out)
    close(model.forward_features(images)[:, 0], encoder_features(mae, images, global_pool=False))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit_micro_patch8"])  # it has none
@pytest.mark.parametrize("classes", [0, 9])
def test_named_models_are_timms_strictly(name, classes):
    """Names, sizes and heads of all sizes, large and huge too: without their memory."""
    with torch.device("meta"):
        vit = MODELS[name](num_classes=classes)
    size, heads = vit.patch_embed.img_size, vit.blocks[0].attn.num_heads
    info = dict(model=name, input_size=size, patch_size=vit.patch_embed.patch_size[0], in_chans=3, mlp_dim=4)
    info |= dict(embed_dim=vit.embed_dim, depth=len(vit.blocks), num_heads=heads)
    info["mlp_dim"] = 4 * vit.embed_dim
    code = export_timm.usage(Namespace(info=info, vit=vit, pooled=False), "out")
    line = next(line for line in code.splitlines() if line.startswith("model = timm"))
    caught = Namespace(create_model=lambda name, **args: Namespace(eval=lambda: (name, args)))
    their_name, args = eval(line.removeprefix("model = "), {"timm": caught})
    assert args.pop("checkpoint_path") == "out/model.safetensors"
    with torch.device("meta"):
        model = timm.create_model(their_name, **args)
    shapes = {key: value.shape for key, value in vit.state_dict().items()}
    assert shapes == {key: value.shape for key, value in model.state_dict().items()}
    assert model.blocks[0].attn.num_heads == heads and model.norm.eps == 1e-6
    tagged = ".mae" in their_name
    assert tagged == (name not in ("vit_tiny_patch16", "vit_small_patch16"))
    assert args == ({} if tagged and not classes else {"num_classes": classes})


def test_full_mae_as_safetensors_is_resumed_and_fine_tuned(tmp_path):
    path, mae = save_mae(tmp_path, make_mae(norm_pix_loss=True))
    run_export("--resume", path, "--to", "safetensors", "--output", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    assert state.keys() == mae.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in mae.state_dict().items())
    fresh = make_mae(depth=2)
    nn.init.zeros_(fresh.decoder_pred.weight)
    args = main_pretrain.get_args_parser().parse_args(["--resume", str(file)])
    load_model(args, fresh, None, None)
    assert torch.equal(fresh.decoder_pred.weight, mae.decoder_pred.weight)
    vit = make_vit(num_classes=2)
    report = load_into(vit, str(file))
    assert report.missing == ["head.weight", "head.bias"]
    close(vit.forward_features(IMAGES), encoder_features(mae, IMAGES, global_pool=False))
    again = checkpoint.read_again(file)  # all settings are in the file
    assert again.info["norm_pix_loss"] is True and again.info["mask_ratio"] == 0.6
    assert again.info["mean"] == tuple(MEAN) and again.content["epoch"] == 7 and not again.notes


def test_half_is_a_file_of_float16_and_the_model_of_its_numbers(tmp_path, capsys):
    path, _ = save_mae(tmp_path)
    run_export("--resume", path, "--to", "safetensors", "--half", "--output", tmp_path / "out")
    run_export("--resume", path, "--to", "safetensors", "--output", tmp_path / "whole")
    half, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(half[name], value.half()) for name, value in whole.items())
    with pytest.raises(SystemExit):
        run_export("--resume", path, "--to", "timm", "--half", "--output", tmp_path / "timm")
    assert "--half: is for --to safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("probe", [False, True])
def test_classifier_as_safetensors(tmp_path, probe):
    path, vit = save_vit(tmp_path, not probe, probe)
    run_export("--resume", path, "--to", "safetensors", "--output", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    vit.load_state_dict(load_file(file))
    again = checkpoint.read_again(file)
    close(again.logits(IMAGES), vit(IMAGES))
    assert again.info["class_names"][2] == "big cat"
    assert again.info["recipe"] == ("linprobe" if probe else "finetune")
    assert "big cat, d&lt;o>g, eel." in (tmp_path / "out" / "README.md").read_text()


def test_code_of_the_card_loads_the_safetensors(tmp_path, capsys):
    path, mae = save_mae(tmp_path)
    run_export("--resume", path, "--to", "safetensors", "--output", tmp_path / "out")
    code = capsys.readouterr().out.split("load it with\n\n")[1]
    names = {}
    exec(code, names)
    noise = torch.rand(2, 16)
    close(names["model"](IMAGES, noise=noise)[1], mae(IMAGES, noise=noise)[1])


def test_torch_export(tmp_path):
    path, mae = save_mae(tmp_path)
    run_export("--resume", path, "--to", "torch_export", "--output", tmp_path / "out")
    model = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for number in (1, 2, 5):
        images = torch.randn(number, 3, 32, 32)
        close(model(images)[:, 0], encoder_features(mae, images, global_pool=False))
    config = load_config(tmp_path / "out")
    assert config["output"] == "tokens" and config["shape"] == [None, 3, 32, 32] and config["std"] == STD


def load_config(folder):
    from util.files import read_json

    return read_json(folder / "config.json")


def test_files_of_the_reference(tmp_path, capsys):
    """Encoder only, full, fine-tuned: no settings; a Namespace."""
    mae, vit = make_mae(), make_vit(True)
    encoder = {k: v for k, v in mae.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, tmp_path / "mae_pretrain.pth")
    torch.save(
        {"model": mae.state_dict(), "args": Namespace(input_size=224, norm_pix_loss=True)},
        tmp_path / "full.pth",
    )
    torch.save({"model": vit.state_dict()}, tmp_path / "mae_finetuned.pth")
    for name, part in [("mae_pretrain", "encoder"), ("full", "full"), ("mae_finetuned", "classifier")]:
        words = ["--num_heads", "3", "--decoder_num_heads", "4", "--resume", str(tmp_path / f"{name}.pth")]
        flags = export.get_args_parser().parse_args([*words, "--output", "out"])
        source = read_source(flags.resume, flags)
        assert source.part == part and source.info["input_size"] == (32, 32)
        assert (
            source.info["mean"] == pytest.approx([0.485, 0.456, 0.406]) and "mean and std" in source.notes[-1]
        )
        assert source.info["norm_pix_loss"] == (part == "full")
    tiny = models_vit.vit_tiny_patch16(num_classes=0).state_dict()
    torch.save(tiny, tmp_path / "tiny.pth")  # of a named width and depth: its heads are known
    assert checkpoint.read_again(tmp_path / "tiny.pth").info["num_heads"] == 3


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_from_timm(tmp_path, capsys, pool):
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, global_pool=pool, **sizes)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    torch.save(model.eval().state_dict(), tmp_path / "timm.pth")
    words = ("--from", "timm", "--resume", tmp_path / "timm.pth", "--num_heads", 3)
    run_export(*words, "--output", tmp_path / "out")
    assert "main_finetune.py --eval takes it" in capsys.readouterr().out
    vit = make_vit(pool == "avg")
    content = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    vit.load_state_dict(content["model"])
    close(vit(IMAGES), model(IMAGES))
    assert (
        content["model_info"]["global_pool"] == (pool == "avg") and content["model_info"]["nb_classes"] == 5
    )
    assert load_into(make_vit(), str(tmp_path / "out" / "model.pth")).dropped


def test_from_a_folder_without_config_and_from_the_web(tmp_path, monkeypatch):
    """Neither says more than the tensors; what was written is compared with the file all the same."""
    (tmp_path / "timm").mkdir()
    file = tmp_path / "timm" / "model.safetensors"
    state = make_vit().state_dict()
    export_timm.write_safetensors(file, state)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path, *_, **__: shutil.copy(file, path)
    )
    for name in (tmp_path / "timm", "https://somewhere/model.safetensors"):
        words = ("--from", "timm", "--resume", name, "--num_heads", 3, "--output", tmp_path / "out")
        run_export(*words, "--overwrite")
        content = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
        assert all(torch.equal(content["model"][key], value) for key, value in state.items())


def test_imported_classifier_is_evaluated_by_main_finetune(tmp_path):
    vit = models_vit.vit_tiny_patch16(num_classes=4, img_size=32)
    torch.save(vit.state_dict(), tmp_path / "timm.pth")
    run_export("--from", "timm", "--resume", tmp_path / "timm.pth", "--output", tmp_path / "out")
    args = main_finetune.get_args_parser().parse_args(
        ["--eval", "--resume", str(tmp_path / "out" / "model.pth")]
    )
    content = resume_classifier(args, "finetune", given={"eval", "resume"}).content
    assert args.model == "vit_tiny_patch16" and args.input_size == (32, 32) and args.nb_classes == 4
    assert torch.equal(content["model"]["head.weight"], vit.head.weight)


def test_every_target_has_the_same_functions():
    for target in export.TARGETS.values():
        own = {
            name: list(inspect.signature(function).parameters)
            for name, function in vars(target.module).items()
            if getattr(function, "__module__", "") == target.module.__name__ and not name.startswith("_")
        }
        reads = {"read": ["path", "args"]} if "read" in own else {}
        write_check_usage = [["source", "folder"], ["source", "path"], ["source", "folder"]]
        assert own == dict(zip(("write", "check", "usage"), write_check_usage, strict=True), **reads)


def test_model_card(tmp_path):
    path, _ = save_mae(tmp_path, model_note="a|b\n{{ c }}<i>")
    run_export("--resume", path, "--to", "timm", "--output", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "\nlicense" not in card
    assert "| train_loss | 0.83 |" in card and "After epoch 7" in card  # the checkpoint's, not the log's last
    assert "| epochs | 400 |" in card and "| mask_ratio | 0.6 |" in card and "`photos`" in card
    assert "| model_note | a\\|b {{ c }}&lt;i> |" in card  # stays in its cell, is no template, no HTML
    assert "somebody" not in card and str(tmp_path) not in card  # nobody's folders
    assert 'checkpoint_path="out/model.safetensors"' in card and "Licence" in card
    (tmp_path / "log.txt").unlink()
    run_export("--resume", path, "--to", "timm", "--output", tmp_path / "out", "--overwrite")
    assert "There was no log.txt" in (tmp_path / "out" / "README.md").read_text()


def test_a_wrong_result_leaves_nothing(tmp_path, capsys, monkeypatch):
    path, _ = save_mae(tmp_path)
    run_export("--resume", path, "--to", "timm", "--output", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    capsys.readouterr()

    def write_wrong(source, folder, write=export_timm.write):
        write(source, folder)
        source.vit.norm.bias.data[3] += 2e-4

    monkeypatch.setattr(export_timm, "write", write_wrong)
    words = ("--resume", path, "--to", "timm")
    line = refused(capsys, *words, "--output", tmp_path / "new", status=1)
    assert "a difference of 2.0e-04, more than 0.0001; nothing was written" in line
    refused(capsys, *words, "--output", tmp_path / "out", "--overwrite", status=1)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-7.pth", "log.txt", "out"]


def test_not_a_number_is_no_agreement(capsys):
    source = Namespace(path="x.pth")
    for values in ({"a": 0.0, "b": float("nan")}, {"a": float("nan"), "b": 0.0}):
        with pytest.raises(export.TrainingError, match="a difference of nan"):
            export.require_agreement(source, values)


def test_output_folder(tmp_path, capsys):
    path, _ = save_mae(tmp_path)
    words = ("--resume", path, "--to", "safetensors", "--output")
    (tmp_path / "empty").mkdir()
    run_export(*words, tmp_path / "empty")
    assert "exists and is not empty; pass --overwrite" in refused(capsys, *words, tmp_path / "empty")
    run_export(*words, tmp_path / "empty", "--overwrite")
    line = refused(capsys, *words, tmp_path, "--overwrite")  # a folder with somebody's other files
    assert "also holds checkpoint-7.pth, empty, log.txt" in line and path.exists()
    assert "is a file" in refused(capsys, *words, path)
    run_export(*words, tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "model.safetensors").exists()


def test_mistakes(tmp_path, capsys):
    path, mae = save_mae(tmp_path)
    out = ("--output", tmp_path / "out")
    assert "invalid choice: 'keras'" in bad_choice(capsys, "--resume", path, "--to", "keras", *out)
    assert "pass one of --to" in refused(capsys, "--resume", path, *out)
    assert "pass one of --to" in refused(capsys, "--resume", path, "--to", "hf", "--from", "hf", *out)
    assert "no such file" in refused(capsys, "--resume", tmp_path / "no.pth", "--to", "timm", *out)
    (tmp_path / "text.pth").write_text("hello")
    assert "cannot be read as a checkpoint" in refused(
        capsys, "--resume", tmp_path / "text.pth", "--to", "timm", *out
    )
    decoder = {k: v for k, v in mae.state_dict().items() if k.startswith("decoder")}
    for content, kind in [
        ({"model": decoder}, "a decoder without its encoder"),
        ({"model": {"conv1.weight": torch.zeros(3)}}, "not a vision transformer"),
        (
            {"model": {**mae.state_dict(), "dist_token": torch.zeros(1)}},
            "not a plain ViT of this code.*dist_token",
        ),
        ({"model": {k: v * float("nan") for k, v in mae.state_dict().items()}}, "its weights are not finite"),
    ]:
        torch.save({**content, "args": {"num_heads": 3, "decoder_num_heads": 4}}, tmp_path / "x.pth")
        line = refused(capsys, "--resume", tmp_path / "x.pth", "--to", "timm", *out)
        assert re.search(kind, line), line
    line = refused(capsys, "--resume", path, "--from", "timm", *out)
    assert "is no file of timm's but full MAE" in line and "take it as it is" in line
    encoder = {k: v for k, v in mae.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    torch.save(to_hugging_face(encoder), tmp_path / "hf.pth")
    line = refused(capsys, "--resume", tmp_path / "hf.pth", "--num_heads", 3, "--from", "timm", *out)
    assert "Hugging Face ViTMAE, encoder only; pass --from hf" in line
    size = refused(capsys, "--resume", path, "--to", "timm", "--input_size", "40", *out)
    assert "--input_size 40x40: does not give the 16 patches of 8x8 pixels" in size
    assert "--num_heads 0: must be at least 1" in refused(
        capsys, "--resume", path, "--to", "timm", "--num_heads", 0, *out
    )
    assert not (tmp_path / "out").exists()


def bad_choice(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        run_export(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_settings_that_a_file_does_not_tell(tmp_path, capsys):
    mae = make_mae(img_size=(16, 48))
    out = ("--to", "safetensors", "--output", tmp_path / "out")
    torch.save({"model": mae.state_dict()}, tmp_path / "bare.pth")
    words = ["--resume", tmp_path / "bare.pth"]
    assert "pass --num_heads" in refused(capsys, *words, *out)
    words += ["--num_heads", 3]
    assert "pass --input_size" in refused(capsys, *words, *out)
    words += ["--input_size", "16x48"]
    assert "pass --decoder_num_heads" in refused(capsys, *words, *out)
    run_export(*words, "--decoder_num_heads", 4, "--norm_pix_loss", *out)
    again = checkpoint.read_again(tmp_path / "out" / "model.safetensors")
    assert again.info["norm_pix_loss"] is True


def test_missing_package(tmp_path, capsys, monkeypatch):
    path, _ = save_mae(tmp_path)
    for name in ("transformers", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "onnx", Namespace())
    line = refused(capsys, "--resume", path, "--to", "hf", "--output", tmp_path / "out")
    assert "hf: needs transformers, which is not installed: pip install transformers" in line
    line = refused(capsys, "--resume", path, "--to", "onnx", "--output", tmp_path / "out")
    assert line.endswith("pip install onnxscript onnxruntime\n")


def test_a_full_disk_is_said_before_writing(tmp_path, capsys, monkeypatch):
    path, _ = save_mae(tmp_path)
    monkeypatch.setattr("util.export.files.shutil.disk_usage", lambda _: Namespace(free=1000))
    line = refused(capsys, "--resume", path, "--to", "timm", "--output", tmp_path / "out")
    assert "0 MB are free" in line and not (tmp_path / "out").exists()


def test_own_checkpoint_goes_back_and_forth(tmp_path):
    """timm file -> model.pth -> timm file: the same tensors."""
    path, _ = save_vit(tmp_path, True)
    run_export("--resume", path, "--to", "timm", "--output", tmp_path / "a")
    run_export("--from", "timm", "--resume", tmp_path / "a", "--output", tmp_path / "b")
    run_export("--resume", tmp_path / "b" / "model.pth", "--to", "timm", "--output", tmp_path / "c")
    first, last = (load_file(tmp_path / x / "model.safetensors") for x in "ac")
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)
    assert load_config(tmp_path / "a") == load_config(tmp_path / "c")


@pytest.mark.parametrize(
    ("head", "layers"), [("upsample", 1), pytest.param("linear", 2, marks=pytest.mark.slow)]
)
def test_a_segmenter_as_torch_export(tmp_path, head, layers, capsys):
    """Its own logits of the pixels at any number of images; other targets take the encoder, and say so."""
    path, model = save_segmenter(tmp_path, head, layers)
    words = ["--resume", path, "--num_heads", 3]
    run_export(*words, "--to", "torch_export", "--output", tmp_path / "out")
    assert "exporting the classifier of pixels" in capsys.readouterr().out
    program = torch.export.load(tmp_path / "out/model.pt2").module()
    for number in (1, 2):
        found = program(IMAGES[:number])
        assert found.shape == (number, 3, 32, 32)
        close(found, model(IMAGES[:number]))
    config = read_json(tmp_path / "out/config.json")
    assert config["output"] == "pixel_logits" and config["class_names"] == ["ground", "ball", "cube"]
    card = (tmp_path / "out/README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and "| classes | 3 |" in card

    run_export(*words, "--to", "timm", "--output", tmp_path / "timm")
    text = capsys.readouterr().out
    assert "exporting the encoder" in text and "gives each pixel a class, is left out" in text
    close(printed_model(text).forward_features(IMAGES), model.norm(model.forward_tokens(IMAGES)))
    run_export(*words, "--to", "timm", "--encoder_only", "--output", tmp_path / "encoder")
    assert "left out" not in capsys.readouterr().out

    state = model.state_dict() | {"head.classify.weight": torch.zeros(3, 5, 1, 1)}
    content = torch.load(path, weights_only=True)
    torch.save(content | {"model": state}, path)
    error = refused(capsys, *words, "--to", "torch_export", "--output", tmp_path / "no")
    assert "its head is none of main_segment.py's (head.classify.weight: (3, 5, 1, 1) in the file" in error
    assert not (tmp_path / "no").exists()
