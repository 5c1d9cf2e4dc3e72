"""What "nothing is lost" costs: per training step, and when a checkpoint is saved. Targets: below 1 % of a
step, a save that holds the training up for less than one step, and 1 s per GB for the checksums of a file
that is read.

    python benchmarks/bench_safety.py --threads 2 --json safety.json
    torchrun --nproc_per_node 2 benchmarks/bench_safety.py --threads 1

Runs `engine_pretrain.train_one_epoch` itself on batches in memory, with a clock around what exists only so
that no work is lost: seeding each step by its position, `RunGuard` (its flags, the all-reduce that makes all
processes act alike, signals, losses that are not finite) and the check of the gradient norm. Then it saves
through `save_in_background`: the stall is the time of the call, which copies model and optimizer to
memory; the file is written beside the next steps, whose times are compared with those before. Last it reads
that file with and without comparing its checksums, which torch writes in any case.
The exit code is 1 when a target is missed.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from harness import Parser, finish, positive, print_table, run_benchmark, say
from workload import Batches, clocked, noise_batch, pretrain_args, synchronize

import engine_pretrain
import main_pretrain
from util.compute.precision import NativeScalerWithGradNormCount
from util.processes.collectives import all_reduce_max, get_world_size
from util.processes.group import shut_down
from util.processes.parallel import wrap_model
from util.run import checkpoint, steps
from util.run.guard import RunGuard
from util.sizes import default_workers
from util.weights.files import check_archive, read_file

TARGET_PERCENT = 1.0
TARGET_PER_GB = 1.0  # seconds


def train(parts: tuple, batches: Batches, args, spent: dict[str, float]) -> None:
    """One epoch of the real loop; `spent` gets the seconds of the parts that belong to safety.

    On several processes the wait for the slowest is no cost of the all-reduce that happens to meet it: all
    meet before it, outside the clock.
    """
    model, optimizer, scaler = parts
    guard = RunGuard(args, steps=len(batches))
    after_update = clocked(guard.after_update, spent, "guard: flags, signals, all-reduce")

    def meet_first(*values):
        if get_world_size() > 1:
            all_reduce_max(torch.zeros(1))
        return after_update(*values)

    guard.after_update = meet_first
    guard.watch = clocked(guard.watch, spent, "guard: notes the batch")
    with contextlib.ExitStack() as stack:
        for owner, name, part in [
            (steps, "seed_step", "seeding by position"),
            (torch, "isfinite", "checks that norm and loss are finite"),
        ]:
            value = clocked(getattr(owner, name), spent, part)
            stack.enter_context(mock.patch.object(owner, name, value))
        device = torch.device(args.device)
        engine_pretrain.train_one_epoch(model, batches, optimizer, device, 0, scaler, None, args, guard)
    synchronize(device)


def measure(options: argparse.Namespace, args: argparse.Namespace, folder: str) -> dict:
    """Seconds of a step, of each part of it, of the stalls of saves, and of steps beside a write."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    batch = noise_batch((args.batch_size, 3, args.input_size, args.input_size))
    bare = model = main_pretrain.build_model(args).to(device)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=device.type == "cuda")
    if args.distributed:
        model = wrap_model(model, device)
    scaler = NativeScalerWithGradNormCount(enabled=False, device=device.type)
    parts = (model, optimizer, scaler)
    train(parts, Batches([batch], 2), args, defaultdict(float))  # warm-up, and the optimizer's state

    spent = defaultdict(float)
    quiet = Batches([batch], options.steps)
    train(parts, quiet, args, spent)
    args.output_dir, stalls, beside, durations = folder, [], [], []
    for epoch in range(options.saves):
        start = time.perf_counter()
        checkpoint.save_in_background(args, epoch, bare, optimizer, scaler)
        stalls.append(time.perf_counter() - start)
        writing = Batches([batch], 2)
        train(parts, writing, args, defaultdict(float))
        beside += writing.step_seconds()
        checkpoint.finish_saving()
        durations.append(time.perf_counter() - start)
    files = list(Path(folder).glob("*.pth"))
    size = max((path.stat().st_size for path in files), default=0)
    return {
        **reading(files[:1]),
        "step_seconds": quiet.step_seconds(),
        "parts_seconds_per_step": {part: value / options.steps for part, value in spent.items()},
        "stall_seconds": stalls,
        "step_seconds_after_a_save": beside,
        "save_seconds_until_on_disk_at_most": durations,
        "checkpoint_bytes": size,
    }


def reading(files: list[Path]) -> dict[str, list[float]]:
    """Seconds of the checksums of a file, and of reading it without them; {} where there is no file."""
    ways = {"checksum_seconds": check_archive, "read_seconds": partial(read_file, verify=False)}
    spent = defaultdict(list)
    for path in files * 3:
        for name, read in ways.items():
            start = time.perf_counter()
            read(path)
            spent[name].append(time.perf_counter() - start)
    return dict(spent)


def report(result: dict) -> bool:
    """Prints the table; returns whether both targets are met."""
    step = statistics.median(result["step_seconds"])
    parts = result["parts_seconds_per_step"]
    say()
    print_table(["part", "us per step", "% of a step"], (
        (name, f"{seconds * 1e6:.1f}", f"{100 * seconds / step:.4f}")
        for name, seconds in [*parts.items(), ("all of it", sum(parts.values()))]
    ))  # fmt: skip
    stall = statistics.median(result["stall_seconds"])
    after = statistics.median(result["step_seconds_after_a_save"])
    say(f"\na step: {step:.3f} s; the two after a save: {after:.3f} s each (medians)")
    say(f"a save of {result['checkpoint_bytes'] / 2**20:.0f} MB stalls the training for {stall:.3f} s "
        f"(median of {len(result['stall_seconds'])}; worst {max(result['stall_seconds']):.3f} s), "
        f"{stall / step:.2f} of a step")  # fmt: skip
    percent = 100 * sum(parts.values()) / step
    per_gb = 0.0
    if "checksum_seconds" in result:
        gigabytes = result["checkpoint_bytes"] / 1e9
        checksums, read = (
            statistics.median(result[name]) / gigabytes for name in ("checksum_seconds", "read_seconds")
        )
        say(f"its checksums take {checksums:.2f} s per GB, on {default_workers()} threads; reading it takes "
            f"{read:.2f} s per GB besides")  # fmt: skip
        per_gb = checksums
    met = percent < TARGET_PERCENT and stall < step and per_gb < TARGET_PER_GB
    say(f"targets: below {TARGET_PERCENT:g} % of a step: {percent:.4f} %; "
        f"a stall below one step: {stall / step:.2f}; checksums below {TARGET_PER_GB:g} s per GB: "
        f"{per_gb:.2f}: {'met' if met else 'MISSED'}")  # fmt: skip
    return met


def main(options: argparse.Namespace) -> int:
    args = pretrain_args(options, names=["model", "input_size", "batch_size", "device"])
    say(f"{get_world_size()} processes")
    with tempfile.TemporaryDirectory() as folder:
        result = {"processes": get_world_size(), **measure(options, args, folder)}
    met = report(result)
    shut_down()
    return finish(options, result, met)


if __name__ == "__main__":
    parser = Parser(
        __doc__, input_size=224, batch_size=16, steps=(8, "clocked steps"), device="cpu", threads=None
    )
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--saves", default=3, type=positive())
    run_benchmark(main, parser)
