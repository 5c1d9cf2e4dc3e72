"""A model at another image size than it was trained at: only its position tables depend on that."""

import math
from argparse import Namespace
from dataclasses import replace

from util.errors import UserError
from util.processes.collectives import is_main_process, warn
from util.sizes import size_pair
from util.weights.adapt import fit_table
from util.weights.describe import WeightsFile, describe
from util.weights.encoder import stored_grid
from util.weights.files import read_file
from util.weights.schema import said_settings

TABLES = ("pos_embed", "decoder_pos_embed")


def describe_file(flags: Namespace, *parts: str) -> WeightsFile:
    """Reads and describes the file of `--resume`, at another size if `--input_size` says so.

    Args:
        flags: resume, no_verify, weights_key, input_size, and what else `describe` takes.
        parts: as `describe` takes them.

    Raises:
        UserError: as `read_file`, `describe` and `at_size`.
    """
    content = read_file(flags.resume, "--resume", not flags.no_verify, flags.weights_key)
    try:
        weights = describe(content, flags.resume, flags, *parts)
        _warn_of_guess(weights, content)
        return weights
    except UserError:
        if flags.input_size is None:
            raise
    # Where the size was not the reason, the same error comes again
    weights = describe(content, flags.resume, Namespace(**{**vars(flags), "input_size": None}), *parts)
    return at_size(weights, flags.input_size)


def _warn_of_guess(weights: WeightsFile, content: dict) -> None:
    """Says where as many patches could be those of a square, which most models are trained with."""
    rows, columns = (side // weights.sizes["patch_size"] for side in weights.input_size)
    square = math.isqrt(rows * columns) ** 2 == rows * columns and rows != columns
    if square and stored_grid(weights.state, said_settings(content)) is None and is_main_process():
        warn(f"{weights.path} does not say the patch grid of its {rows * columns} positions; they are taken "
             f"for {rows}x{columns}")  # fmt: skip


def at_size(weights: WeightsFile, input_size: int | tuple[int, int]) -> WeightsFile:
    """A model, as its file describes it, for images of `input_size`; itself at its own size. A fixed table is
    computed anew, a learned one is resized bicubically. Warns that it was not trained so.

    Raises UserError unless the size is one of whole patches.
    """
    (height, width), patch = size_pair(input_size), weights.sizes["patch_size"]
    if (height, width) == weights.input_size:
        return weights
    if height % patch or width % patch:
        raise UserError(f"--input_size {height}x{width}: must be a multiple of {patch}, the patch size of "
                        f"{weights.path}")  # fmt: skip
    old, new = (tuple(side // patch for side in size) for size in (weights.input_size, (height, width)))
    tables = {name: fit_table(weights.state[name], old, new) for name in TABLES if name in weights.state}
    if is_main_process():
        trained = "x".join(map(str, weights.input_size))
        ways = " and ".join(dict.fromkeys(way for _, way in tables.values()))
        warn(f"{weights.path} was trained at {trained} pixels, now it is {height}x{width}: its position "
             f"table is {ways}, and it may do worse")  # fmt: skip
    state = weights.state | {name: table for name, (table, _) in tables.items()}
    sizes = weights.sizes | {"img_size": (height, width)}
    return replace(weights, state=state, sizes=sizes, input_size=(height, width))
