"""Copies a folder of images with large ones made smaller, so that every epoch decodes fewer pixels.

    python tools/resize_dataset.py SRC DST --short 400

Images with a shorter side above `--short` are scaled down to it (bicubic, antialiased); the others are copied
as they are. Folders (train/, val/, classes) and names stay. Nothing is overwritten in SRC, and DST never
holds half a file. Run the same command again to go on after an interruption, or after SRC has changed: what
is done already is passed over. Files that cannot be read as images are left out and listed in
DST/.resize_dataset/unreadable.txt; the exit status is then 1.

Pixels are taken as the training's loader takes them: not rotated by EXIF (the tag is dropped, so viewers show
what the model sees), without colour management (profiles are dropped). Arrays, TIFFs and grey PNGs keep type
and bands; TIFFs of several pages, and what else is deeper than 8 bits, are copied in full size. Of other
files with several pictures, the first. Grey stays grey, alpha stays and is scaled apart from the colours;
CMYK and the like become RGB, palettes RGB or RGBA. JPEG, PNG, WebP, TIFF, BMP, PNM and .npy stay what they
are; GIF becomes NAME.gif.png. JPEG (4:2:0) and WebP are written with `--quality`, the others without loss.
"""

import argparse
import json
import math
import os
import random
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, process
from pathlib import Path

import filelock
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.copy_image import CannotWrite, copy_image, output_name
from util.cli.parser import ArgumentParser, run_script
from util.cli.progress import progress_bar
from util.console import say
from util.data.folders import list_folders
from util.data.read import BadImage, open_pil
from util.errors import UserError
from util.files import counted, printable
from util.processes import signals
from util.sizes import default_workers

CHUNK = 16  # images a worker is given at a time
WHAT_IT_CHANGES = """\
What this changes: 300 photographs of about 482 x 407 px and their copies, in random crops of 224 px, agreed
to 46.7 dB with --short 400, 35.2 dB with 320 and 31.7 dB with 256, in an earlier measurement.
--measure N measures N of your images."""


def is_done(source: str, target: str) -> bool:
    """Whether `target` is `source`'s copy: its time, to the 2 s that the coarsest file systems keep."""
    try:
        copy, original = os.stat(target), os.stat(source)
    except OSError:
        return False
    return copy.st_size > 0 and abs(copy.st_mtime_ns - original.st_mtime_ns) < 2_000_000_000


def _work(task: tuple[argparse.Namespace, list[str]]) -> tuple[Counter, list[tuple[str, str]]]:
    """Copies some images, in a worker: counts of what was done, and (name, reason) of unreadable ones."""
    args, names = task
    counts, unreadable = Counter(), []
    for name in names:
        source = os.path.join(args.source, name)
        try:
            target = os.path.join(args.target, output_name(name, source))
            done = is_done(source, target)
            kind = "done" if done else copy_image(source, target, args.spare, args.short, args.quality)
            counts[kind] += 1
            counts["bytes before"] += os.path.getsize(source)
            counts["bytes after"] += os.path.getsize(target)
        except BadImage as error:
            unreadable.append((name, error.reason))
    return counts, unreadable


def find_names(source: str) -> Iterator[str]:
    """Names of all images in a folder and the folders in it, relative to it."""
    try:
        folders = list_folders(source)
    except OSError as error:
        raise UserError(f"{printable(error.filename or source)}: {error.strerror}") from None
    for folder in folders:
        for name in folder.images.split(b"\0") if folder.count else ():
            yield os.path.join(folder.name, os.fsdecode(name))


def check_flags(args: argparse.Namespace) -> None:
    """Sets `args.source` and `args.target`; raises UserError for flags and folders that cannot work."""
    for flag, least, most in (("short", 1, 65535), ("quality", 1, 100), ("workers", 1, 1024)):
        if getattr(args, flag) is not None and not least <= getattr(args, flag) <= most:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be from {least} to {most}")
    args.source, args.target = os.path.realpath(args.src), os.path.realpath(args.dst)
    common = os.path.commonpath([args.source, args.target])
    if common in (args.source, args.target):
        raise UserError(f"SRC {printable(args.src)} and DST {printable(args.dst)}: one is in the other")


def prepare(args: argparse.Namespace) -> list[str]:
    """Checks SRC and DST, and takes DST as `take_target` does; returns images' names."""
    check_flags(args)
    if args.measure < 0:
        raise UserError(f"--measure {args.measure}: must be at least 0")
    if not os.path.isdir(args.src):
        what = "is no folder (tools/make_shards.py also takes archives)"
        what = what if os.path.exists(args.src) else "does not exist"
        raise UserError(f"SRC {printable(args.src)}: {what}")
    names = list(find_names(args.source))
    if not names:
        raise UserError(f"SRC {printable(args.src)}: no images in it")
    settings = {"source": args.source, "short": args.short, "quality": args.quality}
    take_target(args, Path(args.target, ".resize_dataset"), settings)
    return names


def take_target(args: argparse.Namespace, own: Path, settings: dict) -> None:
    """Locks DST, where `own` is the program's folder, and removes what an interrupted run left half done.

    Sets `args.spare` (for files not yet complete) and `args.lock`; UserError for a DST of something else.
    """
    args.spare = os.path.join(own, "unfinished")
    try:
        if os.path.isdir(args.target) and os.listdir(args.target) and not own.is_dir():
            raise UserError(f"DST {printable(args.dst)}: holds other files; name a new or an empty folder")
        os.makedirs(args.spare, exist_ok=True)
        args.lock = _lock(own / "lock")
        path, text = own / "settings.json", json.dumps(settings).encode()
        if path.exists() and (stored := path.read_bytes()) not in (text, b""):  # empty: the disk was full
            raise UserError(
                f"DST {printable(args.dst)}: was made with other settings ({printable(stored)[:300]})"
            )
        path.write_bytes(text)
        for name in os.listdir(args.spare) if args.lock.is_locked else ():  # else another run's, perhaps
            os.unlink(os.path.join(args.spare, name))
    except OSError as error:
        raise UserError(f"DST {printable(args.dst)}: {error.strerror or error}") from None


