"""What a training step costs: images/s, peak memory and share of the device's measured matrix-product peak.

    python benchmarks/bench_step.py --model base large --json step.json        on a GPU: the figures to report
    python benchmarks/bench_step.py --model tiny small --variants eager compiled graphs plain
    python benchmarks/bench_step.py --model base --batch_size 8 --threads 2    on a CPU: ten minutes
    ... --amp_dtype bf16 --variants eager compiled plain hf                    on one with a matrix unit
    python benchmarks/bench_step.py --model tiny --input_size 64 --batch_size 4 --steps 2 --rounds 2   a trial
    ... --task pretrain --variants eager --decoder self cross:1 cross:0.25 --opt adamw muon   each with each

Variants, all on the same synthetic images, built once and timed in turn, round after round:
    eager, compiled, graphs   this project's engines (compile.py; graphs: --compile_mode reduce-overhead)
    plain         our model in a plain loop as the reference runs it: fp16 autocast with a scaler on CUDA,
                  float32 on CPU; softmax attention written out, float32 batches, AdamW without fusion,
                  .item() and a synchronisation in every step
    hf, hf_compiled   ViTMAEForPreTraining or ViTForImageClassification of Hugging Face transformers (pip
                  install transformers), same sizes and precision as ours, no synchronisation; AdamW as torch
                  makes it by default (--hf_adamw fused: as ours); on an H100 hf_compiled compiles for over a
                  minute at base size, so it runs where it is asked for only

FLOP count matrix products only, 2 per multiplication and addition, for what the model computes: all L
patches embedded, encoder over K + 1 tokens, decoder over L + 1, all of them predicted, times 3 for the
backward pass (ViT-B 59, ViT-L 125 GFLOP an image at 224 pixels and mask ratio 0.75); a cross decoder's
queries alone. The peak is that of a large product, measured between the rounds, in bf16 on CUDA and in the
precision of ours on CPU.
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from harness import Parser, finish, paired_ratio, positive, print_table, run_benchmark, say, take_turns
from step_variants import OURS, make_model, make_variant, settings_of
from workload import CLASSES, synchronize

from util.compute.precision import resolve_amp_dtype, resolve_device


def block_flop(width: int, tokens: int, mlp_ratio: int = 4) -> int:
    """Forward pass of a transformer block over one image: four projections, MLP, and the two products of
    attention.
    """
    return 2 * tokens * width * width * (4 + 2 * mlp_ratio) + 4 * tokens * tokens * width


def cross_block_flop(width: int, queries: int, tokens: int, mlp_ratio: int = 4) -> int:
    """The same of `models_cross`: two projections and MLP of queries, two of what they look at, attention."""
    own = 2 * queries * width * width * (2 + 2 * mlp_ratio)
    return own + 2 * tokens * width * 2 * width + 4 * queries * tokens * width


def pretrain_flop(model, mask_ratio: float) -> int:
    """Matrix products of one image's training step (forward times 3)."""
    length, width = model.patch_embed.num_patches, model.cls_token.shape[-1]
    narrow = model.mask_token.shape[-1]
    keep, pixels = int(length * (1 - mask_ratio)), model.patch_size**2 * model.in_chans
    encoder = 2 * length * pixels * width + len(model.blocks) * block_flop(width, keep + 1)
    queries, block = length + 1, block_flop(narrow, length + 1)
    if hasattr(model, "predict_ratio"):
        queries = max(1, round(model.predict_ratio * (length - keep)))
        block = cross_block_flop(narrow, queries, keep + 1)
    decoder = 2 * (keep + 1) * width * narrow + len(model.decoder_blocks) * block
    return 3 * (encoder + decoder + 2 * queries * narrow * pixels)


def finetune_flop(model) -> int:
    """The same for the classifier, whose tokens are all kept."""
    length, width = model.patch_embed.num_patches, model.embed_dim
    pixels = model.patch_embed.proj.weight[0].numel()
    blocks = len(model.blocks) * block_flop(width, length + 1)
    return 3 * (2 * length * pixels * width + blocks + 2 * width * CLASSES)


