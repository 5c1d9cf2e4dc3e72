"""`--target`: what the decoder predicts of a patch, if not its pixels; numbers (N, L, T)."""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.data.transforms import normalize_batch
from util.errors import UserError
from util.figures.training import pick_images
from util.processes.collectives import gather, is_main_process
from util.recipes.teacher import Lesson, at_least_float32, read_teacher, teach

BINS = 9  # of orientation, of 20 degrees each
FITTED_ON = 256, 20_000  # images of the training set, and patches of them


@dataclass
class Target:
    """of: (model, normalised images (N, C, H, W)) -> (N, L, width). text: for the log."""

    width: int
    of: Callable
    text: str


def make_target(model, args: Namespace, device: torch.device, dataset) -> Target:
    """The target that `args` ask for; UserError for what does not fit the model or each other.

    Of "pca" the model gets `decoder_target_mean` and `_components`, not trained but fitted on `dataset` by
    the first process; a resumed run has those of its checkpoint.
    """
    side, channels, size = model.patch_size, model.in_chans, args.target_size
    divisors = [n for n in range(1, side + 1) if side % n == 0]
    if args.target == "hog":
        cell = min(divisors, key=lambda n: abs(n - 8))
        text = f"histograms of oriented gradients in cells of {cell} x {cell} pixels"
        width = (side // cell) ** 2 * channels * BINS
        return Target(width, lambda model, imgs: hog(imgs, side, cell), text)
    if args.target == "lowpass":
        size = size or max((n for n in divisors if 4 * n <= side), default=1)
        if size not in divisors:
            raise UserError(f"--target_size {size}: does not divide the patch's side of {side} pixels")
        text = f"{size} x {size} means of a patch's pixels"
        return Target(size**2 * channels, lambda model, imgs: lowpass(imgs, side, size), text)
    if args.target == "pca":
        numbers = side * side * channels
        size = size or max(1, numbers // 8)
        if size > numbers:
            raise UserError(f"--target_size {size}: a patch has {numbers} numbers")
        mean, components, share = gather(fit(model, dataset, args, size) if is_main_process() else None)[0]
        for name, value in (("mean", mean), ("components", components)):  # as the fixed position tables
            setattr(model, f"decoder_target_{name}", nn.Parameter(value.float(), requires_grad=False))
        text = f"{size} principal components of patches, {share:.1%} of their variance"
        return Target(size, coefficients, text)
    if args.teacher_loss or args.teacher_weight or args.teacher_block or args.fsdp or not args.teacher:
        raise UserError("--target teacher: needs a --teacher FILE, and goes without --teacher_loss, _weight, "
                        "_block and --fsdp")  # fmt: skip
    teacher = read_teacher(model, args, len(model.blocks), "block {} is the target").to(device)
    lesson = Lesson(teacher, True, 0)
    return Target(teacher.embed_dim, lambda model, imgs: features(lesson, imgs), "the teacher's features")


def by_patch(x: Tensor, side: int) -> Tensor:
    """(N, C, rows * side, columns * side) -> (N, L, side * side * C), inside a patch row, column, channel."""
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (N, C, rows, side, columns, side)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


@torch.no_grad()
def hog(imgs: Tensor, side: int, cell: int) -> Tensor:
    """Histograms of oriented gradients as MaskFeat's (arXiv 2112.09133): of each cell and channel the
    gradients' strength in 9 unsigned orientations, a vector of length 1; by cell, channel, orientation.
    """
    x = F.pad(at_least_float32(imgs), (1, 1, 1, 1), mode="replicate")
    dx, dy = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    strength = (dx.square() + dy.square()).sqrt()
    number = (torch.atan2(dy, dx).remainder(math.pi) * (BINS / math.pi)).floor() % BINS
    votes = [F.avg_pool2d(torch.where(number == k, strength, 0.0), cell) for k in range(BINS)]
    return by_patch(F.normalize(torch.stack(votes, dim=2), dim=2).flatten(1, 2), side // cell)


def lowpass(imgs: Tensor, side: int, size: int) -> Tensor:
    """Each patch as `size` x `size` means of its pixels (N, L, size * size * C)."""
    return by_patch(F.avg_pool2d(at_least_float32(imgs), side // size), size)


def coefficients(model, imgs: Tensor) -> Tensor:
    """The patches' coefficients of the model's components (N, L, K)."""
    with torch.autocast(imgs.device.type, enabled=False):
        patches = at_least_float32(model.patchify(imgs)) - model.decoder_target_mean
        return patches @ model.decoder_target_components.T


def fit(model, dataset, args: Namespace, size: int) -> tuple[Tensor, Tensor, float]:
    """(mean (D,), the first `size` principal components (size, D), their share of the variance) of patches of
    images evenly spread over `dataset`, as it gives them in epoch 0.
    """
    images = normalize_batch(pick_images(dataset, FITTED_ON[0]), "cpu", args.mean, args.std)
    patches = model.patchify(images).flatten(0, 1)
    chosen = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[: FITTED_ON[1]]
    patches = patches[chosen].double()
    patches -= (mean := patches.mean(dim=0))
    variances, vectors = torch.linalg.eigh(patches.T @ patches)  # in rising order
    components, share = vectors.T.flip(0)[:size], variances[-size:].sum() / variances.sum()
    return mean, components.contiguous(), share.item()


@torch.no_grad()
def features(lesson: Lesson, imgs: Tensor) -> Tensor:
    """A teacher's last tokens of all patches of an image, each with mean 0 and variance 1 (N, L, E)."""
    length = lesson.teacher.patch_embed.num_patches
    tokens = teach(lesson, imgs, torch.arange(length, device=imgs.device).expand(len(imgs), -1), length)
    return F.layer_norm(at_least_float32(tokens[:, 1:]), tokens.shape[-1:])
