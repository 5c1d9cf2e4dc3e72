"""What a run writes about itself: its settings, log.txt and TensorBoard's curves."""

import contextlib
import json
import math
import os
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from util.files import printable, replacing
from util.processes.collectives import all_reduce_mean, gather, get_world_size, is_main_process, log, warn
from util.run import owner
from util.weights.schema import plain

# Arguments that the scripts add themselves: where a process stands, not what the run is
_NO_SETTING = {"rank", "gpu", "local_rank", "distributed", "start_step"}
_unwritten: dict[Path, bytes] = {}  # records that wait for room, by their log.txt


class StepCurves:
    """Scalars per optimizer step. x axis: int(1000 * fractional epoch), so that batch sizes line up.

    Args:
        log_writer: TensorBoard's SummaryWriter, or None.
    """

    def __init__(self, log_writer):
        self.writer, self.rows = log_writer, []

    def add(self, epoch: float, **values: float | torch.Tensor) -> None:
        """Adds a point per name at a fractional epoch; scalar tensors are kept as they are, not read now."""
        kept = {name: value for name, value in values.items() if value is not None}
        for name, value in kept.items():
            kept[name] = value.detach().clone() if isinstance(value, torch.Tensor) else value
        self.rows.append((int(epoch * 1000), kept))

    def write(self) -> None:
        """Averages the tensors over the processes (all must call it) and writes what has gathered."""
        kept = [value for _, values in self.rows for value in values.values()]
        tensors = [value for value in kept if isinstance(value, torch.Tensor)]
        if tensors and (self.writer is not None or get_world_size() > 1):
            means = iter(all_reduce_mean(torch.stack(tensors)).tolist())
            for x, values in self.rows:
                for name, value in values.items():
                    value = next(means) if isinstance(value, torch.Tensor) else value
                    if self.writer is not None:
                        self.writer.add_scalar(name, value, x)
        self.rows.clear()


def write_log(output_dir: str | Path | None, record: dict) -> None:
    """Appends one JSON object as a line to `log.txt` in `output_dir`, on the first process.

    NaN and inf become null; 'run' is the id of the run that holds the folder. What a full disk does not take
    comes when there is room again, after one warning; training goes on.
    """
    if not output_dir or not is_main_process():
        return
    record = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    if run := owner.run_id(output_dir):
        record["run"] = run
    path, size = Path(output_dir) / "log.txt", None
    waiting = _unwritten.pop(path, b"")
    lines = waiting + json.dumps(record).encode() + b"\n"
    try:
        with open(path, "ab+") as file:
            if size := file.tell():
                file.seek(size - 1)
            cut_short = size and file.read() != b"\n"
            file.write(b"\n" * cut_short + lines)
    except OSError as error:
        _unwritten[path] = lines
        if size is not None:
            with contextlib.suppress(OSError):
                os.truncate(path, size)  # no half record
        if not waiting:
            warn(f"{path}: not written yet: {error.strerror or error}")


def trim_log(output_dir: str | Path | None, start_epoch: int, runs: Collection[str | None] = ()) -> bool:
    """Drops the records of `log.txt` from `start_epoch` on, which will come again; on the first process.

    Lines without an epoch stay (k-NN's, a user's own); what is no text or half a record goes, with a warning.

    Args:
        runs: ids of the run, and of the one that it goes on from; records of others are not looked at.

    Returns whether the epoch before has its line (on all processes).
    """
    there = start_epoch == 0
    path = Path(output_dir or ".") / "log.txt"
    if output_dir and is_main_process() and path.exists():
        try:
            kept, broken = [], 0
            for line in path.read_bytes().splitlines():
                try:
                    epoch, run = _record_place(line)
                except (ValueError, RecursionError):
                    broken += 1
                    continue
                ours = epoch is not None and (run is None or run in runs)
                there = there or (ours and epoch == start_epoch - 1)
                if not ours or epoch < start_epoch:
                    kept.append(line + b"\n")
            with replacing(path) as temporary:
                temporary.write_bytes(b"".join(kept))
            if broken:
                warn(f"{path}: lines that cannot be read were dropped: {broken}")
        except OSError as error:
            warn(f"{path}: not rewritten: {error.strerror or error}")
    return gather(there or not output_dir)[0]


def _record_place(line: bytes) -> tuple[int | None, str | None]:
    """(epoch, id of the run) of a line of log.txt, None for what it has none of.

    Raises ValueError for a line that is broken.
    """
    text = line.decode("utf-8")  # UnicodeDecodeError is a ValueError
    if "\0" in text:  # a block that a power cut has left empty
        raise ValueError(text)
    record = json.loads(text) if text.lstrip().startswith("{") else {}
    epoch, run = record.get("epoch"), record.get("run")
    return epoch if isinstance(epoch, int) else None, run if isinstance(run, str) else None


def log_arguments(args) -> None:
    """Prints all settings, one a line, in alphabetical order."""
    log("\n".join(f"{name}: {printable(str(value))}" for name, value in sorted(vars(args).items())))


def log_run(log_writer, args, *facts: str, metrics: Sequence[str] = ()) -> None:
    """Prints `facts`, lines such as "model: ...", and tells TensorBoard what run this is.

    It gets a text, "run" (command line, facts, a table of all settings), and the settings as
    hyper-parameters, in the folder of the curves itself. A resumed run writes both again, at the epoch where
    it goes on.

    Args:
        log_writer: of `make_log_writer`, or None.
        metrics: curves by which TensorBoard compares runs.
    """
    log("\n".join(facts))
    if log_writer is not None:
        settings = {name: v for name, v in sorted(plain(vars(args)).items()) if name not in _NO_SETTING}
        step = int(1000 * getattr(args, "start_epoch", 0))
        log_writer.add_run(run_text(settings, facts), settings, metrics, step)


def run_text(settings: dict, facts: Sequence[str]) -> str:
    """Markdown on a run: its command line, lines of facts, a table of settings."""

    def cell(value) -> str:
        return printable(str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " "))

    command = printable(shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]))
    rows = [f"| {name} | {cell(value)} |" for name, value in settings.items()]
    lines = [f"- {cell(fact)}" for fact in facts]
    return "\n".join([f"    {command}", "", *lines, "", "| setting | value |", "| --- | --- |", *rows])


def make_log_writer(log_dir: str | Path | None, purge_step: int | None = None, args=None):
    """The writer of curves: see `util.trackers.several.open_writers`."""
    from util.trackers.several import open_writers  # with TensorBoard, which is slow to import

    return open_writers(log_dir, purge_step, args, owner.run_id(getattr(args, "output_dir", "")))
