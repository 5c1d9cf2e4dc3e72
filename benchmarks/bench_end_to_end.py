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
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_loader import Repeated, draw_pictures
from harness import run_benchmark
from timm.optim import param_groups_weight_decay

import main_pretrain
from engine_pretrain import train_one_epoch
from util.cli.parser import ArgumentParser
from util.compute.compile import compile_model
from util.compute.precision import (
    NativeScalerWithGradNormCount,
    has_fused_adamw,
    prepare_device,
    resolve_amp_dtype,
    resolve_device,
)
from util.data.dataset import build_pretrain_dataset
from util.data.loader import build_loader
from util.data.sampler import EpochSampler
from util.data.transforms import channel_stats

TARGETS = {"mae_vit_large_patch16": 98, "mae_vit_base_patch16": 90}  # per cent, on an H100 with 16 cores


class Segment:
    """A loader of `warm` + `steps` batches out of an endless iterator; the clock runs after the first
    `warm`.
    """

    def __init__(self, batches: Iterator, warm: int, steps: int, batch_size: int, device: torch.device):
        self.batches, self.warm, self.steps, self.batch_size = batches, warm, steps, batch_size
        self.device, self.start, self.waited = device, 0.0, 0.0

    def __len__(self) -> int:
        return self.warm + self.steps

    def __iter__(self) -> Iterator:
        for number in range(len(self)):
            if number == self.warm:
                self.synchronize()
                self.start = time.perf_counter()
            before = time.perf_counter()
            batch = next(self.batches)
            self.waited += time.perf_counter() - before if number >= self.warm else 0
            yield batch

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def figures(self) -> dict[str, float]:
        """Of the timed part, which ends now: images/s, and per cent of time spent waiting for batches."""
        self.synchronize()
        seconds = time.perf_counter() - self.start
        # On CUDA a batch is fetched one step ahead: when the clock starts, step warm - 1 has yet to come
        steps = self.steps + (self.device.type == "cuda")
        return {
            "images_per_s": steps * self.batch_size / seconds,
            "data_wait_percent": 100 * self.waited / seconds,
        }


