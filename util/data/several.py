"""Images of several places as one set, some of them, and pages of them, without copies of names."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from util.data.folders import Archives, is_archive
from util.data.read import Place
from util.errors import UserError
from util.files import printable


class Selection(Sequence):
    """Image i is `rows[i]` of the `lists`, counted through; a page of it is named `file.tif#3`, from 1.

    Args:
        lists: of names, such as `PathList`. rows: int64 (n,), default: all. pages: int32 (n,), from 0;
            -1, and default: the file as a whole.
    """

    def __init__(self, lists: Sequence[Sequence[str]], rows=None, pages=None):
        self.lists, self._ends = lists, np.cumsum([0, *map(len, lists)])
        self.rows = np.arange(self._ends[-1]) if rows is None else np.asarray(rows, np.int64)
        self.pages = np.full(len(self.rows), -1, np.int32) if pages is None else np.asarray(pages, np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def _locate(self, index: int) -> tuple[Sequence[str], int, int]:
        row = self.rows[index]
        part = int(np.searchsorted(self._ends, row, side="right")) - 1
        return self.lists[part], int(row - self._ends[part]), int(self.pages[index])

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        names, row, page = self._locate(index)
        return names[row] if page < 0 else Place(f"{names[row]}#{page + 1}", names[row], page)

    def name(self, index: int) -> str:
        """The name relative to the root of its list."""
        names, row, page = self._locate(index)
        return names.name(row) + (f"#{page + 1}" if page >= 0 else "")

    def take(self, indices: Iterable[int]) -> "Selection":
        """A new list of some of the images."""
        indices = np.fromiter(indices, np.int64)
        return Selection(self.lists, self.rows[indices], self.pages[indices])

    def digest(self) -> str:
        """SHA-256 that tells whether these are the same images of lists with the same names."""
        names = "".join(names.digest() for names in self.lists).encode()
        return hashlib.sha256(names + self.rows.tobytes() + self.pages.tobytes()).hexdigest()

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray] | None:
        """As `Members.places`, the lists' archives counted through; None where a list is no archive's."""
        found = [getattr(names, "places", None) for names in self.lists]
        if any(pair is None for pair in found):
            return None
        counts = np.cumsum([0, *(int(shards.max()) + 1 for shards, _ in found)])
        pairs = zip(counts[:-1], found, strict=True)
        shards = np.concatenate([first + shards for first, (shards, _) in pairs])
        return shards[self.rows], np.concatenate([starts for _, starts in found])[self.rows]

    @property
    def far(self) -> bool:
        return any(getattr(names, "far", False) for names in self.lists)

    @property
    def in_groups(self) -> bool:
        return any(getattr(names, "in_groups", False) for names in self.lists)

    def plan(self, indices: Sequence[int]) -> None:
        """As `Members.plan`, for the images that lie in archives."""
        if self.far:
            from util.data.archives import read_ahead

            read_ahead(map(self.__getitem__, indices))

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.pages.nbytes + sum(names.nbytes for names in self.lists)


def sets_of(paths: Iterable[str | os.PathLike], called: str) -> list[str]:
    """Data paths that are a set each. Archives are parts of one, as where a shell has written out `*.tar`."""
    paths = [os.fspath(path) for path in paths]
    archives = [path for path in paths if is_archive(path) and not os.path.isdir(path)]
    if twice := [path for path in archives if archives.count(path) > 1]:
        raise UserError(f"{called}{printable(twice[0])}: is given twice")
    return [Archives.of(archives) if path in archives else path for path in paths if path not in archives[1:]]


def join(found: list, called: str):
    """`ImageFiles` of several places as one set, None of none; without labels unless all have some."""
    if len(found) < 2:
        return found[0] if found else None
    sources = [files.source for files in found]
    if twice := [source for source in sources if sources.count(source) > 1]:
        raise UserError(f"{called}{printable(twice[0])}: is given twice")
    joined = replace(
        found[0],
        source=" and ".join(sources),
        paths=Selection([files.paths for files in found]),
        labels=None,
        classes=None,
        ignored=sum(files.ignored for files in found),
        kinds=sum((files.kinds for files in found), Counter()),
        skipped=[pair for files in found for pair in files.skipped],
        empty=[name for files in found for name in files.empty],
    )
    if all(files.labels is not None for files in found):
        joined.classes = sorted({name for files in found for name in files.classes})
        numbers = [np.searchsorted(joined.classes, files.classes).astype(np.int32) for files in found]
        joined.labels = np.concatenate([n[files.labels] for n, files in zip(numbers, found, strict=True)])
    return joined
