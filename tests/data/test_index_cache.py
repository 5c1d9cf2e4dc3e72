"""The cache of folder lists gives what a listing would give, always, and never gets in the way."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.data import index_cache
from util.data.find import find_images
from util.data.spread import spread
from util.errors import UserError

REPO = Path(__file__).resolve().parents[2]
OLD = 1_000_000_000  # nanoseconds added to the clock


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, also for small sets, for which every folder has long been at rest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "MIN_FILES", 1)
    monkeypatch.setattr(index_cache, "_settled", lambda info: True)
    return tmp_path / "cache" / "mae-pytorch" / "index"


@pytest.fixture
def listed(monkeypatch):
    """Names of the folders that were read, to be emptied by the test."""
    names, original = [], index_cache._list

    def spy(path, name, stamp):
        names.append(name)
        return original(path, name, stamp)

    monkeypatch.setattr(index_cache, "_list", spy)
    return names


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, 0, 0)).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    for i in range(6):
        save(tmp_path / "data" / "train" / f"c{i % 2}" / f"{i}.png", i)
    save(tmp_path / "data" / "train" / "c1" / "deep" / "er" / "9.png")
    (tmp_path / "data" / "train" / "c1" / "deep" / "notes.TXT").touch()
    (tmp_path / "data" / "train" / "c0" / "noextension").touch()
    return tmp_path / "data"


def summary(files):
    return list(files.paths), files.classes, list(files.labels), files.ignored, files.describe()


def uncached(path):
    """What a listing without a cache finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_cache, "load", lambda root: {})
        patch.setattr(index_cache, "MIN_FILES", float("inf"))
        return summary(find_images(path))


def test_the_second_start_reads_no_folder(root, cache, listed):
    first = summary(find_images(root))
    assert sorted(listed) == ["", "c0", "c1", "c1/deep", "c1/deep/er"] and len(list(cache.iterdir())) == 1
    assert first[3] == 2 and len(first[0]) == 7
    listed.clear()
    assert summary(find_images(root)) == first == summary(find_images(root)) and listed == []
    assert first == uncached(root)


def replace_by_a_broken_one(train):
    (train / "x").write_bytes(b"no image, and of another size")
    os.replace(train / "x", train / "c1" / "deep" / "er" / "9.png")


