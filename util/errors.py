"""How a run ends early: by a mistake of the user or because training cannot go on."""


def one_line(text: str, length: int = 900) -> str:
    """`text` on one line that any terminal takes, of at most `length` characters.

    What cannot be printed is escaped, bytes of a name that are no text as `\\xff`; a long middle is left out.
    """
    ends = 2 * length // 3, length // 3 - 5
    for _ in range(2):  # escapes are longer than what they stand for
        if len(text) > length:
            text = f"{text[: ends[0]]} ... {text[-ends[1] :]}"
        text = "".join(c if c.isprintable() else _escape(c) for c in text)
    return text if len(text) <= length else f"{text[: ends[0]]} ... {text[-ends[1] :]}"


def _escape(character: str) -> str:
    byte = ord(character) - 0xDC00  # Python's own way to hold a byte that is no text
    return f"\\x{byte:02x}" if 0x80 <= byte < 0x100 else character.encode("unicode_escape").decode()


class _OneLine(Exception):
    def __str__(self) -> str:
        return one_line(super().__str__())


class UserError(_OneLine):
    """A mistake of the user's: its text is one line that says what, where and what to do. Exit code 2."""


class TrainingError(_OneLine):
    """Training cannot go on, through no mistake of the command line: one line. Exit code 1."""
