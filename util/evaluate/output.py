"""Writes predictions and features: a table, a CSV file, an .npz file."""

import csv
import os
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from util.data.read import printable
from util.errors import UserError
from util.evaluate.predict import Predictions


def table(files: list[str], class_names: list[str], predictions: Predictions) -> str:
    """A line per image: its name, then the best classes, each with its probability in percent."""
    names = [printable(file) for file in files]
    head = ["image"]
    columns = [names]
    for rank in range(predictions.classes.shape[1]):
        head += [f"{rank + 1}.", ""]
        columns.append([class_names[i] for i in predictions.classes[:, rank]])
        columns.append([f"{100 * p:.2f} %" for p in predictions.probabilities[:, rank]])
    rows = [head, *zip(*columns, strict=True)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
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
    folder = os.path.dirname(path) or "."
    probe = os.path.join(folder, f".write-test-{os.getpid()}")
    if os.path.isdir(path):
        raise UserError(f"{flag} {path}: is a folder; name a file")
    try:
        with open(probe, "wb"):
            pass
        os.remove(probe)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror or error})") from None


def write_csv(path: str, files: list[str], class_names: list[str], predictions: Predictions) -> None:
    """Writes path, class_1, probability_1, class_2, ...: a line per image, the best class first."""
    ranks = range(predictions.classes.shape[1])

    def write(temporary: str) -> None:
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["path", *(f"{name}_{i + 1}" for i in ranks for name in ("class", "probability"))]
            )
            for name, classes, shares in zip(
                files, predictions.classes, predictions.probabilities, strict=True
            ):
                cells = ((class_names[i], f"{p:.6f}") for i, p in zip(classes, shares, strict=True))
                writer.writerow([name, *(cell for pair in cells for cell in pair)])

    _replace("--csv", path, write)


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

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    _replace("--features", path, write)


def _replace(flag: str, path: str, write: Callable[[str], None]) -> None:
    """Puts what `write(temporary path)` writes in the place of `path`, as a whole or not at all."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.remove(temporary)
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror or error})") from None
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise
