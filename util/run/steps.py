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
        args: accum_iter; if present amp_dtype, mean, std, seed, print_freq, clip_grad, teacher_weight.
        model: that is trained; a step that is not made leaves its buffers (BatchNorm's statistics) as well.

    count: micro-steps of the whole epoch. start: the first one to do, above 0 inside an epoch. amp_dtype:
    autocast's, None for full precision.
    """

    def __init__(self, data_loader, args: Namespace, device: torch.device | str, model=None):
        self.device = torch.device(device)
        self.count, self.accum_iter = len(data_loader), getattr(args, "accum_iter", 1)
        self.start = getattr(getattr(data_loader, "sampler", None), "start_batch", 0)
        self.amp_dtype = resolve_amp_dtype(getattr(args, "amp_dtype", "auto"), self.device)
        self.mean, self.std = getattr(args, "mean", None), getattr(args, "std", None)  # None: ImageNet's
        self.seed, self.print_freq = getattr(args, "seed", None), getattr(args, "print_freq", 20)
        self.clip_grad = getattr(args, "clip_grad", None)
        self.teacher_weight = getattr(args, "teacher_weight", None)  # None: no teacher
        self.buffers: list[torch.Tensor] = [] if model is None else list(model.buffers())
        self.kept: list[torch.Tensor] = []  # as they were before the accumulation window

    def losses(self, output: Sequence) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(loss, distance to the teacher, if any) of what a masked autoencoder returns: loss, prediction and
        mask; of a `util.recipes.teacher.Student` these.
        """
        return output[0], None if self.teacher_weight is None else output[1]

    def move(self, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A batch (images[, labels]) on the device, the images normalised by `normalize_batch`."""
        images, *labels = batch
        images = normalize_batch(images, self.device, self.mean, self.std)
        return [images, *(part.to(self.device, non_blocking=True) for part in labels)]

    def begin(self, epoch: int, step: int) -> None:
        """Makes the random numbers of a micro-step depend on its place alone; see `util.rng.seed_step`."""
        if self.seed is not None:
            seed_step(self.seed, get_rank(), epoch, step, self.device)
        if step % self.accum_iter == 0:
            self.kept = [buffer.clone() for buffer in self.buffers]

    def finish(self, optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor | None) -> None:
        """Ends an accumulation window after the scaler: without gradients and, where `grad_norm` is not
        finite, so that the scaler made no step, with the buffers of before. Nothing waits for the device.
        """
        optimizer.zero_grad()
        if grad_norm is not None:
            for buffer, kept in zip(self.buffers, self.kept, strict=True):
                buffer.copy_(torch.where(torch.isfinite(grad_norm), buffer, kept))

    def window_size(self, step: int) -> int:
        """Micro-steps whose gradients are averaged with those of `step`; fewer at the end of an epoch."""
        return min(self.accum_iter, self.count - step // self.accum_iter * self.accum_iter)

    def updates(self, step: int) -> bool:
        """Whether the optimizer steps after micro-step `step`."""
        return (step + 1) % self.accum_iter == 0 or step + 1 == self.count