CHANGES = {
    "added": lambda train: save(train / "c0" / "new.png"),
    "added deep inside": lambda train: save(train / "c1" / "deep" / "er" / "new.png"),
    "removed": lambda train: os.remove(train / "c0" / "2.png"),
    "renamed": lambda train: os.rename(train / "c0" / "2.png", train / "c0" / "two.png"),
    "moved": lambda train: os.rename(train / "c0" / "2.png", train / "c1" / "2.png"),
    "no image any more": lambda train: os.rename(train / "c0" / "2.png", train / "c0" / "2.txt"),
    "hidden": lambda train: os.rename(train / "c0" / "2.png", train / "c0" / ".2.png"),
    "class added": lambda train: save(train / "c2" / "0.png"),
    "class removed": lambda train: shutil.rmtree(train / "c1"),
    "class renamed": lambda train: os.rename(train / "c0", train / "z"),
    "classes swapped": lambda train: [
        os.rename(train / old, train / new) for old, new in (("c0", "t"), ("c1", "c0"), ("t", "c1"))],
    "other file added": lambda train: (train / "c1" / "deep" / "er" / "a.csv").touch(),
    "folder became a file": lambda train: [
        shutil.rmtree(train / "c1" / "deep"), (train / "c1" / "deep").touch()],
    "file became a folder": lambda train: [
        os.remove(train / "c0" / "2.png"), save(train / "c0" / "2.png" / "2.png")],
    "link added": lambda train: (train / "c2").symlink_to(train / "c0"),
    "a copy in its place": lambda train: [
        shutil.copytree(train, train.parent / "copy"), os.remove(train.parent / "copy" / "c0" / "2.png"),
        shutil.rmtree(train), os.rename(train.parent / "copy", train)],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(root, cache, change):
    before = summary(find_images(root))
    time.sleep(0.02)  # more than a tick of the file system's clock
    CHANGES[change](root / "train")
    after = summary(find_images(root))
    assert after == uncached(root) != before
    assert summary(find_images(root)) == after


def test_times_that_are_set_back_hide_nothing(root, cache):
    """Restoring an archive, and rsync, give a folder its old time of modification."""
    folder = root / "train" / "c0"
    find_images(root)
    times = os.stat(folder)
    time.sleep(0.02)
    os.rename(folder / "2.png", folder / "3.png")
    os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert summary(find_images(root)) == uncached(root)
    assert f"{folder / '3.png'}" in find_images(root).paths


def test_broken_files_are_noticed_whatever_the_cache_says(root, cache):
    find_images(root)
    path = root / "train" / "c0" / "2.png"
    path.write_bytes(b"")  # in place: no folder changes
    with pytest.raises(UserError, match=r"2\.png \(empty file\)"):
        find_images(root)
    save(path)
    find_images(root)
    replace_by_a_broken_one(root / "train")
    with pytest.raises(UserError, match=r"9\.png \(no image format"):
        find_images(root)


def test_a_folder_that_changed_just_now_is_listed_again(root, cache, listed, monkeypatch):
    """Within a tick of the clock a second change would leave no trace."""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    monkeypatch.setattr(index_cache, "MIN_FILES", 1)
    monkeypatch.setattr(index_cache, "_file_system", lambda device: "ext4")
    now, clock = time.time_ns(), []
    monkeypatch.setattr(index_cache.time, "time_ns", lambda: now + clock[-1])

    def read(seconds):
        clock.append(int(seconds * 1e9))
        original, names = index_cache._list, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index_cache, "_list", lambda *a: (names.append(a[1]), original(*a))[1])
            find_images(root)
        return len(names)

    assert [read(s) for s in (0, 0, -3600, 2, 4, 4)] == [5, 5, 5, 5, 5, 0]
    save(root / "train" / "c1" / "new.png")  # its time is 4 s before the clock
    os.utime(root / "train" / "c1", ns=(now + int(9e9), now + int(9e9)))  # and now in the future
    assert [read(s) for s in (4, 4, 11, 13, 13)] == [1, 1, 1, 1, 0]
    # Other file systems may have a server's clock, or keep no times at all
    shutil.rmtree(cache)
    monkeypatch.setattr(index_cache, "_file_system", lambda device: "nfs4")
    assert [read(s) for s in (60, 60, 290, 320, 320)] == [5, 5, 5, 5, 0]
    shutil.rmtree(cache)
    monkeypatch.setattr(index_cache, "_file_system", lambda device: "fuse.gcsfuse")
    assert [read(s) for s in (1e6, 1e6)] == [5, 5]


def test_the_kind_of_file_system_is_known():
    if not os.path.exists("/proc/self/mountinfo"):
        pytest.skip("Linux says it there")
    assert index_cache._file_system(os.stat("/proc").st_dev) == "proc"
    assert index_cache._file_system(os.makedev(4000, 4000)) == ""


def test_links(root, cache, listed, tmp_path):
    """Links to folders are looked at through the link; one to nothing is looked at each time."""
    save(tmp_path / "store" / "a" / "s.png")
    (root / "train" / "c2").symlink_to(tmp_path / "store" / "a")
    (root / "train" / "c0" / "later").symlink_to(tmp_path / "later")
    (root / "train" / "c0" / "loop").symlink_to(root / "train")
    find_images(root)
    listed.clear()
    find_images(root)
    assert listed == ["c0"]
    save(tmp_path / "store" / "a" / "more.png")
    save(tmp_path / "later" / "l.png")
    files = summary(find_images(root))
    assert files == uncached(root) and sum("/c2/" in path for path in files[0]) == 2
    assert sum("/later/" in path for path in files[0]) == 1
    shutil.rmtree(tmp_path / "later")
    (tmp_path / "later").touch()
    assert summary(find_images(root)) == uncached(root)


def test_one_cache_whatever_path_leads_there(root, cache, listed, tmp_path, monkeypatch):
    find_images(root)
    listed.clear()
    (tmp_path / "alias").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    files = find_images("alias")
    assert listed == [] and files.paths[0] == "alias/train/c0/0.png" and os.path.exists(files.paths[0])
    find_images(root / "train")
    assert listed == [] and len(list(cache.iterdir())) == 1