def allocated(device: torch.device, peak: bool = False) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


def free_memory(device: torch.device) -> None:
    """Gives back what nothing refers to any more, circles of objects among it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    size, times = (8192, 20) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _ = a @ b
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        a @ b
    synchronize(device)
    return 2 * size**3 * times / (time.perf_counter() - start)


def make_ready(variant: str, task: str, name: str, args: argparse.Namespace) -> Callable | str:
    """A function that runs a round of warmed-up steps, or why there is none; a failed one leaves no trace."""
    try:
        step_round = make_variant(variant, task, name, args)
        for _ in range(2):  # compiles, warms up, makes the optimizer's state
            settings_of(variant, args.where)
            step_round()
        return step_round
    except ImportError:
        return "transformers is not installed"
    except torch.OutOfMemoryError:
        return "out of memory"


def time_round(variant: str, step_round: Callable, device: torch.device) -> tuple[float, int]:
    """(seconds, bytes by which memory grew at most) of a round."""
    settings_of(variant, device)
    resting = allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    start = time.perf_counter()
    step_round()
    synchronize(device)
    return time.perf_counter() - start, allocated(device, peak=True) - resting


def variants_of(kind: str, task: str, args: argparse.Namespace) -> list[str]:
    """A kind of ours with each decoder and optimizer asked for (`settings_in` reads it); others alone."""
    if kind not in OURS:
        return [kind]
    pairs = itertools.product(args.decoder if task == "pretrain" else ["self"], args.opt)
    return [" ".join([kind, *(() if pair == ("self", "adamw") else pair)]) for pair in pairs]


def decoder(text: str) -> str:
    """argparse type of a decoder: self, cross, or cross:R."""
    name, colon, ratio = text.partition(":")
    if text != "self" and not (name == "cross" and (not colon or 0 < float(ratio) <= 1)):
        raise ValueError
    return text


def measure(task: str, name: str, args: argparse.Namespace) -> dict:
    """{"batch", "peak_tflops", "variants": {variant: figures, or {"failed": reason}}}."""
    device, flop = args.where, {}
    amp = resolve_amp_dtype(args.amp_dtype, device) or torch.float32
    peak = partial(matrix_peak, device, torch.bfloat16 if device.type == "cuda" else amp)
    ways, steps, own, results = {"": peak}, {}, {}, {}

    def turn(variant: str) -> tuple[float, int] | None:
        """None from the moment on that it ran out of memory, by what the others hold."""
        try:
            return time_round(variant, steps[variant], device) if variant in steps else None
        except torch.OutOfMemoryError:
            del steps[variant]
        free_memory(device)  # not before the traceback, whose frames hold the step's tensors, is gone
        return None

    for variant in [v for kind in args.variants for v in variants_of(kind, task, args)]:
        model = make_model(task, name, args, variant)
        flop[variant] = pretrain_flop(model, args.mask_ratio) if task == "pretrain" else finetune_flop(model)
        del model
        free_memory(device)
        before = allocated(device)
        ready = make_ready(variant, task, name, args)
        free_memory(device)
        results[variant] = {"failed": ready} if isinstance(ready, str) else {}
        if not isinstance(ready, str):
            steps[variant], ways[variant] = ready, partial(turn, variant)
            own[variant] = allocated(device) - before
        del ready  # `steps` has it alone
        say(f"{task} {name}: {variant} {results[variant].get('failed', 'ready')}")
    rounds = take_turns(args.rounds, ways)
    top = statistics.median(rounds.pop(""))
    for variant, pairs in rounds.items():
        if variant not in steps:
            results[variant] = {"failed": "out of memory"}
            continue
        seconds, grown = map(list, zip(*pairs, strict=True))
        rate = args.batch * args.steps / statistics.median(seconds)
        results[variant] = {"images_per_s": rate, "gflop_per_image": flop[variant] / 1e9}
        results[variant] |= {"tflops": rate * flop[variant] / 1e12, "mfu": rate * flop[variant] / top}
        # Others' weights do not count; a graph that is replayed asks for no memory that could be counted
        memory = 0 if variant.startswith("graphs") else max(grown) + own[variant]
        results[variant] |= {"peak_memory_mb": memory / 2**20, "seconds": seconds}
    return {"batch": args.batch, "peak_tflops": top / 1e12, "variants": results}


def report(key: str, result: dict) -> None:
    """Prints the table of a task and model; ratios are to the variant's seconds in the same round."""
    say(f"\n{key}: batch {result['batch']}, matrix peak {result['peak_tflops']:.3g} TFLOP/s; GFLOP an image")
    rows, variants = [], result["variants"]
    bases = "plain", "hf", next(iter(variants))
    for variant, figures in variants.items():
        if "failed" in figures:
            rows.append((variant, f"  left out: {figures['failed']}"))
            continue
        memory = figures["peak_memory_mb"]
        rows.append((
            variant, f"{figures['images_per_s']:.1f}", f"{figures['gflop_per_image']:.3g}",
            f"{figures['tflops']:.3g}", f"{figures['mfu']:.1%}", f"{memory:.0f}" if memory else "-",
            *(f"{paired_ratio(variants[over]['seconds'], figures['seconds']):.2f}"
              if "seconds" in variants.get(over, {}) else "-" for over in bases),
        ))  # fmt: skip
    heads = ["", "images/s", "GFLOP", "TFLOP/s", "of peak", "peak MB", "x plain", "x hf", "x first"]
    print_table(heads, rows, 24, 10)


