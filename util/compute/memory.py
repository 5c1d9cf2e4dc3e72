"""Keeps the memory that a training step on a CPU frees for the next step."""

import ctypes
import functools
import os
import sys

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
