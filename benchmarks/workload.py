"""What the benchmarks work on: drawn JPEGs, batches in memory, and main_pretrain.py's arguments."""

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import main_pretrain
from util.cli.parser import ArgumentParser
from util.compute.precision import resolve_device
from util.data.transforms import channel_stats, normalize_batch
from util.processes.group import init_distributed_mode

CLASSES = 1000


def draw_pictures(folder: Path, count: int) -> None:
    """Writes textured JPEGs, 4:2:0, quality 92 to 95, of about the size and weight of ImageNet's."""
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = int(rng.integers(350, 465)), int(rng.integers(420, 545))
        picture = np.zeros((height, width, 3), np.float32)
        for cell in (2, 3, 5, 8, 16, 32, 64, 128, 256):  # noise of all scales, coarser ones stronger
            noise = rng.normal(size=(height // cell + 2, width // cell + 2, 3)).astype(np.float32)
            noise = 0.5 * noise + noise.mean(axis=2, keepdims=True)  # mostly brightness, less colour
            for c in range(3):
                layer = Image.fromarray(noise[..., c]).resize((width, height), Image.Resampling.BICUBIC)
                picture[..., c] += np.asarray(layer) * cell**0.37
        picture = 120 + 50 * (picture - picture.mean()) / picture.std()
        picture += rng.normal(scale=7, size=(height, width, 1))  # grain
        image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
        image.save(folder / f"{number:04d}.jpg", quality=int(rng.integers(92, 96)), subsampling="4:2:0")


class Repeated(torch.utils.data.Dataset):
    """`dataset` gone through `times` times an epoch, so that a round lasts long enough to be timed."""

    def __init__(self, dataset: torch.utils.data.Dataset, times: int):
        self.dataset, self.times = dataset, times

    def __len__(self) -> int:
        return len(self.dataset) * self.times

    def __getitem__(self, key: int | tuple[int, int]) -> tuple:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.dataset[epoch * self.times + index // len(self.dataset), index % len(self.dataset)]


def noise_batch(shape: tuple[int, ...], pin: bool = False, normalised: bool = False) -> list[torch.Tensor]:
    """[images of noise in uint8, or normalised in float32, labels, indices], as a loader gives them.

    `shape` begins with the number of images. `pin`: in memory that a GPU reads while it computes.
    """
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    images = normalize_batch(images, "cpu") if normalised else images
    batch = [images, torch.randint(0, CLASSES, shape[:1]), torch.arange(shape[0])]
    return [tensor.pin_memory() if pin else tensor for tensor in batch]


class Batches:
    """A loader of the same few batches over and over; `marks` has the time at which each was asked for."""

    def __init__(self, batches: list, steps: int):
        self.batches, self.steps, self.batch_size, self.marks = batches, steps, len(batches[0][0]), []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator:
        self.marks = []
        for number in range(self.steps):
            self.marks.append(time.perf_counter())
            yield self.batches[number % len(self.batches)]
        self.marks.append(time.perf_counter())

    def step_seconds(self) -> list[float]:
        """Seconds of each step of the last epoch."""
        return [end - start for start, end in itertools.pairwise(self.marks)]


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clocked(function, spent: dict[str, float], part: str):
    """`function`, adding its seconds to `spent[part]`."""

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - start

    return wrapper


def pretrain_args(options: argparse.Namespace, *flags: str, names: Iterable[str]) -> argparse.Namespace:
    """main_pretrain.py's arguments: `flags`, and the values that `options` has for `names`, as text or not.

    Joins the other processes, if a launcher started several. `device` is one that is there.
    """
    words = [word for name in names for word in (f"--{name}", str(getattr(options, name)))]
    args = ArgumentParser(parents=[main_pretrain.get_args_parser()]).parse_args([*words, *flags])
    init_distributed_mode(args)
    args.device, args.lr = str(resolve_device(args.device, args.gpu)), 1e-4
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)
    return args
