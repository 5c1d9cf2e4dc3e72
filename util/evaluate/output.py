"""Writes predictions and features: a table, a CSV file, an .npz file."""

import contextlib
import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from util.data.targets import Targets
from util.errors import UserError
from util.evaluate.predict import Predictions
from util.files import check_writable, printable, replacing, shown


def table(
    files: list[str], class_names: list[str], predictions: Predictions, targets: Targets | None = None
) -> str:
    """A line per image: its name, then the best classes, each with its probability in percent; of several
    labels the probability of each, with a + where it is there; of numbers each.
    """
    names = [printable(file) for file in files]
    head = ["image"]
    columns = [names]
    if targets is not None and targets.task != "class":
        head += [cell for name in class_names for cell in ("", shown(name))]
        for k in range(len(class_names)):
            values = predictions.probabilities[:, k]
            there = values >= targets.thresholds[k] if targets.thresholds else np.zeros(len(values), bool)
            columns += [["+" if mark else "" for mark in there]]
            columns += [[f"{100 * v:.2f} %" if targets.thresholds else f"{v:.6g}" for v in values.tolist()]]
        rows = [head, *zip(*columns, strict=True)]
        return _aligned(rows)
    for rank in range(predictions.classes.shape[1]):
        head += [f"{rank + 1}.", ""]
        columns.append([shown(class_names[i]) for i in predictions.classes[:, rank]])
        columns.append([f"{100 * p:.2f} %" for p in predictions.probabilities[:, rank]])
    return _aligned([head, *zip(*columns, strict=True)])


def _aligned(rows: list) -> str:
    """Rows of cells in columns, every second one but the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i and i % 2 == 0 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def check_output(flag: str, path: str) -> None:
    """Raises UserError unless a file can be written at `path`; leaves what is there alone."""
    if os.path.isdir(path):
        raise UserError(f"{flag} {path}: is a folder; name a file")
    check_writable(flag, os.path.dirname(path) or ".", f"{path}:", make=False)


def write_csv(
    path: str,
    files: list[str],
    class_names: list[str],
    predictions: Predictions,
    targets: Targets | None = None,
) -> None:
    """Writes path, class_1, probability_1, class_2, ...: a line per image, the best class first. Of several
    labels path, probability NAME, prediction NAME, ...; of numbers path, NAME, ....
    """
    targets = targets or Targets()
    ranks = range(predictions.classes.shape[1])

    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with _replacing("--csv", path) as temporary, open(temporary, "w", **text) as file:
        writer = csv.writer(file)
        if targets.task != "class":
            words = ("probability ", "prediction ") if targets.thresholds else ("",)
            writer.writerow(["path", *(word + name for name in class_names for word in words)])
            for name, values in zip(files, predictions.probabilities.tolist(), strict=True):
                pairs = zip(values, targets.thresholds or (), strict=False)
                cells = [cell for value, least in pairs for cell in (f"{value:.6f}", int(value >= least))]
                writer.writerow([name, *(cells or [f"{value:.7g}" for value in values])])
            return
        writer.writerow(["path", *(f"{name}_{i + 1}" for i in ranks for name in ("class", "probability"))])
        for name, classes, shares in zip(files, predictions.classes, predictions.probabilities, strict=True):
            cells = ((class_names[i], f"{p:.6f}") for i, p in zip(classes, shares, strict=True))
            writer.writerow([name, *(cell for pair in cells for cell in pair)])


def write_features(
    path: str, files: list[str], predictions: Predictions, kind: str, grid: tuple[int, int]
) -> None:
    """Writes an `.npz` of `features`, `files` (n,), `feature_kind` and `grid` (rows, columns of patches).

    `numpy.load` opens it without pickle; the same features give the same bytes.
    """
    arrays = {
        "features": predictions.features,
        "files": np.array(files, dtype=np.str_),
        "feature_kind": np.array(kind),
        "grid": np.array(grid),
    }

    with _replacing("--features", path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


@contextlib.contextmanager
def _replacing(flag: str, path: str) -> Iterator[Path]:
    """`replacing`, with an error that names the flag."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror or error})") from None
