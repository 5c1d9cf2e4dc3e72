"""Images per second of the loaders: one thread in this process, then DataLoader workers end to end.

Reads JPEGs of `--data_path`, or 200 of about 480 x 400 px and 100 KB that it draws itself, and copies of
them as `python -m tools.resize_dataset --short S` writes them. All variants are interleaved, so that
a busy moment of the machine hits all of them; medians over rounds, ratios within a round. One thread is timed
by the processor time it used. Workers are timed by the clock: both loaders at each number of workers, and at
the largest the other variants of the default one, among them other numbers of batches worked ahead.
"""

import argparse
import functools
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import PIL
import torch
import torchvision
from harness import run_benchmark
from PIL import Image

from tools.copy_image import copy_image
from util.cli.parser import ArgumentParser
from util.data import loader as sampler_module
from util.data import read
from util.data.dataset import ImageDataset, build_pretrain_dataset
from util.data.loader import build_loader
from util.data.read import read_image
from util.data.sampler import EpochSampler
from util.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PretrainTransform,
    random_resized_crop_box,
    reference_transform,
    resize_crop,
)
from util.sizes import default_workers

REPEATS = 4
REPEATED = f"default, --repeated_aug {REPEATS}, per crop"


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


def make_copies(paths: list[str], folder: Path, short: int) -> dict[str, str]:
    """{path: path of its copy} with shorter sides of at most `short` pixels."""
    copies = {path: str(folder / f"short{short}" / f"{i:05d}.jpg") for i, path in enumerate(paths)}
    for path, copy in copies.items():
        copy_image(path, copy, str(folder), short, quality=95)
    return copies


def single_variants(paths: list[str], size: int, copies: dict[int, dict]) -> dict[str, Callable]:
    """{name: one image's work}; the first is what the others are compared with, then steps of the default."""
    chain = reference_transform(size, IMAGENET_MEAN, IMAGENET_STD)
    transform, rng = PretrainTransform(size), random.Random(0)
    decoded = {path: read_image(path) for path in paths}

    def reference(path: str) -> torch.Tensor:
        with open(path, "rb") as file:
            return chain(Image.open(file).convert("RGB"))

    def resize_only(path: str) -> torch.Tensor:
        image = decoded[path]
        return resize_crop(image, random_resized_crop_box(*image.shape[:2], rng), transform.size)

    def repeated(path: str) -> list[torch.Tensor]:
        image = read_image(path)
        return [transform(image, rng) for _ in range(REPEATS)]

    shrunk = {
        f"default, copies by --short {short}": lambda path, of=of: transform(read_image(of[path]), rng)
        for short, of in copies.items()
    }
    return {
        "reference chain (Pillow, torchvision)": reference,
        "default": lambda path: transform(read_image(path), rng),
        "default without simplejpeg": lambda path: transform(read_image(path, use_simplejpeg=False), rng),
        **shrunk,
        REPEATED: repeated,
        "  of which: read and decode": read_image,
        "  of which: crop and resize": resize_only,
        "  of which: crop box": lambda path: random_resized_crop_box(400, 480, rng),
        "  of which: read the file": lambda path: Path(path).read_bytes(),
    }


def time_single(variants: dict[str, Callable], paths: list[str]) -> dict[str, float]:
    """Seconds of processor time per sample of each variant, one pass over `paths`."""
    seconds = {}
    for name, work in variants.items():
        start = time.process_time()
        for path in paths:
            work(path)
        seconds[name] = (time.process_time() - start) / len(paths) / (REPEATS if name == REPEATED else 1)
    return seconds


