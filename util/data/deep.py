"""Decodes image files in their own type, of any depth and number of bands; imported where it is needed."""

import io
import logging
import re
from typing import BinaryIO

import numpy as np
from PIL import Image

from util.data.headers import NPY, PNG, TIFF, is_dicom
from util.data.peek import array_header, need, read_dicom

_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, Pillow's


def decode(file: BinaryIO, head: bytes, page: int) -> np.ndarray:
    """Pixels (H, W, C) in the file's own type and byte order of this machine.

    Args:
        head: the file's first bytes. page: number of the picture in it, from 0.

    Raises:
        ValueError: no pixels that can be read. What parsers raise on damaged files goes through.
    """
    if head.startswith(TIFF):
        array = _decode_tiff(file, page)
    elif is_dicom(head):
        array = _decode_dicom(file, page)
    else:
        if page:
            raise ValueError(f"no page {page + 1}")
        kinds = (NPY, _decode_npy), (PNG, _decode_png), (b"P", _decode_pnm), (b"", _decode_jpeg2000)
        array = next(decoder for start, decoder in kinds if head.startswith(start))(file)
    if array.dtype.kind not in "iufb" or array.dtype.itemsize > 8:
        raise ValueError(f"pixels of the type {array.dtype}; integers and floating-point numbers are read")
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or array.size == 0:
        raise ValueError(f"an array of shape {array.shape}; (height, width, channels) is read")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def fit_channels(array: np.ndarray, channels: int, head: bytes) -> np.ndarray:
    """Brings (H, W, C) to a number of channels; ValueError where nobody can have meant it.

    Grey becomes RGB and RGB grey, and a PNG's alpha is dropped; arrays are never converted.
    """
    found = array.shape[2]
    if found == channels:
        return array
    if head.startswith(PNG) and found in (2, 4) and channels in (1, 3):
        array = array[:, :, : found - 1]
    if not head.startswith(NPY) and (array.shape[2], channels) == (1, 3):
        return np.repeat(array, 3, axis=2)
    if not head.startswith(NPY) and (array.shape[2], channels) == (3, 1):
        return (array.astype(np.float32) @ _GREY)[:, :, None]
    if array.shape[2] != channels:
        raise ValueError(f"{found} channels where the model has {channels} (--in_chans)")
    return array


def check_size(height: int, width: int) -> None:
    """Raises ValueError above Pillow's limit for suspicious files."""
    if Image.MAX_IMAGE_PIXELS and height * width > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels, which could be a decompression bomb")


def _decode_npy(file: BinaryIO) -> np.ndarray:
    array_header(file)
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _decode_png(file: BinaryIO) -> np.ndarray:
    """Pillow keeps 16 bits of grey only. Of colours it unpacks the high bytes, or told that the low ones come
    first, those; a grey and an alpha value are as long as four bytes.
    """

    file.seek(0)
    data = file.read()
    bands = {0: "", 2: "RGB", 4: "LA", 6: "RGBA"}.get(data[25])

    def unpack(raw: str | None) -> np.ndarray:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if raw:
            image.tile = [(*tile[:3], raw) for tile in image.tile]
        return np.asarray(image)

    if not bands:
        return unpack(None)
    if bands == "LA":
        return unpack("RGBA").view(">u2")
    return unpack(f"{bands};16B").astype(np.uint16) << 8 | unpack(f"{bands};16L")


def _decode_pnm(file: BinaryIO) -> np.ndarray:
    file.seek(0)
    data = file.read()
    header = re.match(rb"P([56])" + 3 * rb"(?:\s+|#[^\n]*\n)+(\d+)" + rb"\s", data)
    if header is None:
        raise ValueError("a PNM file of numbers as text, of more than 8 bits")
    kind, width, height, _ = map(int, header.groups())
    shape = (height, width, 3 if kind == 6 else 1)
    check_size(height, width)
    return np.frombuffer(data, ">u2", int(np.prod(shape)), header.end()).reshape(shape)


def _decode_jpeg2000(file: BinaryIO) -> np.ndarray:
    file.seek(0)
    image = Image.open(file, formats=["JPEG2000"])
    if not image.mode.startswith("I"):
        raise ValueError("a JPEG 2000 of several bands of more than 8 bits, of which Pillow reads 8; "
                         "save it as TIFF or .npy")  # fmt: skip
    return np.asarray(image)


def _decode_tiff(file: BinaryIO, number: int) -> np.ndarray:
    tifffile = need("tifffile", "a TIFF of more than 8 bits, or of other bands than colours")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its remarks: every worker would print them
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        if number >= len(tiff.pages):
            raise ValueError(f"no page {number + 1}: it has {len(tiff.pages)}")
        page = tiff.pages[number]
        if page.dtype is None or page.dtype.kind not in "iufb":
            raise ValueError(f"pixels of the type {page.dtype or 'unknown'}; integers and floating-point "
                             "numbers are read")  # fmt: skip
        check_size(page.imagelength, page.imagewidth)
        try:
            array = page.asarray()
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise ValueError(f"{page.compression.name} compression: pip install imagecodecs") from None
            raise
    if page.axes not in ("YX", "YXS", "SYX"):
        raise ValueError(f"a TIFF of the axes {page.axes}; pictures of YX, YXS or SYX are read")
    return np.moveaxis(array, 0, 2) if page.axes == "SYX" else array


def _decode_dicom(file: BinaryIO, number: int) -> np.ndarray:
    """The values that the scanner meant: rescaled, and bright where there is much, whatever is stored."""
    from pydicom.pixels import apply_modality_lut, pixel_array

    data = read_dicom(file)
    if "PixelData" not in data:
        raise ValueError("a DICOM file without pixels")
    needed = "Rows", "Columns", "BitsStored", "PixelRepresentation", "PhotometricInterpretation"
    if missing := [name for name in needed if name not in data]:
        raise ValueError(f"a damaged DICOM file: without {', '.join(missing)}")
    check_size(data.Rows, data.Columns)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        raise ValueError("a DICOM file of palette colours; save it as PNG")
    array = apply_modality_lut(pixel_array(data, index=number), data)
    if data.PhotometricInterpretation == "MONOCHROME1":
        array = sum(_span(data)) - array.astype(np.float64)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def declared_range(head: bytes, file: BinaryIO) -> tuple[float, float] | None:
    """Lowest and highest value that a file's header allows, after DICOM's rescaling; None: it says none."""
    return _span(read_dicom(file, pixels=False)) if is_dicom(head) else None


def _span(data) -> tuple[float, float]:
    bits, signed = data.BitsStored, data.PixelRepresentation
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if sequence := data.get("ModalityLUTSequence"):
        values = np.asarray(sequence[0].LUTData)
        return float(values.min()), float(values.max())
    slope, shift = float(data.get("RescaleSlope", 1) or 1), float(data.get("RescaleIntercept", 0) or 0)
    return tuple(sorted((low * slope + shift, high * slope + shift)))
