"""Images with a mask each, for segmentation: SPLIT/images/NAME.jpg with SPLIT/masks/NAME.png.

A mask is a grey or palette picture of the image's size whose values are class numbers.
"""

import os
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from util.data.dataset import ImageDataset
from util.data.depth import Depth
from util.data.examine import settle_range
from util.data.find import ImageFiles, find_images
from util.data.folders import ask_all, split_folder
from util.data.read import BadImage, open_file
from util.data.transforms import PRETRAIN_SCALE, crop_ratio, random_resized_crop_box, resize_crop
from util.errors import UserError
from util.files import counted, printable, some
from util.processes.collectives import is_main_process, warn
from util.rng import derive_seed
from util.sizes import size_pair

LAYOUT = "masks are needed as SPLIT/images/NAME.jpg with SPLIT/masks/NAME.png, for train and val"
MAX_LOOKED_AT = 2000  # masks read before the start; of larger sets, as many, evenly spread


class SegmentedImages(ImageDataset):
    """Images with masks; item (epoch, index) or index -> (image (C, H, W), mask int64 (h, w), index).
    Pixels of no class have the number `num_classes`, also where `ignore` is smaller.

    An unreadable mask is treated as an unreadable image: see `ImageDataset`.

    Args:
        files: the images. masks: folder of the masks.
        transform: (image (H, W, C), mask int64 (H, W), random.Random) -> (image, mask) tensors.
        num_classes, ignore: values that a mask may have: 0 to num_classes - 1, and `ignore`.
    """

    def __init__(
        self,
        files: ImageFiles,
        masks: str,
        transform: Callable,
        num_classes: int,
        ignore: int,
        channels: int = 3,
        seed: int = 0,
        bad_images: str = "error",
        depth: Depth | None = None,
    ):
        super().__init__(files, transform, channels, seed, bad_images, depth=depth)
        self.masks, self.num_classes, self.ignore = masks, num_classes, ignore

    def read(self, path: str, draws: Sequence[tuple[int, ...]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        image, place = self.decode(path), mask_of(path, self.files.root, self.masks)
        mask = read_mask(place)
        if mask.shape != image.shape[:2]:
            raise BadImage(place, other_size(mask.shape, image.shape))
        if beyond := [v for v in np.unique(mask).tolist() if v >= self.num_classes and v != self.ignore]:
            raise BadImage(place, _beyond(beyond, self.num_classes, self.ignore))
        mask[mask == self.ignore] = self.num_classes
        return [self.transform(image, mask, random.Random(derive_seed(*numbers))) for numbers in draws]

    def _samples(self, epoch: int, index: int, repeats: list[int]) -> list[tuple]:
        return [(image, mask, index) for (image, mask), _, index in super()._samples(epoch, index, repeats)]


class CropBoth:
    """The same random resized crop and flip of an image and of its mask."""

    def __init__(self, size: int | tuple[int, int], depth: Depth | None = None, scale=PRETRAIN_SCALE):
        self.size, self.depth, self.scale = size_pair(size), depth, scale

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: random.Random) -> tuple:
        box = random_resized_crop_box(*mask.shape, rng, self.scale, crop_ratio(self.size))
        image, mask = resize_crop(image, box, self.size, self.depth), resize_mask(mask, box, self.size)
        return (image.flip(-1), mask.flip(-1)) if rng.random() < 0.5 else (image, mask)


class WholeImage:
    """An image whose shorter side is `short` pixels, or no shorter than a window; its mask as it is."""

    def __init__(self, size: int | tuple[int, int], short: int | None, depth: Depth | None = None):
        self.size, self.short, self.depth = size_pair(size), short or min(size_pair(size)), depth

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: random.Random) -> tuple:
        height, width = mask.shape
        scale = max(self.short / min(height, width), self.size[0] / height, self.size[1] / width)
        size = round(height * scale), round(width * scale)
        return resize_crop(image, (0, 0, height, width), size, self.depth), torch.from_numpy(mask)


