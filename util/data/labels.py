"""Labels from a table (`--labels FILE.csv`): which row is of which image, and in which split it is."""

import hashlib
import json
import os
import re
from argparse import Namespace
from dataclasses import dataclass, field

import numpy as np

from util.data.dataset import find_split
from util.data.find import ImageFiles
from util.data.folders import SPLITS
from util.data.folds import check_sets, deal, strata_of
from util.data.table import PATH, Table, parse_labels, read_table
from util.data.targets import Targets, targets_of
from util.errors import UserError
from util.files import counted, shown, some
from util.processes.collectives import is_main_process, warn

_SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words} | {"dev": "val"}
_LAYOUT = "splits are a column 'split' (train, val, test), folders train/ and val/, or --folds K --fold I"


@dataclass
class LabelledFiles(ImageFiles):
    """Images of a split with what a table says of them.

    labels: of one class int32 (n,), of labels and numbers float64 (n, K), numbers in their own units.
    classes: names of classes, labels or numbers. targets: what a model makes of them. groups: int (n,).
    """

    targets: Targets = field(default_factory=Targets)
    groups: np.ndarray | None = None

    def describe(self) -> str:
        text, count = super().describe(), len(self.classes)
        kind = f" with {count} {self.targets.task} ({some(self.classes)})"
        if self.targets.task == "class":
            return text
        return text.replace(f" in {counted(count, 'class')}", kind, 1)

    def digest(self) -> str:
        """SHA-256 of the names, and of the labels in the order of the images."""
        return hashlib.sha256(json.dumps(self.classes).encode() + self.labels.tobytes()).hexdigest()


def read_labels(args: Namespace, split: str) -> LabelledFiles:
    """The images of `split` under `args.data_path` with the labels that the table `args.labels` gives them.

    Splits are those of the column "split", else the folders train/, val/, test/; with `folds` fold number
    `fold` (from 0) of all that is not `test` is val, the rest train. With `thresholds` ["auto"] a fifth of
    train, of whole groups, is a split "held". A row's path begins at `data_path`, or in the folder of the
    split, or is a full one.

    Args:
        args: labels, data_path; if present label_columns, task, group_column, folds, fold, eval, split,
            thresholds, pages, bad_images.

    Raises:
        UserError: rows without a file, files without a row, cells that are no numbers, a split or fold that
            leaves a class out, labels that are all alike, class folders that say otherwise.
    """
    table = read_table(args.labels)
    wanted, task = getattr(args, "label_columns", None), getattr(args, "task", None)
    group = getattr(args, "group_column", None) or table.named("group")
    task, names, labels = parse_labels(table, wanted, group, task)
    evaluates, folds = getattr(args, "eval", False), getattr(args, "folds", 0)
    needed = (getattr(args, "split", "val"),) if evaluates else ("train", "val")
    files = find_split(args, "") or find_split(args, "train")  # a list of images has no folders
    splits, rows = _match(table, files, {"train", "val", None} if folds else set(needed))
    if task == "class":
        _check_folders(table, files, rows, [names[label] for label in labels])
    files_of_rows = [re.sub(r"#\d+$", "", path) for path in table.column(table.named(*PATH))]
    groups = np.array(table.column(group) if group else files_of_rows)  # pages of a file stay together
    if folds:
        pool = np.array([row for row in np.unique(rows[rows >= 0]) if splits[row] != "test"], int)
        number = deal(groups[pool], strata_of(labels[pool]), folds)
        for one in range(folds if task == "class" else 0):  # whichever is asked for
            parts = {"train": labels[pool[number != one]], "val": labels[pool[number == one]]}
            check_sets(f"{table.place}: fold {one} of {folds}", task, names, parts)
        for row, fold in zip(pool.tolist(), number.tolist(), strict=True):
            splits[row] = "val" if fold == args.fold else "train"
    part_of = np.array([splits[row] if row >= 0 else "" for row in rows], object)
    parts = {one: np.flatnonzero(part_of == one) for one in needed}
    if empty := [one for one, part in parts.items() if not len(part)]:
        raise UserError(f"{table.place}: no images in {empty[0]}; {_LAYOUT}")
    if not evaluates:
        if task == "labels" and getattr(args, "thresholds", None) == ["auto"]:
            own = rows[parts["train"]]
            held = deal(groups[own], strata_of(labels[own]), 5) == 0
            parts |= {"train": parts["train"][~held], "held": parts["train"][held]}
            if held.all():
                raise UserError(f"--thresholds auto: {table.place}: train is one group, so none is held out")
        check_sets(table.place, task, names, {one: labels[rows[parts[one]]] for one in needed})
        both = np.intersect1d(groups[rows[part_of == "train"]], groups[rows[parts["val"]]])
        if len(both) and split == "val" and is_main_process():
            text = f"{len(both)} groups are in train and in val ({some(both)})"
            warn(f"{table.place}: {text}, so figures may be too good; --folds parts none")
    known = {**vars(files), "paths": files.paths.take(parts[split]), "labels": labels[rows[parts[split]]]}
    known |= {"classes": names, "empty": [], "targets": targets_of({"task": task}, names)}
    known["groups"] = np.unique(groups[rows[parts[split]]], return_inverse=True)[1]
    return LabelledFiles(**known)