def _lock(path: Path) -> filelock.FileLock:
    """A lock that no other run of this command has; it is held until this one ends, however it ends."""
    path.touch()
    lock = filelock.FileLock(path)
    owner = path.with_name("owner")
    try:
        lock.acquire(timeout=1, poll_interval=0.1)
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except filelock.Timeout:
        who = printable(owner.read_text(encoding="utf-8")) if owner.exists() else "another run"
        raise UserError(f"{printable(path.parents[1])}: {who} is writing there") from None
    except (OSError, NotImplementedError):  # a file system without locks
        pass
    return lock


def copy_all(
    args: argparse.Namespace, parts: list[list], work: Callable = _work
) -> tuple[Counter, list[tuple[str, str]]]:
    """Copies images, part by part, in processes; counts, and (name, reason) of what could not be read."""
    task = argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "lock"})
    counts, unreadable, progress = Counter(), [], progress_bar(sum(map(len, parts)))
    pool = ProcessPoolExecutor(args.workers, initializer=signals.follow_main_process)
    try:
        for part, (done, failed) in zip(parts, pool.map(work, ((task, p) for p in parts)), strict=True):
            counts += done
            unreadable += failed
            progress.update(len(part))
    except CannotWrite as error:
        raise UserError(f"{error}; the same command goes on from here") from None
    except process.BrokenProcessPool:
        advice = "out of memory? the same command goes on from here, perhaps with fewer --workers"
        raise UserError(f"a worker process was killed ({advice})") from None
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()
    return counts, unreadable


def measure(args: argparse.Namespace, names: list[str]) -> tuple[float, int]:
    """Agreement (PSNR in dB) of crops of the originals with the same crops of their copies, and of how many
    images.

    Four random crops as pre-training draws them, 224 px, of `args.measure` images spread evenly; those
    copied as they are count as well.
    """
    from util.data.transforms import random_resized_crop_box  # imports torch

    rng, total, count, images = random.Random(0), 0.0, 0, 0
    for position in np.linspace(0, len(names) - 1, min(args.measure, len(names))).astype(int):
        source = os.path.join(args.source, names[position])
        try:
            original = open_pil(source)
            copy = open_pil(os.path.join(args.target, output_name(names[position], source)))
        except BadImage:  # .npy arrays, or reported already
            continue
        images += 1
        x, y = copy.width / original.width, copy.height / original.height
        for _ in range(4):
            top, left, height, width = random_resized_crop_box(original.height, original.width, rng)
            box = (left, top, left + width, top + height)
            small_box = (left * x, top * y, (left + width) * x, (top + height) * y)
            sides = (original, box), (copy, small_box)
            cut = (image.resize((224, 224), Image.Resampling.BICUBIC, box=place) for image, place in sides)
            one, two = (np.asarray(part, dtype=np.float32) for part in cut)
            total += float(np.square(one - two).mean())
            count += 1
    return (10 * math.log10(255**2 * count / total) if total else math.inf), images


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("src", metavar="SRC", help="folder of images, in folders of any depth")
    parser.add_argument("dst", metavar="DST", help="folder of the copies; new, or one that this has begun")
    parser.add_argument("--short", default=400, type=int, help="pixels of the shorter side (default: 400)")
    parser.add_argument("--quality", default=95, type=int, help="of JPEG and WebP (default: 95)")
    parser.add_argument("--workers", default=default_workers(), type=int, help="processes")
    parser.add_argument("--measure", default=0, type=int, metavar="N",
                        help="say how far crops of N images and of their copies agree, in dB")  # fmt: skip
    return parser


def main(args: argparse.Namespace) -> None:
    names = prepare(args)
    say(f"{counted(len(names), 'image')} in {printable(args.src)}\n{WHAT_IT_CHANGES}")
    parts = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    counts, unreadable = copy_all(args, parts)
    say(
        f"{counts['scaled']:,} scaled to {args.short} px, {counts['copied']:,} copied as they are, "
        f"{counts['done']:,} there already, {len(unreadable):,} not readable; "
        f"{counts['bytes before'] / 1e6:,.0f} MB became {counts['bytes after'] / 1e6:,.0f} MB"
    )
    if counts["kept"]:
        say(f"{counts['kept']:,} kept in full size: several pages, or a depth or format not written here")
    if args.measure:
        decibels, images = measure(args, names)
        say(f"measured: crops of {counted(images, 'image')} and of the copies agree to {decibels:.1f} dB")
    report_unreadable(Path(args.target, ".resize_dataset"), unreadable)


def report_unreadable(own: Path, unreadable: list[tuple[str, str]]) -> None:
    """Lists files that were left out in the folder `own`; exits with 1 if there are any."""
    report = own / "unreadable.txt"
    lines = "".join(f"{printable(name)}: {reason}\n" for name, reason in unreadable)
    try:
        report.write_text(lines, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{printable(report)}: cannot be written ({error.strerror or error})") from None
    if unreadable:
        for name, reason in unreadable[:10]:
            say(f"not readable: {printable(name)}: {reason}", sys.stderr)
        say(f"{counted(len(unreadable), 'file')} not in DST; all of them: {printable(report)}", sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, get_args_parser())
