"""Turns the solar cells of the PyPI package `elpv-dataset` into an ImageFolder with a fixed train/val split.

    pip install elpv-dataset
    python demo/prepare_elpv.py OUT_DIR
    python demo/prepare_elpv.py OUT_DIR --labels both

2,624 electroluminescence photographs of solar cells, 300x300, 8-bit grey, each labelled with the probability
of a defect (0, 1/3, 2/3 or 1) and the type of its module, monocrystalline or polycrystalline. Here a cell is
defective from a probability of 0.5; the classes are that (--labels defect), the type, or both at once. 75 %
of the cells of each probability and type go to train and 25 % to val, always the same. The files are copied
as they are. They have their own licence (CC BY-NC-SA 4.0: no commercial use), so this repository holds none
of them.
"""

import argparse
import hashlib
import importlib.util
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli.parser import ArgumentParser, run_script
from util.console import say
from util.errors import UserError
from util.files import replacing_folder

PACKAGE = "elpv_dataset"
INSTALL = "pip install elpv-dataset"
LABELS = {  # what --labels asks for: the class of a cell with this probability of a defect and this type
    "defect": lambda probability, kind: "defective" if probability >= 0.5 else "functional",
    "type": lambda probability, kind: kind,
    "both": lambda probability, kind: f"{kind}-{LABELS['defect'](probability, kind)}",
}
VAL_SHARE = 0.25
TERMS = """\
Licence of the pictures: CC BY-NC-SA 4.0 (no commercial use). Please cite: Buerhop-Lutz et al., EU PVSEC 2018,
doi 10.4229/35thEUPVSEC20182018-5CV.3.15; Deitsch et al., Solar Energy 185 (2019), doi
10.1016/j.solener.2019.02.067; Deitsch et al., Machine Vision and Applications 32 (2021), doi
10.1007/s00138-021-01191-9."""


def find_data() -> Path:
    """Folder of the installed package's labels.csv and images. Raises UserError if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)  # without importing it: only its files are needed
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package elpv-dataset is not installed in {sys.prefix}: {INSTALL}")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    if not (folder / "labels.csv").is_file():
        raise UserError(f"elpv-dataset has no data/labels.csv in {folder.parent}; install it anew: {INSTALL}")
    return folder


def read_labels(folder: Path) -> list[tuple[str, float, str]]:
    """Rows (path below `folder`, probability of a defect, cell type) of labels.csv, one per picture.

    Raises UserError for a row that is not of this form or whose picture is missing.
    """
    rows = []
    text = (folder / "labels.csv").read_text(encoding="utf-8", errors="backslashreplace")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            path, probability, kind = line.split()
            rows.append((path, float(probability), kind))
        except ValueError:
            raise UserError(
                f"{folder / 'labels.csv'}, line {number}: not 'path probability type': {line!r}"
            ) from None
        if not (folder / path).is_file():
            raise UserError(
                f"{folder / path} is missing, though labels.csv names it; install anew: {INSTALL}"
            )
    if not rows:
        raise UserError(f"{folder / 'labels.csv'} lists no pictures; install elpv-dataset anew: {INSTALL}")
    return rows


def split_rows(rows: list[tuple[str, float, str]]) -> dict[str, list[tuple[str, float, str]]]:
    """Rows of "train" and "val": a quarter of each (probability, type) group to val, always the same.

    Groups that do not divide by four are rounded so that val in all has a quarter (largest remainder first).
    Within a group the order is that of the SHA-256 of the file name: random, yet the same in any Python.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row[1], row[2]].append(row)
    take = {key: int(len(group) * VAL_SHARE) for key, group in groups.items()}
    missing = round(len(rows) * VAL_SHARE) - sum(take.values())
    for key in sorted(groups, key=lambda key: (-(len(groups[key]) * VAL_SHARE % 1), key))[:missing]:
        take[key] += 1
    split = {"train": [], "val": []}
    for key in sorted(groups):
        group = sorted(groups[key], key=lambda row: hashlib.sha256(Path(row[0]).name.encode()).digest())
        split["val"] += group[: take[key]]
        split["train"] += group[take[key] :]
    return split


def copy(folder: Path, split: dict, out: Path, label: Callable) -> None:
    """Copies the pictures to out/split/class/, by way of a folder beside `out`: `out` is whole or not there.

    Raises UserError if `out` is not empty or cannot be written.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not an empty folder; name another one, or remove it")
        with replacing_folder(out) as work:
            for name, rows in split.items():
                for path, probability, kind in rows:
                    target = work / name / label(probability, kind) / Path(path).name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / path, target)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from error


def main(args: argparse.Namespace) -> None:
    """Makes the ImageFolder and prints what is in it."""
    folder, out = find_data(), Path(args.out).expanduser().resolve()
    split = split_rows(read_labels(folder))
    label = LABELS[args.labels]
    copy(folder, split, out, label)
    say(TERMS)
    for name, rows in split.items():
        counts = Counter(label(*row[1:]) for row in rows)
        text = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        say(f"{out / name}: {len(rows)} pictures ({text})")
    say(f"use it: python main_pretrain.py --data_path {out}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT_DIR", help="folder to make; it must not exist, or be empty")
    parser.add_argument("--labels", default="defect", choices=LABELS, help="what the classes are")
    run_script(main, parser)
