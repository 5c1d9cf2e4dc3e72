"""The report card of an encoder: what neighbours and probes make of its frozen features.

Every choice (k, temperature, learning rate, block, class token or mean) is made on a fifth of the training
images, which is held out of that search; then all of them teach. The evaluated images choose nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from util.data.folds import deal
from util.errors import UserError
from util.evaluate.knn import knn_votes
from util.evaluate.layers import Layers, effective_rank
from util.evaluate.probes import AttentiveProbes, Data, Found, LinearProbes, pick, search
from util.evaluate.tasks import Task
from util.files import counted
from util.rng import derive_seed

HELD = 0.2  # share of the training images on which is chosen
DINO = (20, 0.07)  # k and temperature of arXiv 2104.14294
NEIGHBOURS = [DINO, *((k, t) for k in (1, 5, 10, 20, 50, 100) for t in (0.03, 0.07, 0.2) if (k, t) != DINO)]
LINEAR_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
ATTENTIVE_RATES = (0.03, 0.1, 0.3, 1.0)
FEW = {"few_1_percent": 0.01, "few_10_percent": 0.1, "few_5": 5}  # a class: a share, or images
PROTOCOLS = {
    "knn_dino": "k-NN as DINO: class token of the last block",
    "knn_main": "k-NN as main_knn.py: mean of the last block",
    "linear_paper": "the paper's head (BatchNorm, linear), class token of the last block",
    "linear_dinov2": "linear as DINOv2: class tokens of 1 or 4 blocks, and mean",
    "knn": "k-NN",
    "linear": "linear",
    "linear_norm": "BatchNorm, linear",
    "attentive": "attentive: efficient probing",
    "few_1_percent": "linear, 1 % of the labels",
    "few_10_percent": "linear, 10 % of the labels",
    "few_5": "linear, 5 labels a class",
}
DRAWS, STUDENT = 5, 2.776  # of few labels; the t of their mean's 95 % interval
RESAMPLES = 1000  # of the evaluated images, with replacement


@dataclass
class Row:
    """A line of the card: the metric on the evaluated images, with its 95 % interval.

    protocol: of `PROTOCOLS`. block: counted from 1, 0 for pixels, or text. figures: of `Task.figures`.
    samples: (1000,), the metric on resampled images.
    """

    protocol: str
    block: int | str
    tokens: str
    setting: str
    score: float
    low: float
    high: float
    figures: dict = field(default_factory=dict)
    samples: np.ndarray | None = field(default=None, repr=False)


@dataclass
class Column:
    """What one encoder, or raw pixels, are worth: {protocol: Row}, {what: (block, tokens, its figure)}.

    images: how many it learned from, and was evaluated on.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    depth: dict[str, list[tuple[int, str, float]]] = field(default_factory=dict)
    images: tuple[int, int] = (0, 0)

    def add(self, row: Row) -> None:
        self.rows[row.protocol] = row


@dataclass(frozen=True)
class Plan:
    """How a card is made. strata: (n,), numbers of which the held-out part and, of classes, draws take alike.
    groups: (n,) of a table of labels, numbers of what is held out together.
    """

    task: Task
    strata: torch.Tensor
    seed: int = 0
    steps: int = 300
    device: torch.device | str = "cpu"
    low_shot: bool = True
    groups: np.ndarray | None = None

    def of(self, kept: torch.Tensor) -> "Plan":
        """The plan of some of the images, `kept` bool (n,)."""
        groups = None if self.groups is None else self.groups[kept.numpy()]
        return replace(self, strata=self.strata[kept], groups=groups)

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the training images: (to learn from, held out); a fifth of each class, one of two, or the
        first of five folds of whole groups.
        """
        if self.groups is None:
            held = stratified(self.strata, _fifth, derive_seed(self.seed, 1))
        else:
            draw = np.random.RandomState(derive_seed(self.seed, 1) % 2**32)
            order = draw.permutation(self.groups.max() + 1)
            held = torch.from_numpy(deal(order[self.groups], self.strata.numpy(), round(1 / HELD)) == 0)
            held = held.nonzero().flatten() if not held.all() else held[:0]
        if not len(held):
            what = "no class has two images" if self.groups is None else "all images are of one group"
            raise UserError(f"train/: {what}, so there is nothing to choose settings on")
        learns = torch.ones(len(self.strata), dtype=torch.bool)
        learns[held] = False
        return learns.nonzero().flatten(), held


def _fifth(n: int) -> int:
    return min(n - 1, max(1, round(HELD * n)))


def stratified(strata: torch.Tensor, number: Callable[[int], int], seed: int) -> torch.Tensor:
    """Rows, ascending: of each group of n, `number(n)` that are drawn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for group in strata.unique():
        members = (strata == group).nonzero().flatten()
        rows.append(members[torch.randperm(len(members), generator=generator)[: number(len(members))]])
    return torch.cat(rows).sort().values


