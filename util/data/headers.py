"""What the first bytes of a file say: which image format it is, and whether that is read here."""

import re
from importlib.util import find_spec

from PIL import features

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
