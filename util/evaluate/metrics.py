"""Figures of a whole set's predictions, by scikit-learn's definitions.

A figure that is not defined for a set (AUROC where all labels are alike) is None, and `undefined` says why.
"""

import importlib.util
import warnings
from collections.abc import Callable

import numpy as np

from util.errors import UserError

METRICS = {
    "class": ("accuracy", "balanced_accuracy", "f1", "auroc", "average_precision", "kappa"),
    "labels": ("accuracy", "balanced_accuracy", "f1", "auroc", "average_precision", "kappa"),
    "numbers": ("mae", "rmse", "r2"),
}
SMALLER_IS_BETTER = ("loss", "mae", "rmse")
_DEFAULT = {"class": "acc1", "labels": "auroc", "numbers": "r2"}  # of --best


def measures_all(args) -> bool:
    """Whether evaluation gives all metrics (`labels` or `best` was given), not accuracy and loss alone."""
    return bool(getattr(args, "labels", None) or getattr(args, "best", None))


def best_metric(args, task: str) -> str:
    """The figure that `checkpoint-best.pth` is best in."""
    return getattr(args, "best", None) or _DEFAULT[task]


def require_sklearn(flag: str) -> None:
    """Raises UserError where scikit-learn, which `flag` needs, is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(f"{flag}: needs scikit-learn for its figures: pip install scikit-learn")


def measure(task: str, labels: np.ndarray, values: np.ndarray, thresholds=0.5) -> dict[str, float | None]:
    """All figures of a task; None for what is not defined.

    Args:
        task: "class", "labels" or "numbers".
        labels: int (n,) classes, 0 or 1 (n, K), or float (n, K) numbers.
        values: float64 (n, K), probabilities or predicted numbers.
        thresholds: of labels, one or (K,).
    """
    with warnings.catch_warnings():  # of what is not defined, which we say ourselves
        warnings.simplefilter("ignore")
        if task == "numbers":
            found = _of_numbers(labels, values)
        elif task == "labels":
            found = _of_labels(labels.astype(np.int64), values, values >= np.asarray(thresholds))
        else:
            found = _of_classes(labels, values)
    return {name: _defined(value) for name, value in found.items()}


def best_thresholds(labels: np.ndarray, values: np.ndarray) -> list[float]:
    """Of each label the probability from which on to say that it is there, so that its F1 is largest: half
    way to the next smaller of `values` (n, K); 0.5 where all `labels` (n, K) are alike.
    """
    from sklearn.metrics import precision_recall_curve

    found = []
    for own, shares in zip(labels.T, values.T, strict=True):
        if own.min() == own.max():
            found.append(0.5)
            continue
        precision, recall, limits = precision_recall_curve(own, shares)
        best = limits[(precision * recall / np.maximum(precision + recall, 1e-12))[:-1].argmax()]
        middle = (best + shares[shares < best].max(initial=0.0)) / 2
        found.append(float(middle.clip(1e-6, 1 - 1e-6)))
    return found


def _of_classes(labels: np.ndarray, values: np.ndarray) -> dict:
    """F1, AUROC (one against the rest) and average precision are means over classes; of two classes AUROC and
    average precision are those of the second. Classes without images, and predictions, do not count.
    """
    from sklearn import metrics

    best = values.argmax(axis=1)
    classes = [1] if values.shape[1] == 2 else range(values.shape[1])
    each = [(labels == k, values[:, k]) for k in classes]
    return {
        "accuracy": metrics.accuracy_score(labels, best),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, best),
        "f1": metrics.f1_score(labels, best, average="macro", zero_division=0),
        "auroc": _mean(metrics.roc_auc_score, each),
        "average_precision": _mean(metrics.average_precision_score, each),
        "kappa": metrics.cohen_kappa_score(labels, best),
    }


def _of_labels(labels: np.ndarray, values: np.ndarray, there: np.ndarray) -> dict:
    """Accuracy: of all labels of an image at once. The others are means over the labels; AUROC and average
    precision, and balanced accuracy and kappa where not defined, without those that are alike in all images.
    """
    from sklearn import metrics

    there = there.astype(np.int64)
    both, probable = list(zip(labels.T, there.T, strict=True)), list(zip(labels.T, values.T, strict=True))
    return {
        "accuracy": metrics.accuracy_score(labels, there),
        "balanced_accuracy": _mean(metrics.balanced_accuracy_score, both),
        "f1": np.mean([metrics.f1_score(*pair, zero_division=0) for pair in both]),
        "auroc": _mean(metrics.roc_auc_score, probable),
        "average_precision": _mean(metrics.average_precision_score, probable),
        "kappa": _mean(metrics.cohen_kappa_score, both),
    }


def _of_numbers(labels: np.ndarray, values: np.ndarray) -> dict:
    """Means over the numbers, each in its own unit."""
    from sklearn import metrics

    return {
        "mae": metrics.mean_absolute_error(labels, values),
        "rmse": metrics.root_mean_squared_error(labels, values),
        "r2": metrics.r2_score(labels, values) if len(labels) > 1 else None,
    }


def _mean(score: Callable, pairs: list[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """Mean of score(labels, prediction) over the pairs whose labels are not all alike."""
    found = [_defined(score(labels, p)) for labels, p in pairs if labels.min() != labels.max()]
    found = [value for value in found if value is not None]
    return float(np.mean(found)) if found else None


def _defined(value: float | None) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def undefined(task: str, labels: np.ndarray, names: list[str]) -> list[tuple[str, str]]:
    """(name, why) of classes or labels whose AUROC is not defined for a set: they count in no mean."""
    if task == "numbers":
        return []
    found = []
    for k, name in enumerate(names):
        column = labels == k if task == "class" else labels[:, k] > 0
        if column.all() or not column.any():
            why = "all evaluated images have it" if column.all() else "no evaluated image has it"
            found.append((name, why))
    return found
