"""Labelled data: the recipes' transforms, class checks, draws that depend on the position only."""

import random
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from util.data.labelled import check_classes, count_classes, labelled_images
from util.data.loader import build_loader
from util.data.presets import eval_transform, probe_transform, train_transform
from util.data.read import read_picture
from util.data.sampler import EpochSampler
from util.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from util.datasets import build_dataset
from util.errors import UserError
from util.rng import sample_seed


def make_folder(root, classes=("cat", "dog"), per_class=3, splits=("train", "val"), size=(40, 50)):
    rs = np.random.RandomState(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                Image.fromarray(rs.randint(0, 256, (*size, 3), dtype=np.uint8)).save(
                    root / split / name / f"{i}.png"
                )
    return root


def make_args(root, **changes):
    values = dict(
        data_path=str(root), input_size=32, in_chans=3, mean=None, std=None, seed=0, bad_images="error",
        color_jitter=None, aa="rand-m9-mstd0.5-inc1", reprob=0.25, remode="pixel", recount=1, nb_classes=None,
    )  # fmt: skip
    return Namespace(**{**values, **changes})


def test_items_and_classes(tmp_path):
    make_folder(tmp_path)
    train, val = labelled_images("train", make_args(tmp_path)), labelled_images("val", make_args(tmp_path))
    assert train.classes == val.classes == ["cat", "dog"] and len(train) == 6
    image, label, index = train[(2, 4)]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and (label, index) == (1, 4)
    check_classes(train, val)
    assert count_classes(make_args(tmp_path), train) == 2
    assert count_classes(make_args(tmp_path, nb_classes=1000), train) == 1000


def test_only_the_references_attributes_are_needed(tmp_path):
    make_folder(tmp_path)
    args = Namespace(
        data_path=str(tmp_path), input_size=32, color_jitter=None, aa="rand-m9-mstd0.5-inc1", reprob=0.25,
        remode="pixel", recount=1,
    )  # fmt: skip
    for make, splits in ((build_dataset, (True, False)), (labelled_images, ("train", "val"))):
        assert all(make(split, args)[0][0].shape == (3, 32, 32) for split in splits)


def test_train_transform_is_timms(tmp_path):
    make_folder(tmp_path)
    args = make_args(tmp_path)
    chain = create_transform(
        input_size=32, is_training=True, color_jitter=None, auto_augment=args.aa, interpolation="bicubic",
        re_prob=0.25, re_mode="pixel", re_count=1, mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip
    dataset = labelled_images("train", args)
    for epoch in range(4):
        with sample_seed(0, epoch, 1):
            expected = chain(Image.open(dataset.files.paths[1]))
        assert torch.equal(dataset[(epoch, 1)][0], expected)


@pytest.mark.parametrize(("size", "resized"), [(32, 36), (224, 256), (256, 256)])
def test_eval_transform_is_resize_and_centre_crop(tmp_path, size, resized):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (300, 420, 3), dtype=np.uint8)).save(path)
    chain = transforms.Compose(
        [
            transforms.Resize(resized, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    expected = chain(Image.open(path))
    assert torch.equal(
        eval_transform(make_args(tmp_path, input_size=size))(read_picture(str(path), 3)), expected
    )


def test_probe_evaluation_always_crops(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (500, 420, 3), dtype=np.uint8)).save(path)
    args = make_args(tmp_path, input_size=256)
    image = read_picture(str(path), 3)
    assert not torch.equal(eval_transform(args, always_crop=True)(image), eval_transform(args)(image))


def test_rectangular_and_long_strips(tmp_path):
    gradient = np.tile(np.linspace(0, 255, 128, dtype=np.uint8)[None, :, None], (32, 1, 3))
    Image.fromarray(gradient).save(tmp_path / "wide.png")
    args = make_args(tmp_path, input_size=(32, 128), mean=[0.0], std=[1.0])
    wide = read_picture(str(tmp_path / "wide.png"), 3)
    picture = eval_transform(args)(wide)
    assert picture.shape == (3, 32, 128)
    # The centre 7/8 of the gradient, not squeezed
    assert picture[0, 16, 0].item() == pytest.approx(1 / 16, abs=0.02)
    assert picture[0, 16, -1].item() == pytest.approx(15 / 16, abs=0.02)
    Image.fromarray(np.zeros((4, 20000, 3), dtype=np.uint8)).save(tmp_path / "strip.png")
    strip = read_picture(str(tmp_path / "strip.png"), 3)
    assert eval_transform(make_args(tmp_path, input_size=224))(strip).shape == (3, 224, 224)
    for transform in (train_transform(args), probe_transform(args)):
        assert transform(wide).shape == (3, 32, 128)


def test_probe_transform_is_one_crop_and_flip(tmp_path):
    make_folder(tmp_path)
    dataset = labelled_images("train", make_args(tmp_path), probe_transform)
    assert not torch.equal(dataset[(0, 0)][0], dataset[(1, 0)][0])
    assert torch.equal(dataset[(1, 0)][0], dataset[(1, 0)][0])


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_other_channels(tmp_path, channels):
    rs = np.random.RandomState(0)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            array = rs.randint(0, 256, (40, 50, channels), dtype=np.uint8)
            np.save(tmp_path / split / name / "x.npy", array)
    args = make_args(tmp_path, in_chans=channels)
    for is_train in (True, False):
        dataset = labelled_images("train" if is_train else "val", args)
        for epoch in range(20):
            assert dataset[(epoch, 1)][0].shape == (channels, 32, 32)
    probe = labelled_images("train", args, probe_transform)
    assert probe[(0, 0)][0].shape == (channels, 32, 32)
    assert not torch.equal(probe[(0, 0)][0], probe[(1, 0)][0])


def test_randaugment_on_thousands_of_draws(tmp_path):
    """Some draws ask Pillow to posterize to 0 bits, which it refuses: that must not end a run after hours."""
    make_folder(tmp_path, per_class=1, splits=("train",), size=(20, 20))
    for mean in (None, [0.5]):
        channels = 3 if mean is None else 1
        args = make_args(
            tmp_path, input_size=16, in_chans=channels, mean=mean, aa="rand-m10-mstd0.5-inc1-p1.0"
        )
        transform = train_transform(args)
        image = read_picture(str(tmp_path / "train" / "cat" / "0.png"), channels)
        random.seed(0)
        np.random.seed(0)
        for _ in range(300):
            assert transform(image).shape == (channels, 16, 16)


def test_same_batches_for_any_number_of_workers(tmp_path):
    make_folder(tmp_path)
    dataset = labelled_images("train", make_args(tmp_path))

    def batches(workers):
        sampler = EpochSampler(len(dataset), seed=3, batch_size=2)
        sampler.set_epoch(1)
        return [batch[0] for batch in build_loader(dataset, sampler, 2, workers)]

    for a, b in zip(batches(0), batches(2), strict=True):
        assert torch.equal(a, b)


def test_global_generators_are_left_alone(tmp_path):
    make_folder(tmp_path)
    dataset = labelled_images("train", make_args(tmp_path))
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    dataset[(0, 0)]
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_classes_that_differ(tmp_path):
    make_folder(tmp_path, splits=("train",))
    make_folder(tmp_path, classes=("cat", "eel"), splits=("val",))
    args = make_args(tmp_path)
    with pytest.raises(UserError, match=r"differ \(only in .*train: dog; only in .*val: eel\)"):
        check_classes(labelled_images("train", args), labelled_images("val", args))


def test_missing_val(tmp_path):
    make_folder(tmp_path, splits=("train",))
    with pytest.raises(UserError, match="has no val/ folder"):
        labelled_images("val", make_args(tmp_path))


def test_no_labels(tmp_path):
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a.png")
    with pytest.raises(UserError, match="has no class folders, so no labels"):
        labelled_images("train", make_args(tmp_path))


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_empty_class_folder(tmp_path, content):
    make_folder(tmp_path)
    (tmp_path / "train" / "bird").mkdir()
    if content:
        (tmp_path / "train" / "bird" / content).write_text("nothing")
    with pytest.raises(UserError, match=r"train: no images in 1 class folder \(bird\)"):
        labelled_images("train", make_args(tmp_path))


def test_labels_out_of_range(tmp_path):
    make_folder(tmp_path, classes=("a", "b", "c"))
    args = make_args(tmp_path, nb_classes=2)
    with pytest.raises(
        UserError, match=r"--nb_classes 2: .* has 3 classes, so labels up to 2 would be out of range"
    ):
        count_classes(args, labelled_images("train", args))


def test_unreadable_image_is_named(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "val" / "dog" / "0.png").write_bytes((tmp_path / "val" / "dog" / "1.png").read_bytes()[:200])
    dataset = labelled_images("val", make_args(tmp_path))
    with pytest.raises(UserError, match=r"dog/0.png"):
        list(build_loader(dataset, range(len(dataset)), 2))
