"""Freed memory stays with the process, and a forked one gives it back."""

import subprocess
import sys

import pytest
from golden_utils import REPO

from util.compute.memory import free_memory

CODE = """
import os, resource, torch
from util.compute.memory import keep_freed_memory

def faults():  # pages that 5 tensors of 64 MB, one after the other, take from the system
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
first = faults()
kept = keep_freed_memory()
faults()
faults()
second = faults()
child = os.fork()
if child == 0:
    print("child", faults(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent", int(kept), first, second)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.needs("posix")
def test_memory_is_taken_once():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=REPO, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    child, (kept, first, second) = int(words[1]), map(int, words[3:])
    if not kept:
        pytest.skip("another C library")
    assert second < first / 3 and child > first / 4, done.stdout


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


MEMINFO = "MemTotal:       2000 kB\nMemFree:  500 kB\nMemAvailable:   1000 kB\n"


def test_d5_free_memory_is_the_least_of_the_machine_and_of_each_group_around_us(tmp_path):
    assert free_memory(str(tmp_path)) == float("inf")  # a system that does not say
    machine = write(tmp_path / "machine", proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n4:pids:/\n")
    assert free_memory(machine) == 1_024_000
    job = write(
        tmp_path / "job",
        proc__meminfo=MEMINFO,
        proc__self__cgroup="0::/slurm/job_1/task\n",
        **{
            "sys__fs__cgroup__slurm__job_1__task__memory.max": "max\n",
            "sys__fs__cgroup__slurm__job_1__task__memory.current": "5\n",
            "sys__fs__cgroup__slurm__job_1__memory.max": "500000\n",
            "sys__fs__cgroup__slurm__job_1__memory.current": "420000\n",
            "sys__fs__cgroup__slurm__job_1__memory.stat": "anon 400000\ninactive_file 15000\n",
            "sys__fs__cgroup__slurm__memory.max": "600000\n",
            "sys__fs__cgroup__slurm__memory.current": "100000\n",
            "sys__fs__cgroup__slurm__memory.stat": "inactive_file 0\n",
        },
    )
    assert free_memory(job) == 95_000
    old = write(  # a container that sees its own group at the top, and its name outside in /proc
        tmp_path / "old",
        proc__meminfo=MEMINFO,
        proc__self__cgroup="5:cpu,memory:/docker/abc\n0::/docker/abc\n",
        **{
            "sys__fs__cgroup__memory__memory.limit_in_bytes": "300000\n",
            "sys__fs__cgroup__memory__memory.usage_in_bytes": "310000\n",
            "sys__fs__cgroup__memory__memory.stat": "inactive_file 1\ntotal_inactive_file 20000\n",
        },
    )
    assert free_memory(old) == 10_000


def test_d5_free_memory_of_this_machine():
    assert 2**20 < free_memory() < 2**50 or not sys.platform.startswith("linux")
