"""Labelled images for fine-tuning, probing and evaluation: the recipes' transforms around a folder of class folders.

Fine-tuning augments with timm's `create_transform` (RandAugment, erasing), probing with one TensorFlow-style crop and
a flip; evaluation resizes and takes the centre. Grey and RGB pictures go through Pillow as in the reference; images
with another number of channels are cut and resized as arrays, with crop, flip and erasing only, because RandAugment
knows no such pictures (and Pillow would take a fourth channel for transparency).
"""

import math
import os
import random
from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from util.args import UserError, size_pair
from util.crop import RandomResizedCrop
from util.datasets import ImageDataset, ImageFiles, find_images
from util.demo_data import announce_demo_data, ensure_demo_data
from util.distributed import log
from util.image_io import MODES, open_pil, read_image
from util.rng import sample_seed
from util.transforms import channel_stats, crop_ratio, random_resized_crop_box, resize_crop

CROP_SCALE = (0.08, 1.0)  # share of the picture's area in a training crop
EVAL_SHARE = 0.875  # share of the resized picture's side that an evaluation sees


class LabelledImages(ImageDataset):
    """Images with labels; item (epoch, index) or index -> (float32 (C, H, W), label, index).

    Every random draw of an item depends only on (seed, epoch, index). Unreadable files: see `ImageDataset`.

    Args:
        files: with labels and classes.
        transform: path -> tensor; draws from Python's, numpy's and torch's global generators.
    """

    @property
    def classes(self) -> list[str]:
        return self.files.classes

    def _read(self, position: int, epoch: int, index: int) -> torch.Tensor:
        with sample_seed(self.seed, epoch, index):
            return self.transform(self.files.paths[position])


def build_dataset(is_train: bool, args: Namespace) -> LabelledImages:
    """The fine-tuning data set: `train/` with augmentation, or `val/` with the evaluation's transform.

    Args:
        args: data_path, input_size; if present also in_chans, mean, std, seed, bad_images, and of timm's
            augmentation color_jitter, aa, reprob, remode, recount.

    Raises:
        UserError: no such folder, no labels, an empty class.
    """
    return labelled_images("train" if is_train else "val", args, train_transform(args) if is_train else None)


def labelled_images(split: str, args: Namespace, transform: Callable | None = None) -> LabelledImages:
    """The images of `train` or `val` under `args.data_path`; without `transform`, the evaluation's.

    Raises UserError as `build_dataset`.
    """
    path = getattr(args, "data_path", None)
    if not path:
        path = ensure_demo_data(log=log)
        if split == "train":
            announce_demo_data(path, log)
    bad_images, channels = getattr(args, "bad_images", "error"), getattr(args, "in_chans", 3)
    files = find_images(path, split, bad_images)
    layout = "labelled images are needed in train/CLASS/... and val/CLASS/..."
    if files is None:
        raise UserError(f"--data_path {path}: has no {split}/ folder; {layout}")
    empty = _folders_without_images(files)
    if empty and (files.labels is not None or len(empty) < len(_folders(files))):
        raise UserError(f"{files.root}: no images in {len(empty)} class folders ({', '.join(empty[:5])}); remove "
                        "them or add images")  # fmt: skip
    if files.labels is None:
        raise UserError(f"--data_path {path}: {files.source} has no class folders, so no labels; {layout}")
    dataset = LabelledImages(
        files, transform or eval_transform(args), channels, getattr(args, "seed", 0), bad_images
    )
    dataset.sample_bytes = 4 * channels * math.prod(size_pair(args.input_size))  # of float32 samples
    return dataset


def _folders(files: ImageFiles) -> list[str]:
    """Visible folders directly in the split's folder."""
    if not os.path.isdir(files.source):
        return []
    with os.scandir(files.source) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _folders_without_images(files: ImageFiles) -> list[str]:
    folders = _folders(files)
    if files.classes is not None:
        used = set(files.classes)
    else:
        used = {files.paths.name(i).split(os.sep, 1)[0] for i in range(len(files.paths))} if folders else set()
    return [name for name in folders if name not in used]


