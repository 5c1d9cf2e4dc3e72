"""What logging and metering cost: their share of one training step of a small model. Target: below 1 %.

    python benchmarks/bench_logging.py --threads 2 --json logging.json

Runs `engine_pretrain.train_one_epoch` itself, on batches that lie in memory, in three ways:
1. in place: the real loop with a clock around its calls to meters, log lines and TensorBoard, so that they
   meet the caches that a real step leaves behind. This is the figure that counts;
2. bare: the same loop with a step that computes nothing, with logging minus without, over thousands of steps;
3. A/B: the real loop with logging minus without, in turns. It sees background threads too, but also what else
   the machine does, in spite of counting processor time on a CPU: a cross-check with an interval.
The exit code is 1 when the target is missed.
"""

import argparse
import contextlib
import json
import platform
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import run_benchmark

import engine_pretrain
import main_pretrain
from util.cli.parser import ArgumentParser
from util.compute import precision
from util.compute.precision import NativeScalerWithGradNormCount, resolve_device
from util.data.transforms import channel_stats
from util.demo_set.files import TRAIN
from util.run import meters
from util.run.run_log import make_log_writer, write_log

TARGET_PERCENT = 1.0
PARTS = {
    "update": "MetricLogger.update",
    "lines": "log lines and their clock (log_every)",
    "curves": "TensorBoard curves (StepCurves)",
    "epoch": "averages, log.txt, flush at the end of an epoch",
    "norm": "gradient norm (logged, and checked to be finite)",
}


class Batches:
    """A loader whose uint8 images (N, C, H, W) are in memory; remembers when each was asked for."""

    def __init__(self, images: torch.Tensor, steps: int):
        self.images, self.steps, self.batch_size, self.marks = images, steps, len(images), []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        for _ in range(self.steps):
            self.marks.append(time.perf_counter())
            yield self.images, None
        self.marks.append(time.perf_counter())


class Nothing:
    """Stands in for MetricLogger and StepCurves when logging is off."""

    def __init__(self, *args, **kwargs):
        pass

    def log_every(self, iterable, *args):
        return iterable

    def averages(self) -> dict:
        return {}

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


