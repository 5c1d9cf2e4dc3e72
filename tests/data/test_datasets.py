"""Finding images in every layout, reading them by (seed, epoch, index), and what happens with bad ones."""

import argparse
import os
import random
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from golden_utils import REPO
from PIL import Image
from torchvision.datasets import ImageFolder

from util.data import find
from util.data.folders import ask_all
from util.data.read import BadImage
from util.data.transforms import EvalTransform, PretrainTransform
from util.datasets import (
    ImageDataset,
    ImageFiles,
    PathList,
    build_pretrain_dataset,
    build_val_dataset,
    find_images,
)
from util.errors import UserError


def save(path, value=0, size=(20, 24)):
    """Writes a small picture whose colour is made from `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels[:4] = value % 256
    Image.fromarray(pixels).save(path)
    return str(path)


def names(files):
    return [files.paths.name(i) for i in range(len(files.paths))]


def namespace(path, **more):
    return argparse.Namespace(data_path=path, input_size=16, seed=3, **more)


@pytest.fixture
def image_folder(tmp_path):
    """An ImageFolder root with train and val, of three classes; also what must be ignored."""
    for split, count in (("train", 4), ("val", 2)):
        for c, label in enumerate(("bird", "cat", "Ant")):
            for i in range(count):
                save(tmp_path / split / label / f"{i}.jpg", 10 * c + i)
    save(tmp_path / "train" / "cat" / "deeper" / "x.png", 50)
    save(tmp_path / "train" / "cat" / "a-b" / "y.png", 51)
    save(tmp_path / "train" / "cat-like" / "z.png", 52)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    save(tmp_path / "train" / "cat" / "._0.png")
    save(tmp_path / "train" / ".git" / "0.png")
    (tmp_path / "train" / ".DS_Store").touch()
    (tmp_path / "train" / "README").write_text("...")
    return tmp_path


# ---------------------------------------------------------------- layouts


def test_image_folder_root_has_imagefolders_samples_in_its_order(image_folder):
    for split in ("train", "val"):
        files = find_images(image_folder, split)
        hidden = lambda path: not os.path.basename(path).startswith(".") and "txt" not in path  # noqa: E731
        # torchvision does not ignore hidden folders
        reference = ImageFolder(str(image_folder / split), is_valid_file=hidden) if split == "val" else None
        if reference is None:
            os.rename(image_folder / "train" / ".git", image_folder / ".git")
            reference = ImageFolder(str(image_folder / split), is_valid_file=hidden)
        assert files.classes == reference.classes
        assert list(files.paths) == [path for path, _ in reference.samples]
        assert files.labels.tolist() == [label for _, label in reference.samples]
        assert files.labels.dtype == np.int32 and files.skipped == []
    assert find_images(image_folder).ignored == 2
    assert find_images(image_folder, "test") is None


def test_folder_of_class_folders(image_folder):
    files = find_images(image_folder / "val")
    assert files.classes == ["Ant", "bird", "cat"] and files.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert find_images(image_folder / "val", "val") is None


def test_an_empty_class_folder_does_not_matter(image_folder):
    (image_folder / "val" / "dog" / "deeper").mkdir(parents=True)
    files = find_images(image_folder / "val")
    assert files.classes == ["Ant", "bird", "cat"] and len(files.paths) == 6


def test_a_flat_folder_has_no_classes(tmp_path):
    for i in (10, 9, 1):
        save(tmp_path / f"{i}.png", i)
    files = find_images(tmp_path)
    assert names(files) == ["1.png", "10.png", "9.png"]
    assert files.labels is None and files.classes is None


@pytest.mark.parametrize("extra", ["top.png", "papers/notes.txt"])
def test_nested_folders_that_are_no_classes(tmp_path, extra):
    """An image beside the folders, or a folder that holds files but no images."""
    save(tmp_path / "2020" / "may" / "b.png")
    save(tmp_path / "2021" / "a.png")
    save(tmp_path / extra) if extra.endswith("png") else (tmp_path / "papers").mkdir()
    if extra.endswith("txt"):
        (tmp_path / extra).write_text("x")
    files = find_images(tmp_path)
    assert files.labels is None and files.classes is None
    assert set(names(files)) == {"2020/may/b.png", "2021/a.png"} | (
        {extra} if extra.endswith("png") else set()
    )


def test_every_extension_in_any_case(tmp_path):
    for i, extension in enumerate(find.IMG_EXTENSIONS):
        name = f"{i}{extension.upper() if i % 2 else extension}"
        if extension == ".npy":
            with open(tmp_path / name, "wb") as file:  # np.save would add its own extension
                np.save(file, np.zeros((5, 5, 3), np.uint8))
        else:
            Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    (tmp_path / "x.jpgs").touch()
    files = find_images(tmp_path)
    assert len(files.paths) == len(find.IMG_EXTENSIONS) and files.ignored == 1


def test_a_list_of_images(tmp_path):
    inside = save(tmp_path / "lists" / "pictures" / "in side.png", 1)
    outside = save(tmp_path / "elsewhere" / "out.jpg", 2)
    odd = save(tmp_path / "lists" / "no_extension.png", 3)
    os.rename(odd, odd[:-4])
    text = (
        f"\ufeffpictures/in side.png\r\n\r\n# a remark\n  {outside}  \n../elsewhere/out.jpg\nno_extension\n"
    )
    (tmp_path / "lists" / "train.txt").write_bytes(text.encode())
    files = find_images(tmp_path / "lists" / "train.txt")
    assert [os.path.normpath(path) for path in files.paths] == [inside, outside, outside, odd[:-4]]
    assert files.labels is None and "4 images in" in files.describe()
    assert find_images(tmp_path / "lists" / "train.txt", "val") is None


def test_a_list_given_by_its_bare_name(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    (tmp_path / "BMW.txt").write_text("a.png")
    monkeypatch.chdir(tmp_path)
    assert len(find_images("BMW.txt").paths) == 1


@pytest.mark.needs("posix")
def test_links_are_followed_and_loops_survived(tmp_path):
    save(tmp_path / "store" / "a.png", 1)
    save(tmp_path / "data" / "real" / "b.png", 2)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "real" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "real" / "self").symlink_to("self")
    (tmp_path / "data" / "real" / "c.png").symlink_to(tmp_path / "store" / "a.png")
    (tmp_path / "store" / "back").symlink_to(tmp_path / "data" / "real")
    files = find_images(tmp_path / "data")
    assert {"linked/a.png", "real/b.png", "real/c.png"} <= set(names(files)) and len(files.paths) < 20
    assert files.classes == ["linked", "real"]


def test_names_in_any_encoding(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    save(tmp_path / odd / "\u56fe.png", 1)
    save(tmp_path / "line\nbreak" / "a.png", 2)
    files = find_images(tmp_path)
    assert sorted(files.classes) == sorted([odd, "line\nbreak"])
    dataset = ImageDataset(files, EvalTransform(8))
    assert [dataset[i][0].shape for i in range(2)] == [(3, 8, 8)] * 2
    (tmp_path / odd / "bad.png").touch()
    with pytest.raises(UserError) as error:
        find_images(tmp_path)
    str(error.value).encode("ascii")
    assert "caf\\xe9/bad.png (empty file)" in str(error.value)
    (tmp_path / "list.txt").write_bytes(b"caf\xe9/" + "\u56fe.png".encode())
    assert os.path.exists(find_images(tmp_path / "list.txt").paths[0])


def test_nesting_deeper_than_pythons_recursion_limit(tmp_path):
    folders = [tmp_path]
    for _ in range(1200):
        folders.append(folders[-1] / "d")
        folders[-1].mkdir()
    path = save(folders[-1] / "a.png")
    try:
        assert list(find_images(tmp_path).paths) == [path]
    finally:  # pytest's own cleaning is recursive
        os.remove(path)
        for folder in reversed(folders[1:]):
            folder.rmdir()


def test_slow_folders_are_asked_side_by_side_and_keep_their_order(tmp_path, monkeypatch):
    for i in range(40):
        save(tmp_path / f"c{i % 20}" / f"{i}.png", i)
    expected = find_images(tmp_path)
    scandir, active, most = os.scandir, [], []

    def slow(path):
        active.append(path)
        time.sleep(0.15)
        most.append(len(active))
        active.remove(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", slow)
    start = time.perf_counter()
    files = find_images(tmp_path)
    assert time.perf_counter() - start < 20 * 0.15 and max(most) > 8
    assert list(files.paths) == list(expected.paths) and files.labels.tolist() == expected.labels.tolist()


@pytest.mark.needs("posix")
def test_a_folder_is_listed_anew_at_every_start(tmp_path):
    save(tmp_path / "c0" / "0.png")
    save(tmp_path / "c1" / "1.png")
    (tmp_path / "c1" / "later").symlink_to(tmp_path / "elsewhere")
    assert (names(find_images(tmp_path)), find_images(tmp_path).ignored) == (["c0/0.png", "c1/1.png"], 1)
    os.rename(tmp_path / "c0" / "0.png", tmp_path / "c1" / "0.png")
    save(tmp_path / "elsewhere" / "2.png")
    assert names(find_images(tmp_path)) == ["c1/0.png", "c1/1.png", "c1/later/2.png", "elsewhere/2.png"]


def test_answers_of_threads_come_in_order_and_the_first_error_counts():
    def work(item):
        time.sleep(0.01 * (item % 3))
        if item in (50, 70):
            raise ValueError(item)
        return -item

    assert list(ask_all(work, range(40))) == [-i for i in range(40)] and list(ask_all(work, [])) == []
    with pytest.raises(ValueError, match="50"):
        list(ask_all(work, range(80)))


# ---------------------------------------------------------------- bad input


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 700
    return text


def test_missing_and_empty_paths(tmp_path):
    for path in (tmp_path / "nowhere", ""):
        with pytest.raises(UserError, match=r"--data_path .*does not exist"):
            find_images(path)
    with pytest.raises(UserError) as error:
        find_images(tmp_path)
    text = one_line(error)
    assert str(tmp_path) in text and "no images" in text and ".jpeg" in text and "found no files" in text


@pytest.mark.needs("posix")
def test_a_pipe_is_no_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a folder nor a file"):
        find_images(tmp_path / "pipe")


def test_folder_without_images_says_what_is_there(tmp_path):
    for name in ("a.fits", "b.fits", "c.fits", "d.txt", "README"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError) as error:
        find_images(tmp_path)
    text = one_line(error)
    assert "5 other files (3 .fits, " in text and "1 without extension" in text and ".npy" in text


def test_empty_train_folder_is_named(tmp_path):
    save(tmp_path / "val" / "a.png")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="/train: no images"):
        find_images(tmp_path)


def test_lists_that_are_none(tmp_path):
    image = save(tmp_path / "a.png")
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "data.bin").write_bytes(b"name" + b"\0" * 600)
    for path in (image, tmp_path / "data.bin"):
        with pytest.raises(UserError, match="neither a folder nor a list"):
            find_images(path)
    with pytest.raises(UserError, match="lists no images"):
        find_images(tmp_path / "empty.txt")


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a" / "0.png")
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def denied(path):  # root may read everything, so chmod would test nothing there
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"cannot read the folder .*/secret: Permission denied"):
        find_images(tmp_path)


def make_bad(folder, good, bad):
    for i in range(good):
        save(folder / f"good{i:03d}.png", i)
    for i in range(bad):
        (folder / f"bad{i}.png").write_bytes(b"" if i % 2 == 0 else b"<html>")


def test_files_that_are_no_images_are_counted_and_named(tmp_path):
    make_bad(tmp_path, 10, 5)
    with pytest.raises(UserError) as error:
        find_images(tmp_path)
    text = one_line(error)
    assert "5 of 15 files" in text and "bad0.png (empty file)" in text and "bad1.png (no image format" in text
    assert "bad3.png" not in text and "--bad_images skip" in text


@pytest.mark.parametrize("good, bad, works", [(10, 1, True), (10, 2, False), (199, 1, True), (198, 2, True),
                                              (197, 3, False), (0, 1, False)])  # fmt: skip
def test_skipping_is_bounded_by_one_percent(tmp_path, good, bad, works):
    make_bad(tmp_path, good, bad)
    if works:
        files = find_images(tmp_path, bad_images="skip")
        assert len(files.paths) == good and len(files.skipped) == bad
        assert all("good" in name for name in names(files)) and "bad0.png" in files.skipped[0][0]
        assert f"{bad} unreadable image{'s' * (bad > 1)} skipped" in files.describe()
    else:
        with pytest.raises(UserError, match="--bad_images skip allows 1 %"):
            find_images(tmp_path, bad_images="skip")


def test_skipping_keeps_labels_with_their_files(image_folder):
    (image_folder / "train" / "bird" / "0.jpg").write_bytes(b"")
    files = find_images(image_folder, bad_images="skip")
    assert len(files.labels) == len(files.paths) == 14
    for path, label in zip(files.paths, files.labels, strict=True):
        relative = os.path.relpath(path, image_folder / "train")
        assert files.classes[label] == relative.split(os.sep)[0]


@pytest.mark.needs("posix")
def test_missing_and_irregular_files_of_a_list(tmp_path):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "list.txt").write_text("a.png\ngone.png\npipe.png\n.\n")
    with pytest.raises(UserError) as error:
        find_images(tmp_path / "list.txt")
    text = one_line(error)
    for part in ("3 of 4", "gone.png (No such file", "pipe.png (not a regular file)", ". (a folder"):
        assert part in text


@pytest.mark.needs("posix")
def test_dangling_links_are_bad_images(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"1 of 2 .*b\.png \(No such file"):
        find_images(tmp_path)


def test_large_sets_are_looked_at_evenly(tmp_path, monkeypatch):
    """Of more files than MAX_PROBES, as many, first and last among them."""
    (tmp_path / "list.txt").write_text("\n".join(f"{i}.png" for i in range(5000)))
    seen = []
    monkeypatch.setattr(find, "MAX_PROBES", 101)
    monkeypatch.setattr(find, "sniff_header", lambda path: seen.append(path))
    assert len(find_images(tmp_path / "list.txt").paths) == 5000
    numbers = sorted(int(os.path.basename(path)[:-4]) for path in seen)
    assert len(numbers) == 101 and numbers[0] == 0 and numbers[-1] == 4999
    assert set(np.diff(numbers)) <= {49, 50}


# ---------------------------------------------------------------- PathList


def test_path_list_is_a_sequence():
    stored = ["a/1.png", "b/ü.png", "/abs/x.png", os.fsdecode(b"\xff.png"), ""]
    paths = PathList(iter(stored), "root")
    expected = [os.path.join("root", name) for name in stored]
    assert (
        len(paths) == 5
        and list(paths) == expected
        and paths[1:4] == expected[1:4]
        and paths[::-2] == expected[::-2]
    )
    assert paths[-1] == expected[-1] and paths[np.int64(2)] == "/abs/x.png" and expected[1] in paths
    assert list(paths.take([3, 0])) == [expected[3], expected[0]]
    for index in (5, -6):
        with pytest.raises(IndexError):
            paths[index]
    assert len(PathList([])) == 0 and list(PathList([])) == []


def test_a_million_paths_cost_little():
    tracemalloc.start()
    paths = PathList(
        (f"n{i // 1000:08d}/n{i // 1000:08d}_{i}.JPEG" for i in range(100_000)), "/data/imagenet/train"
    )
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert paths.nbytes < 100_000 * 45 and current < 1.1 * paths.nbytes + 10_000 and peak < 4 * paths.nbytes
    assert paths[54_321] == "/data/imagenet/train/n00000054/n00000054_54321.JPEG"


@pytest.mark.needs("posix")
def test_reading_paths_writes_to_no_shared_memory(tmp_path):
    """A forked process that reads all names keeps the parent's pages: its private memory hardly grows."""
    code = """
import os, sys
from util.data.find import PathList
def private():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private"))
paths = PathList((f"{i:030d}.png" for i in range(300_000)), "root")
if os.fork() == 0:
    before = private()
    total = sum(len(paths[i]) for i in range(len(paths)))
    print(private() - before, total, flush=True)
    os._exit(0)
os.wait()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    growth_kb, total = map(int, run.stdout.split())
    assert total == 300_000 * 39
    assert growth_kb < 3000  # a list of strings: 27,000


# ---------------------------------------------------------------- the data set


def test_samples_depend_on_seed_epoch_and_index_only(image_folder):
    for loader in ("default", "reference"):
        args = namespace(image_folder, loader=loader)
        dataset = build_pretrain_dataset(args)
        first = {key: dataset[key] for key in [(e, i) for e in range(2) for i in range(len(dataset))]}
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        for key in reversed(first):
            image, label, index = build_pretrain_dataset(args)[key] if key == (1, 3) else dataset[key]
            assert torch.equal(image, first[key][0]) and (label, index) == (first[key][1], key[1])
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(dataset[3][0], first[0, 3][0])
        assert not torch.equal(first[0, 3][0], first[1, 3][0])
        other = build_pretrain_dataset(argparse.Namespace(**{**vars(args), "seed": 4}))
        assert not torch.equal(other[0, 3][0], first[0, 3][0])
        expected = torch.uint8 if loader == "default" else torch.float32
        assert image.dtype == expected and image.shape == (3, 16, 16)


def test_labels_are_those_of_the_folders_or_minus_one(image_folder, tmp_path_factory):
    dataset = build_val_dataset(namespace(image_folder))
    assert [dataset[i][1:] for i in range(6)] == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]
    flat = tmp_path_factory.mktemp("flat")
    save(flat / "a.png")
    assert build_pretrain_dataset(namespace(flat))[0][1:] == (-1, 0)


def test_val_dataset_is_fixed_and_centre_cropped(image_folder):
    dataset = build_val_dataset(namespace(image_folder, loader="reference"))
    assert torch.equal(dataset[0, 1][0], dataset[7, 1][0]) and dataset[0][0].dtype == torch.uint8
    assert build_val_dataset(namespace(image_folder / "val")) is None
    assert "6 images in 3 classes" in dataset.describe()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("loader", ["default", "reference"])
def test_channels_and_rectangles(image_folder, channels, loader):
    if channels in (2, 4):
        for path in find_images(image_folder).paths[:] + find_images(image_folder, "val").paths[:]:
            image = Image.open(path).convert("RGBA")
            image.save(path, format="PNG")
    args = argparse.Namespace(data_path=image_folder, input_size=(32, 128), in_chans=channels, loader=loader)
    assert build_pretrain_dataset(args)[2, 1][0].shape == (channels, 32, 128)
    assert build_val_dataset(args)[0][0].shape == (channels, 32, 128)


@pytest.mark.parametrize("loader", ["default", "reference"])
def test_a_crop_has_the_share_that_crop_scale_says(tmp_path, loader):
    for i in range(4):
        save(tmp_path / f"{i}.png", i, (40, 40))
    options = {"data_path": tmp_path, "input_size": 40, "seed": 3, "loader": loader, "mean": 0.5, "std": 0.25}
    dataset = build_pretrain_dataset(argparse.Namespace(crop_scale=[1.0, 1.0], **options))
    image = torch.from_numpy(np.asarray(Image.open(tmp_path / "0.png")).copy()).permute(2, 0, 1)
    if loader == "reference":
        image = (image / 255 - 0.5) / 0.25
    samples = [dataset[epoch, 0][0] for epoch in range(12)]
    assert {torch.equal(sample, image) for sample in samples} == {True, False}  # flipped or not
    assert all(torch.equal(s, image) or torch.equal(s.flip(-1), image) for s in samples)
    usual = build_pretrain_dataset(argparse.Namespace(**options))
    same = build_pretrain_dataset(argparse.Namespace(crop_scale=[0.2, 1.0], **options))
    assert torch.equal(usual[3, 1][0], same[3, 1][0]) and not torch.equal(usual[3, 1][0], dataset[3, 1][0])


def test_thirteen_channels_from_arrays(tmp_path):
    array = np.random.default_rng(0).integers(0, 65536, (40, 50, 13)).astype(np.uint16)
    np.save(tmp_path / "a.npy", array)
    dataset = build_pretrain_dataset(namespace(tmp_path, in_chans=13))
    assert dataset[0, 0][0].shape == (13, 16, 16)
    with pytest.raises(UserError, match=r"--in_chans 13: .*--loader default"):
        build_pretrain_dataset(namespace(tmp_path, in_chans=13, loader="reference"))
    with pytest.raises(BadImage, match=r"13 channels where the model has 3 \(--in_chans\)"):
        build_pretrain_dataset(namespace(tmp_path))[0]


def test_without_a_path_the_demo_set_is_used_and_said(image_folder, monkeypatch, capsys):
    monkeypatch.setattr("util.demo_set.files.ensure_demo_data", lambda log: image_folder)
    assert len(build_pretrain_dataset(namespace(None))) == 15
    assert len(build_val_dataset(namespace(None))) == 6
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "demo" in lines[0] and "--data_path" in lines[0]


# ---------------------------------------------------------------- bad images met while training


def break_file(path):
    """Keeps the header, so that only decoding finds out."""
    os.truncate(path, os.path.getsize(path) // 2)


@pytest.fixture
def with_bad(tmp_path):
    """Files of 250 images of which 3 and 4 are cut off, found before that happened."""
    for i in range(250):
        save(tmp_path / f"{i:03d}.png", i)
    files = find_images(tmp_path)
    for i in (3, 4):
        break_file(files.paths[i])
    return files


def test_error_names_the_file_and_what_to_do(with_bad):
    dataset = ImageDataset(with_bad, PretrainTransform(16))
    with pytest.raises(BadImage) as error:
        dataset[0, 3]
    assert error.value.path == with_bad.paths[3]
    assert with_bad.paths[3] in one_line(error) and "--bad_images skip" in str(error.value)


@pytest.mark.parametrize("pil", [False, True])
def test_skip_takes_the_next_good_image_and_remembers(with_bad, pil, capfd):
    transform = (lambda image: torch.from_numpy(np.array(image))) if pil else EvalTransform(16)
    with_bad.labels = np.arange(250, dtype=np.int32)
    dataset = ImageDataset(with_bad, transform, bad_images="skip", pil=pil)
    good, label, index = dataset[0, 5]
    assert (label, index) == (5, 5)
    image, label, index = dataset[0, 3]
    assert torch.equal(image, good) and (label, index) == (5, 3)
    assert dataset.bad.dtype == torch.uint8 and dataset.bad.is_shared()
    assert dataset.bad.nonzero().flatten().tolist() == [3, 4]
    assert dataset.bad_paths() == with_bad.paths[3:5] and dataset.path(3) == with_bad.paths[5]
    dataset.report_bad_images()
    dataset.report_bad_images()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "2 of the images" in lines[0] and with_bad.paths[3] in lines[0]


def test_substitutes_use_the_draws_of_the_sample_asked_for(with_bad):
    """Otherwise the same crop would come twice in an epoch."""
    dataset = ImageDataset(with_bad, PretrainTransform(16), bad_images="skip")
    assert not torch.equal(dataset[0, 4][0], dataset[0, 5][0])
    again = ImageDataset(with_bad, PretrainTransform(16), bad_images="skip")
    again.bad[4] = 1  # known beforehand or not: the same sample
    assert torch.equal(again[0, 4][0], dataset[0, 4][0])


def test_the_last_image_is_replaced_by_the_first(with_bad):
    break_file(with_bad.paths[249])
    dataset = ImageDataset(with_bad, EvalTransform(16), bad_images="skip")
    assert torch.equal(dataset[249][0], dataset[0][0])


def test_too_many_bad_images_end_the_run_with_their_names(with_bad):
    break_file(with_bad.paths[5])
    dataset = ImageDataset(with_bad, EvalTransform(16), bad_images="skip")
    dataset[3 - 1]
    with pytest.raises(UserError) as error:
        dataset[3]
    text = one_line(error)
    assert "3 images unreadable" in text and "(here 2)" in text
    assert all(path in text for path in with_bad.paths[3:6])


def test_images_skipped_before_the_start_count_too(with_bad):
    with_bad.skipped = [("elsewhere.png", "empty file")]
    dataset = ImageDataset(with_bad, EvalTransform(16), bad_images="skip")
    with pytest.raises(UserError, match="3 images unreadable"):
        dataset[3]


def test_a_set_without_any_good_image_ends(tmp_path):
    path = save(tmp_path / "a.png")
    files = find_images(tmp_path)
    break_file(path)
    with pytest.raises(UserError, match="1 image unreadable"):
        ImageDataset(files, EvalTransform(16), bad_images="skip")[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_flags_are_shared_with_workers(with_bad, method):
    dataset = ImageDataset(with_bad, EvalTransform(16), bad_images="skip")
    loader = torch.utils.data.DataLoader(
        dataset, 5, sampler=range(10), num_workers=1, multiprocessing_context=method
    )
    assert sum(len(batch[0]) for batch in loader) == 10
    assert dataset.bad.nonzero().flatten().tolist() == [3, 4]


def test_describe_is_one_line():
    files = ImageFiles("/data\nx", "/data\nx", PathList(["a"]), ignored=1234, skipped=[("b\n.png", "empty")])
    for text in (
        "1 image in /data\\nx",
        "1,234 other files ignored",
        "1 unreadable image skipped: b\\n.png",
    ):
        assert text in files.describe()
    assert "\n" not in files.describe()
