"""Writes two small sets of real images for bench_plan.py, from packages that bring their pictures along.

    pip install scikit-image
    python benchmarks/make_real_sets.py DIR

DIR/digits: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, enlarged to 28, every fourth of a class in
val/. DIR/photographs: squares of 64 pixels out of eleven photographs of scikit-image and scikit-learn, each a
class, train/ from the left two thirds and val/ from the right third of it.
"""

import sys
from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

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
    home = Path(skimage.__file__).parent / "data"
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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    digits(Path(sys.argv[1]) / "digits")
    photographs(Path(sys.argv[1]) / "photographs")
