"""The same files in a folder, a tar, a zip, shards, on a server and in Parquet are the same data."""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from archive_utils import files_of, make_parquet, make_shards, make_tar, make_zip, serve
from image_utils import make_folder
from PIL import Image

from util.data import archives, members, parquet, stores
from util.data.dataset import build_pretrain_dataset
from util.data.find import find_images
from util.data.folders import ask_all
from util.data.inputs import find_inputs
from util.data.labelled import build_dataset
from util.data.loader import build_loader
from util.data.read import BadImage, read_image
from util.data.sampler import EpochSampler, near_order
from util.errors import UserError
from util.run.start import near_places, train_loader

TRAIN, VAL = 22, 6


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "PAUSE", 0.001)


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder root, with what sorts in unusual ways and what is passed over."""
    root = tmp_path / "set"
    make_folder(root / "train", TRAIN - 2, classes=3)
    make_folder(root / "val", VAL, classes=3)
    for name in ("c0/deeper/x.jpg", "c0-b/caf\u00e9.jpg"):
        (root / "train" / name).parent.mkdir()
        shutil.copy(root / "train" / "c0" / "000.jpg", root / "train" / name)
    (root / "train" / "c1" / "notes.txt").write_text("not an image")
    (root / "train" / "c1" / "._000.jpg").write_text("hidden")
    return root


def names(files):
    return [files.paths.name(i) for i in range(len(files.paths))]


def every_form(tmp_path, folder):
    """{name: data path} of the same data."""
    forms = {"tar": make_tar(tmp_path / "all.tar", folder), "zip": make_zip(tmp_path / "all.zip", folder)}
    forms["wrapped tar"] = make_tar(tmp_path / "wrapped.tar", folder, wrapper="./some set/")
    forms["shards"] = make_shards(tmp_path / "shards", folder)
    forms["pattern"] = f"{forms['shards']}/{{000..003}}.tar"
    for split in ("train", "val"):
        for number in range(2):
            split_names = files_of(folder / split)[number::2]
            make_tar(tmp_path / "named" / f"{split}-{number}.tar", folder / split, split_names)
            make_tar(tmp_path / "split" / split / f"{number}.tar", folder / split, split_names)
    return {**forms, "named": tmp_path / "named", "split": tmp_path / "split"}


def same_files(found, expected):
    assert names(found) == names(expected)
    assert found.classes == expected.classes and found.empty == expected.empty
    assert found.labels.dtype == expected.labels.dtype and found.ignored == expected.ignored
    assert found.labels.tolist() == expected.labels.tolist()
    for ours, theirs in zip(found.paths, expected.paths, strict=True):
        with ours.open() as file, open(theirs, "rb") as plain:
            assert file.read() == plain.read()


def test_the_same_files_in_a_folder_and_in_archives_are_the_same_data(tmp_path, folder):
    for name, path in every_form(tmp_path, folder).items():
        for split in ("train", "val"):
            for _ in range(2):  # listed, and out of the cache
                same_files(find_images(path, split), find_images(folder, split))
        assert find_images(path, "test") is None, name
        assert "22 images in 4 classes" in find_images(path).describe()


def batches(path, workers=0, shuffle="full", **more):
    args = argparse.Namespace(data_path=path, input_size=16, seed=3, **more)
    return batches_of(build_pretrain_dataset(args), workers, shuffle)


def batches_of(dataset, workers=0, shuffle="full"):
    near = dataset.files.paths.places if shuffle == "near" else None
    sampler = EpochSampler(len(dataset), seed=3, batch_size=4, near=near)
    sampler.set_epoch(1)
    return list(build_loader(dataset, sampler, 4, workers, drop_last=True))


def same(ours, theirs):
    return len(ours) == len(theirs) > 0 and all(
        torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_batches_are_the_folders_to_the_bit(tmp_path, folder):
    expected = batches(folder)
    forms = every_form(tmp_path, folder)
    for path in forms.values():
        assert same(batches(path), expected)
    assert same(batches(forms["zip"], workers=2), expected)
    with serve(tmp_path) as server:
        assert same(batches(f"{server.address}/shards/{{000..003}}.tar", workers=2), expected)
        assert same(batches(f"{server.address}/all.zip?key=1"), expected)
    args = argparse.Namespace(data_path=str(forms["zip"]), input_size=16)
    assert len(build_dataset(False, args)) == VAL


@pytest.mark.extra
def test_parquet_is_the_same_data(tmp_path, folder):
    pytest.importorskip("pyarrow")
    shutil.move(folder / "train" / "c0" / "deeper" / "x.jpg", folder / "train" / "c0" / "x.jpg")
    os.remove(folder / "train" / "c1" / "notes.txt"), os.remove(folder / "train" / "c1" / "._000.jpg")
    path = make_parquet(tmp_path / "parquet", folder)
    for split in ("train", "val"):
        same_files(find_images(path, split), find_images(folder, split))
    expected = batches(folder)
    assert same(batches(path), expected) and same(batches(path, workers=2), expected)
    assert same(batches(path, shuffle="near"), batches(path, workers=2, shuffle="near"))
    with serve(tmp_path) as server:
        assert same(batches(f"{server.address}/parquet/train-00000-of-00001.parquet"), expected)


@pytest.mark.extra
def test_row_groups_are_kept_and_sets_that_are_too_large_are_warned_of(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    from pyarrow.parquet import ParquetFile

    make_folder(tmp_path / "set" / "train", TRAIN, classes=2)
    path, reads, read = make_parquet(tmp_path / "parquet", tmp_path / "set"), [], ParquetFile.read_row_group
    monkeypatch.setattr(ParquetFile, "read_row_group", lambda *a, **more: reads.append(0) or read(*a, **more))
    args = argparse.Namespace(data_path=path, input_size=16, seed=3, batch_size=4, num_workers=0)
    counts, args.pixel_range = [], None
    for room, args.shuffle in ((1 << 20, "full"), (0, "full"), (0, "near")):
        monkeypatch.setattr(parquet, "KEPT", room)
        parquet._groups.clear(), reads.clear()
        assert len(list(train_loader(build_pretrain_dataset(args), args, False)[0])) == TRAIN // 4
        counts.append((len(reads), "pass --shuffle near" in capsys.readouterr().err))
    groups = 1 + (TRAIN - 1) // 5
    assert counts[0] == (groups, False) and counts[1][0] > groups and counts[1][1] and not counts[2][1]


def test_a_store_of_fsspec(tmp_path, folder, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for path in make_shards(tmp_path / "shards", folder).iterdir():
        system.pipe(f"/bucket/{path.name}", path.read_bytes())
    for path in ("memory://bucket/{000..003}.tar", "memory://bucket/*.tar", "memory://bucket"):
        same_files(find_images(path), find_images(folder))
    with pytest.raises(UserError, match=r"memory://bucket/9\.tar: does not exist"):
        find_images("memory://bucket/9.tar")
    with pytest.raises(UserError, match="nosuch"):
        find_images("nosuch://bucket/9.tar")

    def refuse(*_, **__):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(type(system), "glob", refuse)
    with pytest.raises(UserError, match=r"memory://bucket/\*\.tar: no credentials"):
        find_images("memory://bucket/*.tar")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_set_of_archives_goes_to_started_processes(tmp_path, folder, method):
    path = make_zip(tmp_path / "a.zip", folder)
    dataset = build_pretrain_dataset(argparse.Namespace(data_path=path, input_size=16))
    dataset[3]  # a descriptor is open
    with multiprocessing.get_context(method).Pool(1) as pool:
        image, label, index = pool.apply(dataset.__getitem__, (3,))
    assert torch.equal(image, dataset[3][0]) and (label, index) == dataset[3][1:]


def test_a_list_of_members_and_a_place_can_be_pickled(tmp_path, folder):
    files = find_images(make_zip(tmp_path / "a.zip", folder))
    whole = files.paths[3].open().read()
    for place in (pickle.loads(pickle.dumps(files.paths[3])), pickle.loads(pickle.dumps(files)).paths[3]):
        assert place == files.paths[3] and place.open().read() == whole


def test_webdatasets_labels(tmp_path):
    make_folder(tmp_path / "flat", 13)
    numbers = {f"{i:03d}": (7 * i) % 12 for i in range(13)}
    cls = {f"{key}.cls": str(value).encode() for key, value in numbers.items()}
    text = {f"{key}.json": json.dumps({"label": value, "w": 3}).encode() for key, value in numbers.items()}
    for number, more in enumerate((cls, text)):
        files = find_images(make_tar(tmp_path / f"{number}.tar", tmp_path / "flat", **more))
        assert files.classes == [f"{i:05d}" for i in range(12)] and files.ignored == 0
        found = zip(files.paths, files.labels, strict=True)
        assert {os.path.basename(path)[:3]: label for path, label in found} == numbers
        assert files.paths[0].endswith(".tar/000.jpg")  # the member's own name
    hidden = {**cls, "000.cls": b".x/..", "000.json": b"[" * 60_000}
    files = find_images(make_tar(tmp_path / "hidden.tar", tmp_path / "flat", **hidden))
    assert files.classes[-1] == "_x_.." and files.paths.name(len(files.paths) - 1) == "_x_../000.jpg"
    captions = {name: json.dumps({"caption": "x"}).encode() for name in text}
    files = find_images(make_tar(tmp_path / "captions.tar", tmp_path / "flat", **captions))
    assert files.labels is None and files.ignored == 13
    del cls["003.cls"]
    with pytest.raises(UserError, match=r"003\.jpg has no label"):
        find_images(make_tar(tmp_path / "some.tar", tmp_path / "flat", **cls))


def test_inputs_of_other_programs(tmp_path, folder):
    path = make_tar(tmp_path / "all.tar", folder)
    one = str(folder / "val" / "c0" / "000.jpg")
    files, shown = find_inputs([str(path), one])
    assert len(files.paths) == TRAIN + VAL + 1 == len(shown)
    assert shown[0].startswith("train/c0") and shown[TRAIN + VAL] == "000.jpg"
    assert (read_image(files.paths[TRAIN + VAL - 1]) != 0).any()
    with pytest.raises(UserError, match=r"none\.tar: does not exist"):
        find_inputs([str(tmp_path / "none.tar")])


def test_a_list_of_members_takes_little_memory_and_opens_again_in_no_time(tmp_path, folder, monkeypatch):
    path = make_shards(tmp_path / "shards", folder)
    first = find_images(path)
    monkeypatch.setattr(members, "make_table", None)  # no second listing
    again = find_images(path)
    assert names(again) == names(first) and again.paths.nbytes < 60 * TRAIN
    plain = b"".join(os.fsencode(name) + b"\0" for name in names(first))
    assert again.paths.digest() == hashlib.sha256(plain).hexdigest()
    taken = again.paths.take([20, 3, 4])
    assert taken.digest() != again.paths.digest() == again.paths.take(range(TRAIN)).digest()
    assert [str(place) for place in taken] == [str(again.paths[i]) for i in (20, 3, 4)]
    assert [taken.name(i) for i in range(3)] == [again.paths.name(i) for i in (20, 3, 4)]
    assert again.paths[-1] == again.paths[TRAIN - 1] and again.paths[2:4] == [again.paths[2], again.paths[3]]
    with pytest.raises(IndexError):
        again.paths[TRAIN]


def test_a_damaged_or_old_cache_is_made_again(tmp_path, folder):
    path = make_tar(tmp_path / "all.tar", folder)
    expected = names(find_images(path))
    (cache,) = (tmp_path / "cache" / "mae").glob("*.npz")
    whole = cache.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], whole[:300] + b"\xff\xff" + whole[302:]):
        cache.write_bytes(damage)
        assert names(find_images(path)) == expected
        assert len(cache.read_bytes()) == len(whole)
    make_tar(path, folder / "val")
    assert len(find_images(path).paths) == VAL


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, folder, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(find_images(make_tar(tmp_path / "all.tar", folder)).paths) == TRAIN
    assert "warning" in (text := capsys.readouterr().err) and "XDG_CACHE_HOME" in text


# ---------------------------------------------------------------- near


def test_near_is_a_permutation_of_runs_of_neighbours():
    rng = np.random.default_rng(0)
    shards, starts = rng.integers(0, 40, 5000), rng.permutation(5000)
    order, again, other = (near_order(shards, starts, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert sorted(order) == list(range(5000)) and (order == again).all() and (order != other).any()
    seen = shards[order]
    assert len(np.unique(seen[:1500])) == 16 and len(set(seen[:1500]) & set(seen[-900:])) == 0
    place = np.argsort(np.lexsort((starts, shards)))
    alike = place[order][1:] == place[order][:-1] + 1
    assert 0.88 < alike.mean() < 0.95  # runs of 16, cut short at the shards' ends


@pytest.mark.parametrize("repeats", [1, 2])
def test_near_gives_the_same_batches_together_at_any_number_of_processes(repeats):
    shards, starts = np.repeat(np.arange(10), 23), np.tile(np.arange(23), 10)

    def steps(processes, start=0):
        found = []
        for rank in range(processes):
            batch = 12 // processes * repeats
            options = dict(batch_size=batch, repeats=repeats, near=(shards, starts))
            sampler = EpochSampler(230, processes, rank, 5, **options)
            sampler.set_epoch(2, start)
            keys = list(sampler)
            assert len(keys) == len(sampler) - start * batch
            found.append([frozenset(keys[i : i + batch]) for i in range(0, len(keys), batch)])
        return [frozenset().union(*parts) for parts in zip(*found, strict=True)]

    assert steps(1) == steps(2) == steps(4) and len(steps(1)) == 19
    assert steps(2, start=7) == steps(1)[7:]
    assert len({key[1] for step in steps(3) for key in step}) == 19 * 12


def test_near_reads_neighbours_together(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(archives, "_GAP", 2048)  # pictures of a test are small
    make_shards(tmp_path / "shards", folder, 2)
    with serve(tmp_path) as server:
        address = f"{server.address}/shards/{{000..001}}.tar"
        find_images(address)
        counts = []
        for shuffle in ("full", "near"):
            server.requests.clear()
            found = batches(address, shuffle=shuffle, pixel_range=None)  # no look before the start
            counts.append(len(server.requests))
        server.requests.clear()
        assert same(found, batches(address, workers=2, shuffle="near", pixel_range=None))
        assert counts[0] > 15 and counts[1] < 10 and len(server.requests) <= counts[1] + 1
    assert same(found, batches(tmp_path / "shards", shuffle="near"))


def test_several_archives_are_one_set_as_a_pattern_of_them_is(tmp_path, folder):
    make_shards(tmp_path / "shards", folder)
    several = sorted(map(str, (tmp_path / "shards").iterdir()))
    for split in ("train", "val"):
        same_files(find_images(several, split), find_images(folder, split))
    found, pattern = (find_images(path) for path in (several, f"{tmp_path}/shards/*.tar"))
    assert pickle.loads(pickle.dumps(found)).describe() == found.describe()
    assert found.paths.digest() == pattern.paths.digest() and len(found.paths.places[0]) == TRAIN
    assert find_images(several).describe().endswith(f"{several[0]} and 3 more (1 other file ignored: 1 .txt)")
    with pytest.raises(UserError, match=r"000\.tar: is given twice"):
        find_images([*several, several[0]])


def test_archives_that_are_named_after_splits_are_splits_also_one_by_one(tmp_path, folder):
    """As `shards/*.tar` arrives from a shell: val's images must not be trained on."""
    for split in ("train", "val"):
        make_tar(tmp_path / f"{split}-0.tar", folder / split)
    both = [str(tmp_path / f"{split}-0.tar") for split in ("train", "val")]
    for split in ("train", "val"):
        same_files(find_images(both, split), find_images(folder, split))


