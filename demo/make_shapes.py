"""Writes labels of the demo set's pictures, for --labels: a class, several labels, numbers, groups.

    python demo/make_shapes.py labels.csv
    python main_finetune.py --labels labels.csv --label_columns round living hollow covered blurred ...
    python main_finetune.py --labels labels.csv --label_columns size fill ...

Each picture is painted anew to learn what is in it, which takes about half a minute on 2 cores.
"""

import argparse
import csv
import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli.parser import ArgumentParser, run_script
from util.console import say
from util.demo_set.files import CLASSES, TRAIN, VAL, VERSION
from util.demo_set.scene import render
from util.errors import UserError
from util.files import check_writable, printable, replacing
from util.sizes import default_workers

KINDS = {  # labels that follow from the class
    "round": ("ball", "gear", "ring", "spiral", "wheel"),
    "living": ("fish", "leaf", "tree"),
    "hollow": ("gear", "ring", "wheel"),
}
HEADER = ["path", "split", "group", "class", *KINDS, "covered", "blurred", "size", "fill"]
ALBUM = 5  # pictures of a class in a row that make a group


def describe(key: tuple[int, int, int]) -> list:
    """The row of picture (split, class, number), whose random numbers are those of `files.draw`."""
    split, label, number = key
    name, folder, facts = CLASSES[label], ("train", "val")[split], {}
    render(name, np.random.default_rng([VERSION, *key]), facts)
    row = [f"{folder}/{name}/{name}_{number:04d}.jpg", folder, f"{folder}-{name}-{number // ALBUM}", name]
    row += [int(name in classes) for classes in KINDS.values()]
    row += [int(facts["covers"] > 0), int(facts["blurred"])]
    return row + [f"{facts[fact]:.4f}" for fact in ("size", "fill")]


def main(args: argparse.Namespace) -> None:
    """Writes the table."""
    path = Path(args.output)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    check_writable("OUTPUT", path.parent, f"{path}:", make=False)
    numbers = enumerate(args.counts)
    keys = [
        (s, *pair) for s, count in numbers for pair in itertools.product(range(len(CLASSES)), range(count))
    ]
    with ProcessPoolExecutor(default_workers(1)) as pool:
        rows = list(pool.map(describe, keys, chunksize=20))
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *rows])
    say(f"{printable(path)}: {len(rows)} pictures; columns {', '.join(HEADER)}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", metavar="FILE.csv", help="what to write")
    parser.add_argument("--counts", nargs=2, type=int, default=(TRAIN, VAL), metavar=("TRAIN", "VAL"),
                        help="pictures per class, as the demo set has them")  # fmt: skip
    run_script(main, parser)
