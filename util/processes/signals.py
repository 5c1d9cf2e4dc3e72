"""Signals that ask a run to end: it finishes the step, saves, and leaves with a status that can be requeued.

Imports neither torch nor numpy, so that a launcher can install the handlers before the slow imports.
"""

import contextlib
import multiprocessing
import os
import signal
import threading

EXIT_REQUEUE = 75  # "try again later" (EX_TEMPFAIL of sysexits.h): schedulers can be told to requeue on it
SIGNALS = tuple(  # of Windows SIGINT and SIGBREAK: its console can send no other
    getattr(signal, name)
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGBREAK")
    if hasattr(signal, name)
)

_requested: int | None = None


class Interrupted(Exception):
    """Raised by `main(args)` on every process when the state is on disk: --resume auto goes on from it.

    signum: the signal; status: the exit status.
    """

    def __init__(self, signum: int | None):
        self.signum, self.status = signum, EXIT_REQUEUE
        name = signal.Signals(signum).name if signum else "a signal"
        super().__init__(f"{name}: saved; the same command with --resume auto goes on")


def install() -> None:
    """From now on a signal of SIGNALS only sets what `requested` returns; a second SIGINT interrupts at once.

    Can be called again, and does nothing outside the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _handle)


def requested() -> int | None:
    """Number of the first signal that came, or None."""
    return _requested


def clear() -> None:
    """Forgets the signal, and gives all of them their usual effect again (for tests and notebooks)."""
    global _requested
    _requested = None
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _handle(number: int, frame) -> None:
    global _requested
    if _requested is not None and number == signal.SIGINT:
        raise KeyboardInterrupt
    if _requested is None:
        _requested = number
        text = f"{signal.Signals(number).name}: finishing the step, then saving and leaving"
        advice = ", again to leave at once" if number == signal.SIGINT else ""
        with contextlib.suppress(OSError):  # a full disk under the log, which must not end the step
            os.write(2, f"{text}{advice}\n".encode())


def follow_main_process() -> None:
    """For worker processes: Ctrl-C is for the main process to handle; when that is gone, they are as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
