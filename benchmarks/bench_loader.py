"""Images per second of the loaders: one thread in this process, then DataLoader workers end to end.

Reads JPEGs of `--data_path`, or 200 of about 480 x 400 px and 100 KB that it draws itself, the same out of a
tar, and copies of them as `python -m tools.resize_dataset --short S` writes them. The variants of a table
take turns, so that a busy moment of the machine hits all of them; medians over rounds, ratios within a round.
One thread is timed by the processor time it used. Workers are timed by the clock: both loaders at each number
of workers, and at the largest the other variants of the default one, among them other numbers of batches
worked ahead.
"""

import argparse
import functools
import os
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from harness import Parser, finish, paired_ratio, positive, print_table, run_benchmark, say, take_turns
from PIL import Image
from workload import Repeated, draw_pictures

from tools.copy_image import copy_image
from util.data import loader as sampler_module
from util.data import transforms
from util.data.dataset import ImageDataset, build_pretrain_dataset
from util.data.find import find_images
from util.data.loader import build_loader
from util.data.read import read_image
from util.data.sampler import EpochSampler
from util.sizes import default_workers

REPEATS = 4
FROM_TAR = "default, from a tar"
REPEATED = f"default, --repeated_aug {REPEATS}, per crop"


def make_copies(paths: list[str], folder: Path, short: int) -> dict[str, str]:
    """{path: path of its copy} with shorter sides of at most `short` pixels."""
    copies = {path: str(folder / f"short{short}" / f"{i:05d}.jpg") for i, path in enumerate(paths)}
    for path, copy in copies.items():
        copy_image(path, copy, str(folder), short, quality=95)
    return copies


def pack(paths: list[str], folder: Path) -> dict[str, str]:
    """{path: its place in a tar} of `folder`/tar; the table of its members is kept in `folder`/cache."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    (folder / "tar").mkdir()
    with tarfile.open(folder / "tar" / "0.tar", "w") as tar:
        for number, path in enumerate(paths):
            tar.add(path, f"{number:05d}.jpg")
    return dict(zip(paths, find_images(folder / "tar").paths, strict=True))


def single_variants(
    paths: list[str], size: int, copies: dict[int, dict], packed: dict[str, str]
) -> dict[str, Callable]:
    """{name: one image's work}; the first is what the others are compared with, then steps of the default."""
    chain = transforms.reference_transform(size, transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)
    transform, rng = transforms.PretrainTransform(size), random.Random(0)
    decoded = {path: read_image(path) for path in paths}

    def reference(path: str) -> torch.Tensor:
        with open(path, "rb") as file:
            return chain(Image.open(file).convert("RGB"))

    def resize_only(path: str) -> torch.Tensor:
        image = decoded[path]
        return transforms.resize_crop(
            image, transforms.random_resized_crop_box(*image.shape[:2], rng), transform.size
        )

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
        FROM_TAR: lambda path: transform(read_image(packed[path]), rng),
        "default without simplejpeg": lambda path: transform(read_image(path, use_simplejpeg=False), rng),
        **shrunk,
        REPEATED: repeated,
        "  of which: read and decode": read_image,
        "  of which: crop and resize": resize_only,
        "  of which: crop box": lambda path: transforms.random_resized_crop_box(400, 480, rng),
        "  of which: read the file": lambda path: Path(path).read_bytes(),
        "  of which: read from a tar": lambda path: packed[path].open().read(),
    }


def time_single(name: str, work: Callable, paths: list[str]) -> float:
    """Seconds of processor time per sample, one pass over `paths`."""
    start = time.process_time()
    for path in paths:
        work(path)
    return (time.process_time() - start) / len(paths) / (REPEATS if name == REPEATED else 1)


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
            loaders[FROM_TAR + ending] = make_loader(args, dataset(path=str(folder / "tar")), workers)
            for short in args.short:
                copies = dataset(path=str(folder / f"short{short}"))
                loaders[f"default, copies by --short {short}{ending}"] = make_loader(args, copies, workers)
            for ahead in args.prefetch if workers else ():
                name = f"default, {ahead} batches ahead{ending}"
                loaders[name] = make_loader(args, dataset(), workers, ahead)
    return loaders


