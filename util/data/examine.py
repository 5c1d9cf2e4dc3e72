"""Looks at some images of a set before the start: which values have they, and what of them would be lost?"""

from argparse import Namespace
from typing import NamedTuple

import numpy as np

from util.data.depth import Depth, depth_of, make_reader, parse_range, range_text, read_deep
from util.data.find import ImageFiles
from util.data.folders import ask_all
from util.data.headers import HEAD, why_no_image
from util.data.peek import Header, read_header
from util.data.read import BadImage, _open
from util.data.several import Selection
from util.errors import UserError
from util.files import counted, printable, some
from util.processes.collectives import gather, is_main_process, warn
from util.rng import derive_seed

HEADERS, PICTURES = 256, 64  # files whose headers are read; of these, so many deep ones are decoded
PIXELS = 65_536  # of each of them, evenly spread
SHARES = (0.05, 99.95)  # percentiles of all these that become black and white
FLAT = 16  # 8-bit images that are decoded, until one of them has more than one value


class Found(NamedTuple):
    """pixel_range: a tuple, or None for 8-bit images. notes: for the `data:` line. warnings: a line each."""

    pixel_range: tuple[float, ...] | None
    notes: list[str]
    warnings: list[str]


def settle_range(args: Namespace, files: ImageFiles) -> Depth | None:
    """Settles `args.pixel_range`, unless it is, by looking at some of `files`; returns the `Depth` of it.

    What is found is noted in `files.notes`. The first process looks for all. Raises UserError as `examine`.
    """
    given = getattr(args, "pixel_range", "auto")
    if given is None or isinstance(given, tuple):
        if given and len(given) not in (2, 2 * (channels := getattr(args, "in_chans", 3))):
            raise UserError(f"--in_chans {channels}: the checkpoint's --pixel_range is of {len(given) // 2}")
        depth, paths = depth_of(args), [files.paths[i] for i in range(min(FLAT, len(files.paths)))]
        if depth and is_main_process() and _all_constant(paths, getattr(args, "in_chans", 3), depth):
            text = f"within --pixel_range {range_text(given)}, the checkpoint's"
            warn(f"{_names(paths)}: all images looked at have one value only {text}")
        return depth
    channels = getattr(args, "in_chans", 3)
    given, found = parse_range(given, channels), None
    if is_main_process():
        seed, bad_images = getattr(args, "seed", 0), getattr(args, "bad_images", "error")
        found = examine(files, channels, seed, given, bad_images)
        for text in found.warnings:
            warn(text)
    args.pixel_range, notes = gather(found and (found.pixel_range, found.notes))[0]
    files.notes += notes
    return depth_of(args)


def add_pages(files: ImageFiles) -> None:
    """Makes each page of each file an image; the header of every file is read."""
    headers = list(ask_all(_look_inside, files.paths))
    pages = [[-1] if header is None or len(header.pages) == 1 else header.pages for header in headers]
    counts = np.array([len(numbers) for numbers in pages])
    rows = np.repeat(np.arange(len(pages)), counts)
    files.paths = Selection([files.paths], rows, np.concatenate(pages))
    files.labels = None if files.labels is None else files.labels[rows]
    if (several := counts > 1).any():
        text = f"{counts[several].sum():,} of them pages of {counted(several.sum(), 'file')}"
        files.notes.append(text)


def count_pages(files: ImageFiles) -> str:
    """Which files have several pages, in words; "" where none of those looked at has."""
    count = len(files.paths)
    rows = np.unique(np.linspace(0, count - 1, min(count, HEADERS)).astype(int))
    headers = ask_all(_look_inside, [files.paths[int(row)] for row in rows])
    of = "" if count <= HEADERS else f" of {HEADERS} looked at"
    return "".join(_about_pages([header for header in headers if header], of))


def _about_pages(headers: list[Header], of: str) -> list[str]:
    paged, pages = sum(len(header.pages) > 1 for header in headers), sum(len(h.pages) for h in headers)
    text = f"{counted(paged, 'file')}{of} with several pages, {pages} in all: --pages all reads them all"
    return [text] if paged else []


