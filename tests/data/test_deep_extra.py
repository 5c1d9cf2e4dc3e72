"""TIFF through tifffile and DICOM through pydicom, compared with readings of their own."""

import argparse

import numpy as np
import pytest
from PIL import Image

from util.data import headers
from util.data.depth import depth_of, read_deep, view
from util.data.read import BadImage, read_image
from util.datasets import build_pretrain_dataset
from util.errors import UserError

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 10_000, (40, 50, 13)).astype(np.uint16)


def namespace(path, **more):
    return argparse.Namespace(**{"data_path": path, "input_size": 16, "seed": 3, **more})


@pytest.fixture
def tifffile():
    return pytest.importorskip("tifffile")


@pytest.mark.extra
@pytest.mark.parametrize("options", [
    {}, {"compression": "zlib"}, {"compression": "zlib", "predictor": True}, {"tile": (16, 32)},
    {"tile": (16, 16), "compression": "zlib"}, {"planarconfig": "separate"}, {"bigtiff": True},
    {"byteorder": ">"}, {"byteorder": ">", "bigtiff": True}, {"rowsperstrip": 7},
    {"compression": "lzw"}, {"compression": "zstd", "tile": (16, 16)},
], ids=str)  # fmt: skip
def test_13_bands_of_16_bits(tmp_path, tifffile, options):
    if options.get("compression") in ("lzw", "zstd") or options.get("predictor"):
        pytest.importorskip("imagecodecs")
    array = np.moveaxis(BANDS, 2, 0) if options.get("planarconfig") else BANDS
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, array, photometric="minisblack", **{"planarconfig": "contig", **options})
    found = read_deep(path, 13)
    assert found.dtype == np.uint16 and np.array_equal(found, BANDS)
    args = namespace(tmp_path, in_chans=13)
    dataset = build_pretrain_dataset(args)
    assert dataset[0, 0][0].shape == (13, 16, 16) and len(args.pixel_range) == 26
    with pytest.raises(BadImage, match=r"13 channels where the model has 3 \(--in_chans\)"):
        read_deep(path, 3)


@pytest.mark.extra
@pytest.mark.parametrize(
    "dtype", ["int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_every_type(tmp_path, tifffile, dtype, bands):
    array = (RNG.normal(size=(20, 30, bands)) * 100).astype(dtype)
    path = str(tmp_path / "a.tif")
    photometric = "rgb" if bands == 3 and array.dtype.kind == "u" else "minisblack"
    tifffile.imwrite(
        path, array if bands > 1 else array[..., 0], photometric=photometric, planarconfig="contig"
    )
    found = read_deep(path, bands)
    assert found.dtype == array.dtype and np.array_equal(found, array)
    with pytest.raises(BadImage, match="more than 8 bits"):
        read_image(path, bands)
    low, high = float(array.min()), float(array.max())
    args = namespace(tmp_path, in_chans=bands, pixel_range=(low, high), mean=[0.0], std=[1.0])
    sample = view(path, (20, 30), bands, depth_of(args)).permute(1, 2, 0).numpy()
    assert (
        np.abs(sample - (tifffile.imread(path).reshape(array.shape).astype(float) - low) / (high - low)).max()
        < 1e-6
    )


@pytest.mark.extra
@pytest.mark.parametrize("extra", [[0], [1], [2]])
def test_four_bands_of_8_bits_whatever_is_said_of_the_fourth(tmp_path, tifffile, extra, capsys):
    """Pillow leaves out one of unknown meaning, and divides by one that is called associated alpha."""
    array = RNG.integers(0, 256, (20, 30, 4)).astype(np.uint8)
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, array, photometric="rgb", extrasamples=extra, planarconfig="contig")
    np.testing.assert_array_equal(read_image(path, 4), array)
    build_pretrain_dataset(namespace(tmp_path))
    assert "a fourth band, which is dropped" in capsys.readouterr().err
    if extra != [1]:
        np.testing.assert_array_equal(read_image(path, 3), array[..., :3])
    with pytest.raises(BadImage, match="4 channels where the model has 13"):
        read_image(path, 13)


@pytest.mark.extra
@pytest.mark.parametrize("bands", [2, 5, 7, 13])
def test_bands_of_8_bits(tmp_path, tifffile, bands):
    array = RNG.integers(0, 256, (20, 30, bands)).astype(np.uint8)
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, array, photometric="minisblack", planarconfig="contig", compression="zlib")
    found = read_image(path, bands)
    assert found.dtype == np.uint8 and np.array_equal(found, array)
    with pytest.raises(BadImage, match=f"{bands} channels where the model has 3"):
        read_image(path, 3)
    args = namespace(tmp_path, in_chans=bands)
    assert build_pretrain_dataset(args)[0, 0][0].shape[0] == bands and args.pixel_range is None