def test_images_in_no_split_or_in_one_of_two_are_told(tmp_path, folder, capsys):
    make_tar(tmp_path / "t" / "train-0.tar", folder / "train")
    make_tar(tmp_path / "t" / "more.tar", folder / "val")
    make_tar(tmp_path / "t" / "val-0.tar", folder / "val")
    for split, count in (("train", TRAIN), ("val", VAL)):
        assert len(find_images(tmp_path / "t", split).paths) == count
    warned = capsys.readouterr().err
    assert warned.count("no split") == 1 and f"{VAL} images beside train/ left out, in no split" in warned
    for name in ("Training", "TRAIN"):
        shutil.copytree(folder / "train", tmp_path / "two" / name)
    with pytest.raises(UserError, match="TRAIN and Training could both be train/"):
        find_images(make_tar(tmp_path / "two.tar", tmp_path / "two"))


def test_data_sets_in_an_archive_each_keep_their_splits(tmp_path, folder):
    both = [make_tar(tmp_path / f"{name}.tar", folder, wrapper=f"{name}/") for name in ("one", "two")]
    for split, count in (("train", TRAIN), ("val", VAL)):
        files = find_images(both, split)
        assert len(files.paths) == 2 * count and files.classes == find_images(folder, split).classes


def test_sets_of_archives_and_their_pages_are_read_near(tmp_path, folder, monkeypatch):
    """A folder of archives is a set, others another; each page is an image; all of it is read ahead."""
    monkeypatch.setattr(archives, "_GAP", 2048)
    make_shards(tmp_path / "a", folder / "train", 2)
    pages = [Image.new("RGB", (16, 12), (60 * i,) * 3) for i in range(4)]
    (tmp_path / "pages" / "c0").mkdir(parents=True)
    for name in ("p.tif", "q.tif"):
        pages[0].save(tmp_path / "pages" / "c0" / name, save_all=True, append_images=pages[1:])
    here = [tmp_path / "a", make_tar(tmp_path / "b.tar", tmp_path / "pages")]
    with serve(tmp_path) as server:
        places = [tmp_path / "a", f"{server.address}/b.tar"]
        args = argparse.Namespace(data_path=places, input_size=16, seed=3, pages="all", pixel_range=None)
        dataset = build_pretrain_dataset(args)
        server.requests.clear()
        found = batches_of(dataset, shuffle="near")
        assert same(found, batches(here, pages="all", pixel_range=None, shuffle="near"))
        assert len(found) == 30 // 4 and 0 < len(server.requests) < 5


