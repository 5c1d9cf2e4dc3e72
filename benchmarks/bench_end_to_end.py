"""From JPEG files to the optimizer's step, against the same step on batches that lie in memory.

    python benchmarks/bench_end_to_end.py --json end_to_end.json
    python benchmarks/bench_end_to_end.py --models mae_vit_base_patch16 --workers 16 --batch_size 256

Runs `engine_pretrain.train_one_epoch` itself with the loader that main_pretrain.py builds, on JPEGs of about
500 x 400 px that it draws (or `--data_path`; the files are in the page cache), then with one batch of the
same shape again and again. The two, for each model, take turns; medians, and ratios within a round. Before a
segment is timed, its loader has used up what its workers had prepared. `data wait` is the share of time in
which the loop's thread waited for the loader; on a GPU it may wait there while the GPU is still busy, so the
ratio is what counts. Targets, on one H100 with 16 cores: ViT-L 98 %, ViT-B 90 %.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from harness import Parser, finish, median_of, paired_ratio, print_table, run_benchmark, say, take_turns
from timm.optim import param_groups_weight_decay
from workload import Repeated, draw_pictures, noise_batch, pretrain_args, synchronize

import main_pretrain
from engine_pretrain import train_one_epoch
from util.compute import precision
from util.compute.compile import compile_model
from util.data.dataset import build_pretrain_dataset
from util.data.loader import build_loader
from util.data.sampler import EpochSampler

TARGETS = {"mae_vit_large_patch16": 98, "mae_vit_base_patch16": 90}  # per cent, on an H100 with 16 cores


class Segment:
    """A loader of `warm` + `steps` batches of an endless iterator; the clock runs after the first `warm`."""

    def __init__(self, batches: Iterator, warm: int, steps: int, batch_size: int, device: torch.device):
        self.batches, self.warm, self.steps, self.batch_size = batches, warm, steps, batch_size
        self.device, self.start, self.waited = device, 0.0, 0.0

    def __len__(self) -> int:
        return self.warm + self.steps

    def __iter__(self) -> Iterator:
        for number in range(len(self)):
            if number == self.warm:
                synchronize(self.device)
                self.start = time.perf_counter()
            before = time.perf_counter()
            batch = next(self.batches)
            self.waited += time.perf_counter() - before if number >= self.warm else 0
            yield batch

    def figures(self) -> dict[str, float]:
        """Of the timed part, which ends now: images/s, and per cent of time spent waiting for batches."""
        synchronize(self.device)
        seconds = time.perf_counter() - self.start
        # On CUDA a batch is fetched one step ahead: when the clock starts, step warm - 1 has yet to come
        steps = self.steps + (self.device.type == "cuda")
        rate = steps * self.batch_size / seconds
        return {"images_per_s": rate, "data_wait_percent": 100 * self.waited / seconds}


def endless(loader) -> Iterator:
    """The loader's batches, epoch after epoch."""
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def make_run(args: argparse.Namespace, device: torch.device) -> Callable:
    """`run(batches, warm, steps)` trains `args.model` as main_pretrain.py does; a segment's figures."""
    model = main_pretrain.build_model(args).to(device)
    compile_model(model, "forward", args, device)
    groups = param_groups_weight_decay(model, args.weight_decay)
    fused = precision.has_fused_adamw(device)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=fused)
    fp16 = precision.resolve_amp_dtype(args.amp_dtype, device) == torch.float16
    scaler = precision.NativeScalerWithGradNormCount(fp16, device=device.type)

    def run(batches: Iterator, warm: int, steps: int) -> dict[str, float]:
        segment = Segment(batches, warm, steps, args.batch_size, device)
        train_one_epoch(model, segment, optimizer, device, 0, scaler, None, args)
        return segment.figures()

    return run


