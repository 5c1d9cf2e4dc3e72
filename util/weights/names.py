"""Checkpoints' names: which there are, and what a name says. Reading one is `util.weights.files`' part."""

import contextlib
import re
from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d+)(?:-step(\d+))?\.pth")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints of a folder, the furthest first by their names."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found = [path for path in Path(output_dir).iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=position_in_name, reverse=True)


def position_in_name(path: Path) -> tuple[int, int]:
    """(complete epochs, micro-steps of the next) that a checkpoint's name says."""
    epoch, step = _NAME.fullmatch(path.name).groups()
    return (int(epoch), int(step)) if step else (int(epoch) + 1, 0)


def is_inside_epoch(path: Path) -> bool:
    """Whether a checkpoint's name says that its epoch was not complete."""
    return _NAME.fullmatch(path.name)[2] is not None
