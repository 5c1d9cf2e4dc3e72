"""How the runs of a study are made: the scripts as processes, each run in a folder of its own.

`study.json` in a run's folder says what it was started with, how often, the time that its ended starts took,
and its figures when it is done: such a run is never made again.
"""

import argparse
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from util.cli.parser import ArgumentParser, parse_args
from util.errors import TrainingError, UserError
from util.files import read_json, replacing
from util.processes.collectives import log
from util.processes.signals import EXIT_REQUEUE
from util.recipes.study_rows import Row
from util.slurm.job import TrainingJob
from util.weights.names import list_checkpoints

REPO = Path(__file__).resolve().parents[2]
CARD = {"knn": "knn", "linear": "linear_norm"}  # figure of the study: protocol of the card
PASSED_ON = ("data_path", "pages", "bad_images", "num_workers", "device", "amp_dtype")
SMALL = ["--steps", "100", "--token_blocks", "0"]


@dataclass(frozen=True)
class Run:
    """A row with a seed. card: what main_evaluate.py gets beside the checkpoint; None: no card."""

    row: Row
    seed: int
    folder: Path
    card: tuple[str, ...] | None

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def training(self) -> list[str]:
        """The command line of main_pretrain.py."""
        place = str(self.folder)
        own = ["--seed", str(self.seed), "--output_dir", place, "--log_dir", place, "--resume", "auto"]
        return [*self.row.flags, *own]

    @property
    def carding(self) -> list[str]:
        """That of main_evaluate.py, when the training is done."""
        checkpoint = list_checkpoints(self.folder)[0]
        return ["--finetune", str(checkpoint), *self.card, "--output_dir", str(self.folder / "card")]

    def state(self) -> dict:
        """What `study.json` says; UserError where it says that the run was made with other flags."""
        path, flags = self.folder / "study.json", list(self.row.flags)
        if not path.exists():
            return {"flags": flags, "starts": 0, "ends": 0, "seconds": 0.0, "processor": 0.0}
        state = read_json(path)
        if state.get("flags") != flags:
            raise UserError(
                f"row {self.row.name!r}: {self.folder} was made with {' '.join(state.get('flags', []))}; "
                "give the row another name, or pass another --output_dir"
            )
        return state

    def write(self, state: dict, **changes) -> None:
        state |= changes
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "study.json") as temporary:
            temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

    def count(self, state: dict, seconds: float, processor: float, trained: bool) -> None:
        """Writes that a start has ended."""
        sums = {"seconds": state["seconds"] + seconds, "processor": state["processor"] + processor}
        self.write(state, **sums, ends=state["ends"] + 1, trained=trained)

    def finish(self, state: dict, keep: bool) -> None:
        """Writes the figures of a run that is done, and removes its checkpoints unless they are kept."""
        found, table = {}, self.folder / "log.txt"  # none where --max_steps ended the run in its first epoch
        for line in table.read_text(encoding="utf-8").splitlines() if table.exists() else ():
            record = json.loads(line)
            found |= {name: record[name] for name in ("train_loss", "val_loss") if name in record}
        if self.card is not None:
            rows = read_json(self.folder / "card" / "card.json")["columns"]["encoder"]["rows"]
            found |= {name: rows[protocol]["score"] for name, protocol in CARD.items()}
        self.write(state, figures=found)
        text = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        log(f"{self.name}: {text} ({state['processor']:.0f} processor seconds)")
        for path in [] if keep else list_checkpoints(self.folder):
            path.unlink(missing_ok=True)


def card_flags(args, full: bool) -> tuple[str, ...]:
    """What main_evaluate.py gets of a row's flags: those of data and device."""
    words = [] if full else list(SMALL)
    for name in (name for name in PASSED_ON if name in args.given):
        value = getattr(args, name)
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return tuple(words)


