"""Images in archives: `.tar`, `.zip` and Parquet files, here or in a store far away, read by offset.

What the archives hold is listed once and kept in the user's cache folder. The list then behaves as that of a
folder with the same files: same order, same names, same labels, so same batches.
"""

import functools
import hashlib
import io
import itertools
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from util.data import parquet, stores
from util.data.folders import SPLITS, Folder
from util.data.members import DEFLATED, PARQUET, RAW, kept_table
from util.data.read import Place
from util.errors import UserError
from util.files import counted, printable, some
from util.processes.collectives import is_main_process, warn

_GAP, _LONGEST = 1 << 16, 1 << 24  # bytes between neighbours, and in all, that one read far away takes in
READS_AHEAD = 4  # reads of neighbours under way at a time
# Of this process: what is read together with its neighbours, by its place; and reads that have not begun
_ahead: dict[tuple, "_Run"] = {}
_waiting: deque["_Run"] = deque()


@dataclass(slots=True)
class ArchiveFolder(Folder):
    """A folder as archives hold it. first: number of its first image. real: its name in the archive, where
    `name` says which split or class it belongs to."""

    first: int = 0
    real: str = ""


class _Bytes(io.BytesIO):
    readall = io.BytesIO.read  # as unbuffered files have it


class Member(Place):
    """An image in an archive; the text is the archive's address, "/", and the member's name."""

    def open(self) -> io.BytesIO:
        """Its bytes, from one read; raises OSError."""
        if self.kind == PARQUET:
            return _Bytes(parquet.parquet_image(self.shard, self.start))
        run = _ahead.get((self.shard, self.start))
        read = run.read if run else functools.partial(stores.read, self.shard)
        data = read(self.start, self.span)
        if self.kind != RAW:
            data = stores.unzipped(self.shard, self.start, self.length, self.kind == DEFLATED, data)
        return _Bytes(data)

    @property
    def span(self) -> int:
        """Bytes to read: of a zip file's member with what stands before it, whose length is not known."""
        before = 30 + len(os.fsencode(self)) + 64 if self.kind else 0
        return min(self.length + before, self.shard.size - self.start)


class _Run:
    """Neighbours far away, read together in a thread, while what came before is decoded."""

    def __init__(self, shard: stores.Shard, start: int, stop: int):
        self.shard, self.start, self.stop = shard, start, stop
        self.thread = self.data = self.error = None

    def begin(self) -> None:
        self.thread = threading.Thread(target=self._fetch, daemon=True)
        self.thread.start()

    def _fetch(self) -> None:
        try:
            self.data = stores.read(self.shard, self.start, self.stop - self.start)
        except Exception as error:  # is raised where the bytes are wanted
            self.error = error

    def read(self, start: int, length: int) -> bytes:
        """Some of the bytes, as soon as they are there; raises what reading raised."""
        if self.data is None and self.error is None:
            if self.thread is None:
                self.begin()
            self.thread.join()
            if _waiting:
                _waiting.popleft().begin()
        if self.error is not None:
            raise self.error
        return self.data[start - self.start : start - self.start + length]


