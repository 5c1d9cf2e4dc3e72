"""The classifier: golden features and logits, the reference's keys and shapes, other sizes."""

from functools import partial

import numpy as np
import pytest
import torch
from golden_utils import TINY, facts, fill, golden
from torch import nn

import models_vit

NORM = partial(nn.LayerNorm, eps=1e-6)
VARIANTS = [
    (name, pooling)
    for name in ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14")
    for pooling in ("global_pool", "cls_token")
]


def tiny(global_pool, **kwargs):
    return models_vit.VisionTransformer(
        global_pool, **{**TINY, "num_classes": 7, "norm_layer": NORM, **kwargs}
    )


@pytest.mark.parametrize("global_pool", [True, False])
def test_golden_features_and_logits(global_pool):
    expected = golden("vit_forward")
    model = fill(tiny(global_pool), seed=9, std=0.2).eval()
    images = torch.from_numpy(expected["imgs"])
    with torch.no_grad():
        features, logits = model.forward_features(images), model(images)
    key = f"global_pool{int(global_pool)}"
    np.testing.assert_allclose(features, expected[f"{key}/features"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(logits, expected[f"{key}/logits"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "pooling"), VARIANTS)
def test_state_dict_is_the_references(name, pooling):
    with torch.device("meta"):
        model = models_vit.MODELS[name](global_pool=pooling == "global_pool")
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    expected = facts()["state_dict"][f"{name}_{pooling}"]
    assert shapes == expected
    # The order is compared too, of the head's end: the optimizer's groups follow it.
    assert [k for k in shapes if "head" in k or "norm." in k] == [
        k for k in expected if "head" in k or "norm." in k
    ]


def test_named_models_have_norm_eps_1e_6():
    for name in ("vit_tiny_patch16", "vit_small_patch16"):
        model = models_vit.MODELS[name](num_classes=3, global_pool=True)
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
        assert model.head.out_features == 3


def test_rectangular_images_and_channels():
    model = tiny(True, img_size=(32, 128), in_chans=4)
    assert model.pos_embed.shape == (1, 1 + 4 * 16, 24)
    assert model(torch.randn(2, 4, 32, 128)).shape == (2, 7)


def test_no_classes_leaves_features():
    model = tiny(False, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), model.forward_features(images), rtol=0, atol=0)


def test_drop_path_rises_linearly():
    model = tiny(True, depth=5, drop_path_rate=0.4)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4], atol=1e-7)


def test_head_does_not_see_class_token_with_global_pool():
    model = tiny(True).eval()
    tokens = torch.randn(2, 17, 24)
    model.forward_tokens = lambda x: x
    changed = tokens.clone()
    changed[:, 0] += 10
    torch.testing.assert_close(model(tokens), model(changed), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [(dict(img_size=30), "30x30 is not divisible"), (dict(num_heads=5), "number of heads 5")],
)
def test_sizes_that_do_not_fit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(False, **kwargs)


def test_grad_checkpointing_changes_nothing_and_draws_the_same_paths():
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=7)
    model = models_vit.VisionTransformer(global_pool=True, drop_path_rate=0.5, **sizes)
    imgs, results = torch.randn(8, 3, 32, 32), []
    for model.grad_checkpointing in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        logits = model(imgs)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert not torch.equal(results[0][0], model.eval()(imgs))  # paths were dropped


def test_attention_is_fused():
    model = models_vit.vit_tiny_patch16(img_size=32, depth=1)
    assert all(block.attn.fused_attn for block in model.blocks)
