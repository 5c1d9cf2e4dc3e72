"""Images of more than 8 bits: which values are black and white, and how they become a model's input.

A set is 8-bit (uint8 up to the device, `pixel_range` None) or deep: then `pixel_range` is a tuple of floats,
LOW and HIGH once or per channel, and samples are normalised float32. It is settled at the start, stored with
the flags, and taken from there by all that reads a checkpoint.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch

from util.data.headers import HEAD, why_no_image
from util.data.peek import is_deep
from util.data.read import BadImage, _explain, _open, read_image
from util.data.transforms import EvalTransform, channel_stats
from util.errors import UserError
from util.files import shown


class Depth:
    """Brings values of any type to (value - low) / (high - low), clipped to [0, 1], and normalises them.

    Args:
        pixel_range: low and high, once or for each of `channels`. mean, std: as `channel_stats` takes them.
    """

    def __init__(self, pixel_range: Sequence[float], channels: int, mean=None, std=None):
        pairs = np.array(pixel_range, dtype=np.float64).reshape(-1, 2)
        self.low, self.span = pairs[:, 0], pairs[:, 1] - pairs[:, 0]
        self.with_8bit = bool(pairs.min() >= 0 and pairs.max() <= 255)  # values of 8 bits are on this scale
        stats = channel_stats(channels, mean, std)
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in stats)

    def scale(self, values: np.ndarray) -> np.ndarray:
        """(..., C) of any type -> float32, not clipped. Small integers fit into float32, others do not."""
        kind = np.float32 if values.dtype.itemsize <= 2 else np.float64
        values = (values - self.low.astype(kind)) / self.span.astype(kind)
        return values.astype(np.float32, copy=False)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 (C, H, W), scaled -> clipped, with mean and deviation taken out."""
        return pixels.clamp(0, 1).sub_(self.mean).div_(self.std).contiguous()


def depth_of(args) -> Depth | None:
    """For images with the settled `args.pixel_range` (and in_chans, mean, std); None for 8-bit ones.

    `args`: of a script, or a `WeightsFile`.
    """
    pixel_range, mean = getattr(args, "pixel_range", None), getattr(args, "mean", None)
    if not isinstance(pixel_range, tuple):
        return None
    channels = getattr(args, "in_chans", len(mean) if isinstance(mean, tuple | list) else 3)
    return Depth(pixel_range, channels, mean, getattr(args, "std", None))


def make_reader(channels: int, depth: Depth | None) -> Callable[[str], np.ndarray]:
    """What reads a file for a set: `read_image`, or `read_deep` where there is a depth."""
    if depth is None:
        return functools.partial(read_image, channels=channels)
    return functools.partial(read_deep, channels=channels, with_8bit=depth.with_8bit)


def view(path: str, size: int | tuple[int, int], channels: int, depth: Depth | None) -> torch.Tensor:
    """The centre of an image, as an evaluation of pre-training sees it: uint8 (C, H, W), or with `depth`
    float32, normalised. Raises BadImage.
    """
    return EvalTransform(size, depth)(make_reader(channels, depth)(path))


def unit(pixels: torch.Tensor, depth: Depth | None) -> torch.Tensor:
    """What `view` returned, to be shown: values in [0, 1]."""
    return pixels.float() / 255 if depth is None else (pixels * depth.std + depth.mean).clamp(0, 1)


def read_deep(path: str, channels: int, with_8bit: bool = False) -> np.ndarray:
    """Reads an image file of any depth in its own type: (height, width, channels).

    Args:
        with_8bit: files of 8 bits are read too, as `read_image` does.

    Raises:
        BadImage: as `read_image`; also pixels that are not finite.
    """
    try:
        with _open(path) as file:
            head = file.read(HEAD)
            if (reason := why_no_image(head)) is None and is_deep(head, file):
                from util.data.deep import decode, fit_channels

                array = fit_channels(decode(file, head, getattr(path, "page", 0)), channels, head)
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise ValueError("pixels that are not finite (NaN or infinite)")
                return array
        if reason or not with_8bit:
            raise ValueError(
                reason or "values of 8 bits, in a set of deeper images with another --pixel_range"
            )
    except Exception as error:  # on broken files parsers raise whatever they run into
        raise BadImage(path, _explain(error)) from None
    return read_image(path, channels)


