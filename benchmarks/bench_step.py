"""What a training step costs: images/s, peak memory and share of the device's measured matrix-product peak.

    python benchmarks/bench_step.py --model base large --json step.json        on a GPU: the figures to report
    python benchmarks/bench_step.py --model tiny small --variants eager compiled graphs plain
    python benchmarks/bench_step.py --model base --batch_size 8 --threads 2    on a CPU: ten minutes
    ... --amp_dtype bf16 --variants eager compiled plain hf                    on one with a matrix unit
    python benchmarks/bench_step.py --model tiny --input_size 64 --batch_size 4 --steps 2 --rounds 2   a trial

Variants, all on the same synthetic images, built once and timed in turn, round after round:
    eager, compiled, graphs   this project's engines (compile.py; graphs: --compile_mode reduce-overhead)
    plain         our model in a plain loop as the reference runs it: fp16 autocast with a scaler on CUDA,
                  float32 on CPU; softmax attention written out, float32 batches, AdamW without fusion,
                  .item() and a synchronisation in every step
    hf, hf_compiled   ViTMAEForPreTraining or ViTForImageClassification of Hugging Face transformers (pip
                  install transformers), same sizes and precision as ours, no synchronisation; AdamW as torch
                  makes it by default (--hf_adamw fused: as ours)

FLOP count matrix products only, 2 per multiplication and addition, for what the model computes: all L
patches embedded, encoder over K + 1 tokens, decoder over L + 1, all of them predicted, times 3 for the
backward pass (ViT-B 59, ViT-L 125 GFLOP an image at 224 pixels and mask ratio 0.75). The peak is that of a
large product, measured between the rounds, in bf16 on CUDA and in the precision of ours on CPU.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import run_benchmark
from step_variants import CLASSES, OURS, make_model, make_variant, settings_of

from util.cli.parser import ArgumentParser
from util.compute.precision import resolve_amp_dtype, resolve_device


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    flag = parser.add_argument
    # fmt: off
    flag("--model", nargs="+", default=["base"], choices=["tiny", "small", "base", "large", "huge"])
    flag("--task", nargs="+", default=["pretrain", "finetune"], choices=["pretrain", "finetune"])
    flag("--variants", nargs="+", choices=[*OURS, "plain", "hf", "hf_compiled"],
         help="default: eager plain hf, on CUDA also compiled and hf_compiled")
    flag("--batch_size", default=None, type=int, help="default: 256 on CUDA (64 to fine-tune), 8 on CPU")
    flag("--input_size", default=224, type=int)
    flag("--mask_ratio", default=0.75, type=float)
    flag("--steps", default=None, type=int, help="steps per round; default: 20 on CUDA, 2 on CPU")
    flag("--rounds", default=None, type=int, help="default: 7 on CUDA, 5 on CPU")
    flag("--device", default="auto")
    flag("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "none"], help="of ours and hf")
    flag("--grad_checkpointing", action="store_true", help="of ours")
    flag("--hf_adamw", default="default", choices=["default", "fused"], help="of hf; fused: as ours")
    flag("--threads", default=None, type=int, help="CPU threads; default: torch's choice")
    flag("--json", default=None, metavar="FILE", help="also write all figures there")
    # fmt: on
    return parser


def block_flop(width: int, tokens: int, mlp_ratio: int = 4) -> int:
    """Forward pass of a transformer block over one image: four projections, MLP, and the two products of
    attention.
    """
    return 2 * tokens * width * width * (4 + 2 * mlp_ratio) + 4 * tokens * tokens * width


def pretrain_flop(model, mask_ratio: float) -> int:
    """Matrix products of one image's training step (forward times 3)."""
    length, width, narrow = (
        model.patch_embed.num_patches,
        model.cls_token.shape[-1],
        model.mask_token.shape[-1],
    )
    keep, pixels = int(length * (1 - mask_ratio)), model.patch_size**2 * model.in_chans
    encoder = 2 * length * pixels * width + len(model.blocks) * block_flop(width, keep + 1)
    decoder = 2 * (keep + 1) * width * narrow + len(model.decoder_blocks) * block_flop(narrow, length + 1)
    return 3 * (encoder + decoder + 2 * (length + 1) * narrow * pixels)


def finetune_flop(model) -> int:
    """The same for the classifier, whose tokens are all kept."""
    length, width = model.patch_embed.num_patches, model.embed_dim
    pixels = model.patch_embed.proj.weight[0].numel()
    blocks = len(model.blocks) * block_flop(width, length + 1)
    return 3 * (2 * length * pixels * width + blocks + 2 * width * CLASSES)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device, peak: bool = False) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


