"""Runs a SLURM job on this machine without SLURM, and what that shares with a submission."""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from util import console
from util.files import check_writable
from util.processes import signals
from util.processes.nodes import master_port
from util.slurm.job import LOCAL_RESTART, TrainingJob, forget_launcher

REPO = Path(__file__).resolve().parents[2]


def setup_lines(args: argparse.Namespace) -> list[str]:
    """The user's lines, directives first as SLURM reads none after a command, and where our modules are."""
    lines = sorted(args.setup, key=lambda line: not line.startswith("#SBATCH"))
    return [*lines, f"export PYTHONPATH={shlex.quote(str(REPO))}${{PYTHONPATH:+:$PYTHONPATH}}"]


def python_command() -> list[str]:
    """What starts a job's process: `util.slurm.job`; submitit's own start follows as arguments."""
    return [sys.executable, "-u", "-m", "util.slurm.job"]


def check_job_dir(job_dir: str) -> None:
    """Makes the folders above the first `%j`; raises UserError unless the last can be written."""
    from submitit.core.utils import JobPaths

    folder = JobPaths.get_first_id_independent_folder(job_dir)
    check_writable("--job_dir", folder, f"{job_dir}: {folder}")


def run_here(job: TrainingJob, args: argparse.Namespace) -> int:
    """Runs the job on this machine, shows its first process's log, and returns the highest exit status.

    The time limit holds as under SLURM. Signals go to the job: after SIGINT or SIGTERM it has saved and ends,
    after SIGUSR1 or SIGUSR2 it has saved and starts again. (submitit's own local jobs pass SIGTERM on alone,
    kill a save that takes longer than a second, and forget the exit statuses.)
    """
    from submitit.core.utils import DelayedSubmission, JobPaths

    check_job_dir(args.job_dir)
    forget_launcher()
    # Process ids come again: a folder of the same name would be one to go on from
    job_id, count = time.strftime("%Y%m%d%H%M%S") + str(os.getpid()), args.tasks_per_node
    paths = [JobPaths(args.job_dir, job_id, rank) for rank in range(count)]
    paths[0].folder.mkdir(parents=True, exist_ok=True)
    DelayedSubmission(job).dump(paths[0].submitted_pickle)
    console.say(f"job {job_id} runs here; logs, checkpoints and curves: {paths[0].folder}")
    lines = "\n".join([*setup_lines(args), 'exec "$0" "$@"'])
    command = ["bash", "-c", lines, *python_command(), "-u", "-m", "submitit.core._submit", args.job_dir]
    shown = {paths[0].stdout: [sys.stdout, 0], paths[0].stderr: [sys.stderr, 0]}

    processes: list[subprocess.Popen] = []

    def forward(number: int, frame=None) -> None:
        for process in processes:
            process.send_signal(number)

    for number in signals.SIGNALS:
        signal.signal(number, forward)
    status = LOCAL_RESTART
    while status == LOCAL_RESTART:
        processes[:] = [start_process(command, paths[rank], job_id, rank, count) for rank in range(count)]
        warn_at = time.monotonic() + 60 * args.timeout - args.signal_delay_s
        while any(process.poll() is None for process in processes):
            if time.monotonic() > warn_at:
                forward(signal.SIGUSR2)
                warn_at = math.inf
            show_new(shown)
            time.sleep(0.2)
        show_new(shown)
        codes = [process.returncode for process in processes]
        status = max(code if code >= 0 else 128 - code for code in codes)
    return status


def start_process(command: list[str], paths, job_id: str, rank: int, count: int) -> subprocess.Popen:
    """Starts one process of a local job, which is told who it is as by submitit and, of several, torchrun."""
    known = {"JOB_ID": job_id, "NTASKS": count, "JOB_NUM_NODES": 1, "NODEID": 0}
    known |= {"GLOBALID": rank, "LOCALID": rank}
    env = {f"SUBMITIT_LOCAL_{name}": value for name, value in known.items()} | {"SUBMITIT_EXECUTOR": "local"}
    if count > 1:
        env |= {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": master_port(job_id)}
    with open(paths.stdout, "a", encoding="utf-8") as out, open(paths.stderr, "a", encoding="utf-8") as err:
        return subprocess.Popen(
            command,
            env=os.environ | {name: str(value) for name, value in env.items()},
            stdout=out,
            stderr=err,
            start_new_session=True,  # signals of the terminal come through the launcher, once
        )


def show_new(shown: dict) -> None:
    """Copies what the log files have gained; `shown`: file -> [stream, position], updated."""
    for path, place in shown.items():
        stream, position = place
        with open(path, encoding="utf-8", errors="replace") as file:
            file.seek(position)
            console.write(file.read(), stream)
            place[1] = file.tell()
