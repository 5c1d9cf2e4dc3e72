"""The cross-attention decoder against a plain implementation, what it may see, and what it costs."""

import importlib
import math
from argparse import Namespace

import pytest
import torch
from golden_utils import REPO, TINY_MAE, fill
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, linear
from torch.utils.flop_counter import FlopCounterMode

import models_cross
import models_mae
from util.compute import compile as compiling

IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))  # 4 of 16 patches stay visible


def tiny(**kwargs):
    model = models_mae.mae_vit(TINY_MAE, make=models_cross.CrossDecoderViT, **kwargs)
    return fill(model, seed=7, std=0.2, skip="pos_embed")


def norm(x, state, name):
    """Layer norm, spelled out."""
    x = x - x.mean(-1, keepdim=True)
    return (
        x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def layer(x, state, name):
    return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def plain_patch(state, latent, visible, patch, heads=4, depth=2):
    """Prediction (p * p * C) of a `patch` of one image: latent (1 + K, D), numbers of visible patches."""
    table = state["decoder_pos_embed"][0]
    places = [0, *(number + 1 for number in visible)]
    seen = layer(latent, state, "decoder_embed") + table[places]
    x, width = state["mask_token"][0, 0] + table[patch + 1], len(table[0])
    size = width // heads
    for number in range(depth):
        block = f"decoder_blocks.{number}"
        q, kv = (
            layer(norm(x, state, f"{block}.norm1"), state, f"{block}.attn.q"),
            layer(seen, state, f"{block}.attn.kv"),
        )
        mixed = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = torch.stack([q[part] @ key for key in kv[:, :width][:, part]]) / math.sqrt(size)
            shares = scores.exp() / scores.exp().sum()
            mixed.append(
                sum(share * value for share, value in zip(shares, kv[:, width:][:, part], strict=True))
            )
        x = x + layer(torch.cat(mixed), state, f"{block}.attn.proj")
        hidden = gelu(layer(norm(x, state, f"{block}.norm2"), state, f"{block}.mlp.fc1"))
        x = x + layer(hidden, state, f"{block}.mlp.fc2")
    return layer(norm(x, state, "decoder_norm"), state, "decoder_pred")


def scored_of(model, ratio):
    """(prediction, places that count) of a training step over IMAGES."""
    latent, mask, ids_restore = model.forward_encoder(IMAGES, 0.75, NOISE)
    torch.manual_seed(ratio * 100)
    return *model.train().predict(latent, mask, ids_restore), mask


@pytest.mark.parametrize("norm_pix", [False, True])
def test_prediction_and_loss_are_those_of_a_plain_implementation(norm_pix):
    model = tiny(predict_ratio=0.5, norm_pix_loss=norm_pix)
    state = model.state_dict()
    with torch.no_grad():
        latent = model.forward_encoder(IMAGES, 0.75, NOISE)[0]
        pred, scored, _ = scored_of(model, 0.5)
        whole = model.eval()(IMAGES, 0.75, NOISE)
        torch.manual_seed(50)
        loss = model.train()(IMAGES, 0.75, NOISE)[0]
    patches = model.patchify(IMAGES)
    order, errors, of_all = NOISE.argsort(dim=1), [], []
    for image in range(3):
        visible = order[image, :4].tolist()
        for patch in range(16):
            right = plain_patch(state, latent[image], visible, patch)
            torch.testing.assert_close(whole[1][image, patch], right, rtol=1e-10, atol=1e-10)
            target = patches[image, patch]
            if norm_pix:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            error = (right - target).square().mean()
            of_all += [] if patch in visible else [error]
            if scored[image, patch]:
                torch.testing.assert_close(pred[image, patch], right, rtol=1e-10, atol=1e-10)
                errors.append(error)
            else:
                assert not pred[image, patch].any()
    assert len(errors) == 3 * 6 and len(of_all) == 3 * 12
    torch.testing.assert_close(loss, sum(errors) / 18, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole[0], sum(of_all) / 36, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 12), (0.5, 6), (0.25, 3), (0.29, 3), (0.01, 1)])
def test_a_step_scores_a_share_of_the_masked_patches(ratio, count):
    model = tiny(predict_ratio=ratio)
    _, scored, mask = scored_of(model, ratio)
    assert scored.sum(dim=1).tolist() == [count] * 3 and (scored <= mask).all()
    assert ratio < 1 or torch.equal(scored, mask)
    assert torch.equal(model.eval().predict(*model.forward_encoder(IMAGES, 0.75, NOISE))[1], mask)


