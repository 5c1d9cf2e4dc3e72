"""The smaller copy of a data set: what is scaled, what the loader sees of it, and going on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from image_utils import picture
from PIL import Image

from tools import copy_image as copying
from tools import resize_dataset
from util.data.find import find_images
from util.data.read import BadImage, open_pil, read_image
from util.errors import UserError

REPO = Path(__file__).resolve().parents[2]


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def run(*argv):
    args = resize_dataset.get_args_parser().parse_args([*map(str, argv), "--workers", "1"])
    try:
        resize_dataset.main(args)
    except SystemExit as end:
        return end.code
    finally:
        if hasattr(args, "lock"):
            args.lock.release()
    return 0


@pytest.fixture
def source(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            save(tmp_path / "src" / split / f"c{i % 2}" / f"{i}.jpg", picture(i, 90, 120), quality=95)
    save(tmp_path / "src" / "train" / "c1" / "small.jpg", picture(9, 40, 70), quality=80)
    (tmp_path / "src" / "train" / "notes.txt").touch()
    return tmp_path / "src"


def tree(folder):
    """{name: (time, content)} of all visible files."""
    paths = (path for path in folder.rglob("*") if path.is_file() and ".resize_dataset" not in path.parts)
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}


def test_folders_names_and_sizes(source, tmp_path, capsys):
    before = tree(source)
    assert run(source, tmp_path / "dst", "--short", 60, "--measure", 3) == 0
    made = tree(tmp_path / "dst")
    assert set(made) == set(before) - {"train/notes.txt"} and tree(source) == before
    for name, (when, content) in made.items():
        assert when == before[name][0]
        if name == "train/c1/small.jpg":
            assert content == before[name][1]
        else:
            assert Image.open(tmp_path / "dst" / name).size == (80, 60)
    for split in ("train", "val"):
        one, two = find_images(source, split), find_images(tmp_path / "dst", split)
        assert one.classes == two.classes and list(one.labels) == list(two.labels)
    text = capsys.readouterr().out
    assert "7 images in" in text and "46.7 dB" in text and "35.2 dB" in text
    assert "6 scaled to 60 px, 1 copied as they are, 0 there already, 0 not readable" in text
    assert 25 < float(text.split("agree to ")[1].split(" dB")[0]) < 60
    mode = os.stat(tmp_path / "dst" / "train" / "c0" / "0.jpg").st_mode & 0o777
    (tmp_path / "ordinary").touch()
    assert mode == os.stat(tmp_path / "ordinary").st_mode & 0o777


def test_going_on_does_only_what_is_missing_or_new(source, tmp_path, capsys):
    dst = tmp_path / "dst"
    run(source, dst, "--short", 60)
    os.unlink(dst / "train" / "c0" / "0.jpg")
    (dst / "val" / "c0" / "0.jpg").write_bytes(b"")  # a power cut can leave this
    os.utime(dst / "val" / "c0" / "0.jpg", ns=(0, os.stat(source / "val" / "c0" / "0.jpg").st_mtime_ns))
    save(source / "train" / "c2" / "new.jpg", picture(20, 80, 80))
    save(source / "val" / "c1" / "1.jpg", picture(21, 90, 90))  # replaced, a while later
    os.utime(source / "val" / "c1" / "1.jpg", ns=(0, time.time_ns() + 60_000_000_000))
    (dst / ".resize_dataset" / "unfinished" / "tmpabc").write_bytes(b"half")
    capsys.readouterr()
    assert run(source, dst, "--short", 60) == 0
    assert "4 scaled to 60 px, 0 copied as they are, 4 there already" in capsys.readouterr().out
    assert Image.open(dst / "val" / "c1" / "1.jpg").size == (60, 60)
    assert not os.listdir(dst / ".resize_dataset" / "unfinished")


@pytest.mark.parametrize("what", ["the main process", "all processes"])
@pytest.mark.needs("posix")
def test_a_killed_run_leaves_whole_files_only(tmp_path, what):
    array = picture(1, 400, 500)
    for i in range(60):
        save(tmp_path / "src" / f"c{i % 3}" / f"{i}.jpg", array, quality=90)
    command = [
        sys.executable,
        REPO / "tools" / "resize_dataset.py",
        str(tmp_path / "src"),
        str(tmp_path / "dst"),
    ]
    command += ["--short", "300", "--workers", "2"]
    process = subprocess.Popen(command, cwd="/", stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 60
    while len(tree(tmp_path / "dst")) < 5 and time.time() < deadline:
        time.sleep(0.02)
    (os.killpg if what == "all processes" else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    with contextlib.suppress(ProcessLookupError):  # until all workers have left
        while time.time() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.02)
    part = tree(tmp_path / "dst")
    assert 5 <= len(part) < 60
    for name in part:
        assert read_image(str(tmp_path / "dst" / name)).shape == (300, 375, 3)
    command[1:2] = ["-m", "tools.resize_dataset"]  # started either way
    end = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert end.returncode == 0 and len(tree(tmp_path / "dst")) == 60
    assert f"{60 - len(part)} scaled" in end.stdout and f"{len(part)} there already" in end.stdout


@pytest.mark.needs("posix")
def test_unreadable_files_are_reported_and_left_out(source, tmp_path, capsys):
    (source / "train" / "c0" / "broken.jpg").write_bytes(
        (source / "train" / "c0" / "0.jpg").read_bytes()[:900]
    )
    (source / "train" / "c0" / "small broken.jpg").write_bytes(
        (source / "train" / "c1" / "small.jpg").read_bytes()[:700]
    )
    (source / "train" / "c1" / "empty.png").touch()
    (source / "val" / "c0" / "dangling.png").symlink_to("nowhere")
    np.save(source / "val" / "c0" / "float.npy", np.full((90, 90), np.nan, np.float32))
    os.mkfifo(source / "val" / "c0" / "pipe.png")
    assert run(source, tmp_path / "dst", "--short", 60) == 1
    streams = capsys.readouterr()
    assert "6 scaled to 60 px, 1 copied as they are, 0 there already, 6 not readable" in streams.out
    assert "empty.png: empty file" in streams.err and "6 files not in DST" in streams.err
    lines = (tmp_path / "dst" / ".resize_dataset" / "unreadable.txt").read_text().splitlines()
    assert len(lines) == 6 and len(tree(tmp_path / "dst")) == 7


KINDS = {
    "grey.jpg": ("L", "L", {"quality": 95}), "cmyk.jpg": ("CMYK", "RGB", {"quality": 95}),
    "grey.png": ("L", "L", {}), "alpha.png": ("RGBA", "RGBA", {}), "greyalpha.png": ("LA", "LA", {}),
    "bit.png": ("1", "L", {}), "palette.png": ("P", "RGB", {}),
    "clear palette.png": ("P", "RGBA", {"transparency": 3}), "animated.gif": ("P", "RGB", {}),
    "a.bmp": ("RGB", "RGB", {}), "a.webp": ("RGB", "RGB", {"quality": 95}),
    "a.tif": ("CMYK", "RGB", {}), "a.ppm": ("RGB", "RGB", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_colour(tmp_path, name):
    """What the loader reads of the copy is what it reads of the original, but smaller."""
    mode, expected, options = KINDS[name]
    base = Image.fromarray(picture(3, 128, 160))
    image = base.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(picture(4, 128, 160, 1)[:, :, 0]))
    source, spare = tmp_path / name, tmp_path / "spare"
    spare.mkdir()
    image.save(source, **options)
    target = str(tmp_path / "out" / copying.output_name(name, str(source)))
    assert copying.copy_image(str(source), target, str(spare), 64, 95) == "scaled"
    copy = Image.open(target)
    assert copy.size == (80, 64) and copy.mode == expected and not os.listdir(spare)
    assert copy.format == ("PNG" if name.endswith(".gif") else Image.open(source).format)
    for channels in (1, 3, 4) if "A" in expected else (1, 3):
        full = Image.fromarray(read_image(str(source), channels).squeeze())
        bands = [np.asarray(band.resize((80, 64), Image.Resampling.BICUBIC)) for band in full.split()]
        difference = np.abs(
            np.stack(bands, -1).astype(int) - read_image(target, channels).reshape(64, 80, -1)
        )
        assert difference.mean() < (4 if expected == "RGB" and "quality" in options else 2), channels


def test_orientation_is_taken_as_the_loader_takes_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    source = save(tmp_path / "a.jpg", picture(1, 60, 100), exif=exif, quality=95)
    copying.copy_image(str(source), str(tmp_path / "b.jpg"), str(tmp_path), 30, 95)
    copy = Image.open(tmp_path / "b.jpg")
    assert copy.size == (50, 30) and 0x0112 not in copy.getexif()


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((50, 80, 13), np.uint8),
        ((50, 80), np.uint16),
        ((20, 90, 2), np.uint8),
        ((50, 80, 2), np.float32),
        ((50, 80, 4), np.int32),
    ],
)
def test_arrays(tmp_path, shape, dtype):
    array = (picture(5, shape[0], shape[1], shape[2] if len(shape) == 3 else 1)).reshape(shape).astype(dtype)
    array = array << 8 if dtype == np.uint16 else array
    np.save(tmp_path / "a.npy", array)
    done = copying.copy_image(str(tmp_path / "a.npy"), str(tmp_path / "b.npy"), str(tmp_path), 25, 95)
    copy = np.load(tmp_path / "b.npy")
    if shape[0] <= 25:
        assert done == "copied" and np.array_equal(copy, array)
    else:
        assert copy.shape == (25, 40, *shape[2:]) and copy.dtype == dtype
        assert abs(copy.mean() / array.mean() - 1) < 0.02


def test_deep_pictures_keep_their_depth(tmp_path):
    values = np.linspace(0, 65535, 60 * 90).reshape(60, 90).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (
        copying.copy_image(str(tmp_path / "a.png"), str(tmp_path / "b.png"), str(tmp_path), 20, 95)
        == "scaled"
    )
    with Image.open(tmp_path / "b.png") as copy:
        small = np.asarray(copy)
    assert small.dtype == np.uint16 and small.shape == (20, 30) and len(np.unique(small)) > 300
    assert abs(small.astype(float) - values.reshape(20, 3, 30, 3).mean(axis=(1, 3))).max() < 500
    (tmp_path / "a.ppm").write_bytes(b"P6 40 40 1023\n" + bytes(40 * 40 * 6))
    assert (
        copying.copy_image(str(tmp_path / "a.ppm"), str(tmp_path / "b.ppm"), str(tmp_path), 20, 95) == "kept"
    )
    assert (tmp_path / "b.ppm").read_bytes() == (tmp_path / "a.ppm").read_bytes()
    first = Image.new("L", (50, 50))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[Image.new("L", (50, 50), 9)])
    assert (
        copying.copy_image(str(tmp_path / "a.tif"), str(tmp_path / "b.tif"), str(tmp_path), 20, 95) == "kept"
    )


@pytest.mark.extra
@pytest.mark.parametrize("dtype, bands", [(np.uint16, 13), (np.float32, 1), (np.uint8, 4), (np.uint16, 3)])
def test_tiffs_keep_type_and_bands(tmp_path, dtype, bands):
    tifffile = pytest.importorskip("tifffile")
    array = picture(3, 60, 90, bands).astype(dtype)
    layout = {} if bands == 1 else {"planarconfig": "contig"}
    photometric = "rgb" if bands == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", array.squeeze(), photometric=photometric, **layout)
    assert (
        copying.copy_image(str(tmp_path / "a.tif"), str(tmp_path / "b.tif"), str(tmp_path), 20, 95)
        == "scaled"
    )
    copy = tifffile.imread(tmp_path / "b.tif").reshape(20, 30, bands)
    assert copy.dtype == dtype and abs(copy.mean() / array.mean() - 1) < 0.02


def test_gifs_whose_copy_has_no_name_left(tmp_path):
    save(tmp_path / "a.gif", picture(1)[..., 0])
    save(tmp_path / "a.gif.png", picture(2))
    with pytest.raises(BadImage, match=r"a\.gif\.png, which is there already"):
        copying.output_name("a.gif", str(tmp_path / "a.gif"))


def test_names_that_leave_no_room_for_the_copy(tmp_path, capsys):
    save(tmp_path / "src" / f"{'g' * 250}.gif", picture(1)[..., 0])
    save(tmp_path / "src" / "a.jpg", picture(2, 80, 80))
    assert run(tmp_path / "src", tmp_path / "dst", "--short", 60) == 1
    assert "1 scaled" in (captured := capsys.readouterr()).out and "name of its copy" in captured.err


@pytest.mark.needs("posix")
def test_places_that_are_refused(source, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "empty").mkdir()
    for src, dst, more, message in [
        (source, source, [], "one is in the other"),
        (source, source / "train" / "out", [], "one is in the other"),
        (source / "train", source, [], "one is in the other"),
        (source, tmp_path / "link" / "out", [], "one is in the other"),
        (tmp_path / "none", tmp_path / "a", [], "SRC .*none: does not exist"),
        (tmp_path / "empty", tmp_path / "b", [], "no images in it"),
        ("", tmp_path / "b", [], "SRC : does not exist"),
        (source, tmp_path / "full", [], "holds other files"),
        (source, "/dev/null/x", [], "DST /dev/null/x: Not a directory"),
        (source, tmp_path / "c", ["--short", "0"], "--short 0"),
        (source, tmp_path / "c", ["--quality", "101"], "--quality 101"),
    ]:
        with pytest.raises(UserError, match=message):
            run(src, dst, *more)
    assert not (tmp_path / "b").exists()  # another SRC may come there
    assert run(source, tmp_path / "d", "--short", 60) == 0
    for more in (["--short", "50"], ["--short", "60", "--quality", "80"]):
        with pytest.raises(UserError, match="made with other settings"):
            run(source, tmp_path / "d", *more)
    assert json.loads((tmp_path / "d" / ".resize_dataset" / "settings.json").read_text())["short"] == 60
    lock = filelock.FileLock(tmp_path / "d" / ".resize_dataset" / "lock")
    with lock, pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing there"):
        run(source, tmp_path / "d", "--short", 60)
    assert run(source, tmp_path / "d", "--short", 60) == 0


def test_a5_without_locks_no_file_of_another_run_is_removed(source, tmp_path, monkeypatch):
    unfinished = tmp_path / "dst" / ".resize_dataset" / "unfinished" / "of-another-run"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(filelock.FileLock, "acquire", unsupported)
        assert run(source, tmp_path / "dst") == 0 and unfinished.exists()
    assert run(source, tmp_path / "dst") == 0 and not unfinished.exists()


def unsupported(*_, **__):
    raise NotImplementedError


@pytest.mark.needs("forks")
def test_a_full_disk_ends_the_run_with_one_line(source, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copying.os, "replace", full)
    with pytest.raises(
        UserError, match=r"dst/train/c0/0\.jpg: No space left on device; the same command goes"
    ):
        run(source, tmp_path / "dst", "--short", 60)
    assert not tree(tmp_path / "dst") and not os.listdir(tmp_path / "dst" / ".resize_dataset" / "unfinished")


def test_alpha_does_not_touch_colours(tmp_path):
    """The loader drops alpha, so what lies under transparent pixels matters."""
    array = np.dstack([picture(1, 60, 60), np.zeros((60, 60), np.uint8)])
    source = save(tmp_path / "a.png", array)
    copying.copy_image(str(source), str(tmp_path / "b.png"), str(tmp_path), 30, 95)
    assert abs(np.asarray(open_pil(str(tmp_path / "b.png"))).mean() - array[..., :3].mean()) < 1
