"""Packs a data set into tar archives, which far or slow disks give faster than single files.

    python tools/make_shards.py SRC DST
    python tools/make_shards.py SRC DST --short 400

SRC is what --data_path takes: a folder, a list, archives, Parquet files. DST gets train-00000.tar and so on,
val-00000.tar, or 00000.tar where there are no splits; names and folders stay, so that trainings see the same
data. Training images are mixed, so that each archive holds all classes, as `--shuffle near` needs it; other
splits keep their order. With `--short` large images are made smaller first, as by resize_dataset.py.

The same SRC gives the same bytes. DST never holds half an archive: run the same command again to go on after
an interruption. Files that cannot be read as images are left out and listed in
DST/.make_shards/unreadable.txt; the exit status is then 1.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.copy_image import CannotWrite, copy_image, output_name
from tools.resize_dataset import check_flags, copy_all, report_unreadable, take_target
from util.cli.parser import ArgumentParser, run_script
from util.console import say
from util.data.find import ImageFiles, find_images
from util.data.members import SPLIT
from util.data.read import BadImage, Place, open_file, sniff_header
from util.errors import UserError
from util.files import counted, printable, replacing, some
from util.sizes import default_workers


class Part(list):
    """(source, name) of an archive's images. archive: its file name."""

    archive = ""


def names_in(files: ImageFiles) -> list[str]:
    """What the images will be called: as in SRC, but below the folder that all of a list's share where a
    name would lead out of the archive (/data/a.jpg, ../a.jpg)."""
    names = [files.paths.name(number) for number in range(len(files.paths))]
    if any(os.path.isabs(name) or os.pardir in name.split(os.sep) for name in names):
        names = [os.path.abspath(path) for path in files.paths]
        shared = os.path.commonpath(list(map(os.path.dirname, names)))
        names = [os.path.relpath(name, shared) for name in names]
    names = list(map(os.path.normpath, names))
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        where = f"SRC {printable(files.source)}: holds {some(twice, 3)} more than once"
        raise UserError(f"{where}, which one set of archives cannot; pack its parts one by one")
    return names


def plan(files: ImageFiles, names: list[str], images: int) -> list[Part]:
    """What goes where: archives of `images` images each, of one split each."""
    splits = defaultdict(list)
    for number, name in enumerate(names):
        top = name.split(os.sep)[0]
        splits[top if SPLIT.fullmatch(top) else ""].append(number)
    if "" in splits:  # what lies beside the splits belongs to none
        splits = {"": sorted(number for numbers in splits.values() for number in numbers)}
    parts = []
    for split, numbers in sorted(splits.items()):
        if split == "" or split.lower().startswith("train"):
            random.Random(0).shuffle(numbers)
        for count, start in enumerate(range(0, len(numbers), images)):
            part = Part((files.paths[i], names[i]) for i in numbers[start : start + images])
            part.archive = f"{split}{'-' if split else ''}{count:05d}.tar"
            parts.append(part)
    return parts


def content(args: argparse.Namespace, source: str, name: str, spare: str) -> tuple[str, bytes]:
    """(name in the archive, bytes) of an image; raises BadImage, or CannotWrite for a store that is away."""
    if reason := sniff_header(source):
        raise BadImage(source, reason)
    try:
        with source.open() if isinstance(source, Place) else open_file(source) as file:
            data = file.read()
    except ConnectionError as error:
        raise CannotWrite(f"{printable(source)}: {error}") from None
    except OSError as error:
        raise BadImage(source, error.strerror or str(error)) from None
    if args.short is not None:
        name = output_name(name, source)
        original, copy = Path(f"{spare}.original"), f"{spare}.copy"
        original.write_bytes(data)
        copy_image(str(original), copy, args.spare, args.short, args.quality)
        data = Path(copy).read_bytes()
    return name, data


def pack(task: tuple[argparse.Namespace, Part]) -> tuple[Counter, list[tuple[str, str]]]:
    """Writes an archive, in a worker: counts of what was done, and (name, reason) of unreadable images."""
    args, part = task
    target, notes = Path(args.target, part.archive), Path(args.own, f"{part.archive}.json")
    if target.exists() and notes.exists():
        with contextlib.suppress(ValueError):  # half-written notes: once more
            known = json.loads(notes.read_text(encoding="utf-8"))
            return Counter(done=len(part)), list(map(tuple, known))
    unreadable, counts = [], Counter(archives=1)
    try:
        with replacing(target, args.spare) as temporary:
            with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
                for source, name in part:
                    try:
                        name, data = content(args, source, name, os.path.join(args.spare, part.archive))
                    except BadImage as error:
                        unreadable.append((name, error.reason))
                        continue
                    info = tarfile.TarInfo(name.replace(os.sep, "/"))
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    counts.update({"packed": 1, "bytes": len(data)})
            notes.write_text(json.dumps(unreadable), encoding="utf-8")
    except OSError as error:
        raise CannotWrite(f"{printable(target)}: {error.strerror or error}") from None
    return counts, unreadable


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("src", metavar="SRC", help="a data set, as --data_path takes it")
    parser.add_argument("dst", metavar="DST", help="folder of the archives; new, or one that this has begun")
    parser.add_argument("--images", default=5000, type=int, help="in an archive (default: 5000)")
    parser.add_argument("--short", type=int, help="pixels of the shorter side (default: as it is)")
    parser.add_argument("--quality", default=95, type=int, help="of JPEG and WebP that are made smaller")
    parser.add_argument("--workers", default=default_workers(), type=int, help="processes")
    return parser


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    if args.images < 1:
        raise UserError(f"--images {args.images}: must be at least 1")
    files = find_images(args.src, "", "skip any", called="SRC ")
    args.own = os.path.join(args.target, ".make_shards")
    names = names_in(files)
    settings = {name: getattr(args, name) for name in ("source", "images", "short", "quality")}
    settings["files"] = hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()
    take_target(args, Path(args.own), settings)
    parts = plan(files, names, args.images)
    splits = Counter()
    for part in parts:
        splits[part.archive.rpartition("-")[0]] += len(part)
    if "" not in splits:  # the folders directly in SRC are no classes
        files.classes = None
        files.notes.append(", ".join(f"{count:,} in {split}" for split, count in splits.items()))
    say(f"{files.describe()}: {counted(len(parts), 'archive')} of at most {counted(args.images, 'image')}")
    counts, unreadable = copy_all(args, parts, pack)
    unreadable += [(os.fspath(path), reason) for path, reason in files.skipped]
    say(
        f"{counted(counts['packed'], 'image')} in {counted(counts['archives'], 'archive')}, "
        f"{counts['bytes'] / 1e6:,.0f} MB; {counts['done']:,} there already; {len(unreadable):,} not readable"
    )
    report_unreadable(Path(args.own), unreadable)


if __name__ == "__main__":
    run_script(main, get_args_parser())
