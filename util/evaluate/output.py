"""Writes predictions, features and losses: a table, CSV files, an .npz file, a folder of .npy files."""

import contextlib
import csv
import os
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import numpy as np

from util.data.read import IMG_EXTENSIONS
from util.data.targets import Targets
from util.errors import UserError
from util.evaluate.predict import Predictions
from util.files import check_writable, printable, replacing, replacing_folder, shown

NOT_OURS = (*IMG_EXTENSIONS, ".pth", ".pt", ".bin", ".safetensors")  # what no table replaces


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
        return aligned([head, *zip(*columns, strict=True)], range(2, len(head), 2))
    for rank in range(predictions.classes.shape[1]):
        head += [f"{rank + 1}.", ""]
        columns.append([shown(class_names[i]) for i in predictions.classes[:, rank]])
        columns.append([f"{100 * p:.2f} %" for p in predictions.probabilities[:, rank]])
    return aligned([head, *zip(*columns, strict=True)], range(2, len(head), 2))


def aligned(rows: list, right: Container[int]) -> str:
    """Rows of cells as text in columns, those with numbers in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in cells).rstrip())
    return "\n".join(lines)


def check_output(flag: str, path: str, *inputs: str, picture: bool = False) -> None:
    """Raises UserError unless a file can be written at `path` without harm to weights or images that a
    command may read, its `inputs` above all; leaves what is there alone. picture: what is written is one.
    """
    if os.path.isdir(path):
        raise UserError(f"{flag} {path}: is a folder; name a file")
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise UserError(f"{flag} {path}: is no regular file; name another")
        if any(os.path.exists(name) and os.path.samefile(name, path) for name in inputs):
            raise UserError(f"{flag} {path}: is what this command reads; name another file")
        if path.lower().endswith(NOT_OURS) and not picture:
            raise UserError(f"{flag} {path}: is there, and weights or images by its name; name another file")
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

    with csv_writer(path, "--csv") as writer:
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


def check_new_folder(flag: str, path: str) -> None:
    """Raises UserError unless a folder can be made at `path`, or an empty one is there."""
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f"{flag} {path}: is there already; name a new or an empty folder")
    check_writable(flag, os.path.dirname(path.rstrip("/")) or ".", f"{path}:", make=False)


def write_losses(path: str, files: list[str], losses: np.ndarray, maps: Sequence[str] = ()) -> None:
    """Writes path, loss, largest: of each image the mean of its patches' `losses` (n, L) and the largest; and
    where there are `maps` (n names), map.
    """
    with csv_writer(path, "--loss") as writer:
        writer.writerow(["path", "loss", "largest", *(["map"] if maps else [])])
        for i, (name, values) in enumerate(zip(files, losses, strict=True)):
            row = [name, f"{values.mean(dtype=np.float64):.7g}", f"{values.max():.7g}"]
            writer.writerow(row + ([maps[i]] if maps else []))


def write_maps(folder: str, files: list[str], losses: np.ndarray, grid: tuple[int, int]) -> list[str]:
    """Writes the patches' losses of each image, float32 of the shape `grid`, and returns the files' names:
    NUMBER-NAME.npy, numbered in order. The folder appears when all of them are there.
    """
    digits, names = len(str(len(files) - 1)), []
    try:
        with replacing_folder(Path(folder)) as temporary:
            for i, (file, values) in enumerate(zip(files, losses, strict=True)):
                stem = os.fsencode(Path(file).stem)[:100]  # bytes: a file name has at most 255
                names.append(f"{i:0{digits}d}-{os.fsdecode(stem)}.npy")
                np.save(temporary / names[-1], values.reshape(grid))
    except OSError as error:
        raise UserError(f"--map {folder}: cannot be written ({error.strerror or error})") from None
    return names


def write_features(
    path: str,
    files: list[str],
    predictions: Predictions,
    kind: str,
    grid: tuple[int, int],
    layer: int | None = None,
) -> None:
    """Writes an `.npz` of `features`, `files` (n,), `feature_kind` and `grid` (rows, columns of patches), and
    `layer` where one is given.

    `numpy.load` opens it without pickle; the same features give the same bytes.
    """
    arrays = {
        "features": predictions.features,
        "files": np.array(files, dtype=np.str_),
        "feature_kind": np.array(kind),
        "grid": np.array(grid),
        **({} if layer is None else {"layer": np.array(layer)}),
    }

    with replacing_output("--features", path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


@contextlib.contextmanager
def csv_writer(path: str | Path, flag: str = "") -> Iterator:
    """A `csv.writer` of a file that takes the place of `path` when it is whole; UserError names a `flag`."""
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    replaces = replacing_output(flag, path) if flag else replacing(path)
    with replaces as temporary, open(temporary, "w", **text) as file:
        yield csv.writer(file)


@contextlib.contextmanager
def replacing_output(flag: str, path: str) -> Iterator[Path]:
    """`replacing`, with an error that names the flag."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror or error})") from None
