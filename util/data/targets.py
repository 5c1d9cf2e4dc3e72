"""What a model predicts of an image (one class, several labels, numbers), and what its outputs mean."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from util.errors import UserError

TASKS = ("class", "labels", "numbers")


@dataclass
class Targets:
    """One model's outputs, in order.

    task: "class", of which one is right (softmax); "labels", each there or not (sigmoid); "numbers".
    names: of classes, labels or numbers. thresholds: of "labels", probabilities from which each is there.
    mean, std: of "numbers", of the training images: the model predicts (number - mean) / std.
    """

    task: str = "class"
    names: list[str] = field(default_factory=list)
    thresholds: list[float] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    @property
    def words(self) -> str:
        """What the outputs are: classes, labels or numbers."""
        return "classes" if self.task == "class" else self.task

    def values(self, outputs: torch.Tensor) -> torch.Tensor:
        """Probabilities, or numbers in their own units, float (N, K), of a model's outputs (N, K)."""
        if self.task == "class":
            return outputs.softmax(dim=1)
        if self.task == "labels":
            return outputs.sigmoid()
        return outputs * outputs.new_tensor(self.std) + outputs.new_tensor(self.mean)

    def standardise(self, numbers: np.ndarray) -> np.ndarray:
        """What the model is to put out for numbers, float64 (..., K)."""
        return (numbers - np.asarray(self.mean)) / np.asarray(self.std)

    def info(self) -> dict:
        """Entries of a checkpoint's `model_info` beside the names; none for one class."""
        if self.task == "class":
            return {}
        own = {"thresholds": self.thresholds, "target_mean": self.mean, "target_std": self.std}
        return {"task": self.task} | {name: list(v) for name, v in own.items() if v is not None}


def targets_of(info: dict, names: list[str], where: str = "the checkpoint") -> Targets:
    """What the `model_info` of a checkpoint (or {}) says of a model with outputs of these names; UserError
    where it says it of another number of them.
    """
    found, count = Targets(info.get("task") or "class", list(names)), len(names)
    if found.task == "labels":
        found.thresholds = list(info.get("thresholds") or [0.5] * count)
    if found.task == "numbers":
        found.mean = list(info.get("target_mean") or [0.0] * count)
        found.std = list(info.get("target_std") or [1.0] * count)
    for name, values in found.info().items():
        if name != "task" and len(values) != count:
            raise UserError(f"{where} is damaged: {len(values)} values of {name} for {count} {found.task}")
    return found


def sample_loss(task: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(outputs (N, K), targets) -> loss (N,): cross entropy, mean binary cross entropy, mean smooth L1; the
    last two also of outputs (..., N, K).
    """
    if task != "class":
        loss = F.binary_cross_entropy_with_logits if task == "labels" else F.smooth_l1_loss
        return lambda x, t: loss(x, t.expand_as(x), reduction="none").mean(dim=-1)
    return lambda x, t: F.cross_entropy(x, t, reduction="none")