def _match(table: Table, files: ImageFiles, wanted: set) -> tuple[list[str | None], np.ndarray]:
    """(split of each row or None, row of each file or -1).

    Args:
        wanted: splits in which each row must have a file, and each file a row; None: no split.
    """
    splits, row_of = _rows(table)
    used, without, doubled, rows = {}, [], [], []
    count, paths = len(files.paths), files.paths
    skipped = [os.path.relpath(path, files.root or ".") for path, _ in files.skipped]
    for i, name in enumerate([*(paths.name(i) for i in range(count)), *skipped]):
        top, _, inside = os.path.normpath(name).partition(os.sep)
        folder = _SPLIT_OF.get(top.lower()) if inside else None
        row = _find(row_of, name, inside if folder else name, paths[i] if i < count else name)
        rows.append(-1 if row is None else row)
        if row is not None:
            splits[row] = splits[row] or folder
            if used.setdefault(row, name) != name and "#" not in name:
                doubled.append(f"{used[row]} and {name}")
        elif folder in wanted or (folder is None and table.named("split")):
            without.append(name)
    place = f"{table.place}: --data_path {files.source}"
    if doubled:
        raise UserError(f"{place}: one row is of two files ({some(doubled, 2)}); write paths from there on")
    lost = [path for path, row in row_of.items() if row not in used and _stands_in(path, splits[row], wanted)]
    if lost:
        text = f"{len(lost)} of {len(row_of)} rows have no file there: {some(lost)}"
        text += " (folders are parted by /)" if os.sep == "/" and "\\" in lost[0] else ""
        raise UserError(f"{place}: {text}; remove them, or add the files")
    if without:
        text = f"{len(without)} of {count} files have no row: {some(without)}"
        raise UserError(
            f"{place}: {text}; add rows, or list the images that have one in a .txt for --data_path"
        )
    return splits, np.array(rows[:count], int)


def _rows(table: Table) -> tuple[list[str | None], dict[str, int]]:
    """(split of each row by its column, or None; {path: row}); UserError for a path twice, another split."""
    row_of: dict[str, int] = {}
    for row, path in enumerate(table.column(table.named(*PATH))):
        before = row_of.setdefault(os.path.normpath(path), row)
        if before != row:
            raise table.error(
                row, f"{shown(path)} has a row already (line {table.lines[before]}); remove one"
            )
    column, splits = table.named("split"), [None] * len(table.rows)
    for row, word in enumerate(table.column(column) if column else ()):
        splits[row] = _SPLIT_OF.get(word.lower())
        if splits[row] is None:
            raise table.error(row, f"{column} is {shown(word)}; it must be train, val or test")
    return splits, row_of


def _stands_in(path: str, split: str | None, wanted: set) -> bool:
    """Whether a row without a file is of a split that is wanted, or of one that nothing tells."""
    split = split or _SPLIT_OF.get(path.partition(os.sep)[0].lower())
    return split is None or split in wanted


def _find(row_of: dict[str, int], name: str, inside: str, path: str) -> int | None:
    """The row of a file by its name from the root, in its split, or in full; of a page, also its file's."""
    for key in (name, inside, os.path.abspath(path)):
        for one in (key, key.rpartition("#")[0]):
            if one and (row := row_of.get(os.path.normpath(one))) is not None:
                return row
    return None


def _check_folders(table: Table, files: ImageFiles, rows: np.ndarray, class_of: list[str]) -> None:
    """Raises UserError where a file lies in the folder of another class than its row says."""
    differ, classes = [], set(class_of)
    for i in np.flatnonzero(rows >= 0):
        own, folders = class_of[rows[i]], os.path.normpath(files.paths.name(i)).split(os.sep)[:-1]
        folders = folders[1:] if folders and folders[0].lower() in _SPLIT_OF else folders
        if folders and folders[0] in classes and folders[0] != own:
            differ.append(f"{files.paths.name(i)} is {own}")
    if differ:
        text = f"{counted(len(differ), 'row')} of another class than the file's folder: {some(differ, 3)}"
        raise UserError(f"{table.place}: {text}; correct one of the two")
