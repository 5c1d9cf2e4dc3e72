"""Which run an output folder belongs to, and who writes there now.

`.run.json` says it: the id of the run, versions, process and host of its last start, and, for as long as the
run has saved nothing of its own, the file that it started from. `.run.lock` is locked while a run is at work,
so that no second one mixes its files with the first one's.
"""

import contextlib
import functools
import json
import os
import platform
import socket
import time
import uuid
from importlib.metadata import version
from pathlib import Path

import filelock
import torch

from util.errors import UserError
from util.files import check_writable, printable, replacing
from util.processes.collectives import note
from util.weights.names import list_checkpoints, position_in_name
from util.weights.schema import STAND_INS

PATIENCE = 10.0  # seconds that a run before has for its end: a scheduler may start the next one early
_SETTLE = 0.5  # seconds after which a folder without locks shows who wrote last

_lock: filelock.FileLock | None = None
_folder: Path | None = None
_id: str | None = None


def claim(output_dir: str | os.PathLike, waits: bool = False) -> None:
    """Makes the folder this process's until `release`; on the first process. Can be called again.

    The lock of a process that has ended does not count. On a file system that knows no locks `.run.json`
    stands for one.

    Args:
        waits: gives a run that works there `PATIENCE` to end. Only for one that goes on from what that has
            saved, and has not looked for it yet: another would overwrite it.

    Raises:
        UserError: the folder cannot be written, or another process works there.
    """
    global _lock, _folder
    folder = Path(os.path.abspath(output_dir))
    if folder == _folder:
        return
    release()
    check_writable("--output_dir", folder, f"{output_dir}:")
    lock = filelock.FileLock(folder / ".run.lock", mode=0o666, thread_local=False)
    deadline, told = time.monotonic() + PATIENCE, False
    while not _take(lock, folder):
        if not told and waits:
            told = True
            note(f"{printable(output_dir)}: {_owner_in_words(folder)} works there; waiting for its end")
        if not waits or time.monotonic() > deadline:
            advice = "wait for its end, or pass another folder"
            if read_record(folder).get("host") != socket.gethostname():
                advice += "; if it is gone for sure, remove .run.lock and .run.json there"
            raise UserError(f"--output_dir {output_dir}: {_owner_in_words(folder)} works there; {advice}")
        time.sleep(0.2)
    _lock, _folder = lock, folder
    with contextlib.suppress(OSError):  # a full disk is for `begin` to say
        _write_record({**read_record(folder), **_ourselves()})


def release() -> None:
    """Gives the folder back, if there is one; the id of its run stays there."""
    global _lock, _folder, _id
    if _folder is not None:
        record = read_record(_folder)
        with contextlib.suppress(OSError):  # the folder may be gone
            if record.get("pid") == os.getpid():
                kept = ("id", "from", "environment")
                _write_record({name: record[name] for name in kept if name in record})
        if _lock.is_locked:
            _lock.release(force=True)
    _lock = _folder = _id = None


