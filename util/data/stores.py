"""Bytes of files, here or far away, by offset: local paths, http(s), and what fsspec opens (s3, gs, ...).

A store that does not answer, or breaks off, is asked again with longer and longer pauses; then the error is
`Unreachable`. What a process opens belongs to it alone, so that workers may be forked or spawned.
"""

import functools
import glob
import http.client
import io
import os
import re
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from typing import NamedTuple

from util.data.folders import ask_all, is_archive
from util.errors import UserError
from util.files import printable, some

MOST = 1_000_000  # archives that a pattern's range may stand for
TRIES, PAUSE, TIMEOUT = 8, 0.5, 30  # tries; seconds before the second, then twice as long each; of one try
_position = threading.Lock()  # of files read where there is no pread
_BRACES = re.compile(r"\{([^{}]*)\}")
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may be another one soon


class Unreachable(ConnectionError):
    """A store that gives no answer, or another one than was asked for."""


class Shard(NamedTuple):
    """A file. size: bytes. stamp: what changes when it does, its time of modification or the store's ETag."""

    address: str
    size: int
    stamp: str


def is_far(address: str) -> bool:
    return "://" in address


def look(address: str) -> Shard:
    """Size and stamp of a file; raises OSError, `Unreachable` among them, and UserError without fsspec."""
    if not is_far(address):
        info = os.stat(address)
        return Shard(address, info.st_size, str(info.st_mtime_ns))
    if _is_http(address):
        _, headers = _persist(lambda: _http_range(address, 0, 1), tries=4)
        size = headers["Content-Range"].rpartition("/")[2]
        if not size.isdigit():
            raise Unreachable("the server does not say how large the file is")
        return Shard(address, int(size), headers["ETag"] or headers["Last-Modified"] or "")
    info = _persist(lambda: (lambda system, path: system.info(path))(*open_store(address)), tries=4)
    stamp = next((str(info[name]) for name in ("ETag", "etag", "mtime", "LastModified", "updated", "created")
                  if info.get(name)), "")  # fmt: skip
    return Shard(address, info["size"], stamp)


def read(shard: Shard, start: int, length: int) -> bytes:
    """`length` bytes of a file from `start` on; raises OSError, also where there are fewer."""
    if not is_far(shard.address):
        file = _open_local(shard)
        if hasattr(os, "pread"):  # one call, and no position that forked processes would share
            data = os.pread(file.fileno(), length, start)
        else:
            with _position:  # threads share the file
                file.seek(start)
                data = file.read(length)
        if len(data) != length:
            raise OSError(f"the archive ends at byte {start + len(data)}")
        return data
    return _persist(lambda: _read_far(shard, start, length))


@functools.lru_cache(maxsize=256)  # what leaves it is closed when its last reader is done
def _open_local(shard: Shard) -> io.FileIO:
    file = open(shard.address, "rb", buffering=0)  # noqa: SIM115
    info = os.fstat(file.fileno())
    if (info.st_size, str(info.st_mtime_ns)) != shard[1:]:
        raise OSError("the archive has changed since it was listed")
    return file


def _read_far(shard: Shard, start: int, length: int) -> bytes:
    if _is_http(shard.address):
        data, headers = _http_range(shard.address, start, length)
        if not headers["Content-Range"].endswith((f"/{shard.size}", "/*")):
            raise Unreachable("the archive has changed since it was listed")
    else:
        system, path = open_store(shard.address)
        data = system.cat_file(path, start, start + length)
    if len(data) != length:
        raise http.client.IncompleteRead(data, length - len(data))
    return data


def ask(shard: Shard | str, question: Callable):
    """question(shard); UserError that names it where that cannot be answered."""
    name = printable(shard if isinstance(shard, str) else shard.address)
    try:
        return question(shard)
    except FileNotFoundError:
        raise UserError(f"{name}: does not exist") from None
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from None