def test_near_is_for_archives_and_warns_of_sorted_classes(tmp_path, folder, capsys):
    one = make_tar(tmp_path / "one.tar", folder)
    for path in (folder, [folder, one]):
        with pytest.raises(UserError, match=r"--shuffle near: .* not all of these are"):
            near_places(build_pretrain_dataset(argparse.Namespace(data_path=path, input_size=16)))
    args = argparse.Namespace(data_path=make_tar(tmp_path / "all.tar", folder), input_size=16)
    near_places(build_pretrain_dataset(args))
    assert "of one class" in capsys.readouterr().err
    mixed = make_tar(tmp_path / "mixed.tar", folder, sorted(files_of(folder), key=lambda name: name[::-1]))
    near_places(build_pretrain_dataset(argparse.Namespace(data_path=mixed, input_size=16)))
    assert not capsys.readouterr().err


# ---------------------------------------------------------------- bad input


def one_line(path):
    with pytest.raises(UserError) as error:
        find_images(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500 and os.path.basename(str(path)) in text
    return text


def test_what_cannot_be_read_by_offset(tmp_path, folder):
    for mode, ending in (("gz", "tar.gz"), ("bz2", "tar.bz2"), ("xz", "tgz"), ("gz", "tar")):
        with tarfile.open(tmp_path / f"a.{ending}", f"w:{mode}") as tar:
            tar.add(folder, ".")
        text = one_line(tmp_path / f"a.{ending}")
        assert "compressed" in text and ".zip" in text
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.write(folder / "val" / "c0" / "000.jpg", "x.jpg")
    assert "compressed by method 12" in one_line(tmp_path / "a.zip")


def test_truncated_archives(tmp_path, folder):
    whole = make_tar(tmp_path / "whole.tar", folder).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [info.offset for info in tar][5]
    for cut in (ends, ends + 100, ends + 700, len(whole) // 2, 300):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        assert "truncated" in one_line(tmp_path / "cut.tar")
    whole = make_zip(tmp_path / "whole.zip", folder).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-500])
    assert "truncated" in one_line(tmp_path / "cut.zip")
    (tmp_path / "empty.tar").touch()
    assert "truncated" in one_line(tmp_path / "empty.tar")


