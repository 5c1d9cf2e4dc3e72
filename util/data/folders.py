"""Lists the folders of a data set, and asks a file system many small questions at once."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from util.data.headers import OPTIONAL
from util.data.read import IMG_EXTENSIONS
from util.errors import UserError
from util.files import printable, some

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
THREADS = 16  # they wait for the disk or the network, not for the processor


def ask_all(question: Callable, items: Sequence) -> Iterator:
    """question(item) of every item, in their order, in threads; raises what the first failing one raises."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(question, items)


def is_archive(name: str) -> bool:
    """Whether a file's name or address is that of an archive, also of a kind that is not read."""
    path = name.split("?")[0] if "://" in name else name
    return bool(re.search(r"\.(tar|zip|parquet|tgz|tbz2?|txz|tar\.\w+)$", path, re.IGNORECASE))


class Archives(str):
    """Several archives as one data path, under the text that is shown of them. paths: their names."""

    paths: Sequence[str] = ()

    @classmethod
    def of(cls, paths: Sequence[str]) -> "Archives":
        several = cls(paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""))
        several.paths = paths
        return several


def names_archives(path: str) -> bool:
    """Whether a data path means archives: an address, a name or a pattern of them, or a folder with archives
    and no images directly in it."""
    if isinstance(path, Archives):
        return True
    if not os.path.isdir(path):
        is_pattern = not set("*?[{").isdisjoint(path) and not os.path.lexists(path)
        return "://" in path or is_archive(path) or is_pattern
    found = False
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for name in (entry.name for entry in entries if not entry.name.startswith(".")):
            if name.lower().endswith(IMG_EXTENSIONS):
                return False
            found = found or is_archive(name)
    return found


@dataclass(slots=True)
class Folder:
    """A folder's visible entries.

    name: relative to the root, "" for itself. images: names, sorted, with zero bytes between; as strings a
    million would take 80 MB more. count: of them. others: how many other files have each extension.
    folders: names of folders and links to folders, sorted.
    """

    name: str
    images: bytes = b""
    count: int = 0
    others: Counter = field(default_factory=Counter)
    folders: list[str] = field(default_factory=list)


def list_folders(root: str) -> list[Folder]:
    """`root` and all folders in it, level by level: the order does not depend on what answers first.

    Hidden entries are passed over. A link to a folder is followed unless it leads back to one that it is in.

    Raises:
        OSError: a folder cannot be read; `filename` says which.
    """

    def look(task: tuple[str, tuple]) -> tuple[Folder | None, tuple]:
        name, above = task
        path = os.path.join(root, name) if name else root
        try:
            info = os.stat(path)
            identity = (info.st_dev, info.st_ino)
            return (None, ()) if identity in above else (_list(path, name), (*above, identity))
        except OSError as error:
            error.filename = path  # missing if reading broke off inside the folder
            raise

    found, tasks = [], [("", ())]
    while tasks:
        level = [(folder, above) for folder, above in ask_all(look, tasks) if folder is not None]
        found += [folder for folder, _ in level]
        tasks = [(os.path.join(f.name, inner), above) for f, above in level for inner in f.folders]
    return found


def _list(path: str, name: str) -> Folder:
    folder, images = Folder(name), []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself
                is_folder = False
            extension = os.path.splitext(entry.name)[1].lower()
            if is_folder:
                folder.folders.append(entry.name)
            elif extension in IMG_EXTENSIONS:
                images.append(entry.name)
            else:
                folder.others[extension] += 1
    folder.folders.sort()
    folder.count, folder.images = len(images), b"\0".join(map(os.fsencode, sorted(images)))
    return folder


def split_folder(root: str, split: str, called: str = "--data_path ") -> str | None:
    """The folder of a split, under the name as it is or another that people use; UserError for two others."""
    if os.path.isdir(path := os.path.join(root, split)):
        return path
    names = [case(name) for name in SPLITS.get(split, ()) for case in (str.lower, str.title, str.upper)]
    found = {os.stat(path).st_ino: path for name in names if os.path.isdir(path := os.path.join(root, name))}
    if len(found) > 1:
        names = " and ".join(os.path.basename(path) for path in found.values())
        raise UserError(f"{called}{printable(root)}: {names} could both be {split}/; rename one")
    return next(iter(found.values()), None)


def count_kinds(others: Counter) -> str:
    """Files by extension, in words: "20 .heic (pip install pillow-heif), 3 without extension"."""
    packages = {name: pip for names, there, pip in OPTIONAL.values() if not there for name in names}
    kinds = []
    for extension, count in others.most_common():
        advice = f" (pip install {packages[extension]})" if extension in packages else ""
        kinds.append(f"{count:,} {printable(extension) or 'without extension'}{advice}")
    return some(kinds, 4)
