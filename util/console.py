"""The one place that writes to stdout and stderr: what cannot be written or encoded never ends a run.

Any text goes to any console: characters that it cannot show are escaped. A full disk or a stream that is gone
costs the text, which the other stream tells once; a reader that has seen enough (`| head`) costs nothing.
Imports the standard library only, because a launcher starts without torch.
"""

import atexit
import contextlib
import os
import re
import sys
from typing import TextIO

# Characters that steer a terminal, turn its text round or are half a character; line ends and tabs stay
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_told: set[str] = set()  # streams whose failure was told


def say(text: str = "", file: TextIO | None = None) -> bool:
    """Writes `text` and a line's end at once, in one piece, whatever thread calls.

    Args:
        text: what could steer a terminal in it is escaped, but for line ends and tabs.
        file: default: stdout.

    Returns:
        False if the text is lost: the disk is full, or the stream is not there.
    """
    return write(_UNSAFE.sub(lambda match: _escape(match[0]), str(text)) + "\n", file)


def write(text: str, file: TextIO | None = None) -> bool:
    """As `say`, of text that is written as it is: a progress bar, help in colours."""
    file = _bare(sys.stdout if file is None else file)
    if file is None:
        return False
    try:
        try:
            file.write(text)
        except UnicodeEncodeError:
            encoding = getattr(file, "encoding", None) or "ascii"
            file.write(text.encode(encoding, "backslashreplace").decode(encoding))
        file.flush()
    except BrokenPipeError:
        _silence(file)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        _tell(file, error)
        return False
    return True


def one_line(text: str, length: int | None = None) -> str:
    """`text` without anything that would end its line or steer a terminal.

    length: characters that it has at most; of a longer one the middle is left out.
    """
    for _ in range(2):  # escapes are longer than what they stand for
        if length is not None and len(text) > length:
            text = f"{text[: 2 * length // 3]} ... {text[5 - length // 3 :]}"
        text = "".join(c if c.isprintable() else _escape(c) for c in text)
    return text if length is None else text[:length]


def _escape(character: str) -> str:
    r"""A character as Python writes it, `\x1b`; what stands for a byte of a file name as that byte."""
    code = ord(character)
    return f"\\x{code - 0xDC00:x}" if 0xDC80 <= code <= 0xDCFF else ascii(character)[1:-1]


def guard() -> None:
    """Has what libraries print in this program go through `write` as well."""
    sys.stdout, sys.stderr = (stream and Guarded(_bare(stream)) for stream in (sys.stdout, sys.stderr))


class Guarded:
    """A stream that is written to by `write`; in all else it is `stream`. For libraries that take a file."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        write(text, self.stream)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def _bare(stream):
    return stream.stream if isinstance(stream, Guarded) else stream


def _tell(file: TextIO, error: Exception) -> None:
    """Says on the other stream, once, that `file` cannot be written."""
    name, other = ("stderr", sys.stdout) if file is _bare(sys.stderr) else ("stdout", sys.stderr)
    if name not in _told:
        _told.add(name)
        reason = getattr(error, "strerror", None) or error
        write(f"warning: {name}: cannot be written ({reason}); what it says is lost\n", other)


def _silence(file: TextIO) -> None:
    """Lets what `file` still holds, and all that follows, go nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)


def _end_quietly() -> None:
    """The interpreter's own flush at its end would make an error and status 120 of what cannot be written."""
    for file in (sys.stdout, sys.stderr):
        if file is not None and not write("", file):
            _silence(_bare(file))


def _fill_gaps() -> None:
    """Opens stdin, stdout and stderr on nothing where they were closed: the next file would take the number,
    and what a library prints would land in a checkpoint.
    """
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


atexit.register(_end_quietly)
_fill_gaps()
