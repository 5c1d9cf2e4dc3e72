"""`main_pretrain.py --init` as a user runs it: what is taken and told, freezing, resuming, mistakes."""

import json
import re
import sys
from argparse import Namespace

import pytest
import torch
from export_utils import make_vit, run_export
from golden_utils import TINY_MAE
from image_utils import make_folder
from test_main_pretrain import TINY, assert_same, names_in, weights
from test_main_pretrain import run as run_main
from test_resuming import content_of, state_of_folder
from torch import nn
from transfer_utils import NORM, vit_test

import main_finetune
import main_pretrain
import models_mae
import models_vit
from util.cli.parser import ArgumentParser, run_script
from util.errors import UserError
from util.evaluate.features import encoder_features
from util.recipes.init import Init
from util.weights.build import build
from util.weights.describe import describe
from util.weights.files import read_file
from util.weights.flags import warn_of_other_stats


def encoder_only(model):
    return {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder", "mask_token"))}


def mae_test(**kwargs):
    """A named model small enough for tests."""
    return models_mae.MaskedAutoencoderViT(**{**TINY_MAE, "norm_layer": NORM, **kwargs})


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setitem(models_mae.MODELS, "mae_test", mae_test)
    monkeypatch.setitem(models_vit.MODELS, "vit_test", vit_test)


def run(images, out, *flags):
    return run_main(images, out, "--model", "mae_test", *flags)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "images"
    make_folder(root / "train", 13, classes=2)
    make_folder(root / "val", 5, classes=2)
    return root


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def whole(tmp_path):
    """A checkpoint of the model of `TINY`, every tensor moved, with what such files say; its model."""
    torch.manual_seed(3)
    model = mae_test(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    path = tmp_path / "start.pth"
    said = {"input_size": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    torch.save({"model": model.state_dict(), "args": {**said, "norm_pix_loss": False}}, path)
    return path, model


@pytest.fixture
def encoder(tmp_path, whole):
    torch.save({"model": encoder_only(whole[1])}, tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


def test_same_shapes_train_as_a_fresh_run_given_the_same_weights(images, out, whole, capsys, monkeypatch):
    path, model = whole
    run(images, out, "--init", str(path), "--warmup_epochs", "0", "--max_steps", "2")
    text, err = capsys.readouterr()
    assert f"encoder: {path} (full MAE (encoder and decoder))\n  decoder: taken\n" in text and not err
    content = content_of(out / "checkpoint-0-step2.pth")
    assert content["epoch"] == -1 and content["args"]["init"] == str(path)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(content["args"]["init_taken"]["parameters"]) == trained
    assert "  decoder: taken" in content["args"]["init_taken"]["report"]
    build_model = main_pretrain.build_model

    def given(args):
        fresh = build_model(args)
        fresh.load_state_dict(model.state_dict())
        return fresh

    monkeypatch.setattr(main_pretrain, "build_model", given)
    run(images, out.with_name("same"), "--warmup_epochs", "0", "--max_steps", "2")
    assert_same(
        weights(out / "checkpoint-0-step2.pth"), weights(out.with_name("same") / "checkpoint-0-step2.pth")
    )
    assert not torch.equal(content["model"]["norm.weight"], model.norm.weight)  # it trained


def test_an_encoder_alone_gets_a_new_decoder_and_says_so(images, out, encoder, whole, capsys):
    run(images, out, "--init", str(encoder), "--max_steps", "1", "--lr", "0")
    text = capsys.readouterr().out
    assert "decoder: none in the file (encoder only); a new one, as initialised here" in text
    content = content_of(out / "checkpoint-0-step1.pth")
    assert all(torch.equal(content["model"][k], v) for k, v in encoder_only(whole[1]).items())
    taken = content["args"]["init_taken"]["parameters"]
    assert {*taken, "pos_embed"} == encoder_only(whole[1]).keys()


def test_freezing_trains_only_what_is_new_and_resumes_exactly(images, out, encoder, whole):
    start = encoder_only(whole[1])
    flags = ("--init", str(encoder), "--init_freeze", "1", "--epochs", "3", "--warmup_epochs", "0")
    flags += ("--save_freq", "1", "--lr", "1e-3")
    run(images, out, *flags)
    first, second = (weights(out / f"checkpoint-{epoch}.pth") for epoch in (0, 1))
    assert all(torch.equal(first[key], start[key]) for key in start)
    assert not torch.equal(first["decoder_pred.weight"], second["decoder_pred.weight"])
    frozen = [key for key in start if torch.equal(second[key], start[key])]
    assert frozen == ["pos_embed"]  # which never trains
    cut = out.with_name("cut")
    for steps, resume in ((2, ""), (4, "auto"), (0, "auto")):  # inside the first and the second epoch
        run(images, cut, *flags, "--max_steps", str(steps), "--resume", resume)
    assert_same(weights(out / "checkpoint-2.pth"), weights(cut / "checkpoint-2.pth"))
    assert content_of(cut / "checkpoint-2.pth")["args"]["init_taken"]["parameters"]
    with pytest.raises(UserError, match=r"--init_freeze 0: .* was trained with 1"):
        run(images, cut, *flags[4:], "--epochs", "4", "--resume", "auto")


def test_a_resumed_run_does_not_read_the_file_again(images, out, encoder, capsys):
    flags = ("--init", str(encoder), "--epochs", "2", "--save_freq", "1")
    run(images, out, *flags, "--max_steps", "1")
    encoder.rename(encoder.with_name("moved.pth"))
    capsys.readouterr()
    run(images, out, *flags, "--resume", "auto", "--max_steps", "2")
    text, err = capsys.readouterr()
    assert "not read, as the run goes on from" in err and "encoder:" not in text
    run(images, out, *flags[2:], "--resume", str(out / "checkpoint-0-step2.pth"))  # nor needs it be said
    err = capsys.readouterr().err
    assert not err
    args = content_of(out / "checkpoint-1.pth")["args"]
    assert args["init"] == str(encoder) and args["init_taken"]["parameters"]


def test_what_cannot_have_been_meant_is_an_error_and_harms_nothing(images, out, encoder, whole, capsys):
    run(images, out, "--epochs", "1")
    before, last, file = state_of_folder(out), str(out / "checkpoint-0.pth"), str(whole[0])
    cases = [
        (
            ("--init", file, "--resume", last),
            r"--init \S+, --resume \S+: a run starts from weights .*leave one",
        ),
        (("--init", file, "--resume", "auto"), r"its run started without --init; for a new run pass another"),
        (("--init", last), r"holds --init \S+checkpoint-0.pth, and this run would overwrite it"),
        (("--init_freeze", "2"), r"--init_freeze 2: is for what --init FILE does not hold"),
        (("--init", file, "--init_freeze", "2"), r"holds all of the model, so nothing would train"),
        (("--weights_key", "ema"), "--weights_key ema: is of a file to start from"),
        (("--init", file, "--weights_key", "ema"), r"holds no vision transformer of that name, but 'model'"),
        (("--resume", "auto", "--seed", "5"), rf"is complete, .*more --epochs; .* --init {last}"),
    ]
    for flags, message in cases:
        with pytest.raises(UserError, match=message) as error:
            run(images, out, "--epochs", "1", *flags)
        assert "\n" not in str(error.value)
        assert state_of_folder(out) == before, flags
    capsys.readouterr()
    other = out.with_name("b")
    run(images, other, "--init", file, "--norm_pix_loss", "--max_steps", "1", "--std", "0.2")
    err = capsys.readouterr().err
    assert "its decoder does not predict normalised patches, as it is to do now" in err
    assert "was trained with --std 0.229 0.224 0.225, now it is 0.2" in err
    with pytest.raises(UserError, match=r"its run started from \S+start.pth; for a new run pass another"):
        run(images, other, "--init", str(encoder), "--resume", "auto")


def test_freezing_without_weights_is_an_error(images, out, tmp_path):
    freeze = ("--init_freeze", "2", "--max_steps", "1")
    with pytest.raises(UserError, match=r"--init_freeze 2: .* this run starts without one"):
        run(images, out, *freeze, "--resume", "auto")
    run(images, out, "--max_steps", "1")
    content = torch.load(out / "checkpoint-0-step1.pth", weights_only=False)
    content["args"] = {k: v for k, v in content["args"].items() if "init" not in k}
    torch.save(content, tmp_path / "other.pth")  # as of the reference: it does not say
    with pytest.raises(UserError, match=r"--init_freeze 2: .* this run starts without one"):
        run(images, out, *freeze, "--resume", str(tmp_path / "other.pth"))
    assert names_in(out) == ["checkpoint-0-step1.pth"]


def test_other_weights_than_a_run_began_with_are_seen(images, out, whole, tmp_path, capsys):
    named = tmp_path / "a\n\x1b[0m.pth"
    torch.save({"model_ema": whole[1].state_dict()}, named)
    flags = ("--weights_key", "model_ema", "--resume", "auto", "--max_steps")
    run(images, out, "--init", str(named), *flags, "1")
    assert "encoder: " + str(tmp_path / r"a\n\x1b[0m.pth") in capsys.readouterr().out
    with pytest.raises(UserError, match=r"run started from \S+, --weights_key model_ema; for a new run"):
        run(images, out, "--init", str(named), "--resume", "auto")
    capsys.readouterr()
    run(images, out, "--init", "elsewhere/" + named.name, *flags, "2")  # moved, or of another run
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: --init elsewhere/a") and str(tmp_path) in err


def test_adapted_models_go_on_everywhere(images, out, whole, tmp_path, capsys):
    flags = ("--in_chans", "1", "--patch_size", "16", "--input_size", "48")
    run(images, out, "--init", str(whole[0]), *flags, "--epochs", "1")
    text = capsys.readouterr().out
    for line in (
        "4x4 patches, computed anew for 3x3",
        "3 channels, summed for 1",
        "8x8 pixels, resampled for 16x16",
    ):
        assert line in text
    path = out / "checkpoint-0.pth"
    for target in ("timm", "safetensors"):
        run_export("--resume", path, "--to", target, "--output", tmp_path / target)
    assert "differ" in capsys.readouterr().out
    content = read_file(path)
    model = build(describe(content, str(path), Namespace(), "full"))
    assert model.in_chans == 1 and model.patch_size == 16 and model.img_size == (48, 48)
    tuned = build(describe(read_file(tmp_path / "timm"), "timm", Namespace(), "encoder"))
    picture = torch.randn(1, 1, 48, 48)
    with torch.no_grad():  # float32, the same operations
        torch.testing.assert_close(
            tuned.forward_features(picture), encoder_features(model, picture, False), rtol=0, atol=1e-5
        )


def test_classifiers_adapt_too(images, tmp_path, whole, capsys):
    words = "--model vit_test --input_size 48 --patch_size 16 --in_chans 1 --batch_size 4 --epochs 1"
    words += f" --warmup_epochs 0 --num_workers 0 --device cpu --data_path {images} --max_steps 1 --log_dir"
    words = [*words.split(), "", "--output_dir", str(tmp_path / "tuned"), "--finetune", str(whole[0])]
    start(main_finetune, words)
    text = capsys.readouterr().out
    assert "3 channels, summed for 1" in text and "4x4 patches, resized to 3x3" in text


def start(script, words):
    """As from a shell."""
    before, sys.argv = sys.argv, [script.__name__, *words]
    try:
        run_script(
            script.main, ArgumentParser(prog=f"{script.__name__}.py", parents=[script.get_args_parser()])
        )
    finally:
        sys.argv = before


def conv_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()


VIT = make_vit(depth=1).state_dict()
BAD = {
    "another architecture": ({"model": VIT}, r"1 blocks, width 24.* does not fit .*2 blocks.*--model"),
    "conv net": ({"state_dict": conv_net()}, "not a vision transformer"),
    "register tokens": ("reg_token", r"4 registers\) does not fit .* 0 registers\).*--registers 4"),
    "registers with positions": ("placed", "a position table of 20 patches is not square"),
    "video": ({"model": VIT | {"patch_embed.proj.weight": torch.zeros(24, 3, 2, 8, 8)}}, "a model of videos"),
    "no position table": ({"model": {k: v for k, v in VIT.items() if k != "pos_embed"}}, r"\(pos_embed\) is"),
    "half the blocks": ("half", r"its encoder \(1 blocks, width 24.* does not fit .*\(2 blocks"),
    "half a block": ("part", r"is no plain ViT, though of the model's size: blocks\.1\.mlp"),
    "empty": ({}, "not a vision transformer .*keys: none"),
    "empty model": ({"model": {}}, "not a vision transformer .*keys: none"),
    "optimizer": (torch.optim.AdamW(make_vit().parameters()).state_dict(), "an optimizer's state"),
    "a list": ([VIT["cls_token"]], "holds a list, not a checkpoint"),
    "decoder": ({"decoder_pred.weight": torch.ones(3, 3)}, "a decoder without its encoder"),
    "not finite": ("nan", r"not finite \(norm\.weight\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_end_in_one_line(images, out, whole, name, capsys, tmp_path):
    content, reason = BAD[name]
    state = whole[1].state_dict()
    parts = {
        "reg_token": state | {"reg_token": torch.zeros(1, 4, 24)},
        "placed": state | {"reg_token": torch.zeros(1, 4, 24), "pos_embed": torch.ones(1, 21, 24)},
        "half": {k: v for k, v in state.items() if not k.startswith("blocks.1")},
        "part": {k: v for k, v in state.items() if not k.startswith("blocks.1.mlp")},
        "nan": state | {"norm.weight": torch.full((24,), torch.nan)},
    }
    path = tmp_path / "bad.pth"
    torch.save({"model": parts[content]} if isinstance(content, str) else content, path)
    with pytest.raises(SystemExit) as stop:
        command = ["--data_path", str(images), "--output_dir", str(out), "--log_dir", "", *TINY]
        start(main_pretrain, [*command, "--model", "mae_test", "--init", str(path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"main_pretrain.py: error: --init {path}")
    assert re.search(reason, error), error
    assert not out.exists() or names_in(out) == []


def test_data_of_another_set_is_another_run_in_the_log(images, out):
    run(images, out, "--epochs", "1")
    make_folder(images.with_name("others") / "train", 9, classes=2)
    run(images.with_name("others"), out, "--epochs", "2", "--resume", "auto")
    ids = [json.loads(line)["run"] for line in (out / "log.txt").read_text().splitlines()]
    assert len(ids) == 2 and ids[0] != ids[1]
    assert [content_of(out / f"checkpoint-{i}.pth")["run"]["id"] for i in (0, 1)] == ids
    run(
        images.with_name("others"), out, "--epochs", "3", "--resume", "auto"
    )  # which is the run that auto finds
    assert [json.loads(line)["run"] for line in (out / "log.txt").read_text().splitlines()] == [*ids, ids[1]]
    assert names_in(out) == ["checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-2.pth", "log.txt"]


def test_the_range_of_deep_images_is_a_default(tmp_path, capsys):
    """A new run's images may be others than the file's: in depth, in range, in channels."""

    def settled(own, channels=1, **args):
        torch.save({"model": {}, "args": {"seed": 0, **args}}, tmp_path / "deep.pth")
        flags = Namespace(init=str(tmp_path / "deep.pth"), init_freeze=0, no_verify=False, weights_key="")
        flags.pixel_range, flags.in_chans = own, channels
        Init(flags, None, set())
        return flags.pixel_range

    grey, bands = {"pixel_range": (0, 9), "in_chans": 1}, {"pixel_range": (0, 9, 1, 5), "in_chans": 2}
    assert settled("auto", **grey) == settled("auto", 3, **grey) == (0, 9)
    assert settled("auto", 2, **bands) == (0, 9, 1, 5) and settled("auto", 3, **bands) == "auto"
    assert settled("auto") == "auto" and settled([0.0, 8.0]) == [0.0, 8.0]  # the file's are of 8 bits
    assert settled([0.0, 8.0], **grey) == [0.0, 8.0]
    flags = Namespace(mean=(0.5,), std=(0.2,), pixel_range=(0.0, 9.0))
    warn_of_other_stats(flags, {"args": {**grey, "mean": [0.5]}}, "a.pth")
    assert not capsys.readouterr().err
    for own, told in (((0.0, 8.0), "0.0 8.0"), (None, "that of 8 bits")):
        flags.pixel_range = own
        warn_of_other_stats(flags, {"args": grey}, "a.pth")
        assert f"a.pth was trained with --pixel_range 0 9, now it is {told}\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="is damaged"):
        settled("auto", pixel_range=(3, 1))
