"""What the features of every block cost over one forward pass of the encoder. Target: at most 1.15 times.

    python benchmarks/bench_card.py --threads 1
    python benchmarks/bench_card.py --size base --batch_size 64 --device cuda

Images in memory, no files: 1. `encoder_features` of the last block; 2. class token and mean of every block,
and the patch tokens of the last. Each round measures both, the order alternating; the figure is the median
over rounds of 2 / 1, of wall time and of processor time, of which a busy machine changes less. The exit code
is 1 when both miss the target.
"""

import argparse
import time

import torch
from harness import Parser, finish, median_of, paired_ratio, run_benchmark, say, take_turns

import models_vit
from util.compute.precision import resolve_device
from util.evaluate.features import encoder_features
from util.evaluate.layers import EveryBlock

TARGET = 1.15


def main(args: argparse.Namespace) -> int:
    device = resolve_device(args.device)
    torch.manual_seed(0)
    model = models_vit.MODELS[f"vit_{args.size}_patch16"](img_size=args.input_size, num_classes=0)
    model = model.eval().to(device)
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
    source = EveryBlock(model, [len(model.blocks)])

    @torch.inference_mode()
    def timed(forward) -> dict[str, float]:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(args.steps):
            forward(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}

    ways = {
        "one pass": lambda: timed(lambda x: encoder_features(model, x)),
        "every block": lambda: timed(source),
    }
    for way in ways.values():
        way()  # the first pays for set-up
    rounds = take_turns(args.rounds, ways)
    figures = {"rounds": rounds}
    for key in ("seconds", "cpu_seconds"):
        figures[f"ratio_{key}"] = paired_ratio(*([r[key] for r in rounds[name]] for name in reversed(ways)))
        say(f"every block / one pass, {key}: {figures[f'ratio_{key}']:.3f}")
    rate = args.batch_size * args.steps / median_of(rounds["every block"], "seconds")
    say(f"{rate:.1f} images/s; vit_{args.size}_patch16, {args.input_size} pixels")
    met = min(figures["ratio_seconds"], figures["ratio_cpu_seconds"]) <= TARGET
    say(f"target at most {TARGET}: {'met' if met else 'MISSED'}")
    return finish(args, figures, met)


if __name__ == "__main__":
    parser = Parser(__doc__, input_size=224, batch_size=8, steps=3, rounds=7, threads=None, device="auto")
    parser.add_argument("--size", default="base", choices=["tiny", "small", "base", "large"])
    run_benchmark(main, parser)
