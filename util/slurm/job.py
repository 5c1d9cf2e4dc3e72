"""Inside a SLURM job: who the processes are, and how a job survives pre-emption and time-outs.

SLURM sends SIGUSR2 to all processes some time before it takes the nodes away. submitit's own handler would
leave in the middle of a step, on rank 0 only. So `signals` takes its place: the training loops of all
ranks finish a step and save, and `main` raises `Interrupted`; then rank 0 has SLURM requeue the job, and the
next start goes on from what was saved. Submission is in `util.slurm.submit`.

Run as a program, this module is the start of a job's processes. Importing it needs the standard library only.
"""

import argparse
import contextlib
import importlib
import os
import runpy
import signal
import sys
import time

from util import console
from util.cli.parser import errors_in_one_line
from util.errors import TrainingError
from util.processes import signals
from util.processes.nodes import run_command
from util.sizes import default_workers
from util.weights.names import list_checkpoints

LOCAL_RESTART = 144  # exit status with which a local job asks to be started again, as submitit's
MAX_FRUITLESS_STARTS = 5  # in a row that end before anything new was saved; more would go on forever


class TrainingJob:
    """What is submitted: on every process of the job, calls `main(args)` of a main script.

    Args:
        script: module name, such as "main_pretrain".
        args: its arguments; `args.given` lists those that were on the command line.
    """

    def __init__(self, script: str, args: argparse.Namespace):
        self.script, self.args = script, args

    def __call__(self) -> None:
        """Returns when the training is complete; else exits and, where that makes sense, has it requeued."""
        import submitit

        console.guard()
        if getattr(self.args, "eval", False):  # has nothing to save
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        else:
            signals.install()  # in the place of submitit's handlers
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
        env = submitit.JobEnvironment()

        with errors_in_one_line(self.script, vars(self.args)):
            if env.cluster == "slurm":  # whose own variables `find_processes` reads
                forget_launcher()
            set_up_arguments(self.args, env)
            last = last_save(self.args.output_dir)
            try:
                importlib.import_module(self.script).main(self.args)
            except signals.Interrupted as stop:
                if env.global_rank == 0:
                    requeue(env, stop, fruitless=last_save(self.args.output_dir) == last)
                sys.exit(0)  # on other ranks any other status would end rank 0 before it has requeued


def forget_launcher() -> None:
    """Removes what torchrun or the like told the shell that submitted: a job's processes are others."""
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_USE_AGENT_STORE"
    for name in names.split():
        os.environ.pop(name, None)


def set_up_arguments(args: argparse.Namespace, env) -> None:
    """Sets `output_dir`, `log_dir`, `resume`, `num_workers` where the command line left them to the job."""
    if "output_dir" not in args.given:
        args.output_dir = str(env.paths.folder)
    if "log_dir" not in args.given:
        args.log_dir = args.output_dir
    for name in ("output_dir", "log_dir"):
        setattr(args, name, getattr(args, name).replace("%j", env.job_id))
    if not getattr(args, "eval", False):
        # A --resume FILE is for the first start only: later ones go on from what this job has saved
        submitted = env.paths.submitted_pickle.stat().st_mtime
        saved = [path for path in list_checkpoints(args.output_dir) if path.stat().st_mtime > submitted]
        if saved or not args.resume:
            args.resume = "auto"
    if "num_workers" not in args.given:
        on_node = int(os.environ.get("SLURM_CPUS_ON_NODE", os.cpu_count()))
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK", on_node * env.num_nodes // env.num_tasks))
        args.num_workers = min(default_workers(processes=1), max(cores, 1))


def last_save(output_dir: str) -> tuple | None:
    """Time and name of the checkpoint that was written last; an older run may have come further there."""
    return max(((path.stat().st_mtime_ns, path) for path in list_checkpoints(output_dir)), default=None)


def requeue(env, stop: signals.Interrupted, fruitless: bool) -> None:
    """Has the interrupted job started again, unless it was ended on purpose, and exits; on rank 0 only.

    Args:
        fruitless: this start has saved nothing new.

    Raises:
        TrainingError: SLURM refuses, or several starts in a row were fruitless.
    """
    slurm = env.cluster == "slurm"
    state = run_command("scontrol", "show", "job", "-o", env.job_id).stdout if slurm else ""
    # SLURM has ended it, by scancel or to requeue it itself; asked now, it would revive even a cancelled job
    ended = "JobState=COMPLETING" in state and "Reason=TimeLimit" not in state
    if ended or stop.signum == signal.SIGINT or (stop.signum == signal.SIGTERM and not slurm):
        console.say(stop)
        sys.exit(stop.status)

    record = env.paths.folder / f".{env.job_id}-fruitless-starts"
    count = 0
    with contextlib.suppress(OSError, ValueError):  # none yet; cut short by a full disk
        count = int(record.read_bytes())
    count = count + 1 if fruitless else 0
    with contextlib.suppress(OSError):
        record.write_text(str(count), encoding="utf-8")
    if count >= MAX_FRUITLESS_STARTS:
        raise TrainingError(
            f"{count} starts in a row ended before anything new was saved, so the job is not requeued; "
            "submit again with a longer --timeout or a shorter --signal_delay_s"
        )
    if slurm:
        for pause in (5, 10, 0):  # a controller that pre-empts many jobs may be busy
            result = run_command("scontrol", "requeue", env.job_id)
            if result.returncode == 0:
                break
            time.sleep(pause)
        else:
            raise TrainingError(
                f"saved, but SLURM did not requeue the job ({' '.join(result.stderr.split())}); to go on, "
                f"submit again with --output_dir {env.paths.folder}"
            )
    console.say(f"{str(stop).split(':')[0]}: saved; job {env.job_id} starts again")
    sys.exit(0 if slurm else LOCAL_RESTART)


def main() -> None:
    """A job starts here: `python -m util.slurm.job -u -m MODULE FOLDER`, MODULE: submitit's start.

    From here on signals wait until `TrainingJob` has its handlers; one during the imports would kill it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    sys.argv = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