class Runner:
    """Makes runs here, `parallel` of them at a time; with GPUs each on one of them.

    A signal goes to the processes, which save and end; then no further run is started.
    """

    def __init__(self, parallel: int, gpus: Sequence[str] = (), keep: bool = False):
        self.parallel, self.keep, self.places = parallel, keep, queue.SimpleQueue()
        threads = str(max(1, (os.cpu_count() or 1) // parallel))
        for i in range(parallel):
            gpu = {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}
            self.places.put({"OMP_NUM_THREADS": threads, **os.environ, **gpu})
        self.processes, self.stopped, self.lock = set(), False, threading.Lock()

    def stop(self, number: int, frame=None) -> None:
        self.stopped = True
        for process in list(self.processes):
            process.send_signal(signal.SIGTERM)

    def make(self, runs: Sequence[Run]) -> dict[str, str]:
        """Makes `runs`; {name: reason} of those that failed.

        Raises:
            SystemExit: 75 after a signal: the same command goes on.
        """
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        failed = {}
        with ThreadPoolExecutor(self.parallel) as pool:
            for name, future in {run.name: pool.submit(self.one, run) for run in runs}.items():
                try:
                    future.result()
                except TrainingError as error:
                    failed[name] = str(error)
        for number, handler in before.items():
            signal.signal(number, handler)
        if self.stopped:
            log("interrupted: the runs have saved; the same command goes on")
            sys.exit(EXIT_REQUEUE)
        return failed

    def one(self, run: Run) -> None:
        """Trains and cards a run; TrainingError with the last line of a script that failed."""
        environment, state = self.places.get(), run.state()
        try:
            if self.stopped:
                return
            if not state.get("trained") or not list_checkpoints(run.folder):
                run.write(state, starts=state["starts"] + 1)
                log(f"{run.name}: " + ("goes on" if state["starts"] > 1 else "starts"))
                status, *times = self.call(run, environment, "main_pretrain.py", run.training)
                run.count(state, *times, trained=status == 0)
                self.check(run, status)
            if run.card is not None:
                self.check(run, self.call(run, environment, "main_evaluate.py", run.carding)[0])
            run.finish(state, self.keep)
        finally:
            self.places.put(environment)

    def check(self, run: Run, status: int) -> None:
        if status:
            lines = (run.folder / "out.txt").read_text(encoding="utf-8", errors="replace").split("\n")
            raise TrainingError(next(filter(str.strip, reversed(lines)), f"exit status {status}"))

    def call(self, run: Run, environment: dict, script: str, words: list) -> tuple[int, float, float]:
        """(exit status, seconds, processor seconds with its children) of a script of ours. Windows does not
        tell the processor's: 0.
        """
        began = time.monotonic()
        with open(run.folder / "out.txt", "ab") as out, self.lock:
            if self.stopped:
                return EXIT_REQUEUE, 0.0, 0.0
            command = [sys.executable, str(REPO / script), *words]
            own_group = {"process_group": 0} if os.name == "posix" else {}  # signals come through us, once
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, **own_group)
            self.processes.add(process)
        processor = 0.0
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            processor = usage.ru_utime + usage.ru_stime
        status = process.wait()
        self.processes.discard(process)
        return status, time.monotonic() - began, processor


class RunJob(TrainingJob):
    """A run as a job on a SLURM cluster, which trains, survives pre-emption, and makes the card.

    args: the parsed command line of its training.
    """

    def __init__(self, run: Run, args: argparse.Namespace, keep: bool):
        super().__init__("main_pretrain", args)
        self.run, self.keep = run, keep

    def __call__(self) -> None:
        state, began, trained = self.run.state(), time.monotonic(), False
        if not state.get("trained") or not list_checkpoints(self.run.folder):
            self.run.write(state, starts=state["starts"] + 1)
            try:
                super().__call__()  # leaves by SystemExit where the job is to be started again
                trained = True
            finally:
                self.run.count(state, time.monotonic() - began, sum(os.times()[:4]), trained)
        if self.run.card is not None:
            script = importlib.import_module("main_evaluate")
            script.main(parse_args(ArgumentParser(parents=[script.get_args_parser()]), self.run.carding))
        self.run.finish(state, self.keep)
