"""Reading image files: all formats and modes against Pillow, both JPEG decoders, broken and hostile files."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_utils import REPO
from PIL import Image

from util.data import read
from util.data.read import IMG_EXTENSIONS, MODES, BadImage, open_pil, read_image, sniff_header
from util.errors import UserError
from util.files import printable

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)


def smooth(height=90, width=130, seed=0):
    """A picture that JPEG keeps: low frequencies and some texture. uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    big = np.asarray(
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32
    )
    return np.clip(big + rng.normal(scale=8, size=(height, width, 1)), 0, 255).astype(np.uint8)


def pil_pixels(path, mode="RGB"):
    with Image.open(path) as image:
        array = np.asarray(image.convert(mode))
    return array.reshape(*array.shape[:2], -1)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_both_jpeg_decoders_give_pillows_pixels(tmp_path, subsampling, progressive):
    path = str(tmp_path / "a.jpg")
    Image.fromarray(smooth()).save(path, quality=93, subsampling=subsampling, progressive=progressive)
    expected = pil_pixels(path)
    for use in (None, True, False):
        image = read_image(path, use_simplejpeg=use)
        assert image.dtype == np.uint8 and image.shape == (90, 130, 3)
        assert image.flags.writeable and image.flags.c_contiguous
        np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(np.asarray(open_pil(path)), expected)


def test_simplejpeg_is_what_reads_an_ordinary_jpeg(tmp_path, monkeypatch):
    """Otherwise the tests of agreement would compare Pillow with itself."""
    pytest.importorskip("simplejpeg")
    path = str(tmp_path / "a.jpg")
    Image.fromarray(smooth()).save(path)
    calls = []
    monkeypatch.setattr(read, "_decode_pil", lambda *_: calls.append(1))
    assert read_image(path).shape == (90, 130, 3) and not calls


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grey_and_cmyk_jpegs_are_pillows(tmp_path, mode, channels):
    path = str(tmp_path / "a.jpg")
    Image.fromarray(smooth()).convert(mode).save(path, quality=93)
    if channels in (2, 4):
        with pytest.raises(BadImage, match=r"no alpha channel, where .* has [24] channels \(--in_chans\)"):
            read_image(path, channels)
        return
    np.testing.assert_array_equal(read_image(path, channels), pil_pixels(path, MODES[channels]))


def test_colour_jpeg_to_grey_is_pillows_arithmetic(tmp_path):
    path = str(tmp_path / "a.jpg")
    Image.fromarray(smooth()).save(path)
    np.testing.assert_array_equal(read_image(path, 1), pil_pixels(path, "L"))


def test_odd_jpegs_fall_back_to_pillow(tmp_path):
    good = tmp_path / "good.jpg"
    Image.fromarray(smooth()).save(good, quality=90)
    data = good.read_bytes()
    (tmp_path / "trailing.jpg").write_bytes(data + b"trailing bytes")
    middle = len(data) // 2
    (tmp_path / "damaged.jpg").write_bytes(data[:middle] + b"\xff\xd0\x00\x00" + data[middle:])
    for name in ("trailing.jpg", "damaged.jpg"):
        path = str(tmp_path / name)
        np.testing.assert_array_equal(read_image(path), pil_pixels(path))
    png_named_jpg = str(tmp_path / "png.jpg")
    Image.fromarray(RGB).save(png_named_jpg, format="PNG")
    np.testing.assert_array_equal(read_image(png_named_jpg), RGB)


def test_no_rotation_by_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    path = str(tmp_path / "a.jpg")
    Image.fromarray(smooth()).save(path, exif=exif)
    for use in (True, False):
        assert read_image(path, use_simplejpeg=use).shape == (90, 130, 3)


