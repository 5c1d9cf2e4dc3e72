"""Weights for other channels, patches and grids: timm's own numbers, only where a flag asks, and told."""

import argparse

import pytest
import timm.models
import torch
from golden_utils import TINY_MAE
from test_encoder import NORM, encoder_only, make_mae, make_vit
from timm.layers import resample_abs_pos_embed, resample_patch_embed

import models_mae
from util.errors import UserError
from util.evaluate.features import encoder_features
from util.pos_embed import get_2d_sincos_pos_embed
from util.weights.adapt import adapt_channels, fit_table
from util.weights.encoder import load_into

DECODER = [k for k in make_mae().state_dict() if k.startswith(("decoder_", "mask_token"))]


def save(folder, model_or_state, **entries):
    state = model_or_state if isinstance(model_or_state, dict) else model_or_state.state_dict()
    torch.save({"model": state, **entries}, folder / "a.pth")
    return str(folder / "a.pth")


def fresh(**changes):
    torch.manual_seed(9)
    return models_mae.MaskedAutoencoderViT(**{**TINY_MAE, "norm_layer": NORM, **changes})


def with_fixed_tables(model):
    for table in (model.pos_embed, model.decoder_pos_embed):
        values = get_2d_sincos_pos_embed(table.shape[-1], model.patch_embed.grid_size, cls_token=True)
        table.data.copy_(torch.from_numpy(values)[None])
    return model


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 13])
def test_channels_are_timms(channels):
    weight = make_mae().patch_embed.proj.weight.data
    assert torch.equal(adapt_channels(weight, channels), timm.models.adapt_input_conv(channels, weight))
    half = weight.half()
    assert torch.equal(adapt_channels(half, channels), timm.models.adapt_input_conv(channels, half))


def test_channels_from_others_than_three_give_what_the_same_pixels_gave():
    for own, channels in ((1, 3), (4, 1), (13, 26)):
        proj = make_mae(in_chans=own).patch_embed.proj.weight.data.double()
        grey = torch.randn(2, 1, 8, 8, dtype=torch.float64)
        images = [grey.expand(-1, n, -1, -1) for n in (own, channels)]
        new = adapt_channels(proj.clone(), channels).double()
        before, after = (torch.nn.functional.conv2d(i, w) for i, w in zip(images, (proj, new), strict=True))
        # adapt_channels computes in float32: 192 to 1,664 terms of about 0.1
        torch.testing.assert_close(before, after, rtol=0, atol=1e-4)


def test_patches_and_tables_are_timms(tmp_path):
    mae = make_mae()  # a learned table: away from the fixed one
    for target in (fresh(patch_size=4, img_size=48), make_vit(patch_size=4, img_size=48)):
        report = load_into(target, save(tmp_path, mae), asked={"patch_size", "input_size"})
        weight = resample_patch_embed(mae.patch_embed.proj.weight.data, [4, 4])
        assert torch.equal(target.patch_embed.proj.weight, weight)
        # The reference resizes without antialiasing, which timm does by default; to more patches
        table = resample_abs_pos_embed(mae.pos_embed.data, [12, 12], [4, 4], antialias=False)
        assert torch.equal(target.pos_embed, table)
        assert report.resized == ((4, 4), (12, 12))
        assert "position table: 4x4 patches, resized to 12x12" in str(report)
        assert "patch embedding: patches of 8x8 pixels, resampled for 4x4" in str(report)


def test_channels_and_patch_together_are_timms_one_after_the_other(tmp_path):
    mae, target = make_mae(), fresh(patch_size=16, in_chans=1)
    report = load_into(target, save(tmp_path, mae), asked={"patch_size", "in_chans"})
    weight = timm.models.adapt_input_conv(1, mae.patch_embed.proj.weight.data)
    assert torch.equal(target.patch_embed.proj.weight, resample_patch_embed(weight, [16, 16]))
    assert "patch embedding: 3 channels, summed for 1" in str(report)
    assert report.missing == report.unexpected == ["decoder_pred.weight", "decoder_pred.bias"]
    assert report.decoder.startswith("taken, but for decoder_pred.weight, decoder_pred.bias")
    assert torch.equal(target.decoder_blocks[1].mlp.fc2.weight, mae.decoder_blocks[1].mlp.fc2.weight)


