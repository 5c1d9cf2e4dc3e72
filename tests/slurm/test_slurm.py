"""SLURM launchers without a cluster: node lists, flags, sbatch script, mistakes, requeueing, local jobs."""

import contextlib
import json
import os
import re
import runpy
import signal
import socket
import stat
import subprocess
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
from golden_utils import GOLDEN, REPO

import main_finetune
import main_linprobe
import main_pretrain
from util.cli.parser import ArgumentParser
from util.errors import TrainingError, UserError
from util.processes import group, nodes, signals
from util.slurm import job, local, submit

pytestmark = pytest.mark.needs("posix")

SCRIPTS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe}
OURS = {"data_path", "device", "num_workers", "partition", "job_dir"}  # no site's defaults


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("a", "a"),
        ("n1,n2", "n1"),
        ("n[1-3,5],m7", "n1"),
        ("node-[001-004]", "node-001"),
        ("node-[07,09-12]-ib", "node-07-ib"),
        ("m7,n[1-3]", "m7"),
        ("rack[2-3]n[4-5]", "rack2n4"),
        ("gpu_a[10]", "gpu_a10"),
        ("host.site.org", "host.site.org"),
    ],
)
def test_first_host_of_a_node_list(nodelist, host):
    assert nodes.first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "[1-3]x]", "n[1-3", "n 1", ",n1", "n[a;b]"])
def test_what_is_no_node_list(nodelist):
    with pytest.raises(UserError, match="no SLURM node list"):
        nodes.first_host(nodelist)


def program(folder, name, text):
    """A fake program that takes precedence in PATH when `folder` does."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_master_address_is_the_first_host_or_what_slurm_knows_of_it(fakes, monkeypatch):
    def resolve(host, port):
        if host != "known":
            raise socket.gaierror(host)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    program(
        fakes, "scontrol", 'echo "   NodeAddr=10.1.2.3 NodeHostName=x"; echo "$@" > ' + str(fakes / "asked")
    )
    assert nodes.master_address("known,n2") == "known"
    assert nodes.master_address("n[3-4]") == "10.1.2.3"
    assert (fakes / "asked").read_text() == "show node n3\n"
    program(fakes, "scontrol", "exit 1")
    assert nodes.master_address("n[3-4]") == "n3"


def test_master_port_follows_job_and_start():
    ports = {nodes.master_port(str(job), start) for job in range(4000, 4100, 10) for start in range(3)}
    assert len(ports) == 30 and all(10000 <= port < 30000 for port in ports)
    assert nodes.master_port("123456789_4") == nodes.master_port("123456789_4", 0)
    assert nodes.master_port("100", 1) != nodes.master_port("101", 0)  # a neighbour on the same node


def launcher_parser(script):
    parser = ArgumentParser(parents=[script.get_args_parser()])
    submit.add_slurm_args(parser)
    return parser


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_of_the_reference_with_its_default(name):
    parser = launcher_parser(SCRIPTS[name])
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    entries = json.loads((GOLDEN / "cli.json").read_text())[f"submitit_{name}.py"]
    assert len(entries) >= 7
    defaults = parser.parse_args([])
    for entry in entries:
        for flag in entry["flags"]:
            assert actions[flag].dest == entry["dest"] and (actions[flag].nargs != 0) == entry["takes_value"]
        if entry["dest"] not in OURS:
            assert getattr(defaults, entry["dest"]) == entry["default"], entry["dest"]
    assert defaults.partition == "" and defaults.job_dir == "./slurm_jobs/%j"


def launch(script, *flags):
    """The launcher in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"submitit_{script.__name__}.py", *flags])
        submit.launch(script, "Help with 100 % and %j.")


