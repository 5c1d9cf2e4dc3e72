"""Small image folders for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, height: int = 40, width: int = 48, channels: int = 3) -> np.ndarray:
    """uint8 (H, W, C): smooth structure and some texture, different for each seed."""
    generator = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [
        np.sin(generator.uniform(2, 25) * x + generator.uniform(2, 25) * y + generator.uniform(0, 6))
        for _ in range(3 * channels)
    ]
    image = np.stack([sum(waves[3 * c : 3 * c + 3]) for c in range(channels)], axis=-1)
    image = 127 + 40 * image + generator.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def make_folder(root: Path, count: int = 12, classes: int = 0, **size) -> Path:
    """Writes `count` JPEGs into `root`, or into `classes` folders c0, c1, ... of it."""
    for i in range(count):
        folder = root / f"c{i % classes}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, **size)).save(folder / f"{i:03d}.jpg", quality=92)
    return root
