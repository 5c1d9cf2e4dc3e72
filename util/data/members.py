"""What archives hold: members of tar and zip files, rows of Parquet files; their places, not their pixels."""

import contextlib
import hashlib
import json
import os
import re
import stat
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np

from util.data.folders import ask_all, is_archive
from util.data.headers import HEAD, why_no_image
from util.data.parquet import parquet_rows
from util.data.read import IMG_EXTENSIONS
from util.data.stores import Shard, ask, is_far, open_shard
from util.errors import UserError
from util.files import printable, replacing
from util.processes.collectives import warn

RAW, STORED, DEFLATED, PARQUET = range(4)  # what a member is
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_PACK_ANEW = "cannot be read by offset; make a plain .tar or a .zip of it"
SPLIT = re.compile(r"(train|val|test)(?:ing|id|idation)?(?![a-z])", re.IGNORECASE)
_LABELS = (".cls", ".json")  # WebDataset's members beside an image


class Entry(NamedTuple):
    """A member. start: its first byte, of a zip file its header's, of a Parquet file its row. length: of its
    data as they lie there. head: its first bytes, or None. text: of a label's member, what it says."""

    name: str
    start: int = 0
    length: int = 0
    kind: int = RAW
    head: bytes | None = None
    text: bytes | None = None


@dataclass
class Content:
    """An archive's images {name: entry}, as a list; other files by folder and extension; labels by key."""

    images: list[tuple[str, str, Entry]] = field(default_factory=list)
    others: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    labels: dict[str, str] = field(default_factory=dict)


def _wants_text(name: str, size: int) -> bool:
    return name.lower().endswith(_LABELS) and size < 1 << 16


def _walk_tar(shard: Shard, file) -> Iterator[Entry]:
    if file.read(6).startswith(_COMPRESSED):
        raise OSError(f"is compressed and {_PACK_ANEW}")
    file.seek(0)
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
        while (info := tar.next()) is not None:
            tar.members.clear()  # of a million, a gigabyte
            if info.isdir():
                yield Entry(f"{info.name}/")
                continue
            if not info.isreg() or info.issparse():
                kind = "a link" if info.issym() or info.islnk() else "no plain file"
                advice = "pack it with tar --dereference --hard-dereference"
                raise OSError(f"holds {kind} ({printable(info.name)}); {advice}")
            file.seek(info.offset_data)
            text = file.read(info.size) if _wants_text(info.name, info.size) else None
            head = file.read(min(HEAD, info.size)) if text is None else None
            yield Entry(info.name, info.offset_data, info.size, RAW, head, text)
        file.seek(tar.offset)
        if file.read(512) != bytes(512):
            raise tarfile.ReadError("no end where it should be")
    except tarfile.TarError as error:
        raise OSError(f"damaged or truncated ({error})") from None


def _walk_zip(shard: Shard, file) -> Iterator[Entry]:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise OSError(f"damaged or truncated ({error})") from None
    for info in archive.infolist():
        name, kind = info.filename, {0: STORED, 8: DEFLATED}.get(info.compress_type)
        if name.endswith("/"):
            yield Entry(name)
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            raise OSError(f"holds a link ({printable(name)}); pack the files themselves")
        if kind is None or info.flag_bits & 1:
            how = "encrypted" if kind is not None else f"compressed by method {info.compress_type}"
            raise OSError(f"{printable(name)} in it is {how}; stored and deflated members are read")
        text = archive.read(info) if _wants_text(name, info.file_size) else None
        head = None if info.file_size else b""
        if info.file_size and name.lower().endswith(IMG_EXTENSIONS) and not is_far(shard.address):
            with archive.open(info) as member:
                head = member.read(HEAD)
        yield Entry(name, info.header_offset, info.compress_size, kind, head, text)


def _walk_parquet(shard: Shard, file) -> Iterator[Entry]:
    for row, (label, base) in enumerate(parquet_rows(shard)):
        yield Entry(base if label is None else f"{_class_name(label)}/{base}", row, 1, PARQUET)


def _class_name(label: object) -> str:
    """The class folder that a label stands for: numbers are filled up, so that they sort as numbers."""
    text = str(label).strip()
    return f"{int(text):05d}" if re.fullmatch(r"\d+", text) else re.sub(r"/|^\.", "_", text)  # not hidden


def _label(entry: Entry) -> str | None:
    """The label that a member beside an image gives, as a class folder's name."""
    try:
        value = entry.text.decode("utf-8").strip()
        if entry.name.lower().endswith(".json"):
            content = json.loads(value)
            value = next((content[k] for k in ("label", "cls", "class") if k in content), None)
        return _class_name(value) if isinstance(value, int | str) and value != "" else None
    except (ValueError, TypeError, RecursionError):
        return None