SAVED = [  # (file name, mode in which it is saved, keyword arguments)
    ("a.png", "RGB", {}),
    ("a.png", "RGBA", {}),
    ("a.png", "L", {}),
    ("a.png", "LA", {}),
    ("a.png", "1", {}),
    ("a.png", "P", {}),
    ("a.webp", "RGB", {"lossless": True}),
    ("a.webp", "RGBA", {"lossless": True}),
    ("a.tif", "RGB", {}),
    ("a.tiff", "CMYK", {}),
    ("a.tif", "RGB", {"compression": "tiff_lzw"}),
    ("a.tif", "1", {}),
    ("a.bmp", "RGB", {}),
    ("a.bmp", "P", {}),
    ("a.bmp", "L", {}),
    ("a.gif", "P", {}),
    ("a.ppm", "RGB", {}),
    ("a.pgm", "L", {}),
    ("a.pbm", "1", {}),
]


@pytest.mark.parametrize("name, mode, options", SAVED, ids=lambda v: str(v))
def test_every_format_and_mode_in_every_number_of_channels(tmp_path, name, mode, options):
    image = Image.fromarray(RGB)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(RGB[..., 0]))
    path = str(tmp_path / name)
    image.convert(mode).save(path, **options)
    assert sniff_header(path) is None
    for channels, target in MODES.items():
        if channels in (2, 4) and mode not in ("RGBA", "LA"):
            with pytest.raises(BadImage, match="no alpha channel"):
                read_image(path, channels)
            continue
        result = read_image(path, channels)
        assert result.shape == (37, 53, channels) and result.flags.writeable
        np.testing.assert_array_equal(result, pil_pixels(path, target))
        assert open_pil(path, target).mode == target


def test_alpha_is_dropped_not_blended(tmp_path):
    image = Image.fromarray(RGB)
    image.putalpha(Image.fromarray(RGB[..., 0]))
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png")), RGB)


@pytest.mark.filterwarnings("ignore")
def test_palette_with_transparency_is_read_without_a_remark(tmp_path):
    image = Image.fromarray(RGB).quantize(16)
    path = str(tmp_path / "a.png")
    image.save(path, transparency=bytes(range(16)))
    np.testing.assert_array_equal(read_image(path), np.asarray(image.convert("RGB")))
    # In a process of its own, because pytest sets other filters
    code = "import sys; from util.data.read import read_image; read_image(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", code, path], cwd=REPO, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_animation_gives_its_first_picture(tmp_path):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.webp")), RGB)


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_npy_arrays(tmp_path, channels):
    array = RNG.integers(0, 256, (11, 17, channels)).astype(np.uint8)
    path = str(tmp_path / "a.npy")
    np.save(path, np.asfortranarray(array))
    assert sniff_header(path) is None
    result = read_image(path, channels)
    assert result.dtype == np.uint8 and result.flags.c_contiguous and result.flags.writeable
    np.testing.assert_array_equal(result, array)


def test_npy_arrays_that_do_not_fit(tmp_path):
    def save(name, array, **options):
        np.save(tmp_path / name, array, **options)
        return str(tmp_path / name)

    cases = [
        (save("four.npy", np.zeros((5, 5, 4), np.uint8)), "4 channels where the model has 13"),
        (save("flat.npy", np.zeros((5, 5), np.uint8)), r"shape \(5, 5\)"),
        (save("empty.npy", np.zeros((0, 5, 13), np.uint8)), r"shape \(0, 5, 13\)"),
        (save("float.npy", np.zeros((5, 5, 13), np.float32)), "more than 8 bits.*--pixel_range LOW HIGH"),
        (
            save("objects.npy", np.array([{}], dtype=object), allow_pickle=True),
            r"Python objects \(a pickle\)",
        ),
    ]
    for path, message in cases:
        with pytest.raises(BadImage, match=message):
            read_image(path, 13)
    assert read_image(save("grey.npy", np.ones((5, 6), np.uint8)), 1).shape == (5, 6, 1)
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match=r"images of 13 channels \(--in_chans\) are read from \.npy"):
        read_image(str(tmp_path / "a.png"), 13)


def test_npy_that_claims_to_be_huge(tmp_path):
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 20, 13)}
        )
        file.write(b"\0" * 100)
    with pytest.raises(BadImage, match="header says 1048576x1048576x13, the file ends before"):
        read_image(str(path), 13)


