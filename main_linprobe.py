"""Trains a linear classifier on a frozen encoder (linear probing; MAE, arXiv 2111.06377, appendix A.1).

Look at it run, with no data and no GPU, after a pre-training of the tiny model on the demo set:
    python main_linprobe.py --finetune output_dir/checkpoint-9.pth --model vit_tiny_patch16 --input_size 64 \
        --patch_size 8 --epochs 20 --cache_features --output_dir probe --log_dir probe

On your images (DIR/train/CLASS/..., DIR/val/CLASS/...), in minutes, as the encoder sees each picture once:
    python main_linprobe.py --data_path DIR --finetune mae_pretrain_vit_base.pth --model vit_base_patch16 \
        --cache_features --output_dir probe

Without --finetune the encoder is random: what a probe makes of it is the figure to compare with.
"""

import argparse
import time
from datetime import timedelta

import torch

from engine_finetune import train_one_epoch
from util.cli.flags import add_data_args, add_distributed_args, add_run_args, add_speed_args
from util.cli.parser import ArgumentParser, run_script
from util.compute.compile import compile_model
from util.compute.precision import (
    NativeScalerWithGradNormCount,
    prepare_device,
    resolve_amp_dtype,
    resolve_device,
)
from util.data.labelled import labelled_images
from util.data.presets import eval_transform, probe_transform
from util.data.transforms import channel_stats
from util.errors import TrainingError, UserError
from util.lars import LARS
from util.lr_sched import scale_learning_rate
from util.processes import signals
from util.processes.collectives import check_agreement, get_world_size, log
from util.processes.fsdp import wrap_model
from util.processes.group import init_distributed_mode, shut_down
from util.recipes.classifier import (
    add_classifier_args,
    build_classifier,
    check_classifier_args,
    eval_loader,
    evaluate_and_report,
    load_for_eval,
    prepare_classes,
    read_resume,
    start_from,
    train_loader,
)
from util.recipes.epoch_end import EpochEnd, trim_transfer_log
from util.recipes.probe import cache_features, encoder_digest
from util.rng import seed_all
from util.run.checkpoint import check_output_dir, finish_saving, load_model
from util.run.guard import RunGuard
from util.run.run_log import log_arguments, log_run, make_log_writer
from util.weights.describe import make_model_info
from util.weights.encoder import check_final_norm


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; `add_help=False`, so that launchers can take it as a parent."""
    parser = argparse.ArgumentParser("MAE linear probing", add_help=False)
    add_classifier_args(parser, global_pool=False)
    # fmt: off
    flag = parser.add_argument_group("optimization").add_argument
    flag("--batch_size", default=512, type=int, help="images per process and micro-step")
    flag("--accum_iter", default=1, type=int, help="micro-steps per optimizer step")
    flag("--epochs", default=90, type=int)
    flag("--warmup_epochs", default=10, type=int)
    flag("--blr", default=0.1, type=float, help="base learning rate: lr = blr * effective batch / 256")
    flag("--lr", default=None, type=float, help="absolute learning rate, instead of --blr")
    flag("--min_lr", default=0.0, type=float, help="lower bound of the cosine")
    flag("--weight_decay", default=0, type=float)
    flag("--no_aug", action="store_true", help="train on the centre crop instead of random crops")
    flag("--cache_features", action="store_true",
         help="run the encoder once and train the head on its features, which are kept in memory")
    flag("--cache_views", default=1, type=int, metavar="V",
         help="of --cache_features; 1: the centre crop of each image, more: V random crops, used in turn")
    # fmt: on
    add_data_args(parser)
    add_run_args(parser)
    add_speed_args(parser, backward=False)
    add_distributed_args(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read or written."""
    check_classifier_args(args)
    if args.batch_size < 2 and not args.eval:
        raise UserError(f"--batch_size {args.batch_size}: BatchNorm needs at least 2 images per process")
    if args.cache_views < 1:
        raise UserError(f"--cache_views {args.cache_views}: must be at least 1")
    if args.cache_views > 1 and (args.no_aug or not args.cache_features):
        raise UserError("--cache_views: needs --cache_features, and --no_aug would make all views the same")
    if args.cache_features and (args.compile or args.compile_mode != "default"):
        raise UserError("--compile, --compile_mode: not with --cache_features, which runs the encoder once")


