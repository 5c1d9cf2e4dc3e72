"""`--decoder cross` as a user runs it: pictures and losses, resuming, what reads its files, wrong flags."""

import importlib.util
import math
from argparse import Namespace

import pytest
import torch
from export_utils import make_mae, run_export, save_mae
from golden_utils import REPO, TINY_MAE
from image_utils import make_folder
from test_main_pretrain import assert_same, names_in, run, weights
from test_teacher import write_teacher

import models_mae
from models_cross import CrossDecoderViT
from util.cli.parser import ArgumentParser
from util.errors import UserError
from util.export import hf
from util.export.checkpoint import read_again
from util.figures.reconstruction import mask_noise, reconstruct
from util.weights.build import build
from util.weights.describe import describe
from util.weights.files import read_file

CROSS = ["--model", "mae_vit_nano", "--decoder", "cross", "--save_freq", "1"]

pytestmark = pytest.mark.usefixtures("nano")


def full(path):
    return build(describe(read_file(path), path, Namespace(), "full"))


def test_resumed_inside_an_epoch_is_uninterrupted_bit_for_bit(images, tmp_path, capsys):
    own = [*CROSS, "--predict_ratio", "0.25", "--vis_freq", "1"]
    whole = run(images, tmp_path / "whole", *own)
    assert "reconstruction-1.png" in names_in(tmp_path / "whole") and math.isfinite(whole[1]["val_loss"])
    run(images, tmp_path / "parts", *own, "--max_steps", "4")
    text = r"inside an epoch, .* differs: predict_ratio 0\.25 -> 1\.0; keep to it"
    with pytest.raises(UserError, match=text):
        run(images, tmp_path / "parts", *CROSS, "--vis_freq", "1", "--resume", "auto")
    with pytest.raises(UserError, match=r"\(full MAE \(encoder and cross-attention decoder\)\)"):
        run(images, tmp_path / "parts", *CROSS, "--decoder", "self", "--resume", "auto")
    assert run(images, tmp_path / "parts", *own, "--resume", "auto") == whole
    last = "checkpoint-1.pth"
    assert_same(weights(tmp_path / "whole" / last), weights(tmp_path / "parts" / last))


def test_held_out_losses_are_of_all_masked_patches_whatever_the_share(images, tmp_path):
    """Without a step, the model is the same, and its training loss is not."""
    found = []
    for ratio in ("1", "0.1"):
        own = ["--epochs", "1", "--warmup_epochs", "0", "--lr", "0", "--vis_freq", "1"]
        found += run(images, tmp_path / ratio, *CROSS, *own, "--predict_ratio", ratio)
    assert found[0]["val_loss"] == found[1]["val_loss"]
    assert found[0]["train_loss"] != pytest.approx(found[1]["train_loss"], rel=1e-4)
    # Queries that are not scored change nothing of the others
    assert_same(*(weights(tmp_path / ratio / "checkpoint-0.pth") for ratio in ("1", "0.1")))


def test_it_learns_one_picture(tmp_path):
    """From the loss of a constant prediction, 1 with normalised patches, to a fifth of it."""
    make_folder(tmp_path / "images" / "train", 4)
    own = ["--norm_pix_loss", "--predict_ratio", "0.5", "--epochs", "60", "--lr", "5e-3", "--seed", "1"]
    log = run(tmp_path / "images", tmp_path / "out", *CROSS, "--save_freq", "100", *own)
    assert log[-1]["train_loss"] < 0.8 * log[0]["train_loss"]