class NoStep(torch.nn.Module):
    """Model, optimizer and scaler at once, none of which computes anything."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.register_buffer("number", torch.ones((), device=device))
        self.param_groups = [{"lr": 0.0}]

    def forward(self, images, mask_ratio):
        return self.number, None, None

    def zero_grad(self):
        pass

    def scale(self, *args, **kwargs) -> torch.Tensor:
        return self.number


def clocked(function, spent: dict[str, float], part: str):
    """`function`, adding its seconds to `spent[part]`."""

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - start

    return wrapper


class Clocked:
    """`batches`, adding the seconds that each takes to come to `spent["lines"]`."""

    def __init__(self, batches, spent: dict[str, float]):
        self.batches, self.spent = batches, spent

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        take = clocked(iter(self.batches).__next__, self.spent, "lines")
        with contextlib.suppress(StopIteration):
            while True:
                item = take()
                yield item


def with_clocks(spent: dict[str, float]) -> tuple[type, type]:
    """MetricLogger and StepCurves that add their seconds to `spent`."""

    class Metrics(meters.MetricLogger):
        def log_every(self, batches, *args):
            # Between two items it keeps its books; fetching a batch and normalising it is not part of that
            fetching = {"lines": 0.0}
            take = clocked(super().log_every(Clocked(batches, fetching), *args).__next__, spent, "lines")
            with contextlib.suppress(StopIteration):
                while True:
                    item = take()
                    spent["lines"] -= fetching["lines"]
                    fetching["lines"] = 0.0
                    yield item

    class Curves(engine_pretrain.StepCurves):
        pass

    for owner, part, names in [
        (Metrics, "update", ["update"]),
        (Metrics, "epoch", ["synchronize_between_processes", "averages"]),
        (Curves, "curves", ["add", "write"]),
    ]:
        for name in names:
            setattr(owner, name, clocked(getattr(owner, name), spent, part))
    return Metrics, Curves


def run_epoch(parts: tuple, batches: Batches, args, writer, folder: str, logging: bool, spent=None):
    """One epoch with or without logging; returns seconds on the clock and of processor time.

    On a GPU, which works beside the processor, both are the clock's. `spent`: takes the seconds of the
    logging calls, which are then clocked.
    """
    model, optimizer, scaler = parts
    device = torch.device(args.device)
    total_norm = precision.total_norm
    busy = time.process_time if device.type == "cpu" else time.perf_counter
    with contextlib.ExitStack() as stack:
        patch = lambda owner, name, value: stack.enter_context(mock.patch.object(owner, name, value))  # noqa: E731
        if not logging:
            patch(meters, "MetricLogger", Nothing)
            patch(engine_pretrain, "StepCurves", Nothing)
            patch(precision, "total_norm", lambda *args, **kwargs: torch.ones((), device=device))
        elif spent is not None:
            logger, curves = with_clocks(spent)
            patch(meters, "MetricLogger", logger)
            patch(engine_pretrain, "StepCurves", curves)
            patch(precision, "total_norm", clocked(total_norm, spent, "norm"))
        start, busy_start = time.perf_counter(), busy()
        stats = engine_pretrain.train_one_epoch(
            model, batches, optimizer, device, 0, scaler, writer if logging else None, args
        )
        if logging:  # as main_pretrain ends an epoch
            end = time.perf_counter()
            writer.flush()
            write_log(folder, {"epoch": 0, **stats})
            if spent is not None:
                spent["epoch"] += time.perf_counter() - end
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, busy() - busy_start


def take_turns(rounds: int, run) -> tuple[np.ndarray, np.ndarray]:
    """Calls `run(logging)` with and without in turns; returns (rounds, 2) seconds of each."""
    seconds = defaultdict(list)
    for i in range(rounds):
        for logging in (True, False) if i % 2 else (False, True):
            seconds[logging].append(run(logging))
    return np.array(seconds[True]), np.array(seconds[False])


def interval(values, statistic=np.median, draws: int = 2000) -> list[float]:
    """A statistic of measurements with its bootstrapped 95 % interval: [value, low, high]."""
    values = np.asarray(values)
    picks = np.random.RandomState(0).randint(0, len(values), (draws, len(values)))
    return [float(statistic(values)), *np.percentile(statistic(values[picks], axis=1), [2.5, 97.5]).tolist()]


def measure(options: argparse.Namespace, args: argparse.Namespace, folder: str) -> dict:
    """A step in seconds, and the share of one of each part and cross-check; `args` of main_pretrain."""
    device, writer = torch.device(args.device), make_log_writer(folder)
    torch.manual_seed(0)
    size = args.input_size if isinstance(args.input_size, tuple) else (args.input_size,) * 2
    images = torch.randint(0, 256, (args.batch_size, args.in_chans, *size), dtype=torch.uint8)

    def run(parts, batches, logging, spent=None):
        return run_epoch(parts, batches, args, writer, folder, logging, spent)

    nothing = NoStep(device)
    parts, batches = (nothing, nothing, nothing.scale), Batches(torch.zeros(1), options.steps)
    take_turns(2, lambda logging: run(parts, batches, logging))  # warm-up
    on, off = take_turns(options.bare_rounds, lambda logging: run(parts, batches, logging))
    bare = (on - off)[:, 1] / options.steps

    model = main_pretrain.build_model(args).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    parts = (model, optimizer, NativeScalerWithGradNormCount(enabled=False, device=device.type))
    run(parts, Batches(images, min(5, options.steps)), logging=True)
    batches, steps, spent_by_epoch = Batches(images, options.steps), [], []

    def run_real(logging):
        batches.marks.clear()
        if logging:
            spent_by_epoch.append(defaultdict(float))
            return run(parts, batches, True, spent_by_epoch[-1])
        seconds = run(parts, batches, False)
        steps.extend(np.diff(batches.marks))
        return seconds

    on, off = take_turns(options.rounds, run_real)
    writer.close()
    # Shares of the epoch that they were part of: what else the machine does slows both alike
    rest = [seconds - sum(spent.values()) for seconds, spent in zip(on[:, 0], spent_by_epoch, strict=True)]
    shares = {part: [s[part] / r for s, r in zip(spent_by_epoch, rest, strict=True)] for part in PARTS}
    step = interval(steps)
    return {
        "step_seconds": step,
        "parts": {part: interval(shares[part], np.mean) for part in PARTS},
        "in_place": interval(np.sum(list(shares.values()), axis=0), np.mean),
        "bare": interval(bare / step[0]),
        "ab": interval(((on - off) / off)[:, 1]),
        "epochs_on": on.tolist(),
        "epochs_off": off.tolist(),
    }


def report(result: dict) -> None:
    """Prints the table: microseconds per step and share of a step, with 95 % intervals."""
    step, low, high = result["step_seconds"]
    print(f"a step without logging: {step * 1e3:.2f} ms (median; 95 %: {low * 1e3:.2f} to {high * 1e3:.2f})")
    print(f"\n{'part':48s} {'us per step':>12s} {'% of a step':>12s} {'95 % interval':>18s}")
    rows = [(PARTS[part], result["parts"][part]) for part in PARTS]
    rows.append(("all of it, in place", result["in_place"]))
    rows.append(("cross-check: bare (without the gradient norm)", result["bare"]))
    rows.append(("cross-check: A/B of the real loop", result["ab"]))
    for name, (share, low, high) in rows:
        limits = f"{100 * low:.3f} to {100 * high:.3f}"
        print(f"{name:48s} {share * step * 1e6:12.1f} {share * 100:12.3f} {limits:>18s}")
    percent = 100 * result["in_place"][0]
    verdict = "met" if percent < TARGET_PERCENT else "MISSED"
    print(f"\nlogging: {percent:.3f} % of a step; target below {TARGET_PERCENT:g} %: {verdict}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    demo = parser.add_argument_group("training, by default as `make demo` has it")
    demo.add_argument("--model", default="mae_vit_tiny_patch16")
    demo.add_argument("--input_size", default="64", help="pixels: 64, or 32x128")
    demo.add_argument("--patch_size", default=8, type=int)
    demo.add_argument("--decoder_depth", default=2, type=int)
    demo.add_argument("--batch_size", default=64, type=int)
    demo.add_argument("--print_freq", default=10, type=int, help="steps between log lines")
    demo.add_argument("--steps", default=10 * TRAIN // 64, type=int, help="per epoch")
    parser.add_argument("--rounds", default=8, type=int, help="real epochs with, and as many without logging")
    parser.add_argument("--bare_rounds", default=200, type=int, help="the same of steps that compute nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--json", metavar="FILE", help="writes settings and figures, in seconds per step")
    return parser


def main(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)

    names = ("model", "input_size", "patch_size", "decoder_depth", "batch_size", "print_freq")
    flags = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
    args = ArgumentParser(parents=[main_pretrain.get_args_parser()]).parse_args(flags)
    args.device, args.lr = str(resolve_device(options.device)), 1e-4
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)
    settings = {**vars(options), "threads": torch.get_num_threads(), "torch": torch.__version__}
    settings["python"] = platform.python_version()
    print(", ".join(f"{name} {value}" for name, value in settings.items() if name != "json"), flush=True)

    with contextlib.ExitStack() as stack:  # log lines go to a file, as those of a long run do
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        lines = stack.enter_context(open(Path(folder) / "lines.txt", "w"))
        stack.enter_context(contextlib.redirect_stdout(lines))
        result = measure(options, args, folder)
    report(result)
    if options.json:
        Path(options.json).write_text(json.dumps({"settings": settings, **result}, indent=1) + "\n")
    return 0 if 100 * result["in_place"][0] < TARGET_PERCENT else 1


if __name__ == "__main__":
    run_benchmark(main, get_args_parser())
