"""What "nothing is lost" costs: per training step, and when a checkpoint is saved. Targets: below 1 % of a
step, and a save that holds the training up for less than one step.

    python benchmarks/bench_safety.py --threads 2 --json safety.json
    torchrun --nproc_per_node 2 benchmarks/bench_safety.py --threads 1

Runs `engine_pretrain.train_one_epoch` itself on batches in memory, with a clock around what exists only so
that no work is lost: seeding each step by its position, `RunGuard` (its flags, the all-reduce that makes all
processes act alike, signals, losses that are not finite) and the check of the gradient norm. Then it saves
through `save_model`: the stall is the time of the call, which copies model and optimizer to
memory; the file is written beside the next steps, whose times are compared with those before.
The exit code is 1 when a target is missed.
"""

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench_logging import Batches, clocked
from harness import run_benchmark

import engine_pretrain
import main_pretrain
from util.cli.parser import ArgumentParser
from util.compute.precision import NativeScalerWithGradNormCount, resolve_device
from util.data.transforms import channel_stats
from util.processes.collectives import all_reduce_max, get_world_size, is_main_process
from util.processes.collectives import log as say
from util.processes.fsdp import wrap_model
from util.processes.group import init_distributed_mode, shut_down
from util.run import checkpoint
from util.run.guard import RunGuard

TARGET_PERCENT = 1.0


def steps_of(batches: Batches) -> list[float]:
    """Seconds of each step so far."""
    return [b - a for a, b in itertools.pairwise(batches.marks)]


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
            (engine_pretrain, "seed_step", "seeding by position"),
            (torch, "isfinite", "checks that norm and loss are finite"),
        ]:
            value = clocked(getattr(owner, name), spent, part)
            stack.enter_context(mock.patch.object(owner, name, value))
        engine_pretrain.train_one_epoch(
            model, batches, optimizer, torch.device(args.device), 0, scaler, None, args, guard
        )
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(options: argparse.Namespace, args: argparse.Namespace, folder: str) -> dict:
    """Seconds of a step, of each part of it, of the stalls of saves, and of steps beside a write."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (args.batch_size, 3, args.input_size, args.input_size), dtype=torch.uint8)
    bare = model = main_pretrain.build_model(args).to(device)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=device.type == "cuda")
    if args.distributed:
        model = wrap_model(model, device)
    scaler = NativeScalerWithGradNormCount(enabled=False, device=device.type)
    parts = (model, optimizer, scaler)
    train(parts, Batches(images, 2), args, defaultdict(float))  # warm-up, and the optimizer's state

    spent = defaultdict(float)
    quiet = Batches(images, options.steps)
    train(parts, quiet, args, spent)
    args.output_dir, stalls, beside, durations = folder, [], [], []
    for number in range(options.saves):
        start = time.perf_counter()
        checkpoint.save_model(args, number, model, bare, optimizer, scaler)
        stalls.append(time.perf_counter() - start)
        writing = Batches(images, 2)
        train(parts, writing, args, defaultdict(float))
        beside += steps_of(writing)
        checkpoint.finish_saving()
        durations.append(time.perf_counter() - start)
    size = max((path.stat().st_size for path in Path(folder).glob("*.pth")), default=0)
    return {
        "step_seconds": steps_of(quiet),
        "parts_seconds_per_step": {part: value / options.steps for part, value in spent.items()},
        "stall_seconds": stalls,
        "step_seconds_after_a_save": beside,
        "save_seconds_until_on_disk_at_most": durations,
        "checkpoint_bytes": size,
    }


def report(result: dict) -> bool:
    """Prints the table; returns whether both targets are met."""
    step = statistics.median(result["step_seconds"])
    parts = result["parts_seconds_per_step"]
    say(f"\n{'part':44s} {'us per step':>12s} {'% of a step':>12s}")
    for name, seconds in [*parts.items(), ("all of it", sum(parts.values()))]:
        say(f"{name:44s} {seconds * 1e6:12.1f} {100 * seconds / step:12.4f}")
    stall, after = (
        statistics.median(result[name]) for name in ("stall_seconds", "step_seconds_after_a_save")
    )
    say(f"\na step: {step:.3f} s; the two after a save: {after:.3f} s each (medians)")
    say(f"a save of {result['checkpoint_bytes'] / 2**20:.0f} MB stalls the training for {stall:.3f} s "
        f"(median of {len(result['stall_seconds'])}; worst {max(result['stall_seconds']):.3f} s), "
        f"{stall / step:.2f} of a step")  # fmt: skip
    percent = 100 * sum(parts.values()) / step
    met = percent < TARGET_PERCENT and stall < step
    say(f"targets: below {TARGET_PERCENT:g} % of a step: {percent:.4f} %; "
        f"a stall below one step: {stall / step:.2f}: {'met' if met else 'MISSED'}")  # fmt: skip
    return met


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--input_size", default=224, type=int)
    parser.add_argument("--batch_size", default=16, type=int)
    parser.add_argument("--steps", default=8, type=int, help="clocked steps")
    parser.add_argument("--saves", default=3, type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--json", metavar="FILE", help="writes settings and figures, in seconds")
    return parser


def main(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    flags = ["--model", options.model, "--input_size", str(options.input_size)]
    flags += ["--batch_size", str(options.batch_size), "--device", options.device]
    args = ArgumentParser(parents=[main_pretrain.get_args_parser()]).parse_args(flags)
    init_distributed_mode(args)
    args.device, args.lr = str(resolve_device(options.device, args.gpu)), 1e-4
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)
    settings = {**vars(options), "threads": torch.get_num_threads(), "torch": torch.__version__}
    settings |= {"python": platform.python_version(), "processes": get_world_size()}
    say(", ".join(f"{name} {value}" for name, value in settings.items() if name != "json"))
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, args, folder)
    met = report(result)
    if options.json and is_main_process():
        Path(options.json).write_text(json.dumps({"settings": settings, **result}, indent=1) + "\n")
    shut_down()
    return 0 if met else 1


if __name__ == "__main__":
    run_benchmark(main, get_args_parser())
