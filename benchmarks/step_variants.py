"""What `bench_step.py` compares: functions that each run a round of steps, of this project's engines, of a
plain loop, and of Hugging Face's models.
"""

import argparse
import contextlib
import io

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from workload import CLASSES, Batches, noise_batch

import engine_finetune
import engine_pretrain
import models_mae
import models_vit
from models_cross import CrossDecoderViT
from util.compute import precision
from util.compute.compile import compile_model
from util.compute.memory import give_back_freed_memory
from util.compute.optimizer import build_optimizer
from util.rng import seed_all

PATCH = {"huge": 14}
OURS = ("eager", "compiled", "graphs")


def make_loader(args: argparse.Namespace, normalised: bool = False) -> Batches:
    """Two batches of noise in turns, the same for every variant."""
    torch.manual_seed(0)
    shape = (args.batch, 3, args.input_size, args.input_size)
    return Batches([noise_batch(shape, args.where.type == "cuda", normalised) for _ in range(2)], args.steps)


def make_model(task: str, name: str, args, variant: str = "") -> torch.nn.Module:
    seed_all(0)
    sizes = {"img_size": args.input_size, "patch_size": args.patch_size or PATCH.get(name, 16)}
    if task == "pretrain":
        names = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
        sizes |= {name: getattr(args, name) for name in names if getattr(args, name)}
        decoder, _, ratio = settings_in(variant)[0].partition(":")
        if decoder == "cross":
            sizes |= {"make": CrossDecoderViT, "predict_ratio": float(ratio or 1)}
        model = models_mae.MODELS[f"mae_vit_{name}_patch{PATCH.get(name, 16)}"](norm_pix_loss=True, **sizes)
    else:
        model = models_vit.MODELS[f"vit_{name}_patch{PATCH.get(name, 16)}"](
            num_classes=CLASSES, global_pool=True, drop_path_rate=0.1, **sizes
        )
    return model.to(args.where)


def settings_in(variant: str) -> tuple[str, str]:
    """Decoder and optimizer of a variant such as "eager" or "compiled cross:0.5 muon"."""
    words = variant.split()[1:]
    return tuple(words or ("self", "adamw"))


def make_optimizer(model: torch.nn.Module, **how) -> torch.optim.AdamW:
    return torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=1e-4, betas=(0.9, 0.95), **how)


def make_mixup() -> Mixup:
    return Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)


def make_ours(variant: str, task: str, name: str, args):
    """A function that runs a round with this project's engine; what it logs is thrown away."""
    model, (kind, *_) = make_model(task, name, args, variant), variant.split()
    model.grad_checkpointing = args.grad_checkpointing
    run = argparse.Namespace(
        accum_iter=1, mask_ratio=args.mask_ratio, lr=1e-4, min_lr=0.0, warmup_epochs=0, epochs=10**6, seed=0,
        amp_dtype=args.amp_dtype, print_freq=10**9, distributed=False, compile=kind != "eager",
        compile_mode="reduce-overhead" if kind == "graphs" else "default", opt=settings_in(variant)[1],
        opt_args=[],
    )  # fmt: skip
    compile_model(model, "forward", run, args.where)
    optimizer = build_optimizer(param_groups_weight_decay(model, 0.05), run, args.where, betas=(0.9, 0.95))
    amp = precision.resolve_amp_dtype(args.amp_dtype, args.where)
    scaler = precision.NativeScalerWithGradNormCount(enabled=amp == torch.float16, device=args.where.type)
    loader = make_loader(args)
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


def make_loop(task: str, args, optimizer, amp, scaler, loss_of, waits: bool):
    """A round of a plain loop over `loss_of(images, targets)`, targets None in pre-training. `waits`: for
    each loss and at the end of each step, as the reference does.
    """
    device, loader = args.where, make_loader(args, normalised=True)
    cuda, mixup = device.type == "cuda", make_mixup()

    def step_round() -> None:
        for images, labels, _ in loader:
            images, targets = images.to(device, non_blocking=True), None
            if task == "finetune":  # Mixup writes into its batch, which is the loader's on CPU
                labels = labels.to(device, non_blocking=True)
                images, targets = mixup(images if cuda else images.clone(), labels)
            with precision.autocast(device, amp):
                loss = loss_of(images, targets)
            if waits:
                loss.item()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if waits and cuda:
                torch.cuda.synchronize()

    return step_round


def make_plain(task: str, name: str, args):
    """A round of the plain loop (see the top of bench_step.py)."""
    model, cuda = make_model(task, name, args).train(), args.where.type == "cuda"
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    optimizer = make_optimizer(model, fused=False, foreach=False)
    scaler = torch.amp.GradScaler(args.where.type, enabled=cuda)
    criterion = SoftTargetCrossEntropy()

    def loss_of(images, targets):
        if task == "pretrain":
            return model(images, mask_ratio=args.mask_ratio)[0]
        return criterion(model(images), targets)

    return make_loop(task, args, optimizer, torch.float16 if cuda else None, scaler, loss_of, waits=True)


def make_hugging_face(variant: str, task: str, name: str, args):
    """A round of transformers' model of the same sizes, in our precision."""
    import transformers

    ours = make_model(task, name, argparse.Namespace(**{**vars(args), "where": torch.device("meta")}))
    sizes = dict(
        hidden_size=ours.cls_token.shape[-1], num_hidden_layers=len(ours.blocks), layer_norm_eps=1e-6,
        num_attention_heads=ours.blocks[0].attn.num_heads, intermediate_size=4 * ours.cls_token.shape[-1],
        image_size=args.input_size, patch_size=ours.patch_embed.patch_size[0], hidden_dropout_prob=0.0,
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
        model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes, **decoder))
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=CLASSES))
    model = model.to(args.where).train()
    fused = args.hf_adamw == "fused" and precision.has_fused_adamw(args.where)
    optimizer = make_optimizer(model, fused=fused or None)
    called = torch.compile(model) if variant == "hf_compiled" else model
    amp, criterion = precision.resolve_amp_dtype(args.amp_dtype, args.where), SoftTargetCrossEntropy()
    scaler = torch.amp.GradScaler(args.where.type, enabled=amp == torch.float16)

    def loss_of(images, targets):
        output = called(pixel_values=images)
        return output.loss if task == "pretrain" else criterion(output.logits, targets)

    return make_loop(task, args, optimizer, amp, scaler, loss_of, waits=False)


def make_variant(variant: str, task: str, name: str, args):
    if variant == "plain":
        return make_plain(task, name, args)
    return (make_ours if variant.split()[0] in OURS else make_hugging_face)(variant, task, name, args)


def settings_of(variant: str, device: torch.device) -> None:
    """What the scripts set (precision.py) for ours; of that only TF32 for Hugging Face's; torch's and
    glibc's defaults in the plain loop.
    """
    give_back_freed_memory()
    torch.set_float32_matmul_precision("highest")
    if variant.split()[0] in OURS or (variant != "plain" and device.type == "cuda"):
        precision.prepare_device(device, None)