def test_the_fixed_table_is_computed_anew_in_a_masked_autoencoder_and_resized_in_a_classifier(tmp_path):
    path = save(tmp_path, with_fixed_tables(make_mae()))
    target = fresh(img_size=(64, 48))
    own = {key: value.clone() for key, value in target.state_dict().items() if "pos_embed" in key}
    report = load_into(target, path, asked={"input_size"})
    assert "position table: 4x4 patches, computed anew for 8x6" in str(report)
    assert report.decoder == "taken" and report.missing == report.unexpected == []
    for key, table in own.items():
        assert torch.equal(target.state_dict()[key], table)
    classifier = make_vit(img_size=(64, 48))  # learns its table, as the reference's: DIFFERENCES.md
    assert "resized to 8x6" in str(load_into(classifier, path))
    assert (classifier.pos_embed - own["pos_embed"]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fixed_table_is_known_in_any_precision(dtype):
    table = torch.from_numpy(get_2d_sincos_pos_embed(24, (3, 5), cls_token=True))[None].to(dtype)
    anew, way = fit_table(table, (3, 5), (6, 6))
    exact = torch.from_numpy(get_2d_sincos_pos_embed(24, (6, 6), cls_token=True))[None].float()
    assert way == "computed anew" and torch.equal(anew, exact)  # not rounded as the file's
    assert fit_table(table + 0.02, (3, 5), (6, 6))[1] == "resized"


def test_the_same_size_is_unchanged_through_the_new_path(tmp_path):
    """All flags given and all as the file says: bit for bit the file's forward pass."""
    mae, target = make_mae(), fresh()
    report = load_into(target, save(tmp_path, mae), asked={"input_size", "patch_size", "in_chans"})
    assert (report.adapted, report.resized, report.missing, report.unexpected) == ([], None, [], [])
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        for ours, theirs in zip(target(images, 0.75, noise), mae(images, 0.75, noise), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "flag"), [({"in_chans": 1}, "in_chans"), ({"patch_size": 16}, "patch_size")]
)
def test_only_what_a_flag_asks_for_is_changed(tmp_path, change, flag):
    path = save(tmp_path, make_mae())
    for target in (fresh(**change), make_vit(**change)):
        before = {key: value.clone() for key, value in target.state_dict().items()}
        other = {"in_chans": "patch_size", "patch_size": "in_chans"}[flag]
        with pytest.raises(UserError, match=rf"Check --{flag} \d+ \(--{flag} \d+ adapts it\)"):
            load_into(target, path, asked={other, "input_size"})
        assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
        load_into(target, path, asked={flag})
    with pytest.raises(UserError, match=r"for 32x32 pixels; pass --input_size 32x32, or --input_size 48x48"):
        load_into(fresh(img_size=48), path, "--init", asked={"in_chans"})
    for changes in ({"img_size": 48}, {"img_size": 48, "patch_size": 12}):  # another grid; the same one
        with pytest.raises(UserError, match=r"for 32x32 pixels; pass --input_size 32x32, or --input_size 48"):
            load_into(fresh(**changes), path, "--init", asked={"patch_size"})
    assert load_into(fresh(patch_size=16), path, asked={"patch_size"}).resized == ((4, 4), (2, 2))


@pytest.mark.parametrize(("patch", "size"), [(4, (16, 64)), (16, (32, 128))])
def test_the_grid_of_a_rectangle_is_read_before_its_patches_change(tmp_path, patch, size, capsys):
    """16 patches, which are no square: 2x8, for other patches of the same size and for the same grid."""
    mae = with_fixed_tables(make_mae(img_size=(16, 64)))
    target = fresh(img_size=size, patch_size=patch)
    own = target.pos_embed.detach().clone()
    path = save(tmp_path, mae, args={"input_size": (16, 64)})
    report = load_into(target, path, asked={"input_size", "patch_size"})
    assert report.resized == (None if patch == 16 else ((2, 8), (4, 16)))
    assert torch.equal(target.pos_embed, own) and not capsys.readouterr().err


