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
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from harness import Parser, finish, positive, print_table, run_benchmark, say, take_turns
from workload import Batches, clocked, noise_batch, pretrain_args, synchronize

import engine_pretrain
import main_pretrain
from util.compute import precision
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
CLOCKED = [
    (meters.MetricLogger, "update", "update"),
    (meters.MetricLogger, "synchronize_between_processes", "epoch"),
    (meters.MetricLogger, "averages", "epoch"),
    (engine_pretrain.StepCurves, "add", "curves"),
    (engine_pretrain.StepCurves, "write", "curves"),
    (precision, "total_norm", "norm"),
]


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


class Clocked:
    """`batches`, adding `sign` times the seconds that each takes to come to `spent["lines"]`."""

    def __init__(self, batches: Iterable, spent: dict[str, float], sign: int = 1):
        self.batches, self.spent, self.sign = batches, spent, sign

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        iterator, end = iter(self.batches), object()
        while True:
            start = time.perf_counter()
            item = next(iterator, end)
            self.spent["lines"] += self.sign * (time.perf_counter() - start)
            if item is end:
                return
            yield item


def run_epoch(parts: tuple, batches: Batches, args, writer, folder: str, logging: bool, spent=None):
    """One epoch with or without logging; returns seconds on the clock and of processor time.

    On a GPU, which works beside the processor, both are the clock's. `spent`: takes the seconds of the
    logging calls, which are then clocked.
    """
    model, optimizer, scaler = parts
    device = torch.device(args.device)
    busy = time.process_time if device.type == "cpu" else time.perf_counter
    with contextlib.ExitStack() as stack:
        patch = lambda owner, name, value: stack.enter_context(mock.patch.object(owner, name, value))  # noqa: E731
        if not logging:
            patch(meters, "MetricLogger", Nothing)
            patch(engine_pretrain, "StepCurves", Nothing)
            patch(precision, "total_norm", lambda *args, **kwargs: torch.ones((), device=device))
        elif spent is not None:
            for owner, name, part in CLOCKED:
                patch(owner, name, clocked(getattr(owner, name), spent, part))
            log_every = meters.MetricLogger.log_every
            # Between two items it keeps its books; fetching a batch and normalising it is not part of that
            patch(meters.MetricLogger, "log_every", lambda self, batches, *how: Clocked(
                log_every(self, Clocked(batches, spent, -1), *how), spent
            ))  # fmt: skip
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
        synchronize(device)
        return time.perf_counter() - start, busy() - busy_start


def on_and_off(rounds: int, run) -> tuple[np.ndarray, np.ndarray]:
    """(rounds, 2) seconds of `run(logging)` with and without logging, in turns."""
    seconds = take_turns(rounds, {"off": partial(run, False), "on": partial(run, True)})
    return np.array(seconds["on"]), np.array(seconds["off"])


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
    images = noise_batch((args.batch_size, args.in_chans, *size))[0]

    def run(parts, batches, logging, spent=None):
        return run_epoch(parts, batches, args, writer, folder, logging, spent)

    nothing = NoStep(device)
    parts, batches = (nothing, nothing, nothing.scale), Batches([(torch.zeros(1), None)], options.steps)
    on_and_off(2, partial(run, parts, batches))  # warm-up
    on, off = on_and_off(options.bare_rounds, partial(run, parts, batches))
    bare = (on - off)[:, 1] / options.steps

    model = main_pretrain.build_model(args).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    parts = (model, optimizer, precision.NativeScalerWithGradNormCount(enabled=False, device=device.type))
    run(parts, Batches([(images, None)], min(5, options.steps)), logging=True)
    batches, steps, spent_by_epoch = Batches([(images, None)], options.steps), [], []

    def run_real(logging):
        if logging:
            spent_by_epoch.append(defaultdict(float))
            return run(parts, batches, True, spent_by_epoch[-1])
        seconds = run(parts, batches, False)
        steps.extend(batches.step_seconds())
        return seconds

    on, off = on_and_off(options.rounds, run_real)
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


def report(result: dict) -> bool:
    """Prints the table: microseconds per step and share of a step, with 95 % intervals; returns whether the
    target is met.
    """
    step, low, high = result["step_seconds"]
    say(f"a step without logging: {step * 1e3:.2f} ms (median; 95 %: {low * 1e3:.2f} to {high * 1e3:.2f})\n")
    rows = [(PARTS[part], result["parts"][part]) for part in PARTS]
    rows.append(("all of it, in place", result["in_place"]))
    rows.append(("cross-check: bare (without the gradient norm)", result["bare"]))
    rows.append(("cross-check: A/B of the real loop", result["ab"]))
    print_table(["part", "us per step", "% of a step", "95 % interval"], (
        (name, f"{share * step * 1e6:.1f}", f"{share * 100:.3f}", f"{100 * low:.3f} to {100 * high:.3f}")
        for name, (share, low, high) in rows
    ), name=48, width=20)  # fmt: skip
    percent = 100 * result["in_place"][0]
    verdict = "met" if percent < TARGET_PERCENT else "MISSED"
    say(f"\nlogging: {percent:.3f} % of a step; target below {TARGET_PERCENT:g} %: {verdict}")
    return percent < TARGET_PERCENT


def main(options: argparse.Namespace) -> int:
    names = ["model", "input_size", "patch_size", "decoder_depth", "batch_size", "print_freq", "device"]
    args = pretrain_args(options, names=names)
    with contextlib.ExitStack() as stack:  # log lines go to a file, as those of a long run do
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        lines = stack.enter_context(open(Path(folder) / "lines.txt", "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(lines))
        result = measure(options, args, folder)
    return finish(options, result, met=report(result))


if __name__ == "__main__":
    parser = Parser(
        __doc__, batch_size=64, steps=(10 * TRAIN // 64, "per epoch"), threads=None, device="cpu",
        rounds=(8, "real epochs with, and as many without logging"),
    )  # fmt: skip
    demo = parser.add_argument_group("training, by default as `make demo` has it").add_argument
    demo("--model", default="mae_vit_tiny_patch16")
    demo("--input_size", default="64", help="pixels: 64, or 32x128")
    demo("--patch_size", default=8, type=positive())
    demo("--decoder_depth", default=2, type=positive())
    demo("--print_freq", default=10, type=positive(), help="steps between log lines")
    demo("--bare_rounds", default=200, type=positive(), help="as --rounds, of steps that compute nothing")
    run_benchmark(main, parser)
