"""The recipes' transforms: image, as `LabelledImages` decodes it -> normalised float32 (C, H, W).

With `uint8` the pixels stay as they are, a quarter of the size in workers, memory and copies, and
`normalize_batch` does the rest on the device: to the same bits on a CPU, to float32's rounding on a GPU.

Fine-tuning augments with timm's `create_transform` (RandAugment, erasing), probing with one TensorFlow-style
crop and a flip; evaluation resizes and takes the centre. Grey and RGB pictures go through Pillow as in the
reference; images with another number of channels are cut and resized as arrays, with crop, flip and erasing
only, because RandAugment knows no such pictures (and Pillow would take a fourth channel for transparency).
So are images of more than 8 bits, which have an `args.pixel_range` (`util.data.depth`).
"""

import functools
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

from util.crop import RandomResizedCrop
from util.data.depth import Depth, depth_of
from util.data.transforms import channel_stats, crop_ratio, random_resized_crop_box, resize_crop
from util.errors import UserError
from util.sizes import size_pair

CROP_SCALE = (0.08, 1.0)  # share of the picture's area in a training crop
EVAL_SHARE = 0.875  # share of the resized picture's side that an evaluation sees
Transform = Callable[[Image.Image | np.ndarray], torch.Tensor]


def train_transform(args: Namespace) -> Transform:
    """Fine-tuning's augmentation; `args`: see `build_dataset`."""
    channels, mean, std, depth = _channels(args)
    probability, mode = getattr(args, "reprob", 0.0), getattr(args, "remode", "pixel")
    count = getattr(args, "recount", 1)
    if depth or channels not in (1, 3):
        erase = RandomErasing(probability, mode=mode, max_count=count, device="cpu") if probability else None
        return _array_chain(_crop_and_flip(args.input_size), mean, std, depth, erase=erase)
    policy = getattr(args, "aa", None) or None
    try:
        chain = create_transform(
            input_size=(channels, *size_pair(args.input_size)),
            is_training=True,
            color_jitter=getattr(args, "color_jitter", None),
            auto_augment=policy,
            interpolation="bicubic",
            ratio=crop_ratio(args.input_size),
            re_prob=probability,
            re_mode=mode,
            re_count=count,
            mean=mean,
            std=std,
        )
    except (AssertionError, ValueError, KeyError) as error:  # timm's answers to a policy it does not know
        raise UserError(f"--aa {policy}: timm cannot make augmentation of it: {error}") from None
    _let_posterize_take_zero_bits(chain)
    return chain


def probe_transform(args: Namespace, uint8: bool = False) -> Transform:
    """Probing's augmentation: one TensorFlow-style crop, and a flip."""
    channels, mean, std, depth = _channels(args)
    size, ratio = size_pair(args.input_size), crop_ratio(args.input_size)
    if depth or channels not in (1, 3):
        return _array_chain(_crop_and_flip(size, tf_style=True), mean, std, depth, uint8)
    crop = RandomResizedCrop(size, CROP_SCALE, ratio, InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *_to_tensor(mean, std, uint8)])


def eval_transform(args: Namespace, always_crop: bool = False, uint8: bool = False) -> Transform:
    """The evaluation's transform: resize, centre crop.

    Up to 224 pixels the picture is resized to size / 0.875 before the crop, above to the size itself;
    `always_crop`: to size / 0.875 at any size, as probing does (256 for 224).
    """
    channels, mean, std, depth = _channels(args)
    size = size_pair(args.input_size)
    share = EVAL_SHARE if always_crop or max(size) <= 224 else 1.0
    if depth or channels not in (1, 3):
        centre = functools.partial(_draw_centre, size=size, share=share)
        return _array_chain(centre, mean, std, depth, uint8)
    return transforms.Compose([_CentreResize(size, share), *_to_tensor(mean, std, uint8)])


def _to_tensor(mean: Sequence[float], std: Sequence[float], uint8: bool) -> list[Callable]:
    if uint8:
        return [transforms.PILToTensor()]
    return [transforms.ToTensor(), transforms.Normalize(mean, std)]


def _array_chain(
    draw: Callable, mean, std, depth: Depth | None, uint8: bool = False, erase=None
) -> Transform:
    """Deep images are always normalised."""
    return _ArrayChain(draw, None if uint8 or depth else _Normalise(mean, std), erase, depth=depth)


def _channels(args: Namespace) -> tuple[int, Sequence[float], Sequence[float], Depth | None]:
    channels = getattr(args, "in_chans", 3)
    stats = channel_stats(channels, getattr(args, "mean", None), getattr(args, "std", None))
    return channels, *stats, depth_of(args)


class _CentreResize:
    """Pillow picture -> its centre, resized to `size`; `share` of the resized picture's side is kept."""

    def __init__(self, size: tuple[int, int], share: float):
        self.size, self.share = size, share
        resize = transforms.Resize(int(size[0] / share), InterpolationMode.BICUBIC)
        self.square = transforms.Compose([resize, transforms.CenterCrop(size)])

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.size[0] == self.size[1] and max(width, height) <= 16 * min(width, height):
            return self.square(image)
        # Other shapes; and strips, of which the reference's way would make a giant picture before the crop
        top, left, h, w = _centre_box(height, width, self.size, self.share)
        return image.resize(self.size[::-1], Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))


def _centre_box(height: int, width: int, size: tuple[int, int], share: float) -> tuple[int, int, int, int]:
    """(top, left, height, width): the largest centred box of the shape of `size`, its sides times `share`."""
    scale = min(height / size[0], width / size[1]) * share
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return (height - h) // 2, (width - w) // 2, h, w


class _ArrayChain:
    """uint8 or, with `depth`, any (H, W, C) -> box, resize[, flip] -> tensor[, normalised[, erased]].

    Made of what can be pickled: workers that are not forked get it so.
    """

    def __init__(self, draw: Callable, *steps: Callable | None, depth: Depth | None = None):
        self.draw, self.steps, self.depth = draw, [step for step in steps if step is not None], depth

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        box, size, *flip = self.draw(image)
        pixels = resize_crop(image, box, size, self.depth)
        if flip and flip[0]:
            pixels = pixels.flip(-1)
        for step in self.steps:
            pixels = step(pixels)
        return pixels


class _Normalise:
    """uint8 (C, H, W) -> normalised float32, contiguous."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.contiguous().float().div(255).sub(self.mean).div(self.std)


def _draw_centre(image: np.ndarray, size: tuple[int, int], share: float) -> tuple:
    """(box, size) of `_centre_box`."""
    return _centre_box(*image.shape[:2], size, share), size


def _crop_and_flip(input_size, tf_style: bool = False) -> Callable:
    """Draws (box, size, flip) for an array: torchvision's random crop, or the probe's."""
    size, ratio = size_pair(input_size), crop_ratio(input_size)
    return functools.partial(_draw_crop, size=size, ratio=ratio, tf_style=tf_style)


def _draw_crop(image: np.ndarray, size: tuple, ratio: tuple[float, float], tf_style: bool) -> tuple:
    height, width = image.shape[:2]
    if tf_style:
        empty = torch.empty(1, height, width, device="meta")
        box = RandomResizedCrop.get_params(empty, CROP_SCALE, ratio)
    else:
        box = random_resized_crop_box(height, width, random, CROP_SCALE, ratio)
    return box, size, random.random() < 0.5


def _let_posterize_take_zero_bits(chain: transforms.Compose) -> None:
    """Lets RandAugment's posterize keep 0 bits (a black picture), which Pillow began to refuse.

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
