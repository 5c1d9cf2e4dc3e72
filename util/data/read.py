"""Reads 8-bit image files into arrays: JPEG through simplejpeg where that is exact, most through Pillow.

Both JPEG decoders are libjpeg-turbo with the same settings, so they give the same pixels; simplejpeg only
spends less time around them. Whatever it could see differently (CMYK, broken or unusual files) goes to
Pillow, the reference's decoder. Pictures are never rotated by EXIF, as in the reference.
"""

import io
import os
import stat
import warnings

import numpy as np
from PIL import Image

from util.data.headers import HEAD, NPY, OPTIONAL, TIFF, optional_format, why_no_image
from util.errors import UserError
from util.files import printable

try:
    import simplejpeg
except Exception:  # not installed, or its binary does not fit this numpy: Pillow does everything
    simplejpeg = None

IMG_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".tif",
                  ".tiff", ".webp", ".gif", ".npy",
                  *(name for names, there, _ in OPTIONAL.values() if there for name in names))  # fmt: skip
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's modes by number of channels

# Only what is listed: Pillow would also try formats that run other programs (EPS) or that nobody trains on.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
_JPEG = b"\xff\xd8\xff"

# Pillow's remarks about files that it reads all the same: every worker would print them.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(UserError):
    """A file that cannot be read as an image. Its text is one line: the file, then the reason.

    A DataLoader raises a worker's exception again with the worker's whole traceback as its only argument:
    `reason` is then that traceback's last line, which is this class's text in the worker, and `path` is None.
    """

    def __init__(self, path: str | None, reason: str | None = None):
        super().__init__(path, reason)
        if reason is None:
            path, reason = None, path.strip().rsplit("\n", 1)[-1].split("BadImage: ", 1)[-1]
        self.path, self.reason = path, " ".join(reason.split())

    def __str__(self) -> str:
        return printable(self.reason if self.path is None else f"{self.path}: {self.reason}")


def _open_regular(path: str, flags: int) -> int:
    """Opener that refuses pipes and devices, which would block for ever, without waiting for them."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError("a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file")
    return descriptor


def open_file(path: str) -> io.FileIO:
    """Opens for reading, unbuffered: a header is read in one call, and a whole file too."""
    return open(path, "rb", buffering=0, opener=_open_regular)


class Place(str):
    """Where an image's bytes are, under the name that is shown: `scan.tif#3` is the third page of a file.

    file: that holds it. page: number of the picture in it, from 0.
    """

    def __new__(cls, name: str, file: str = "", page: int = 0):
        place = super().__new__(cls, name)
        place.file, place.page = file or name, page
        return place

    def open(self) -> io.FileIO:
        """A binary file of the bytes, unbuffered, at its start."""
        return _open(self.file)


def _open(path: str) -> io.FileIO:
    """The one place where an image's bytes are opened."""
    return path.open() if isinstance(path, Place) else open_file(path)


def _explain(error: Exception) -> str:
    """The reason in few words, without the path, which the caller adds."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "a damaged header"
    if isinstance(error, (OSError, ValueError, UserError)):
        return getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {error}"  # what a parser stumbled over


def sniff_header(path: str) -> str | None:
    """Looks at the first bytes of a file: None when an image starts like this, whatever the file's name;
    otherwise the reason in few words."""
    try:
        if isinstance(path, Place):
            with path.open() as file:
                return why_no_image(file.read(HEAD))
        descriptor = _open_regular(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:  # half the time that a file object takes: this runs 100,000 times before a start
            return why_no_image(os.read(descriptor, HEAD))
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        return _explain(error)


def _decode_jpeg(data: bytes, channels: int) -> np.ndarray | None:
    """simplejpeg's decoding, or None where only Pillow's is trusted or Pillow shall say what is wrong."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("RGB", "YCbCr", "Gray"):
            return None  # CMYK would come out with other colours than Pillow's, silently
        if Image.MAX_IMAGE_PIXELS and height * width > 2 * Image.MAX_IMAGE_PIXELS:
            return None  # Pillow refuses it as a decompression bomb
        if channels == 3:
            return simplejpeg.decode_jpeg(data, "RGB")
        if channels == 1 and colorspace == "Gray":
            return simplejpeg.decode_jpeg(data, "GRAY")
    except Exception:  # it is strict, so this includes damage that Pillow passes over
        pass
    return None


