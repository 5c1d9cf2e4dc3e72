"""`--ema`: the average against its closed form, on skipped steps, and in place of the weights."""

from argparse import Namespace

import pytest
import torch
from golden_utils import TINY_MAE, fill
from timm.optim import param_groups_weight_decay

import models_mae
from engine_pretrain import train_one_epoch
from util.compute.named_optimizer import by_name
from util.compute.precision import NativeScalerWithGradNormCount
from util.errors import UserError
from util.run.ema import Ema
from util.run.guard import RunGuard

DECAY = 0.7


def make(opt="adamw", **settings):
    model = fill(models_mae.mae_vit(TINY_MAE, norm_pix_loss=True), seed=1, std=0.1, skip="pos_embed")
    args = Namespace(opt=opt, opt_args=[], lr=1e-2)
    optimizer = by_name(param_groups_weight_decay(model, 0.05), args, settings)
    return model, optimizer, Ema(model, optimizer, DECAY)


def copy_of(weights):
    return {name: value.detach().clone() for name, value in weights.items()}


@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_the_average_is_its_closed_form_and_steps_that_are_not_made_do_not_count(opt):
    """d^n w0 + (1 - d) sum of d^(n - k) wk, after the real loop in float64; the third of 6 losses is NaN."""
    model, optimizer, ema = make(opt)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    seen = [copy_of(trained)]
    optimizer.register_step_post_hook(lambda *_: seen.append(copy_of(trained)))
    images = torch.randn(6, 2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images[2, 1] = float("nan")
    args = Namespace(accum_iter=1, mask_ratio=0.75, lr=1e-2, min_lr=0.0, warmup_epochs=0, epochs=3, seed=0,
                     skip_nonfinite=1, amp_dtype="none", schedule="wsd")  # fmt: skip
    loader = [(batch, torch.zeros(2)) for batch in images]
    scaler = NativeScalerWithGradNormCount(enabled=False, device="cpu")
    guard = RunGuard(args, steps=6)
    train_one_epoch(model, loader, optimizer, torch.device("cpu"), 0, scaler, None, args, guard)
    assert len(seen) == 6 and guard.bad_steps == 1
    for name, value in ema.average.items():
        expected = DECAY**5 * seen[0][name]
        for k in range(1, 6):
            expected = expected + (1 - DECAY) * DECAY ** (5 - k) * seen[k][name]
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-14)
        assert not torch.equal(value, trained[name])
    assert ema.average.keys() == trained.keys() and "pos_embed" not in trained


@pytest.mark.parametrize("found_inf", [1.0, 0.0])
def test_a_fused_step_that_a_gpu_does_not_make_does_not_count(found_inf):
    """As the scaler calls it there: the optimizer knows by `found_inf`, on the device, that it makes none."""
    model, optimizer, ema = make(fused=True)
    for p in model.parameters():
        p.data.add_(1.0)  # away from the average
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = copy_of(ema.average)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found_inf)
    if not found_inf:
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    else:
        ema.update(optimizer)  # a fused step on a CPU knows no found_inf
    moved = [not torch.equal(value, before[name]) for name, value in ema.average.items()]
    assert all(moved) if not found_inf else not any(moved)


def test_in_place_of_the_weights_and_back_to_the_bit():
    model, optimizer, ema = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    weights, average = copy_of(model.state_dict()), copy_of(ema.average)
    saved = copy_of(ema.state_dict())
    with pytest.raises(ZeroDivisionError), ema.in_place():
        inside = copy_of(model.state_dict())
        raise ZeroDivisionError
    assert list(saved) == list(weights) == list(inside)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
        assert torch.equal(inside[name], average.get(name, weights[name]))
        assert torch.equal(saved[name], inside[name])
    assert all(torch.equal(value, average[name]) for name, value in ema.average.items())


def test_from_a_checkpoint_with_an_average_without_one_and_with_nonsense(capsys):
    model, optimizer, ema = make()
    for value in ema.average.values():
        value.add_(0.5)
    state = ema.state_dict()
    other = Ema(model, optimizer, DECAY, "x.pth", {"model_ema": state})
    assert all(torch.equal(value, ema.average[name]) for name, value in other.average.items())
    assert "".join(capsys.readouterr()) == ""
    other = Ema(model, optimizer, DECAY, "x.pth", {"epoch": 3})
    assert "--ema 0.7: x.pth holds no average" in "".join(capsys.readouterr())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.average.items())
    for odd in (5, {}, {**state, "cls_token": torch.zeros(1)}, {"cls_token": torch.zeros(1, 1, 24)}):
        with pytest.raises(UserError, match=r"x\.pth") as error:
            Ema(model, optimizer, DECAY, "x.pth", {"model_ema": odd})
        assert "\n" not in str(error.value)
