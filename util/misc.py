"""Names that forks import from here; most live in a home of their own."""

import builtins
import sys
from collections.abc import Iterable

import torch

from util.compute.precision import NativeScalerWithGradNormCount, total_norm
from util.processes.collectives import (
    all_reduce_mean,
    get_rank,
    get_world_size,
    is_dist_avail_and_initialized,
    is_main_process,
)
from util.processes.group import init_distributed_mode
from util.run.checkpoint import save_model
from util.run.meters import MetricLogger, SmoothedValue
from util.run.resume import load_model


def save_on_master(*args, **kwargs) -> None:
    """`torch.save` on the first process only. (`save_model` writes what a kill cannot break.)"""
    if is_main_process():
        torch.save(*args, **kwargs)


def setup_for_distributed(is_master: bool) -> None:
    """Replaces `print`: it writes to stdout if `is_master`, or where `force=True` is passed. Our scripts do
    not call it; they print with `util.processes.collectives.log`.
    """
    plain = getattr(builtins.print, "plain", builtins.print)

    def print_on_master(*args, force: bool = False, **kwargs) -> None:
        if is_master or force or kwargs.get("file") not in (None, sys.stdout):
            plain(*args, **kwargs)

    print_on_master.plain = plain
    builtins.print = print_on_master


def get_grad_norm_(parameters: torch.Tensor | Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """Norm of all gradients together, a scalar on their device; 0 where there are none. Changes nothing."""
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    grads = [p.grad.detach() for p in parameters if p.grad is not None]
    return total_norm(grads) if norm_type == 2 else torch.nn.utils.get_total_norm(grads, norm_type)