CPU_SCRIPT = """\
#!/bin/bash

# Parameters
#SBATCH --error=/jobs/%j/%j_0_log.err
#SBATCH --job-name=mae_pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=3
#SBATCH --open-mode=append
#SBATCH --output=/jobs/%j/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=4320

# setup
export PYTHONPATH={repo}${{PYTHONPATH:+:$PYTHONPATH}}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /jobs/%j/%j_%t_log.out --error /jobs/%j/%j_%t_log.err \
--kill-on-bad-exit=1 --open-mode=append {python} -u -m util.slurm.job -u -m submitit.core._submit /jobs/%j
"""


def test_dry_run_prints_the_script_and_nothing_of_a_site(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM
    launch(
        main_pretrain, "--dry_run", "--job_dir", "/jobs/%j", "--gpus_per_node", "0", "--tasks_per_node", "3"
    )
    assert capsys.readouterr().out == CPU_SCRIPT.format(repo=REPO, python=sys.executable)
    assert not os.path.exists("/jobs")


@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run_with_every_flag(name, capsys):
    flags = "--dry_run --nodes 4 --ngpus 2 --timeout 60 --partition part --account acc --qos q --mem_gb 1.5"
    flags += " --cpus_per_task 6 --signal_delay_s 90 --use_volta32 --constraint ib --job_dir /jobs"
    launch(
        SCRIPTS[name],
        *flags.split(),
        "--comment",
        "it's due",
        "--setup",
        "module load x",
        "#SBATCH --exclude=n7",
    )
    out = capsys.readouterr().out
    wanted = [
        "nodes=4",
        "ntasks-per-node=2",
        "gpus-per-node=2",
        "time=60",
        "partition=part",
        "account=acc",
        "qos=q",
    ]
    wanted += ["mem=1536M", "cpus-per-task=6", "signal=USR2@90", "constraint='volta32gb&ib'", "requeue"]
    wanted += [
        f"job-name=mae_{name}",
        """comment='it'"'"'s due'""",
        "exclude=n7",
        "output=/jobs/%j_0_log.out",
    ]
    for item in wanted:
        assert f"#SBATCH --{item}\n" in out, f"{item} not in {out}"
    assert (
        out.index("#SBATCH --exclude=n7\n")
        < out.index("\nmodule load x\n")
        < out.index("\nexport PYTHONPATH=")
    )
    assert "--cpus-per-task=6 " in out.splitlines()[-1] and "wckey" not in out


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_launcher_files(name, capsys, monkeypatch):
    """The help works, too, although it has percent signs."""
    for flag, texts in {
        "--dry_run": [f"#SBATCH --job-name=mae_{name}\n"],
        "--help": ["%j is the job's id", "/shared/mae/%j", f"those of main_{name}.py"],
    }.items():
        monkeypatch.setattr(sys, "argv", [f"submitit_{name}.py", flag])
        monkeypatch.setenv("COLUMNS", "1000")
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(REPO / f"submitit_{name}.py"), run_name="__main__")
        out = capsys.readouterr().out
        assert all(text in out for text in texts), out


