"""What a training step costs: images/s, peak memory and share of the device's measured matrix-product peak.

    python benchmarks/bench_step.py --model base large --json step.json        on a GPU: the figures to report
    python benchmarks/bench_step.py --model tiny small --variants eager compiled graphs plain
    python benchmarks/bench_step.py --model base --batch_size 8 --threads 2    on a CPU: ten minutes
    python benchmarks/bench_step.py --model tiny --input_size 64 --batch_size 4 --steps 2 --rounds 2   a trial

Variants, all on the same synthetic images, built once and timed in turn, round after round:
    eager, compiled, graphs   this project's engines (util/compile.py; graphs: --compile_mode reduce-overhead)
    plain         our model in a plain loop as the reference runs it: fp16 autocast with a scaler on CUDA,
                  float32 on CPU; softmax attention written out, every patch embedded and predicted, float32
                  batches, AdamW without fusion, .item() and a synchronisation in every step
    hf, hf_compiled   ViTMAEForPreTraining or ViTForImageClassification of Hugging Face transformers (pip
                  install transformers), same sizes and precision as ours, no synchronisation; AdamW as torch
                  makes it by default (--hf_adamw fused: as ours)

FLOP count matrix products only, 2 per multiplication and addition, for the work the method needs: kept
patches embedded, encoder over K + 1 tokens, decoder over L + 1 (its last MLP over those removed), removed
patches predicted, times 3 for the backward pass (ViT-B 57, ViT-L 122 GFLOP an image at 224 pixels and mask
ratio 0.75). The peak is that of a large bf16 product on CUDA, of a float32 one on CPU, measured between the
rounds.
"""

import argparse
import contextlib
import io
import json
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from timm.data import Mixup  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import param_groups_weight_decay  # noqa: E402

import engine_finetune  # noqa: E402
import engine_pretrain  # noqa: E402
import models_mae  # noqa: E402
import models_vit  # noqa: E402
from util.args import run_benchmark  # noqa: E402
from util.compile import compile_model  # noqa: E402
from util.memory import give_back_freed_memory  # noqa: E402
from util.precision import (  # noqa: E402
    NativeScalerWithGradNormCount,
    autocast,
    has_fused_adamw,
    prepare_device,
    resolve_amp_dtype,
    resolve_device,
)
from util.rng import seed_all  # noqa: E402
from util.transforms import normalize_batch  # noqa: E402

PATCH = {"huge": 14}
OURS = ("eager", "compiled", "graphs")
CLASSES = 1000


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    encoder = 2 * keep * pixels * width + len(model.blocks) * block_flop(width, keep + 1)
    decoder = 2 * (keep + 1) * width * narrow + len(model.decoder_blocks) * block_flop(narrow, length + 1)
    decoder -= 16 * (keep + 1) * narrow * narrow  # MLP of kept tokens in the last block
    return 3 * (encoder + decoder + 2 * (length - keep) * narrow * pixels)


def finetune_flop(model) -> int:
    """The same for the classifier, whose tokens are all kept."""
    length, width = model.patch_embed.num_patches, model.embed_dim
    pixels = model.patch_embed.proj.weight[0].numel()
    blocks = len(model.blocks) * block_flop(width, length + 1)
    return 3 * (2 * length * pixels * width + blocks + 2 * width * CLASSES)


class Batches:
    """A loader of the same few batches over and over: [images, labels, indices], pinned on CUDA."""

    def __init__(self, batch_size: int, size: int, steps: int, cuda: bool, normalised: bool = False):
        generator = torch.Generator().manual_seed(0)
        self.batch_size, self.steps, self.made = batch_size, steps, []
        for _ in range(2):
            shape = (batch_size, 3, size, size)
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            images = normalize_batch(images, "cpu") if normalised else images
            labels = torch.randint(0, CLASSES, (batch_size,), generator=generator)
            batch = [images, labels, torch.arange(batch_size)]
            self.made.append([t.pin_memory() for t in batch] if cuda else batch)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        return (self.made[i % len(self.made)] for i in range(self.steps))


def make_model(task: str, name: str, args) -> torch.nn.Module:
    seed_all(0)
    if task == "pretrain":
        model = models_mae.MODELS[f"mae_vit_{name}_patch{PATCH.get(name, 16)}"](
            img_size=args.input_size, norm_pix_loss=True
        )
    else:
        model = models_vit.MODELS[f"vit_{name}_patch{PATCH.get(name, 16)}"](
            img_size=args.input_size, num_classes=CLASSES, global_pool=True, drop_path_rate=0.1
        )
    return model.to(args.where)


def make_optimizer(model: torch.nn.Module, **how) -> torch.optim.AdamW:
    return torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=1e-4, betas=(0.9, 0.95), **how)


def make_mixup() -> Mixup:
    return Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)


