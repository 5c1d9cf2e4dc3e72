"""Images per second out of tars on a web server that waits before each answer, as stores far away do.

    python benchmarks/bench_store.py --wait 20
    python benchmarks/bench_store.py --wait 20 --workers 2 --read_only    what the store and the reading allow

Packs drawn JPEGs of 10 classes into tars with tools/make_shards.py, serves them on loopback, and goes through
epochs in the orders `full` and `near`, which take turns. Also says how far the classes in their batches are
from chance: the mean over batches of chi-square's statistic by its degrees of freedom, 1 for drawn ones.
Target: `near` at least 5 times `full`; the exit code is 1 when it is missed.
"""

import argparse
import http.server
import os
import re
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from harness import Parser, finish, paired_ratio, positive, print_table, run_benchmark, say, take_turns
from workload import draw_pictures

from tools import make_shards
from util.data.dataset import build_pretrain_dataset
from util.data.loader import build_loader
from util.data.sampler import EpochSampler
from util.run.start import near_places

TARGET, CLASSES, DRAWN = 5, 10, 100


def serve(folder: Path, wait: float) -> tuple[str, list[int]]:
    """(address, bytes of each answer so far) of a server of the files in `folder`."""
    answers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(wait)
            start, stop = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            path = folder / self.path.strip("/")
            with open(path, "rb") as file:
                file.seek(start)
                part = file.read(stop + 1 - start)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop}/{path.stat().st_size}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)
            answers.append(len(part))

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}", answers


def make_loader(args: argparse.Namespace, dataset, shuffle: str) -> torch.utils.data.DataLoader:
    near = near_places(dataset) if shuffle == "near" else None
    sampler = EpochSampler(len(dataset), batch_size=args.batch_size, near=near)
    return build_loader(dataset, sampler, args.batch_size, args.workers, drop_last=True)


def read_only(path: str, draws: list) -> list[torch.Tensor]:
    """Stands for `ImageDataset.read`: the bytes come, nothing is decoded."""
    path.open().read()
    return [torch.zeros(3, 1, 1, dtype=torch.uint8)] * len(draws)


def time_epoch(loader: torch.utils.data.DataLoader) -> float:
    """Seconds per image of an epoch, from its first batch on."""
    loader.sampler.set_epoch(loader.sampler.epoch + 1)
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    count = sum(len(images) for images, *_ in batches)
    return (time.perf_counter() - start) / count


def class_mix(loader: torch.utils.data.DataLoader, labels: np.ndarray, epochs: int = 20) -> float:
    """Chi-square of the classes in a batch by its degrees of freedom, on average; 1 where they are drawn."""
    share, values = np.bincount(labels) / len(labels), []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        order = np.array([index for _, index in loader.sampler]).reshape(-1, loader.batch_size)
        for batch in order:
            expected = share * len(batch)
            counts = np.bincount(labels[batch], minlength=len(share))
            values.append((np.square(counts - expected) / expected).sum() / (len(share) - 1))
    return float(np.mean(values))


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        (folder / "drawn").mkdir()
        draw_pictures(folder / "drawn", DRAWN)
        for number in range(args.images):
            path = folder / "set" / f"c{number % CLASSES}" / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / "drawn" / f"{number % DRAWN:04d}.jpg", path)
        words = [str(folder / "set"), str(folder / "tars"), "--images", str(args.images // args.tars)]
        make_shards.main(make_shards.get_args_parser().parse_args(words))
        address, answers = serve(folder / "tars", args.wait / 1000)
        files = argparse.Namespace(data_path=f"{address}/{{00000..{args.tars - 1:05d}}}.tar", input_size=224)
        start = time.perf_counter()
        dataset = build_pretrain_dataset(files)
        say(f"{dataset.describe()}: listed in {time.perf_counter() - start:.1f} s, {len(answers)} requests")
        if args.read_only:
            dataset.read = read_only
        loaders = {shuffle: make_loader(args, dataset, shuffle) for shuffle in ("full", "near")}
        ways = {shuffle: partial(time_epoch, loader) for shuffle, loader in loaders.items()}
        rounds = take_turns(args.rounds, ways)
        ratio = paired_ratio(rounds["full"], rounds["near"])
        mix = {shuffle: class_mix(loader, dataset.files.labels) for shuffle, loader in loaders.items()}
    rows = {shuffle: 1 / float(np.median(seconds)) for shuffle, seconds in rounds.items()}
    lines = ((shuffle, f"{rate:.0f}", f"{mix[shuffle]:.3f}") for shuffle, rate in rows.items())
    print_table(["order", "images/s", "mix"], lines, name=10)
    say(f"near against full: {ratio:.1f} x; target {TARGET}: {'met' if ratio >= TARGET else 'MISSED'}")
    return finish(args, {"images_per_second": rows, "ratio": ratio, "mix": mix}, ratio >= TARGET)


if __name__ == "__main__":
    parser = Parser(__doc__, images=1280, rounds=3, batch_size=64)
    parser.add_argument("--wait", default=20, type=positive(or_zero=True), help="ms before each answer")
    parser.add_argument("--tars", default=8, type=positive())
    parser.add_argument("--workers", default=1, type=positive(or_zero=True))
    parser.add_argument("--read_only", action="store_true", help="images are read and not decoded")
    run_benchmark(main, parser)
