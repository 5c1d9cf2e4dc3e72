"""How a run ends early: by a mistake of the user or because training cannot go on."""

import re

from util.console import one_line


class _OneLine(Exception):
    def __str__(self) -> str:
        return one_line(super().__str__(), 900)


class UserError(_OneLine):
    """A mistake of the user's: its text is one line that says what, where and what to do. Exit code 2."""


class TrainingError(_OneLine):
    """Training cannot go on, through no mistake of the command line: one line. Exit code 1."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory: on a GPU, on a CPU, or to start a process."""
    signs = "out of memory|can't allocate memory|cannot allocate memory|not enough memory|STATUS_ALLOC_FAILED"
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError | OSError) and bool(re.search(signs, str(error), re.I)))
