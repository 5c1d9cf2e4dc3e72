"""The submitit_*.py launchers: their flags, and how a job is submitted to SLURM with submitit.

What happens inside the job is in `util.slurm.job`; `--cluster local` is in `util.slurm.local`.
"""

import argparse
import contextlib
import io
import re
import shlex
import shutil
import sys
from types import ModuleType

from util.cli.flags import at_least, check_flags
from util.cli.parser import ArgumentParser, run_script
from util.console import say, write
from util.errors import UserError
from util.slurm.job import TrainingJob
from util.slurm.local import check_job_dir, python_command, run_here, setup_lines

DEFAULT_JOB_DIR = "./slurm_jobs/%j"


def add_slurm_args(parser: argparse.ArgumentParser) -> None:
    """The launchers' own flags. No default fits one site only: what is not given is left to SLURM."""
    flag = parser.add_argument_group("SLURM").add_argument
    # fmt: off
    flag("--ngpus", default=8, type=at_least(0), help="GPUs per node, with one process each")
    flag("--gpus_per_node", default=None, type=at_least(0), metavar="N",
         help="the same as --ngpus; 0: no GPUs")
    flag("--tasks_per_node", default=None, type=at_least(1), metavar="N",
         help="processes per node of a job without GPUs (default: 1)")
    flag("--nodes", default=2, type=at_least(1), help="nodes (--cluster local: always 1)")
    flag("--timeout", default=4320, type=at_least(1), metavar="MINUTES",
         help="time limit of one start; a job that reaches it saves, is requeued and goes on")
    flag("--job_dir", default=DEFAULT_JOB_DIR,
         help="folder for logs, checkpoints and curves, one that all nodes see; %%j is the job's id")
    flag("--partition", default="", help="where to submit (default: SLURM's)")
    flag("--use_volta32", action="store_true", help="the same as --constraint volta32gb")
    flag("--comment", default="", help="the job's comment, for sites that want one")
    flag("--account", default="", help="whom SLURM charges")
    flag("--qos", default="", help="quality of service")
    flag("--constraint", default="", help="features that the nodes must have")
    flag("--mem_gb", default=None, type=at_least(0.01, float), metavar="GB", help="memory per node")
    flag("--cpus_per_task", default=None, type=at_least(1), metavar="N",
         help="cores per process, for itself and its loader workers; SLURM's own default is often 1")
    flag("--setup", default=[], nargs="+", metavar="LINE",
         help="shell lines to run first, such as 'module load cuda'; '#SBATCH ...' lines are more options")
    flag("--signal_delay_s", default=120, type=at_least(0), metavar="SECONDS",
         help="how long before the time limit the job is told to save")
    flag("--cluster", default="slurm", choices=["slurm", "local"], help="local: run here, without SLURM")
    flag("--dry_run", action="store_true", help="print the script for sbatch; needs no SLURM")