class Peak:
    """Times a large square matrix product; `measure()` returns FLOP/s."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        cuda = device.type == "cuda"
        self.device, self.size, self.times = device, 8192 if cuda else 2048, 20 if cuda else 1
        self.a, self.b = (torch.randn(self.size, self.size, device=device, dtype=dtype) for _ in range(2))

    def measure(self) -> float:
        _ = self.a @ self.b
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.times):
            _ = self.a @ self.b
        synchronize(self.device)
        return 2 * self.size**3 * self.times / (time.perf_counter() - start)


def measure(task: str, name: str, args) -> dict:
    """{"gflop_per_image", "peak_tflops", "variants": {variant: figures, or {"failed": reason}}}."""
    device, model = args.where, make_model(task, name, args)
    flop = pretrain_flop(model, args.mask_ratio) if task == "pretrain" else finetune_flop(model)
    del model
    amp = resolve_amp_dtype(args.amp_dtype, device) or torch.float32
    rounds, own, results = {}, {}, {}
    peak = Peak(device, torch.bfloat16 if device.type == "cuda" else amp)
    for variant in args.variants:
        before = allocated(device)
        try:
            step_round = make_variant(variant, task, name, args)
            for _ in range(2):  # compiles, warms up, makes the optimizer's state
                settings_of(variant, device)
                step_round()
            rounds[variant], own[variant] = step_round, allocated(device) - before
            results[variant] = {"seconds": [], "peak_memory_mb": 0.0}
        except (ImportError, torch.OutOfMemoryError) as error:
            reason = "transformers is not installed" if isinstance(error, ImportError) else "out of memory"
            results[variant] = {"failed": reason}
        print(f"{task} {name}: {variant} ready", flush=True)
    peaks = []
    for _ in range(args.rounds):
        peaks.append(peak.measure())
        for variant, step_round in rounds.items():
            settings_of(variant, device)
            resting = allocated(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            synchronize(device)
            start = time.perf_counter()
            step_round()
            synchronize(device)
            figures = results[variant]
            figures["seconds"].append(time.perf_counter() - start)
            grown = allocated(device, peak=True) - resting + own[variant]  # others' weights do not count
            if variant != "graphs":  # replayed, it asks for no memory that could be counted
                figures["peak_memory_mb"] = max(figures["peak_memory_mb"], grown / 2**20)
    top = statistics.median(peaks)
    for variant in rounds:
        figures, images = results[variant], args.batch * args.steps
        rate = images / statistics.median(figures["seconds"])
        figures |= {"images_per_s": rate, "tflops": rate * flop / 1e12, "mfu": rate * flop / top}
    return {
        "gflop_per_image": flop / 1e9,
        "peak_tflops": top / 1e12,
        "batch": args.batch,
        "variants": results,
    }


def ratio(figures: dict, over: str, result: dict) -> str:
    """Median over the rounds of how many times as fast as `over`, both in the same round."""
    other = result["variants"].get(over, {})
    if "seconds" not in other:
        return "-"
    pairs = zip(other["seconds"], figures["seconds"], strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.2f}"


def print_table(results: dict) -> None:
    for key, result in results.items():
        print(
            f"\n{key}: batch {result['batch']}, {result['gflop_per_image']:.1f} GFLOP an image, matrix peak "
            f"{result['peak_tflops']:.3g} TFLOP/s"
        )
        heads = ["images/s", "TFLOP/s", "of peak", "peak MB", "x plain", "x hf"]
        print(f"{'':14s}" + "".join(f"{head:>10s}" for head in heads))
        for variant, figures in result["variants"].items():
            if "failed" in figures:
                print(f"{variant:14s}  left out: {figures['failed']}")
                continue
            memory = figures["peak_memory_mb"]
            cells = [f"{figures['images_per_s']:.1f}", f"{figures['tflops']:.3g}", f"{figures['mfu']:.1%}"]
            cells += [f"{memory:.0f}" if memory else "-"]
            cells += [ratio(figures, "plain", result), ratio(figures, "hf", result)]
            print(f"{variant:14s}" + "".join(f"{cell:>10s}" for cell in cells))


def main(args: argparse.Namespace) -> None:
    command = "python " + shlex.join(["benchmarks/bench_step.py", *sys.argv[1:]])
    if args.threads:
        torch.set_num_threads(args.threads)
    args.where = resolve_device(args.device)
    cuda = args.where.type == "cuda"
    args.steps, args.rounds = args.steps or (20 if cuda else 2), args.rounds or (7 if cuda else 5)
    compiled = ["compiled", "hf_compiled"] if cuda else []
    args.variants = args.variants or ["eager", *compiled, "plain", "hf"]
    results = {}
    for task in args.task:
        for name in args.model:
            args.batch = args.batch_size or ((256 if task == "pretrain" else 64) if cuda else 8)
            results[f"{task} {name}"] = measure(task, name, args)
            if cuda:
                torch.cuda.empty_cache()
    print_table(results)
    machine = torch.cuda.get_device_name(args.where) if cuda else platform.processor() or platform.machine()
    amp = resolve_amp_dtype(args.amp_dtype, args.where) or torch.float32
    about = f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {amp}"
    print(f"\n{about}; {args.rounds} rounds of {args.steps} steps, medians; memory on CUDA only\n{command}")
    if args.json:
        content = {"machine": about, "command": command, "results": results}
        Path(args.json).write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    run_benchmark(main, get_args_parser())
