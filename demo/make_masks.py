"""Makes the demo set's pictures with a mask each, for main_segment.py: 0 is background, 1 to 10 the objects.

    python demo/make_masks.py shapes
    python main_segment.py --data_path shapes ...

The pictures are the demo set's own; drawing them takes about half a minute on 2 cores.
"""

import argparse
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
from util.files import printable, replacing_folder
from util.sizes import default_workers


def draw(folder: Path, key: tuple[int, int, int]) -> None:
    """Picture and mask (split, class, number), whose random numbers are those of `files.draw`."""
    split, label, number = key
    name, facts, rng = CLASSES[label], {}, np.random.default_rng([VERSION, *key])
    path = folder / ("train", "val")[split] / "images" / f"{name}_{number:04d}.jpg"
    path.write_bytes(encode(render(name, rng, facts), rng))
    mask = Image.fromarray(facts["mask"].astype(np.uint8) * (label + 1))
    mask.save(path.parents[1] / "masks" / f"{path.stem}.png")


def main(args: argparse.Namespace) -> None:
    root = Path(args.output)
    if root.exists():
        raise UserError(f"{printable(root)}: is there already; name a new folder")
    with replacing_folder(root) as work:
        for split, kind in itertools.product(("train", "val"), ("images", "masks")):
            (work / split / kind).mkdir(parents=True)
        (work / "classes.txt").write_text("\n".join(("background", *CLASSES)) + "\n", encoding="utf-8")
        keys = [
            (split, label, number)
            for split, count in enumerate(args.counts)
            for label, number in itertools.product(range(len(CLASSES)), range(count))
        ]
        with ProcessPoolExecutor(default_workers(1)) as pool:
            list(pool.map(partial(draw, work), keys, chunksize=20))
    say(f"{printable(root)}: {len(keys)} pictures with masks of {1 + len(CLASSES)} classes")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", metavar="DIR", help="a new folder")
    parser.add_argument("--counts", nargs=2, type=int, default=(TRAIN, VAL), metavar=("TRAIN", "VAL"),
                        help="pictures per class")  # fmt: skip
    run_script(main, parser)
