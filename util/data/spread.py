"""Many small questions to a file system, side by side where it is slow to answer."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

try:
    import resource
except ImportError:  # not a Unix
    resource = None

_THREADS = 16  # they wait for the disk or the network, not for the processor


def spread(function: Callable, items: Sequence) -> list:
    """[function(item), ...]: one after the other, the rest in threads once each waits for the file system.

    Threads hide the time that a disk or a network takes. Where the answers are in memory they would only
    hand Python's lock to each other at every entry, which takes twice as long.
    """
    results, start, busy, waits = [], time.perf_counter(), time.thread_time(), _waits()
    for item in items:
        results.append(function(item))
        elapsed = time.perf_counter() - start
        if elapsed > 0.2 and time.thread_time() - busy < elapsed / 2 and _waits() - waits >= len(results):
            break
    rest = items[len(results) :]
    if len(rest):
        with ThreadPoolExecutor(_THREADS) as pool:
            results += pool.map(function, rest)
    return results


def _waits() -> float:
    """How often this thread has waited so far, other than for a processor; where that is not known, a number
    that grows fast.
    """
    if resource is None or not hasattr(resource, "RUSAGE_THREAD"):
        return time.perf_counter() * 1e9
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