def _ourselves() -> dict:
    """What tells this process from others; of a SLURM job also which of its starts this is."""
    job = {name.lower(): os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")}
    known = {name: value for name, value in job.items() if value is not None}
    return {"host": socket.gethostname(), "pid": os.getpid(), **known}


def _take(lock: filelock.FileLock, folder: Path) -> bool:
    """Whether the folder is now ours."""
    try:
        lock.acquire(timeout=0)
        return True
    except filelock.Timeout:
        return False
    except (OSError, NotImplementedError):  # no locks here
        if _works(read_record(folder)):
            return False
        with contextlib.suppress(OSError):
            _write_record({**read_record(folder), **_ourselves()}, folder)
        time.sleep(_SETTLE)  # of two that come at once, the one that wrote last has it
        return read_record(folder).items() >= _ourselves().items()


def _works(owner: dict) -> bool:
    """Whether the process of a record may still be there; of another machine that is not known."""
    own = _ourselves()
    job, start = (owner.get(name) for name in ("slurm_job_id", "slurm_restart_count"))
    if job and job == own.get("slurm_job_id") and start != own.get("slurm_restart_count"):
        return False  # SLURM ends a start of a job before the next
    if owner.get("host") != own["host"]:
        return "host" in owner
    if os.name == "nt":  # has locks everywhere, and no way to ask for a process without harm
        return True
    try:
        os.kill(owner.get("pid"), 0)
    except PermissionError:
        return True
    except (OSError, TypeError, OverflowError):
        return False
    return owner["pid"] != os.getpid()


def is_at_work(folder: str | os.PathLike) -> bool:
    """Whether another process may be making its run in a folder; the lock, to be asked, would be taken."""
    return _works(read_record(folder))


def environment() -> str:
    """Python, packages and machine that a run has, in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "numpy"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"Python {platform.python_version()}, {packages}; {platform.platform()}, {gpu}"


def _owner_in_words(folder: Path) -> str:
    owner = read_record(folder)
    if "pid" not in owner:
        return "another run"
    return printable(f"another run (process {owner['pid']} on {owner.get('host')})")


def read_record(folder: str | os.PathLike) -> dict:
    """What `.run.json` says; {} where there is none, or no sense in it."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(Path(folder, ".run.json").read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return {name: value for name, value in record.items() if name == "pid" or isinstance(value, str)}
    return {}


def _write_record(record: dict, folder: Path | None = None) -> None:
    with replacing((folder or _folder) / ".run.json") as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")


def run_id(output_dir: str | os.PathLike | None) -> str | None:
    """Id of the run that this process makes in a folder; None where it makes none there."""
    return _id if output_dir and _folder == Path(os.path.abspath(output_dir)) else None


def begin(source: str | None, content: dict, anew: bool) -> str | None:
    """Says in the claimed folder which run is made there from now on, and returns its id.

    A run that goes on keeps its id, but not where it goes back behind checkpoints of its own in the folder:
    from there on it is another run, whose furthest checkpoint would else be one of the old.

    Args:
        source: file or URL that it goes on from; None: from nothing.
        content: of that. anew: of `source` None: also the id is a new one.

    Raises:
        UserError: the folder cannot be written.
    """
    global _id
    if _folder is None:
        return None
    _id = id_of(content) if source else None if anew else read_record(_folder).get("id")
    if _id and source:  # another run begins where this one has gone further
        behind = (path for path in list_checkpoints(_folder) if position_in_name(path) > position_of(content))
        _id = None if any(id_at(path) == _id for path in behind) else _id
    _id = _id or uuid.uuid4().hex
    record = {"id": _id, "environment": environment(), **_ourselves()}
    if source and "://" not in source:
        path = Path(os.path.abspath(source))
        inside = path.parent == _folder  # by its name alone, so that both can be moved
        source = None if inside and id_of(content) == _id else path.name if inside else str(path)
    record |= {"from": source} if source else {}
    try:
        _write_record(record)
    except OSError as error:  # else the checkpoints to come would count as those of the run before
        where = f"--output_dir {_folder}: .run.json"
        raise UserError(f"{where} cannot be written ({error.strerror})") from None
    return _id


def id_of(content: dict) -> str | None:
    """Id of the run that has written a checkpoint's content; None where it says none."""
    run = content.get("run")
    value = run.get("id") if isinstance(run, dict) else None
    return value if isinstance(value, str) else None


def position_of(content: dict) -> tuple[int, int]:
    """(complete epochs, micro-steps of the next) of a checkpoint's content; (0, 0) where it says none."""
    numbers = content.get("epoch", -1), content.get("step", 0)
    return (numbers[0] + 1, numbers[1]) if all(type(n) is int for n in numbers) else (0, 0)


def id_at(path: Path) -> str | None:
    """Id of the run that has written a file, without reading its tensors; "" where it cannot be read."""
    try:
        info = path.stat()
    except OSError:
        return ""
    return _peek(str(path), info.st_size, info.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _peek(path: str, size: int, time_ns: int) -> str | None:
    try:
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever is in the file
        return ""
    return id_of(content) if isinstance(content, dict) else ""
