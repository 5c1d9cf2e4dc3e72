"""Keeps the memory that a training step on a CPU frees for the next step; how much of it there is."""

import contextlib
import ctypes
import functools
import math
import os
import re
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's mallopt
_LARGE = 32 * 2**20  # bytes; the largest that glibc's own adjustment comes to


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory, of tensors above all, instead of giving it back to the system.

    Gradients and activations are freed and asked for again in each step; taken anew from the system, they are
    mapped and zeroed page by page. The process stays at its peak size; loader workers, forked from it, give
    memory back as usual. Returns whether it could be done; the results are the same.
    """
    done = _mallopt((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    if done:
        _tell_children()
    return done


def give_back_freed_memory() -> bool:
    """What glibc does by itself once it has seen large blocks; undoes `keep_freed_memory`."""
    return _mallopt((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, 2 * _LARGE))


@functools.cache  # once
def _tell_children() -> None:
    os.register_at_fork(after_in_child=give_back_freed_memory)


def _mallopt(*options: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all([mallopt(name, value) for name, value in options])


def free_memory(root: str = "/") -> float:
    """Bytes that this process can still take: of the machine, and of each control group around it (a
    container's, a SLURM job's); infinity where the system does not say.
    """
    proc, groups = Path(root, "proc"), Path(root, "sys/fs/cgroup")
    free = [math.inf]
    with contextlib.suppress(OSError, TypeError):
        text = (proc / "meminfo").read_text(encoding="utf-8")
        free.append(1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1]))
    lines = []
    with contextlib.suppress(OSError):
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    for kinds, path in (line.split(":", 2)[1:] for line in lines):
        if not kinds:
            top, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = groups / "memory"
        else:
            continue
        own = top / path.strip("/")
        for folder in (own, *(parent for parent in own.parents if parent.is_relative_to(top))):
            with contextlib.suppress(OSError, ValueError, TypeError):  # another container's view; "max"
                limit, used = (int((folder / name).read_text(encoding="utf-8")) for name in names[:2])
                text = (folder / "memory.stat").read_text(encoding="utf-8")
                idle = re.search(rf"^{names[2]} (\d+)", text, re.MULTILINE)
                free.append(max(0, limit - used + int(idle[1])))  # of files read before, given back at need
    return min(free)
