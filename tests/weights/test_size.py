"""`--input_size` of predict.py and the demos: a model at another size than it was trained at."""

import filecmp
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_utils import REPO, fill
from image_utils import make_folder
from torch.nn.functional import interpolate

import predict
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.cli.parser import ArgumentParser, parse_args
from util.errors import UserError
from util.pos_embed import get_2d_sincos_pos_embed
from util.weights.build import build
from util.weights.flags import add_decoder_args, add_weights_args
from util.weights.size import describe_file

sys.path.append(str(REPO / "demo"))
import visualize

SIZES = dict(img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=3)
ARGS = {"input_size": (32, 48), "num_heads": 3, "decoder_num_heads": 2, "mean": [0.4] * 3, "std": [0.2] * 3}
WORDS = ["position table is computed anew", "was trained at 32x48 pixels, now it is 64x32", "may do worse"]


def save_mae(path: Path, table: torch.Tensor | None = None) -> Path:
    model = MaskedAutoencoderViT(**SIZES, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    model = fill(model, seed=5, std=0.2, skip="pos_embed").float()
    if table is not None:
        model.pos_embed.data = table
    torch.save({"model": model.state_dict(), "args": {**ARGS, "norm_pix_loss": True}}, path)
    return path


def save_classifier(path: Path) -> Path:
    model = fill(VisionTransformer(global_pool=True, num_classes=3, **SIZES), seed=5, std=0.2).float()
    info = {
        **ARGS,
        "patch_size": 8,
        "in_chans": 3,
        "global_pool": True,
        "recipe": "finetune",
        "nb_classes": 3,
    }
    torch.save({"model": model.state_dict(), "model_info": {**info, "class_names": ["a", "b", "c"]}}, path)
    return path


def described(path, *words, part="full"):
    parser = ArgumentParser()
    add_weights_args(parser)
    add_decoder_args(parser)
    return describe_file(parse_args(parser, ["--resume", str(path), *words]), part)


def run(script, *words):
    parser = ArgumentParser(parents=[script.get_args_parser()])
    script.main(parse_args(parser, [str(word) for word in words]))


def test_its_own_size_changes_nothing_to_the_bit(tmp_path, capsys):
    """Neither tensors nor what the scripts write."""
    mae, classifier = save_mae(tmp_path / "m.pth"), save_classifier(tmp_path / "c.pth")
    own = ["--input_size", "32x48"]
    state = torch.load(mae, weights_only=True)["model"]
    model = build(described(mae, *own))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    images = make_folder(tmp_path / "images", 2)
    for i, flags in enumerate(([], own)):
        common = ["--num_workers", 0, *flags]
        run(predict, images, "--resume", classifier, "--csv", tmp_path / f"{i}.csv", *common)
        run(predict, images, "--resume", mae, "--features", tmp_path / f"{i}.npz", *common)
        run(visualize, images, "--resume", mae, "--output", tmp_path / f"{i}.png", "--attention", *flags)
    for kind in (".csv", ".npz", ".png", "-attention.png"):
        assert filecmp.cmp(tmp_path / f"0{kind}", tmp_path / f"1{kind}", shallow=False), kind
    assert "position table" not in capsys.readouterr().err


def test_a_fixed_table_is_computed_anew_for_another_size(tmp_path, capsys):
    """Encoder's and decoder's: the model is the one that is made at that size and given the other weights."""
    path = save_mae(tmp_path / "m.pth")
    model = build(described(path, "--input_size", "64x32"))
    err = capsys.readouterr().err
    assert all(words in err for words in WORDS) and err.count("\n") == 1
    sizes = {**SIZES, "img_size": (64, 32), "norm_layer": partial(torch.nn.LayerNorm, eps=1e-6)}
    made = MaskedAutoencoderViT(**sizes, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2,
                                norm_pix_loss=True)  # fmt: skip
    state = torch.load(path, weights_only=True)["model"]
    made.load_state_dict({**state, **{k: v for k, v in made.state_dict().items() if "pos_embed" in k}})
    images, noise = torch.randn(2, 3, 64, 32), torch.rand(2, 32)
    for one, two in zip(model(images, 0.5, noise), made.eval()(images, 0.5, noise), strict=True):
        assert torch.equal(one, two)


def test_a_learned_table_is_resized_and_16_bits_are_still_fixed(tmp_path, capsys):
    classifier = described(save_classifier(tmp_path / "c.pth"), "--input_size", "64", part="classifier")
    table = torch.load(tmp_path / "c.pth", weights_only=True)["model"]["pos_embed"]
    grid = table[:, 1:].reshape(1, 4, 6, 24).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    assert torch.equal(
        build(classifier).pos_embed.data, torch.cat([table[:, :1], grid.reshape(1, 64, 24)], dim=1)
    )
    assert "its position table is resized" in capsys.readouterr().err
    fixed = torch.from_numpy(get_2d_sincos_pos_embed(24, (4, 6), cls_token=True))[None]
    half = described(save_mae(tmp_path / "h.pth", fixed.bfloat16().float()), "--input_size", "64x32")
    wanted = get_2d_sincos_pos_embed(24, (8, 4), cls_token=True).astype(np.float32)
    np.testing.assert_array_equal(half.state["pos_embed"][0].numpy(), wanted)
    mixed = described(save_mae(tmp_path / "x.pth", 2 * fixed.float()), "--input_size", "64x32")
    assert "its position table is resized and computed anew" in capsys.readouterr().err
    assert torch.equal(mixed.state["decoder_pos_embed"], half.state["decoder_pos_embed"])


def test_the_scripts_work_at_another_size(tmp_path, capsys):
    mae, classifier = save_mae(tmp_path / "m.pth"), save_classifier(tmp_path / "c.pth")
    images, size = make_folder(tmp_path / "images", 2), ["--input_size", "64x32"]
    run(predict, images, "--resume", mae, "--features", tmp_path / "f.npz", "--num_workers", 0, *size,
        "--feature_kind", "patches")  # fmt: skip
    with np.load(tmp_path / "f.npz") as arrays:
        assert arrays["features"].shape == (2, 32, 24) and arrays["grid"].tolist() == [8, 4]
    run(predict, images, "--resume", classifier, "--num_workers", 0, *size)
    assert "64x32 pixels; 2 images" in capsys.readouterr().err
    run(visualize, images, "--resume", mae, "--output", tmp_path / "o.png", *size)
    err = capsys.readouterr().err
    assert all(words in err for words in WORDS) and (tmp_path / "o.png").exists()


def test_a_size_that_cannot_be_is_an_error(tmp_path):
    path = save_mae(tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"^--input_size 60x60: must be a multiple of 8, the patch size of"):
        described(path, "--input_size", "60")
    with pytest.raises(UserError, match=r"--num_heads 4: .* was trained with 3"):  # the other reason, as ever
        described(path, "--input_size", "64", "--num_heads", "4")
    content = torch.load(path, weights_only=True)
    torch.save({"model": content["model"], "args": {**ARGS, "input_size": None}}, path)
    assert described(path, "--input_size", "32x48").input_size == (32, 48)  # what the file does not say
    with pytest.raises(UserError, match="does not say the grid of its 24 patches"):
        described(path, "--input_size", "64")


def test_a_grid_that_is_only_guessed_is_told(tmp_path, capsys):
    """16 patches of a file that does not say its size are more likely those of a square."""
    model = VisionTransformer(**{**SIZES, "img_size": 32}, num_classes=0)
    for said in ({}, {"input_size": 32}):
        torch.save({"model": model.state_dict(), "args": {"num_heads": 3, **said}}, tmp_path / "m.pth")
        for size, told in (("32", ""), ("16x64", "now it is 16x64" if said else "they are taken for 2x8")):
            weights = described(tmp_path / "m.pth", "--input_size", size, part="encoder")
            err = capsys.readouterr().err
            assert err.count("\n") == bool(told) and told in err, (said, size)
            assert torch.equal(weights.state["pos_embed"], model.pos_embed) == (size == "32" or not said)
