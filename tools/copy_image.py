"""One image of a data set copied, made smaller where it is large; see `tools.resize_dataset`."""

import errno
import os
import shutil
from typing import BinaryIO

import numpy as np
from PIL import Image

from util.data.deep import decode
from util.data.headers import HEAD, NPY, PNG, TIFF, optional_format
from util.data.peek import array_header, is_deep, need, tiff_tags
from util.data.read import BadImage, open_pil, sniff_header
from util.errors import UserError
from util.files import printable, replacing

_FORMATS = {"MPO": "JPEG", "GIF": "PNG"}  # what is written for them; the others stay what they are
KEPT = "kept"  # in full size, because a smaller copy would lose something
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
    """Writes the copy of one image, by way of a file in the folder `spare`; "scaled", "copied" or KEPT.

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
        with replacing(target, spare, flush=False) as temporary:  # a power cut costs some, said to be done
            if content is None or content is KEPT:
                shutil.copyfile(source, temporary)
            elif isinstance(content, np.ndarray) and options:
                tifffile = need("tifffile", "a TIFF of more than 8 bits or of many bands")
                tifffile.imwrite(temporary, content, **options)
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
    return "copied" if content is None else KEPT if content is KEPT else "scaled"


def _small_copy(source: str, short: int, quality: int) -> tuple[Image.Image | np.ndarray | str | None, dict]:
    """The scaled image and how to save it; None: it is small enough (it has been decoded all the same).

    KEPT: it would lose pages, or is of a depth or format that is not written here.
    """
    with open(source, "rb") as file:
        head = file.read(HEAD)
        try:
            if head.startswith(TIFF) and not head.startswith(b"MM\0+"):
                tags, pages = tiff_tags(file), tiff_tags(file, None)
                if len(pages) > 1:
                    return KEPT, {}
                many = tags.get(277, 1) > 3 and tags.get(262) in (1, 2) and tags.get(338) != (2,)
            else:
                many = False
            if head.startswith(NPY) or many or is_deep(head, file):
                return _small_array(file, head, short)
            if optional_format(head):
                return KEPT, {}
        except UserError:
            raise
        except Exception as error:  # damaged: parsers raise whatever they run into
            raise BadImage(source, str(error) or type(error).__name__) from None
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


def _small_array(
    file: BinaryIO, head: bytes, short: int
) -> tuple[Image.Image | np.ndarray | str | None, dict]:
    """The same for arrays, TIFFs of many bands, and all that is deeper than 8 bits; type and bands stay."""
    array = decode(file, head, 0)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("pixels that are not finite (NaN or infinite)")
    height, width, bands = array.shape
    if min(height, width) <= short:
        return None, {}
    size = small_size((width, height), short)
    small = np.stack([_scale_band(array[:, :, i], size) for i in range(bands)], axis=2)
    if head.startswith(NPY):
        return (small if len(array_header(file)[0]) == 3 else small[:, :, 0]), {}
    if head.startswith(PNG) and bands == 1:
        return Image.fromarray(small[:, :, 0]), {"format": "PNG"}
    if head.startswith(TIFF):
        colours = "rgb" if bands == 3 and array.dtype.kind == "u" else "minisblack"
        layout = {"planarconfig": "contig"} if bands > 1 else {}
        return small.squeeze(), {"compression": "zlib", "photometric": colours, **layout}
    return KEPT, {}


def _scale_band(band: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) of any type -> the same type, in float32 from its lowest value on: exact to 1e-7 of its span."""
    if band.dtype == np.uint8:
        return np.asarray(scale(Image.fromarray(band), size))
    low = band.min().astype(np.float64)
    shifted = Image.fromarray((band - low).astype(np.float32))
    values = np.asarray(scale(shifted, size)).astype(np.float64) + low
    if band.dtype.kind in "iu":
        limits = np.iinfo(band.dtype)
        values = values.round().clip(limits.min, limits.max)
    return values.astype(band.dtype)