@pytest.mark.extra
def test_pages_of_deep_tiffs(tmp_path, tifffile):
    pages = RNG.integers(0, 4096, (3, 20, 30)).astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in pages:
            file.write(page, contiguous=False, photometric="minisblack")
    dataset = build_pretrain_dataset(namespace(tmp_path, in_chans=1, pages="all"))
    assert len(dataset) == 3
    for i in range(3):
        np.testing.assert_array_equal(dataset.decode(dataset.files.paths[i])[..., 0], pages[i])


@pytest.mark.extra
def test_tiffs_that_are_refused(tmp_path, tifffile):
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, np.zeros((4, 5), np.complex64))
    with pytest.raises(BadImage, match="type complex64"):
        read_deep(path, 1)
    tifffile.imwrite(path, np.zeros((16, 32, 32), np.uint16), volumetric=True, tile=(16, 16, 16))
    with pytest.raises(BadImage, match="axes ZYX"):
        read_deep(path, 1)
    tifffile.imwrite(path, np.zeros((40, 50), np.uint16), compression="zlib")
    data = (tmp_path / "a.tif").read_bytes()
    for width in (256, 257):  # the tags of width and height
        at = data.index(width.to_bytes(2, "little"))
        data = data[: at + 8] + (1_000_000).to_bytes(4, "little") + data[at + 12 :]
        data = data[: at + 2] + (4).to_bytes(2, "little") + data[at + 4 :]
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(BadImage, match="1000000 x 1000000 pixels, which could be a decompression bomb"):
        read_deep(path, 1)


@pytest.mark.extra
def test_mutated_tiffs_are_read_or_refused(tmp_path, tifffile):
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, BANDS[..., :4], photometric="minisblack", compression="zlib", planarconfig="contig"
    )
    data, rng, outcomes = path.read_bytes(), np.random.default_rng(1), set()
    for _ in range(80):
        changed = np.frombuffer(data, np.uint8).copy()
        spots = rng.integers(0, 400 if rng.random() < 0.7 else len(data), rng.integers(1, 6))
        changed[spots] = rng.integers(0, 256, len(spots))
        path.write_bytes(changed.tobytes())
        for reader in (read_deep, read_image):
            try:
                reader(str(path), 4)
                outcomes.add("read")
            except BadImage as error:
                assert "\n" not in str(error)
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_without_tifffile_its_files_say_what_to_install(tmp_path, monkeypatch):
    Image.fromarray(BANDS[..., 0]).save(tmp_path / "a.tif")
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(
        BadImage, match=r"a\.tif: a TIFF of more than 8 bits.*pip install tifffile imagecodecs"
    ):
        read_deep(str(tmp_path / "a.tif"), 1)
    with pytest.raises(UserError, match="pip install tifffile imagecodecs"):
        build_pretrain_dataset(namespace(tmp_path, in_chans=1))


# ---------------------------------------------------------------- DICOM


