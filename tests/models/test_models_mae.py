"""The MAE model against the golden numbers, and what it does beyond the reference."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_utils import REPO, TINY_MAE, facts, fill, golden
from timm.models import vision_transformer
from torch.nn import functional as F

import models_mae
from util.compute import blocks
from util.pos_embed import get_2d_sincos_pos_embed, interpolate_pos_embed


def tiny(**kwargs):
    return models_mae.mae_vit(TINY_MAE, **kwargs)


@pytest.mark.parametrize("norm_pix", [0, 1])
@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_golden_forward_and_gradients(norm_pix, ratio):
    data = golden("mae_forward")
    model = fill(tiny(norm_pix_loss=bool(norm_pix)), seed=7, std=0.2, skip="pos_embed")
    imgs, noise = torch.from_numpy(data["imgs"]), torch.from_numpy(data["noise"])
    latent, mask, ids_restore = model.forward_encoder(imgs, ratio, noise)
    loss, pred, _ = model(imgs, mask_ratio=ratio, noise=noise)
    loss.backward()
    key = f"norm{norm_pix}_ratio{ratio}/"
    for name, value in [
        ("latent", latent),
        ("mask", mask),
        ("ids_restore", ids_restore),
        ("pred", pred),
        ("loss", loss),
    ]:
        np.testing.assert_allclose(
            value.detach().numpy(), data[key + name], rtol=1e-9, atol=1e-11, err_msg=name
        )
    checked = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = data[f"{key}gradnorm/{name}"]
            np.testing.assert_allclose(parameter.grad.norm().item(), expected, rtol=1e-9, err_msg=name)
            checked += 1
    assert checked == sum(k.startswith(f"{key}gradnorm/") for k in data)


def test_golden_patchify_and_inverse():
    data = golden("mae_forward")
    imgs = torch.from_numpy(data["imgs"])
    patches = tiny().patchify(imgs)
    np.testing.assert_array_equal(patches.numpy(), data["patchify"])
    assert torch.equal(tiny().unpatchify(patches), imgs)


@pytest.mark.parametrize("name", ["mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14"])
def test_state_dict_keys_and_shapes(name):
    with torch.device("meta"):
        model = models_mae.MODELS[name]()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(shapes) and shapes == facts()["state_dict"][name]


def test_position_tables():
    data = golden("pos_embed")
    full = get_2d_sincos_pos_embed(48, 4, cls_token=True)
    np.testing.assert_allclose(full, data["full_d48_g4"], rtol=0, atol=4e-16)  # numpy's sine moves by a bit
    for dim, grid in [(48, 4), (768, 14), (1280, 16), (512, 14)]:
        table = get_2d_sincos_pos_embed(dim, grid, cls_token=True)
        sums = [
            table.sum(),
            np.abs(table).sum(),
            (table * np.arange(table.size).reshape(table.shape) % 97).sum(),
        ]
        np.testing.assert_allclose(sums, data[f"d{dim}_g{grid}/sum"], rtol=1e-9)
        rows = table[[0, 1, 2, grid, grid + 1, -1]]
        np.testing.assert_allclose(rows, data[f"d{dim}_g{grid}/rows"], rtol=1e-9, atol=1e-15)


def test_rectangular_table_agrees_with_the_square_one_where_they_overlap():
    square = get_2d_sincos_pos_embed(16, 6).reshape(6, 6, 16)
    wide = get_2d_sincos_pos_embed(16, (2, 6)).reshape(2, 6, 16)
    np.testing.assert_array_equal(wide, square[:2])
    with pytest.raises(ValueError, match="divisible by 4"):
        get_2d_sincos_pos_embed(18, 4)


def test_interpolation_of_position_tables():
    data = golden("pos_embed")

    class Target:
        class patch_embed:
            num_patches, grid_size = 49, (7, 7)

        pos_embed = torch.zeros(1, 50, data["interp/src4x4"].shape[-1])

    state = {"pos_embed": torch.from_numpy(data["interp/src4x4"])}
    assert interpolate_pos_embed(Target, state)
    np.testing.assert_allclose(state["pos_embed"].numpy(), data["interp/dst7x7"], rtol=1e-9, atol=1e-12)
    Target.patch_embed.grid_size, Target.patch_embed.num_patches = (2, 8), 16
    Target.pos_embed = torch.zeros(1, 17, 4)
    wide = {"pos_embed": torch.randn(1, 17, 4)}
    assert not interpolate_pos_embed(Target, dict(wide))
    assert interpolate_pos_embed(Target, wide, old_grid=(4, 4)) and wide["pos_embed"].shape == (1, 17, 4)
    with pytest.raises(ValueError, match="not square"):
        interpolate_pos_embed(Target, {"pos_embed": torch.zeros(1, 13, 4)})


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_any_channels_and_rectangles(channels):
    model = tiny(img_size=(32, 128), in_chans=channels, norm_pix_loss=True)
    imgs = torch.randn(2, channels, 32, 128)
    loss, pred, mask = model(imgs)
    assert pred.shape == (2, 64, 64 * channels) and mask.shape == (2, 64) and mask.sum() == 2 * 48
    assert torch.equal(model.unpatchify(model.patchify(imgs)), imgs)
    loss.backward()
    assert torch.isfinite(model.patch_embed.proj.weight.grad).all()


def test_noise_fixes_the_mask_and_small_values_are_kept():
    model = tiny().eval()
    imgs = torch.randn(2, 3, 32, 32)
    noise = torch.arange(16.0).flip(0).repeat(2, 1)
    loss, _, mask = model(imgs, noise=noise)
    assert mask[0].tolist() == [1.0] * 12 + [0.0] * 4
    assert torch.equal(loss, model(imgs, noise=noise)[0])


def test_loss_is_float32_under_autocast_and_float64_stays():
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, pred, _ = model(torch.randn(1, 3, 32, 32))
    assert pred.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert model.double()(torch.randn(1, 3, 32, 32).double())[0].dtype == torch.float64


def test_initialisation():
    torch.manual_seed(0)
    model = tiny()
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad
    bound = (6 / (24 + 3 * 64)) ** 0.5
    weight = model.patch_embed.proj.weight
    assert weight.abs().max() <= bound and weight.abs().max() > 0.9 * bound
    assert model.blocks[0].attn.qkv.bias.abs().max() == 0 and model.norm.weight.eq(1).all()
    assert 0.01 < model.cls_token.std() < 0.03


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(img_size=30), "30x30 is not divisible by the patch size 8"),
        (dict(num_heads=5), "width 24 is not divisible by its 5 heads"),
        (dict(decoder_embed_dim=18, decoder_num_heads=3), "width 18 is not divisible by 4"),
    ],
)
def test_sizes_that_do_not_fit(change, text):
    with pytest.raises(ValueError, match=text):
        tiny(**change)


def test_named_models_take_overrides():
    model = models_mae.MODELS["mae_vit_tiny_patch16"](img_size=32, patch_size=8, decoder_depth=1)
    assert model.patch_size == 8 and len(model.decoder_blocks) == 1 and model.cls_token.shape[-1] == 192
    assert models_mae.mae_vit_base_patch16 is models_mae.mae_vit_base_patch16_dec512d8b


def test_script_prints_shapes():
    out = subprocess.run(
        [sys.executable, "models_mae.py"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    for text in [
        "(1, 3, 224, 224)",
        "(1, 49, 768)",
        "(1, 50, 768)",
        "(1, 196, 768)",
        "147 of 196",
        "111.9 M",
    ]:
        assert text in out, out


def loss_and_gradients(loss, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, retain_graph=True)
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("ratio", [0.75, 1 / 16, 15 / 16])
@pytest.mark.parametrize("channels, size", [(3, (32, 32)), (1, (16, 128)), (5, (64, 16))])
def test_the_loss_and_its_gradients_are_those_of_the_masked_patches(norm_pix, ratio, channels, size):
    torch.manual_seed(0)
    model = tiny(img_size=size, in_chans=channels, norm_pix_loss=norm_pix).double()
    length = model.patch_embed.num_patches
    imgs, noise = torch.randn(3, channels, *size, dtype=torch.float64), torch.rand(3, length)
    loss, pred, mask = model(imgs, ratio, noise)
    # (N, L, C, p * p) -> (N, L, p * p * C)
    patches = F.unfold(imgs, 8, stride=8).transpose(1, 2).unflatten(2, (channels, 64)).transpose(2, 3)
    target = patches.flatten(2)[mask.bool()]
    assert len(target) == 3 * (length - int(length * (1 - ratio)))
    if norm_pix:
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    by_hand = F.mse_loss(pred[mask.bool()], target)
    torch.testing.assert_close(
        loss_and_gradients(loss, model), loss_and_gradients(by_hand, model), rtol=1e-12, atol=1e-12
    )


def test_without_noise_one_uniform_draw_masks():
    model, imgs = tiny(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(5)
    noise, state = torch.rand(2, 16), torch.get_rng_state()
    torch.manual_seed(5)
    drawn = model(imgs)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(drawn, model(imgs, noise=noise), rtol=0, atol=0)


def test_nothing_visible_or_nothing_masked():
    model, imgs, noise = tiny().double(), torch.randn(2, 3, 32, 32).double(), torch.rand(2, 16)
    loss, pred, mask = model(imgs, 0.99, noise)
    assert mask.all()
    torch.testing.assert_close(loss, F.mse_loss(pred, model.patchify(imgs)), rtol=1e-12, atol=0)
    assert model(imgs, 0.0, noise)[0].isnan()


def test_images_of_another_size_are_refused():
    for shape in [(2, 3, 16, 64), (2, 1, 32, 32)]:
        with pytest.raises(ValueError, match="the model takes N x 3x32x32"):
            tiny()(torch.randn(shape))


@pytest.mark.parametrize(
    "options", [{}, dict(qkv_bias=True, qk_norm=True), dict(attn_drop=0.5, proj_drop=0.5)]
)
@pytest.mark.parametrize("fused", [True, False])
def test_blocks_compute_what_timm_s_compute(options, fused):
    ours, theirs = (kind(16, 2, **options).double() for kind in (blocks.Block, vision_transformer.Block))
    theirs.load_state_dict(ours.state_dict())
    ours.attn.fused_attn = theirs.attn.fused_attn = fused
    x, results = torch.randn(3, 9, 16, dtype=torch.float64), []
    for block in (ours, theirs):
        torch.manual_seed(0)
        y = block(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in block.parameters())])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_grad_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model, imgs, noise = tiny(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    results = []
    for model.grad_checkpointing in (False, True):
        calls = []
        handle = model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        results.append(loss_and_gradients(model(imgs, 0.75, noise)[0], model))
        handle.remove()
        assert len(calls) == (2 if model.grad_checkpointing else 1)  # again in the backward pass
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_attention_is_fused_everywhere():
    assert all(
        block.attn.fused_attn for model in [tiny()] for block in [*model.blocks, *model.decoder_blocks]
    )
    with torch.profiler.profile() as profile:
        tiny()(torch.randn(1, 3, 32, 32))
    names = [event.key for event in profile.key_averages()]
    assert "aten::scaled_dot_product_attention" in names and "aten::softmax" not in names
