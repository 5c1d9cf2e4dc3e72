"""What the training loops of both engines know of an epoch's steps."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from util.compute.precision import resolve_amp_dtype
from util.data.transforms import normalize_batch
from util.processes.collectives import get_rank
from util.rng import seed_step


@dataclass(frozen=True)
class EpochSteps:
    """The micro-steps of an epoch, and what else a loop reads from `args`, which forks fill in part.

    count: micro-steps of the whole epoch. start: the first to do, above 0 inside an epoch. accum_iter:
    micro-steps of an optimizer step. amp_dtype: autocast's, None for full precision. mean, std: of uint8
    images, None for ImageNet's. seed: of the steps' random numbers; None: they are not seeded. clip_grad: the
    largest gradient norm, None for any.
    """

    device: torch.device
    count: int
    start: int
    accum_iter: int
    amp_dtype: torch.dtype | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    seed: int | None
    print_freq: int
    clip_grad: float | None

    @classmethod
    def of(cls, data_loader, args: Namespace, device: torch.device | str) -> "EpochSteps":
        """Of a loader with a length, whose sampler may have `start_batch`."""
        device = torch.device(device)
        return cls(
            device,
            count=len(data_loader),
            start=getattr(getattr(data_loader, "sampler", None), "start_batch", 0),
            accum_iter=args.accum_iter,
            amp_dtype=resolve_amp_dtype(getattr(args, "amp_dtype", "auto"), device),
            mean=getattr(args, "mean", None),
            std=getattr(args, "std", None),
            seed=getattr(args, "seed", None),
            print_freq=getattr(args, "print_freq", 20),
            clip_grad=getattr(args, "clip_grad", None),
        )

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