def check_classes(train: LabelledImages, val: LabelledImages) -> None:
    """Raises UserError unless `train` and `val` have the same classes."""
    if train.classes != val.classes:
        texts = [
            f"only in {one.files.root}: {', '.join(sorted(set(one.classes) - set(two.classes))[:5]) or 'none'}"
            for one, two in ((train, val), (val, train))
        ]
        raise UserError(f"the classes of train and val differ ({'; '.join(texts)})")


def count_classes(args: Namespace, dataset: LabelledImages) -> int:
    """`args.nb_classes` where it was given, else the number of classes that the folder has.

    Raises UserError where labels would lie beyond `--nb_classes`.
    """
    found = len(dataset.classes)
    if args.nb_classes is None:
        return found
    if args.nb_classes < found:
        raise UserError(f"--nb_classes {args.nb_classes}: {dataset.files.root} has {found} classes, so labels up to "
                        f"{found - 1} would be out of range; leave the flag out")  # fmt: skip
    return args.nb_classes


def read_picture(path: str, channels: int) -> Image.Image:
    """A grey (1 channel) or RGB (3) picture of any image file, or of a `.npy` array; raises BadImage."""
    if str(path).lower().endswith(".npy"):
        array = read_image(path, channels)
        return Image.fromarray(array[:, :, 0] if channels == 1 else array)
    return open_pil(path, MODES[channels])


def train_transform(args: Namespace) -> Callable[[str], torch.Tensor]:
    """Fine-tuning's augmentation: path -> normalised float32 (C, H, W). Reads the attributes `build_dataset` names."""
    channels, mean, std = _channels(args)
    erasing = dict(
        probability=getattr(args, "reprob", 0.0), mode=getattr(args, "remode", "pixel"),
        max_count=getattr(args, "recount", 1),
    )  # fmt: skip
    if channels not in (1, 3):
        erase = RandomErasing(**erasing, device="cpu") if erasing["probability"] > 0 else None
        return _ArrayChain(channels, mean, std, _crop_and_flip(args.input_size), erase)
    chain = create_transform(
        input_size=(channels, *size_pair(args.input_size)),
        is_training=True,
        color_jitter=getattr(args, "color_jitter", None),
        auto_augment=getattr(args, "aa", None) or None,
        interpolation="bicubic",
        ratio=crop_ratio(args.input_size),
        re_prob=erasing["probability"],
        re_mode=erasing["mode"],
        re_count=erasing["max_count"],
        mean=mean,
        std=std,
    )
    _let_posterize_take_zero_bits(chain)
    return _PictureChain(channels, chain)


