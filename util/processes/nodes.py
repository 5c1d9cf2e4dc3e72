"""The nodes of a SLURM job: where the first one is reached. Needs the standard library only."""

import re
import socket
import subprocess

from util.errors import UserError


def first_host(nodelist: str) -> str:
    """The first host name of a SLURM node list: "n[1-3,5],m7" is "n1", "node-[001-004]" is "node-001".

    Raises:
        UserError: it is none.
    """
    group = re.match(r"(?:[\w.-]|\[\d[\d,-]*\])+(?=,|$)", nodelist.strip())
    if group is None:
        raise UserError(f"{nodelist!r} is no SLURM node list")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", group[0])


def master_address(nodelist: str) -> str:
    """Where the others reach rank 0 of a step on these nodes: the first host's name or, if only SLURM knows
    that name, its address.
    """
    host = first_host(nodelist)
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        if address := re.search(r"\bNodeAddr=(\S+)", run_command("scontrol", "show", "node", host).stdout):
            return address[1]
    return host


def master_port(job_id: str, start: int = 0) -> int:
    """A port below those that systems give out themselves, from the job's id and the number of its start or
    step: the same on all processes, and another one than for jobs that may run on the same node.
    """
    return 10000 + (int(re.sub(r"\D", "", job_id)) + 1000 * start) % 20000


def run_command(*words: str) -> subprocess.CompletedProcess:
    """Runs a command with text output; one that does not answer in a minute has failed."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))
