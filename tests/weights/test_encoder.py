"""Encoders from every kind of file, with an exact report; the golden interpolation; partial fine-tuning."""

import math
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from golden_utils import TINY, TINY_MAE, golden
from torch import nn

import models_mae
import models_vit
from util.errors import UserError
from util.evaluate.features import encoder_features
from util.recipes.classifier import set_trainable_blocks
from util.weights.encoder import load_into
from util.weights.hugging_face import from_hugging_face

NORM = partial(nn.LayerNorm, eps=1e-6)
POOLED = ["fc_norm.weight", "fc_norm.bias"]
HEAD = ["head.weight", "head.bias"]


def make_mae(seed=0, **changes):
    torch.manual_seed(seed)
    model = models_mae.MaskedAutoencoderViT(**{**TINY_MAE, "norm_layer": NORM, **changes})
    for parameter in model.parameters():  # also norms and biases, so that none goes unnoticed
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_vit(global_pool=False, seed=1, **changes):
    torch.manual_seed(seed)
    return models_vit.VisionTransformer(
        global_pool, **{**TINY, "num_classes": 5, "norm_layer": NORM, **changes}
    ).eval()


def encoder_only(model):
    return {k: v for k, v in model.state_dict().items() if not k.startswith("decoder") and k != "mask_token"}


