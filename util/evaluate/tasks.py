"""What the probes of a report card learn (one class, several labels, numbers), and how they are judged."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from util.data.targets import Targets, sample_loss
from util.evaluate.metrics import measure


@dataclass(frozen=True)
class Task:
    """What the labels of a set mean. `metric`: higher is better, NaN where it is not defined.

    outputs: K of a probe. loss: logits (..., n, K), targets (n, ...) -> (..., n). decide: logits (..., n, K)
    -> what `metric` needs of them: classes (..., n), else probabilities or numbers (..., n, K), which is also
    what neighbours give. metric: that of n images and their targets, both numpy -> a number. name: of the
    metric. targets: of a table of labels, whose further figures are wanted.
    """

    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    decide: Callable[[Tensor], Tensor]
    metric: Callable[[np.ndarray, np.ndarray], float]
    name: str
    kind: str = "class"
    targets: Targets | None = None

    def figures(self, decisions: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
        """All figures of fine-tuning that follow from decisions, numbers in their own units; {} without a
        table.
        """
        if self.targets is None:
            return {}
        if self.kind == "class":
            found = measure("class", labels, np.eye(self.outputs)[decisions])
            return {name: found[name] for name in ("accuracy", "balanced_accuracy", "f1", "kappa")}
        if self.kind == "numbers":
            labels, decisions = (
                self.targets.values(torch.from_numpy(x).double()).numpy() for x in (labels, decisions)
            )
        return measure(self.kind, labels, decisions, self.targets.thresholds or 0.5)


def task_of(targets: Targets, table: bool = True) -> Task:
    """The task of labels as fine-tuning has them: its loss, and the figure that chooses its best epoch."""
    count, kind, kept = len(targets.names), targets.task, targets if table else None
    if kind == "class":
        return one_class_each(count, kept)
    if kind == "numbers":
        return Task(count, sample_loss(kind), lambda outputs: outputs, r2, "R2 x 100", kind, kept)

    def decide(logits: Tensor) -> Tensor:
        return logits.cpu().double().sigmoid()  # in float32 many would be 1, which ranks nothing

    return Task(count, sample_loss(kind), decide, auroc, "AUROC (%)", kind, kept)


def one_class_each(classes: int, targets: Targets | None = None) -> Task:
    """Every image has one of `classes`; the metric is the accuracy in percent."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        # As log_softmax, which takes five times as long where there are few classes. Shares below e^-60 count
        # as such: far smaller ones, of rates that are too large, would make a CPU's products slow (denormals)
        logits = logits - logits.detach().amax(-1, keepdim=True)
        own = logits.gather(-1, targets[:, None].expand(*logits.shape[:-1], 1)).squeeze(-1)
        return logits.clamp(min=-60).exp().sum(-1).log() - own

    def accuracy(decisions: np.ndarray, targets: np.ndarray) -> float:
        return 100.0 * float((decisions == targets).mean())

    return Task(classes, loss, lambda outputs: outputs.argmax(-1), accuracy, "accuracy (%)", targets=targets)


def auroc(values: np.ndarray, labels: np.ndarray) -> float:
    """scikit-learn's AUROC of (n, K), in percent, the mean over labels that are not alike in all images; by
    ranks, as a card takes it of a thousand samples.
    """
    from scipy.stats import rankdata  # scikit-learn brings it

    there = labels.sum(axis=0, dtype=np.float64)
    pairs = there * (len(labels) - there)
    above = (rankdata(values, axis=0) * labels).sum(axis=0) - there * (there + 1) / 2
    return 100.0 * float((above[pairs > 0] / pairs[pairs > 0]).mean()) if pairs.any() else float("nan")


def r2(values: np.ndarray, numbers: np.ndarray) -> float:
    """scikit-learn's R2 of (n, K) x 100, the mean over numbers; those that are alike in all images count
    nothing.
    """
    values, numbers = values.astype(np.float64), numbers.astype(np.float64)
    errors = ((values - numbers) ** 2).sum(axis=0)
    spread = ((numbers - numbers.mean(axis=0)) ** 2).sum(axis=0)
    differ = spread > 0
    return 100.0 * float((1 - errors[differ] / spread[differ]).mean()) if differ.any() else float("nan")
