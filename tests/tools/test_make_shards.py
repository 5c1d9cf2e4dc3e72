"""A data set packed into archives: the same data, mixed, the same bytes, and going on after a kill."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from archive_utils import make_zip
from golden_utils import REPO
from image_utils import make_folder
from PIL import Image

from tools import make_shards
from util.data.find import find_images
from util.data.read import read_image
from util.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    make_folder(tmp_path / "src" / "train", 40, classes=2)
    make_folder(tmp_path / "src" / "val", 7, classes=2)
    return tmp_path / "src"


def run(*argv):
    args = make_shards.get_args_parser().parse_args([*map(str, argv), "--workers", "1"])
    try:
        make_shards.main(args)
    except SystemExit as end:
        return end.code
    finally:
        if hasattr(args, "lock"):
            args.lock.release()
    return 0


def tars(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def same_data(ours, theirs):
    for split in ("train", "val"):
        one, two = find_images(ours, split), find_images(theirs, split)
        count = len(one.paths)
        assert [one.paths.name(i) for i in range(count)] == [two.paths.name(i) for i in range(len(two.paths))]
        assert one.labels.tolist() == two.labels.tolist()
        assert all((read_image(a) == read_image(b)).all() for a, b in zip(one.paths, two.paths, strict=True))


def test_the_archives_are_the_folders_data_mixed_and_the_same_bytes_each_time(tmp_path, source, capsys):
    for name, origin in (("one", source), ("two", make_zip(tmp_path / "a.zip", source))):
        assert run(origin, tmp_path / name, "--images", 16) == 0
    assert list(tars(tmp_path / "one")) == [f"train-{i:05d}.tar" for i in range(3)] + ["val-00000.tar"]
    said = capsys.readouterr().out
    assert f"47 images in {source}/ (40 in train, 7 in val): 4 archives" in said and "classes" not in said
    assert tars(tmp_path / "one") == tars(tmp_path / "two")
    same_data(tmp_path / "one", source)
    files = find_images(tmp_path / "one")
    shards = files.paths.columns["shard"]
    assert [np.unique(files.labels[shards == i]).tolist() for i in range(3)] == [[0, 1]] * 3


def test_of_a_list_each_image_keeps_a_name_inside_the_archive(tmp_path, source):
    inside = sorted(path.relative_to(source) for path in source.rglob("train/*/*.*"))
    for name, folder, listed in (
        ("near", source, inside),
        ("far", tmp_path / "lists", [*(source / path for path in inside[:-1]), f"../src/{inside[-1]}"]),
    ):
        folder.mkdir(exist_ok=True)
        (folder / "list.txt").write_text("".join(f"{path}\n" for path in listed), encoding="utf-8")
        assert run(folder / "list.txt", tmp_path / name) == 0
        with tarfile.open(next((tmp_path / name).glob("*.tar"))) as tar:
            names, below = sorted(tar.getnames()), source if name == "near" else source / "train"
            assert names == sorted(str((source / path).relative_to(below)) for path in inside)
            one = tar.extractfile(names[0]).read()
        assert one == (below / names[0]).read_bytes()


def test_images_of_one_name_are_refused_before_anything_is_written(tmp_path, source):
    (tmp_path / "list.txt").write_text("src/train/c0/000.jpg\n./src/train/c0/000.jpg\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"SRC .*list\.txt: holds src/train/c0/000\.jpg more than once"):
        run(tmp_path / "list.txt", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_half_written_notes_are_written_again(tmp_path, source):
    run(source, tmp_path / "dst")
    before = tars(tmp_path / "dst")
    notes = sorted((tmp_path / "dst" / ".make_shards").glob("*.tar.json"))
    for path, rest in zip(notes, (b"", b"\xff{"), strict=True):
        path.write_bytes(rest)
    assert run(source, tmp_path / "dst") == 0 and tars(tmp_path / "dst") == before
    assert [json.loads(path.read_text(encoding="utf-8")) for path in notes] == [[], []]


def test_made_smaller_as_by_resize_dataset(tmp_path, source):
    from tools import resize_dataset

    Image.new("P", (60, 50)).save(source / "train" / "c0" / "a.gif")
    args = [str(source), str(tmp_path / "small"), "--short", "30", "--workers", "1"]
    resize_dataset.main(resize_dataset.get_args_parser().parse_args(args))
    assert run(source, tmp_path / "shards", "--short", 30) == 0
    same_data(tmp_path / "shards", tmp_path / "small")


def test_what_cannot_be_read_is_left_out_and_listed(tmp_path, source, capsys):
    (source / "train" / "c0" / "bad.jpg").write_bytes(b"<html>")
    whole = (source / "train" / "c0" / "000.jpg").read_bytes()
    (source / "train" / "c0" / "cut.jpg").write_bytes(whole[:300])
    assert run(source, tmp_path / "dst", "--short", 30, "--images", 9) == 1
    for _ in range(2):  # and again, when all is there
        report = (tmp_path / "dst" / ".make_shards" / "unreadable.txt").read_text()
        assert "bad.jpg: no image format" in report and "cut.jpg: " in report
        assert run(source, tmp_path / "dst", "--short", 30, "--images", 9) == 1
    assert "48 there already; 2 not readable" in capsys.readouterr().out
    assert len(find_images(tmp_path / "dst").paths) == 40


@pytest.mark.needs("posix")
def test_goes_on_after_a_kill(tmp_path, source):
    run(source, tmp_path / "whole", "--images", 2)
    command = [
        sys.executable,
        str(REPO / "tools" / "make_shards.py"),
        source,
        tmp_path / "dst",
        "--images",
        "2",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not tars(tmp_path / "dst") and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(tars(tmp_path / "dst")) > 0
    times = {name: os.stat(tmp_path / "dst" / name).st_mtime_ns for name in tars(tmp_path / "dst")}
    assert run(source, tmp_path / "dst", "--images", 2) == 0
    assert tars(tmp_path / "dst") == tars(tmp_path / "whole")
    assert all(os.stat(tmp_path / "dst" / name).st_mtime_ns == then for name, then in times.items())


def test_another_source_or_other_settings_are_refused(tmp_path, source):
    from util.errors import UserError

    run(source, tmp_path / "dst", "--images", 16)
    make_folder(source / "val", 9, classes=2)
    for argv in ((source, tmp_path / "dst", "--images", 16), (source, source / "inside")):
        with pytest.raises(UserError, match=r"other settings|one is in the other"):
            run(*argv)
    (tmp_path / "two" / "val").mkdir(parents=True)
    (tmp_path / "two" / "Val").mkdir(exist_ok=True)
    for name, message in (("nowhere", "does not exist"), ("two", "no images in it|could both be val/")):
        with pytest.raises(UserError, match=f"^SRC .*{name}.*({message})"):
            run(tmp_path / name, tmp_path / "new")
