"""Several places, names of splits, what is ignored, pages, and formats that not every Pillow reads."""

import argparse
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, features
from transfer_utils import given_args

import main_finetune
import main_linprobe
from util.data import folders
from util.data.find import find_images
from util.data.labelled import build_dataset, labelled_images
from util.data.loader import build_loader
from util.data.read import BadImage, read_image, sniff_header
from util.datasets import build_pretrain_dataset
from util.errors import UserError

RNG = np.random.default_rng(0)


def picture(path, value=0, size=(12, 14), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (*size, 3)).astype(np.uint8)).save(
        path, **options
    )
    return path


def frames(path, count, **options):
    """A file of several pictures; their mean brightness rises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.new("RGB", (16, 12), (40 + 60 * i,) * 3) for i in range(count)]
    for i, one in enumerate(pictures):  # Pillow would leave out pictures that are the same
        one.putpixel((i, 0), (255, 0, 0))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)


def namespace(path, **more):
    return argparse.Namespace(**{"data_path": path, "input_size": 16, "seed": 3, **more})


# ---------------------------------------------------------------- several places


def test_several_places_are_one_set_with_the_classes_of_all(tmp_path):
    for place, classes in (("A", ("cat", "dog")), ("B", ("bird", "dog"))):
        for name in classes:
            for i in range(2):
                picture(tmp_path / place / "train" / name / f"{i}.png", i)
    (tmp_path / "A" / "train" / "cat" / "notes.txt").touch()
    picture(tmp_path / "B" / "val" / "dog" / "0.png")
    both = [str(tmp_path / "A"), tmp_path / "B"]
    files = find_images(both)
    assert files.classes == ["bird", "cat", "dog"] and files.labels.tolist() == [1, 1, 2, 2, 0, 0, 2, 2]
    assert files.labels.dtype == np.int32 and list(files.paths) == [
        *find_images(both[0]).paths, *find_images(both[1]).paths
    ]  # fmt: skip
    assert files.paths.name(6) == "dog/0.png" and list(files.paths.take([6, 1])) == [
        files.paths[6],
        files.paths[1],
    ]
    assert "8 images in 3 classes" in files.describe() and f"{tmp_path}/B/train (1 other" in files.describe()
    assert len(find_images(both, "val").paths) == 1 and find_images(both, "test") is None
    copy = pickle.loads(pickle.dumps(files))
    assert list(copy.paths) == list(files.paths)
    for place in (both + both[:1], [both[0], both[0]]):
        with pytest.raises(UserError, match="A/train: is given twice"):
            find_images(place)
    with pytest.raises(UserError, match="nowhere: does not exist"):
        find_images([both[0], tmp_path / "nowhere"])


def test_several_places_of_which_one_has_no_classes(tmp_path):
    picture(tmp_path / "A" / "train" / "cat" / "0.png")
    picture(tmp_path / "B" / "0.png")
    files = find_images([tmp_path / "A", tmp_path / "B"])
    assert files.labels is None and len(files.paths) == 2
    with pytest.raises(UserError, match="no class folders"):
        labelled_images("train", namespace([tmp_path / "A", tmp_path / "B"]))


def test_the_flag_takes_one_or_more():
    args = given_args(main_finetune, ["--data_path", "A"])
    assert args.data_path == "A" and given_args(main_finetune, []).data_path is None
    assert given_args(main_finetune, ["--data", "A", "B", "--epochs", "3"]).data_path == ["A", "B"]


def test_samples_of_several_places_do_not_depend_on_workers(tmp_path):
    for i in range(6):
        picture(tmp_path / "AB"[i % 2] / f"{i}.png", i)
    dataset = build_pretrain_dataset(namespace([tmp_path / "A", tmp_path / "B"]))
    one, two = (next(iter(build_loader(dataset, range(6), 6, workers)))[0] for workers in (0, 2))
    assert torch.equal(one, two)


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "train, val", [("Training", "VALID"), ("TRAIN", "Validation"), ("train", "validation")]
)
def test_splits_by_the_names_that_people_use(tmp_path, train, val):
    picture(tmp_path / train / "a" / "0.png")
    picture(tmp_path / val / "a" / "1.png")
    picture(tmp_path / "Testing" / "a" / "2.png")
    for split, name in (("train", train), ("val", val), ("test", "Testing")):
        files = find_images(tmp_path, split)
        assert len(files.paths) == 1 and files.describe().endswith(f"{tmp_path}/{name}")


def test_two_folders_that_could_be_a_split(tmp_path):
    picture(tmp_path / "train" / "0.png")
    picture(tmp_path / "valid" / "0.png")
    picture(tmp_path / "Validation" / "0.png")
    with pytest.raises(UserError, match="valid and Validation could both be val/; rename one"):
        find_images(tmp_path, "val")
    picture(tmp_path / "val" / "1.png")
    assert find_images(tmp_path, "val").source == str(tmp_path / "val")


def test_evaluation_of_another_split(tmp_path):
    for split in ("train", "val", "test"):
        for name in "ab":
            picture(tmp_path / split / name / "0.png")
    picture(tmp_path / "test" / "b" / "1.png")
    args = namespace(tmp_path, split="test")
    assert len(build_dataset(False, args)) == 3 and len(build_dataset(True, args)) == 2
    for script in (main_finetune, main_linprobe):
        with pytest.raises(UserError, match="--split test: only with --eval"):
            script.check_args(given_args(script, ["--split", "test"]))


def test_ignored_files_are_named_by_kind(tmp_path, monkeypatch):
    picture(tmp_path / "0.png")
    for i in range(3):
        (tmp_path / f"{i}.heic").touch()
    (tmp_path / "README").touch()
    monkeypatch.setattr(folders, "IMG_EXTENSIONS", (".png",))
    monkeypatch.setitem(folders.OPTIONAL, "HEIF", ((".heic",), None, "pillow-heif"))
    text = find_images(tmp_path).describe()
    assert "4 other files ignored: 3 .heic (pip install pillow-heif), 1 without extension" in text


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize("name, options", [
    ("a.tif", {}), ("a.gif", {}), ("a.webp", {"lossless": True}),
])  # fmt: skip
def test_pages(tmp_path, name, options):
    frames(tmp_path / "train" / "c0" / name, 3, **options)
    picture(tmp_path / "train" / "c1" / "b.png")
    first = build_pretrain_dataset(namespace(tmp_path))
    assert len(first) == 2
    assert "1 file with several pages, 4 in all: --pages all reads them all" in first.describe()
    args = namespace(tmp_path, pages="all")
    dataset = build_pretrain_dataset(args)
    root = f"{tmp_path}/train"
    assert list(dataset.files.paths) == [*(f"{root}/c0/{name}#{i}" for i in (1, 2, 3)), f"{root}/c1/b.png"]
    assert dataset.files.labels.tolist() == [0, 0, 0, 1] and "4 images in 2 classes" in dataset.describe()
    assert "3 of them pages of 1 file" in dataset.describe() and "--pages all" not in dataset.describe()
    means = [float(read_image(dataset.files.paths[i]).mean()) for i in range(3)]
    assert means == pytest.approx([40, 100, 160], abs=3)
    assert dataset.files.paths.name(2) == f"c0/{name}#3"
    assert labelled_images("train", argparse.Namespace(**vars(args), in_chans=3))[0, 2][0].shape == (
        3,
        16,
        16,
    )
    one, two = (next(iter(build_loader(dataset, range(4), 4, workers)))[0] for workers in (0, 2))
    assert torch.equal(one, two)


def test_small_copies_are_no_pages(tmp_path):
    """Geographic TIFFs hold the same picture in several sizes."""
    big, small = Image.new("L", (32, 32), 9), Image.new("L", (16, 16), 9)
    small.encoderinfo = {"tiffinfo": {254: 1}}
    big.save(tmp_path / "a.tif", save_all=True, append_images=[small])
    with Image.open(tmp_path / "a.tif") as image:
        assert image.n_frames == 2
    dataset = build_pretrain_dataset(namespace(tmp_path, in_chans=1, pages="all"))
    assert len(dataset) == 1 and "#" not in dataset.files.paths[0]


def test_a_damaged_page_is_named(tmp_path):
    frames(tmp_path / "a.tif", 3)
    dataset = build_pretrain_dataset(namespace(tmp_path, pages="all"))
    frames(tmp_path / "a.tif", 2)
    with pytest.raises(BadImage, match=r"a\.tif#3: no page 3: it has 2"):
        dataset[0, 2]
    assert dataset[0, 1][0].shape == (3, 16, 16)


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name, feature", [("a.avif", "avif"), ("a.jp2", "jpg_2000")])
def test_formats_that_this_pillow_reads(tmp_path, name, feature):
    if not features.check(feature):
        pytest.skip(f"this Pillow has no {feature}")
    path = str(picture(tmp_path / name, 1))
    assert sniff_header(path) is None and len(find_images(tmp_path).paths) == 1
    with Image.open(path) as image:
        np.testing.assert_array_equal(read_image(path), np.asarray(image.convert("RGB")))


def test_a_format_that_is_not_read_here_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300))
    monkeypatch.setitem(folders.OPTIONAL, "HEIF", ((".heic",), None, "pillow-heif"))
    assert sniff_header(str(tmp_path / "a.jpg")) == "HEIF is not read here: pip install pillow-heif"
    with pytest.raises(UserError, match="pip install pillow-heif"):
        find_images(tmp_path)
