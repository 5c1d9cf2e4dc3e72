"""Pre-trains a masked autoencoder (MAE, arXiv 2111.06377).

Look at it run, with no data and no GPU (makes a small demo set):
    python main_pretrain.py --model mae_vit_tiny_patch16 --input_size 64 --patch_size 8 --batch_size 32 \
        --epochs 10 --warmup_epochs 1 --blr 8e-3

On your images, one GPU:
    python main_pretrain.py --data_path DIR --model mae_vit_base_patch16 --norm_pix_loss --batch_size 256

ViT-L on ImageNet as in the paper, 8 GPUs (effective batch 64 x 8 x 8 = 4096):
    torchrun --nproc_per_node 8 main_pretrain.py --data_path IMAGENET --model mae_vit_large_patch16 \
        --norm_pix_loss --batch_size 64 --accum_iter 8 --epochs 800 --warmup_epochs 40 --blr 1.5e-4

Go on after an interruption: the same command with --resume auto.
"""

import argparse
import time
from datetime import timedelta

import torch
from timm.optim import param_groups_weight_decay

import models_mae
from engine_pretrain import evaluate, train_one_epoch
from util.cli.flags import (
    add_data_args,
    add_distributed_args,
    add_run_args,
    add_speed_args,
    check_common_args,
)
from util.cli.parser import ArgumentParser, run_script
from util.compute.compile import compile_model
from util.compute.precision import (
    NativeScalerWithGradNormCount,
    has_fused_adamw,
    prepare_device,
    resolve_amp_dtype,
    resolve_device,
)
from util.data.dataset import build_pretrain_dataset, build_val_dataset
from util.data.loader import build_loader
from util.data.sampler import EpochSampler
from util.data.transforms import channel_stats
from util.errors import UserError
from util.evaluate.knn import knn_accuracy, knn_loaders
from util.figures.training import pick_images, write_pictures
from util.lr_sched import scale_learning_rate
from util.processes import signals
from util.processes.collectives import check_agreement, get_rank, get_world_size, is_main_process, log
from util.processes.fsdp import check_fsdp, full_copy, wrap_model
from util.processes.group import init_distributed_mode, shut_down
from util.rng import seed_all
from util.run.checkpoint import check_output_dir, finish_saving, load_model, save_model
from util.run.guard import RunGuard
from util.run.run_log import log_arguments, log_run, make_log_writer, trim_log, write_log
from util.sizes import image_size


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; `add_help=False`, so that launchers can take it as a parent."""
    parser = argparse.ArgumentParser("MAE pre-training", add_help=False)
    # fmt: off
    flag = parser.add_argument_group("model").add_argument
    flag("--model", default="mae_vit_large_patch16", choices=models_mae.MODELS, metavar="MODEL",
         help=f"one of {', '.join(models_mae.MODELS)}")
    flag("--input_size", default=224, type=image_size, help="pixels: 224, or 32x128 (height x width)")
    flag("--mask_ratio", default=0.75, type=float, help="share of patches to remove")
    flag("--norm_pix_loss", action="store_true", help="predict each patch normalised by its own statistics")
    flag("--patch_size", type=int, help="default: the model's")
    flag("--decoder_embed_dim", type=int, help="default: the model's")
    flag("--decoder_depth", type=int, help="default: the model's")
    flag("--decoder_num_heads", type=int, help="default: the model's")

    flag = parser.add_argument_group("optimization").add_argument
    flag("--batch_size", default=64, type=int, help="images per process and micro-step")
    flag("--accum_iter", default=1, type=int, help="micro-steps per optimizer step")
    flag("--epochs", default=400, type=int)
    flag("--warmup_epochs", default=40, type=int)
    flag("--blr", default=1e-3, type=float, help="base learning rate: lr = blr * effective batch / 256")
    flag("--lr", default=None, type=float, help="absolute learning rate, instead of --blr")
    flag("--min_lr", default=0.0, type=float, help="lower bound of the cosine")
    flag("--weight_decay", default=0.05, type=float)
    flag("--clip_grad", default=None, type=float, help="largest gradient norm (default: no clipping)")

    flag = parser.add_argument_group("pre-training").add_argument
    flag("--loader", default="default", choices=["default", "reference"],
         help="default: fast uint8 pipeline; reference: Pillow and torchvision, float32")
    flag("--repeated_aug", default=1, type=int, metavar="R",
         help="crops of each image that is decoded, R samples of the batch; an epoch then has R times as "
              "many steps, and counts as R effective epochs")
    flag("--save_freq", default=20, type=int, help="epochs between checkpoints; the last is always saved")
    flag("--vis_freq", default=20, type=int,
         help="epochs between reconstruction pictures and held-out losses (0: never)")
    flag("--knn_freq", default=0, type=int, metavar="N",
         help="epochs between k-NN accuracies of the encoder, with labelled train/ and val/ (0: never)")
    # fmt: on

    add_data_args(parser)
    add_run_args(parser)
    add_speed_args(parser)
    add_distributed_args(parser, fsdp=True)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read or written."""
    check_common_args(args)
    check_fsdp(args)
    if not 0 < args.mask_ratio < 1:
        raise UserError(f"--mask_ratio {args.mask_ratio}: must lie between 0 and 1, both excluded")
    for flag, least in [("save_freq", 1), ("vis_freq", 0), ("knn_freq", 0), ("repeated_aug", 1)]:
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least {least}")
    if args.batch_size % args.repeated_aug:
        raise UserError(
            f"--repeated_aug {args.repeated_aug}: --batch_size {args.batch_size} must be a multiple of it, "
            "so that all crops of an image lie in one batch"
        )