def make_ours(variant: str, task: str, name: str, args):
    """A function that runs a round with this project's engine; what it logs is thrown away."""
    model = make_model(task, name, args)
    model.grad_checkpointing = args.grad_checkpointing
    run = argparse.Namespace(
        accum_iter=1, mask_ratio=args.mask_ratio, lr=1e-4, min_lr=0.0, warmup_epochs=0, epochs=10**6, seed=0,
        amp_dtype=args.amp_dtype, print_freq=10**9, distributed=False, compile=variant != "eager",
        compile_mode="reduce-overhead" if variant == "graphs" else "default",
    )  # fmt: skip
    compile_model(model, "loss_of_removed" if task == "pretrain" else "forward", run, args.where)
    optimizer = make_optimizer(model, fused=has_fused_adamw(args.where))
    amp = resolve_amp_dtype(args.amp_dtype, args.where)
    scaler = NativeScalerWithGradNormCount(enabled=amp == torch.float16, device=args.where.type)
    loader = Batches(args.batch, args.input_size, args.steps, args.where.type == "cuda")
    mixup, criterion = make_mixup(), SoftTargetCrossEntropy()

    def step_round() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            if task == "pretrain":
                engine_pretrain.train_one_epoch(model, loader, optimizer, args.where, 0, scaler, None, run)
            else:
                engine_finetune.train_one_epoch(
                    model, criterion, loader, optimizer, args.where, 0, scaler, None, mixup, None, run
                )

    return step_round


def make_plain(task: str, name: str, args):
    """A round of the plain loop (see the top of this file)."""
    model, cuda = make_model(task, name, args), args.where.type == "cuda"
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    optimizer = make_optimizer(model, fused=False, foreach=False)
    scaler = torch.amp.GradScaler(args.where.type, enabled=cuda)
    loader = Batches(args.batch, args.input_size, args.steps, cuda, normalised=True)
    mixup, criterion = make_mixup(), SoftTargetCrossEntropy()

    def step_round() -> None:
        model.train()
        for images, labels, _ in loader:
            images = images.to(args.where, non_blocking=True)
            with autocast(args.where, torch.float16 if cuda else None):
                if task == "pretrain":
                    loss = model(images, mask_ratio=args.mask_ratio)[0]
                else:
                    # Mixup writes into its batch, which is the loader's on CPU
                    mixed, targets = mixup(images if cuda else images.clone(), labels.to(args.where))
                    loss = criterion(model(mixed), targets)
            loss.item()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if cuda:
                torch.cuda.synchronize()

    return step_round


def make_hugging_face(variant: str, task: str, name: str, args):
    """A round of transformers' model of the same sizes, in our precision."""
    import transformers

    ours = make_model(task, name, argparse.Namespace(**{**vars(args), "where": torch.device("meta")}))
    sizes = dict(
        hidden_size=ours.cls_token.shape[-1], num_hidden_layers=len(ours.blocks), layer_norm_eps=1e-6,
        num_attention_heads=ours.blocks[0].attn.num_heads, intermediate_size=4 * ours.cls_token.shape[-1],
        image_size=args.input_size, patch_size=PATCH.get(name, 16), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    seed_all(0)
    if task == "pretrain":
        decoder = dict(
            decoder_hidden_size=ours.mask_token.shape[-1], norm_pix_loss=True, mask_ratio=args.mask_ratio,
            decoder_intermediate_size=4 * ours.mask_token.shape[-1],
            decoder_num_hidden_layers=len(ours.decoder_blocks),
            decoder_num_attention_heads=ours.decoder_blocks[0].attn.num_heads,
        )  # fmt: skip
        config = transformers.ViTMAEConfig(**sizes, **decoder)
        model = transformers.ViTMAEForPreTraining(config)
    else:
        config = transformers.ViTConfig(**sizes, num_labels=CLASSES)
        model = transformers.ViTForImageClassification(config)
    model = model.to(args.where).train()
    fused = args.hf_adamw == "fused" and has_fused_adamw(args.where)
    optimizer = make_optimizer(model, fused=fused or None)
    called = torch.compile(model) if variant == "hf_compiled" else model
    amp, cuda = resolve_amp_dtype(args.amp_dtype, args.where), args.where.type == "cuda"
    scaler = torch.amp.GradScaler(args.where.type, enabled=amp == torch.float16)
    loader = Batches(args.batch, args.input_size, args.steps, cuda, normalised=True)
    mixup, criterion = make_mixup(), SoftTargetCrossEntropy()

    def step_round() -> None:
        for images, labels, _ in loader:
            images = images.to(args.where, non_blocking=True)
            if task == "finetune":
                labels = labels.to(args.where, non_blocking=True)
                images, targets = mixup(images if cuda else images.clone(), labels)
            with autocast(args.where, amp):
                if task == "pretrain":
                    loss = called(pixel_values=images).loss
                else:
                    loss = criterion(called(pixel_values=images).logits, targets)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return step_round


def make_variant(variant: str, task: str, name: str, args):
    if variant in OURS:
        return make_ours(variant, task, name, args)
    return (
        make_plain(task, name, args) if variant == "plain" else make_hugging_face(variant, task, name, args)
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device, peak: bool = False) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


class Peak:
    """Times a large square matrix product; `measure()` returns FLOP/s."""

    def __init__(self, device: torch.device):
        cuda = device.type == "cuda"
        self.device, self.size, self.times = device, 8192 if cuda else 2048, 20 if cuda else 1
        dtype = torch.bfloat16 if cuda else torch.float32
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
    rounds, own, results, peak = {}, {}, {}, Peak(device)
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


def settings_of(variant: str, device: torch.device) -> None:
    """What the scripts set (util/precision.py) for ours; of that only TF32 for Hugging Face's; torch's and
    glibc's defaults in the plain loop.
    """
    give_back_freed_memory()
    torch.set_float32_matmul_precision("highest")
    if variant in OURS or (variant != "plain" and device.type == "cuda"):
        prepare_device(device, None)


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