def write_dicom(
    path, stored, bits=12, signed=False, slope=None, intercept=None, kind="MONOCHROME2", frames=1
):
    """A file as a scanner writes it; `stored`: the numbers in it, (H, W) or (frames, H, W) or (H, W, 3)."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    colour = kind == "RGB"
    data.Rows, data.Columns = stored.shape[:2] if colour else stored.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = (3 if colour else 1), kind
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated = 8 * stored.dtype.itemsize
    data.BitsStored, data.HighBit, data.PixelRepresentation = bits, bits - 1, int(signed)
    if frames > 1:
        data.NumberOfFrames = frames
    if slope is not None:
        data.RescaleSlope, data.RescaleIntercept = slope, intercept
    data.PixelData = stored.tobytes()
    data["PixelData"].VR = "OB" if stored.dtype.itemsize == 1 else "OW"
    data.save_as(path, enforce_file_format=True)
    return str(path)


@pytest.fixture
def pydicom(monkeypatch):
    return pytest.importorskip("pydicom")


@pytest.mark.extra
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("slope, intercept", [(None, None), (2.5, -1024)])
@pytest.mark.parametrize("signed", [False, True])
def test_dicom_values_and_range(tmp_path, pydicom, kind, slope, intercept, signed):
    stored = RNG.integers(-2000 if signed else 0, 2000, (30, 40)).astype(np.int16 if signed else np.uint16)
    path = write_dicom(tmp_path / "a.dcm", stored, 12, signed, slope, intercept, kind)
    ends = np.array([-2048, 2047] if signed else [0, 4095]) * (slope or 1) + (intercept or 0)
    values = pydicom.dcmread(path).pixel_array.astype(float) * (slope or 1) + (intercept or 0)
    if kind == "MONOCHROME1":
        values = ends.sum() - values
    found = read_deep(path, 1)[..., 0]
    assert np.abs(found - values).max() <= 1e-6 * np.ptp(ends)
    args = namespace(tmp_path, in_chans=1, mean=[0.0], std=[1.0])
    dataset = build_pretrain_dataset(args)
    assert args.pixel_range == tuple(map(float, ends)) and "as the files declare" in dataset.describe()
    sample = view(path, (30, 40), 1, depth_of(args))[0].numpy()
    assert np.abs(sample - (values - ends[0]) / (ends[1] - ends[0])).max() < 1e-6


@pytest.mark.extra
def test_a_12_bit_ramp_of_a_dicom_arrives(tmp_path, pydicom):
    write_dicom(tmp_path / "a.dcm", np.arange(4096, dtype=np.uint16).reshape(64, 64))
    args = namespace(tmp_path, in_chans=1, input_size=64)
    build_pretrain_dataset(args)
    assert len(view(str(tmp_path / "a.dcm"), 64, 1, depth_of(args)).unique()) == 4096


@pytest.mark.extra
def test_dicom_colours_and_frames(tmp_path, pydicom):
    colours = RNG.integers(0, 256, (8, 10, 3)).astype(np.uint8)
    np.testing.assert_array_equal(
        read_deep(write_dicom(tmp_path / "c.dcm", colours, 8, kind="RGB"), 3), colours
    )
    frames = RNG.integers(0, 4096, (3, 8, 10)).astype(np.uint16)
    (tmp_path / "frames").mkdir()
    path = write_dicom(tmp_path / "frames" / "a.dcm", frames, frames=3)
    np.testing.assert_array_equal(read_deep(path, 1)[..., 0], frames[0])
    dataset = build_pretrain_dataset(namespace(tmp_path / "frames", in_chans=1, pages="all"))
    assert [path.rsplit("/", 1)[1] for path in dataset.files.paths] == ["a.dcm#1", "a.dcm#2", "a.dcm#3"]
    for i in range(3):
        np.testing.assert_array_equal(dataset.decode(dataset.files.paths[i])[..., 0], frames[i])


@pytest.mark.extra
def test_dicoms_that_are_refused(tmp_path, pydicom):
    path = write_dicom(tmp_path / "a.dcm", np.zeros((8, 10), np.uint16))
    data = pydicom.dcmread(path)
    del data.PixelData
    data.save_as(path)
    with pytest.raises(BadImage, match="a DICOM file without pixels"):
        read_deep(path, 1)
    path = write_dicom(tmp_path / "a.dcm", np.zeros((8, 10), np.uint16))
    data = pydicom.dcmread(path)
    data.Rows = data.Columns = 60_000
    data.save_as(path)
    with pytest.raises(BadImage, match="decompression bomb"):
        read_deep(path, 1)
    path = write_dicom(tmp_path / "a.dcm", np.zeros((8, 10), np.uint16))
    data = pydicom.dcmread(path)
    del data.Rows, data.PhotometricInterpretation
    data.save_as(path)
    with pytest.raises(BadImage, match="a damaged DICOM file: without Rows, PhotometricInterpretation"):
        read_deep(path, 1)
    (tmp_path / "a.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:400])
    with pytest.raises(BadImage):
        read_deep(path, 1)


def test_without_pydicom_a_dicom_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(bytes(128) + b"DICM" + bytes(200))
    monkeypatch.setitem(headers.OPTIONAL, "DICOM", ((".dcm",), None, "pydicom"))
    with pytest.raises(UserError, match="DICOM is not read here: pip install pydicom"):
        build_pretrain_dataset(namespace(tmp_path, in_chans=1))


@pytest.mark.extra
def test_heif(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    Image.fromarray(RNG.integers(0, 256, (32, 48, 3)).astype(np.uint8)).save(tmp_path / "a.heic", quality=90)
    with Image.open(tmp_path / "a.heic") as image:
        np.testing.assert_array_equal(read_image(str(tmp_path / "a.heic")), np.asarray(image))
    assert len(build_pretrain_dataset(namespace(tmp_path))) == 1