class Members(Sequence):
    """Images of archives as `PathList` lists those of a folder, in some 45 bytes each; `[i]` is a `Member`.

    folders: in the order of the images. names: uint8, file names of all images that there are in the archives
    and more, zero bytes behind each. columns: name, shard, start, length, kind, (n,) each: where in `names`,
    which archive, first byte there and bytes, what it is. bad: (index, reason) of those whose first bytes are
    no image's. far: whether some archives are. in_groups: whether an image costs reading many,
    as of Parquet files that are too large to be kept.
    """

    def __init__(self, shards: list[stores.Shard], folders: list[ArchiveFolder], names, columns: dict, bad):
        self.shards, self.folders, self.names, self.columns, self.bad = shards, folders, names, columns, bad
        self._firsts = np.cumsum([0] + [folder.count for folder in folders])
        self.far = any(stores.is_far(shard.address) for shard in shards)
        in_groups = bool((columns["kind"] == PARQUET).any())
        self.in_groups = in_groups and sum(shard.size for shard in shards) > parquet.KEPT

    def __len__(self) -> int:
        return len(self.columns["name"])

    def __getitem__(self, index: int | slice) -> Member | list[Member]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        folder, base = self._find(index)
        shard = self.shards[self.columns["shard"][index]]
        member = Member("/".join(part for part in (shard.address, folder.real, base) if part))
        member.shard = shard
        for name in ("start", "length", "kind"):
            setattr(member, name, int(self.columns[name][index]))
        return member

    def _find(self, index: int) -> tuple[ArchiveFolder, str]:
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        name = int(self.columns["name"][position])
        folder = self.folders[np.searchsorted(self._firsts, position, "right") - 1]
        longest = 4096  # bytes of a file name; file systems end at 255
        return folder, os.fsdecode(self.names[name : name + longest].tobytes().split(b"\0", 1)[0])

    def name(self, index: int) -> str:
        """The name that the image would have in a folder of the split, relative to it."""
        folder, base = self._find(index)
        return os.path.join(folder.name, base)

    def digest(self) -> str:
        """SHA-256 over the names in their order: that of a folder with the same files."""
        digest = hashlib.sha256()
        for folder, first in zip(self.folders, self._firsts[:-1].tolist(), strict=True):
            last = first + folder.count - 1
            ends = int(self.columns["name"][last]) + len(os.fsencode(self._find(last)[1]))
            names = self.names[int(self.columns["name"][first]) : ends].tobytes()
            if names.count(b"\0") != folder.count - 1:  # some of the folder's were left out
                names = b"\0".join(os.fsencode(self._find(i)[1]) for i in range(first, last + 1))
            prefix = os.fsencode(f"{folder.name}/") if folder.name else b""
            digest.update(prefix + names.replace(b"\0", b"\0" + prefix) + b"\0")
        return digest.hexdigest()

    def take(self, indices: Iterable[int]) -> "Members":
        """A new list of some of the images."""
        indices = np.fromiter(indices, np.int64)
        owners = np.searchsorted(self._firsts, indices, "right") - 1
        folders = [replace(self.folders[owner], count=len(list(group)))
                   for owner, group in itertools.groupby(owners.tolist())]  # fmt: skip
        columns = {name: column[indices] for name, column in self.columns.items()}
        return Members(self.shards, folders, self.names, columns, [])

    def of_folders(self, folders: Sequence[ArchiveFolder]) -> "Members":
        """The images of some of the folders, in that order."""
        parts = [range(folder.first, folder.first + folder.count) for folder in folders]
        if all(one.stop == two.start for one, two in itertools.pairwise(parts)):  # as they lie: no copies
            chosen = slice(parts[0].start, parts[-1].stop)
        else:
            chosen = np.concatenate(parts)
        columns = {name: column[chosen] for name, column in self.columns.items()}
        reasons, bad = dict(self.bad), []
        if reasons:
            numbers = enumerate(itertools.chain(*parts))
            bad = [(new, reasons[old]) for new, old in numbers if old in reasons]
        return Members(self.shards, list(folders), self.names, columns, bad)

    @property
    def nbytes(self) -> int:
        return len(self.names) + sum(column.nbytes for column in self.columns.values())

    def plan(self, indices: Sequence[int]) -> None:
        """Says which images will be opened next: neighbours in an archive far away are read together."""
        if self.far:
            read_ahead(map(self.__getitem__, indices))

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(shards, starts), (n,) each: which archive each image lies in, and where."""
        return self.columns["shard"], self.columns["start"]


def read_ahead(places: Iterable[str]) -> None:
    """Starts reading what will be opened next, and forgets what was to be: see `Members.plan`."""
    _ahead.clear()
    _waiting.clear()
    members = [place if isinstance(place, Member) else getattr(place, "file", None) for place in places]
    far = [member for member in members if isinstance(member, Member)
           and member.kind != PARQUET and stores.is_far(member.shard.address)]  # fmt: skip
    group: list[Member] = []
    for member in [*sorted(far, key=lambda m: (m.shard, m.start)), None]:
        if group and (member is None or not _joins(group, member)):
            stop = max(m.start + m.span for m in group)
            run = _Run(group[0].shard, group[0].start, stop)
            _ahead.update({(m.shard, m.start): run for m in group} if len(group) > 1 else {})
            group = []
        group.append(member)
    runs = dict.fromkeys(_ahead[m.shard, m.start] for m in far if (m.shard, m.start) in _ahead)
    _waiting.extend(runs)  # in the order in which they are wanted
    for _ in range(min(READS_AHEAD, len(_waiting))):
        _waiting.popleft().begin()


def _joins(group: list[Member], member: Member) -> bool:
    gap = member.start - max(m.start + m.span for m in group[-1:])
    whole = member.start + member.span - group[0].start
    return member.shard == group[0].shard and gap <= _GAP and whole <= _LONGEST


def open_archives(data_path: str, split: str, place: str) -> tuple[Members, list[ArchiveFolder]] | None:
    """Lists archives: all images, and the folders of the split, from which `Members.of_folders` makes a list.

    Folders' names are relative to the split: the members' folder of that name, or the archives that are named
    so (`train-000.tar`), or for "train" everything where neither is there, and for "" always.

    Returns:
        None where there is no such split.

    Raises:
        UserError: an archive that is not there or cannot be read by offset, or a member that has no place in
            a data set: links, archives, names twice or outside.
    """
    shards = stores.find_shards(data_path, place)
    about, columns = kept_table(shards)
    if about["twice"] and is_main_process():
        text = "with the name of another one, in another archive; all of them count"
        warn(f"{place}: {counted(about['twice'], 'image')} {text}")
    folders, first = [], 0
    for name, real, count, others in about["folders"]:
        folders.append(ArchiveFolder(name, count=count, others=Counter(others), first=first, real=real))
        first += count
    bad = list(map(tuple, about["bad"]))
    members = Members(shards, folders, columns.pop("names"), columns, bad)
    tops = {folder.name.split("/")[0] for folder in folders}
    aliases = sorted(top for top in tops if top.lower() in SPLITS.get(split, ()))
    if len(aliases) > 1 and split not in tops:
        names = printable(" and ".join(aliases))
        raise UserError(f"{place}: {names} could both be {split}/; name the archives of one")
    if not aliases:
        return None if split not in ("", "train") else (members, folders)
    inside = f"{split if split in tops else aliases[0]}/"
    known = {name for names in SPLITS.values() for name in names}
    outside = [f for f in folders if f.count and f.name.split("/")[0].lower() not in known]
    if split == "train" and outside and is_main_process():
        count, names = sum(f.count for f in outside), some((printable(f.real or ".") for f in outside), 2)
        text = f"{counted(count, 'image')} beside {printable(inside)} left out, in no split"
        warn(f"{place}: {text}: in {names}")
    folders = [folder for folder in folders if (folder.name + "/").startswith(inside)]
    for folder in folders:
        folder.name = folder.name[len(inside) :]
    return members, folders
