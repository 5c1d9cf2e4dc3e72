"""Writes two small sets of real images for bench_plan.py, from packages that bring their pictures along.

    pip install scikit-image
    python benchmarks/make_real_sets.py DIR

DIR/digits: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, enlarged to 28, every fourth of a class
in val/. DIR/photographs: squares of 64 pixels out of eleven photographs of scikit-image and scikit-learn,
each a class, train/ from the left two thirds and val/ from the right third of it.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli.parser import ArgumentParser, run_script
from util.errors import UserError

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "rocket.jpg"),
)
SIDE, TRAIN, VAL = 64, 150, 50  # pixels of a square; squares of each photograph


def digits(folder: Path) -> None:
    data, seen = load_digits(), [0] * 10
    for number, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        split = "val" if seen[label] % 4 == 3 else "train"
        seen[label] += 1
        path = folder / split / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.uint8(np.minimum(pixels * 16, 255)))
        picture.resize((28, 28), Image.Resampling.BICUBIC).save(path)


def photographs(folder: Path) -> None:
    found = importlib.util.find_spec("skimage")  # without importing it: only its files are needed
    if found is None:
        raise UserError("the photographs are scikit-image's: pip install scikit-image")
    home = Path(found.origin).parent / "data"
    rng = np.random.default_rng(0)
    pictures = {name[:-4]: np.asarray(Image.open(home / name).convert("RGB")) for name in PHOTOGRAPHS}
    for name, picture in zip(("china", "flower"), load_sample_images().images, strict=True):
        pictures[name] = picture
    for name, picture in pictures.items():
        height, width, _ = picture.shape
        border = width * 2 // 3
        for split, count, low, high in (("train", TRAIN, 0, border), ("val", VAL, border, width)):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                top, left = rng.integers(0, height - SIDE + 1), rng.integers(low, high - SIDE + 1)
                square = picture[top : top + SIDE, left : left + SIDE]
                Image.fromarray(square).save(folder / split / name / f"{number:03}.png")


def main(args: argparse.Namespace) -> None:
    if args.folder.exists():
        raise UserError(f"{args.folder}: is there already; name a new folder")
    digits(args.folder / "digits")
    photographs(args.folder / "photographs")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", type=Path, help="a new folder")
    run_script(main, parser)
