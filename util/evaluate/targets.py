"""Figures, table and predictions of several labels or numbers, and of one class all figures."""

import csv
from pathlib import Path

import numpy as np
import torch

from util.data.labelled import LabelledImages
from util.evaluate.exact import Predictions
from util.evaluate.metrics import METRICS, measure
from util.files import printable, replacing
from util.processes.collectives import gather, is_main_process


def values_of(predictions: Predictions, dataset: LabelledImages) -> tuple[np.ndarray, np.ndarray]:
    """(labels in their own units, float64 (n, K) probabilities or numbers) of predictions with outputs."""
    values = dataset.targets.values(torch.from_numpy(predictions.outputs)).numpy()
    return dataset.files.labels[predictions.indices], values


def measure_predictions(predictions: Predictions, dataset: LabelledImages) -> dict[str, float | None]:
    """All figures of the task, computed once from the predictions of all processes; the same on each."""
    targets, found = dataset.targets, None
    if is_main_process():
        found = measure(targets.task, *values_of(predictions, dataset), targets.thresholds or 0.5)
    return gather(found)[0]


def figures_line(stats: dict[str, float | None]) -> str:
    """e.g. `* auroc 0.9132 f1 0.7201 kappa undefined`, without accuracies in percent."""
    words = (f"{name} {'undefined' if v is None else f'{v:.4f}'}" for name, v in stats.items())
    return "* " + " ".join(word for word in words if not word.startswith("acc1 ") and word[:5] != "acc5 ")


def target_table(predictions: Predictions, dataset: LabelledImages) -> str:
    """A text table: figures of each label or number."""
    targets, (labels, values) = dataset.targets, values_of(predictions, dataset)
    names, labelled = METRICS[targets.task], targets.task == "labels"
    rows = [["name", *names, *(["images with it", "threshold"] if labelled else [])]]
    for k, name in enumerate(targets.names):
        threshold = targets.thresholds[k] if labelled else 0.5
        own = measure(targets.task, labels[:, k : k + 1], values[:, k : k + 1], threshold)
        cells = ["-" if own[metric] is None else f"{own[metric]:.4g}" for metric in names]
        rows.append([printable(name), *cells])
        rows[-1] += [f"{int(labels[:, k].sum())}", f"{threshold:g}"] if labelled else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def write_target_predictions(path: Path, predictions: Predictions, dataset: LabelledImages) -> None:
    """Writes a CSV file, one line per sample: path, then of each label its label, probability and whether
    that reaches its threshold; of each number its value and the prediction.
    """
    targets, (labels, values) = dataset.targets, values_of(predictions, dataset)
    labelled = targets.task == "labels"
    words = ["label", "probability", "prediction"] if labelled else ["value", "prediction"]
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with replacing(path) as temporary, open(temporary, "w", **text) as file:
        writer = csv.writer(file)
        writer.writerow(["path", *(f"{word} {name}" for name in targets.names for word in words)])
        for row, index in enumerate(predictions.indices.tolist()):
            cells = []
            for k, (label, value) in enumerate(zip(labels[row].tolist(), values[row].tolist(), strict=True)):
                own = [int(label), f"{value:.6f}", int(value >= targets.thresholds[k])] if labelled else None
                cells += own or [f"{label:.15g}", f"{value:.12g}"]
            writer.writerow([dataset.files.paths[index], *cells])
