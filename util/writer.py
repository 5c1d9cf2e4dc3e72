"""Writes checkpoints beside the training: the loop waits for a copy in memory, not for the disk."""

import threading
from collections.abc import Callable

import torch


def snapshot(content):
    """A copy of nested dicts, lists and tuples whose tensors are copied to CPU memory."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: snapshot(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(snapshot(value) for value in content)
    return content


class BackgroundWriter:
    """Runs one write at a time in a thread, which the interpreter waits for before it ends."""

    def __init__(self):
        self.thread: threading.Thread | None = None

    def start(self, write: Callable, content: dict) -> None:
        """Calls write(copy of `content`) in the background, after the write before has ended."""
        copy = snapshot(content)
        self.wait()
        self.thread = threading.Thread(target=write, args=(copy,), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
