"""Images named on a command line: files, folders and lists of files, in the order given; some to look at."""

import os
from collections import Counter
from collections.abc import Sequence

import torch

from util.data.depth import depth_of, view
from util.data.examine import add_pages, count_pages
from util.data.find import ImageFiles, PathList, find_images
from util.data.folders import count_kinds, names_archives
from util.data.read import BadImage, Place, sniff_header
from util.data.several import Selection
from util.data.transforms import normalize_batch
from util.errors import UserError
from util.files import counted, printable, some
from util.processes.collectives import note, warn


def find_inputs(
    paths: Sequence[str], bad_images: str = "error", pages: str | None = None
) -> tuple[ImageFiles, Sequence[str]]:
    """Images of files, folders (to any depth; train/ and val/ are folders like others), archives, .txt lists.

    Args:
        bad_images: "error"; "skip" leaves out, with a warning, what is no image, however many.
        pages: "all": each page of a file is an image; "first": it stands for the file, with a note of files
            with more of them; None: without a look.

    Returns:
        The images, without labels, and a name for each: relative to the folder or list that it came from.

    Raises:
        UserError: nothing there, no images, or files that are none.
    """
    found, names, skipped, others = [], [], [], Counter()
    in_folders = "skip any" if bad_images == "skip" else bad_images
    for path in paths:
        is_list = path.lower().endswith(".txt") and os.path.isfile(path)
        if is_list or os.path.isdir(path) or names_archives(path):
            # With "" for the split, the folder itself is searched
            files = find_images(path, "", in_folders, called="")
            found += files.paths
            names += [files.paths.name(i) for i in range(len(files.paths))]
            skipped += files.skipped
            others += files.kinds
        elif not os.path.lexists(path):
            raise UserError(f"{path}: no such file or folder")
        elif (reason := sniff_header(path)) is None:
            found.append(path)
            names.append(os.path.basename(path))
        elif bad_images == "skip":
            skipped.append((path, reason))
        else:
            raise UserError(f"{path}: {reason}; leave it out, or pass --bad_images skip")
    if skipped:
        left_out = some((f"{path} ({reason})" for path, reason in skipped), 3)
        warn(f"{counted(len(skipped), 'file')} left out, not readable as images: {left_out}")
    if others:
        warn(f"{counted(others.total(), 'other file')} ignored: {count_kinds(others)}")
    if not found:
        raise UserError("no images: none of the files named is readable")
    source = printable(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    places = found if any(isinstance(path, Place) for path in found) else PathList(found)
    files, names = ImageFiles(source, "", places, skipped=skipped), PathList(names)
    if pages == "all":
        add_pages(files)
        names = Selection([names], files.paths.rows, files.paths.pages)
    elif pages and (found := count_pages(files)):
        note(f"{source}: {found}")
    return files, names


def views(
    paths: Sequence[str], indices: Sequence[int], weights, skip: bool = False
) -> tuple[torch.Tensor, list[int]]:
    """Some of the files at `paths` as `view` sees them, normalised (N, C, H, W), and which of them these are.

    Args:
        weights: whose input_size, mean, std and pixel_range are meant: a `WeightsFile`.
        skip: leaves out, with a warning, what cannot be read, instead of raising BadImage.
    """
    depth, images, kept = depth_of(weights), [], []
    for index in indices:
        try:
            images.append(view(paths[index], weights.input_size, len(weights.mean), depth))
            kept.append(index)
        except BadImage as error:
            if not skip:
                advice = "leave it out, or pass --bad_images skip"
                raise BadImage(error.path, f"{error.reason}; {advice}") from None
            warn(f"left out: {error}")
    stacked = torch.stack(images) if images else torch.empty(0, len(weights.mean), *weights.input_size)
    return normalize_batch(stacked, "cpu", weights.mean, weights.std), kept
