"""Labelled images for fine-tuning, probing and evaluation: a folder of class folders for each split."""

import functools
from argparse import Namespace
from collections.abc import Callable

from torchvision.datasets import ImageFolder

from util.data.dataset import ImageDataset, find_split
from util.data.depth import Depth, depth_of, make_reader
from util.data.find import ImageFiles
from util.data.presets import eval_transform, train_transform
from util.data.read import read_picture
from util.data.targets import Targets
from util.errors import UserError
from util.files import counted, some
from util.processes.collectives import is_main_process, warn


class LabelledImages(ImageDataset):
    """Images with labels; item (epoch, index) or index -> (float32 or uint8 (C, H, W), label, index).

    Every random draw of an item depends only on (seed, epoch, index). Unreadable files: see `ImageDataset`.

    Args:
        files: with labels and classes.
        transform: of `presets`: image -> tensor; draws from Python's, numpy's and torch's global generators.
            The image is a PIL one of 1 or 3 channels, else uint8 (H, W, C); with `depth`, of any type.
    """

    def __init__(
        self,
        files: ImageFiles,
        transform: Callable,
        channels: int = 3,
        seed: int = 0,
        bad_images: str = "error",
        depth: Depth | None = None,
    ):
        pil = channels in (1, 3) and depth is None
        super().__init__(files, transform, channels, seed, bad_images, pil, depth)
        self.global_draws = True

    @property
    def classes(self) -> list[str]:
        return self.files.classes

    @property
    def targets(self) -> Targets:
        """What a model is to predict: one class, unless a table says otherwise."""
        return getattr(self.files, "targets", None) or Targets("class", self.classes)

    def label(self, index: int) -> int | tuple[float, ...]:
        """A class, or (K,) labels or standardised numbers."""
        if self.targets.task == "class":
            return super().label(index)
        labels = self.files.labels[index]
        return tuple((self.targets.standardise(labels) if self.targets.mean else labels).tolist())

    def listing(self) -> dict[str, int | str]:
        """As `ImageDataset.listing`, with a digest of the 'labels' where a table says them."""
        labels = {"labels": self.files.digest()} if hasattr(self.files, "digest") else {}
        return {**super().listing(), **labels}


class LabelledFolder(ImageFolder):
    """torchvision's ImageFolder over the files that we find; items are (float32 (C, H, W), label).

    Augmentation draws from the global generators, as the reference's does, so that each epoch of any loader
    differs; `LabelledImages` is what our scripts train on. A file that cannot be decoded raises BadImage.

    Args:
        files: with labels and classes.
        transform: as of `LabelledImages`.
    """

    def __init__(self, files: ImageFiles, transform: Callable, channels: int = 3, depth: Depth | None = None):
        self.files = files
        pil = channels in (1, 3) and depth is None
        decode = functools.partial(read_picture, channels=channels) if pil else make_reader(channels, depth)
        super().__init__(files.root, transform, loader=decode)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return self.files.classes, {name: label for label, name in enumerate(self.files.classes)}

    def make_dataset(self, *_, **__) -> list[tuple[str, int]]:
        return list(zip(self.files.paths, self.files.labels.tolist(), strict=True))


def build_dataset(is_train: bool, args: Namespace) -> LabelledFolder:
    """The fine-tuning data as the reference gives it: (image, label) of `train/` with augmentation, or of
    `val/` with the evaluation's transform.

    Args:
        args: data_path, input_size; if present also in_chans, mean, std, bad_images, and of timm's
            augmentation color_jitter, aa, reprob, remode, recount.

    Raises:
        UserError: no such folder, no labels, an empty class.
    """
    files = labelled_files("train" if is_train else getattr(args, "split", "val"), args)
    transform = build_transform(is_train, args)
    return LabelledFolder(files, transform, getattr(args, "in_chans", 3), depth_of(args))


def build_transform(is_train: bool, args: Namespace) -> Callable:
    """Fine-tuning's augmentation, or the evaluation's transform; `args`: as of `build_dataset`."""
    return train_transform(args) if is_train else eval_transform(args)


def labelled_images(split: str, args: Namespace, make_transform: Callable | None = None) -> LabelledImages:
    """The images of `train` or `val` as our scripts take them.

    Args:
        args: as of `build_dataset`; if present also seed.
        make_transform: `args`, with the pixel range settled, -> transform; default: `build_transform`'s.

    Raises UserError as `build_dataset`.
    """
    files = labelled_files(split, args)
    if split == "train" and make_transform is None and depth_of(args):
        files.notes.append("augmented by crop, flip and erasing only, as --aa is for 8 bits")
    transform = make_transform(args) if make_transform else build_transform(split == "train", args)
    options = (getattr(args, *pair) for pair in (("in_chans", 3), ("seed", 0), ("bad_images", "error")))
    return LabelledImages(files, transform, *options, depth_of(args))


def labelled_files(split: str, args: Namespace) -> ImageFiles:
    """The files of `train` or `val` under `args.data_path`; UserError as of `build_dataset`.

    Settles `args.pixel_range`.
    """
    from util.data.examine import settle_range

    if getattr(args, "labels", None):
        from util.data.labels import read_labels

        files = read_labels(args, split)
        settle_range(args, files)
        return files
    files = find_split(args, split)
    layout = "labelled images are needed in train/CLASS/... and val/CLASS/..."
    if files is None:
        raise UserError(f"--data_path {args.data_path}: has no {split}/ folder; {layout}")
    if files.empty:
        found = f"no images in {counted(len(files.empty), 'class folder')} ({some(files.empty)})"
        raise UserError(f"{files.root}: {found}; remove them or add images")
    if files.labels is None:
        place = f"--data_path {args.data_path}: {files.source}"
        raise UserError(f"{place} has no class folders, so no labels; {layout}")
    settle_range(args, files)
    return files


def check_classes(train: LabelledImages, val: LabelledImages) -> None:
    """Raises UserError unless `train` and `val` have the same classes; warns of a single one."""
    if train.targets.task != "class":
        return
    if train.classes != val.classes:
        texts = []
        for one, two in ((train, val), (val, train)):
            alone = sorted(set(one.classes) - set(two.classes))
            texts.append(f"only in {one.files.root}: {some(alone) or 'none'}")
        raise UserError(f"the classes of train and val differ ({'; '.join(texts)})")
    if len(train.classes) == 1 and is_main_process():
        name = f"{train.files.root}: one class ({train.classes[0]})"
        warn(f"{name}: nothing to tell apart, so every accuracy will be 100 %")


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
