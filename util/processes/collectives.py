"""The little that processes exchange, and logging by rank."""

import sys
from argparse import Namespace

import torch
import torch.distributed as dist

from util.console import one_line, say
from util.errors import UserError


def log(message: str) -> None:
    """Prints on the first process only. Whatever stdout takes or not, the run goes on; see `util.console`."""
    if is_main_process():
        say(message)


def note(message: str) -> None:
    """Prints on standard error on any process, with its rank when there are several."""
    rank = f"[rank {get_rank()}] " if get_world_size() > 1 else ""
    say(f"{rank}{message}", sys.stderr)


def warn(message: str) -> None:
    """As `note`, on one line, of what may be wrong."""
    note(f"warning: {one_line(str(message))}")


def is_dist_avail_and_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank() -> int:
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def barrier() -> None:
    if get_world_size() > 1:
        # NCCL warns where it has to guess the GPU
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` over all processes, in place."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Maximum of `tensor` over all processes, in place."""
    if get_world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather(value) -> list:
    """[value of each process], on every process; `value` is any small Python object."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_mean(x: float | torch.Tensor) -> float | torch.Tensor:
    """Mean over all processes of a number (returns a float) or a tensor (reduced in place)."""
    if get_world_size() == 1:
        return x
    if isinstance(x, torch.Tensor):
        return all_reduce_sum(x) / get_world_size()
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    return (all_reduce_sum(torch.tensor(x, dtype=torch.float64, device=device)) / get_world_size()).item()


def check_agreement(args: Namespace, **facts) -> None:
    """Raises UserError, naming what differs, unless all processes have the same arguments and `facts`."""
    own = {name: repr(value) for name, value in {**vars(args), **facts}.items()}
    for name in ("rank", "gpu", "local_rank", "num_workers", "given"):  # belong to the process
        own.pop(name, None)
    everyone = gather(own)
    for rank, theirs in enumerate(everyone):
        names = [name for name in own if theirs.get(name) != everyone[0].get(name)]
        if names:
            name = names[0]
            values = f"{theirs.get(name)}, rank 0 has {everyone[0].get(name)}"
            raise UserError(f"rank {rank} has {name} = {values}; start all with the same flags and data")
