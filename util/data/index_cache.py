"""Lists the folders of a data set, and remembers the lists, so that a million files start in seconds.

A list of a folder is taken from memory only if the folder is still the very one that was listed: same inode,
same times of change to the nanosecond, same size. Adding, removing or renaming an entry changes them, and
unlike the time of modification the kernel's time of change (ctime) cannot be set back. Each folder is judged
for itself, on every start, so a change deep inside costs the listing of that folder alone.

Times prove nothing in the moment of a change: a second one within the clock's tick leaves them as they are.
So a list is kept only if the folder had not changed for a while before it was listed: 3 s on file systems
with the machine's own clock, 5 minutes on others, whose server's clock may differ. On FUSE (buckets mounted
as folders, and such) folders may keep their times whatever happens in them: nothing is kept.

What cannot be seen: a file whose content is replaced in place, which changes no folder (its header is looked
at before every start, and the rest when it is decoded); a link to a file that comes to lead to a folder; a
change that another machine made within the seconds for which a network file system trusts its own copy.

The lists are in `$XDG_CACHE_HOME/mae-pytorch/index` (else `~/.cache/...`), one file for each folder that was
searched, the 16 newest; they hold names only, may be deleted at any time, and cost 40 bytes an image. Sets
of fewer than 20,000 files are listed each time. A file that is damaged, or cannot be written, is no error.
"""

import contextlib
import functools
import hashlib
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from util.data.read import IMG_EXTENSIONS
from util.data.spread import spread

MIN_FILES = 20_000  # a smaller set is listed as fast as it is looked up
KEPT = 16  # lists in the cache folder
VERSION = f"1 {' '.join(IMG_EXTENSIONS)}"

_MAX = (1 << 63) - 1  # of an int64; some servers' inode numbers have 64 bits
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"}  # the machine's clock
_LOCAL_SECONDS, _OTHER_SECONDS = 3, 300  # the coarsest clock of a file system ticks every 2 s


@dataclass(slots=True)
class Folder:
    """A folder's visible entries. As bytes: a million names as strings would take 80 MB more.

    name: relative to the root, "" for itself. images: names, sorted, with zero bytes between. count: of
    them. others: how many other files have each extension. folders: names of folders and links to folders.
    stamp: the folder's state when it was listed; None: it does not prove anything yet.
    """

    name: str
    images: bytes = b""
    count: int = 0
    others: Counter = field(default_factory=Counter)
    folders: list[str] = field(default_factory=list)
    stamp: tuple[int, ...] | None = None


def list_folders(root: str) -> list[Folder]:
    """`root` and all folders in it, from the cache where that is proved fresh; in a fixed order.

    Hidden entries are passed over. A link to a folder is followed unless it leads back to one that it lies
    in. Listing goes on in threads when it turns out to wait for the file system.

    Raises:
        OSError: a folder cannot be read; `filename` says which.
    """
    known = load(root)
    try:
        folders = _walk(root, known)
    except OSError:
        if not known:
            raise
        folders = _walk(root, {})  # what was a folder then is none now
    fresh = [folder for folder in folders if folder.stamp]
    files = sum(folder.count + folder.others.total() for folder in fresh)
    changed = len(fresh) != len(known) or any(known.get(f.name) is not f for f in fresh)
    if changed and files >= MIN_FILES and _first_on_this_machine():
        save(root, fresh)
    return folders


def _first_on_this_machine() -> bool:
    """Whether this process writes for its machine; all others would write the same."""
    names = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _walk(root: str, known: dict[str, Folder]) -> list[Folder]:
    """Level by level, so that the order does not depend on how fast folders answer."""

    def look(task: tuple[str, tuple]) -> tuple[Folder | None, tuple]:
        name, above = task
        path = os.path.join(root, name) if name else root
        try:
            info = os.stat(path)  # before the listing: what changes meanwhile is seen next time
            identity = (info.st_dev, info.st_ino)
            if identity in above:
                return None, ()
            times = (info.st_mtime_ns, info.st_ctime_ns)
            stamp = (info.st_ino & _MAX, *times, info.st_size, info.st_nlink)
            folder = known.get(name)
            if folder is None or folder.stamp != stamp:
                folder = _list(path, name, stamp if _settled(info) else None)
        except OSError as error:
            error.filename = path  # missing if reading broke off inside the folder
            raise
        return folder, (*above, identity)

    found, tasks = [], [("", ())]
    while tasks:
        level = [(folder, above) for folder, above in spread(look, tasks) if folder is not None]
        found += [folder for folder, _ in level]
        tasks = [(os.path.join(f.name, inner), above) for f, above in level for inner in f.folders]
    return found


