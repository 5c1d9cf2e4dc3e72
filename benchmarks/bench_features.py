"""What `predict.py --features` costs over a bare evaluation loop at base size. Target: at most 1.05 times.

    python benchmarks/bench_features.py --threads 2 --json features.json
    python benchmarks/bench_features.py --images 64 --rounds 3 --size tiny        # a quick look
    ... --size large --batch_size 256 --images 8192 --amp_dtype auto              # on a GPU

Both run the same model (random weights), files, resizing, batch size and loader processes, in turns:
1. bare: `for images in DataLoader: features.append(model.forward_features(images))` under `inference_mode`,
   with images that the loader normalises and, on a GPU, page-locks;
2. predict: what predict.py does once it has the model: its loader, `predict`, the .npz file.
Each round measures both, the order alternating; the figure is the median over rounds of time 2 / time 1. The
same with processor time of the main process is a cross-check on a busy machine. The features must agree. The
exit code is 1 when the target is missed.
"""

import argparse
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch
from harness import Parser, finish, median_of, paired_ratio, positive, run_benchmark, say, take_turns

import models_vit
from util.compute.precision import autocast, resolve_amp_dtype, resolve_device
from util.data.find import ImageFiles, PathList, find_images
from util.data.labelled import LabelledImages
from util.data.presets import eval_transform
from util.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from util.demo_set.files import ensure_demo_data
from util.evaluate.output import write_features
from util.evaluate.predict import predict, prediction_loader
from util.sizes import default_workers
from util.weights.describe import WeightsFile

TARGET = 1.05


def take_files(args) -> ImageFiles:
    """The first `args.images` images; the list starts again where there are fewer."""
    found = find_images(args.data_path or ensure_demo_data(log=say), "train").paths
    return ImageFiles("", "", PathList(found[i % len(found)] for i in range(args.images)))


def bare_loop(model, dataset, args, device: torch.device) -> np.ndarray:
    """Features (n, D), the way one would write it down."""
    pin = device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        dataset, args.batch_size, num_workers=args.num_workers, pin_memory=pin
    )
    dtype, parts = resolve_amp_dtype(args.amp_dtype, device), []
    with torch.inference_mode():
        for images, *_ in loader:
            with autocast(device, dtype):
                features = model.forward_features(images.to(device, non_blocking=True))
            parts.append(features.float().cpu())
    return torch.cat(parts).numpy()


def with_predict(model, files, weights, args, device: torch.device, path: str) -> np.ndarray:
    loader = prediction_loader(files, weights, args, pin_memory=device.type == "cuda")
    result = predict(model, loader, device, args.amp_dtype, feature_kind="mean", stats=weights)
    write_features(path, [files.paths[i] for i in result.rows], result, "mean", model.patch_embed.grid_size)
    return result.features


def timed(name: str, function: Callable) -> dict:
    """{"features": its result, "seconds", "cpu_seconds": processor time of this process}."""
    start, cpu = time.perf_counter(), time.process_time()
    features = function()
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    say(f"{name}: {spent['seconds']:.2f} s")
    return {**spent, "features": features}


def measure(args) -> dict[str, list[dict]]:
    """{"bare", "predict": the seconds of each round}, and the largest "difference" of features of each."""
    device = resolve_device(args.device)
    torch.manual_seed(0)
    model = models_vit.MODELS[f"vit_{args.size}_patch16"](
        img_size=args.input_size, num_classes=0, global_pool=True
    )
    model = model.eval().to(device)
    size = (args.input_size, args.input_size)
    weights = WeightsFile("", "", "encoder", {}, {"in_chans": 3}, size, IMAGENET_MEAN, IMAGENET_STD)
    args.bad_images = "error"
    files = take_files(args)
    stats = Namespace(input_size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    dataset = LabelledImages(files, eval_transform(stats, always_crop=True))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "features.npz")
        few = ImageFiles("", "", files.paths.take(range(min(len(files.paths), args.batch_size))))
        warm = Namespace(**{**vars(args), "num_workers": 0})
        with_predict(model, few, weights, warm, device, path)  # the first pass pays for set-up
        ways = {
            "bare": lambda: timed("bare", lambda: bare_loop(model, dataset, args, device)),
            "predict": lambda: timed(
                "predict", lambda: with_predict(model, files, weights, args, device, path)
            ),
        }
        rounds = take_turns(args.rounds, ways)
    rounds["difference"] = []
    for bare, done in zip(rounds["bare"], rounds["predict"], strict=True):
        one, two = bare.pop("features"), done.pop("features")
        worst = float(np.abs(one - two).max() / np.abs(one).max())
        if worst > 1e-5 and args.amp_dtype == "none":
            sys.exit(f"the features differ by {worst:.1e} of their largest value")
        rounds["difference"].append(worst)
    return rounds


def main(args: argparse.Namespace) -> int:
    rounds = measure(args)
    bare, done = rounds["bare"], rounds["predict"]
    figures = {"rounds": rounds, "images_per_s": args.images / median_of(done, "seconds")}
    for key, name in [("seconds", "time"), ("cpu_seconds", "processor time of the main process")]:
        ratios = [two[key] / one[key] for one, two in zip(bare, done, strict=True)]
        figures[f"ratio_{key}"] = paired_ratio((r[key] for r in done), (r[key] for r in bare))
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        say(f"predict / bare, {name}: {figures[f'ratio_{key}']:.3f} (rounds: {spread})")
    say(f"{figures['images_per_s']:.1f} images/s; features agree to {max(rounds['difference']):.1e} of the "
        f"largest; vit_{args.size}_patch16")  # fmt: skip
    met = figures["ratio_seconds"] <= TARGET
    say(f"target at most {TARGET}: {'met' if met else 'MISSED'}")
    return finish(args, figures, met)


if __name__ == "__main__":
    parser = Parser(
        __doc__, images=1000, input_size=224, batch_size=64, rounds=3, threads=None, device="auto"
    )
    flag = parser.add_argument
    flag("--data_path", default=None, help="folder of images; default: the demo set")
    flag("--size", default="base", choices=["tiny", "small", "base", "large"])
    flag("--num_workers", default=default_workers(), type=positive(or_zero=True))
    flag("--amp_dtype", default="none", choices=["auto", "bf16", "fp16", "none"])
    run_benchmark(main, parser)
