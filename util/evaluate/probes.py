"""Probes on frozen features, many learning rates and many features at once.

Leading axes: F features (of blocks and poolings) x R learning rates; each pair is a probe of its own, and all
learn in the same matrix products. Plain SGD with momentum is linear in the gradient, so a probe's learning
rate is a factor of its loss.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from util.evaluate.tasks import Task
from util.rng import derive_seed

BATCH, QUERIES, EVAL_ROWS = 256, 8, 512


class LinearProbes(nn.Module):
    """Features (n, F, D) -> logits (F, R, n, K), from zero weights.

    norm: BatchNorm without parameters comes before, as in the paper's probe (arXiv 2111.06377, A.1).
    """

    def __init__(self, shape: tuple[int, int], outputs: int, norm: bool, rates: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(math.prod(shape), affine=False, eps=1e-6) if norm else None
        self.weight = nn.Parameter(torch.zeros(shape[0], rates, shape[1], outputs))
        self.bias = nn.Parameter(torch.zeros(shape[0], rates, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x.flatten(1)).view(x.shape)
        weight = self.weight.transpose(1, 2).flatten(2)  # (F, D, R K): all rates in one product
        logits = x.transpose(0, 1) @ weight  # (F, n, R K)
        return logits.unflatten(2, self.weight.shape[1::2]).transpose(1, 2) + self.bias


class AttentiveProbes(nn.Module):
    """Patch tokens (n, L, D) -> logits (1, R, n, K): "efficient probing" (arXiv 2506.10178).

    M learned queries look at the tokens themselves, without a key projection; query m's mean of the tokens
    gives the m-th part of the pooled vector, by a projection of its own of width D / M. Then BatchNorm and a
    linear layer, from zero weights. M is the largest divisor of D that divides 8.

    Beside the paper: the tokens go through BatchNorm without parameters first, as some encoders have a few
    channels that are far larger than the others, and the projections start as the parts of the identity.
    """

    def __init__(self, width: int, outputs: int, seed: int, rates: int):
        super().__init__()
        count = math.gcd(QUERIES, width)
        generator = torch.Generator().manual_seed(derive_seed(seed, width, count))
        queries = torch.randn(count, width, generator=generator)
        value = torch.eye(width).view(width, count, -1).transpose(0, 1)  # (M, D, D / M)
        self.tokens = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.queries = nn.Parameter(queries.repeat(rates, 1, 1))  # every rate starts from the same
        self.value = nn.Parameter(value.repeat(rates, 1, 1, 1))
        self.norm = nn.BatchNorm1d(rates * width, affine=False, eps=1e-6)
        self.weight = nn.Parameter(torch.zeros(rates, width, outputs))
        self.bias = nn.Parameter(torch.zeros(rates, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        rates, count, width = self.queries.shape
        x = self.tokens(x.flatten(0, 1)).view(x.shape)
        scores = x @ self.queries.flatten(0, 1).T * width**-0.5  # (n, L, R M)
        pooled = scores.softmax(dim=1).transpose(1, 2) @ x  # (n, R M, D)
        values = pooled.transpose(0, 1) @ self.value.flatten(0, 1)  # (R M, n, D / M)
        joined = values.view(rates, count, len(x), -1).permute(2, 0, 1, 3).flatten(1)  # (n, R D)
        joined = self.norm(joined).view(len(x), rates, width).transpose(0, 1)  # (R, n, D)
        return (joined @ self.weight + self.bias)[None]


class Data(NamedTuple):
    """What probes learn from: x (n, ...), as they take it, and targets (n, ...), on the CPU."""

    x: Tensor
    targets: Tensor

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self.x))


def fit(
    probes: nn.Module, data: Data, rows: Tensor, rates: Tensor, task: Task, steps: int, seed: int
) -> None:
    """Trains `probes` with SGD (momentum 0.9, no decay, cosine to 0) on batches of 256, the same for all.

    Args:
        rows: int64, which images of `data`.
        rates: (F, R), the learning rate of each probe, on the device and in the type that compute.
    """
    optimizer = torch.optim.SGD(probes.parameters(), lr=1.0, momentum=0.9)
    rows = rows.repeat(2) if len(rows) == 1 else rows  # BatchNorm takes two
    batch, order = min(BATCH, len(rows)), torch.empty(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(derive_seed(seed))
    probes.train()
    for step in range(steps):
        if len(order) < batch:  # what is left over of a permutation begins the next one
            order = torch.cat([order, rows[torch.randperm(len(rows), generator=generator)]])
        taken, order = order[:batch], order[batch:]
        x, targets = data.x[taken].to(rates), data.targets[taken].to(rates.device)
        losses = task.loss(probes(x), targets).mean(-1)
        optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        (losses * rates).sum().backward()
        optimizer.step()


@torch.no_grad()
def decide(
    probes: nn.Module, data: Data, rows: Tensor, rates: Tensor, task: Task
) -> tuple[np.ndarray, np.ndarray]:
    """(decisions (F, R, n, ...), mean losses float64 (F, R)) of trained probes on some `rows`."""
    probes.eval()
    decisions, losses = [], []
    for part in rows.split(EVAL_ROWS):
        logits = probes(data.x[part].to(rates))
        decisions.append(task.decide(logits).cpu())
        losses.append(task.loss(logits, data.targets[part].to(rates.device)).double().cpu())
    return torch.cat(decisions, dim=2).numpy(), torch.cat(losses, dim=2).mean(-1).numpy()


class Found(NamedTuple):
    """A probe that was chosen: its `setting`, how good it was on held-out images (larger is better), and
    its decisions (n, ...) on others.
    """

    setting: object
    held: tuple[float, float]
    decisions: np.ndarray


def search(
    make: Callable[[int], nn.Module],
    rates: Sequence[float],
    train: Data,
    val: Data,
    parts: tuple[Tensor, Tensor],
    task: Task,
    steps: int,
    seed: int,
    device="cpu",
    refit: bool = True,
) -> list[Found]:
    """For each of the F features: the learning rate that is best on a held-out part of `train`, and what a
    probe that learns with it from both parts says of `val`, whose targets are not used.

    Args:
        make: number of rates -> probes. parts: rows of `train` to learn from, and held out.
        refit: False: the probe that has learned from the first part alone is taken.
    """
    probes = make(len(rates)).to(device)
    grid = torch.tensor(rates, device=device, dtype=probes.weight.dtype)
    grid = grid.expand(len(probes.bias) if probes.bias.ndim == 4 else 1, -1)
    fit(probes, train, parts[0], grid, task, steps, seed)
    decisions, losses = decide(probes, train, parts[1], grid, task)
    targets = train.targets[parts[1]].numpy()
    best = [pick(of_set, loss, targets, task) for of_set, loss in zip(decisions, losses, strict=True)]
    if refit:
        probes = make(1).to(device)
        grid = grid.gather(1, torch.tensor([[i] for i, _ in best], device=device))
        fit(probes, train, torch.cat(parts).sort().values, grid, task, steps, seed)
    final, _ = decide(probes, val, val.rows, grid, task)
    pairs = zip(best, final, strict=True)
    return [Found(rates[i], held, part[0 if refit else i]) for (i, held), part in pairs]


def pick(
    decisions: Iterable[np.ndarray], losses: Iterable[float], targets: np.ndarray, task: Task
) -> tuple[int, tuple[float, float]]:
    """(place, (metric, -loss)) of the best decisions (n, ...): of equals, and where the metric is undefined,
    that of the lower loss, then the first. What has diverged is never taken unless all has.
    """
    scores = []
    for decision, loss in zip(decisions, losses, strict=True):
        finite = math.isfinite(loss)
        metric = task.metric(decision, targets) if finite else math.nan
        scores.append((-math.inf if math.isnan(metric) else metric, -float(loss) if finite else -math.inf))
    best = max(range(len(scores)), key=lambda i: scores[i])
    return best, scores[best]