def resampled(decisions: np.ndarray, targets: np.ndarray, plan: Plan) -> np.ndarray:
    """(1000,): the metric on bootstrap samples of the images, the same ones for all that is compared."""
    draw = np.random.RandomState(derive_seed(plan.seed, 2) % 2**32)  # the same numbers in every numpy
    samples = []
    for _ in range(RESAMPLES):
        rows = draw.randint(0, len(targets), len(targets))
        samples.append(plan.task.metric(decisions[rows], targets[rows]))
    return np.array(samples)


def make_row(protocol: str, place: tuple, setting: str, decisions, targets, plan: Plan) -> Row:
    """`place`: (block, tokens)."""
    samples = resampled(decisions, targets, plan)
    low, high = np.nanpercentile(samples, [2.5, 97.5])  # no number: a sample of labels that are all alike
    score, figures = plan.task.metric(decisions, targets), plan.task.figures(decisions, targets)
    return Row(protocol, *place, setting, score, float(low), float(high), figures, samples)


def make_column(train: Layers, val: Layers, plan: Plan) -> Column:
    """Measures one source of features on `val`."""
    column, targets = Column(images=(len(train.labels), len(val.labels))), val.labels.numpy()
    parts, last = plan.split(), train.sets[-1][0]
    add = partial(make_row, targets=targets, plan=plan)

    neighbours = [of_neighbours(train, val, i, parts, plan) for i in range(len(train.sets))]
    for name, tokens in (("knn_dino", "class"), ("knn_main", "mean")):
        if (last, tokens) in train.sets:
            decisions = neighbours[train.sets.index((last, tokens))][1]
            column.add(add(name, (last, tokens), "k {} T {:g}".format(*DINO), decisions))
    found = [chosen for chosen, _ in neighbours]
    _add_best(column, "knn", train.sets, found, "k {0[0]} T {0[1]:g}", add)

    how = {"parts": parts, "task": plan.task, "steps": plan.steps, "seed": plan.seed, "device": plan.device}
    run = partial(search, **how)
    pooled = Data(train.pooled, train.labels), Data(val.pooled, val.labels)
    for name, norm in (("linear", False), ("linear_norm", True)):
        make = partial(LinearProbes, train.pooled.shape[1:], plan.task.outputs, norm)
        found = run(make, LINEAR_RATES, *pooled)
        if norm and (last, "class") in train.sets:
            of_last = found[train.sets.index((last, "class"))]
            column.add(add("linear_paper", (last, "class"), f"lr {of_last.setting:g}", of_last.decisions))
        best = _add_best(column, name, train.sets, found, "lr {:g}", add)
        if not norm and plan.low_shot:
            for row in few_labels(train, val, best, parts[0], parts[1], plan):
                column.add(row)
    if (last, "class") in train.sets:
        _add_dinov2(column, train, val, run, plan, add)
    if train.tokens:
        found = []
        for block in train.tokens:
            sides = Data(train.tokens[block], train.labels), Data(val.tokens[block], val.labels)
            make = partial(AttentiveProbes, train.tokens[block].shape[2], plan.task.outputs, plan.seed)
            found += run(make, ATTENTIVE_RATES, *sides)
        places = [(block, "patches") for block in train.tokens]
        _add_best(column, "attentive", places, found, "lr {:g}", add)
    ranks = effective_rank(train.pooled)
    column.depth["rank"] = [(*place, rank) for place, rank in zip(train.sets, ranks, strict=True)]
    return column