def test_a_launcher_from_another_folder(tmp_path):
    command = [sys.executable, str(REPO / "submitit_pretrain.py"), "--dry_run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"--output={tmp_path}/slurm_jobs/%j/%j_0_log.out" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, text",
    [
        ("--gpus_per_node 2 --ngpus 3", "--gpus_per_node 2 and --ngpus 3: they mean the same"),
        ("--ngpus 2 --tasks_per_node 3", "--tasks_per_node 3: each of the 2 GPUs"),
        ("--nodes 0", "--nodes 0: must be at least 1"),
        ("--ngpus -1", "--ngpus -1: must be at least 0"),
        ("--mem_gb 0", "--mem_gb 0.0: must be at least"),
        (
            "--timeout 2 --signal_delay_s 120",
            "--signal_delay_s 120: the job would be told to save at its start",
        ),
        ("--cluster local --nodes 2", "--nodes 2: --cluster local has this machine only"),
        ("--cluster local --dry_run", "leave out --cluster local"),
        ("--mask_ratio 2", "--mask_ratio 2.0: must lie between"),  # the job's own, before it waits in a queue
        ("", "no SLURM here (sbatch not found)"),
        ("--job_dir {tmp}/file/%j", "file cannot be written (it is a file)"),
        ("--job_dir /proc/nowhere/%j", "/proc/nowhere cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_status_2(flags, text, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    if "--job_dir" in flags:
        for name in ("sbatch", "srun"):
            program(tmp_path, name, "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        launch(main_pretrain, *flags.format(tmp=tmp_path).split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and text in error


def test_submission_and_refusal(fakes, tmp_path, capsys):
    program(fakes, "srun", "")
    program(fakes, "sbatch", f'cp "$1" {tmp_path}/script; echo Submitted batch job 77')
    launch(main_pretrain, "--job_dir", f"{tmp_path}/jobs/%j", "--batch_size", "5", "--resume", "x.pth")
    out = capsys.readouterr().out
    assert out.startswith("submitted job 77;") and f"{tmp_path}/jobs/77\n" in out and "scancel 77" in out
    launch(main_pretrain, "--job_dir", f"{tmp_path}/jobs/%j", "--dry_run")
    assert capsys.readouterr().out == (tmp_path / "script").read_text()

    import submitit.core.utils

    submitted = submitit.core.utils.DelayedSubmission.load(tmp_path / "jobs/77/77_submitted.pkl")
    job = submitted.function
    assert job.script == "main_pretrain" and job.args.batch_size == 5
    assert sorted(job.args.given) == ["batch_size", "resume"] and not hasattr(job.args, "ngpus")

    lines = ["sbatch: error: invalid partition specified: x", "sbatch: error: Batch job submission failed"]
    program(fakes, "sbatch", "\n".join([f"echo '{line}' >&2" for line in lines] + ["exit 1"]))
    with pytest.raises(SystemExit) as stop:
        launch(main_pretrain, "--job_dir", f"{tmp_path}/jobs/%j", "--partition", "x")
    assert stop.value.code == 2
    reason = "SLURM refused the job: invalid partition specified: x; Batch job submission failed\n"
    assert capsys.readouterr().err == f"submitit_main_pretrain.py: error: {reason}"


def job_environment(folder, **values):
    """What submitit's JobEnvironment offers."""
    pickle = folder / "7_submitted.pkl"
    pickle.touch()
    paths = SimpleNamespace(folder=folder, submitted_pickle=pickle)
    known = dict(
        cluster="slurm", job_id="7", num_tasks=4, num_nodes=2, global_rank=3, local_rank=1, paths=paths
    )
    return SimpleNamespace(**{**known, **values})


def test_a_slurm_job_knows_who_it_is(monkeypatch):
    """From SLURM's own variables; what a launcher told the shell that submitted counts for nothing."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    for name in names:
        monkeypatch.setenv(name, "stale")
    slurm = dict(JOB_ID="7", STEP_ID="0", STEP_NUM_TASKS="4", STEP_NUM_NODES="2", PROCID="3", LOCALID="1")
    slurm |= dict(JOB_NODELIST="elsewhere,localhost", STEP_NODELIST="localhost", RESTART_COUNT="2")
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    job.forget_launcher()
    assert group.find_processes(Namespace()) == (3, 4, 1)
    assert [os.environ[name] for name in names[3:]] == ["2", "localhost", "12007"]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    job.forget_launcher()
    assert group.find_processes(Namespace()) is None and not set(names) & set(os.environ)


def test_the_job_sets_what_the_command_line_left_open(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "6")
    env = job_environment(tmp_path)

    def arguments(**given):
        args = dict(
            output_dir="./output_dir", log_dir="./output_dir", resume="", num_workers=10, given=list(given)
        )
        args = Namespace(**{**args, **given})
        job.set_up_arguments(args, env)
        return args

    monkeypatch.setattr(job, "default_workers", lambda processes: 10 // processes)
    args = arguments()
    assert (
        args.output_dir == args.log_dir == str(tmp_path) and args.resume == "auto" and args.num_workers == 3
    )
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    args = arguments(output_dir="/out/%j")
    assert args.output_dir == args.log_dir == "/out/7" and args.num_workers == 5
    args = arguments(output_dir="a", log_dir="", num_workers=0)
    assert (args.output_dir, args.log_dir, args.num_workers) == ("a", "", 0)

    # --resume FILE is for the first start; checkpoints of before the submission are not this job's
    old, new = tmp_path / "checkpoint-3.pth", tmp_path / "checkpoint-0.pth"
    old.touch()
    os.utime(old, (1, 1))
    assert arguments(resume="x.pth").resume == "x.pth"
    new.touch()
    os.utime(new, (time.time() + 5, time.time() + 5))
    assert arguments(resume="x.pth").resume == "auto"
    assert arguments(resume="x.pth", eval=True).resume == "x.pth"


def requeued(env, signum, fruitless=False):
    """The status with which `requeue` exits."""
    with pytest.raises(SystemExit) as stop:
        job.requeue(env, signals.Interrupted(signum), fruitless)
    return stop.value.code


def test_requeue_asks_slurm_unless_the_job_was_ended(fakes, tmp_path, capsys, monkeypatch):
    env, asked = job_environment(tmp_path, global_rank=0), tmp_path / "asked"

    def scontrol(state, status=0, reason="None"):
        text = f'[ "$1" = show ] && echo "JobId=7 JobState={state} Reason={reason}" && exit 0\n'
        program(fakes, "scontrol", f"{text}echo $@ >> {asked}; echo disabled >&2; exit {status}")

    scontrol("RUNNING")
    for signum in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM):
        assert requeued(env, signum) == 0
    assert asked.read_text() == 3 * "requeue 7\n"
    asked.unlink()
    assert requeued(env, signal.SIGINT) == signals.EXIT_REQUEUE
    scontrol("COMPLETING")  # scancel: must not live on
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        assert requeued(env, signum) == signals.EXIT_REQUEUE
    assert not asked.exists() and "--resume auto" in capsys.readouterr().out
    scontrol("COMPLETING", reason="TimeLimit")  # saving took longer than was left
    assert requeued(env, signal.SIGUSR2) == 0 and asked.exists()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    scontrol("RUNNING", status=1)
    with pytest.raises(TrainingError, match=r"saved, but SLURM did not requeue the job \(disabled\)"):
        job.requeue(env, signals.Interrupted(signal.SIGUSR2), False)


def test_starts_that_save_nothing_new_do_not_go_on_forever(tmp_path):
    env = job_environment(tmp_path, cluster="local", global_rank=0)
    for fruitless in [True] * 4 + [False] + [True] * 4:
        assert requeued(env, signal.SIGUSR2, fruitless) == job.LOCAL_RESTART
    with pytest.raises(TrainingError, match="5 starts in a row ended before anything new was saved"):
        job.requeue(env, signals.Interrupted(signal.SIGUSR2), True)
    for signum in (signal.SIGINT, signal.SIGTERM):
        assert requeued(env, signum) == signals.EXIT_REQUEUE


FAKE_MAIN = '''
import argparse, os, sys, time
from pathlib import Path
from util.processes import signals
from util.errors import UserError

def get_args_parser():
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("output_dir", "log_dir", "resume", "device", "what"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--num_workers", type=int, default=1)
    return parser

def check_args(args):
    pass

def main(args):
    """Each start adds a checkpoint and waits for a signal; the third is complete."""
    rank = os.environ.get("RANK", "0")
    known = os.environ.get("WORLD_SIZE"), args.device, os.environ.get("FROM_SETUP")
    print(f"rank {rank} of {known[0]}: {known[1]} {known[2]}", flush=True)
    if args.what == "mistake" and rank == "1":
        raise UserError("--what mistake: a mistake")
    if args.what == "crash":
        raise RuntimeError("crashed")
    if args.what == "kill" and rank == "1":
        os.kill(os.getpid(), 9)
    starts = len(list(Path(args.output_dir).glob("checkpoint-*.pth")))
    if rank == "0" and not args.what:
        Path(args.output_dir, f"checkpoint-{starts}.pth").touch()
    print("ready", flush=True)
    while not args.what and starts < 2:
        time.sleep(0.05)
        if signals.requested():
            raise signals.Interrupted(signals.requested())
'''


@pytest.fixture
def local_job(tmp_path, monkeypatch):
    """Starts a local job of a made-up script; returns its process, whose `send` waits for a start."""
    (tmp_path / "fake_main.py").write_text(FAKE_MAIN)
    (tmp_path / "launcher.py").write_text(
        "import fake_main\nfrom util.slurm.submit import launch\nlaunch(fake_main, '')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPO}", prepend=os.pathsep)
    started = []

    def start(*flags):
        command = [sys.executable, "launcher.py", "--cluster", "local", "--job_dir", "jobs/%j"]
        command += ["--gpus_per_node", "0", "--setup", "export FROM_SETUP='a  b'", *flags]
        # Of a shell that torchrun started
        env = {**os.environ, "RANK": "7", "WORLD_SIZE": "9", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        options = dict(cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process = subprocess.Popen(command, **options)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


def wait_until_ready(process):
    for line in process.stdout:
        if line == "ready\n":
            return
    raise AssertionError(process.stderr.read())


def test_a_local_job_starts_again_and_completes(local_job, tmp_path):
    job = local_job("--tasks_per_node", "2")
    for _ in range(2):
        wait_until_ready(job)
        job.send_signal(signal.SIGUSR2)
    out, err = job.communicate(timeout=100)
    assert job.returncode == 0, out + err
    (folder,) = (tmp_path / "jobs").iterdir()
    logs = [path.read_text() for path in sorted(folder.glob("*_log.out"))]
    assert [len(re.findall(rf"rank {rank} of 2: cpu a  b\n", logs[rank])) for rank in (0, 1)] == [3, 3]
    assert logs[0].count("starts again") == 2 and len(list(folder.glob("checkpoint-*.pth"))) == 3


def test_a_local_job_that_is_ended_has_saved(local_job, tmp_path):
    job = local_job()
    wait_until_ready(job)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=100)
    assert job.returncode == signals.EXIT_REQUEUE and "SIGTERM: saved" in out, out + err
    (log,) = tmp_path.glob("jobs/*/*_log.out")
    assert "rank 0 of None: cpu a  b\n" in log.read_text()  # a single process


@pytest.mark.parametrize(
    "what, status, text",
    [
        ("mistake", 2, "fake_main: error: --what mistake: a mistake"),
        ("crash", 1, "crashed"),
        ("kill", 137, ""),
    ],
)
def test_the_status_of_a_local_job_is_that_of_its_processes(what, status, text, local_job, tmp_path):
    job = local_job("--what", what, "--tasks_per_node", "1" if what == "crash" else "2")
    out, err = job.communicate(timeout=100)
    assert job.returncode == status, out + err
    (folder,) = (tmp_path / "jobs").iterdir()
    assert text in "".join(path.read_text() for path in folder.glob("*_log.err"))


def test_a_signal_during_the_imports_waits(tmp_path, monkeypatch):
    """Where submitit and torch are being imported there are no handlers yet."""
    (tmp_path / "slow_start.py").write_text(
        "import os, signal, sys, time\n"
        "print('importing', flush=True)\n"
        "time.sleep(1)\n"
        "from util.processes import signals\n"
        "assert signals.requested() is None\n"
        "signals.install()\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)\n"
        "print(sys.argv[1:], signal.Signals(signals.requested()).name)\n"
    )
    command = [*local.python_command(), "-u", "-m", "slow_start", "folder"]
    monkeypatch.setenv("PYTHONPATH", f"{REPO}{os.pathsep}{tmp_path}", prepend=os.pathsep)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGUSR2)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "['folder'] SIGUSR2\n"