def endless(loader) -> Iterator:
    """The loader's batches, epoch after epoch."""
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def synthetic(args: argparse.Namespace, pin: bool) -> Iterator:
    """One batch of noise in memory, as the loader would give it, again and again."""
    shape = (args.batch_size, args.input_size, args.input_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    numbers = torch.arange(args.batch_size)
    batch = [tensor.pin_memory() if pin else tensor for tensor in (images, numbers, numbers)]
    while True:
        yield batch


class Model:
    """What trains, with main_pretrain.py's settings."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.model = main_pretrain.build_model(args).to(device)
        compile_model(self.model, "forward", args, device)
        groups = param_groups_weight_decay(self.model, args.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=has_fused_adamw(device))
        amp_dtype = resolve_amp_dtype(args.amp_dtype, device)
        self.scaler = NativeScalerWithGradNormCount(amp_dtype == torch.float16, device=device.type)

    def run(self, batches: Iterator, warm: int, steps: int) -> dict[str, float]:
        segment = Segment(batches, warm, steps, self.args.batch_size, self.device)
        train_one_epoch(self.model, segment, self.optimizer, self.device, 0, self.scaler, None, self.args)
        return segment.figures()


def measure(options: argparse.Namespace, args: argparse.Namespace, device: torch.device) -> dict[str, list]:
    """{"model, source": figures of each round}."""
    dataset = build_pretrain_dataset(args)
    dataset = Repeated(dataset, max(1, 100 * args.batch_size * max(1, args.num_workers) // len(dataset)))
    sampler = EpochSampler(len(dataset), seed=0, batch_size=args.batch_size)
    pin = device.type == "cuda"
    loader = build_loader(dataset, sampler, args.batch_size, args.num_workers, pin, drop_last=True)
    ahead = args.num_workers * (loader.prefetch_factor or 0)  # batches
    sources = {"JPEG files": endless(loader), "in memory": synthetic(args, pin)}
    next(sources["JPEG files"])
    models = {}
    for name in options.models:
        models[name] = Model(argparse.Namespace(**{**vars(args), "model": name}), device)
        models[name].run(sources["in memory"], 2, 2)  # compiles
    results = {f"{name}, {source}": [] for name in models for source in sources}
    for _ in range(options.rounds):
        for name, model in models.items():
            for source, batches in sources.items():
                warm = 2 + (ahead if source == "JPEG files" else 0)
                results[f"{name}, {source}"].append(model.run(batches, warm, options.steps))
    return results


def report(results: dict[str, list], options: argparse.Namespace) -> dict[str, float]:
    """Prints the table; returns each model's share of the speed on batches in memory, in per cent."""
    print(f"\n{'':44s}{'images/s':>12s}{'data wait':>12s}{'of in memory':>14s}")
    shares = {}
    for name, rounds in results.items():
        model, source = name.rsplit(", ", 1)
        pairs = zip(rounds, results[f"{model}, in memory"], strict=True)
        share = statistics.median(100 * a["images_per_s"] / b["images_per_s"] for a, b in pairs)
        speed, wait = (statistics.median(r[k] for r in rounds) for k in ("images_per_s", "data_wait_percent"))
        print(f"{name:44s}{speed:12.1f}{wait:10.1f} %{share:12.1f} %")
        if source == "JPEG files":
            shares[model] = share
    for model in options.models:
        if model in TARGETS:
            print(f"{model}: {shares[model]:.1f} %; target on an H100 with 16 cores: {TARGETS[model]} %")
    return shares


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=main_pretrain.models_mae.MODELS, metavar="MODEL",
                        help="default: ViT-B and ViT-L; on CPU ViT-B")  # fmt: skip
    parser.add_argument("--data_path", help="your own images (default: drawn ones)")
    parser.add_argument("--images", default=512, type=int, help="how many are drawn")
    parser.add_argument("--input_size", default=224, type=int)
    parser.add_argument("--batch_size", type=int, help="default: 256, on CPU 16")
    parser.add_argument("--workers", type=int, help="default: main_pretrain.py's")
    parser.add_argument("--steps", type=int, help="timed steps of a segment (default: 60, on CPU 8)")
    parser.add_argument("--rounds", type=int, help="default: 5, on CPU 3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--flags", default="", help="further flags of main_pretrain.py, in one string")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    return parser


def main(options: argparse.Namespace) -> None:
    device = resolve_device(options.device, 0)
    on_gpu = device.type == "cuda"
    options.models = options.models or ["mae_vit_base_patch16", "mae_vit_large_patch16"][: 1 + on_gpu]
    for name, gpu, cpu in (("batch_size", 256, 16), ("steps", 60, 8), ("rounds", 5, 3)):
        if getattr(options, name) is None:
            setattr(options, name, gpu if on_gpu else cpu)
    flags = ["--input_size", str(options.input_size), "--batch_size", str(options.batch_size)]
    flags += ["--device", str(device), "--norm_pix_loss", "--print_freq", "1000000"]
    flags += ["--no_compile"] * options.no_compile + options.flags.split()
    flags += [] if options.workers is None else ["--num_workers", str(options.workers)]
    args = ArgumentParser(parents=[main_pretrain.get_args_parser()]).parse_args(flags)
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)
    args.distributed, args.lr, args.data_path = False, 1e-4, options.data_path
    precision = prepare_device(device, resolve_amp_dtype(args.amp_dtype, device))
    with tempfile.TemporaryDirectory() as folder:
        if args.data_path is None:
            args.data_path = folder
            draw_pictures(Path(folder), options.images)
        results = measure(options, args, device)
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    settings = {"device": name, "precision": str(precision), "cores": os.cpu_count(), **vars(options)}
    settings |= {"workers": args.num_workers, "torch": torch.__version__, "python": platform.python_version()}
    print("\n" + ", ".join(f"{key} {value}" for key, value in settings.items() if key != "json"))
    shares = report(results, options)
    if options.json:
        text = json.dumps({"settings": settings, "percent_of_in_memory": shares, "rounds": results}, indent=1)
        Path(options.json).write_text(text + "\n")


if __name__ == "__main__":
    run_benchmark(main, get_args_parser())