def test_its_files_make_pictures(images, tmp_path):
    run(images, tmp_path, *CROSS, "--epochs", "1", "--predict_ratio", "0.5")
    path = tmp_path / "checkpoint-0.pth"
    model = full(path)
    assert type(model) is CrossDecoderViT and not model.training
    assert read_file(path)["args"]["predict_ratio"] == 0.5
    removed = torch.zeros(16, dtype=torch.bool)
    removed[3:9] = True
    noise, ratio = mask_noise(removed, 2)
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    panels = reconstruct(model, batch, noise, ratio, (0.5,) * 3, (0.2,) * 3)
    # Of all patches, the visible ones too: none is the flat grey of a patch that was not predicted
    prediction = model.patchify(panels["reconstruction"])
    assert prediction.std(dim=2).min() > 1e-3
    spec = importlib.util.spec_from_file_location("demo_visualize", REPO / "demo/visualize.py")
    spec.loader.exec_module(demo := importlib.util.module_from_spec(spec))
    words = ["--resume", path, images / "val", "--rows", "2", "--output", tmp_path / "picture.png"]
    demo.main(ArgumentParser(parents=[demo.get_args_parser()]).parse_args([str(word) for word in words]))
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_new_run_takes_the_decoder_that_fits_and_no_other(images, tmp_path, capsys):
    run(images, tmp_path / "cross", *CROSS, "--epochs", "1")
    path = tmp_path / "cross" / "checkpoint-0.pth"
    capsys.readouterr()
    own = ["--epochs", "1", "--lr", "0", "--warmup_epochs", "0", "--init", str(path)]
    run(images, tmp_path / "again", *CROSS, *own)
    assert "decoder: taken\n" in capsys.readouterr().out
    assert_same(weights(path), weights(tmp_path / "again" / "checkpoint-0.pth"))
    run(images, tmp_path / "self", *CROSS, *own, "--decoder", "self")
    out = capsys.readouterr().out
    assert "encoder and cross-attention decoder" in out and "decoder: the file's does not fit (" in out
    ends = weights(path), weights(tmp_path / "self" / "checkpoint-0.pth")
    assert torch.equal(*(state["blocks.1.mlp.fc1.weight"] for state in ends))
    assert not torch.equal(*(state["mask_token"] for state in ends))


def test_it_learns_from_a_teacher(images, tmp_path):
    """The share is drawn in the step that also imitates; held-out losses are as without."""
    teacher, own = (
        write_teacher(tmp_path / "teacher.pth"),
        [*CROSS, "--epochs", "1", "--predict_ratio", "0.5"],
    )
    log = run(images, tmp_path / "a", *own, "--teacher", str(teacher))
    assert log[0]["train_teacher_loss"] > 0
    full(tmp_path / "a" / "checkpoint-0.pth")
    rate = ["--lr", "0", "--warmup_epochs", "0"]
    (with_it,) = run(images, tmp_path / "b", *own, *rate, "--teacher", str(teacher))
    (without,) = run(images, tmp_path / "c", *own, *rate)
    assert with_it["train_loss"] == without["train_loss"]


def test_exports(tmp_path, capsys):
    """An encoder to anywhere; the whole to this code alone, and with the numbers of the checkpoint."""
    path, model = save_mae(tmp_path, make_mae(kind=CrossDecoderViT), model="mae_vit_nano")
    with pytest.raises(
        UserError, match="--to hf: its ViTMAE has no cross-attention decoder; pass --encoder_o"
    ):
        hf.write(read_again(path), tmp_path)
    run_export("--resume", path, "--to", "timm", "--output", tmp_path / "timm")
    run_export("--resume", path, "--to", "safetensors", "--output", tmp_path / "own")
    out = capsys.readouterr().out
    code = out[out.rindex("import models_cross") :]
    code = "from functools import partial\nimport torch\n" + code[: code.index("model.eval()") + 12]
    names = {}
    exec(code, names)
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    for theirs in (names["model"], full(tmp_path / "own" / "model.safetensors")):
        for ours, again in zip(model(batch, 0.75, noise), theirs(batch, 0.75, noise), strict=True):
            torch.testing.assert_close(again, ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        ["--predict_ratio", "0"],
        ["--predict_ratio", "-0.5"],
        ["--predict_ratio", "1.01"],
        ["--predict_ratio", "nan"],
        ["--predict_ratio", "0.5", "--decoder", "self"],
    ],
)
def test_shares_that_cannot_be(images, tmp_path, flags):
    with pytest.raises(UserError, match=r"--predict_ratio \S+: must be above 0 and at most 1, and 1 without"):
        run(images, tmp_path / "out", *CROSS, *flags)
    assert not (tmp_path / "out").exists()


def test_a_constructor_of_a_class_of_its_own_is_named(images, tmp_path, monkeypatch):
    def mae_vit_own(**sizes):
        return models_mae.MaskedAutoencoderViT(**{**TINY_MAE, **sizes})

    monkeypatch.setitem(models_mae.MODELS, "mae_vit_own", mae_vit_own)
    with pytest.raises(UserError, match=r"--model mae_vit_own: .* got an unexpected keyword argument 'make'"):
        run(images, tmp_path / "out", *CROSS, "--model", "mae_vit_own")
