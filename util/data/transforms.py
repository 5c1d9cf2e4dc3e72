"""From a decoded picture to what the model sees: crop, resize, flip, and normalisation on the device.

The default pipeline resizes the slice of a uint8 array with torch's antialiased bicubic kernel, which
agrees with Pillow's to rounding (mean difference below 0.1 of 255) at a quarter of the time.
`reference_transform` is the reference's own chain.
"""

import functools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from util.errors import UserError
from util.processes.collectives import is_main_process, warn
from util.sizes import size_pair

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PRETRAIN_SCALE = (0.2, 1.0)  # share of the picture's area in a crop (paper, section A.1)


def channel_stats(
    in_chans: int, mean: float | Sequence[float] | None = None, std: float | Sequence[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and standard deviations of pixels in [0, 1], one per channel.

    Without `mean` or `std`: ImageNet's for 3 channels, the average of ImageNet's (0.449, 0.226) for each
    channel of any other number.

    Args:
        mean, std: one value for all channels, or one per channel.

    Values that pixels in [0, 1] cannot have get a warning.

    Raises:
        UserError: another number of values, or a deviation that is not positive.
    """
    stats = []
    for flag, given, imagenet in (("--mean", mean, IMAGENET_MEAN), ("--std", std, IMAGENET_STD)):
        if given is None:
            given = imagenet if in_chans == 3 else [round(sum(imagenet) / 3, 4)]
        values = [float(v) for v in (given if isinstance(given, Sequence) else [given])]
        if len(values) not in (1, in_chans):
            raise UserError(f"{flag}: {len(values)} values for --in_chans {in_chans}; give 1 or {in_chans}")
        if not all(map(math.isfinite, values)) or (flag == "--std" and min(values) <= 0):
            wanted = "above 0" if flag == "--std" else "finite"
            raise UserError(f"{flag} {' '.join(map(str, values))}: must be {wanted}")
        stats.append(tuple(values * in_chans if len(values) == 1 else values))
    if max(*stats[0], *stats[1]) > 1 or min(stats[0]) < 0:
        _warn_of_scale(*stats)
    return stats[0], stats[1]


@functools.cache  # once
def _warn_of_scale(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    def flags(large: float) -> str:  # what is above 1 is divided by it
        texts = (
            " ".join(f"{value / (large if max(values) > 1 else 1):.4g}" for value in values)
            for values in (mean, std)
        )
        return "--mean {} --std {}".format(*texts)

    if is_main_process():
        advice = f"; if they are of 0..255, pass {flags(255)}" if max(*mean, *std) > 1 else ""
        warn(f"{flags(1)}: pixels lie between 0 and 1 here, and cannot have such statistics{advice}")


def crop_ratio(size: int | tuple[int, int]) -> tuple[float, float]:
    """Range of a crop's width / height for a target (height, width): 3/4 to 4/3 for a square one.

    For others it is multiplied by the target's own ratio, so that objects are never distorted by more than
    3/4 to 4/3.
    """
    height, width = size_pair(size)
    return 3 / 4 * width / height, 4 / 3 * width / height


def random_resized_crop_box(
    height: int,
    width: int,
    rng: random.Random,
    scale: tuple[float, float] = PRETRAIN_SCALE,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draws a crop as torchvision's RandomResizedCrop does: same steps, same distribution, other generator.

    Up to 10 tries of a uniform area and a log-uniform ratio; if none fits, the largest centred box of an
    allowed ratio.

    Args:
        height, width: of the picture, in pixels.
        rng: source of all draws (17 times faster than torch's for single numbers).
        scale: range of the crop's share of the picture's area.
        ratio: range of the crop's width / height.

    Returns:
        (top, left, crop height, crop width) in pixels, inside the picture.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(log_low, log_high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = rng.randrange(height - h + 1)
            return top, rng.randrange(width - w + 1), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def resize_crop(
    image: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int], depth=None
) -> torch.Tensor:
    """Cuts a box out of a picture and resizes it, bicubic with antialiasing, in uint8 throughout.

    Args:
        image: uint8 (H, W, C), writable; with `depth` of any type.
        box: (top, left, height, width) in pixels.
        size: (height, width) of the result.
        depth: `util.data.depth.Depth` that brings the values to float32, normalised: the result is that then.

    Returns:
        uint8 (C, height, width), with the channels innermost in memory (torch's channels_last): for 3
        channels the kernel is a third faster on this layout, and batches keep it up to the device.
    """
    top, left, height, width = box
    # numpy copies the slice three times as fast as torch does
    piece = np.ascontiguousarray(image[None, top : top + height, left : left + width])
    piece = torch.from_numpy(piece if depth is None else depth.scale(piece)).permute(0, 3, 1, 2)
    result = F.interpolate(piece, size, mode="bicubic", antialias=True)[0]
    return result if depth is None else depth.normalize(result)


class PretrainTransform:
    """Random resized crop, and flip with probability 0.5: uint8 (H, W, C) -> uint8 (C, *size).

    With `depth` (see `resize_crop`): any type -> float32, normalised.
    """

    def __init__(self, size: int | tuple[int, int], scale: tuple[float, float] = PRETRAIN_SCALE, depth=None):
        self.size, self.scale, self.ratio, self.depth = size_pair(size), scale, crop_ratio(size), depth

    def __call__(self, image: np.ndarray, rng: random.Random) -> torch.Tensor:
        box = random_resized_crop_box(*image.shape[:2], rng, self.scale, self.ratio)
        flip = rng.random() < 0.5
        result = resize_crop(image, box, self.size, self.depth)
        return result.flip(-1) if flip else result


class EvalTransform:
    """The largest centred part of the target's shape, resized to it: uint8 (H, W, C) -> uint8 (C, *size).

    The same picture as scaling until the target is covered and cutting out the centre, to half a source
    pixel, but without scaling what is thrown away (a long strip would take gigabytes). With `depth` as
    `PretrainTransform`.
    """

    def __init__(self, size: int | tuple[int, int], depth=None):
        self.size, self.depth = size_pair(size), depth

    def __call__(self, image: np.ndarray, rng: random.Random | None = None) -> torch.Tensor:
        return resize_crop(image, self.box(*image.shape[:2]), self.size, self.depth)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of that part of a picture, in pixels."""
        scale = min(height / self.size[0], width / self.size[1])
        h, w = max(1, round(self.size[0] * scale)), max(1, round(self.size[1] * scale))
        return round((height - h) / 2), round((width - w) / 2), h, w


def reference_transform(
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    scale: tuple[float, float] = PRETRAIN_SCALE,
) -> Callable:
    """The reference's chain: PIL image -> float32 (C, *size), normalised; draws from torch's generator."""
    from torchvision import transforms  # takes a second to import, and only this loader needs it

    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(size_pair(size), scale, crop_ratio(size), bicubic)
    flip = transforms.RandomHorizontalFlip()
    return transforms.Compose([crop, flip, transforms.ToTensor(), transforms.Normalize(mean, std)])


@functools.lru_cache(maxsize=64)
def _device_stats(channels: int, mean: tuple | None, std: tuple | None, device: torch.device) -> tuple:
    """Statistics as (C, 1, 1) tensors, made once: building them on a GPU waits for it."""
    with torch.inference_mode(False):  # not as inference tensors, should validation come first
        values = channel_stats(channels, mean, std)
        return tuple(torch.tensor(v, dtype=torch.float32, device=device).view(-1, 1, 1) for v in values)


def normalize_batch(
    images: torch.Tensor,
    device: torch.device | str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> torch.Tensor:
    """Moves a batch to the device and brings uint8 pixels to (x / 255 - mean) / std there.

    Args:
        images: uint8 (N, C, H, W) in any memory format, which crosses to the device as it is, a quarter of
            float32's size; or floating point, already normalised, which is only moved.
        mean, std: as `channel_stats` takes them; None: ImageNet's.

    Returns:
        float32 (N, C, H, W), contiguous; a floating-point batch unchanged. Does not wait for a GPU if pinned.
    """
    device = torch.device(device)
    images = images.to(device, non_blocking=device.type == "cuda")
    if images.is_floating_point():
        return images
    mean, std = (None if values is None else tuple(values) for values in (mean, std))
    mean, std = _device_stats(images.shape[1], mean, std, images.device)
    images = images.to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255).sub_(mean).div_(std)
