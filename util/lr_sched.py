"""The learning rate, set at every step: linear warm-up, then MAE's half-cycle cosine or `--schedule`'s."""

import math
from argparse import Namespace

import torch


def learning_rate(epoch: float, args: Namespace) -> float:
    """Learning rate at a fractional epoch.

    Reads `lr`, `min_lr`, `warmup_epochs`, `epochs` of `args` and, if there, `schedule`: "cosine" (arXiv
    2111.06377, appendix A.1), "constant", or "wsd" (warm-up, stable, decay; arXiv 2404.06395), which falls
    linearly in the last `cooldown` epochs.
    """
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    if getattr(args, "schedule", "cosine") != "cosine":
        stable = stable_epochs(args)
        left = (args.epochs - epoch) / (args.epochs - stable) if epoch > stable else 1.0
        return args.min_lr + (args.lr - args.min_lr) * left
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.min_lr + (args.lr - args.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def stable_epochs(args: Namespace) -> int:
    """Epochs before the cooldown of "wsd", by default the last fifth; of other schedules all of them."""
    if getattr(args, "schedule", "cosine") != "wsd":
        return args.epochs
    return args.epochs - (getattr(args, "cooldown", None) or max(1, round(args.epochs / 5)))


def adjust_learning_rate(optimizer: torch.optim.Optimizer, epoch: float, args: Namespace) -> float:
    """Sets every group's learning rate for a fractional epoch, times its `lr_scale` if it has one; returns
    it.
    """
    lr = learning_rate(epoch, args)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def scale_learning_rate(args: Namespace, world_size: int) -> int:
    """Sets `args.lr` = blr * effective batch / 256 unless `--lr` was given; returns that batch size."""
    effective_batch = args.batch_size * args.accum_iter * world_size
    if args.lr is None:
        args.lr = args.blr * effective_batch / 256
    return effective_batch
