"""The frame of the benchmarks: flags and their bounds, turns, medians, tables, and the record of a run.

A script says what it compares and how one turn of it is measured. Its `main(args)` prints a table as soon as
that group of rows is measured, so that a run killed half way has told what it knows, and ends with `finish`.
What --json writes has one form, so that the tables of PERFORMANCE.md can be made from such files:

    {"date": "2026-01-31T12:00:00+00:00", "machine": TEXT, "command": TEXT, "versions": {PACKAGE: VERSION},
     "settings": {FLAG: VALUE}, "figures": {what the script measured, every round of it}}
"""

import argparse
import datetime
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a benchmark is started as a file: so far only its own folder is there

import torch

from util import console
from util.cli.parser import ArgumentParser, errors_in_one_line

PACKAGES = ("torchvision", "timm", "numpy", "pillow", "simplejpeg", "transformers")


def positive(kind: type = int, or_zero: bool = False) -> Callable[[str], int | float]:
    """An argparse type: a finite number above 0, or with `or_zero` at least 0."""

    def read(text: str) -> int | float:
        value = kind(text)
        if not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
            raise argparse.ArgumentTypeError(f"{text}: must be {'at least' if or_zero else 'above'} 0")
        return value

    read.__name__ = kind.__name__  # in argparse's words on what is no number at all
    return read


def new_file(text: str) -> str:
    """An argparse type: a path in a folder that is there."""
    if not os.path.isdir(os.path.dirname(text) or "."):
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return text


COMMON = {
    "--input_size": {"type": positive(), "help": "pixels"},
    "--batch_size": {"type": positive(), "help": "images per process"},
    "--steps": {"type": positive(), "help": "per round"},
    "--images": {"type": positive(), "help": "how many are used"},
    "--rounds": {"type": positive(), "help": "figures are medians over them"},
    "--workers": {"type": positive(or_zero=True), "help": "loader processes"},
    "--device": {"help": "auto (cuda, else mps, else cpu) or a torch device"},
    "--threads": {"type": positive(), "help": "torch's threads (default: torch's own choice)"},
    "--json": {"type": new_file, "metavar": "FILE", "help": "write the figures to this file too"},
}


class Parser(ArgumentParser):
    """Has --json and those of the COMMON flags that get a default, or (default, help), by name."""

    def __init__(self, doc: str, **defaults):
        super().__init__(description=doc)
        for name, default in {**defaults, "json": None}.items():
            common = COMMON[f"--{name}"]
            default, text = default if isinstance(default, tuple) else (default, common["help"])
            text += "" if default is None else f" (default: {default})"
            self.add_argument(f"--{name}", **{**common, "default": default, "help": text})

    def error(self, message: str):
        """Names the flag with its value, as in `--rounds 0: must be above 0`."""
        super().error(re.sub(r"^argument (\S+): (?=\S+: )", r"\1 ", message))


def run_benchmark(main: Callable, parser: argparse.ArgumentParser) -> None:
    """Calls `main(args)` with the command line and ends with the exit status that it returns, 1 when a target
    is missed. First it sets --threads and prints which machine and command this is.
    """
    with errors_in_one_line(parser.prog):
        args = parser.parse_args()
        if getattr(args, "threads", None):
            torch.set_num_threads(args.threads)
        about = describe_run(args)
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        say(f"{about['date']}, {about['machine']}\n{versions}\n{about['command']}")
        sys.exit(main(args))


def is_first() -> bool:
    """Whether this is the first or the only process of those that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """Prints on the first process, at once."""
    if is_first():
        console.say(text)


def describe_run(args: argparse.Namespace) -> dict:
    """{"date", "machine", "command", "versions"}: what figures are worth nothing without."""
    cuda = torch.cuda.is_available() and not getattr(args, "device", "auto").startswith("cpu")
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    name = torch.cuda.get_device_name() if cuda else processor
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "command": "python " + shlex.join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "versions": versions,
    }


def finish(args: argparse.Namespace, figures: dict, met: bool = True) -> int:
    """Writes the record of the run to --json; returns the exit status: 1 unless all targets are `met`."""
    if args.json and is_first():
        record = {**describe_run(args), "settings": vars(args), "figures": figures}
        Path(args.json).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    return 0 if met else 1


def take_turns(rounds: int, ways: dict[str, Callable]) -> dict[str, list]:
    """Calls each of `ways` once a round; {name: what it returned, per round}.

    A busy moment of the machine hits all of them, and ratios are taken within a round. The order turns round
    every time, so that what one leaves behind (caches, clock rates) is not always the same one's burden.
    """
    results = {name: [] for name in ways}
    for i in range(rounds):
        for name in list(ways)[:: -1 if i % 2 else 1]:
            results[name].append(ways[name]())
    return results


def paired_ratio(above: Iterable[float], below: Iterable[float]) -> float:
    """Median over the rounds of one's figure divided by the other's in the same round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def median_of(rounds: list[dict], key: str) -> float:
    """Median of a figure over the rounds that have it."""
    return statistics.median(figures[key] for figures in rounds)


def print_table(heads: Iterable[str], rows: Iterable[Iterable[str]], name: int = 44, width: int = 12) -> None:
    """Prints `heads` and rows of cells: the first to the left in `name` columns, others to the right."""
    for first, *cells in [heads, *rows]:
        say(f"{first:{name}s}" + "".join(f"{cell:>{width}s}" for cell in cells).rstrip())