def check_slurm_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work; settles `args.ngpus` and `args.tasks_per_node`."""
    own = argparse.ArgumentParser(add_help=False)
    add_slurm_args(own)
    check_flags(args, own)
    local = args.cluster == "local"
    if args.gpus_per_node is not None:
        if "ngpus" in args.given and args.ngpus != args.gpus_per_node:
            raise UserError(
                f"--gpus_per_node {args.gpus_per_node} and --ngpus {args.ngpus}: they mean the same, give one"
            )
        args.ngpus = args.gpus_per_node
    elif local and "ngpus" not in args.given:
        import torch

        args.ngpus = torch.cuda.device_count()
    if args.ngpus and args.tasks_per_node not in (None, args.ngpus):
        raise UserError(
            f"--tasks_per_node {args.tasks_per_node}: each of the {args.ngpus} GPUs of a node has one "
            "process; for a job without GPUs add --gpus_per_node 0"
        )
    args.tasks_per_node = args.ngpus or args.tasks_per_node or 1
    if args.timeout * 60 <= args.signal_delay_s:
        raise UserError(
            f"--signal_delay_s {args.signal_delay_s}: the job would be told to save at its start, as "
            f"--timeout is {args.timeout} minutes"
        )
    if local and args.dry_run:
        raise UserError("--dry_run: shows what SLURM would get; leave out --cluster local")
    if local and "nodes" in args.given and args.nodes > 1:
        raise UserError(f"--nodes {args.nodes}: --cluster local has this machine only")
    if any("\n" in line for line in args.setup):
        raise UserError("--setup: takes lines, one argument each")


def sbatch_parameters(args: argparse.Namespace, name: str) -> dict:
    """The parameters of submitit's `SlurmExecutor`."""
    # One failed process ends all; later starts append to the logs; since 22.05 srun must be told the cores
    srun_args = ["--kill-on-bad-exit=1", "--open-mode=append"]
    if args.cpus_per_task:
        srun_args.append(f"--cpus-per-task={args.cpus_per_task}")
    constraints = ["volta32gb"] * args.use_volta32 + [args.constraint] * bool(args.constraint)
    wanted = {
        "nodes": args.nodes,
        "ntasks_per_node": args.tasks_per_node,
        "gpus_per_node": args.ngpus,
        "time": args.timeout,
        "cpus_per_task": args.cpus_per_task,
        "mem": args.mem_gb and f"{round(args.mem_gb * 1024)}M",
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "constraint": "&".join(dict.fromkeys(constraints)),
        "comment": args.comment,
    }
    return {key: value for key, value in wanted.items() if value} | {
        "job_name": name,
        "signal_delay_s": args.signal_delay_s,
        "setup": setup_lines(args),
        "srun_args": srun_args,
        "additional_parameters": {"requeue": True},
        "wckey": None,  # submitit's default, which sites that check it refuse
    }


def slurm_executor(args: argparse.Namespace, name: str):
    """submitit's executor for these flags; of a dry run, also where SLURM is not installed."""
    from submitit.slurm.slurm import SlurmExecutor

    class DryExecutor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # as if srun were here

    kind = DryExecutor if args.dry_run else SlurmExecutor
    executor = kind(args.job_dir, python=shlex.join(python_command()))
    executor.update_parameters(**sbatch_parameters(args, name))
    return executor


def sbatch_script(args: argparse.Namespace, name: str) -> str:
    executor = slurm_executor(args, name)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(job: TrainingJob, args: argparse.Namespace, name: str) -> None:
    """Submits to SLURM and returns at once; raises UserError if it is not here or refuses."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise UserError(
                f"no SLURM here ({program} not found): submit on a login node of the cluster, run here with "
                "--cluster local, or look at the script with --dry_run"
            )
    check_job_dir(args.job_dir)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the error says the same
            submitted = slurm_executor(args, name).submit(job)
    except (FailedJobError, FailedSubmissionError) as error:
        reasons = [re.sub(r"^sbatch: (error: )?", "", line) for line in str(error).splitlines() if line]
        raise UserError(f"SLURM refused the job: {'; '.join(reasons)}") from None
    say(f"submitted job {submitted.job_id}; logs, checkpoints and curves: {submitted.paths.folder}")
    say(f"watch it: tail -F {submitted.paths.stdout}; end it: scancel {submitted.job_id}")


def launch(script: ModuleType, doc: str) -> None:
    """The launchers' program: reads the command line and submits `script.main`."""
    own = argparse.ArgumentParser(add_help=False)
    add_slurm_args(own)
    own_names = set(vars(own.parse_args([])))

    def main(args: argparse.Namespace) -> None:
        args.job_dir = args.job_dir or DEFAULT_JOB_DIR
        check_slurm_args(args)
        job_args = {key: value for key, value in vars(args).items() if key not in own_names}
        job_args["given"] = [key for key in args.given if key not in own_names]
        if args.ngpus == 0 and "device" not in args.given:
            job_args["device"] = "cpu"
        script.check_args(argparse.Namespace(**job_args))
        job = TrainingJob(script.__name__, argparse.Namespace(**job_args))
        name = script.__name__.replace("main_", "mae_")
        if args.dry_run:
            write(sbatch_script(args, name))
        elif args.cluster == "local":
            sys.exit(run_here(job, args))
        else:
            submit(job, args, name)

    run_script(main, ArgumentParser(description=doc, parents=[script.get_args_parser(), own]))
