"""Tells what is in the demo set's pictures: a table for --labels, or with --masks a set for main_segment.py.

    python demo/make_shapes.py labels.csv
    python main_finetune.py --labels labels.csv --label_columns round living hollow covered blurred ...
    python main_finetune.py --labels labels.csv --label_columns size fill ...
    python demo/make_shapes.py --masks shapes
    python main_segment.py --data_path shapes ...

A table has a class, several labels, numbers, groups; in masks 0 is background, 1 to 10 are the objects. Each
picture is painted anew to learn what is in it, which takes about half a minute on 2 cores.
"""

import argparse
import csv
import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli.parser import ArgumentParser, run_script
from util.console import say
from util.demo_set.files import CLASSES, TRAIN, VAL, VERSION
from util.demo_set.scene import encode, render
from util.errors import UserError
from util.files import check_writable, printable, replacing, replacing_folder
from util.sizes import default_workers

KINDS = {  # labels that follow from the class
    "round": ("ball", "gear", "ring", "spiral", "wheel"),
    "living": ("fish", "leaf", "tree"),
    "hollow": ("gear", "ring", "wheel"),
}
HEADER = ["path", "split", "group", "class", *KINDS, "covered", "blurred", "size", "fill"]
ALBUM = 5  # pictures of a class in a row that make a group


def describe(masks: Path | None, key: tuple[int, int, int]) -> list:
    """The row of picture (split, class, number), whose random numbers are those of `files.draw`; `masks`: the
    folder that it and its mask are written to.
    """
    split, label, number = key
    name, folder, facts = CLASSES[label], ("train", "val")[split], {}
    rng = np.random.default_rng([VERSION, *key])
    picture = render(name, rng, facts)
    if masks:
        path = masks / folder / "images" / f"{name}_{number:04d}.jpg"
        path.write_bytes(encode(picture, rng))
        mask = Image.fromarray(facts["mask"].astype(np.uint8) * (label + 1))
        mask.save(path.parents[1] / "masks" / f"{path.stem}.png")
    row = [f"{folder}/{name}/{name}_{number:04d}.jpg", folder, f"{folder}-{name}-{number // ALBUM}", name]
    row += [int(name in classes) for classes in KINDS.values()]
    row += [int(facts["covers"] > 0), int(facts["blurred"])]
    return row + [f"{facts[fact]:.4f}" for fact in ("size", "fill")]


def main(args: argparse.Namespace) -> None:
    """Writes the table, or the folder of pictures and masks."""
    path, sides = Path(args.output), range(len(CLASSES))
    if path.is_dir() if not args.masks else path.exists():
        advice = "is there already; name a new folder" if args.masks else "is a folder; name a file"
        raise UserError(f"{printable(path)}: {advice}")
    check_writable("OUTPUT", path.parent, f"{path}:", make=args.masks)
    numbers = enumerate(args.counts)
    keys = [(s, *pair) for s, count in numbers for pair in itertools.product(sides, range(count))]
    with ProcessPoolExecutor(default_workers(1)) as pool:
        if not args.masks:
            rows = pool.map(partial(describe, None), keys, chunksize=20)
            with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([HEADER, *rows])
            return say(f"{printable(path)}: {len(keys)} pictures; columns {', '.join(HEADER)}")
        with replacing_folder(path) as work:
            for split, kind in itertools.product(("train", "val"), ("images", "masks")):
                (work / split / kind).mkdir(parents=True)
            names = "\n".join(("background", *CLASSES)) + "\n"
            (work / "classes.txt").write_text(names, encoding="utf-8")
            list(pool.map(partial(describe, work), keys, chunksize=20))
    say(f"{printable(path)}: {len(keys)} pictures with masks of {1 + len(CLASSES)} classes")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", metavar="FILE.csv|DIR", help="what to write: a table, or a new folder")
    parser.add_argument("--masks", action="store_true", help="pictures with masks instead of a table")
    parser.add_argument("--counts", nargs=2, type=int, default=(TRAIN, VAL), metavar=("TRAIN", "VAL"),
                        help="pictures per class, as the demo set has them")  # fmt: skip
    run_script(main, parser)
