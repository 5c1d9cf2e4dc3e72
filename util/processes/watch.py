"""Watches the other processes of a run, so that none waits for one that has ended.

Each process beats once a second in the store where they met, and looks at the beat of its neighbour: little
traffic at any number. A process that fails writes why, and one whose beat stops is written down by its
neighbour; all others see it within seconds and leave without a word, so that the reason is the last line of
the log.
"""

import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from util.console import say

INTERVAL = 1.0  # seconds between beats
SILENCE = 20.0  # seconds without a beat after which a process counts as ended
PATIENCE = 4.0  # seconds to wait for another process's reason when a collective breaks

_thread: threading.Thread | None = None
_stop = threading.Event()
_place: tuple[str, int, bool, str] | None = None  # host, port, whether with libuv, part of the store


def _connect() -> dist.Store:
    host, port, libuv, part = _place  # a connection of its own: one that waits for a key makes others wait
    options = dict(wait_for_workers=False, timeout=timedelta(seconds=10), use_libuv=libuv)
    store = dist.TCPStore(host, port, is_master=False, **options)
    return dist.PrefixStore(f"watch/{part}", store)


def start(rank: int, world_size: int, store: dist.Store, part: str) -> None:
    """Starts the watch after the processes have met at `store`.

    Args:
        part: a name that all have agreed on, and no processes before: torchrun keeps the store when it starts
            all again (`--max_restarts`), and with it why the first try failed.
    """
    global _thread, _place
    if not isinstance(store, dist.TCPStore):
        return  # a shared file has no server to beat at; the collectives' time-out remains
    _place = (store.host, store.port, store.libuvBackend, part)  # Windows: torch may have no libuv
    _stop.clear()
    _thread = threading.Thread(target=_watch, args=(rank, world_size), daemon=True, name="watch")
    _thread.start()


def stop() -> None:
    """Ends the watch: from now on processes may leave."""
    global _thread, _place
    if _thread is not None:
        _stop.set()
        _thread.join(timeout=15)
    _thread = _place = None


def _watch(rank: int, world_size: int) -> None:
    neighbour = (rank + 1) % world_size
    try:
        store = _connect()
        seen, since = None, time.monotonic()
        while not _stop.wait(INTERVAL):
            store.add(f"beats/{rank}", 1)
            if store.check(["reason"]):
                leave(1)
            now = store.add(f"beats/{neighbour}", 0)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > SILENCE and not _stop.is_set():
                if claim(f"rank {neighbour} does not answer"):
                    text = f"rank {neighbour} has given no sign of life for {SILENCE:.0f} s (killed, out of"
                    say(f"[rank {rank}] error: {text} memory, or its machine is gone)")
                leave(1)
    except (RuntimeError, OSError):  # the store's server, rank 0 or the launcher, is gone
        if not _stop.wait(PATIENCE):
            say(f"[rank {rank}] error: rank 0 or the launcher is gone; stopping")
            leave(1)


def claim(reason: str, wait_seconds: float = 0.0) -> bool:
    """Whether this process is the first to say why the run fails; True when there are no others.

    Waits up to `wait_seconds` for another one's reason first.
    """
    if _place is None:
        return True
    try:
        store = _connect()
        deadline = time.monotonic() + wait_seconds
        while time.monotonic() < deadline:
            if store.check(["reason"]):
                return False
            time.sleep(0.2)
        if first := store.add("claims", 1) == 1:
            store.set("reason", reason)
        return first
    except (RuntimeError, OSError):
        return True


def leave(status: int) -> None:
    """Ends this process at once, but for a checkpoint that is being written."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(timeout=60)
    os._exit(status)