def parse_range(values: Sequence, channels: int) -> tuple[float, ...] | None:
    """`--pixel_range` as a tuple; None for auto. Raises UserError for numbers that are no range."""
    if values is None or values in ("auto", ["auto"]):
        return None
    text = f"--pixel_range {range_text(values)}"
    if not all(isinstance(v, int | float) and abs(v) < 1e300 for v in values):
        raise UserError(f"{text}: must be auto, or numbers LOW HIGH")
    if len(values) not in (2, 2 * channels):
        raise UserError(f"{text}: {len(values)} numbers for --in_chans {channels}; give LOW HIGH once, or "
                        f"for each channel ({2 * channels} numbers)")  # fmt: skip
    if any(low >= high for low, high in zip(values[::2], values[1::2], strict=True)):
        raise UserError(f"{text}: LOW must be below HIGH")
    return tuple(map(float, values))


def same_range(one: Sequence[float] | None, other: Sequence[float] | None) -> bool:
    """Whether two settled ranges are the same, once or per channel."""
    if one is None or other is None:
        return one is other
    one, other = (np.array(v, dtype=np.float64).reshape(-1, 2) for v in (one, other))
    return len({1, len(one), len(other)}) <= 2 and bool(np.isclose(one, other, rtol=1e-6, atol=0).all())


def settle_pixel_range(own, stored: dict, source, channels: int) -> tuple[float, ...] | list | str | None:
    """What `--pixel_range` shall be with a file that says `stored` of its training (None: images of 8 bits).

    Args:
        own: as given: None or "auto", numbers, or settled.
        stored: its settings. Of a file without, `own` stays.

    Raises:
        UserError: another range was given than the file's images had.
    """
    if isinstance(stored.get("in_chans"), int):  # which the script may take from the file later
        channels = stored["in_chans"]
    theirs, given = stored.get("pixel_range"), parse_range(own, channels)
    try:
        theirs = None if theirs is None else parse_range(list(theirs), channels)
    except (UserError, TypeError, OverflowError):
        text = shown(stored["pixel_range"])
        raise UserError(f"{source}: is damaged, or of another --in_chans: pixel_range is {text}") from None
    if given and theirs and not same_range(given, theirs):
        raise UserError(f"--pixel_range {range_text(given)}: {source} was trained with {range_text(theirs)}; "
                        "leave the flag out")  # fmt: skip
    return theirs if theirs or (stored and not given) else own


def known_range(flags: Namespace, stored: dict, channels: int, source) -> tuple[float, ...] | None:
    """`settle_pixel_range` of `flags.pixel_range`, settled."""
    own = getattr(flags, "pixel_range", None)
    return parse_range(settle_pixel_range(own, stored, source, channels), channels)


def adopt_pixel_range(args: Namespace, content: dict, source: str, channels: int = 0) -> None:
    """Sets `args.pixel_range` to that of a loaded checkpoint of ours; UserError as `settle_pixel_range`.

    `channels`: of a new run from its weights; a range for each of another number is not taken.
    """
    info = content.get("model_info")
    stored = info if isinstance(info, dict) and info else content.get("args")
    if channels and isinstance(stored, dict) and stored.get("in_chans", channels) != channels:
        theirs = stored.get("pixel_range")
        if isinstance(theirs, list | tuple) and len(theirs) > 2:
            return
    if isinstance(stored, dict) and stored and (hasattr(args, "pixel_range") or "pixel_range" in stored):
        own = getattr(args, "pixel_range", None)
        args.pixel_range = settle_pixel_range(own, stored, source, getattr(args, "in_chans", 3))


def range_text(values: Sequence) -> str:
    """A range as it is written on a command line."""
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
