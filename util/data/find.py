"""Finds the images of a data set, whatever its layout, and looks at each file before training starts."""

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from util.data.folders import Folder, ask_all, count_kinds, list_folders, names_archives, split_folder
from util.data.read import IMG_EXTENSIONS, sniff_header
from util.errors import UserError
from util.files import counted, printable, some

MAX_PROBES = 100_000  # files looked at before the start; of larger sets, as many, evenly spread


class PathList(Sequence):
    """File names in one buffer: some 40 bytes each, and no Python objects.

    A list of strings takes three times that, and forked workers end up with a copy each, page by page,
    because reading an object changes its reference count. `[i]` is `root` joined with the stored name.
    """

    def __init__(self, names: Iterable[str], root: str = ""):
        buffer, ends = bytearray(), array("q", [0])
        for name in names:
            buffer += os.fsencode(name)
            buffer.append(0)
            ends.append(len(buffer))
        self.root, self._buffer, self._ends = root, bytes(buffer), np.array(ends, dtype=np.int64)

    @classmethod
    def of_folders(cls, folders: Iterable[Folder], root: str) -> "PathList":
        """The images of `folders`, in their order, without going through them name by name."""
        parts = []
        for folder in folders:
            prefix = os.fsencode(os.path.join(folder.name, "")) if folder.name else b""
            parts += [prefix, folder.images.replace(b"\0", b"\0" + prefix), b"\0"]
        paths = cls((), root)
        paths._buffer = b"".join(parts)
        zeros = np.flatnonzero(np.frombuffer(paths._buffer, np.uint8) == 0)
        paths._ends = np.concatenate([np.zeros(1, np.int64), zeros + 1])
        return paths

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return os.path.join(self.root, self.name(index))

    def name(self, index: int) -> str:
        """The name as stored, relative to `root`."""
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(f"file {index} of {len(self)}")
        return os.fsdecode(self._buffer[self._ends[position] : self._ends[position + 1] - 1])

    def take(self, indices: Iterable[int]) -> "PathList":
        """A new list of some of the files."""
        return PathList((self.name(i) for i in indices), self.root)

    def digest(self) -> str:
        """SHA-256 over the names in their order; the same wherever the whole set lies.

        Class folders are parts of the names, so labels need no digest of their own.
        """
        names = self._buffer if os.sep == "/" else self._buffer.replace(os.fsencode(os.sep), b"/")
        parts = names[:-1].split(b"\0") if names.startswith(b"/") else [b""]
        ends = min(parts), max(parts)
        if all(path.startswith(b"/") for path in ends):  # full paths: without the folder that all lie in
            common = os.path.commonpath(map(os.path.dirname, ends)) + b"/"
            names = (b"\0" + names).replace(b"\0" + common, b"\0")[1:]
        return hashlib.sha256(names).hexdigest()

    @property
    def nbytes(self) -> int:
        return len(self._buffer) + self._ends.nbytes


@dataclass
class ImageFiles:
    """The images of one split.

    source: the folder that was searched, or the list of files. root: that folder, or the list's.
    labels: int32 (n,), or None where there are no class folders. classes: their names, sorted.
    ignored: number of other files. kinds: of each extension. skipped: (path, reason) of images that were left
    out as unreadable.
    empty: names of folders in `root` that hold no images, where others do. notes: what else there is to say.
    """

    source: str
    root: str
    paths: PathList
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    ignored: int = 0
    kinds: Counter = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """What was found, in one line."""
        classes = f" in {counted(len(self.classes), 'class')}" if self.classes else ""
        kinds = f": {count_kinds(self.kinds)}" if self.kinds else ""
        notes = [f"{counted(self.ignored, 'other file')} ignored{kinds}"] if self.ignored else []
        if self.skipped:
            names = some(os.path.basename(path) for path, _ in self.skipped)
            notes.append(f"{counted(len(self.skipped), 'unreadable image')} skipped: {names}")
        notes += self.notes
        notes = f" ({'; '.join(notes)})" if notes else ""
        return f"{counted(len(self.paths), 'image')}{classes} in {printable(self.source)}{notes}"