def main(args: argparse.Namespace) -> int:
    args.where = resolve_device(args.device)
    cuda = args.where.type == "cuda"
    args.steps, args.rounds = args.steps or (20 if cuda else 2), args.rounds or (7 if cuda else 5)
    args.variants = args.variants or ["eager", *["compiled"] * cuda, "plain", "hf"]
    amp = resolve_amp_dtype(args.amp_dtype, args.where) or torch.float32
    say(f"{amp}; {args.rounds} rounds of {args.steps} steps, medians; memory on CUDA only")
    results = {}
    for task, name in itertools.product(args.task, args.model):
        args.batch = args.batch_size or ((256 if task == "pretrain" else 64) if cuda else 8)
        results[f"{task} {name}"] = measure(task, name, args)
        report(f"{task} {name}", results[f"{task} {name}"])
        free_memory(args.where)
    return finish(args, results)


if __name__ == "__main__":
    parser = Parser(
        __doc__, input_size=224, batch_size=(None, "default: 256 on CUDA (64 to fine-tune), 8 on CPU"),
        steps=(None, "per round; default: 20 on CUDA, 2 on CPU"), device="auto", threads=None,
        rounds=(None, "default: 7 on CUDA, 5 on CPU"),
    )  # fmt: skip
    flag = parser.add_argument
    flag("--model", nargs="+", default=["base"], choices=["tiny", "small", "base", "large", "huge"])
    flag("--task", nargs="+", default=["pretrain", "finetune"], choices=["pretrain", "finetune"])
    flag("--variants", nargs="+", choices=[*OURS, "plain", "hf", "hf_compiled"],
         help="default: eager plain hf, on CUDA also compiled")  # fmt: skip
    flag("--mask_ratio", default=0.75, type=positive(float))
    flag(
        "--decoder",
        nargs="+",
        default=["self"],
        type=decoder,
        help="of ours: self, cross, cross:0.25 (share)",
    )
    flag("--opt", nargs="+", default=["adamw"], help="of ours: adamw, or names of timm")
    for name in ("patch_size", "decoder_embed_dim", "decoder_depth", "decoder_num_heads"):
        flag(f"--{name}", type=positive(), help="default: the model's")
    flag("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "none"], help="of ours and hf")
    flag("--grad_checkpointing", action="store_true", help="of ours")
    flag("--hf_adamw", default="default", choices=["default", "fused"], help="of hf; fused: as ours")
    run_benchmark(main, parser)
