"""What a weights file says about its model, and what is built from it."""

import json
import math
from argparse import Namespace

import pytest
import torch
from export_utils import MEAN, STD, make_mae, make_vit, save_mae, save_vit
from safetensors.torch import save_file

from util.errors import UserError
from util.export.files import write_json
from util.export.source import read_source
from util.files import read_json
from util.weights.build import build
from util.weights.describe import describe, read_model_info
from util.weights.encoder import load_into
from util.weights.files import read_file
from util.weights.flags import FLAGS
from util.weights.hugging_face import mae_config, to_hugging_face

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
CONFIG = dict(
    embed_dim=24, depth=2, num_heads=3, mlp_dim=96, input_size=(32, 32), patch_size=8, in_chans=3,
    mask_ratio=0.6, norm_pix_loss=True, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=4,
    decoder_mlp_dim=64,
)  # fmt: skip


def described(path, *parts, override=False, **flags):
    return describe(read_file(path), path, Namespace(**flags), *parts, override=override)


def hf_folder(folder, mae):
    folder.mkdir()
    write_json(folder / "config.json", mae_config(CONFIG))
    write_json(folder / "preprocessor_config.json", {"image_mean": MEAN, "image_std": STD})
    save_file(to_hugging_face(mae.state_dict()), folder / "model.safetensors")
    return folder


def test_the_first_part_that_a_file_holds(tmp_path):
    path, mae = save_mae(tmp_path)
    full = described(path, "full", "encoder")
    assert (full.part, full.input_size, full.mean, full.std) == ("full", (32, 32), tuple(MEAN), tuple(STD))
    assert full.decoder == {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 4}
    assert full.mask_ratio == 0.6 and full.recipe is None and "optimizer" not in full.content
    assert torch.equal(build(full)(IMAGES, 0.5, torch.ones(2, 16))[1], mae(IMAGES, 0.5, torch.ones(2, 16))[1])
    encoder = described(path, "classifier", "encoder")
    assert encoder.part == "encoder" and not [k for k in encoder.state if "decoder" in k or k == "mask_token"]
    for one, two in zip(build(full, "encoder").parameters(), build(encoder).parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(UserError, match=r"holds no classifier \(full MAE"):
        described(path, "classifier")


@pytest.mark.parametrize("global_pool", [False, True])
@pytest.mark.parametrize("probe", [False, True])
def test_classifiers(tmp_path, global_pool, probe):
    path, vit = save_vit(tmp_path, global_pool, probe)
    weights = described(path, "full", "classifier", "encoder")
    assert weights.part == "classifier" and weights.recipe == ("linprobe" if probe else "finetune")
    assert weights.class_names[2] == "big cat" and weights.kind.startswith(
        "linear" if probe else "classifier"
    )
    assert torch.equal(build(weights)(IMAGES), vit(IMAGES))
    folded = build(weights, fold_probe=True)
    assert isinstance(folded.head, torch.nn.Linear)
    # Float32: folding rounds each weight and the 24 terms of a logit anew, 6e-8 each, and BatchNorm's
    # statistics enlarge them up to a hundred times
    torch.testing.assert_close(folded(IMAGES), vit(IMAGES), rtol=1e-4, atol=1e-5)
    assert torch.equal(build(weights, "encoder")(IMAGES), vit.forward_features(IMAGES))


def test_flags_are_refused_or_win(tmp_path):
    path, _ = save_mae(tmp_path)
    with pytest.raises(
        UserError, match=r"--mean 0\.1: .*was trained with 0\.5 0\.4 0\.3; leave the flag out"
    ):
        described(path, "full", mean=[0.1])
    assert described(path, "full", mean=[0.1], override=True).mean == (0.1, 0.1, 0.1)
    assert described(path, "full", num_heads=6, override=True).sizes["num_heads"] == 6


def test_a_folder_needs_no_flags(tmp_path):
    mae = make_mae(norm_pix_loss=True)
    folder = hf_folder(tmp_path / "hf", mae)
    weights = described(folder, "full")
    assert weights.sizes["num_heads"] == 3 and weights.mean == tuple(MEAN) and weights.norm_pix_loss
    assert torch.equal(
        build(weights)(IMAGES, 0.5, torch.ones(2, 16))[0], mae(IMAGES, 0.5, torch.ones(2, 16))[0]
    )
    assert load_into(make_vit(), str(folder)).kind == "Hugging Face ViTMAE with decoder"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--resume .*empty: is a folder without model\.safetensors or"):
        read_file(tmp_path / "empty", "--resume")


@pytest.mark.parametrize(
    "entry", [{"mean": "abc"}, {"std": [-1.0]}, {"num_heads": "3"}, {"num_heads": 0}, {"mask_ratio": "a"},
              {"class_names": [1]}, {"decoder_num_heads": [4]}]
)  # fmt: skip
def test_damaged_settings_are_one_clear_line(tmp_path, entry):
    path, _ = save_mae(tmp_path, **entry)
    with pytest.raises(UserError, match=f"damaged: {next(iter(entry))} is") as error:
        described(path, "full")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [None, "32", [3, 32, 32], [32, 48], 40])