def test_a_prediction_of_other_pixels_is_new_though_of_as_many(tmp_path):
    mae, target = make_mae(patch_size=4, in_chans=4, img_size=16), fresh(in_chans=1)  # 64 numbers a patch
    before = target.decoder_pred.weight.detach().clone()
    report = load_into(target, save(tmp_path, mae), asked={"patch_size", "in_chans", "input_size"})
    assert report.missing == report.unexpected == ["decoder_pred.weight", "decoder_pred.bias"]
    assert torch.equal(target.decoder_pred.weight, before)
    assert torch.equal(target.decoder_embed.weight, mae.decoder_embed.weight)
    report = load_into(make_vit(), save(tmp_path, make_mae(in_chans=4)), asked={"in_chans"})
    assert "patch embedding: 4 channels, the first ones scaled for 3" in str(report)


def test_decoders_that_do_not_fit_are_new_and_told(tmp_path):
    mae = make_mae()
    path = save(tmp_path, mae)
    others = [dict(decoder_depth=1), dict(decoder_embed_dim=32), dict(decoder_depth=3)]
    for target in map(lambda changes: fresh(**changes), others):
        before = {k: v.clone() for k, v in target.state_dict().items() if k.startswith(("decoder_", "mask"))}
        report = load_into(target, path)
        assert report.decoder.startswith("the file's does not fit (") and "a new one" in report.decoder
        assert all(
            torch.equal(value, before[key]) for key, value in target.state_dict().items() if key in before
        )
        assert torch.equal(target.norm.weight, mae.norm.weight)
        assert set(report.missing) == before.keys() and set(report.unexpected) == set(DECODER)
    heads = {"args": {"decoder_num_heads": 2}}
    report = load_into(fresh(), save(tmp_path, mae, **heads))
    assert report.decoder == "the file's does not fit (2 heads); a new one, as initialised here"
    report = load_into(fresh(), save(tmp_path, encoder_only(mae)))
    assert report.decoder == "none in the file (encoder only); a new one, as initialised here"
    assert report.missing == DECODER
    half = {k: v for k, v in mae.state_dict().items() if not k.startswith("decoder_blocks.1")}
    assert "decoder_blocks.1.norm1.weight" in load_into(fresh(), save(tmp_path, half)).decoder


def test_another_number_of_heads_is_another_encoder(tmp_path):
    path = save(tmp_path, make_mae(), args={"num_heads": 4})
    with pytest.raises(UserError, match=r"has 4 attention heads, the model 3"):
        load_into(make_vit(), path)


def test_a_classifier_gives_its_encoder_and_a_norm_of_its_own(tmp_path):
    vit = make_vit(global_pool=True, num_classes=9)
    report = load_into(fresh(), save(tmp_path, vit))
    assert set(report.missing) == {"norm.weight", "norm.bias", *DECODER}
    assert report.dropped == ["head.weight: (9, 24)", "head.bias: (9,)"]
    assert set(report.unexpected) == {"fc_norm.weight", "fc_norm.bias"}


def test_an_adapted_model_sees_grey_as_it_saw_grey_in_colour(tmp_path):
    """End to end: one channel through the adapted model is three equal ones through the file's."""
    mae, target = make_mae().eval(), fresh(in_chans=1).eval()
    load_into(target, save(tmp_path, mae), asked={"in_chans"})
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        # Float32: 192 products summed in another order, then two blocks
        torch.testing.assert_close(
            encoder_features(target, grey),
            encoder_features(mae, grey.expand(-1, 3, -1, -1)),
            rtol=0,
            atol=1e-5,
        )


def test_an_adapted_model_is_described_as_any(tmp_path):
    from util.weights.build import build
    from util.weights.describe import describe

    target = fresh(patch_size=16, in_chans=1)
    load_into(target, save(tmp_path, make_mae()), asked={"patch_size", "in_chans"})
    path = save(tmp_path, target, args={"input_size": 32, "num_heads": 3, "decoder_num_heads": 4})
    content = torch.load(path, weights_only=True)
    model = build(describe(content, path, argparse.Namespace(), "full"))
    images, noise = torch.randn(1, 1, 32, 32), torch.rand(1, 4)
    with torch.no_grad():
        assert torch.equal(model(images, 0.5, noise)[1], target.eval()(images, 0.5, noise)[1])