def _add_best(column: Column, name: str, places: list, found: list[Found], words: str, add) -> int:
    """Adds the row of what was best on the held-out part, and all figures over depth; returns its place."""
    best = max(range(len(found)), key=lambda i: found[i].held)
    column.add(add(name, places[best], words.format(found[best].setting), found[best].decisions))
    metric, targets = add.keywords["plan"].task.metric, add.keywords["targets"]
    scores = (metric(one.decisions, targets) for one in found)
    column.depth[name] = [(*place, score) for place, score in zip(places, scores, strict=True)]
    return best


def of_neighbours(train: Layers, val: Layers, index: int, parts, plan: Plan) -> tuple[Found, np.ndarray]:
    """Of feature `index`: the best k and temperature, and the decisions with `DINO`'s."""
    x, labels, task = train.pooled[:, index], train.labels, plan.task
    vote = partial(_decided, plan=plan)
    tried = vote(x[parts[0]], labels[parts[0]], x[parts[1]], NEIGHBOURS)
    best, held = pick(tried, [0.0] * len(tried), labels[parts[1]].numpy(), task)
    chosen, usual = vote(x, labels, val.pooled[:, index], [NEIGHBOURS[best], DINO])
    return Found(NEIGHBOURS[best], held, chosen), usual


def _decided(memory, labels, queries, settings: list, plan: Plan) -> list[np.ndarray]:
    """Decisions (m, ...) of the neighbours' votes with each of `settings`."""
    parts = [[] for _ in settings]
    votes = knn_votes(memory, labels, queries, settings, plan.task.outputs, plan.device)
    for i, (_, vote) in enumerate(votes):
        if plan.task.kind == "class":  # else it is probabilities or numbers already
            vote = plan.task.decide(vote)
        parts[i % len(settings)].append(vote.cpu().numpy())
    return [np.concatenate(part) for part in parts]


def _add_dinov2(column: Column, train: Layers, val: Layers, run, plan: Plan, add) -> None:
    """DINOv2's linear classifier (arXiv 2304.07193, B.3): class tokens of the last 1 or 4 blocks and the mean
    of the last block's patches, side by side.
    """
    tried = []
    for number in (1, 4):
        wanted = [i for i, (_, pool) in enumerate(train.sets) if pool == "class"][-number:]
        wanted.append(len(train.sets) - 1)
        if len(wanted) == number + 1:
            sides = [Data(side.pooled[:, wanted].flatten(1)[:, None], side.labels) for side in (train, val)]
            make = partial(LinearProbes, sides[0].x.shape[1:], plan.task.outputs, False)
            tried.append((number, run(make, LINEAR_RATES, *sides)[0]))
    number, found = max(tried, key=lambda pair: pair[1].held)
    place = f"last {number}" if number > 1 else train.sets[-1][0], "class + mean"
    column.add(add("linear_dinov2", place, f"lr {found.setting:g}", found.decisions))


def few_labels(train: Layers, val: Layers, index: int, learns, held, plan: Plan) -> list[Row]:
    """Linear probes on feature `index` that learn from a few images; five draws, mean and interval of it."""
    rows, task = [], plan.task
    sides = [Data(side.pooled[:, index : index + 1], side.labels) for side in (train, val)]
    make = partial(LinearProbes, sides[0].x.shape[1:], task.outputs, False)
    classes = task.kind == "class"
    strata = plan.strata[learns] if classes else torch.zeros(len(learns))
    for name, amount in FEW.items() if classes else [*FEW.items()][:2]:  # others have no images a class

        def number(n: int, amount=amount) -> int:
            share = max(1, round(amount * n / (1 - HELD))) if amount < 1 else amount
            return min(n, share)

        scores, steps = [], min(plan.steps, 100)
        for draw in range(DRAWS):
            few = learns[stratified(strata, number, derive_seed(plan.seed, 3, draw))]
            found = search(
                make, LINEAR_RATES, *sides, (few, held), task, steps, plan.seed, plan.device, refit=False
            )[0]
            scores.append(task.metric(found.decisions, val.labels.numpy()))
        mean, spread = float(np.mean(scores)), STUDENT * float(np.std(scores, ddof=1)) / math.sqrt(DRAWS)
        rows.append(
            Row(name, *train.sets[index], counted(len(few), "image"), mean, mean - spread, mean + spread)
        )
    return rows