def test_a_stored_size_is_believed_only_where_it_fits(tmp_path, size):
    path, _ = save_mae(tmp_path, input_size=size)
    assert described(path, "full").input_size == (32, 32)
    assert read_model_info(read_file(path))["input_size"] == (32, 32)


def test_tensors_of_another_model_are_refused(tmp_path):
    path, mae = save_mae(tmp_path)
    content = read_file(path)
    for change, text in [
        ({"dist_token": torch.zeros(1)}, "1 not known"),
        ({"norm.weight": None}, "1 tensor missing"),
        ({"norm.weight": torch.zeros(5)}, "1 of other shapes"),
    ]:
        state = {k: v for k, v in {**mae.state_dict(), **change}.items() if v is not None}
        torch.save({**content, "model": state}, path)
        with pytest.raises(UserError, match=f"is not a plain ViT of this code: .*{text}"):
            build(described(path, "full"))


STRANGE = [
    "x",
    "",
    [],
    {},
    ["x"],
    {"a": 1},
    True,
    0,
    -3,
    10**30,
    1.5,
    math.nan,
    "y" * 10**6,
    "\x1b[2J",
    [[[]]],
]
OF_TIMM = {"architecture": "vit", "model_args": {"num_heads": 3, "img_size": [32, 32]}, "pretrained_cfg": {}}


@pytest.mark.parametrize("name", [
    "model_type", "hidden_act", "image_size", "num_attention_heads", "decoder_num_attention_heads",
    "mask_ratio", "norm_pix_loss", "id2label", "layer_norm_eps", "architecture", "model_args",
    "pretrained_cfg", "label_names", "image_mean",
])  # fmt: skip
def test_c6_a_strange_config_is_one_line_or_means_nothing(tmp_path, name):
    """config.json of a folder: refused in one line, or the same model as with the entry left out."""
    mae = make_mae(norm_pix_loss=True)
    folder = hf_folder(tmp_path / "hf", mae)
    timm = name in ("architecture", "model_args", "pretrained_cfg", "label_names")
    good = OF_TIMM if timm else read_json(folder / "config.json") | {"layer_norm_eps": 1e-6}
    file = folder / ("preprocessor_config.json" if name == "image_mean" else "config.json")
    refused = 0
    for value in STRANGE:
        file.write_text(json.dumps({**good, name: value}))
        args = Namespace(encoder_only=False, **dict.fromkeys((*FLAGS, "decoder_num_heads", "mask_ratio")))
        args.num_heads, args.norm_pix_loss = None, None
        try:
            source = read_source(str(folder), args)
            assert source.sizes["num_heads"] == 3 or name in (
                "num_attention_heads",
                "architecture",
                "model_args",
            )
            assert source.input_size == (32, 32) and 0 <= source.mask_ratio < 1
        except UserError as error:
            assert len(str(error)) < 1000 and str(error).isprintable()
            refused += 1
    assert refused > 5 or name in ("architecture", "pretrained_cfg")