def _decode_pil(file: io.FileIO, mode: str, page: int = 0, exact: bool = False) -> Image.Image:
    """Decodes and converts as Pillow does; deep grey is scaled and not clipped, or with `exact` refused.

    Raises ValueError also for an alpha channel that is wanted and not there, if `exact`.
    """
    if (kind := optional_format(file.read(HEAD))) == "HEIF":
        __import__("pillow_heif").register_heif_opener()
    elif kind == "JXL":
        __import__("pillow_jxl")
    file.seek(0)
    image = Image.open(io.BufferedReader(file), formats=[kind] if kind else _FORMATS)
    image.seek(page)
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits, or as a .npy array of integers")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
            raise ValueError("32-bit pixels outside 0..65535; save it with 8 or 16 bits")
        image = Image.fromarray((values // 256).astype(np.uint8))
    if exact and mode.endswith("A") and not image.has_transparency_data:
        raise ValueError(f"no alpha channel, where the model has {len(mode)} channels (--in_chans)")
    image.load()
    return image if image.mode == mode else image.convert(mode)


def _decode_npy(file: io.FileIO, channels: int) -> np.ndarray:
    array = np.load(file, allow_pickle=False)
    if array.ndim == 2 and channels == 1:
        array = array[:, :, None]
    if array.ndim != 3 or array.size == 0:
        raise ValueError(f"an array of shape {array.shape}; (height, width, channels) is read")
    if array.shape[2] != channels:
        raise ValueError(f"{array.shape[2]} channels where the model has {channels} (--in_chans)")
    return np.ascontiguousarray(array)


def _decode_8bit(file: io.FileIO, head: bytes, channels: int, page: int) -> Image.Image | np.ndarray:
    """What `read_image` returns, or a Pillow picture; ValueError for what is no such image."""
    from util.data.peek import is_deep, tiff_tags

    if reason := why_no_image(head):
        raise ValueError(reason)
    if is_deep(head, file):
        raise ValueError("values of more than 8 bits, in a set of 8-bit images; --pixel_range LOW HIGH says "
                         "which are to be black and white")  # fmt: skip
    if head.startswith(TIFF):
        tags = tiff_tags(file, page)
        bands, alpha = tags.get(277, 1), tags.get(338, ())
        # Of grey and RGB with more bands; CMYK and the like are Pillow's
        more = bands not in (1, 3) and (bands, channels) not in ((4, 3), (4, 1), (2, 1))
        if more and tags.get(262) in (1, 2):
            if bands != channels:
                raise ValueError(f"{bands} channels where the model has {channels} (--in_chans)")
            if alpha != (2,) or bands > 4:
                from util.data.deep import decode

                return np.ascontiguousarray(decode(file, head, page))
    file.seek(0)
    if head.startswith(NPY):
        return _decode_npy(file, channels)
    if channels not in MODES:
        raise ValueError(
            f"images of {channels} channels (--in_chans) are read from .npy arrays and TIFF only"
        )
    return _decode_pil(file, MODES[channels], page, exact=True)


def open_pil(path: str, mode: str = "RGB") -> Image.Image:
    """Reads a file with Pillow, decoded and converted to `mode` ("L", "LA", "RGB" or "RGBA").

    16-bit grey becomes value // 256. Of files with several pictures, the first.

    Raises:
        BadImage: the file cannot be read, is damaged, or is larger than Pillow's limit for suspicious files.
    """
    try:
        with _open(path) as file:
            if reason := why_no_image(file.read(HEAD)):
                raise ValueError(reason)
            file.seek(0)
            return _decode_pil(file, mode)
    except Exception as error:  # on broken files Pillow raises whatever its parsers run into
        raise BadImage(path, _explain(error)) from None


def read_picture(path: str, channels: int) -> Image.Image:
    """The same as a Pillow picture, of 1 to 4 channels; JPEG always through Pillow."""
    image = _read(path, channels, use_simplejpeg=False)
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image[:, :, 0] if channels == 1 else image)


def read_image(path: str, channels: int = 3, use_simplejpeg: bool | None = None) -> np.ndarray:
    """Reads an image file of 8 bits, brought to a number of channels.

    Files of any mode become grey (1 channel), grey and alpha (2), RGB (3) or RGBA (4) as Pillow converts them
    (to RGB: alpha is dropped); none gets an alpha that it does not have. Other numbers of channels come from
    TIFFs and from `.npy` arrays, (height, width, channels), which are never converted. What a file is, its
    first bytes say, not its name. Of several pages, `path.page` of a Place, else the first.

    Args:
        use_simplejpeg: False decodes JPEG with Pillow even where simplejpeg is installed. Same pixels.

    Returns:
        uint8 (height, width, channels), contiguous and writable.

    Raises:
        BadImage: the file cannot be read, is damaged, has pixels or channels that do not fit, or is larger
            than Pillow's limit for suspicious files.
    """
    image = _read(path, channels, use_simplejpeg)
    if isinstance(image, Image.Image):
        image = np.array(image)  # a copy: torch warns about read-only arrays
    return image.reshape(*image.shape[:2], channels)


def _read(path: str, channels: int, use_simplejpeg: bool | None) -> Image.Image | np.ndarray:
    try:
        with _open(path) as file:
            head = file.read(HEAD)
            if head.startswith(_JPEG) and channels in (1, 3) and simplejpeg and use_simplejpeg is not False:
                file.seek(0)
                image = _decode_jpeg(file.readall(), channels)
                if image is not None:
                    return image
            return _decode_8bit(file, head, channels, getattr(path, "page", 0))
    except Exception as error:  # on broken files Pillow and numpy raise whatever their parsers run into
        raise BadImage(path, _explain(error)) from None
