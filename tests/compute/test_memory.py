"""Freed memory stays with the process, and a forked one gives it back."""

import subprocess
import sys

import pytest
from golden_utils import REPO

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
def test_memory_is_taken_once():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=REPO, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    child, (kept, first, second) = int(words[1]), map(int, words[3:])
    if not kept:
        pytest.skip("another C library")
    assert second < first / 3 and child > first / 4, done.stdout