def resize_mask(mask: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> torch.Tensor:
    """A box (top, left, height, width) of a mask, each pixel the nearest one's class: int64 of `size`."""
    starts, lengths = box[:2], box[2:]
    rows, columns = (
        start + ((np.arange(number) + 0.5) * length / number).astype(int)
        for start, length, number in zip(starts, lengths, size, strict=True)
    )
    return torch.from_numpy(mask[rows[:, None], columns])


def read_mask(path: str) -> np.ndarray:
    """The values of a mask, int64 (H, W); raises BadImage for what is no grey or palette picture."""
    try:
        with open_file(path) as file, Image.open(file, formats=("PNG", "TIFF", "BMP", "GIF")) as picture:
            if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
                raise BadImage(path, f"a {picture.mode} picture; a mask has one channel of class numbers")
            mask = np.asarray(picture).astype(np.int64)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "is no PNG, or damaged" if unknown else getattr(error, "strerror", None) or str(error)
        raise BadImage(path, reason) from None
    if mask.min() < 0:
        raise BadImage(path, f"a value below 0 ({mask.min()})")
    return mask


def mask_of(path: str, images: str, masks: str) -> str:
    """The mask of an image: its place below `images`, as a PNG below `masks`."""
    return os.path.join(masks, os.path.splitext(os.path.relpath(path, images))[0] + ".png")


def find_masked(split: str, args: Namespace) -> tuple[ImageFiles, str]:
    """(images, folder of masks) of a split; settles `args.pixel_range`.

    Raises:
        UserError: no data, another layout, an image without a mask or a mask of another size.
    """
    if args.data_path is None:
        text = f"is needed; {LAYOUT}; python demo/make_shapes.py --masks DIR makes a painted set"
        raise UserError(f"--data_path: {text}")
    place = f"--data_path {printable(str(args.data_path))}"
    if (one := isinstance(args.data_path, str | os.PathLike)) and not os.path.exists(args.data_path):
        raise UserError(f"{place}: does not exist; {LAYOUT}")
    if not one or not os.path.isdir(args.data_path):
        raise UserError(f"{place}: must be one folder; {LAYOUT}")
    folder = split_folder(args.data_path, split)
    if folder is None:
        raise UserError(f"{place}: has no {split}/ folder; {LAYOUT}")
    images, masks = (os.path.join(folder, name) for name in ("images", "masks"))
    for path in (images, masks):
        if not os.path.isdir(path):
            raise UserError(f"{place}: has no folder {split}/{os.path.basename(path)}; {LAYOUT}")
    files = find_images(images, "", args.bad_images)
    files.labels = files.classes = None  # folders of images are no classes here
    settle_range(args, files)
    wanted = {mask_of(path, files.root, masks) for path in files.paths}
    if absent := sorted(path for path in wanted if not os.path.isfile(path)):
        text = f"{counted(len(absent), 'image')} without a mask there"
        raise UserError(f"{printable(masks)}: {text}: {some(absent)}")
    there = {os.path.join(top, name) for top, _, names in os.walk(masks) for name in names if name[0] != "."}
    if (alone := sorted(there - wanted)) and is_main_process():
        text = f"{counted(len(alone), 'file')} not used, as no image's mask"
        warn(f"{printable(masks)}: {text}: {some(alone)}")
    return files, masks


def look_at_masks(files: ImageFiles, masks: str, args: Namespace) -> Counter:
    """Reads masks, at most `MAX_LOOKED_AT`, before anything is trained: {value: number of pixels}, but
    `args.ignore_index`.

    Raises:
        UserError: nothing but ignored pixels, or, where `args.bad_images` is "error", a mask that cannot be
            read or is of another size than its image.
    """
    indices = np.unique(np.linspace(0, len(files.paths) - 1, MAX_LOOKED_AT).astype(int))
    paths = [files.paths[int(i)] for i in indices]
    found = list(ask_all(lambda path: _look_at(path, files.root, masks), paths))
    bad = [reason for _, reason in found if reason]
    if bad and args.bad_images == "error":
        raise UserError(
            f"{printable(masks)}: {len(bad):,} of {len(indices):,} masks cannot be used: {some(bad)}"
        )
    counts = sum((counts for counts, _ in found), Counter())
    del counts[args.ignore_index]
    if not counts:
        raise UserError(f"--ignore_index {args.ignore_index}: the masks hold no other value "
                        f"({printable(masks)})")  # fmt: skip
    return counts


def _look_at(path: str, images: str, masks: str) -> tuple[Counter, str]:
    place = mask_of(path, images, masks)
    try:
        mask = read_mask(place)
        with Image.open(path) as image:
            size = image.size[::-1]
    except BadImage as error:
        return Counter(), str(error)
    except Exception:  # no picture of Pillow's: its size is compared when it is read
        size = mask.shape
    if mask.shape != size:
        return Counter(), f"{place}: {other_size(mask.shape, size)}"
    values, numbers = (part.tolist() for part in np.unique(mask, return_counts=True))
    return Counter(dict(zip(values, numbers, strict=True))), ""


def count_masked_classes(args: Namespace, *counts: Counter) -> int:
    """`args.nb_classes`, or one more than the largest class number in the masks (`counts`: train's first).

    Raises:
        UserError: values beyond the classes, or one class alone to learn.
    """
    values = sorted(sum(counts, Counter()))
    if not args.eval and len(counts[0]) == 1:
        raise UserError(
            f"the masks of train hold one class ({next(iter(counts[0]))}), so there is nothing to learn; "
            f"number the classes 0, 1, ...: {args.ignore_index} is none (--ignore_index)"
        )
    if args.nb_classes is None:
        count = values[-1] + 1
        if 2 * len(values) <= count and is_main_process():
            warn(f"the masks hold {len(values)} of {count} class numbers ({some(values)}): are they classes, "
                 "from 0 on? --nb_classes says how many there are")  # fmt: skip
        return count
    if beyond := [value for value in values if value >= args.nb_classes]:
        raise UserError(
            f"--nb_classes {args.nb_classes}: {_beyond(beyond, args.nb_classes, args.ignore_index)}"
        )
    return args.nb_classes


def read_class_names(args: Namespace, stored: Sequence[str] = ()) -> list[str]:
    """One name a line of classes.txt in `args.data_path`; without that file those that a checkpoint has
    stored, or the numbers. UserError where the file says others than the checkpoint.
    """
    path, numbers = os.path.join(args.data_path, "classes.txt"), [str(i) for i in range(args.nb_classes)]
    if not os.path.isfile(path):
        return list(stored) or numbers
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        names = [line.strip() for line in file if line.strip()]
    if len(names) != args.nb_classes:
        raise UserError(f"{printable(path)}: {len(names)} names for {args.nb_classes} classes "
                        "(--nb_classes says how many there are)")  # fmt: skip
    if stored and list(stored) not in (names, numbers):
        raise UserError(f"{printable(path)}: its classes are not those of --resume: {some(stored)}")
    return names


def other_size(mask: tuple, image: tuple) -> str:
    return f"a mask of {mask[1]}x{mask[0]} pixels for an image of {image[1]}x{image[0]}"


def _beyond(values: list[int], num_classes: int, ignore: int) -> str:
    return (f"mask values beyond the {num_classes} classes: {some(values)} (only {ignore} is ignored: "
            "--ignore_index)")  # fmt: skip
