"""What `bench_step.py` compares: functions that each run a round of steps, of this project's engines, of a
plain loop, and of Hugging Face's models.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay

import engine_finetune
import engine_pretrain
import models_mae
import models_vit
from util.compute.compile import compile_model
from util.compute.memory import give_back_freed_memory
from util.compute.precision import (
    NativeScalerWithGradNormCount,
    autocast,
    has_fused_adamw,
    prepare_device,
    resolve_amp_dtype,
)
from util.data.transforms import normalize_batch
from util.rng import seed_all

PATCH = {"huge": 14}
OURS = ("eager", "compiled", "graphs")
CLASSES = 1000


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
    compile_model(model, "forward", run, args.where)
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


def settings_of(variant: str, device: torch.device) -> None:
    """What the scripts set (precision.py) for ours; of that only TF32 for Hugging Face's; torch's and
    glibc's defaults in the plain loop.
    """
    give_back_freed_memory()
    torch.set_float32_matmul_precision("highest")
    if variant in OURS or (variant != "plain" and device.type == "cuda"):
        prepare_device(device, None)
