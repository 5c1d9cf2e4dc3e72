"""`--opt`: what is saved goes on bit for bit, Muon's step is the plain one, mistakes are one line."""

import functools
from argparse import Namespace

import pytest
import torch
from golden_utils import TINY_MAE, fill
from timm import optim
from timm.optim import muon, param_groups_weight_decay

import models_mae
from util.compute.batched_muon import BatchedMuon
from util.compute.optimizer import build_optimizer, check_optimizer_args
from util.compute.precision import NativeScalerWithGradNormCount
from util.errors import UserError
from util.run.checkpoint import save_model
from util.run.resume import load_model

CPU = torch.device("cpu")
NAMES = optim.list_optimizers()
FEW = ["adamw", "muon", "nadamuon", "lion", "lamb", "sgd", "adafactor", "nadam", "fusedadam", "adahessian"]


def make_model():
    model = fill(models_mae.mae_vit({**TINY_MAE, "depth": 1, "decoder_depth": 1}), 1, 0.1, skip="pos_embed")
    return model.float()


def make(name, model, *opt_args, lr=1e-3, **defaults):
    args = Namespace(opt=name, opt_args=list(opt_args), lr=lr)
    return build_optimizer(param_groups_weight_decay(model, 0.05), args, CPU, **defaults)


def step(model, optimizer, number):
    """One of fixed gradients; what an optimizer draws comes of the step's number."""
    torch.manual_seed(number)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype) if p.requires_grad else None
    optimizer.step()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in sorted({*NAMES, *FEW})]
)
def test_state_saved_loaded_and_stepped_on_is_undisturbed_or_the_name_is_refused(name, tmp_path):
    try:
        check_optimizer_args(Namespace(opt=name, opt_args=[]))
    except UserError as error:
        assert str(error).startswith(f"--opt {name}: ") and "\n" not in str(error)
        return
    scaler = NativeScalerWithGradNormCount(enabled=False, device="cpu")
    model = make_model()
    optimizer = make(name, model)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for number in range(3):
        step(model, optimizer, number)
    args = Namespace(output_dir=str(tmp_path), resume="", opt=name, epochs=3)
    path = save_model(args, 0, model, model, optimizer, scaler)
    again = make_model()
    other = make(name, again)
    load_model(Namespace(output_dir="", resume=str(path), epochs=3), again, other, scaler)
    for number in range(3, 6):
        for pair in ((model, optimizer), (again, other)):
            step(*pair, number)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert not torch.equal(start["decoder_pred.weight"], model.state_dict()["decoder_pred.weight"])
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_the_names_that_work_are_most():
    """So that a timm which renames its optimizers is seen here."""
    assert {"adamw", "muon", "lion", "lamb", "sgd"} <= {*NAMES} and len(NAMES) > 30
    assert "nadamuon" in NAMES or not hasattr(muon, "adamuon")  # timm 1.0.22 has neither


def plain_muon(weights, grads, buffers, lr, decay, momentum=0.9):
    """Muon (Jordan 2024), five steps of Newton-Schulz, the result times 0.2 sqrt(max(out, in)); in place."""
    coefficients = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)]  # fmt: skip
    for name, grad in grads.items():
        buffers[name] = momentum * buffers.get(name, torch.zeros_like(grad)) + (1 - momentum) * grad
        x = buffers[name].flatten(1)
        x = x / x.square().sum().sqrt()
        for a, b, c in coefficients:
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        scale = 0.2 * max(x.shape) ** 0.5
        weights[name] = weights[name] * (1 - lr * decay) - lr * scale * x.reshape(grad.shape)


def plain_adamw(weights, grads, state, number, lr):
    for name, grad in grads.items():
        first, second = state.get(name, (0.0, 0.0))
        first, second = 0.9 * first + 0.1 * grad, 0.95 * second + 0.05 * grad**2
        state[name] = first, second
        update = first / (1 - 0.9**number) / ((second / (1 - 0.95**number)).sqrt() + EPS)
        decay = 0.05 if grad.ndim > 1 else 0.0  # tokens, but no biases and norms
        weights[name] = weights[name] * (1 - lr * decay) - lr * update


EPS = 1e-7  # of timm's Muon, also in its AdamW part