def test_at_1_training_and_evaluation_have_the_same_loss_whatever_the_share_was():
    losses = [tiny(predict_ratio=ratio).eval()(IMAGES, 0.75, NOISE)[0] for ratio in (1.0, 0.25)]
    assert torch.equal(*losses)
    torch.testing.assert_close(tiny().train()(IMAGES, 0.75, NOISE)[0], losses[0], rtol=1e-12, atol=0)


def test_each_masked_patch_is_drawn_as_often():
    """1,000 draws of 3 of 12: each patch 250 times on average, with a std of 14."""
    model, drawn = tiny(predict_ratio=0.25).train(), torch.zeros(3, 16)
    latent, mask, ids_restore = model.forward_encoder(IMAGES, 0.75, NOISE)
    model.forward_decoder = lambda x, ids_restore, ids: latent.new_zeros(3, ids.shape[1], 192)
    torch.manual_seed(0)
    for _ in range(1000):
        drawn += model.predict(latent, mask, ids_restore)[1]
    assert (drawn[mask == 0] == 0).all()
    assert (drawn[mask == 1] - 250).abs().max() < 5 * 14


def test_a_patch_is_predicted_by_itself():
    """Its prediction is the same whatever others are asked for; it depends on each visible patch."""
    model = tiny()
    latent, _, ids_restore = model.forward_encoder(IMAGES, 0.75, NOISE)
    every = model.forward_decoder(latent, ids_restore)
    for ids in ([[5]] * 3, [[5, 7, 2]] * 3, [[15], [0], [3]]):
        ids = torch.tensor(ids)
        some = model.forward_decoder(latent, ids_restore, ids)
        torch.testing.assert_close(some, models_mae.gather_tokens(every, ids), rtol=1e-12, atol=1e-13)
    latent = latent.detach().requires_grad_()
    model.forward_decoder(latent, ids_restore, torch.tensor([[5]] * 3)).sum().backward()
    assert latent.grad.abs().amax(dim=2).min() > 1e-6


def counted(model) -> float:
    """Matrix products of a training forward pass, of the named parts."""
    model = model.float().train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(IMAGES.float(), 0.75, NOISE)
    return counter.get_total_flops()


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25])
def test_products_are_those_of_counting(ratio, monkeypatch):
    tokens, queries, width, narrow, pixels = 5, 12 * ratio, 24, 16, 192  # 4 visible and the class token
    encoder = 2 * 16 * pixels * width + 2 * (2 * tokens * width**2 * 12 + 4 * tokens**2 * width)
    block = (
        2 * queries * narrow**2 * (2 + 8) + 2 * tokens * narrow * 2 * narrow + 4 * queries * tokens * narrow
    )
    decoder = 2 * tokens * width * narrow + 2 * block + 2 * queries * narrow * pixels
    assert counted(tiny(predict_ratio=ratio)) == 3 * (encoder + decoder)
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    flop = importlib.import_module("bench_step").pretrain_flop(tiny(predict_ratio=ratio), 0.75)
    assert flop == 3 * (encoder + decoder)  # of one image, and the backward pass


def test_computed_again_in_the_backward_pass_the_gradients_are_the_same():
    found = []
    for recompute in (False, True):
        model = tiny(predict_ratio=0.5).train()
        model.grad_checkpointing = recompute
        torch.manual_seed(0)
        model(IMAGES, 0.75, NOISE)[0].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(grad is not None and grad.any() for grad in found[0].values())
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.parametrize("distributed", [False, True])
def test_compiled_it_has_the_same_numbers(monkeypatch, distributed):
    """As one graph, or one for each kind of block."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    torch._dynamo.reset()
    found = []
    for compiles in (False, True):
        model = tiny(predict_ratio=0.5).float().train()
        model.grad_checkpointing = compiles
        how = dict(compile=True, compile_mode="default", distributed=distributed, accum_iter=1)
        assert not compiles or compiling.compile_model(
            model, "forward", Namespace(**how), torch.device("cpu")
        )
        torch.manual_seed(0)
        loss, *_ = model(IMAGES.float(), mask_ratio=0.75)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    torch._dynamo.reset()
    assert counter.frame_count == (2 if distributed else 1)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1, float("nan")])
def test_shares_that_cannot_be(ratio):
    with pytest.raises(ValueError, match="is not above 0 and at most 1"):
        tiny(predict_ratio=ratio)
