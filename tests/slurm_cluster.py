"""A SLURM cluster of two nodes on this machine, for tests: munged, slurmctld and two slurmd on loopback.

Everything it writes is in one temporary folder, every process is ended by its id, and nothing listens on
another address than 127.0.0.1. Needs root and Debian's packages `slurm-wlm` and `munge`, which
`tests/slurm_setup.sh` installs.

    python tests/slurm_cluster.py        # starts one, prints the environment to use it, ends it on Ctrl-C
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel"]
# Where Debian puts the daemons, also if the shell's PATH has no sbin
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])

MARK = "SLURM_TEST_CLUSTER"

# KillWait: seconds from SIGTERM to SIGKILL; cred_expire: how long a requeued job waits before it starts again
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=debug
SlurmdDebug=debug
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SchedulerParameters=sched_interval=5,bf_interval=5
SlurmdTimeout=300
SlurmdParameters=config_overrides
KillWait=30
MinJobAge=600
EnforcePartLimits=ALL
InactiveLimit=0
Waittime=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1_port} CPUs={cpus} RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2_port} CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES State=UP OverSubscribe=FORCE:4
"""


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    if sys.platform != "linux":
        return "SLURM's daemons need Linux"
    if os.geteuid() != 0:
        return "the cluster's daemons need root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (tests/slurm_setup.sh installs slurm-wlm and munge)"
    return None


def wait_for(what: str, done: Callable[[], object], seconds: float, every: float = 0.5):
    """The first true value of `done()`; raises TimeoutError after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := done():
            return value
        time.sleep(every)
    raise TimeoutError(f"{what}: not within {seconds:.0f} s")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


class Cluster:
    """A running cluster: `env` is the environment for its commands, `folder` holds its files and logs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}
        clean = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        # MARK tells the processes of this cluster and its jobs from all others
        self.env = {**clean, "PATH": SEARCH, "SLURM_CONF": str(folder / "slurm.conf"), MARK: str(folder)}

    def start(self) -> None:
        """Starts the daemons and waits until both nodes are idle.

        Raises:
            RuntimeError: a daemon ended, with the end of its log.
        """
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        (self.folder / "state").mkdir()
        for node in ("n1", "n2"):
            (self.folder / f"spool-{node}").mkdir()
        names = ("ctld_port", "n1_port", "n2_port")
        conf = CONF.format(
            folder=self.folder,
            host=socket.gethostname().split(".")[0],
            cpus=os.cpu_count(),
            **dict(zip(names, free_ports(3), strict=True)),
        )
        (self.folder / "slurm.conf").write_text(conf)
        files = [f"--{name}-file={munge / name}" for name in ("key", "log", "pid", "seed")]
        # --force: it may not trust the folder above (a temporary folder that others can write to)
        self._spawn("munged", "-F", "--force", "--num-threads=2", f"--socket={munge}/socket", *files)
        wait_for("munged's socket", lambda: self._alive() and (munge / "socket").exists(), 20)
        self._spawn("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._spawn("slurmd", "-D", "-N", node)
        wait_for("two idle nodes", lambda: self._alive() and self._idle_nodes() == 2, 60)

    def _spawn(self, program: str, *flags: str) -> None:
        name = f"{program}-{flags[-1]}" if program == "slurmd" else program
        with open(self.folder / f"{name}.out", "w", encoding="utf-8") as output:
            self.daemons[name] = subprocess.Popen(
                [shutil.which(program, path=SEARCH), *flags],
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _alive(self) -> bool:
        for name, process in self.daemons.items():
            if process.poll() is not None:
                said = (self.folder / f"{name}.out").read_text()[-2000:]
                raise RuntimeError(f"{name} ended with status {process.returncode}:\n{said}")
        return True

    def _idle_nodes(self) -> int:
        result = self.run("sinfo", "-h", "-N", "-o", "%T", check=False)
        return result.stdout.split().count("idle")

    def run(self, *command: str, check: bool = True, **options) -> subprocess.CompletedProcess:
        """Runs a command in the cluster's environment; the result has text output."""
        options = {"env": self.env, "timeout": 60, **options}
        result = subprocess.run(command, capture_output=True, text=True, **options)
        if check and result.returncode != 0:
            raise RuntimeError(f"{command}: {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def job(self, job_id: str) -> dict[str, str]:
        """What slurmctld knows of a job: JobState, Restarts, NodeList, ...; empty once it is forgotten."""
        text = self.run("scontrol", "show", "job", "-o", job_id, check=False).stdout
        return dict(item.split("=", 1) for item in text.split() if "=" in item)

    def _own_processes(self) -> list[int]:
        """Ids of all living processes that this cluster and its commands have started."""
        mark = f"{MARK}={self.folder}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """Ends the jobs, then the daemons, then what is left of either, each by its id."""
        if "slurmd-n2" in self.daemons:
            with contextlib.suppress(Exception):
                self.run("scancel", "--state=PENDING", "--me")
                self.run("scancel", "--state=RUNNING", "--me", "--signal=KILL", "--full")
                self.run("scancel", "--me")
                wait_for("an empty queue", lambda: not self.run("squeue", "-h").stdout.strip(), 20)
        for process in reversed(self.daemons.values()):
            process.terminate()
        for process in reversed(self.daemons.values()):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self._own_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster for the length of a `with` block; its folder is removed, or kept with SLURM_TEST_KEEP=1."""
    # A short path: sockets have at most 107 characters
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        if os.environ.get("SLURM_TEST_KEEP"):
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(f"slurm_cluster: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt), running_cluster() as cluster:
        print(f"export SLURM_CONF={cluster.env['SLURM_CONF']} PATH={cluster.env['PATH']}", flush=True)
        signal.pause()