@pytest.mark.parametrize("kind", [muon.Muon, BatchedMuon])
def test_muons_steps_are_those_of_a_plain_implementation(kind, monkeypatch):
    """In float64; timm computes Newton-Schulz in bfloat16, which a machine without it would do otherwise."""
    exact = functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float64)
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", exact)
    model = make_model().double()
    optimizer = make("muon", model, lr=1e-2)
    optimizer.__class__ = kind  # the second is that of GPUs
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: p.detach().clone() for name, p in trained.items()}
    buffers, moments = {}, {}
    matrices = {n for n, p in trained.items() if p.ndim in (2, 4)}
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "decoder_embed.weight"} <= matrices
    for number in range(1, 4):
        step(model, optimizer, number)
        grads = {name: p.grad for name, p in trained.items()}
        own = [{n: g for n, g in grads.items() if (n in matrices) == of} for of in (True, False)]
        plain_muon(weights, own[0], buffers, 1e-2, 0.05)
        plain_adamw(weights, own[1], moments, number, 1e-2)
    for name, p in trained.items():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "words", ["", "nesterov=True ns_steps=3", "ns_coefficients=original adjust_lr_fn=original"]
)
def test_matrices_of_one_shape_move_together_as_they_do_alone(words, monkeypatch):
    """In float64; what has no gradient stays, and gradients are there afterwards."""
    exact = functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float64)
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", exact)
    models = [fill(models_mae.mae_vit(TINY_MAE), 1, 0.1, skip="pos_embed") for _ in range(2)]
    optimizers = [make("muon", model, *words.split(), lr=1e-2) for model in models]
    optimizers[1].__class__ = BatchedMuon
    products = []
    monkeypatch.setattr(
        torch, "stack", lambda many, stack=torch.stack: products.append(len(many)) or stack(many)
    )
    for number in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(number)
            for name, p in model.named_parameters():
                idle = not p.requires_grad or (name == "blocks.1.mlp.fc1.weight" and number == 1)
                p.grad = None if idle else torch.randn(p.shape, dtype=p.dtype)
            given = [p.grad for p in model.parameters()]
            optimizer.step()
            for p, grad in zip(model.parameters(), given, strict=True):
                assert (p.grad is None) == (grad is None)  # older timm changes them
    assert max(products) > 1 and len(products) == 2 * len(
        {p.shape for p in models[0].parameters() if p.ndim == 2}
    )
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    states = [list(optimizer.state_dict()["state"].values()) for optimizer in optimizers]
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()


@pytest.mark.parametrize(
    "name, opt_args, message",
    [
        ("muom", [], r"--opt muom: timm .* has none of that name; near: muon"),
        ("zzzz", [], r"none of that name; near: adamw, lion, muon"),
        ("adahessian", [], r"--opt adahessian: needs second derivatives"),
        ("muon", ["momentum"], r"--opt_args momentum: must be NAME=VALUE"),
        ("muon", ["lr=0.1"], r"--opt_args lr=0\.1: must be NAME=VALUE, as --lr is a flag"),
        ("adamw", ["weight_decay=1"], r"must be NAME=VALUE, as --weight_decay is a flag"),
        ("muon", ["speed=3"], r"--opt muon --opt_args speed=3: .*speed"),
        ("muon", ["momentum=2"], r"--opt muon --opt_args momentum=2: "),
        ("adamw", ["betas=3"], r"--opt adamw --opt_args betas=3: "),
        ("muon", ["conv_mode=never"], r"conv_mode"),
        ("muon", ["momentum=nan"], r"momentum=nan: (a step fails: |'<=' not supp)"),  # 1.0.22: the second
        ("muon", ["betas=0.9"], r"--opt_args betas=0\.9: a step fails: "),  # of its AdamW part
        ("muon", ["ns_steps=2.5"], r"--opt_args ns_steps=2\.5: a step fails: "),
        ("muon", ["ns_steps=-1"], r"--opt_args ns_steps=-1: must be 1 or more"),
        ("lion", ["betas=(0.9, 1)", "betas=(0.8, 1)"], r"betas is there twice"),
        ("sgd", ["momentum=1e999", "nesterov=True"], r"a step makes weights that are not finite"),
    ],
)
def test_mistakes_are_one_line(name, opt_args, message):
    with pytest.raises(UserError, match=message) as error:
        check_optimizer_args(Namespace(opt=name, opt_args=opt_args))
    assert "\n" not in str(error.value)


def test_what_opt_args_say_counts_and_the_default_is_torchs_adamw():
    model = make_model()
    default = make("adamw", model, betas=(0.9, 0.95))
    assert type(default) is torch.optim.AdamW
    assert default.defaults["betas"] == (0.9, 0.95) and default.defaults["fused"]
    own = make("adamw", model, "betas=(0.8,0.9)", "eps=1e-6", betas=(0.9, 0.95))
    assert type(own) is torch.optim.AdamW and own.defaults["fused"]
    assert own.defaults["betas"] == (0.8, 0.9) and own.defaults["eps"] == 1e-6
    other = make("muon", model, "momentum=0.9", "nesterov=True", "ns_coefficients=original")
    settings = other.param_groups[0]
    assert settings["momentum"] == 0.9 and settings["nesterov"] is True
    assert settings["ns_coefficients"] == "original"
