"""How a run ends early: by a mistake of the user or because training cannot go on."""


class UserError(Exception):
    """A mistake of the user's: its text is one line that says what, where and what to do. Exit code 2."""


class TrainingError(Exception):
    """Training cannot go on, through no mistake of the command line: one line. Exit code 1."""
