"""The built-in demo set: drawn pictures as JPEG files in an ImageFolder, made when first needed.

2,000 training and 500 validation pictures of 10 classes, drawn by `scene.py`: the same bytes each
time with the same NumPy and Pillow. `python -m util.demo_set.files [DIR]` makes the set by hand.
"""

import argparse
import contextlib
import glob
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from util.cli.parser import ArgumentParser, run_script
from util.console import say
from util.errors import UserError
from util.sizes import default_workers

REPOSITORY = Path(__file__).resolve().parents[2]
VERSION = 1  # raise it when the drawing code changes: sets of another version are made again
CLASSES = ("ball", "fish", "gear", "house", "leaf", "ring", "spiral", "star", "tree", "wheel")
TRAIN, VAL = 200, 50  # pictures per class
STAMP = ".mae_demo_set.json"
OLD_AFTER_S = 3600  # age of a left-over work folder that no living process can own
SHIPPED = REPOSITORY / "demo" / "shipped"  # a small model of this set, and pictures that it has not seen


def demo_root() -> Path:
    """Folder of the demo set: the environment variable MAE_DEMO_DATA, else `demo_data` in the repository."""
    return Path(os.environ.get("MAE_DEMO_DATA") or REPOSITORY / "demo_data").expanduser()


def announce_demo_data(root, log: Callable[[str], None]) -> None:
    """Logs the one line that says which data is used and how to use one's own."""
    log(
        f"no --data_path given: using the demo set of drawn pictures in {root}; for your own: --data_path DIR"
    )


def ensure_demo_data(root=None, log=None, train=TRAIN, val=VAL, workers=None) -> Path:
    """Path of the complete demo set, an ImageFolder root with `train` and `val`; makes it where it is not.

    It is drawn in a work folder beside `root` and renamed when complete: a run that was killed leaves no half
    set, and runs that start together all end with a good one (with locks, they wait for the first).

    root: folder of the set, default `demo_root()`; log: called with one line before the drawing starts;
    train, val: pictures per class; workers: processes, default one per usable core, at most 8.
    Raises UserError if `root` holds something else, or cannot be written.
    """
    root = Path(root or demo_root()).expanduser().resolve()
    stamp = {"version": VERSION, "train": train, "val": val, "classes": list(CLASSES)}
    if is_complete(root, stamp):
        return root
    advice = "set MAE_DEMO_DATA to another folder, or give your own pictures with --data_path DIR"
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with only_one(root) as locked:
            if is_complete(root, stamp):
                return root
            if root.exists() and not is_ours(root):
                raise UserError(f"no room for the demo set: {root} exists and holds something else; {advice}")
            remove_leftovers(root, locked)
            if log is not None:
                count = len(CLASSES) * (train + val)
                log(f"making the demo set in {root}: {count} pictures, once; this takes about half a minute")
            make(root, stamp, workers or min(8, default_workers(1)))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot make the demo set in {root}: {reason}; {advice}") from error
    return root


