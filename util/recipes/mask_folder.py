"""`--mask file --mask_file DIR`: a mask for each image, which says the order in which its patches are hidden.

A sample is the normalised image and, as one channel more, its mask after the same crop: 1 is to be hidden.
The model takes that channel off before anything else sees it. Images without it are masked at random.
"""

import hashlib
import os
import random
from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from models_mae import MaskedAutoencoderViT
from util.data.dataset import ImageDataset
from util.data.find import PathList
from util.data.folders import ask_all
from util.data.read import BadImage
from util.data.segments import CropBoth, other_size, resize_mask
from util.data.transforms import EvalTransform, normalize_batch, resize_crop
from util.errors import UserError
from util.figures.reconstruction import mask_pixels
from util.files import printable, some
from util.processes.collectives import log
from util.rng import derive_seed, takes_noise


class MaskedImages(ImageDataset):
    """A set with `masks`, a folder; samples are float32 (C + 1, H, W). An unreadable mask is treated as an
    unreadable image.
    """

    def read(self, path: str, draws: Sequence[tuple[int, ...]]) -> list[Tensor]:
        image, place, samples = self.decode(path), mask_of(path, self.files.root, self.masks), []
        mask = mask_pixels(place) > 0.5
        if mask.shape != image.shape[:2]:
            raise BadImage(place, f"{other_size(mask.shape, image.shape)} ({path})")
        for numbers in draws:
            picture, hidden = self.transform(image, mask, random.Random(derive_seed(*numbers)))
            picture = normalize_batch(picture[None], "cpu", *self.stats)[0]
            samples.append(torch.cat([picture, hidden[None].float()]))
        return samples


class CentreBoth(EvalTransform):
    """As `EvalTransform`, of an image and its mask."""

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: random.Random | None = None) -> tuple:
        box = self.box(*mask.shape)
        return resize_crop(image, box, self.size, self.depth), resize_mask(mask, box, self.size)


class FolderMasked(MaskedAutoencoderViT):
    """A masked autoencoder of images that may have their mask behind them."""

    def take_masks(self, imgs: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Images (N, C + 1, H, W) and noise (N, L) -> (images (N, C, H, W), noise int64 that hides those
        patches first of which a mask covers most; what it covers alike stays in the order of the noise).
        """
        if imgs.shape[1] == self.in_chans:
            return imgs, noise
        (imgs, masks), p = imgs.split([self.in_chans, 1], dim=1), self.patch_size
        covered = masks.unflatten(3, (-1, p)).unflatten(2, (-1, p)).sum(dim=(3, 5)).flatten(1).long()
        if noise is None:  # drawn as the model's own
            noise = torch.rand(covered.shape, device=imgs.device)
        ranks = noise.to(imgs.device).argsort(dim=1, stable=True).argsort(dim=1)
        return imgs, covered * covered.shape[1] + ranks

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None):
        """As the model's own."""
        imgs, noise = self.take_masks(imgs, noise)
        return super().forward(imgs, mask_ratio, noise)


def use_folder(model: MaskedAutoencoderViT, args: Namespace, dataset, val_set=None) -> None:
    """Gives the sets their masks and has `model` heed them, in place; call it after all that changes these.

    Args:
        args: mask, mask_file, mean, std; if present loader and size_schedule, which may forbid it. Gets
            mask_digest, of the training images' masks.
        val_set: held-out images, if any, which get the masks of DIR/val/, if that is there.

    Raises:
        UserError: flags that do not go together, or images without a mask.
    """
    folder = args.mask_file
    reference = getattr(args, "loader", "default") == "reference"
    if args.mask != "file" or reference or getattr(args, "size_schedule", None):
        raise UserError(f"--mask_file {folder}: a folder needs --mask file, and goes without --size_schedule "
                        "and --loader reference")  # fmt: skip
    if not takes_noise(model):
        raise UserError(f"--mask file: {args.model} draws its own masks; leave the flag out")
    own, held_out = (
        os.path.join(folder, os.path.basename(os.path.abspath(s.files.root)))
        for s in (dataset, val_set or dataset)
    )
    old = dataset.transform
    crop = CropBoth(old.size, old.depth, old.scale)
    args.mask_digest = add_masks(dataset, own if os.path.isdir(own) else folder, args, crop)
    told = "held-out images are masked at random"
    if val_set and os.path.isdir(held_out):
        add_masks(val_set, held_out, args, CentreBoth(old.size, old.depth))
        told = f"of held-out images in {printable(held_out)}"
    model.__class__ = type("FolderMasked", (FolderMasked, type(model)), {})
    log(f"masks: of each image in {printable(dataset.masks)}; {told}")


def add_masks(images: ImageDataset, folder: str, args: Namespace, crop: Callable) -> str:
    """Makes `MaskedImages` of a set, in place; digest of the names and sizes of its masks.

    Raises UserError for images without a mask.
    """
    paths, root = images.files.paths, images.files.root
    if not isinstance(paths, PathList):
        raise UserError(f"--mask_file {folder}: a folder of masks is for the images of one folder or list, "
                        "not for archives or --pages all")  # fmt: skip

    def look(part: np.ndarray) -> list[tuple[str, int]]:
        places = (mask_of(paths[int(i)], root, folder) for i in part)
        return [(place, os.path.getsize(place) if os.path.isfile(place) else -1) for place in places]

    parts = np.array_split(np.arange(len(paths)), max(1, len(paths) // 256))
    found = [one for part in ask_all(look, parts) for one in part]
    if absent := [paths[i] for i, (_, size) in enumerate(found) if size < 0]:
        raise UserError(f"--mask_file {folder}: holds no mask of {len(absent):,} of {len(paths):,} images, "
                        f"a .png or .npy of the same relative path: {some(absent)}")  # fmt: skip
    images.__class__, images.transform = MaskedImages, crop
    images.masks, images.stats = folder, (args.mean, args.std)
    table = "".join(f"{os.path.relpath(place, folder)} {size}\n" for place, size in found)
    return hashlib.sha256(os.fsencode(table.replace(os.sep, "/"))).hexdigest()[:8]


def mask_of(path: str, images: str, masks: str) -> str:
    """The mask of an image: its place below `images` in `masks`, as .png or .npy."""
    stem = os.path.join(masks, os.path.splitext(os.path.relpath(path, images))[0])
    return stem + (".npy" if os.path.isfile(f"{stem}.npy") else ".png")
