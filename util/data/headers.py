"""What an image file says of itself before any pixel is decoded: format, depth, alpha, pages."""

import re
from importlib.util import find_spec
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, features
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from util.errors import UserError

HEAD = 256  # bytes of a file that are looked at first
PNG, NPY, DICOM = b"\x89PNG\r\n\x1a\n", b"\x93NUMPY", b"DICM"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JPEG2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
# Formats that not every installation reads: Pillow's name, or DICOM; extensions; whether they are read here;
# what to install
OPTIONAL = {
    "AVIF": ((".avif",), features.check("avif"), "-U pillow"),
    "JPEG2000": ((".jp2", ".j2k", ".j2c", ".jpx"), features.check("jpg_2000"), "-U pillow"),
    "HEIF": ((".heic", ".heif"), find_spec("pillow_heif"), "pillow-heif"),
    "JXL": ((".jxl",), find_spec("pillow_jxl"), "pillow-jxl-plugin"),
    "DICOM": ((".dcm", ".dicom"), find_spec("pydicom"), "pydicom"),
}
_MAGIC = (b"\xff\xd8\xff", NPY, PNG, b"GIF8", *TIFF)
_WEAK_MAGIC = re.compile(rb"RIFF....WEBP|BM.{4}.*\0|P[1-6][\s#]", re.DOTALL)
_HEIF = re.compile(rb"....ftyp(avi[fs]|hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL)
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


def is_dicom(head: bytes) -> bool:
    return head[128:132] == DICOM


def optional_format(head: bytes) -> str | None:
    """The format of OPTIONAL that a file starts like."""
    if found := _HEIF.match(head):
        return "AVIF" if b"avi" in found[1] or b"avif" in head[16:64] else "HEIF"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "JXL"
    return "JPEG2000" if head.startswith(JPEG2000) else "DICOM" if is_dicom(head) else None


def why_no_image(head: bytes) -> str | None:
    """Why a file that starts with `head` (HEAD bytes, or all there are) is no image; None: it may be one."""
    if not head:
        return "empty file"
    if head.startswith(_MAGIC) or _WEAK_MAGIC.match(head[:32]):
        return None
    if kind := optional_format(head):
        return None if OPTIONAL[kind][1] else f"{kind} is not read here: pip install {OPTIONAL[kind][2]}"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the picture (run git lfs pull)"
    return f"no image format known here (it starts with {head[:12]!r})"


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
        return Header(
            deep, tags.get(277, 1) in (2, 4) and tags.get(262) in (1, 2), tuple(tiff_tags(file, None))
        )
    if is_dicom(head):
        tags = need("pydicom", "a DICOM file").dcmread(_rewound(file), stop_before_pixels=True)
        return Header(True, pages=tuple(range(int(tags.get("NumberOfFrames") or 1))))
    if head.startswith((b"GIF8", b"RIFF")):
        image = Image.open(_rewound(file), formats=("GIF", "WEBP"))
        return Header(False, image.has_transparency_data, tuple(range(getattr(image, "n_frames", 1))))
    return Header(deep)


def _rewound(file: BinaryIO) -> BinaryIO:
    file.seek(0)
    return file