def _list_shard(shard: Shard) -> Content:
    """What an archive holds, without what is hidden; raises OSError for what has no place in a data set."""
    content, seen = Content(), set()
    walk = {".zip": _walk_zip, ".parquet": _walk_parquet}
    path = shard.address.split("?")[0] if is_far(shard.address) else shard.address
    with open_shard(shard) as file:
        for entry in walk.get(os.path.splitext(path)[1].lower(), _walk_tar)(shard, file):
            parts = [part for part in entry.name.split("/") if part not in ("", ".")]
            if entry.name.startswith("/") or ".." in parts:
                advice = "pack it from inside its folder (tar -C FOLDER -cf ... .)"
                raise OSError(f"holds {printable(entry.name)}, a name outside of it; {advice}")
            if any(part.startswith(".") for part in parts):
                continue
            name, base = "/".join(parts), parts[-1] if parts else ""
            if entry.name.endswith("/") or not base:
                content.others[name].update()
                continue
            if name in seen and entry.kind != PARQUET:
                raise OSError(f"holds {printable(name)} twice")
            if is_archive(name):
                raise OSError(f"holds an archive ({printable(name)}); unpack that first")
            seen.add(name)
            folder, extension = name[: -len(base) - 1], os.path.splitext(base)[1].lower()
            if entry.text is not None and (label := _label(entry)) is not None:
                if extension == ".cls" or _key(name) not in content.labels:
                    content.labels[_key(name)] = label
            elif extension in IMG_EXTENSIONS or entry.kind == PARQUET:
                content.images.append((folder, base, entry))
            else:
                content.others[folder][extension] += 1
    return content


def _key(name: str) -> str:
    """What WebDataset takes for a sample's name: all up to the first dot behind the folder."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".")[0]


def make_table(shards: list[Shard]) -> tuple[dict, dict[str, np.ndarray]]:
    """Lists archives: what is said of folders, and the columns of all images, folder by folder.

    The folders are those that the images would lie in: of the split that an archive is named after, of the
    class that a label says; one that everything lies in is passed over.
    """
    contents = list(ask_all(lambda shard: ask(shard, _list_shard), shards))
    whole = _wrapper(contents)
    wrappers = [whole or _wrapper([content], of_splits=True) for content in contents]
    splits = [SPLIT.match(os.path.basename(shard.address)) for shard in shards]
    splits = [match and match[1].lower() for match in splits]
    rows, others = defaultdict(list), defaultdict(Counter)  # by name, and name in the archive

    def place(folder: str, number: int) -> str:
        return (folder + "/").removeprefix(wrappers[number])[:-1]

    for number, (content, split) in enumerate(zip(contents, splits, strict=True)):
        inside = {place(folder, number).split("/")[0] for folder, *_ in content.images}
        prefix = [split] if "train" in splits and split and not inside & {"train", "val", "test"} else []
        for folder, base, entry in content.images:
            label = content.labels.get(_key(f"{folder}/{base}" if folder else base))
            if label is None and content.labels:
                shard = printable(shards[number].address)
                raise UserError(f"{shard}: {printable(base)} has no label beside it, but others have")
            name = "/".join(part for part in (*prefix, label, place(folder, number)) if part)
            reason = None if entry.head is None else why_no_image(entry.head)
            rows[name, folder].append((base, number, entry.start, entry.length, entry.kind, reason))
        for folder, counts in content.others.items():
            name = "/".join(part for part in (*prefix, place(folder, number)) if part)
            others[name, folder].update(counts)
        content.images.clear()
    folders, ordered, twice = [], [], 0
    for names in sorted({*rows, *others}):
        part = sorted(rows.pop(names, []), key=lambda row: row[:3])
        folders.append((*names, len(part), others[names]))
        twice += len(part) - len({row[0] for row in part})
        ordered += part
    bad = [(index, row[5]) for index, row in enumerate(ordered) if row[5]]
    names = [os.fsencode(row[0]) for row in ordered]
    columns = {"names": np.frombuffer(b"".join(name + b"\0" for name in names), np.uint8)}
    places = np.cumsum([0, *(len(name) + 1 for name in names[:-1])])
    columns["name"] = places.astype(np.min_scalar_type(places[-1]))
    for position, name in enumerate(("shard", "start", "length", "kind"), 1):
        column = np.array([row[position] for row in ordered], np.int64)
        columns[name] = column.astype(np.min_scalar_type(column.max(initial=0)))
    return {"folders": folders, "bad": bad, "twice": twice}, columns


def _wrapper(contents: list[Content], of_splits: bool = False) -> str:
    """The folder, with a slash, that everything lies in and that holds folders only; "": there is none.

    of_splits: one that holds splits, as of several sets in an archive each.
    """
    images = {folder for content in contents for folder, *_ in content.images}
    tops = {folder.split("/")[0] for folder in images}
    top = tops.pop() if len(tops) == 1 else ""
    if not top or top in images or SPLIT.fullmatch(top):
        return ""
    splits = any(SPLIT.fullmatch(part) for folder in images for part in folder.split("/")[1:2])
    return f"{top}/" if splits or not of_splits else ""


def kept_table(shards: list[Shard]) -> tuple[dict, dict[str, np.ndarray]]:
    """`make_table`, or what it gave before, from the cache; one process of this machine makes it for all."""
    key = hashlib.sha256(repr([2, IMG_EXTENSIONS, shards]).encode("utf-8", "surrogateescape")).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mae"
    cache = folder / f"members-{key[:32]}.npz"
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError, NotImplementedError):  # a file system without locks
            cache.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(filelock.FileLock(f"{cache}.lock"))
        try:
            with np.load(cache, allow_pickle=False) as stored:
                columns = dict(stored)
            return json.loads(columns.pop("about").tobytes()), columns
        except Exception:  # it is not there, or damaged in whatever way
            about, columns = make_table(shards)
        try:
            with replacing(cache) as temporary, open(temporary, "wb") as file:
                np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **columns)
        except OSError as error:
            reason = f"{printable(cache.parent)} cannot be written ({error.strerror or error})"
            warn(f"{reason}, so that archives are listed anew at every start; set XDG_CACHE_HOME")
    return about, columns
