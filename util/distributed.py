"""Start-up of one or many processes, the little they exchange, and logging by rank."""

import contextlib
import os
import sys
from argparse import Namespace

import torch
import torch.distributed as dist

from util.args import UserError


def log(message: str) -> None:
    """Prints on the first process only."""
    if is_main_process():
        print(message, flush=True)


def warn(message: str) -> None:
    """Prints on standard error on any process, with its rank when there are several."""
    rank = f"[rank {get_rank()}] " if get_world_size() > 1 else ""
    print(f"{rank}warning: {message}", file=sys.stderr, flush=True)


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def barrier() -> None:
    if get_world_size() > 1:
        dist.barrier()


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


def without_gradient_traffic(model: torch.nn.Module, active: bool = True):
    """Context of a micro-step that is not the last of its accumulation window: gradients stay where they are."""
    return model.no_sync() if active and hasattr(model, "no_sync") else contextlib.nullcontext()


def find_processes(args: Namespace) -> tuple[int, int, int] | None:
    """(rank, world size, local rank) from OpenMPI's, torchrun's or SLURM's environment; None: a single
    process.
    """
    env = os.environ
    try:
        if getattr(args, "dist_on_itp", False):
            return tuple(int(env[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE", "LOCAL_RANK"))
        if "RANK" in env and "WORLD_SIZE" in env:
            local_rank = int(env.get("LOCAL_RANK", max(getattr(args, "local_rank", -1), 0)))
            return int(env["RANK"]), int(env["WORLD_SIZE"]), local_rank
        if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in env:
            return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    except KeyError as missing:
        raise UserError(f"the launcher did not set {missing} in the environment") from None
    return None


def init_distributed_mode(args: Namespace) -> None:
    """Joins the other processes, if a launcher started several: NCCL on GPUs, gloo on CPU.

    Sets `args.distributed`, `args.rank`, `args.world_size`, `args.gpu` (the local rank).

    Raises:
        UserError: the launcher's environment is incomplete.
    """
    found = find_processes(args)
    if found is None:
        args.distributed, args.rank, args.world_size, args.gpu = False, 0, 1, 0
        return
    args.rank, args.world_size, args.gpu = found
    args.distributed = True
    on_gpu = torch.cuda.is_available() and str(getattr(args, "device", "auto")) != "cpu"
    if on_gpu:
        torch.cuda.set_device(args.gpu)
    url = getattr(args, "dist_url", "env://")
    if url == "env://" and "MASTER_ADDR" not in os.environ:
        raise UserError("MASTER_ADDR is not set: start with torchrun, or pass --dist_url tcp://HOST:PORT")
    dist.init_process_group("nccl" if on_gpu else "gloo", url, rank=args.rank, world_size=args.world_size)
    dist.barrier(device_ids=[args.gpu] if on_gpu else None)


def shut_down() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
