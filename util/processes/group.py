"""Joining the other processes of a run, and leaving them: at the end, or because of a fault."""

import contextlib
import json
import math
import os
import re
import time
import uuid
import warnings
from argparse import Namespace
from datetime import timedelta

import torch
import torch.distributed as dist

from util import console
from util.errors import UserError
from util.processes.collectives import all_reduce_sum, barrier, gather, note


def find_processes(args: Namespace) -> tuple[int, int, int] | None:
    """(rank, world size, local rank) from the environment of OpenMPI, torchrun or srun; None: a single
    process.

    Under srun also sets MASTER_ADDR, MASTER_PORT and LOCAL_WORLD_SIZE where they are missing.
    """
    env = os.environ
    try:
        if getattr(args, "dist_on_itp", False):
            return tuple(int(env[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE", "LOCAL_RANK"))
        if "RANK" in env and "WORLD_SIZE" in env:
            local_rank = int(env.get("LOCAL_RANK", max(getattr(args, "local_rank", -1), 0)))
            return int(env["RANK"]), int(env["WORLD_SIZE"]), local_rank
        if "SLURM_PROCID" in env and (tasks := int(env.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
            from util.processes.nodes import master_address, master_port

            nodes, count = env.get("SLURM_STEP_NODELIST"), int(env.get("SLURM_STEP_NUM_NODES", "1"))
            start = int(env["SLURM_STEP_ID"]) + int(env.get("SLURM_RESTART_COUNT", "0"))
            env.setdefault("MASTER_ADDR", master_address(nodes or env["SLURM_JOB_NODELIST"]))
            env.setdefault("MASTER_PORT", str(master_port(env["SLURM_JOB_ID"], start)))
            env.setdefault("LOCAL_WORLD_SIZE", str(math.ceil(tasks / count)))
            return int(env["SLURM_PROCID"]), tasks, int(env["SLURM_LOCALID"])
    except KeyError as missing:
        raise UserError(f"the launcher did not set {missing} in the environment") from None
    return None


def init_distributed_mode(args: Namespace) -> None:
    """Joins the other processes, if a launcher started several: NCCL on GPUs, gloo on CPU and on Windows.

    Sets `args.distributed`, `args.rank`, `args.world_size`, `args.gpu` (which one here). Checks that the
    processes reach each other, and starts watching them (`util.processes.watch`).

    Raises:
        UserError: the launcher's environment is incomplete, or not all processes came.
    """
    found = find_processes(args)
    if found is None:
        args.distributed, args.rank, args.world_size, args.gpu = False, 0, 1, 0
        return
    args.rank, args.world_size, args.gpu = found
    args.distributed = True
    _share_cores()
    device = str(getattr(args, "device", "auto"))
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        args.gpu %= max(torch.cuda.device_count(), 1)  # srun --gpus-per-task shows a process its own one only
    url, patience = getattr(args, "dist_url", "env://"), timedelta(minutes=getattr(args, "dist_timeout", 30))
    if url == "env://" and "MASTER_ADDR" not in os.environ:
        raise UserError("MASTER_ADDR is not set: start with torchrun, or pass --dist_url tcp://HOST:PORT")
    try:
        if on_gpu:
            check_kernels(torch.device("cuda", args.gpu))
            torch.cuda.set_device(args.gpu)
        if os.name == "nt":
            os.environ.setdefault("USE_LIBUV", "0")  # torch 2.6 for Windows has none, but asks for it
        store = next(dist.rendezvous(url, args.rank, args.world_size, timeout=patience))[0]
        store.set_timeout(patience)
        known = dict(rank=args.rank, world_size=args.world_size, timeout=patience)
        backend = "nccl" if on_gpu and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=_own_part(store), **known)
        part = gather(uuid.uuid4().hex)[0]
        total = all_reduce_sum(torch.ones(1, device="cuda" if on_gpu else "cpu")).item()
    except (RuntimeError, ValueError, AssertionError) as error:
        lines = str(error).strip().splitlines()
        reason = next((line for line in lines if "Duplicate GPU" in line), lines[0])
        raise UserError(
            f"rank {args.rank} of {args.world_size}: could not join the others: {reason}"
        ) from None
    if total != args.world_size:
        raise UserError(
            f"rank {args.rank}: an all-reduce over {args.world_size} processes counted {total:.0f}"
        )
    from util.processes import watch  # here and below: a single process does without it

    watch.start(args.rank, args.world_size, store, part)


def check_kernels(device: torch.device) -> None:
    """Raises UserError where this torch has no kernels for the GPU `device`, which it finds usable until the
    first one fails; RuntimeError where there is none.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(CUDA capability|not compatible|compute capability)")
        try:
            torch.ones(1, device=device).add_(1).item()  # a launch fails at once, or when it is waited for
        except RuntimeError as error:
            if "no kernel image" not in str(error):
                raise
            major, minor = torch.cuda.get_device_capability(device)
            name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
            raise UserError(
                f"--device {device}: torch {torch.__version__} has no kernels for {name}, only for "
                f"{' '.join(torch.cuda.get_arch_list())}; install a torch that is built for it "
                "(https://pytorch.org/get-started), or take --device cpu"
            ) from None


def _share_cores() -> None:
    """Divides the cores among the processes of this machine where nobody has said how many threads each shall
    have, as torchrun does. With as many as there are cores, each process would wait for the others' threads.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local))


def _own_part(store: dist.Store) -> dist.Store:
    """A part of `store` without the addresses of processes before: torchrun keeps it for all its tries.

    Of several machines each counts its own tries, so there `store` is as torchrun gives it.
    """
    env = os.environ
    if env.get("LOCAL_WORLD_SIZE") != env.get("WORLD_SIZE"):
        return store
    return dist.PrefixStore(f"try-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def lost_contact(error: BaseException) -> str | None:
    """What to say of an error that another process's end has caused; None for any other error."""
    text = str(error)
    if isinstance(error, dist.DistBackendError) or re.search("by peer|Connection (refused|reset)|gloo", text):
        reason = text.strip().splitlines()[0][:200]
        return f"error: lost contact with another process (killed, or out of memory?): {reason}"
    return None


def fail(message: str, status: int, own_fault: bool = True) -> None:
    """Prints `message` as the last word of all processes, brings the others down, and leaves with `status`.

    With `own_fault=False` (a collective broke, perhaps because another process ended) only if no other
    process has given a reason.
    """
    from util.processes import watch

    first = watch.claim(message, wait_seconds=0 if own_fault else watch.PATIENCE)
    if first:
        note(message)
    if (first or own_fault) and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        # torchrun ends the log with it; torch's own handler would write the whole traceback of a mistake
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        content = {"message": {"message": message, "extraInfo": extra}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
    console.write("")  # what others have printed
    watch.leave(status)  # without clean-up, which would wait for the others


def shut_down() -> None:
    """Leaves the process group, if there is one, when all processes have come here."""
    if dist.is_available() and dist.is_initialized():
        from util.processes import watch

        barrier()
        watch.stop()
        # torch < 2.8 holds Python's lock while it waits for gloo's threads, which may need it to let go of
        # the last tensors (pytorch/pytorch#154976); they have it meanwhile
        time.sleep(0.05)
        dist.destroy_process_group()