def put_on_probe(model: torch.nn.Module) -> None:
    """Replaces the head by BatchNorm (without parameters) and a new linear layer; freezes all else."""
    torch.nn.init.trunc_normal_(model.head.weight, std=0.01)
    torch.nn.init.zeros_(model.head.bias)
    norm = torch.nn.BatchNorm1d(model.head.in_features, affine=False, eps=1e-6)
    model.head = torch.nn.Sequential(norm, model.head)
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def main(args: argparse.Namespace) -> None:
    if not args.eval:
        signals.install()
    init_distributed_mode(args)
    check_args(args)
    resumed = read_resume(args, "linprobe", get_args_parser())
    device = resolve_device(args.device, args.gpu)
    amp_dtype = resolve_amp_dtype(args.amp_dtype, device)
    precision = prepare_device(device, amp_dtype)
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)

    # Data
    pin_mem = args.pin_mem and device.type == "cuda"
    centre = eval_transform(args, always_crop=True)
    augment = not args.no_aug and not (args.cache_features and args.cache_views == 1)
    train_set = None
    if not args.eval:
        train_set = labelled_images("train", args, probe_transform(args) if augment else centre)
    val_set = labelled_images("val", args, centre)
    prepare_classes(args, train_set, val_set, resumed)
    check_agreement(args, images=len(train_set or []), evaluated=len(val_set))
    val_loader = eval_loader(val_set, args, pin_mem)
    loader, sampler = train_loader(train_set, args, pin_mem) if train_set else (None, None)
    log_arguments(args)

    # Model: only the head learns
    seed_all(args.seed)
    model = build_classifier(args)
    if args.finetune and not args.eval:
        check_final_norm(start_from(model, args))
    put_on_probe(model)
    model_without_ddp = model.to(device)
    if args.eval:
        load_for_eval(model, resumed, args.resume)
        evaluate_and_report(val_loader, model, device, args, val_set, report=True)
        shut_down()
        return

    compiled = not args.cache_features and compile_model(model, "forward_features", args, device)

    # Optimizer
    effective_batch = scale_learning_rate(args, get_world_size())
    optimizer = LARS(model_without_ddp.head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    loss_scaler = NativeScalerWithGradNormCount(enabled=amp_dtype == torch.float16, device=device.type)
    criterion = torch.nn.CrossEntropyLoss()

    # Resume
    check_output_dir(args.output_dir, model_without_ddp)
    resumed = load_model(args, model_without_ddp, optimizer, loss_scaler) or {}
    purge_step = int(1000 * args.start_epoch) if "epoch" in resumed else None
    log_writer = make_log_writer(args.log_dir, purge_step)

    info = make_model_info(args, val_set.classes, "linprobe")
    n_parameters = sum(p.numel() for p in model_without_ddp.parameters() if p.requires_grad)
    log_run(
        log_writer, args,
        f"data: {train_set.describe()}; evaluation: {val_set.describe()}",
        f"model: {args.model}, {n_parameters / 1e6:.3f} M trained parameters, {args.nb_classes} classes",
        f"device: {device}, precision: {precision}{', compiled' if compiled else ''}",
        f"effective batch: {args.batch_size} x {get_world_size()} processes x {args.accum_iter} accumulated "
        f"= {effective_batch}, {len(loader)} micro-steps an epoch; actual lr: {args.lr:.2e}",
        metrics=("loss", "perf/test_acc1", "perf/test_loss"),
    )  # fmt: skip

    # With cached features the head alone is the model that is trained and evaluated
    trained = model_without_ddp
    if args.cache_features:
        loader, val_loader = cache_features(model_without_ddp, train_set, val_set, args, device, pin_mem)
        trained, sampler = model_without_ddp.head, loader.sampler
    model = wrap_model(trained, device) if args.distributed else trained

    # Training
    end = EpochEnd(
        args, model_without_ddp, trained, optimizer, loss_scaler, val_loader, val_set,
        device, log_writer, info, resumed.get("best_acc1", -1.0),
    )  # fmt: skip
    guard = RunGuard(args, end.save, train_set, len(loader), resumed.get("meters"))
    before = encoder_digest(model_without_ddp)
    start_time = time.time()
    if trim_transfer_log(args, resumed):
        end.finish(args.start_epoch - 1, resumed["stats"])  # the run ended before that epoch was logged
    for epoch in range(args.start_epoch, args.epochs):
        start_step = args.start_step if epoch == args.start_epoch else 0
        if guard.check_max_steps(epoch, start_step):
            break
        sampler.set_epoch(epoch, start_step)
        stats = train_one_epoch(
            model, criterion, loader, optimizer, device, epoch, loss_scaler,
            None, None, log_writer, args, guard,
        )  # fmt: skip
        train_set.report_bad_images()
        if guard.inside_epoch:
            break
        if guard.signal_came():  # there may be little time: evaluate after resuming
            end.save(epoch, stats=stats)
            break
        end.finish(epoch, stats)
        if guard.stopped or (epoch + 1 < args.epochs and guard.signal_came()):
            break

    if encoder_digest(model_without_ddp) != before:
        raise TrainingError(
            "the frozen encoder changed while the head was trained; do not use this run's figures"
        )
    log(f"the encoder is unchanged (SHA-256 {before[:16]})")
    log(f"Training time {timedelta(seconds=int(time.time() - start_time))}")
    if log_writer is not None:
        log_writer.close()
    finish_saving()
    shut_down()
    guard.leave()


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