def _list(path: str, name: str, stamp: tuple[int, ...] | None) -> Folder:
    """Reads a folder; it gets `stamp` unless it holds a link to nothing, which may become a folder."""
    folder, images = Folder(name, stamp=stamp), []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
                leads_nowhere = not is_folder and entry.is_symlink() and not entry.is_file()
            except OSError:  # a link to itself
                is_folder, leads_nowhere = False, True
            extension = os.path.splitext(entry.name)[1].lower()
            if is_folder:
                folder.folders.append(entry.name)
            elif extension in IMG_EXTENSIONS:
                images.append(entry.name)
            else:
                folder.others[extension] += 1
            if leads_nowhere:
                folder.stamp = None
    folder.folders.sort()
    folder.count, folder.images = len(images), b"\0".join(map(os.fsencode, sorted(images)))
    return folder


def _settled(info: os.stat_result) -> bool:
    """Whether a folder's last change is so long ago that another one must show in its times."""
    kind = _file_system(info.st_dev)
    if kind.startswith("fuse") and kind != "fuseblk":
        return False
    seconds = _LOCAL_SECONDS if kind in _LOCAL else _OTHER_SECONDS
    return time.time_ns() - max(info.st_mtime_ns, info.st_ctime_ns) > seconds * 1_000_000_000


@functools.lru_cache
def _file_system(device: int) -> str:
    """The kind of file system behind a stat's `st_dev`, as Linux calls it; "" where that is not known."""
    number = f"{os.major(device)}:{os.minor(device)}" if hasattr(os, "major") else ""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[2] == number:
                return fields[fields.index("-") + 1]
    return ""


# ---------------------------------------------------------------- the file


def cache_path(root: str) -> Path:
    """Where the lists of `root` are kept, whatever path leads there."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # so says the standard
        base = os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
    return Path(base, "mae-pytorch", "index", f"{name}.npz")


def load(root: str) -> dict[str, Folder]:
    """{name: folder} as saved for `root`; empty if there is nothing, or nothing that can be used."""
    path = cache_path(root)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:  # checks its CRC-32
            if saved["head"].tobytes() != _head(root):
                return {}
            text, ends, stamps = saved["text"].tobytes(), saved["ends"].tolist(), saved["stamps"].tolist()
        folders, start = {}, 0
        for position, stamp in enumerate(stamps):
            parts = []
            for end in ends[4 * position : 4 * position + 4]:
                parts.append(text[start:end])
                start = end
            name, images, others, inner = parts
            kinds = [os.fsdecode(part) for part in others.split(b"\0")] if others else []
            folder = Folder(os.fsdecode(name), images, images.count(b"\0") + bool(images))
            folder.others = Counter(dict(zip(kinds[::2], map(int, kinds[1::2]), strict=True)))
            folder.folders = [os.fsdecode(part) for part in inner.split(b"\0")] if inner else []
            folder.stamp = tuple(stamp)
            folders[folder.name] = folder
        with contextlib.suppress(OSError):
            os.utime(path)  # in use
        return folders
    except Exception:  # damaged, or of another program: numpy raises whatever it runs into
        return {}


def save(root: str, folders: list[Folder]) -> None:
    """Writes lists for `load`, under another name first; gives up silently where nothing can be written."""
    parts = []
    for folder in folders:
        others = b"\0".join(os.fsencode(f"{kind}\0{count}") for kind, count in folder.others.items())
        inner = b"\0".join(map(os.fsencode, folder.folders))
        parts += [os.fsencode(folder.name), folder.images, others, inner]
    path, temporary = cache_path(root), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = file.name
            np.savez(
                file,
                head=np.frombuffer(_head(root), np.uint8),
                text=np.frombuffer(b"".join(parts), np.uint8),
                ends=np.cumsum([len(part) for part in parts], dtype=np.int64),
                stamps=np.array([folder.stamp for folder in folders], dtype=np.int64),
            )
        os.replace(temporary, path)
        _remove_old(path.parent)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _head(root: str) -> bytes:
    """What a cache file must begin with to be this root's."""
    return os.fsencode(f"{VERSION}\n{os.path.realpath(root)}")


def _remove_old(place: Path) -> None:
    """Keeps the lists that were used last, and no temporary file that a killed process left an hour ago."""
    entries = sorted(((entry.stat().st_mtime, entry.path) for entry in os.scandir(place)), reverse=True)
    lists = [path for _, path in entries if path.endswith(".npz")]
    parts = [path for used, path in entries if path.endswith(".part") and used < time.time() - 3600]
    for path in lists[KEPT:] + parts:
        os.unlink(path)
