"""What `predict.py --features` costs over a bare evaluation loop at base size. Target: at most 1.05 times.

    python benchmarks/bench_features.py --threads 2 --json features.json
    python benchmarks/bench_features.py --images 64 --rounds 3 --size tiny        # a quick look

Both run the same model (random weights), files, transform, batch size and loader processes, in turns:
1. bare: `for images in DataLoader: features.append(model.forward_features(images))` under `inference_mode`;
2. predict: what predict.py does once it has the model: its loader, `predict`, the .npz file.
Each round measures both, the order alternating; the figure is the median over rounds of time 2 / time 1. The
same with processor time of the main process is a cross-check on a busy machine. The features must agree. The
exit code is 1 when the target is missed.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import run_benchmark

import models_vit
from util.cli.parser import ArgumentParser
from util.compute.precision import autocast, resolve_amp_dtype, resolve_device
from util.data.find import ImageFiles, PathList, find_images
from util.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from util.demo_set.files import ensure_demo_data
from util.evaluate.output import write_features
from util.evaluate.predict import predict, prediction_loader
from util.sizes import default_workers
from util.weights.describe import WeightsFile

TARGET = 1.05


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    flag = parser.add_argument
    # fmt: off
    flag("--data_path", default=None, help="folder of images; default: the demo set")
    flag("--images", default=1000, type=int)
    flag("--size", default="base", choices=["tiny", "small", "base", "large"])
    flag("--input_size", default=224, type=int)
    flag("--batch_size", default=64, type=int)
    flag("--rounds", default=3, type=int)
    flag("--num_workers", default=default_workers(), type=int)
    flag("--threads", default=None, type=int, help="of torch; default: its own choice")
    flag("--device", default="auto")
    flag("--amp_dtype", default="none", choices=["auto", "bf16", "fp16", "none"])
    flag("--json", default=None, metavar="FILE", help="also write all figures there")
    # fmt: on
    return parser


def take_files(args) -> ImageFiles:
    """The first `args.images` images; the list starts again where there are fewer."""
    found = find_images(args.data_path or ensure_demo_data(log=print), "train").paths
    return ImageFiles("", "", PathList(found[i % len(found)] for i in range(args.images)))


def bare_loop(model, dataset, args, device: torch.device) -> np.ndarray:
    """Features (n, D), the way one would write it down."""
    loader = torch.utils.data.DataLoader(dataset, args.batch_size, num_workers=args.num_workers)
    dtype, parts = resolve_amp_dtype(args.amp_dtype, device), []
    with torch.inference_mode():
        for images, *_ in loader:
            with autocast(device, dtype):
                features = model.forward_features(images.to(device))
            parts.append(features.float().cpu())
    return torch.cat(parts).numpy()


def with_predict(model, files, weights, args, device: torch.device, path: str) -> np.ndarray:
    loader = prediction_loader(files, weights, args)
    result = predict(model, loader, device, args.amp_dtype, feature_kind="mean")
    write_features(path, [files.paths[i] for i in result.rows], result, "mean", model.patch_embed.grid_size)
    return result.features


def timed(function) -> tuple[np.ndarray, float, float]:
    """(its result, seconds, seconds of processor time of this process)."""
    start, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - start, time.process_time() - cpu


def measure(args) -> dict:
    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = models_vit.MODELS[f"vit_{args.size}_patch16"](
        img_size=args.input_size, num_classes=0, global_pool=True
    )
    model = model.eval().to(device)
    size = (args.input_size, args.input_size)
    weights = WeightsFile("", "", "encoder", {}, {"in_chans": 3}, size, IMAGENET_MEAN, IMAGENET_STD)
    args.bad_images = "error"
    files = take_files(args)
    dataset = prediction_loader(files, weights, args).dataset
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "features.npz")
        few = ImageFiles("", "", files.paths.take(range(min(len(files.paths), args.batch_size))))
        warm = Namespace(**{**vars(args), "num_workers": 0})
        with_predict(model, few, weights, warm, device, path)  # the first pass pays for set-up
        for number in range(args.rounds):
            ways = {
                "bare": lambda: bare_loop(model, dataset, args, device),
                "predict": lambda: with_predict(model, files, weights, args, device, path),
            }
            order = list(ways) if number % 2 == 0 else list(ways)[::-1]
            done = {name: timed(ways[name]) for name in order}
            one, two = done["bare"][0], done["predict"][0]
            worst = float(np.abs(one - two).max() / np.abs(one).max())
            if worst > 1e-5 and args.amp_dtype == "none":
                sys.exit(f"the features differ by {worst:.1e} of their largest value")
            rounds.append({name: {"seconds": s, "cpu_seconds": c} for name, (_, s, c) in done.items()})
            rounds[-1]["difference"] = worst
            print(
                f"round {number + 1}: " + ", ".join(f"{n} {r[1]:.2f} s" for n, r in sorted(done.items())),
                flush=True,
            )
    return {"rounds": rounds, "device": str(device), "threads": torch.get_num_threads()}


def main(args: argparse.Namespace) -> None:
    result = measure(args)
    for key in ("seconds", "cpu_seconds"):
        ratios = [r["predict"][key] / r["bare"][key] for r in result["rounds"]]
        result[f"ratio_{key}"] = statistics.median(ratios)
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        name = "time" if key == "seconds" else "processor time of the main process"
        print(f"predict / bare, {name}: {result[f'ratio_{key}']:.3f} (rounds: {spread})")
    seconds = statistics.median(r["predict"]["seconds"] for r in result["rounds"])
    worst = max(r["difference"] for r in result["rounds"])
    print(f"{args.images / seconds:.1f} images/s; features agree to {worst:.1e} of the largest")
    result |= {
        name: getattr(args, name) for name in ("images", "size", "input_size", "batch_size", "num_workers")
    }
    result["machine"] = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    print(f"{result['machine']}, {result['device']}, {result['threads']} threads; vit_{args.size}_patch16")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    missed = result["ratio_seconds"] > TARGET
    print(f"target at most {TARGET}: {'MISSED' if missed else 'met'}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    run_benchmark(main, get_args_parser())
