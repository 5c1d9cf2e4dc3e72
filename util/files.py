"""Files on disk: written beside, then renamed, so that no reader ever sees half of one."""

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from util.console import one_line
from util.errors import UserError


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike, folder: str | os.PathLike | None = None, flush: bool = True
) -> Iterator[Path]:
    """A name to write to; the file takes the place of `path` when the block ends, and is gone after an error.

    At any moment `path` holds the old file or the whole new one. Its permissions are the umask's, whatever
    the writing library gave it. The name begins with a dot and ends in `.tmp-PROCESS`.

    Args:
        folder: where the unfinished file lies, on the file system of `path`; default: beside `path`.
        flush: brings the file and its folder's entry to the disk, so that a power cut leaves no empty file.

    Raises:
        OSError: it cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = _beside(path if folder is None else Path(folder, path.name), "tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        _set_mode(temporary, mode)
        if flush:
            _flush(temporary)
        put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if flush:
        with contextlib.suppress(OSError):  # some file systems cannot flush a folder
            _flush(path.parent)


def put_in_place(file: Path, path: Path) -> None:
    """Renames `file` to `path`, whatever is there. Windows refuses while another program has one of them
    open, as scanners of new files do for a moment: it is asked again for some seconds.
    """
    for pause in (0.1, 0.3, 1.0, 3.0):
        try:
            return os.replace(file, path)
        except PermissionError as error:
            if getattr(error, "winerror", None) is None:
                raise
            time.sleep(pause)
    os.replace(file, path)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place when the block ends, and is gone after an error.

    What was at `path` stays until then. Folders above are made. Files' permissions are the umask's.

    Raises:
        OSError: it cannot be written.
    """
    temporary, old = _beside(path, "tmp"), _beside(path, "old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in temporary.iterdir():
            if written.is_file():
                _set_mode(written, temporary.stat().st_mode & 0o666)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    """A hidden name of this process in the same folder; of a long name, the first part."""
    return path.with_name(f".{path.name[:50]}.{kind}-{os.getpid()}")


def _set_mode(file: Path, mode: int) -> None:
    """Some libraries make files that only their owner can read. What the umask says is seen of a new file: to
    ask for it one must set it, also for the thread that writes checkpoints.
    """
    with contextlib.suppress(PermissionError):  # a file system without permissions
        file.chmod(mode)


def _flush(path: Path) -> None:
    # Windows flushes only what may be written, and no folder at all
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def nameable(path: str | os.PathLike) -> Iterator[Path]:
    """A file or folder that is there, by a name that is UTF-8, as some libraries take no other."""
    text = os.fspath(path)
    if text == text.encode("utf-8", "replace").decode():
        yield Path(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def check_writable(flag: str, folder: str | os.PathLike, shown: str | None = None, make: bool = True) -> None:
    """Writes a small file in `folder` for a moment, which is made where there is none.

    Args:
        flag: that names the folder, such as "--output_dir".
        shown: what the message says between the flag and "cannot be written", instead of the folder.
        make: False: the folder must be there.

    Raises:
        UserError: the folder cannot be made or written.
    """
    folder = Path(folder)
    probe = folder / f".write-test-{os.getpid()}"
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        raise UserError(f"{flag} {shown or f'{folder}:'} cannot be written ({reason})") from None


def counted(number: int, noun: str) -> str:
    """A number and what is counted: 1 image, 2,000 images."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def some(names: Iterable[str], count: int = 5, separator: str = ", ") -> str:
    """The first `count` of some names: "a, b, c, d, e, ...", each printable, of a long one both ends."""
    first = [one_line(str(name), 160) for name in itertools.islice(names, count + 1)]
    return separator.join(first[:count]) + (f"{separator}..." if len(first) > count else "")


def printable(path: str | os.PathLike) -> str:
    """`path` on one line that any terminal or log takes: odd bytes and control characters are escaped."""
    return one_line(os.fsdecode(path))


def shown(value, length: int = 80) -> str:
    """Any value, of a file for example, on one printable line of at most `length` characters.

    Text stands there without quotes; of arrays and tensors only kind and shape are said.
    """
    if isinstance(value, str):
        text = value
    elif hasattr(value, "shape"):
        text = f"{type(value).__name__} of shape {tuple(value.shape)}"
    else:
        try:
            text = repr(value)
        except Exception:  # integers of more than 4,300 digits, lists nested too deeply, their own __repr__
            text = f"a {type(value).__name__} that cannot be shown"
    text = one_line(text[: 2 * length], 2 * length)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def read_json(path: Path) -> dict:
    """A JSON object; raises UserError where the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({shown(str(error), 200)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content
