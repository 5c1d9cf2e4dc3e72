"""Probes that learn side by side, against plain modules that learn one by one, in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from util.evaluate import probes
from util.evaluate.probes import (
    AttentiveProbes,
    Data,
    LinearProbes,
    decide,
    fit,
    pick,
    search,
)
from util.evaluate.tasks import one_class_each
from util.rng import derive_seed

RATES, STEPS, CLASSES = (0.1, 1.0, 0.01), 7, 4
TASK = one_class_each(CLASSES)


@pytest.fixture(autouse=True)
def float64_and_small_batches(monkeypatch):
    monkeypatch.setattr(probes, "BATCH", 12)
    monkeypatch.setattr(probes, "EVAL_ROWS", 9)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def data(*shape, seed=0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, *shape, generator=generator)
    labels = torch.randint(0, CLASSES, (30,), generator=generator)
    return Data(x + labels.view(-1, *[1] * len(shape)) * torch.linspace(0.3, 1, shape[-1]), labels)


def plain_fit(forward, parameters, x, labels, rate, seed):
    """SGD with momentum, written out; batches of 12 of one permutation after the other."""
    generator, order = torch.Generator().manual_seed(derive_seed(seed)), []
    speeds = [torch.zeros_like(p) for p in parameters]
    for step in range(STEPS):
        if len(order) < 12:
            order += torch.randperm(len(x), generator=generator).tolist()
        rows, order = order[:12], order[12:]
        loss = F.cross_entropy(forward(x[rows]), labels[rows])
        with torch.no_grad():
            for p, speed, grad in zip(parameters, speeds, torch.autograd.grad(loss, parameters), strict=True):
                speed.mul_(0.9).add_(grad)
                p -= rate * 0.5 * (1 + math.cos(math.pi * step / STEPS)) * speed


@pytest.mark.parametrize("norm", [False, True])
def test_linear_probes_are_linear_layers_one_by_one(norm):
    side, grid = data(3, 6), torch.tensor(RATES).expand(3, -1)
    model = LinearProbes((3, 6), CLASSES, norm, len(RATES))
    fit(model, side, side.rows, grid, TASK, STEPS, seed=5)
    decisions, losses = decide(model, side, side.rows, grid, TASK)
    for f in range(3):
        for r, rate in enumerate(RATES):
            layers = [nn.BatchNorm1d(6, affine=False, eps=1e-6)] if norm else []
            plain = nn.Sequential(*layers, nn.Linear(6, CLASSES))
            nn.init.zeros_(plain[-1].weight)
            nn.init.zeros_(plain[-1].bias)
            plain_fit(plain, list(plain.parameters()), side.x[:, f], side.targets, rate, seed=5)
            plain.eval()
            torch.testing.assert_close(model.weight[f, r].T, plain[-1].weight, rtol=0, atol=1e-10)
            torch.testing.assert_close(model.bias[f, r, 0], plain[-1].bias, rtol=0, atol=1e-10)
            logits = plain(side.x[:, f])
            torch.testing.assert_close(model(side.x)[f, r], logits, rtol=0, atol=1e-10)
            assert losses[f, r] == pytest.approx(F.cross_entropy(logits, side.targets).item(), abs=1e-10)
            assert (decisions[f, r] == logits.argmax(1).numpy()).all()


def plain_attentive(x, queries, values, weight, bias):
    """Logits (n, K) of one probe in training: image by image, query by query."""
    pooled, x = [], (x - x.mean((0, 1))) / torch.sqrt(x.var((0, 1), unbiased=False) + 1e-6)
    for tokens in x:
        parts = []
        for query, value in zip(queries, values, strict=True):
            shares = torch.exp(tokens @ query / tokens.shape[1] ** 0.5)
            shares = shares / shares.sum()
            parts.append(sum(share * (token @ value) for share, token in zip(shares, tokens, strict=True)))
        pooled.append(torch.cat(parts))
    pooled = torch.stack(pooled)
    spread = pooled.var(0, unbiased=False)
    return (pooled - pooled.mean(0)) / torch.sqrt(spread + 1e-6) @ weight + bias


@pytest.mark.parametrize("width", [8, 12])  # 8 queries, and 4
def test_attentive_probes_against_a_plain_computation(width):
    side = data(5, width)
    model = AttentiveProbes(width, CLASSES, 3, 2)
    with torch.no_grad():
        for p in model.parameters():  # every rate and every weight another one
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p.shape)))
    x, labels = side.x[:10], side.targets[:10]
    logits = model(x)
    assert logits.shape == (1, 2, 10, CLASSES) and model.queries.shape[1] == math.gcd(8, width)
    names = ("queries", "value", "weight", "bias")
    TASK.loss(logits, labels).mean(-1).sum().backward()
    for r in range(2):
        own = [getattr(model, name)[r].detach().clone().requires_grad_() for name in names]
        expected = plain_attentive(x, own[0], own[1], own[2], own[3])
        torch.testing.assert_close(logits[0, r], expected, rtol=0, atol=1e-10)
        grads = torch.autograd.grad(F.cross_entropy(expected, labels), own)
        for name, grad in zip(names, grads, strict=True):
            torch.testing.assert_close(getattr(model, name).grad[r], grad, rtol=0, atol=1e-10)


def test_attentive_grid_is_one_by_one():
    side = data(5, 8)
    grid = torch.tensor([RATES])
    together = AttentiveProbes(8, CLASSES, 3, len(RATES))
    fit(together, side, side.rows, grid, TASK, STEPS, seed=1)
    for r, rate in enumerate(RATES):
        alone = AttentiveProbes(8, CLASSES, 3, 1)
        fit(alone, side, side.rows, torch.tensor([[rate]]), TASK, STEPS, seed=1)
        torch.testing.assert_close(together.eval()(side.x)[:, [r]], alone.eval()(side.x), rtol=0, atol=1e-10)


def test_the_best_rate_is_chosen_for_each_feature_and_learns_from_all():
    train, val = data(2, 6), data(2, 6, seed=1)
    parts = torch.arange(20), torch.arange(20, 30)

    def make(rates):
        return LinearProbes((2, 6), CLASSES, True, rates)

    found = search(make, (-0.1, 0.3), train, val, parts, TASK, STEPS, 0)
    assert [one.setting for one in found] == [0.3, 0.3]
    whole = make(1)
    grid = torch.full((2, 1), 0.3)
    fit(whole, train, train.rows, grid, TASK, STEPS, 0)
    expected, _ = decide(whole, val, val.rows, grid, TASK)
    assert all((one.decisions == expected[f, 0]).all() for f, one in enumerate(found))
    few = search(make, (-0.1, 0.3), train, val, parts, TASK, STEPS, 0, refit=False)
    assert few[0].held == found[0].held and (few[0].decisions != found[0].decisions).any()


def test_ties_go_to_the_lower_loss_and_what_diverged_is_last():
    targets = np.array([0, 1])
    right, wrong = np.array([0, 1]), np.array([1, 1])
    assert pick([wrong, right, right], [0.1, 0.5, 0.4], targets, TASK) == (2, (100.0, -0.4))
    assert pick([right, wrong], [math.nan, 3.0], targets, TASK)[0] == 1
    assert pick([right, right], [math.inf, math.nan], targets, TASK)[0] == 0