def test_decompression_bombs_are_refused_by_both_decoders(tmp_path, monkeypatch):
    path = str(tmp_path / "a.jpg")
    Image.fromarray(smooth()).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 130 // 2 - 1)  # Pillow refuses twice this
    simplejpeg = pytest.importorskip("simplejpeg")
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_a, **_k: pytest.fail("the bomb was decoded"))
    for use in (True, False):
        with pytest.raises(BadImage, match="decompression bomb"):
            read_image(path, use_simplejpeg=use)
    with pytest.raises(BadImage, match="decompression bomb"):
        open_pil(path)


@pytest.mark.needs("posix")
def test_what_is_no_image_is_named_with_the_reason(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "BMW.bmp").write_text("BMW is a car")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    reasons = {
        "empty.jpg": "empty file",
        "page.jpg": "starts with b'<html>not fo'",
        "lfs.png": "git lfs pull",
        "BMW.bmp": "no image format",
        "folder.jpg": "a folder",
        "pipe.jpg": "not a regular file",
        "zero.jpg": "not a regular file",
        "missing.jpg": "No such file",
        "zero\0byte.jpg": "null ",  # "null byte", in Python 3.13 "embedded null character"
    }
    for name, reason in reasons.items():
        path = str(tmp_path / name)
        assert reason in sniff_header(path)
        for reader in (read_image, open_pil):
            with pytest.raises(BadImage) as error:
                reader(path)
            assert error.value.path == path and reason in error.value.reason
            assert printable(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.gif", "a.bmp", "a.npy"])
def test_truncated_files_are_bad_images(tmp_path, name):
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, smooth())
    else:
        Image.fromarray(smooth()).save(path)
    data = path.read_bytes()
    for keep in (len(data) // 2, 40):
        path.write_bytes(data[:keep])
        assert sniff_header(str(path)) is None  # only decoding can tell
        with pytest.raises(BadImage) as error:
            read_image(str(path))
        assert error.value.reason and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.gif", "a.bmp", "a.ppm", "a.npy"])
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_or_refused(tmp_path, name):
    """Never another exception, never a crash."""
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, RGB)
    else:
        Image.fromarray(smooth(40, 50)).save(path)
    data, rng = path.read_bytes(), np.random.default_rng(1)
    outcomes = set()
    for _ in range(60):
        changed = np.frombuffer(data, np.uint8).copy()
        spots = rng.integers(0, min(len(data), 400) if rng.random() < 0.5 else len(data), rng.integers(1, 8))
        changed[spots] = rng.integers(0, 256, len(spots))
        path.write_bytes(changed.tobytes())
        try:
            image = read_image(str(path))
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            outcomes.add("read")
        except BadImage:
            outcomes.add("refused")
    assert outcomes


def test_without_simplejpeg_everything_is_read(tmp_path, monkeypatch):
    path = str(tmp_path / "a.jpg")
    Image.fromarray(smooth()).save(path)
    expected = read_image(path)
    monkeypatch.setattr(read, "simplejpeg", None)
    np.testing.assert_array_equal(read_image(path), expected)
    np.testing.assert_array_equal(read_image(path, use_simplejpeg=True), expected)


def test_names_in_any_encoding(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9 \n.png"  # Latin-1, and a line break
    with open(name, "wb") as file:
        Image.fromarray(RGB).save(file, format="PNG")
    path = os.fsdecode(name)
    np.testing.assert_array_equal(read_image(path), RGB)
    assert printable(path).endswith("/caf\\xe9 \\n.png")
    printable(path).encode("ascii")
    assert printable("/data/é/图.png") == "/data/é/图.png"


def test_bad_image_is_a_user_error_that_survives_pickling_and_a_worker():
    error = BadImage("/data/a: b.jpg", "empty\nfile")
    assert isinstance(error, UserError) and str(error) == "/data/a: b.jpg: empty file"
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.reason, str(copy)) == (error.path, error.reason, str(error))
    try:
        raise error
    except BadImage:
        wrapper = torch._utils.ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(BadImage) as caught:
        wrapper.reraise()
    assert str(caught.value) == str(error)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(error)


def test_extensions_cover_torchvisions():
    from torchvision.datasets.folder import IMG_EXTENSIONS as TORCHVISIONS

    assert set(TORCHVISIONS) <= set(IMG_EXTENSIONS)