def make(root: Path, stamp: dict, workers: int) -> None:
    """Draws the set in a work folder beside `root` and renames it to `root`, in place of an older one."""
    work, old = (root.with_name(f"{root.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp") for _ in range(2))
    try:
        for split in ("train", "val"):
            for name in CLASSES:
                (work / split / name).mkdir(parents=True)
        draw_all(work, stamp["train"], stamp["val"], workers)
        (work / STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
        if not is_complete(work, stamp):
            raise OSError(f"pictures vanished from {work}")
        if is_complete(root, stamp):
            return
        if root.exists():
            os.rename(root, old)
        try:
            os.rename(work, root)
        except OSError:  # another process, on a system without locks, was first
            if not is_complete(root, stamp):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def is_complete(root: Path, stamp: dict) -> bool:
    """Whether `root` is a demo set of just this stamp with all its pictures there."""
    try:
        if json.loads((root / STAMP).read_text(encoding="utf-8")) != stamp:
            return False
        for split in ("train", "val"):
            for name in stamp["classes"]:
                with os.scandir(root / split / name) as entries:
                    if sum(entry.stat().st_size > 0 for entry in entries) < stamp[split]:
                        return False
    except (OSError, ValueError):
        return False
    return True


def is_ours(root: Path) -> bool:
    """Whether `root` may be replaced: a demo set, of whatever version, or an empty folder."""
    return root.is_dir() and ((root / STAMP).is_file() or not any(root.iterdir()))


def remove_leftovers(root: Path, locked: bool) -> None:
    """Removes the work folders of killed runs; without the lock, only those too old to be still in use."""
    for path in root.parent.glob(f"{glob.escape(root.name)}.*-????????.tmp"):
        if locked or time.time() - path.stat().st_mtime > OLD_AFTER_S:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def only_one(root: Path, patience_s: float = 120.0) -> Iterator[bool]:
    """Waits until no other process makes the set in `root`; yields False if there is no lock to be had.

    The lock ends with the process that holds it, however that ends.
    """
    import filelock  # only needed once

    path = root.with_name(f"{root.name}.lock")
    lock = filelock.FileLock(path)
    with contextlib.suppress(OSError, NotImplementedError):  # no more patience; a file system without locks
        lock.acquire(patience_s, poll_interval=0.2)
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                path.unlink()
            lock.release()


def draw_all(folder: Path, train: int, val: int, workers: int) -> None:
    """Draws all pictures into `folder` in `workers` processes; this one redoes what any failed at.

    They are fresh interpreters of this module alone: forked ones could inherit locks of torch's threads,
    spawned ones would import the main script, and a daemonic process may have neither.
    """
    if workers < 2 or not sys.executable:
        return draw(folder, train, val)
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-m", "util.demo_set.files", str(folder), "--counts", str(train), str(val)]
    running = {}
    try:
        for i in range(workers):
            with contextlib.suppress(OSError):  # no process to be had: its share is drawn below
                share = [*command, "--shard", str(i), str(workers)]
                running[i] = subprocess.Popen(share, env=environment, cwd=folder, **quiet)
        good = {i for i, process in running.items() if process.wait() == 0}
    finally:
        for process in running.values():
            if process.poll() is None:
                process.kill()
                process.wait()
    for i in set(range(workers)) - good:
        draw(folder, train, val, i, workers)


def draw(
    folder: Path, train: int, val: int, shard: int = 0, shards: int = 1, parent: int | None = None
) -> None:
    """Draws every `shards`-th picture, from number `shard` on: `folder/split/class/class_0000.jpg`.

    A picture depends on its split, class and number only. Stops if `parent` is no longer the parent process.
    """
    import numpy as np

    from util.demo_set.scene import encode, render  # whoever only needs the folder need not load the painter

    keys = [
        (s, c, n) for s, count in enumerate((train, val)) for c in range(len(CLASSES)) for n in range(count)
    ]
    for split, label, number in keys[shard::shards]:
        if parent is not None and os.getppid() != parent:
            return
        rng, name = np.random.default_rng([VERSION, split, label, number]), CLASSES[label]
        path = folder / ("train", "val")[split] / name / f"{name}_{number:04d}.jpg"
        path.write_bytes(encode(render(name, rng), rng))


def main(args: argparse.Namespace) -> None:
    """Makes the set, or draws one share of it."""
    if args.shard:
        return draw(Path(args.root), *args.counts, *args.shard, parent=os.getppid())
    start = time.monotonic()
    root = ensure_demo_data(args.root, say, *args.counts)
    say(f"the demo set is in {root} ({time.monotonic() - start:.1f} s)")


if __name__ == "__main__":
    parser = ArgumentParser(
        "python -m util.demo_set.files", description="Makes the demo set where it is not there yet."
    )
    parser.add_argument("root", nargs="?", metavar="DIR", help="default: MAE_DEMO_DATA, else demo_data")
    parser.add_argument("--counts", nargs=2, type=int, default=(TRAIN, VAL), metavar=("TRAIN", "VAL"),
                        help="pictures per class")  # fmt: skip
    parser.add_argument("--shard", nargs=2, type=int, help=argparse.SUPPRESS)
    run_script(main, parser)
