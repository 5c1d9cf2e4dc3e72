"""How far a long loop has come: a bar on a terminal, lines elsewhere."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

from util.console import Guarded, say


def progress_bar(
    total: int, unit: str = "images", file: TextIO | None = None, **looks
) -> "tqdm | ProgressLines":
    """What is told with `update(count)` how many more of `total` are done, and with `close()` that all are.

    Args:
        file: default: standard error. If it is no terminal, a line goes there every 10 s and at the end.
        looks: further arguments of tqdm.
    """
    file = file or sys.stderr
    if file.isatty():
        return tqdm(total=total, unit=f" {unit}", file=Guarded(file), dynamic_ncols=True, **looks)
    return ProgressLines(total, unit, file)


class ProgressLines:
    """See `progress_bar`; `every`: seconds between lines."""

    def __init__(self, total: int, unit: str, file: TextIO, every: float = 10.0):
        self.total, self.unit, self.file, self.every, self.count = total, unit, file, every, 0
        self.start = self.last = time.perf_counter()

    def update(self, count: int = 1) -> None:
        self.count += count
        if time.perf_counter() - self.last >= self.every and self.count < self.total:
            self._line()

    def close(self) -> None:
        self._line()

    def _line(self) -> None:
        self.last = time.perf_counter()
        rate = self.count / max(self.last - self.start, 1e-9)
        text = f"{self.count} of {self.total} {self.unit}, {rate:.1f} {self.unit}/s"
        say(text, self.file)
