"""A study on a SLURM cluster: each run is a job, which trains, survives pre-emption, and makes the card."""

import argparse
import importlib
import os
import time
from collections.abc import Callable, Sequence

from util.cli.parser import ArgumentParser, parse_args
from util.console import write
from util.recipes.study_runs import Run
from util.slurm.job import TrainingJob
from util.slurm.submit import check_slurm_args, sbatch_script, submit
from util.weights.names import list_checkpoints


class RunJob(TrainingJob):
    """What is submitted; `args`: the parsed command line of its training."""

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


def submit_runs(runs: Sequence[Run], args: argparse.Namespace, parse: Callable) -> None:
    """Submits `runs`, or shows the first one's script. parse: command line of a training -> Namespace."""
    check_slurm_args(args)
    for run in runs:
        if args.dry_run:
            write(sbatch_script(args, "mae_study"))
            break
        submit(RunJob(run, parse(run.training), args.keep), args, "mae_study")
