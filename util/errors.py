"""How a run ends early: by a mistake of the user or because training cannot go on."""

from util.console import one_line


class _OneLine(Exception):
    def __str__(self) -> str:
        return one_line(super().__str__(), 900)


class UserError(_OneLine):
    """A mistake of the user's: its text is one line that says what, where and what to do. Exit code 2."""


class TrainingError(_OneLine):
    """Training cannot go on, through no mistake of the command line: one line. Exit code 1."""