def to_hugging_face(state, old_names=True):
    """A ViTMAE state dict under Hugging Face's names: those of its files, or of its newer modules."""
    outer = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj.": "vit.embeddings.patch_embeddings.projection.",
        "norm.": "vit.layernorm.",
        "mask_token": "decoder.mask_token",
        "decoder_": "decoder.decoder_",
    }
    layer = "vit.encoder.layer" if old_names else "vit.layers"
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    inner |= (
        {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
        if old_names
        else {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    )
    qkv = (
        ["attention.attention.query", "attention.attention.key", "attention.attention.value"]
        if old_names
        else ["attention.q_proj", "attention.k_proj", "attention.v_proj"]
    )
    result = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            _, number, rest = key.split(".", 2)
            name, kind = rest.rsplit(".", 1)
            if name == "attn.qkv":
                for target, part in zip(qkv, value.chunk(3), strict=True):
                    result[f"{layer}.{number}.{target}.{kind}"] = part.clone()
            else:
                result[f"{layer}.{number}.{inner[name]}.{kind}"] = value
        else:
            start = next(s for s in outer if key.startswith(s))
            result[outer[start] + key[len(start) :]] = value
    return result


def same_features(path, mae, **changes):
    """Loads `path` into a class-token classifier and compares its features with the MAE encoder's."""
    vit = make_vit(**changes)
    report = load_into(vit, str(path))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        # Float32, values up to 4: the same operations in the same order, so at most 2 roundings of 2.4e-7
        torch.testing.assert_close(
            vit.forward_features(images),
            encoder_features(mae.eval(), images, global_pool=False),
            rtol=0,
            atol=1e-6,
        )
    return report


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_own_checkpoint_with_prefixes(tmp_path, prefix):
    mae = make_mae()
    state = {prefix + key: value for key, value in mae.state_dict().items()}
    torch.save({"model": state, "epoch": 3, "args": {"input_size": 32}}, tmp_path / "checkpoint-3.pth")
    report = same_features(tmp_path / "checkpoint-3.pth", mae)
    assert report.kind == "full MAE (encoder and decoder)"
    assert report.missing == HEAD and report.dropped == [] and report.resized is None
    assert report.unexpected == [k for k in mae.state_dict() if k.startswith("decoder") or k == "mask_token"]


def test_released_encoder_only_file(tmp_path):
    mae = make_mae()
    torch.save({"model": encoder_only(mae)}, tmp_path / "mae_pretrain_vit_x.pth")
    report = same_features(tmp_path / "mae_pretrain_vit_x.pth", mae)
    assert report.kind == "encoder only" and report.missing == HEAD and report.unexpected == []


def test_released_full_file_with_namespace_and_global_pool(tmp_path):
    mae = make_mae()
    torch.save({"model": mae.state_dict(), "args": Namespace(input_size=224)}, tmp_path / "mae_visualize.pth")
    vit = make_vit(global_pool=True)
    report = load_into(vit, str(tmp_path / "mae_visualize.pth"))
    assert report.missing == HEAD + POOLED
    assert {"norm.weight", "norm.bias", "mask_token", "decoder_pred.weight"} <= set(report.unexpected)
    assert torch.equal(vit.blocks[1].mlp.fc2.weight, mae.blocks[1].mlp.fc2.weight)


def test_fine_tuned_file_with_other_classes(tmp_path):
    old = make_vit(global_pool=True, seed=5, num_classes=9)
    torch.save({"model": old.state_dict()}, tmp_path / "mae_finetuned.pth")
    vit = make_vit(global_pool=True)
    head = vit.head.weight.clone()
    report = load_into(vit, str(tmp_path / "mae_finetuned.pth"))
    assert report.kind == "classifier (global pool)"
    assert report.dropped == ["head.weight: (9, 24)", "head.bias: (9,)"]
    assert report.missing == report.unexpected == []
    assert torch.equal(vit.head.weight, head) and torch.equal(vit.fc_norm.weight, old.fc_norm.weight)
    assert "the file's head, not used (2): head.weight: (9, 24)" in str(report)


def test_fine_tuned_file_with_the_same_classes_gives_no_head_either(tmp_path):
    old = make_vit(global_pool=True, seed=5)
    torch.save({"model": old.state_dict()}, tmp_path / "a.pth")
    vit = make_vit(global_pool=True)
    head = vit.head.weight.clone()
    report = load_into(vit, str(tmp_path / "a.pth"))
    assert (report.missing, report.unexpected) == ([], [])
    assert report.dropped == ["head.weight: (5, 24)", "head.bias: (5,)"]
    assert torch.equal(vit.head.weight, head)


@pytest.mark.parametrize("key", ["norm_pre.weight", "dist_token", "attn_pool.q.weight"])
def test_an_encoder_that_computes_something_else_is_refused(tmp_path, key):
    torch.save({"model": {**encoder_only(make_mae()), key: torch.zeros(24)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=rf"other.pth.*does not know \({key}\)"):
        load_into(make_vit(), str(tmp_path / "other.pth"))


def test_what_stands_beside_the_encoder_is_no_obstacle(tmp_path):
    extra = [
        "pooler.dense.weight",
        "classifier.weight",
        "head_dist.weight",
        "decoder.x",
        "pre_logits.fc.bias",
    ]
    state = {**make_mae().state_dict(), **{key: torch.zeros(2) for key in extra}}
    torch.save({"model": state}, tmp_path / "a.pth")
    assert set(extra) <= set(load_into(make_vit(), str(tmp_path / "a.pth")).unexpected)
    hf = to_hugging_face(encoder_only(make_mae()))
    torch.save({**hf, "vit.pooler.dense.weight": torch.zeros(2)}, tmp_path / "hf.pth")
    assert load_into(make_vit(), str(tmp_path / "hf.pth")).unexpected == ["vit.pooler.dense.weight"]


def test_table_of_unknown_grid_that_fits_a_rectangle_is_warned_of(tmp_path, capsys):
    mae = make_mae(img_size=(16, 48))
    torch.save({"model": mae.state_dict()}, tmp_path / "a.pth")
    torch.save({"model": mae.state_dict(), "args": {"input_size": (16, 48)}}, tmp_path / "b.pth")
    load_into(make_vit(img_size=(16, 48)), str(tmp_path / "b.pth"))
    assert capsys.readouterr().err == ""
    load_into(make_vit(img_size=(16, 48)), str(tmp_path / "a.pth"))
    assert "does not say the patch grid of its 12 positions; they are taken" in capsys.readouterr().err


def test_timm_weights_as_safetensors(tmp_path):
    mae = make_mae()
    safetensors.torch.save_file(encoder_only(mae), tmp_path / "model.safetensors")
    assert same_features(tmp_path / "model.safetensors", mae).kind == "encoder only"


def test_timm_models_state_dict_itself(tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    timm_model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0, norm_layer=NORM
    ).eval()
    torch.save(timm_model.state_dict(), tmp_path / "timm.pth")
    vit = make_vit()
    assert load_into(vit, str(tmp_path / "timm.pth")).missing == HEAD
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        # Float32, values of about 1: timm adds up 24 to 96 terms in another order, up to 6e-7 a layer, in
        # two blocks
        torch.testing.assert_close(vit.forward_features(images), timm_model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("old_names", [True, False])
@pytest.mark.parametrize("with_decoder", [True, False])
def test_hugging_face(tmp_path, old_names, with_decoder):
    mae = make_mae()
    state = to_hugging_face(mae.state_dict() if with_decoder else encoder_only(mae), old_names)
    if not with_decoder:  # ViTMAEModel's own keys have no prefix
        state = {key.removeprefix("vit."): value for key, value in state.items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    report = same_features(tmp_path / "model.safetensors", mae)
    assert report.kind.startswith("Hugging Face ViT") and report.missing == HEAD
    assert all(key.startswith("decoder.") for key in report.unexpected)
    assert bool(report.unexpected) == with_decoder


def test_hugging_face_names_come_back():
    state = make_mae().state_dict()
    for old_names in (True, False):
        converted = from_hugging_face(to_hugging_face(encoder_only(make_mae()), old_names))
        assert converted.keys() == encoder_only(make_mae()).keys()
        assert all(torch.equal(converted[key], state[key]) for key in converted)


def test_golden_interpolation(tmp_path):
    arrays = golden("pos_embed")
    source = torch.from_numpy(arrays["interp/src4x4"])
    vit = make_vit(img_size=56, embed_dim=source.shape[-1], num_heads=1)
    state = {k: v for k, v in vit.state_dict().items() if not k.startswith("head")}
    torch.save({"model": {**state, "pos_embed": source}}, tmp_path / "a.pth")
    vit = vit.double()
    report = load_into(vit, str(tmp_path / "a.pth"))
    assert report.resized == ((4, 4), (7, 7))
    np.testing.assert_allclose(vit.pos_embed.detach(), arrays["interp/dst7x7"], rtol=1e-9, atol=1e-12)


def test_rectangular_table_needs_the_files_arguments(tmp_path):
    mae = make_mae(img_size=(16, 64))  # 2 x 8 = 16 patches: as many as 4 x 4
    torch.save({"model": mae.state_dict(), "args": {"input_size": (16, 64)}}, tmp_path / "with.pth")
    vit = make_vit(img_size=32)
    assert load_into(vit, str(tmp_path / "with.pth")).resized == ((2, 8), (4, 4))
    mae = make_mae(img_size=(16, 48))  # 12 patches: no square
    torch.save({"model": mae.state_dict()}, tmp_path / "without.pth")
    with pytest.raises(UserError, match=r"without.pth: a position table of 12 patches is not square"):
        load_into(make_vit(), str(tmp_path / "without.pth"))


def test_no_usable_encoder(tmp_path):
    torch.save(
        {"model": {"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}}, tmp_path / "resnet.pth"
    )
    with pytest.raises(UserError, match=r"--finetune .*resnet.pth.*not a vision transformer .*conv1.weight"):
        load_into(make_vit(), str(tmp_path / "resnet.pth"))
    decoder = {k: v for k, v in make_mae().state_dict().items() if k.startswith("decoder")}
    torch.save({"model": decoder}, tmp_path / "decoder.pth")
    with pytest.raises(UserError, match="this file is a decoder without its encoder"):
        load_into(make_vit(), str(tmp_path / "decoder.pth"))
    optimizer = torch.optim.AdamW(make_vit().parameters())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pth")
    with pytest.raises(UserError, match="an optimizer's state"):
        load_into(make_vit(), str(tmp_path / "optimizer.pth"))
    with pytest.raises(UserError, match="no such file"):
        load_into(make_vit(), str(tmp_path / "nothing.pth"))


def test_c6_weights_that_are_not_finite(tmp_path):
    state = make_mae().state_dict()
    state["blocks.1.mlp.fc1.bias"][3] = math.nan
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"--finetune .*a\.pth: its weights are not finite \(blocks\.1\.mlp"):
        load_into(make_vit(), str(tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        (dict(embed_dim=48), "--model"),
        (dict(depth=3), "--model"),
        (dict(depth=1), "--model"),
        (dict(patch_size=16), "--patch_size 16"),
        (dict(in_chans=1), "--in_chans 1"),
    ],
)
def test_encoder_of_another_architecture(tmp_path, changes, hint):
    torch.save({"model": make_mae(**changes).state_dict()}, tmp_path / "other.pth")
    vit = make_vit()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    with pytest.raises(UserError, match=f"does not fit the model.*{hint}") as error:
        load_into(vit, str(tmp_path / "other.pth"))
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


def test_trainable_blocks():
    def trainable(number, global_pool=True):
        model = make_vit(global_pool, depth=3)
        set_trainable_blocks(model, number)
        return {name for name, p in model.named_parameters() if p.requires_grad}

    everything = {name for name, _ in make_vit(True, depth=3).named_parameters()}
    assert trainable(None) == everything and trainable(3) == everything
    assert trainable(0) == set(HEAD)
    last_mlp = {n for n in everything if n.startswith(("blocks.2.norm2", "blocks.2.mlp"))}
    assert trainable(0.5) == {*HEAD, *POOLED, *last_mlp}
    assert trainable(1) == {*HEAD, *POOLED, *(n for n in everything if n.startswith("blocks.2."))}
    assert {"norm.weight", "norm.bias"} <= trainable(1, global_pool=False)
    for wrong in (-1, 0.7, 4, math.nan, math.inf):
        with pytest.raises(UserError, match="--trainable_blocks"):
            trainable(wrong)
