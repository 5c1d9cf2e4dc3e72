"""Writes checkpoints beside the training: the loop waits for a copy in memory, not for the disk."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from util.files import replacing
from util.processes.collectives import warn
from util.processes.parallel import whole_tensor
from util.weights.schema import plain


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Writes `content` to a temporary file in the same folder, flushes it to disk and renames it.

    At any moment `path` holds the old file or the whole new one. A folder that was removed is made again.

    Raises:
        OSError: the folder cannot be written or is full, or the model's weights are not finite; the temporary
            file is removed.
    """
    model = content.get("model")
    tensors = [t for t in model.values() if isinstance(t, torch.Tensor)] if isinstance(model, dict) else []
    if not all(t.isfinite().all() for t in tensors if t.is_floating_point()):
        raise OSError("the model's weights are not finite")
    folder = Path(path).parent
    if not folder.exists():
        folder.mkdir(parents=True)
        warn(f"{folder}: was removed; made again for {Path(path).name}")
    room = shutil.disk_usage(folder).free
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # what torch makes of the system's error
        reason = "no space left on device" if _bytes(content) > room else str(error).splitlines()[0]
        raise OSError(reason) from error


def _bytes(content) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return sum(map(_bytes, parts))


def snapshot(content, keep: bool = True):
    """A copy of nested dicts, lists and tuples with tensors copied to CPU memory, all else as plain data.

    Sharded tensors are gathered, one at a time, for which all processes must call this; with `keep=False`
    this one only takes part.
    """
    if isinstance(content, torch.Tensor):
        content = whole_tensor(content.detach())
        return content.to("cpu", copy=True) if keep else None
    if isinstance(content, dict):
        return {key: snapshot(value, keep) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return (tuple if isinstance(content, tuple) else list)(snapshot(value, keep) for value in content)
    return plain(content)


class BackgroundWriter:
    """Runs one write at a time in a thread, which the interpreter waits for before it ends.

    `failed`: the last write that has ended raised OSError.
    """

    def __init__(self):
        self.thread: threading.Thread | None = None
        self.failed = False

    def start(self, write: Callable, content: dict) -> None:
        """Calls write(copy of `content`) in the background, after the write before has ended, so that on a
        slow disk there is never a second copy.
        """
        self.wait()
        copy = snapshot(content)
        self.thread = threading.Thread(target=self._run, args=(write, copy), name="checkpoint")
        self.thread.start()

    def _run(self, write: Callable, content: dict) -> None:
        try:
            write(content)
            self.failed = False
        except OSError:  # `write` has said so
            self.failed = True

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