class Repeated(torch.utils.data.Dataset):
    """`dataset` gone through `times` times an epoch, so that a round lasts long enough to be timed."""

    def __init__(self, dataset: ImageDataset, times: int):
        self.dataset, self.times = dataset, times

    def __len__(self) -> int:
        return len(self.dataset) * self.times

    def __getitem__(self, key: int | tuple[int, int]) -> tuple:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.dataset[epoch * self.times + index // len(self.dataset), index % len(self.dataset)]


def without_simplejpeg(dataset: ImageDataset) -> ImageDataset:
    """`dataset` that decodes JPEGs with Pillow."""
    dataset.decode = functools.partial(read_image, use_simplejpeg=False)
    return dataset


def make_loader(args, dataset: ImageDataset, workers: int, ahead: int = sampler_module.PREFETCH):
    """A loader whose epochs are long enough to be timed; its workers work `ahead` batches ahead."""
    dataset = Repeated(dataset, 1 + args.samples * max(workers, 1) // args.images)
    sampler = EpochSampler(len(dataset), seed=0, batch_size=args.batch_size)
    with mock.patch.object(sampler_module, "PREFETCH", ahead):
        return build_loader(dataset, sampler, args.batch_size, workers, args.pin_mem, drop_last=True)


def make_loaders(args: argparse.Namespace, folder: Path) -> dict[str, torch.utils.data.DataLoader]:
    """{name: loader}. Names end with the number of workers, and each number begins with the reference."""

    def dataset(kind: str = "default", path: str = args.data_path) -> ImageDataset:
        return build_pretrain_dataset(argparse.Namespace(**{**vars(args), "loader": kind, "data_path": path}))

    loaders = {}
    for workers in args.workers:
        ending = f", {workers} workers"
        for kind in ("reference", "default"):
            loaders[f"--loader {kind}{ending}"] = make_loader(args, dataset(kind), workers)
        if workers == max(args.workers):
            pillow = without_simplejpeg(dataset())
            loaders[f"default without simplejpeg{ending}"] = make_loader(args, pillow, workers)
            for short in args.short:
                copies = dataset(path=str(folder / f"short{short}"))
                loaders[f"default, copies by --short {short}{ending}"] = make_loader(args, copies, workers)
            for ahead in args.prefetch if workers else ():
                loaders[f"default, {ahead} batches ahead{ending}"] = make_loader(
                    args, dataset(), workers, ahead
                )
    return loaders


def time_loader(loader: torch.utils.data.DataLoader, epoch: int) -> float:
    """Seconds per image of an epoch, from the first batch to the last, as a training loop receives them."""
    loader.sampler.set_epoch(epoch)
    batches = iter(loader)
    next(batches)
    start, count = time.perf_counter(), 0
    for images, *_ in batches:
        count += len(images)
    return (time.perf_counter() - start) / count


def reference_of(name: str) -> str:
    """The reference's loader with as many workers as `name` has."""
    return f"--loader reference, {name.rsplit(', ', 1)[1]}"


def report(rounds: list[dict[str, float]], baseline: Callable[[str], str]) -> list[dict]:
    """Median rates, and medians over rounds of each round's ratio to its baseline; printed as a table."""
    rows = []
    for name in rounds[0]:
        seconds = statistics.median(r[name] for r in rounds)
        ratio = statistics.median(r[baseline(name)] / r[name] for r in rounds)
        rows.append(
            {"variant": name, "images_per_s": 1 / seconds, "us_per_image": 1e6 * seconds, "ratio": ratio}
        )
    for row in rows:
        ratio = f"{row['ratio']:7.2f} x" if not row["variant"].startswith("  ") else ""
        print(
            f"{row['variant']:46s} {row['images_per_s']:9.0f} images/s {row['us_per_image']:8.0f} us {ratio}"
        )
    return rows


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data_path", help="your own images (default: drawn ones)")
    parser.add_argument("--images", default=200, type=int, help="how many are used")
    parser.add_argument("--samples", default=600, type=int, help="that each worker reads in a round")
    parser.add_argument("--input_size", default=224, type=int)
    parser.add_argument("--rounds", default=7, type=int)
    cores = default_workers()
    powers = sorted({*(2**n for n in range(10) if 2**n < cores), cores})
    parser.add_argument(
        "--workers", default=powers, type=int, nargs="*",
        help=f"numbers of workers; none: skip (default: {' '.join(map(str, powers))})",
    )  # fmt: skip
    parser.add_argument("--short", default=[400, 320], type=int, nargs="*", help="shorter sides of copies")
    parser.add_argument("--prefetch", default=[1, 4], type=int, nargs="*", help="batches ahead to compare")
    parser.add_argument("--batch_size", default=64, type=int)
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    return parser


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as copies_folder:
        if args.data_path is None:
            args.data_path = folder
            draw_pictures(Path(folder), args.images)
        args.loader, args.pin_mem = "default", torch.cuda.is_available()
        paths = build_pretrain_dataset(args).files.paths[: args.images]
        args.images = len(paths)
        sizes = [os.path.getsize(path) for path in paths]
        pixels = [np.prod(read_image(path).shape[:2]) for path in paths]
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        packages = {m.__name__: m.__version__ for m in (torch, torchvision, PIL, np)}
        packages["simplejpeg"] = getattr(read.simplejpeg, "__version__", "missing")
        result = {
            "machine": f"{os.cpu_count()} cores, {processor}, Python {platform.python_version()}",
            "versions": ", ".join(f"{name} {version}" for name, version in packages.items()),
            "images": f"{len(paths)}, mean {np.mean(sizes) / 1e3:.0f} kB, {np.mean(pixels) / 1e3:.0f} kpx",
        }
        place = Path(copies_folder)
        copies = {short: make_copies(paths, place, short) for short in args.short}
        singles = single_variants(paths, args.input_size, copies)
        loaders = make_loaders(args, place)
        time_single(singles, paths)  # warm-up: files into the page cache
        single_rounds, loader_rounds = [], []
        for number in range(args.rounds):
            single_rounds.append(time_single(singles, paths))
            loader_rounds.append({name: time_loader(loader, number) for name, loader in loaders.items()})
        print("\n".join(f"{key}: {value}" for key, value in result.items()))
        print(f"\none thread, processor time, medians of {args.rounds} rounds; ratio to the reference chain")
        result["single"] = report(single_rounds, lambda name: next(iter(singles)))
        if loaders:
            print("\nDataLoader end to end, by the clock; ratio to the reference with as many workers")
            result["loaders"] = report(loader_rounds, reference_of)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_benchmark(main, get_args_parser())