def probe_transform(args: Namespace) -> Callable[[str], torch.Tensor]:
    """Linear probing's augmentation: one TensorFlow-style crop, flip; path -> normalised float32 (C, H, W)."""
    channels, mean, std = _channels(args)
    size, ratio = size_pair(args.input_size), crop_ratio(args.input_size)
    if channels not in (1, 3):
        return _ArrayChain(channels, mean, std, _crop_and_flip(size, tf_style=True), None)
    steps = [
        RandomResizedCrop(size, scale=CROP_SCALE, ratio=ratio, interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    return _PictureChain(channels, transforms.Compose(steps))


def eval_transform(args: Namespace, always_crop: bool = False) -> Callable[[str], torch.Tensor]:
    """The evaluation's transform: resize, centre crop; path -> normalised float32 (C, H, W).

    Up to 224 pixels the picture is resized to size / 0.875 before the crop, above to the size itself; `always_crop`:
    to size / 0.875 at any size, as probing does (256 for 224).
    """
    channels, mean, std = _channels(args)
    size = size_pair(args.input_size)
    share = EVAL_SHARE if always_crop or max(size) <= 224 else 1.0
    if channels not in (1, 3):
        return _ArrayChain(channels, mean, std, lambda image: (_centre_box(*image.shape[:2], size, share), size), None)
    steps = [_CentreResize(size, share), transforms.ToTensor(), transforms.Normalize(mean, std)]
    return _PictureChain(channels, transforms.Compose(steps))


def _channels(args: Namespace) -> tuple[int, Sequence[float], Sequence[float]]:
    channels = getattr(args, "in_chans", 3)
    return channels, *channel_stats(channels, getattr(args, "mean", None), getattr(args, "std", None))


class _PictureChain:
    """path -> Pillow picture -> tensor."""

    def __init__(self, channels: int, chain: Callable[[Image.Image], torch.Tensor]):
        self.channels, self.chain = channels, chain

    def __call__(self, path: str) -> torch.Tensor:
        return self.chain(read_picture(path, self.channels))


class _CentreResize:
    """Pillow picture -> the centre of it, resized to `size`; `share` of the resized picture's side is kept."""

    def __init__(self, size: tuple[int, int], share: float):
        self.size, self.share = size, share
        short = int(size[0] / share)
        self.square = transforms.Compose(
            [transforms.Resize(short, InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
        )

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.size[0] == self.size[1] and max(width, height) <= 16 * min(width, height):
            return self.square(image)
        # Other shapes; and strips, of which the reference's way would make a giant picture before the crop
        top, left, h, w = _centre_box(height, width, self.size, self.share)
        return image.resize(self.size[::-1], Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))


def _centre_box(height: int, width: int, size: tuple[int, int], share: float) -> tuple[int, int, int, int]:
    """(top, left, height, width): the largest centred box of the shape of `size`, shrunk to `share` of its sides."""
    scale = min(height / size[0], width / size[1]) * share
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return (height - h) // 2, (width - w) // 2, h, w


class _ArrayChain:
    """path -> uint8 array -> box, resize[, flip] per channel -> normalised tensor[, erased]."""

    def __init__(self, channels, mean, std, draw: Callable, erase: Callable | None):
        self.channels, self.draw, self.erase = channels, draw, erase
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, path: str) -> torch.Tensor:
        image = read_image(path, self.channels)
        box, size, *flip = self.draw(image)
        pixels = resize_crop(image, box, size)
        if flip and flip[0]:
            pixels = pixels.flip(-1)
        pixels = pixels.contiguous().float().div(255).sub(self.mean).div(self.std)
        return self.erase(pixels) if self.erase else pixels


def _crop_and_flip(input_size, tf_style: bool = False) -> Callable:
    """Draws (box, size, flip) for an array: torchvision's random crop, or the probe's."""
    size, ratio = size_pair(input_size), crop_ratio(input_size)

    def draw(image: np.ndarray):
        height, width = image.shape[:2]
        if tf_style:
            box = RandomResizedCrop.get_params(torch.empty(1, height, width, device="meta"), CROP_SCALE, ratio)
        else:
            box = random_resized_crop_box(height, width, random, CROP_SCALE, ratio)
        return box, size, random.random() < 0.5

    return draw


def _let_posterize_take_zero_bits(chain: transforms.Compose) -> None:
    """Lets RandAugment's posterize keep 0 bits (a black picture), as Pillow did until it began to refuse that.

    timm asks for it once in some hundred images at magnitude 9 with its usual spread.
    """
    for step in chain.transforms:
        policy = getattr(step, "policy", None) or [getattr(step, "ops", None) or []]
        for op in (op for ops in policy for op in ops):
            if getattr(op, "name", "").startswith("Posterize"):
                op.aug_fn = _Posterize(op.aug_fn)


class _Posterize:
    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, image: Image.Image, bits: int, **kwargs) -> Image.Image:
        return self.function(image, bits, **kwargs) if bits > 0 else image.point(lambda value: 0)
