"""Files and folders that appear whole or not at all, places that are tried first, and lists in messages."""

import contextlib
import os
import stat
import subprocess
import sys

import pytest
import torch
from golden_utils import REPO

from util import files
from util.errors import UserError
from util.files import check_writable, counted, printable, replacing, replacing_folder, shown, some


@pytest.mark.parametrize("flush", [True, False])
def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path, flush):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path, flush=flush) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_file_stays_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(("refusals", "code", "tries"), [(2, 32, 3), (9, 32, 5), (1, None, 1)])
def test_windows_is_asked_again_while_another_program_has_the_file(
    tmp_path, monkeypatch, refusals, code, tries
):
    path, replace, seen = tmp_path / "a.txt", os.replace, []
    path.write_text("old")

    def refuse(*paths):
        seen.append(paths)
        if len(seen) <= refusals:
            error = PermissionError(13, "The process cannot access the file")
            error.winerror = code
            raise error
        replace(*paths)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    fails = contextlib.nullcontext() if tries > refusals else pytest.raises(PermissionError)
    with fails, replacing(path) as temporary:
        temporary.write_text("new")
    assert len(seen) == tries and path.read_text() == ("new" if tries > refusals else "old")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_disk_that_is_full_at_the_last_moment(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert not os.listdir(tmp_path)


def test_a_file_in_another_folder_of_long_name_and_private_permissions(tmp_path):
    spare, name = tmp_path / "spare", "\u00fc" * 125
    spare.mkdir()
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / name, spare) as temporary:
            temporary.chmod(0o600)  # as some libraries do
            assert temporary.parent == spare
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027  # as it was
    finally:
        os.umask(before)
    assert not os.listdir(spare)


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "out"
    for content in ("one", "two"):
        with replacing_folder(path) as temporary:
            (temporary / content).write_text(content)
            (temporary / content).chmod(0o600)
            (temporary / "deeper").mkdir()
            assert not path.exists() or os.listdir(path) != [content]
        assert sorted(os.listdir(path)) == ["deeper", content] and os.listdir(path.parent) == ["out"]
        (tmp_path / "ordinary").touch()
        assert (path / content).stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    with pytest.raises(ValueError), replacing_folder(path) as temporary:
        (temporary / "three").touch()
        raise ValueError
    assert sorted(os.listdir(path)) == ["deeper", "two"] and os.listdir(path.parent) == ["out"]


def test_places_that_cannot_be_written(tmp_path):
    check_writable("--output_dir", tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and not os.listdir(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for folder, options, message in [
        (tmp_path / "file", {}, r"^--flag .*file: cannot be written \(it is a file\)$"),
        (tmp_path / "file" / "x", {}, r"file/x: cannot be written \(Not a directory\)$"),
        (tmp_path / "none", {"make": False}, r"none: cannot be written \(No such file or directory\)$"),
        ("/proc/nowhere", {"shown": "x.csv"}, r"^--flag x\.csv cannot be written \(No such file"),
    ]:
        with pytest.raises(UserError, match=message):
            check_writable("--flag", folder, **options)
    assert sorted(os.listdir(tmp_path)) == ["a", "file"]


def test_lists_in_messages():
    assert [some("abcde"), some("abcdef"), some([]), some(iter("abc"), 2)] == [
        "a, b, c, d, e", "a, b, c, d, e, ...", "", "a, b, ..."]  # fmt: skip
    assert printable("caf\udce9/\n\u56fe") == "caf\\xe9/\\n\u56fe"


def test_data_code_starts_without_the_painter():
    code = "import sys, util.datasets; print([n for n in sys.modules if n.endswith(('scene', 'textures'))])"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_c7_any_value_on_one_short_printable_line():
    nested = []
    nested.append(nested)
    for value in (
        "x" * 10**6,
        "\x1b[31m\n\u202e\ud800\udcff",
        10**5000,
        nested,
        ["y" * 10**6],
        torch.zeros(3, 4),
        1.5,
    ):
        text = shown(value)
        assert text.isprintable() and len(text) <= 80
    assert shown("\x1b[31m\n\udcff") == "\\x1b[31m\\n\\xff" and shown(torch.zeros(3, 4)).endswith("(3, 4)")
    assert shown("abc") == "abc" and shown("a" * 90) == "a" * 77 + "..." and shown([1]) == "[1]"
    assert some(["a\n", "b" * 10**6, "c", "d"], 3)[:4] == "a\\n,"
    error = UserError("a\n" + "b" * 10**6 + "\x07end")
    assert len(str(error)) <= 900 and str(error).isprintable() and str(error).endswith("\\x07end")
    assert str(UserError("caf\udce9: gone")) == "caf\\xe9: gone"


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "image", "0 images"),
        (1, "process", "1 process"),
        (2, "class", "2 classes"),
        (1234, "file", "1,234 files"),
    ],
)
def test_what_is_counted_has_its_number(number, noun, text):
    assert counted(number, noun) == text