def time_loader(loader: torch.utils.data.DataLoader) -> float:
    """Seconds per image of an epoch, from the first batch to the last, as a training loop receives them."""
    loader.sampler.set_epoch(loader.sampler.epoch + 1)
    batches = iter(loader)
    next(batches)
    start, count = time.perf_counter(), 0
    for images, *_ in batches:
        count += len(images)
    return (time.perf_counter() - start) / count


def report(rounds: dict[str, list[float]], baseline: Callable[[str], str]) -> dict[str, dict]:
    """Median rates, and medians over rounds of each round's ratio to its baseline; printed as a table."""
    figures = {
        name: {"us_per_image": 1e6 * statistics.median(seconds), "seconds_per_image": seconds,
               "ratio": paired_ratio(rounds[baseline(name)], seconds)}
        for name, seconds in rounds.items()
    }  # fmt: skip
    print_table(["", "images/s", "us", "ratio"], (
        (name, f"{1e6 / row['us_per_image']:.0f}", f"{row['us_per_image']:.0f}",
         "" if name.startswith("  ") else f"{row['ratio']:.2f} x")
        for name, row in figures.items()
    ), name=46)  # fmt: skip
    return figures


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as copies_folder:
        if args.data_path is None:
            args.data_path = folder
            draw_pictures(Path(folder), args.images)
        args.loader, args.pin_mem = "default", torch.cuda.is_available()
        paths = build_pretrain_dataset(args).files.paths[: args.images]
        args.images = len(paths)
        kilobytes = np.mean([os.path.getsize(path) for path in paths]) / 1e3
        kilopixels = np.mean([np.prod(read_image(path).shape[:2]) for path in paths]) / 1e3
        say(f"images: {len(paths)}, mean {kilobytes:.0f} kB, {kilopixels:.0f} kpx")
        place = Path(copies_folder)
        copies = {short: make_copies(paths, place, short) for short in args.short}
        singles = single_variants(paths, args.input_size, copies, pack(paths, place))
        ways = {name: partial(time_single, name, work, paths) for name, work in singles.items()}
        take_turns(1, ways)  # warm-up: files into the page cache
        say(f"\none thread, processor time, medians of {args.rounds} rounds; ratio to the reference chain")
        rounds = take_turns(args.rounds, ways)
        figures = {"single": report(rounds, lambda name: next(iter(singles)))}
        say(f"from a tar against from files: {paired_ratio(rounds['default'], rounds[FROM_TAR]):.3f} x")
        loaders = make_loaders(args, place)
        if loaders:
            say("\nDataLoader end to end, by the clock; ratio to the reference with as many workers")
            ways = {name: partial(time_loader, loader) for name, loader in loaders.items()}
            rounds = take_turns(args.rounds, ways)
            figures["loaders"] = report(rounds, lambda name: f"--loader reference, {name.rsplit(', ', 1)[1]}")
            ending = f", {max(args.workers)} workers"
            pair = (rounds[name + ending] for name in ("--loader default", FROM_TAR))
            say(f"from a tar against from files: {paired_ratio(*pair):.3f} x")
    return finish(args, {"kilobytes": kilobytes, "kilopixels": kilopixels, **figures})


if __name__ == "__main__":
    parser = Parser(__doc__, images=200, input_size=224, rounds=7, batch_size=64)
    cores = default_workers()
    powers = sorted({*(2**n for n in range(10) if 2**n < cores), cores})
    flag = parser.add_argument
    # fmt: off
    flag("--data_path", help="your own images (default: drawn ones)")
    flag("--samples", default=600, type=positive(), help="that each worker reads in a round")
    flag("--workers", default=powers, type=positive(or_zero=True), nargs="*",
         help=f"numbers of workers; none: skip (default: {' '.join(map(str, powers))})")
    flag("--short", default=[400, 320], type=positive(), nargs="*", help="shorter sides of copies")
    flag("--prefetch", default=[1, 4], type=positive(), nargs="*", help="batches ahead to compare")
    # fmt: on
    run_benchmark(main, parser)