def special(path, name, kind=tarfile.REGTYPE, target="", twice=False):
    with tarfile.open(path, "w") as tar:
        for _ in range(1 + twice):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info, io.BytesIO())
    return path


def test_members_that_have_no_place_in_a_data_set(tmp_path):
    path = tmp_path / "a.tar"
    assert "a.jpg twice" in one_line(special(path, "c/a.jpg", twice=True))
    assert "../a.jpg, a name outside" in one_line(special(path, "../a.jpg"))
    assert "/etc/a.jpg, a name outside" in one_line(special(path, "/etc/a.jpg"))
    assert "a link (c/a.jpg)" in one_line(special(path, "c/a.jpg", tarfile.SYMTYPE, "b.jpg"))
    assert "a link (c/a.jpg)" in one_line(special(path, "c/a.jpg", tarfile.LNKTYPE, "b.jpg"))
    assert "no plain file" in one_line(special(path, "c/a.jpg", tarfile.FIFOTYPE))
    assert "holds an archive (c/b.tar.gz)" in one_line(special(path, "c/b.tar.gz"))
    assert "no images in it" in one_line(special(path, "c/readme.txt"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("link.jpg")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "target")
    assert "a link (link.jpg)" in one_line(tmp_path / "a.zip")


def test_names_that_are_in_two_archives_count_twice_with_a_warning(tmp_path, folder, capsys):
    for i in range(2):
        make_tar(tmp_path / "twice" / f"{i}.tar", folder / "val")
    files = find_images(tmp_path / "twice")
    assert len(files.paths) == 2 * VAL and len(set(files.paths)) == 2 * VAL
    assert f"{VAL} images with the name of another one" in capsys.readouterr().err


def test_paths_that_name_no_archives(tmp_path, folder):
    make_tar(tmp_path / "a.tar", folder)
    for path in (tmp_path / "b.tar", tmp_path / "*.zip", tmp_path / "{a,b}.tar"):
        with pytest.raises(UserError, match="does not exist"):
            find_images(path)
    for inner, count in (("3..1", -1), ("0..99999999999", 100_000_000_000)):
        with pytest.raises(UserError, match=f"stands for {max(0, count):,} archives"):
            find_images(f"{tmp_path}/{{{inner}}}.tar")
    with pytest.raises(UserError, match=r"no archives .*README"):
        (tmp_path / "README").touch()
        find_images(tmp_path / "R*")
    for path in ("http://localhost/*.tar", "http://localhost/folder"):
        with pytest.raises(UserError, match="web servers list no files"):
            find_images(path)


def test_members_that_are_no_images_are_named(tmp_path, folder):
    bad = {"train/c0/bad.jpg": b"<html>", "train/c1/empty.jpg": b""}
    path = make_tar(tmp_path / "all.tar", folder, **bad)
    text = one_line(path)
    assert "2 of 24" in text and "bad.jpg (no image format" in text and "empty.jpg (empty file)" in text
    for _ in range(2):
        files = find_images(path, bad_images="skip any")
        assert len(files.paths) == TRAIN and files.skipped[0][0] == f"{path}/train/c0/bad.jpg"
        assert files.labels.tolist() == find_images(folder).labels.tolist()
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bad.jpg", b"<html>")
    assert "no image format" in one_line(tmp_path / "a.zip")


def damaged(path, dataset, index, data):
    place = dataset.files.paths[index]
    times = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(place.start + (60 if place.kind else 0))
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return place


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_damaged_member_is_named(tmp_path, folder, kind):
    path = (make_tar if kind == "tar" else make_zip)(tmp_path / f"all.{kind}", folder)
    for bad_images in ("error", "skip"):
        args = argparse.Namespace(data_path=path, input_size=16, bad_images=bad_images)
        dataset = build_pretrain_dataset(args)
        place = damaged(path, dataset, 5, b"\xff" * 300)
        if bad_images == "error":
            with pytest.raises(BadImage, match=r"all\..*/train/c0/.*: "):
                dataset[5]
        else:
            assert torch.equal(dataset[5][0], dataset[5][0]) and dataset.bad_paths() == [place]


def test_an_archive_that_changes_under_a_run(tmp_path, folder):
    path = make_tar(tmp_path / "all.tar", folder)
    dataset = build_pretrain_dataset(argparse.Namespace(data_path=path, input_size=16))
    stores._open_local.cache_clear()
    make_tar(path, folder / "val")
    with pytest.raises(BadImage, match="has changed since"):
        dataset[0]


def fail(code):
    return lambda handler: handler.send_error(code)


def cut_short(handler):
    handler.answer(b"\xff\xd8", "bytes 0-99/*", length=100)
    handler.close_connection = True


def fewer(handler):
    handler.answer(b"\xff\xd8", "bytes 0-1/*")


def everything(handler):
    handler.send_response(200)
    handler.end_headers()


def hang_up(handler):
    handler.connection.close()


def test_a_store_that_fails_is_asked_again_then_named_in_one_line(tmp_path, folder, monkeypatch):
    make_tar(tmp_path / "all.tar", folder)
    with serve(tmp_path) as server:
        address = f"{server.address}/all.tar"
        server.faults += [fail(503), hang_up, fail(429)]
        args = argparse.Namespace(data_path=address, input_size=16, bad_images="skip")
        dataset = build_pretrain_dataset(args)
        expected = dataset[3][0]
        for fault in (cut_short, fewer, fail(500), hang_up):
            server.faults += [fault] * (stores.TRIES - 1)
            assert torch.equal(dataset[3][0], expected)
            server.faults += [fault] * stores.TRIES
            with pytest.raises(BadImage) as error:  # not skipped: the image is not to blame
                dataset[3]
            assert "\n" not in str(error.value) and f"{stores.TRIES} tries" in str(error.value)
        assert "broke off after 2 of 100" in one_line_of(server, dataset, cut_short)
        assert not dataset.bad.any()
        server.faults += [everything]
        assert "range requests" in one_line(f"{address}?x")
        assert "404" in one_line(f"{server.address}/none.tar")
    monkeypatch.setattr(stores, "TIMEOUT", 1)
    assert "4 tries" in one_line(address)  # nobody is there now


def one_line_of(server, dataset, fault):
    server.faults += [fault] * stores.TRIES
    with pytest.raises(BadImage) as error:
        dataset[3]
    return str(error.value)


def test_without_pread_threads_read_at_their_own_places(tmp_path, monkeypatch):
    """Of Windows; a switch of threads between seeking and reading is provoked."""
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(200)))
    shard = stores.look(str(path))

    class Slow:
        def __init__(self, file):
            self.file, self.read = file, file.read

        def seek(self, start):
            self.file.seek(start)
            time.sleep(0.002)

    with open(path, "rb", buffering=0) as file:
        monkeypatch.delattr(os, "pread", raising=False)
        slow = Slow(file)
        monkeypatch.setattr(stores, "_open_local", lambda shard: slow)
        found = list(ask_all(lambda start: stores.read(shard, start, 2), range(0, 198, 3)))
    assert found == [bytes([start, start + 1]) for start in range(0, 198, 3)]
