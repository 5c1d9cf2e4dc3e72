"""Data sets of image files; every sample is a function of (seed, epoch, index) only."""

import functools
import itertools
import random
from collections.abc import Callable, Sequence

import torch

from util.data.find import ImageFiles, bad_limit, find_images
from util.data.read import MODES, BadImage, read_image, read_picture
from util.data.transforms import (
    PRETRAIN_SCALE,
    EvalTransform,
    PretrainTransform,
    channel_stats,
    reference_transform,
)
from util.errors import UserError
from util.files import counted, some
from util.processes.collectives import log, warn
from util.rng import derive_seed, sample_seed


class ImageDataset(torch.utils.data.Dataset):
    """Images of a split: `dataset[epoch, index]`, or `dataset[index]` of epoch 0 -> (image, label, index).

    The label is -1 where there are no classes. Every random draw depends on (seed, epoch, index) alone, so
    that neither the number of workers nor a restart changes a sample. `dataset[epoch, index, repeat]` is a
    further sample of the same image with draws of its own (`repeat` 0: the same as without); a loader gets
    those that follow each other in a batch from one decoding.

    A file that turns out to be unreadable ends the run with one line that names it (BadImage, a UserError).
    With `bad_images="skip"` the next readable image of the list takes its place, label included, with the
    draws and the index of the one asked for; `bad` (uint8 (n,), in memory that all workers share) flags it.

    Args:
        files: of `find_images`.
        transform: (uint8 (H, W, C), random.Random) -> tensor. With `pil`: PIL image -> tensor, drawing from
            the global generators, which are seeded around it.
        channels: number of channels that images are converted to.
        pil: hand `transform` a PIL image.
        depth: `util.data.depth.Depth` of images that `transform` gets in their own type; None: of 8 bits.

    Attributes:
        decode: path -> the image that `transform` gets; raises BadImage.
        global_draws: whether `transform` draws from the global generators.

    Raises:
        UserError: `pil` with more channels than Pillow's images have.
    """

    def __init__(
        self,
        files: ImageFiles,
        transform: Callable,
        channels: int = 3,
        seed: int = 0,
        bad_images: str = "error",
        pil: bool = False,
        depth=None,
    ):
        if pil and channels not in MODES:
            raise UserError(f"--in_chans {channels}: Pillow reads 1 to 4 channels; use --loader default")
        if pil and depth:
            raise UserError("--loader reference: reads images of 8 bits only; use --loader default")
        self.files, self.transform, self.channels = files, transform, channels
        self.seed, self.bad_images, self.global_draws = seed, bad_images, pil
        self.decode = functools.partial(read_picture if pil else read_image, channels=channels)
        if depth:
            from util.data.depth import make_reader

            self.decode = make_reader(channels, depth)
        self.bad = torch.zeros(len(files.paths), dtype=torch.uint8).share_memory_()
        self._reported = 0

    def __len__(self) -> int:
        return len(self.files.paths)

    def __getitem__(self, key: int | tuple[int, ...]) -> tuple[torch.Tensor, int, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int | tuple[int, ...]]) -> list[tuple[torch.Tensor, int, int]]:
        """The samples of a batch; a DataLoader asks for them so. What comes again in a row is read once."""
        samples, full = [], [(*key, 0)[:3] if isinstance(key, tuple) else (0, key, 0) for key in keys]
        if hasattr(self.files.paths, "plan"):
            self.files.paths.plan([self.position(index) for index in dict.fromkeys(key[1] for key in full)])
        for (epoch, index), group in itertools.groupby(full, lambda key: key[:2]):
            samples += self._samples(epoch, index, [repeat for *_, repeat in group])
        return samples

    def _samples(self, epoch: int, index: int, repeats: list[int]) -> list[tuple[torch.Tensor, int, int]]:
        """Samples of one image, which is read once."""
        position = self.position(index)
        draws = [(self.seed, epoch, index, *([repeat] if repeat else [])) for repeat in repeats]
        while True:
            try:
                images = self.read(self.files.paths[position], draws)
                break
            except BadImage as error:
                self._flag(position, error)
                position = self.position(position)
        return [(image, self.label(position), index) for image in images]

    def read(self, path: str, draws: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """A file, decoded once and transformed once for each of `draws`, the numbers that seed a sample."""
        image, samples = self.decode(path), []
        for numbers in draws:
            if self.global_draws:
                with sample_seed(*numbers):
                    samples.append(self.transform(image))
            else:
                samples.append(self.transform(image, random.Random(derive_seed(*numbers))))
        return samples

    def _flag(self, position: int, error: BadImage) -> None:
        """Notes an unreadable file; raises BadImage when there may be no more of them."""
        if isinstance(error.__context__, ConnectionError):  # a store that is away: no fault of the image
            raise error
        if self.bad_images != "skip":
            advice = "repair or remove it, or pass --bad_images skip"
            raise BadImage(error.path, f"{error.reason}; {advice}") from None
        self.bad[position] = 1
        count, known = int(self.bad.sum()), len(self.files.skipped)
        limit = bad_limit(len(self) + known)
        if count + known > limit or count == len(self):
            names = some(self.bad_paths())
            found = f"{counted(count + known, 'image')} unreadable, and --bad_images skip allows 1 %"
            raise BadImage(error.path, f"{error.reason}; {found} (here {limit}): {names}") from None

    def position(self, index: int) -> int:
        """Index of the file that is read for sample `index`: its own, or the next not flagged in `bad`."""
        while self.bad[index]:
            index = (index + 1) % len(self)
        return index

    def label(self, index: int) -> int:
        return -1 if self.files.labels is None else int(self.files.labels[index])

    def path(self, index: int) -> str:
        """File that is read for sample `index`."""
        return self.files.paths[self.position(index)]

    def bad_paths(self) -> list[str]:
        """Files that could not be decoded so far, in any worker of this process."""
        return [self.files.paths[i] for i in self.bad.nonzero().flatten().tolist()]

    def report_bad_images(self) -> None:
        """Warns of files that could not be decoded since the last call."""
        paths = self.bad_paths()
        if len(paths) > self._reported:
            names = some(paths)
            warn(f"could not decode {len(paths)} of the images so far, others took their place: {names}")
            self._reported = len(paths)

    def describe(self) -> str:
        """What was found, in one line."""
        return self.files.describe()

    def listing(self) -> dict[str, int | str]:
        """What tells whether a set is still the same: number of 'images', digest of the 'files' by name."""
        return {"images": len(self), "files": self.files.paths.digest()}


def find_split(args, split: str) -> ImageFiles | None:
    """The split's images of `args.data_path`, or of the demo set where that is None."""
    data_path = getattr(args, "data_path", None)
    if data_path is None:
        from util.demo_set.files import announce_demo_data, ensure_demo_data

        data_path = ensure_demo_data(log=log)
        if split == "train":
            announce_demo_data(data_path, log)
    files = find_images(data_path, split, getattr(args, "bad_images", "error"))
    if files is not None and getattr(args, "pages", "first") == "all":
        from util.data.examine import add_pages

        add_pages(files)
    return files


def build_pretrain_dataset(args) -> ImageDataset:
    """The training images with pre-training's augmentation.

    Args:
        args: data_path, input_size, in_chans, mean, std, loader ("default": uint8 samples, to be normalised
            on the device; "reference": float32), bad_images, seed, crop_scale, pixel_range, which is settled
            here (see `util.data.examine`); what is missing has the script's default.

    Raises:
        UserError: see `find_images`; also channels that the loader cannot read.
    """
    from util.data.examine import settle_range

    size, channels = getattr(args, "input_size", 224), getattr(args, "in_chans", 3)
    files = find_split(args, "train")
    depth = settle_range(args, files)
    reference = getattr(args, "loader", "default") == "reference"
    scale = tuple(getattr(args, "crop_scale", PRETRAIN_SCALE))
    if reference:
        stats = channel_stats(channels, getattr(args, "mean", None), getattr(args, "std", None))
        transform = reference_transform(size, *stats, scale)
    else:
        transform = PretrainTransform(size, scale, depth)
    seed, bad_images = getattr(args, "seed", 0), getattr(args, "bad_images", "error")
    return ImageDataset(files, transform, channels, seed, bad_images, reference, depth)


def build_val_dataset(args) -> ImageDataset | None:
    """The held-out images of `val/`, centre-cropped, uint8; None where there is no such folder.

    `args` are those of `build_pretrain_dataset`; raises UserError as it does.
    """
    try:
        files = find_split(args, "val")
    except UserError as error:
        raise UserError(f"{error} (val/ is optional: it is for held-out losses)") from None
    if files is None:
        return None
    from util.data.examine import settle_range

    depth = settle_range(args, files)
    size, channels = getattr(args, "input_size", 224), getattr(args, "in_chans", 3)
    seed, bad_images = getattr(args, "seed", 0), getattr(args, "bad_images", "error")
    return ImageDataset(files, EvalTransform(size, depth), channels, seed, bad_images, depth=depth)