def build_model(args: argparse.Namespace) -> models_mae.MaskedAutoencoderViT:
    """The named model with the sizes that the flags override; raises UserError for sizes that do not fit."""
    sizes = ("patch_size", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    overrides = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    for name, value in overrides.items():
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    try:
        model = models_mae.MODELS[args.model](
            img_size=args.input_size, in_chans=args.in_chans, norm_pix_loss=args.norm_pix_loss, **overrides
        )
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    patches = model.patch_embed.num_patches
    kept = int(patches * (1 - args.mask_ratio))
    if not 0 < kept < patches:
        raise UserError(f"--mask_ratio {args.mask_ratio}: keeps {kept or 'none'} of {patches} patches")
    return model


def main(args: argparse.Namespace) -> None:
    init_distributed_mode(args)
    check_args(args)
    device = resolve_device(args.device, args.gpu)
    amp_dtype = resolve_amp_dtype(args.amp_dtype, device)
    precision = prepare_device(device, amp_dtype)
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)
    log_arguments(args)

    # Data: no padding and no partial batch in training; every held-out image counts once
    dataset = build_pretrain_dataset(args)
    check_agreement(args, images=len(dataset))
    sampler = EpochSampler(
        len(dataset), get_world_size(), get_rank(), args.seed, batch_size=args.batch_size,
        repeats=args.repeated_aug,
    )  # fmt: skip
    pin_mem = args.pin_mem and device.type == "cuda"
    loader = build_loader(dataset, sampler, args.batch_size, args.num_workers, pin_mem, drop_last=True)
    steps_per_epoch = len(loader)
    if steps_per_epoch == 0:
        times = f" x {args.repeated_aug} crops" if args.repeated_aug > 1 else ""
        raise UserError(
            f"--batch_size {args.batch_size}: {get_world_size()} x {args.batch_size} is more than the "
            f"{len(dataset)} images of the set{times}, so that no batch would be full"
        )
    val_dataset = build_val_dataset(args) if args.vis_freq else None
    val_loader = None
    if val_dataset is not None:
        val_sampler = EpochSampler(len(val_dataset), get_world_size(), get_rank(), shuffle=False)
        val_loader = build_loader(val_dataset, val_sampler, args.batch_size, args.num_workers, pin_mem)
    knn = knn_loaders(args) if args.knn_freq else None
    pictures = pick_images(val_dataset or dataset) if args.vis_freq and is_main_process() else None

    # Model
    seed_all(args.seed)
    model_without_ddp = model = build_model(args).to(device)
    model.grad_checkpointing = args.grad_checkpointing
    compiled = compile_model(model, "forward", args, device)
    if args.distributed:
        model = wrap_model(model, device, args.fsdp)

    # Optimizer: biases and norms are not decayed
    effective_batch = scale_learning_rate(args, get_world_size())
    groups = param_groups_weight_decay(model_without_ddp, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=has_fused_adamw(device))
    loss_scaler = NativeScalerWithGradNormCount(enabled=amp_dtype == torch.float16, device=device.type)

    # Resume
    check_output_dir(args.output_dir, model_without_ddp)
    resumed = load_model(args, model_without_ddp, optimizer, loss_scaler) or {}
    log_writer = make_log_writer(
        args.log_dir, purge_step=int(1000 * args.start_epoch) if "epoch" in resumed else None
    )

    millions = sum(p.numel() for p in model.parameters()) / 1e6
    log_run(
        log_writer, args,
        f"data: {dataset.describe()}; held out: {val_dataset.describe() if val_dataset else 'none'}",
        f"model: {args.model}, {millions:.1f} M parameters",
        f"device: {device}, precision: {precision}{', compiled' if compiled else ''}",
        f"effective batch: {args.batch_size} x {get_world_size()} processes x {args.accum_iter} accumulated "
        f"= {effective_batch}, {steps_per_epoch} micro-steps an epoch; actual lr: {args.lr:.2e}",
        metrics=("train_loss", "val_loss", "knn_acc1"),
    )  # fmt: skip
    if args.repeated_aug > 1:
        log(
            f"repeated augmentation: {args.repeated_aug} crops of each decoded image, each a sample of the "
            f"batch; {args.epochs} epochs are {args.epochs * args.repeated_aug} effective epochs"
        )

    # Training
    def save(epoch: int, step: int = 0, meters: list | None = None, **extra) -> None:
        save_model(
            args, epoch, model, model_without_ddp, optimizer, loss_scaler, step, meters=meters, **extra
        )

    def finish_epoch(epoch: int, stats: dict[str, float]) -> None:
        """What comes after an epoch's training and its checkpoint: held-out loss, k-NN, pictures, log."""
        final = epoch + 1 == args.epochs or guard.reached_max_steps
        look = args.vis_freq and (final or epoch % args.vis_freq == 0)
        measure = knn and (final or epoch % args.knn_freq == 0)
        whole = full_copy(model_without_ddp) if look or measure else None
        record = {**{f"train_{name}": value for name, value in stats.items()}, "epoch": epoch}
        if look and val_loader is not None:
            record["val_loss"] = evaluate(val_loader, whole, device, args)
            log(f"Epoch: [{epoch}] held-out loss: {record['val_loss']:.4f}")
        if look and pictures is not None:
            write_pictures(whole, pictures, args, epoch, record.get("val_loss"), log_writer)
        if measure:
            record["knn_acc1"] = knn_accuracy(whole, *knn, device, args=args)["acc1"]
            log(f"Epoch: [{epoch}] k-NN accuracy: {record['knn_acc1']:.2f} %")
        if log_writer is not None:
            for name in record.keys() & {"val_loss", "knn_acc1"}:
                log_writer.add_scalar(name, record[name], int((epoch + 1) * 1000))
            log_writer.flush()
        write_log(args.output_dir, record)

    guard = RunGuard(args, save, dataset, steps_per_epoch, resumed.get("meters"))
    signals.install()
    start_time = time.time()
    if "epoch" in resumed and not trim_log(args.output_dir, args.start_epoch) and "stats" in resumed:
        finish_epoch(args.start_epoch - 1, resumed["stats"])  # the run ended before that epoch was logged
    for epoch in range(args.start_epoch, args.epochs):
        start_step = args.start_step if epoch == args.start_epoch else 0
        if guard.check_max_steps(epoch, start_step):
            break
        sampler.set_epoch(epoch, start_step)
        stats = train_one_epoch(model, loader, optimizer, device, epoch, loss_scaler, log_writer, args, guard)
        dataset.report_bad_images()
        if guard.inside_epoch:
            break
        if guard.stopped or epoch + 1 == args.epochs or epoch % args.save_freq == 0:
            save(epoch, stats=stats)
        if guard.signal_came():  # there may be little time: the rest of the epoch comes after resuming
            break
        finish_epoch(epoch, stats)
        if guard.stopped:
            break

    if guard.reached_max_steps:
        log(f"stopped by --max_steps {args.max_steps}")
    log(f"Training time {timedelta(seconds=int(time.time() - start_time))}")
    if log_writer is not None:
        log_writer.close()
    finish_saving()
    shut_down()
    guard.leave()


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
