"""Labelled images for fine-tuning, probing and evaluation: a folder of class folders for each split."""

import math
import os
from argparse import Namespace
from collections.abc import Callable

from util.data.dataset import ImageDataset
from util.data.find import ImageFiles, find_images
from util.data.presets import eval_transform, train_transform
from util.demo_set.files import announce_demo_data, ensure_demo_data
from util.errors import UserError
from util.files import printable, some
from util.processes.collectives import log
from util.sizes import size_pair


class LabelledImages(ImageDataset):
    """Images with labels; item (epoch, index) or index -> (float32 (C, H, W), label, index).

    Every random draw of an item depends only on (seed, epoch, index). Unreadable files: see `ImageDataset`.

    Args:
        files: with labels and classes.
        transform: of `presets`: image -> tensor; draws from Python's, numpy's and torch's global generators.
            The image is a PIL one of 1 or 3 channels, else uint8 (H, W, C).
    """

    def __init__(
        self,
        files: ImageFiles,
        transform: Callable,
        channels: int = 3,
        seed: int = 0,
        bad_images: str = "error",
    ):
        super().__init__(files, transform, channels, seed, bad_images, pil=channels in (1, 3))
        self.global_draws = True

    @property
    def classes(self) -> list[str]:
        return self.files.classes


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
        raise UserError(
            f"{files.root}: no images in {len(empty)} class folders ({some(map(printable, empty))}); remove "
            "them or add images"
        )
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
        used = (
            {files.paths.name(i).split(os.sep, 1)[0] for i in range(len(files.paths))} if folders else set()
        )
    return [name for name in folders if name not in used]


def check_classes(train: LabelledImages, val: LabelledImages) -> None:
    """Raises UserError unless `train` and `val` have the same classes."""
    if train.classes != val.classes:
        texts = []
        for one, two in ((train, val), (val, train)):
            alone = sorted(set(one.classes) - set(two.classes))
            texts.append(f"only in {one.files.root}: {some(map(printable, alone)) or 'none'}")
        raise UserError(f"the classes of train and val differ ({'; '.join(texts)})")


def count_classes(args: Namespace, dataset: LabelledImages) -> int:
    """`args.nb_classes` where it was given, else the number of classes that the folder has.

    Raises UserError where labels would lie beyond `--nb_classes`.
    """
    found = len(dataset.classes)
    if args.nb_classes is None:
        return found
    if args.nb_classes < found:
        raise UserError(
            f"--nb_classes {args.nb_classes}: {dataset.files.root} has {found} classes, so labels up to "
            f"{found - 1} would be out of range; leave the flag out"
        )
    return args.nb_classes
