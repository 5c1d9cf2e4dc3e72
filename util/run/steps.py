"""What the training loops of both engines know of an epoch's steps."""

from argparse import Namespace
from collections.abc import Sequence

import torch

from util.compute.precision import resolve_amp_dtype
from util.data.transforms import normalize_batch
from util.processes.collectives import get_rank
from util.rng import seed_step


class EpochSteps:
    """The micro-steps of an epoch, and what else a loop reads from `args`, which forks fill in part.

    Args:
        data_loader: has a length; its sampler may have `start_batch`.
        args: accum_iter; if present amp_dtype, mean, std, seed, print_freq, clip_grad.

    count: micro-steps of the whole epoch. start: the first one to do, above 0 inside an epoch. amp_dtype:
    autocast's, None for full precision.
    """

    def __init__(self, data_loader, args: Namespace, device: torch.device | str):
        self.device = torch.device(device)
        self.count, self.accum_iter = len(data_loader), args.accum_iter
        self.start = getattr(getattr(data_loader, "sampler", None), "start_batch", 0)
        self.amp_dtype = resolve_amp_dtype(getattr(args, "amp_dtype", "auto"), self.device)
        self.mean, self.std = getattr(args, "mean", None), getattr(args, "std", None)  # None: ImageNet's
        self.seed, self.print_freq = getattr(args, "seed", None), getattr(args, "print_freq", 20)
        self.clip_grad = getattr(args, "clip_grad", None)

    def move(self, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A batch (images[, labels]) on the device, the images normalised by `normalize_batch`."""
        images, *labels = batch
        images = normalize_batch(images, self.device, self.mean, self.std)
        return [images, *(part.to(self.device, non_blocking=True) for part in labels)]

    def seed_step(self, epoch: int, step: int) -> None:
        """Makes the random numbers of a micro-step depend on its place alone; see `util.rng.seed_step`."""
        if self.seed is not None:
            seed_step(self.seed, get_rank(), epoch, step)

    def window_size(self, step: int) -> int:
        """Micro-steps whose gradients are averaged with those of `step`; fewer at the end of an epoch."""
        return min(self.accum_iter, self.count - step // self.accum_iter * self.accum_iter)

    def updates(self, step: int) -> bool:
        """Whether the optimizer steps after micro-step `step`."""
        return (step + 1) % self.accum_iter == 0 or step + 1 == self.count