def find_shards(data_path: str, place: str) -> list[Shard]:
    """The archives that a data path names: addresses, patterns, folders of them; raises UserError."""
    pieces, addresses = list(getattr(data_path, "paths", [data_path])), []
    while any(braced := [None if os.path.lexists(piece) else _BRACES.search(piece) for piece in pieces]):
        pieces = [piece[: m.start()] + inner + piece[m.end() :] if m else piece
                  for piece, m in zip(pieces, braced, strict=True)
                  for inner in (_between(m[1]) if m else [""])]  # fmt: skip
    for piece in pieces:
        far = is_far(piece)
        if far and piece.lower().startswith("http"):
            if re.search(r"[*\[\]]", piece) or not is_archive(piece):
                raise UserError(f"{place}: web servers list no files; name archives, as in {{000..127}}.tar")
            found = [piece]
        elif far and is_archive(piece) and "*" not in piece:
            found = [piece]
        elif far:
            found = ask(piece, lambda address: _persist(lambda: _list_store(address), tries=4))
        elif os.path.isdir(piece):
            found = [name for name in os.listdir(piece) if is_archive(name) and not name.startswith(".")]
            found = [os.path.join(piece, name) for name in found]
        else:
            found = [piece] if os.path.lexists(piece) else glob.glob(piece)
        if not found:
            shown = place if piece == data_path else f"{place}: {printable(piece)}"
            raise UserError(f"{shown}: does not exist")
        addresses += sorted(found)
    if strange := [address for address in addresses if not is_archive(address)]:
        shown = some(map(printable, strange), 3)
        raise UserError(f"{place}: no archives (.tar, .zip, .parquet) are {shown}")
    return list(ask_all(lambda address: ask(address, look), list(dict.fromkeys(addresses))))


def _list_store(address: str) -> list[str]:
    """The archives of a folder or pattern of a store."""
    system, path = open_store(address)
    found = system.glob(path) if "*" in path else system.find(path)
    return [system.unstrip_protocol(name) for name in found if is_archive(name)]


def _between(inside: str) -> list[str]:
    """What braces stand for: `000..127` a range as wide as its ends are written, `a,b` a list."""
    if not (ends := re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside)):
        return inside.split(",")
    first, last = int(ends[1]), int(ends[2])
    if not 0 <= last - first < MOST:
        count = max(0, last - first + 1)
        raise UserError(f"--data_path: {{{inside}}} stands for {count:,} archives; 1 to {MOST:,} are read")
    return [str(i).zfill(len(ends[1])) for i in range(first, last + 1)]


def _is_http(address: str) -> bool:
    return address.lower().startswith(("http://", "https://"))


def _http_range(address: str, start: int, length: int) -> tuple[bytes, http.client.HTTPMessage]:
    headers = {"Range": f"bytes={start}-{start + length - 1}", "User-Agent": "mae"}
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT) as answer:
        if answer.status != 206 or not answer.headers["Content-Range"]:
            raise Unreachable("the server does not serve parts of a file (range requests)")
        return answer.read(), answer.headers


def open_store(address: str) -> tuple:
    """(fsspec's file system, the path in it) of an address; made once in each process."""
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{printable(address)}: needs fsspec: pip install fsspec s3fs gcsfs") from None
    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # it says which package a protocol needs
        raise UserError(f"{printable(address)}: {error}") from None


def _persist(ask: Callable, tries: int = TRIES):
    """ask(), again where the store may have had a bad moment."""
    for attempt in range(tries):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return ask()
        except (UserError, Unreachable, FileNotFoundError, PermissionError):
            raise
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code not in _PASSING:
                raise Unreachable(reason) from None
        except http.client.IncompleteRead as error:
            whole = len(error.partial) + (error.expected or 0)
            reason = f"the server broke off after {len(error.partial):,} of {whole:,} bytes"
        except Exception as error:  # what a store's library raises is its own
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
    raise Unreachable(f"{' '.join(reason.split())} ({tries} tries)")


class _Raw(io.RawIOBase):
    """A file of a store that libraries can read and seek in."""

    def __init__(self, shard: Shard):
        self.shard, self.position = shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.shard.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self.shard.size - self.position))
        if count:
            buffer[:count] = read(self.shard, self.position, count)
            self.position += count
        return count


def open_shard(shard: Shard) -> io.BufferedReader:
    """A file that reads small pieces here, where they cost little, and large ones far away."""
    return io.BufferedReader(_Raw(shard), 1 << 17 if is_far(shard.address) else 1 << 10)


def unzipped(shard: Shard, start: int, length: int, deflated: bool, data: bytes) -> bytes:
    """The content of a zip file's member, `data` beginning with its header; raises OSError."""
    if data[:4] != b"PK\3\4":
        raise OSError("damaged: no member starts where the archive's directory says")
    begin = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
    data = data[begin : begin + length] if len(data) >= begin + length else read(shard, start + begin, length)
    if not deflated:
        return data
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = unpacker.decompress(data, 1 << 30)
    except zlib.error as error:
        raise OSError(f"damaged ({error})") from None
    if not unpacker.eof:
        raise OSError("damaged: it breaks off")
    return data