def examine(files: ImageFiles, channels: int, seed: int, given: tuple | None, bad_images: str) -> Found:
    """Looks at the headers of some files, drawn from `seed`, and decodes a few.

    Args:
        given: the range on the command line, or None.
        bad_images: with "skip", depths may be mixed: the rarer one's files are skipped when they come.

    Raises:
        UserError: the set mixes depths and no range was given; none of the deep images can be read.
    """
    count, headers = len(files.paths), 16 if getattr(files.paths, "in_groups", False) else HEADERS
    picked = np.arange(count)
    if count > headers:
        picked = np.sort(np.random.default_rng(derive_seed(seed, 13)).choice(count, headers, replace=False))
    paths = [files.paths[i] for i in picked]
    known = [pair for pair in zip(paths, ask_all(_look_inside, paths), strict=True) if pair[1]]
    deep, flat = ([path for path, header in known if header.deep is wanted] for wanted in (True, False))
    alpha = [path for path, header in known if header.alpha]
    of = "" if count <= headers else f" of {headers} looked at"
    warnings, notes = [], _about_pages([header for _, header in known], of)
    if isinstance(files.paths, Selection) and files.paths.pages.max() >= 0:  # each is one
        notes = []
    if alpha and channels in (1, 3):
        warnings.append(
            f"{counted(len(alpha), 'image')}{of} with an alpha channel or a fourth band, which is dropped: "
            f"{_names(alpha)} (--in_chans {channels + 1} keeps it)"
        )
    if given is None and deep and flat and bad_images == "error":
        raise UserError(
            f"images of 8 bits ({_names(flat)}) and deeper ones ({_names(deep)}) in one set: sort them, or "
            "say by --pixel_range LOW HIGH which values are black and white in all of them"
        )
    if len(flat) >= len(deep) if given is None else given == (0.0, 255.0) and not deep:
        given, constant = None, _all_constant(flat[:FLAT], channels)
    elif given is None:
        given, how, constant = _measure(deep[:: max(1, len(deep) // PICTURES)][:PICTURES], channels)
        notes.append(f"deeper than 8 bits, --pixel_range {range_text(given)} ({how})")
    else:
        constant = _all_constant(paths[:FLAT], channels, Depth(given, channels))
    if constant:
        within = f", within --pixel_range {range_text(given)}" if given else ""
        warnings.append(
            f"all images looked at have one value only{within} ({_names(paths)}): nothing to learn"
        )
    return Found(given, notes, warnings)


def _names(paths: list[str]) -> str:
    return some(map(printable, paths), 2)


def _look_inside(path: str) -> Header | None:
    """What a file's header says; None where it cannot be read, which the reading itself will tell."""
    try:
        with _open(path) as file:
            head = file.read(HEAD)
            return None if why_no_image(head) else read_header(head, file)
    except UserError:  # a package is missing
        raise
    except Exception:  # on broken files parsers raise whatever they run into
        return None


def _all_constant(paths: list[str], channels: int, depth: Depth | None = None) -> bool:
    """Whether those that can be read have one value each; at the first that has not, no more are decoded."""
    read, found = make_reader(channels, depth), False
    for path in paths:
        try:
            values = read(path)
        except BadImage:
            continue
        if np.ptp(values if depth is None else depth.scale(values).clip(0, 1)):
            return False
        found = True
    return found


def _measure(paths: list[str], channels: int) -> tuple[tuple[float, ...], str, bool]:
    """(range, how it was found, whether all values are the same) of deep images.

    What all headers declare, or percentiles of the values: once for grey and RGB, else per channel.
    """
    from util.data.deep import declared_range

    pixels, declared, error = [], [], None
    for path in paths:
        try:
            array = read_deep(path, channels).reshape(-1, channels)
            with _open(path) as file:
                declared.append(declared_range(file.read(HEAD), file))
        except BadImage as bad:
            error = bad
            continue
        pixels.append(array[:: -(-len(array) // PIXELS)].astype(np.float64))
    if not pixels:
        raise error
    values = np.concatenate(pixels)
    constant = bool(np.ptp(values) == 0)
    if all(declared):
        return (min(d[0] for d in declared), max(d[1] for d in declared)), "as the files declare", constant
    values = values.reshape(-1, 1) if channels in (1, 3) else values
    found = []
    for column in values.T:
        low = np.percentile(column, SHARES[0], method="lower")
        high = np.percentile(column, SHARES[1], method="higher")
        if low == high:  # nearly all values are the same
            low, high = column.min(), column.max()
        found += [float(low), float(high if low < high else low + 1)]
    return tuple(found), f"measured on {counted(len(pixels), 'image')}", constant
