"""What an image file says of itself before any pixel is decoded: depth, alpha, pages."""

import re
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from util.data.headers import JPEG2000, NPY, PNG, TIFF, is_dicom
from util.errors import UserError

_PACKAGES = {"tifffile": "tifffile imagecodecs"}


class Header(NamedTuple):
    """deep: values of more than 8 bits, signed ones or fractions. alpha: a transparency beside the colours.

    pages: numbers of the pictures in the file, from 0; thumbnails and smaller copies are none.
    """

    deep: bool
    alpha: bool = False
    pages: tuple[int, ...] = (0,)


def need(package: str, what: str):
    """Imports an optional package; UserError with the `pip install` where it is missing."""
    try:
        return __import__(package)
    except ImportError:
        name = _PACKAGES.get(package, package)
        raise UserError(f"{what}: needs a package that is not installed: pip install {name}") from None


def array_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, type) of a `.npy` file; ValueError where it holds objects or less than it says."""
    file.seek(0)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f".npy of version {version[0]}.{version[1]}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects (a pickle), which could run code: it is not read")
    start = file.tell()
    if start + dtype.itemsize * float(np.prod(shape, dtype=float)) > file.seek(0, 2):
        raise ValueError(
            f"a damaged array: its header says {'x'.join(map(str, shape))}, the file ends before"
        )
    return shape, dtype


def tiff_tags(file: BinaryIO, page: int | None = 0) -> dict | list[int]:
    """The tags of a page of a TIFF; of None, the numbers of all pages that are no smaller copies or masks."""
    file.seek(0)
    head = file.read(16)
    tags = ImageFileDirectory_v2(head if head[2] == 43 else head[:8])
    where, seen, pages = tags.next, set(), []
    while where and where not in seen:
        file.seek(where)
        tags.load(file)
        if page is not None and len(seen) == page:
            return dict(tags)
        if not seen or not tags.get(254, 0) & 5:
            pages.append(len(seen))
        seen.add(where)
        where = tags.next
    if page is not None:
        raise ValueError(f"no page {page + 1}: it has {len(seen)}")
    return pages


def is_deep(head: bytes, file: BinaryIO) -> bool:
    """Whether a file's values are others than 0 to 255; `head`: its first HEAD bytes."""
    if head.startswith(PNG):
        return head[24:25] == b"\x10"
    if head.startswith(NPY):
        return array_header(file)[1] != np.uint8
    if head.startswith(TIFF):
        if head.startswith(b"MM\0+"):  # Pillow reads its tags wrongly
            return True
        tags = tiff_tags(file)
        return max(tags.get(258, (1,))) > 8 or not {*tags.get(339, (1,))} <= {1, 4}
    if re.match(rb"P[2356]\s", head):
        words = re.sub(rb"#[^\n]*\n", b" ", head).split(None, 4)
        return len(words) > 3 and words[3].isdigit() and int(words[3]) > 255
    if head.startswith(JPEG2000):
        file.seek(0)
        start = (text := file.read(4096)).find(JPEG2000[1])
        return start >= 0 and text[start + 42 : start + 43] > b"" and text[start + 42] & 127 > 7
    return is_dicom(head)


def read_header(head: bytes, file: BinaryIO) -> Header:
    """What is said of a file without decoding it; what its parsers raise goes through."""
    if head.startswith(b"\xff\xd8\xff"):
        return Header(False)
    deep = is_deep(head, file)
    if head.startswith(PNG):
        return Header(deep, head[25] in (4, 6))
    if head.startswith(TIFF) and not head.startswith(b"MM\0+"):
        tags = tiff_tags(file)
        alpha = tags.get(277, 1) in (2, 4) and tags.get(262) in (1, 2)
        return Header(deep, alpha, tuple(tiff_tags(file, None)))
    if is_dicom(head):
        tags = read_dicom(file, pixels=False)
        return Header(True, pages=tuple(range(int(tags.get("NumberOfFrames") or 1))))
    if head.startswith((b"GIF8", b"RIFF")):
        file.seek(0)
        image = Image.open(file, formats=("GIF", "WEBP"))
        return Header(False, image.has_transparency_data, tuple(range(getattr(image, "n_frames", 1))))
    return Header(deep)


def read_dicom(file: BinaryIO, pixels: bool = True):
    """A file's DICOM elements, as pydicom has them; UserError without it."""
    pydicom = need("pydicom", "a DICOM file")
    file.seek(0)
    return pydicom.dcmread(file, stop_before_pixels=not pixels)