def test_odd_names(tmp_path, cache, listed):
    odd = os.fsdecode(b"caf\xe9")
    save(tmp_path / "data" / odd / "\u56fe.png", 1)
    save(tmp_path / "data" / "line\nbreak" / "a.png", 2)
    (tmp_path / "data" / "line\nbreak" / ("x." + odd)).touch()
    first = summary(find_images(tmp_path / "data"))
    listed.clear()
    assert summary(find_images(tmp_path / "data")) == first and listed == [] and first[3] == 1


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "flipped", "text", "object", "foreign", "version", "folder"]
)
def test_damaged_and_foreign_caches_are_made_anew(root, cache, listed, damage, tmp_path, monkeypatch, capfd):
    first = summary(find_images(root))
    (path,) = cache.iterdir()
    content = path.read_bytes()
    if damage == "flipped":
        with zipfile.ZipFile(path) as archive:
            place = content.index(archive.read("text.npy")) + 200
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    if damage == "object":
        np.savez(path, head=np.array([{}], dtype=object))
    elif damage == "foreign":  # another folder's, under this one's name
        save(tmp_path / "else" / "a" / "1.png")
        find_images(tmp_path / "else")
        (other,) = set(cache.iterdir()) - {path}
        os.replace(other, path)
    elif damage == "version":
        monkeypatch.setattr(index_cache, "VERSION", "0")
    elif damage == "folder":
        os.remove(path)
        path.mkdir()
    else:
        parts = {"empty": b"", "cut": content[: len(content) // 2], "text": b"hello", "flipped": content}
        path.write_bytes(parts[damage])
    listed.clear()
    assert summary(find_images(root)) == first and len(listed) == 5
    listed.clear()
    assert summary(find_images(root)) == first and len(listed) == (5 if damage == "folder" else 0)
    assert capfd.readouterr() == ("", "") and not list(cache.glob("*.part"))


@pytest.mark.parametrize("where", ["/dev/null/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written(root, cache, monkeypatch, capfd, where):
    monkeypatch.setenv("XDG_CACHE_HOME", where)
    assert summary(find_images(root)) == summary(find_images(root)) == uncached(root)
    assert capfd.readouterr() == ("", "")


def test_small_sets_and_other_ranks_write_nothing(root, cache, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    find_images(root)
    assert not cache.exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(index_cache, "MIN_FILES", 10)  # there are 9
    find_images(root)
    assert not cache.exists()
    monkeypatch.setattr(index_cache, "MIN_FILES", 9)
    find_images(root)
    assert cache.exists()


def test_only_the_newest_lists_are_kept(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(index_cache, "KEPT", 3)
    for number in range(5):
        save(tmp_path / f"set{number}" / "a.png")
        find_images(tmp_path / f"set{number}")
        for path in cache.iterdir():
            os.utime(path, ns=(0, os.stat(path).st_mtime_ns - OLD))
        find_images(tmp_path / "set0")  # is in use
    kept = set(cache.iterdir())
    assert kept == {index_cache.cache_path(tmp_path / f"set{n}") for n in (0, 3, 4)}


def test_many_starts_at_once(root, cache):
    """Processes that write the same cache together all find everything, and leave one good file."""
    code = f"""
import os, sys
from util.data import index_cache
from util.data.find import find_images
index_cache.MIN_FILES, index_cache._settled = 1, lambda info: True
for _ in range(20):
    if len(find_images({str(root)!r}).paths) != 7:
        sys.exit(1)
    if os.getpid() % 2:
        index_cache.cache_path({str(root / "train")!r}).unlink(missing_ok=True)
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=REPO) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    find_images(root)
    assert [path.suffix for path in cache.iterdir()] == [".npz"]


def test_slow_folders_are_read_in_threads_in_the_same_order(tmp_path, cache, monkeypatch):
    for i in range(40):
        save(tmp_path / "data" / f"c{i % 20}" / f"{i}.png", i)
    expected = summary(find_images(tmp_path / "data"))
    shutil.rmtree(cache)
    original, active, most = index_cache._list, [], []

    def slow(path, name, stamp):
        active.append(name)
        time.sleep(0.15)
        most.append(len(active))
        active.remove(name)
        return original(path, name, stamp)

    monkeypatch.setattr(index_cache, "_list", slow)
    start = time.perf_counter()
    assert summary(find_images(tmp_path / "data")) == expected
    assert time.perf_counter() - start < 20 * 0.15 and max(most) > 8


def test_spread_keeps_order_and_raises():
    def work(item):
        time.sleep(0.03)
        if item == 70:
            raise ValueError(item)
        return -item

    assert spread(work, range(60)) == [-i for i in range(60)]
    assert spread(work, []) == []
    with pytest.raises(ValueError, match="70"):
        spread(work, range(80))
