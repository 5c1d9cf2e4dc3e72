"""One image of a data set copied, made smaller where it is large; see `tools.resize_dataset`."""

import errno
import os
import shutil

import numpy as np
from PIL import Image

from util.data.read import BadImage, open_pil, read_image, sniff_header
from util.files import printable, replacing

_FORMATS = {"MPO": "JPEG", "GIF": "PNG"}  # what is written for them; the others stay what they are
_OPTIONS = {"TIFF": {"compression": "tiff_deflate"}, "JPEG": {"subsampling": "4:2:0"}}


class CannotWrite(Exception):
    """A file of DST, and why it could not be written."""


def small_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(width, height) with the shorter side `short`, or `size` where it is no longer than that."""
    if min(size) <= short:
        return size
    return tuple(max(short, round(side * short / min(size))) for side in size)


def colour_mode(image: Image.Image) -> str:
    """The mode that an image is copied in: "L", "LA", "RGB" or "RGBA"."""
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        return "L"
    if image.mode in ("LA", "La"):
        return "LA"
    alpha = image.mode in ("RGBA", "RGBa", "PA") or (image.mode == "P" and "transparency" in image.info)
    return "RGBA" if alpha else "RGB"


def scale(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bicubic with antialiasing, each channel for itself: Pillow would mix alpha into the colours, where the
    loader drops it.
    """
    bands = [band.resize(size, Image.Resampling.BICUBIC) for band in image.split()]
    return Image.merge(image.mode, bands) if len(bands) > 1 else bands[0]


def output_name(name: str, source: str) -> str:
    """Path of the copy relative to DST; `source` is the file itself."""
    if not name.lower().endswith(".gif"):
        return name
    if os.path.lexists(source + ".png"):
        raise BadImage(source, f"its copy would be {os.path.basename(name)}.png, which is there already")
    return name + ".png"


def copy_image(source: str, target: str, spare: str, short: int, quality: int) -> str:
    """Writes the copy of one image, by way of a file in the folder `spare`; returns "scaled" or "copied".

    The copy gets the source's time of modification, by which a later run knows that it is done.

    Raises:
        BadImage: `source` cannot be read. CannotWrite: `target` cannot be written.
    """
    if reason := sniff_header(source):
        raise BadImage(source, reason)
    try:
        times = os.stat(source)
        content, options = _small_copy(source, short, quality)
    except OSError as error:
        raise BadImage(source, error.strerror or str(error)) from None
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with replacing(
            target, spare, flush=False
        ) as temporary:  # a power cut costs some images, said to be done
            if content is None:
                shutil.copyfile(source, temporary)
            elif isinstance(content, np.ndarray):
                with open(temporary, "wb") as file:  # np.save would give a path its own extension
                    np.save(file, content)
            else:
                content.save(temporary, **options)
            os.utime(temporary, ns=(times.st_mtime_ns, times.st_mtime_ns))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise BadImage(source, "the name of its copy would be too long") from None
        raise CannotWrite(f"{printable(target)}: {error.strerror or error}") from None
    return "copied" if content is None else "scaled"


def _small_copy(source: str, short: int, quality: int) -> tuple[Image.Image | np.ndarray | None, dict]:
    """The scaled image and how to save it; None: it is small enough (it has been decoded all the same)."""
    with open(source, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            return _small_array(source, short), {}
        file.seek(0)
        try:
            with Image.open(file) as header:
                kind, size, mode = header.format, header.size, colour_mode(header)
        except Exception as error:  # damaged: Pillow raises whatever it runs into
            open_pil(source)  # has better words for it
            raise BadImage(source, str(error)) from None
    image = open_pil(source, mode)
    if min(size) <= short and kind != "GIF":
        return None, {}
    kind = _FORMATS.get(kind, kind)
    lossy = {"quality": quality} if kind in ("JPEG", "WEBP") else {}
    return scale(image, small_size(size, short)), {"format": kind, **lossy, **_OPTIONS.get(kind, {})}


def _small_array(source: str, short: int) -> np.ndarray | None:
    """The same for a .npy array: uint8 (height, width, channels), or (height, width) if it was that."""
    try:
        shape = np.load(source, mmap_mode="r", allow_pickle=False).shape
    except (ValueError, EOFError) as error:
        raise BadImage(source, str(error)) from None
    array = read_image(source, shape[2] if len(shape) == 3 else 1)
    if min(shape[:2]) <= short:
        return None
    width, height = small_size((shape[1], shape[0]), short)
    bands = [np.asarray(scale(Image.fromarray(band), (width, height))) for band in np.moveaxis(array, 2, 0)]
    return np.stack(bands, axis=2) if len(shape) == 3 else bands[0]