def measure(options: argparse.Namespace, args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    """{model: {source: figures of each round}}; prints each model's table when it is there."""
    dataset = build_pretrain_dataset(args)
    dataset = Repeated(dataset, max(1, 100 * args.batch_size * max(1, args.num_workers) // len(dataset)))
    sampler = EpochSampler(len(dataset), seed=0, batch_size=args.batch_size)
    pin = device.type == "cuda"
    loader = build_loader(dataset, sampler, args.batch_size, args.num_workers, pin, drop_last=True)
    ahead = args.num_workers * (loader.prefetch_factor or 0)  # batches
    images, *numbers = noise_batch((args.batch_size, args.input_size, args.input_size, 3), pin)
    in_memory = itertools.repeat([images.permute(0, 3, 1, 2), *numbers])  # as the loader gives them
    files, results = endless(loader), {}
    next(files)
    for name in options.models:
        run = make_run(argparse.Namespace(**{**vars(args), "model": name}), device)
        run(in_memory, 2, 2)  # compiles
        sources = {"JPEG files": (files, 2 + ahead), "in memory": (in_memory, 2)}
        ways = {source: partial(run, *of, options.steps) for source, of in sources.items()}
        results[name] = {"rounds": take_turns(options.rounds, ways)}
        results[name]["percent_of_in_memory"] = report(name, results[name]["rounds"])
        del run, ways  # the model, before the next one is made
    return results


def report(name: str, rounds: dict[str, list]) -> float:
    """Prints a model's table; returns its share of the speed on batches in memory, in per cent."""
    speeds = {source: [r["images_per_s"] for r in figures] for source, figures in rounds.items()}
    shares = {source: 100 * paired_ratio(speed, speeds["in memory"]) for source, speed in speeds.items()}
    rows = [
        (f"{name}, {source}", f"{median_of(figures, 'images_per_s'):.1f}",
         f"{median_of(figures, 'data_wait_percent'):.1f} %", f"{shares[source]:.1f} %")
        for source, figures in rounds.items()
    ]  # fmt: skip
    say()
    print_table(["", "images/s", "data wait", "of in memory"], rows, width=14)
    if name in TARGETS:
        say(f"{name}: {shares['JPEG files']:.1f} %; target on an H100 with 16 cores: {TARGETS[name]} %")
    return shares["JPEG files"]


def main(options: argparse.Namespace) -> int:
    on_gpu = precision.resolve_device(options.device, 0).type == "cuda"
    options.models = options.models or ["mae_vit_base_patch16", "mae_vit_large_patch16"][: 1 + on_gpu]
    for name, gpu, cpu in (("batch_size", 256, 16), ("steps", 60, 8), ("rounds", 5, 3)):
        setattr(options, name, getattr(options, name) or (gpu if on_gpu else cpu))
    flags = ["--norm_pix_loss", "--print_freq", "1000000", *options.flags.split()]
    flags += ["--no_compile"] * options.no_compile
    flags += [] if options.workers is None else ["--num_workers", str(options.workers)]
    args = pretrain_args(options, *flags, names=["input_size", "batch_size", "device"])
    device, args.data_path = torch.device(args.device), options.data_path
    computed_in = precision.prepare_device(device, precision.resolve_amp_dtype(args.amp_dtype, device))
    say(f"{computed_in}; {args.num_workers} workers; {options.rounds} rounds of {options.steps} steps")
    with tempfile.TemporaryDirectory() as folder:
        if args.data_path is None:
            args.data_path = folder
            draw_pictures(Path(folder), options.images)
        results = measure(options, args, device)
    return finish(options, results)


if __name__ == "__main__":
    parser = Parser(
        __doc__, input_size=224, batch_size=(None, "default: 256, on CPU 16"), device="auto",
        workers=(None, "default: main_pretrain.py's"), rounds=(None, "default: 5, on CPU 3"),
        steps=(None, "timed steps of a segment (default: 60, on CPU 8)"), images=(512, "how many are drawn"),
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=main_pretrain.models_mae.MODELS, metavar="MODEL",
                        help="default: ViT-B and ViT-L; on CPU ViT-B")  # fmt: skip
    parser.add_argument("--data_path", help="your own images (default: drawn ones)")
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--flags", default="", help="further flags of main_pretrain.py, in one string")
    run_benchmark(main, parser)
