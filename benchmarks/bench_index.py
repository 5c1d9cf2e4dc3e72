"""Start and memory with very many images: how long listing and looking at them takes, and what the main
process and the loader's workers hold, at the start and at the end of an epoch.

    python benchmarks/bench_index.py --files 1000000 --json index.json

Makes folders of files with ImageNet's names that hold a JPEG's first bytes (`--place` says where; they are
removed afterwards), and lists and looks at them in a new process. That goes through a whole epoch of its
training loader, where reading and decoding are replaced by reading the file's name and giving back a small
picture. The same with 1,000 files is what memory is compared with. With `--archives N` the images lie in N
tars, and are listed twice, as the first time makes the table that the second one finds.
Targets for a million: below 400 MB more for each process; of archives below 60 MB, and opened again within
0.5 s. The exit code is 1 when one is missed.
"""

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from harness import Parser, positive, run_benchmark, say

from util.errors import UserError

TARGET_MB, ARCHIVES_MB, ARCHIVES_S = 400, 60, 0.5
JPEG_HEAD = b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(22)


def make_files(root: Path, count: int, folders: int) -> None:
    """`count` files with the names of ImageNet's, evenly in `folders` class folders of `root`/train.

    Those of a folder are links to one file, which takes less space and time to make.
    """
    for folder in range(folders):
        path = root / "train" / f"n{folder:08d}"
        path.mkdir(parents=True)
        first, *others = range(count * folder // folders, count * (folder + 1) // folders)
        (path / f"{path.name}_{first}.JPEG").write_bytes(JPEG_HEAD)
        for number in others:
            os.link(path / f"{path.name}_{first}.JPEG", path / f"{path.name}_{number}.JPEG")


def make_archives(root: Path, count: int, folders: int, archives: int) -> None:
    """The same images in tars, every `archives`-th image in each."""
    root.mkdir()
    for archive in range(archives):
        with tarfile.open(root / f"{archive:03d}.tar", "w") as tar:
            for number in range(archive, count, archives):
                folder = f"n{number * folders // count:08d}"
                info = tarfile.TarInfo(f"train/{folder}/{folder}_{number}.JPEG")
                info.size = len(JPEG_HEAD)
                tar.addfile(info, io.BytesIO(JPEG_HEAD))


def memory(pids: list[int]) -> list[float]:
    """Resident MB of each process, what it shares with others counted in full."""
    lines = (Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:] for pid in pids)
    return [int(next(line.split()[1] for line in part if line.startswith("Rss:"))) / 1024 for part in lines]


def measure(options: argparse.Namespace) -> dict:
    """What one process sees that lists the folder and goes through an epoch. Runs in a process of its own."""
    import torch

    from util.data import dataset, folders
    from util.data.loader import build_loader
    from util.data.sampler import EpochSampler

    torch.set_num_threads(1)
    seconds, start = {}, time.perf_counter()
    if not options.archives:
        folders.list_folders(os.path.join(options.folder, "train"))
    seconds["list"] = time.perf_counter() - start
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    dataset.ImageDataset.read = lambda self, path, draws: [picture]

    start = time.perf_counter()
    dataset = dataset.build_pretrain_dataset(argparse.Namespace(data_path=options.folder, input_size=8))
    seconds["list and look at the headers"] = time.perf_counter() - start
    sampler = EpochSampler(len(dataset), batch_size=options.batch_size)
    loader = build_loader(dataset, sampler, options.batch_size, options.workers, drop_last=True)
    batches = iter(loader)
    next(batches)
    seconds["until the first batch"] = time.perf_counter() - start
    pids = [os.getpid(), *(worker.pid for worker in getattr(batches, "_workers", []))]
    before = after = memory(pids)
    for number, _ in enumerate(batches, 2):
        if number == len(loader):
            after = memory(pids)
    return {"files": len(dataset), "seconds": seconds, "start": before, "end": after}


def start_process(options: argparse.Namespace, folder: Path) -> dict:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--folder", str(folder)]
    for name in ("files", "workers", "batch_size", "archives"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder.parent / "cache")}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def report(few: dict, many: dict, archives: int) -> bool:
    """Prints the table; returns whether the targets are met."""
    say(f"\n{'files':>10s}{'listing':>11s}{'+ headers':>11s}{'first batch':>13s}  MB: main, workers")
    for result in (few, many):
        times = "".join(f"{value:9.2f} s " for value in result["seconds"].values())
        sizes = (" ".join(f"{value:.0f}" for value in result[moment]) for moment in ("start", "end"))
        say(f"{result['files']:10,d}{times}     at the start: {next(sizes)}, at the end: {next(sizes)}")
    pairs = (zip(many[moment], few[moment], strict=True) for moment in ("start", "end"))
    worst = max(more - less for part in pairs for more, less in part)
    target, opened = ARCHIVES_MB if archives else TARGET_MB, many["seconds"]["list and look at the headers"]
    met = worst < target and (not archives or opened < ARCHIVES_S)
    told = f" and opening again within {ARCHIVES_S} s" if archives else ""
    say(f"at most {worst:.0f} MB more than with few files")
    say(f"target {target} MB{told}: {'met' if met else 'MISSED'}")
    return met


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__, workers=2, batch_size=256)
    parser.add_argument("--files", default=1_000_000, type=positive())
    parser.add_argument("--folders", default=1000, type=positive(), help="class folders that they lie in")
    parser.add_argument("--archives", default=0, type=positive(or_zero=True), help="tars instead of folders")
    parser.add_argument("--place", help="where to make them (default: the folder for temporary files)")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # to be measured
    return parser


def main(options: argparse.Namespace) -> int:
    if options.files < options.folders:
        raise UserError(f"--files {options.files}: must be at least --folders {options.folders}")
    if options.folder:
        say(json.dumps(measure(options)))
        return 0
    place = Path(tempfile.mkdtemp(prefix="bench_index-", dir=options.place))
    try:
        few, many = place / "few", place / "many"
        start = time.perf_counter()
        for folder, count, classes in ((few, 1000, 10), (many, options.files, options.folders)):
            if options.archives:
                make_archives(folder, count, classes, options.archives)
            else:
                make_files(folder, count, classes)
        say(f"{options.files:,} files made in {time.perf_counter() - start:.0f} s")
        if options.archives:  # the first time makes the table
            start_process(options, many)
        results = [start_process(options, folder) for folder in (few, many)]
    finally:
        shutil.rmtree(place)
    met = report(*results, options.archives)
    if options.json:
        machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        content = {"settings": {**vars(options), "machine": machine}, "few": results[0], "many": results[1]}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    run_benchmark(main, get_args_parser())