def bad_limit(count: int) -> int:
    """How many of `count` images may be unreadable with `--bad_images skip`: 1 %, and one of a small set."""
    return max(1, count // 100)


def find_images(
    data_path: str | Path | Sequence[str],
    split: str = "train",
    bad_images: str = "error",
    called: str = "--data_path ",
) -> ImageFiles | None:
    """Finds the images of a split and looks at the first bytes of each. Of several `data_path` those of all,
    in their order, archives among them as one pattern; labels are those of all classes together.

    `data_path` may be an ImageFolder root with `train/` and perhaps `val/`; a folder of class folders; a
    folder of images, nested in any way; a text file that lists one image a line, relative to its own folder
    (blank lines and lines that start with # are passed over); or archives of any of these folders, as
    `util.data.archives` reads them: a file, an address, a pattern, a folder of them. There are labels where
    the folder of the split has no images of its own and each folder in it that holds files holds images.
    Hidden files and folders are passed over, links are followed. The order is ImageFolder's.

    Args:
        split: the subfolder, by any name people use; for "" or a missing "train", `data_path` itself.
        bad_images: "error", or "skip" to leave out what is no image, at most 1 % of the set, or "skip any".
        called: what errors call `data_path`, before its value.

    Returns:
        None when there is no split of that name.

    Raises:
        UserError: nothing there, no images, a folder that cannot be read, or files that are no images.
    """
    if not isinstance(data_path, str | os.PathLike):
        from util.data.several import join, sets_of

        found = [find_images(path, split, bad_images, called) for path in sets_of(data_path, called)]
        return join([files for files in found if files is not None], called)
    root = os.fspath(data_path)
    place = f"{called}{root or repr(root)}"
    is_folder = os.path.isdir(root)
    if is_folder and (folder := split_folder(root, split, called)):
        root = folder
        place, split = f"{called}{root}", split and "train"
    if names_archives(root):
        from util.data.archives import open_archives

        if (found := open_archives(root, split, place)) is None:
            return None
        files = _arrange(found[1], root, place, found[0].of_folders)
    elif not is_folder and not os.path.isfile(root):
        what = "neither a folder nor a file" if os.path.exists(root) else "does not exist"
        raise UserError(f"{place}: {what}")
    elif split not in ("", "train"):
        return None
    elif is_folder:
        files = _search(root, place)
    else:
        paths = _read_list(root, place)
        files = ImageFiles(root, paths.root, paths)
    return _check(files, place, bad_images)


def _search(root: str, place: str) -> ImageFiles:
    """Images, and labels if there are any, of a folder; the order is that of torchvision's ImageFolder."""
    try:
        found = list_folders(root)
    except OSError as error:
        path = printable(error.filename or root)
        raise UserError(f"{place}: cannot read the folder {path}: {error.strerror}") from None
    return _arrange(found, root, place, partial(PathList.of_folders, root=root))


def _arrange(found: list[Folder], root: str, place: str, list_images: Callable) -> ImageFiles:
    """Order and labels of the images in folders; `list_images` makes a list of those of some folders."""
    # The folder in `root` that each lies in, "" for `root` itself
    tops = {folder.name: folder.name.split(os.sep, 1)[0] for folder in found}
    others = sum((folder.others for folder in found), Counter())
    holds_files = {tops[folder.name] for folder in found if folder.count or folder.others}
    folders = sorted((f for f in found if f.count), key=lambda f: (tops[f.name], f.name))
    holds_images = {tops[folder.name] for folder in folders}
    if not folders:
        wanted = " ".join(IMG_EXTENSIONS)
        kinds = f"{counted(others.total(), 'other file')} ({count_kinds(others)})" if others else "no files"
        raise UserError(f"{place}: no images in it; looked for {wanted}; found {kinds}")
    paths = list_images(folders)
    files = ImageFiles(root, root, paths, ignored=others.total(), kinds=others)
    if holds_images != {""}:
        files.empty = sorted(set(tops.values()) - holds_images - {""})
    if "" not in holds_images and holds_files - {""} == holds_images:
        files.classes = sorted(holds_images)
        number = {name: i for i, name in enumerate(files.classes)}
        labels = np.array([number[tops[folder.name]] for folder in folders], dtype=np.int32)
        files.labels = np.repeat(labels, [folder.count for folder in folders])
    return files


def _read_list(path: str, place: str) -> PathList:
    """The images that a text file lists."""
    try:
        with open(path, "rb") as file:
            text = file.read(65536)
            if b"\0" in text:
                kinds = "neither a folder nor a list of images, nor an archive: .tar, .zip, .parquet"
                raise UserError(f"{place}: {kinds}")
            text += file.read()
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror}") from None
    lines = (line.strip() for line in text.removeprefix(b"\xef\xbb\xbf").splitlines())
    folder = os.path.dirname(path) or "."
    paths = PathList((os.fsdecode(line) for line in lines if line and not line.startswith(b"#")), folder)
    if not len(paths):
        raise UserError(f"{place}: lists no images; one path a line, relative to the list's folder")
    return paths


def _check(files: ImageFiles, place: str, bad_images: str) -> ImageFiles:
    """Looks at the files' first bytes; what is no image is an error, or left out."""
    count = len(files.paths)
    probes = min(count, MAX_PROBES) if isinstance(files.paths, PathList) else 0
    indices = np.arange(probes) * (count - 1) // max(1, probes - 1)

    def look(part: np.ndarray) -> list[tuple[int, str]]:
        return [(int(i), reason) for i in part if (reason := sniff_header(files.paths[i]))]

    if probes:
        parts = np.array_split(indices, max(1, len(indices) // 256))
        bad = [found for part in ask_all(look, parts) for found in part]
    else:  # archives were looked at when they were listed
        indices, bad = range(count), files.paths.bad
    if not bad:
        return files
    names = some((f"{files.paths.name(i)} ({reason})" for i, reason in bad), 3)
    summary = f"{place}: {len(bad):,} of {len(indices):,} files are no readable images: {names}"
    if bad_images == "error":
        raise UserError(f"{summary}; repair or remove them, or pass --bad_images skip")
    if bad_images == "skip" and (len(bad) > bad_limit(len(indices)) or len(bad) == count):
        raise UserError(f"{summary}; --bad_images skip allows 1 % (here {bad_limit(len(indices))})")
    if len(bad) == count:
        raise UserError(summary)
    files.skipped = [(files.paths[i], reason) for i, reason in bad]
    keep = np.setdiff1d(np.arange(count), [i for i, _ in bad])
    files.paths = files.paths.take(keep)
    files.labels = None if files.labels is None else files.labels[keep]
    return files
