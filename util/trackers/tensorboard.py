"""TensorBoard's curves, in the folder of `--log_dir`."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from util.files import nameable, printable
from util.processes.collectives import warn


class CurveWriter:
    """TensorBoard's writer, but a full disk ends the curves, with a warning, and not the training."""

    def __init__(self, log_dir: str | Path, purge_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        _expect_full_disks()
        os.makedirs(log_dir, exist_ok=True)
        self.name = contextlib.ExitStack()  # until the writer is gone
        folder = str(self.name.enter_context(nameable(log_dir)))
        self.writer = SummaryWriter(log_dir=folder, purge_step=purge_step)

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: self._try(lambda writer: getattr(writer, name)(*args, **kwargs))

    def _try(self, write: Callable) -> None:
        if self.writer is not None:
            try:
                write(self.writer)
            except OSError as error:
                warn(f"no more TensorBoard curves: {error.strerror or error}")
                self.writer = None

    def add_run(self, text: str, settings: dict, metrics: Sequence[str], step: int) -> None:
        """Adds a markdown text, "run", and hyper-parameters; lists and the like go as text.

        `SummaryWriter.add_hparams` would make a folder of its own for them, which TensorBoard shows as
        another run.
        """
        from torch.utils.tensorboard.summary import hparams

        plain = {
            name: value if isinstance(value, bool | int | float) else printable(str(value))
            for name, value in settings.items()
        }
        experiment, start, _ = hparams(plain, dict.fromkeys(metrics, 0.0))  # the third: that it is over

        def write(writer) -> None:
            writer.add_text("run", text, step)
            for summary in (experiment, start):
                writer.file_writer.add_summary(summary, step)

        self._try(write)


@functools.cache  # once
def _expect_full_disks() -> None:
    """TensorBoard writes in a thread, which a full disk ends with a traceback; `_try` is told, and warns."""
    usual = threading.excepthook

    def hook(failed) -> None:
        if type(failed.thread).__name__ != "_AsyncWriterThread" or not isinstance(failed.exc_value, OSError):
            usual(failed)

    threading.excepthook = hook
