r"""Trains a linear classifier on a frozen encoder (linear probing; MAE, arXiv 2111.06377, appendix A.1).

Look at it run, with no data and no GPU, after a pre-training of the tiny model on the demo set:
    python main_linprobe.py --finetune output_dir/checkpoint-9.pth --model vit_tiny_patch16 --input_size 64 \
        --patch_size 8 --epochs 20 --cache_features --output_dir probe

On your images (DIR/train/CLASS/..., DIR/val/CLASS/...), in minutes, as the encoder sees each picture once:
    python main_linprobe.py --data_path DIR --finetune mae_pretrain_vit_base.pth --model vit_base_patch16 \
        --cache_features --output_dir probe

Without --finetune the encoder is random: what a probe makes of it is the figure to compare with.
"""

import argparse
import functools

import torch

from engine_finetune import train_one_epoch
from util.cli.flags import add_schedule_args, add_training_args, at_least
from util.cli.parser import ArgumentParser, run_script
from util.compute.compile import compile_model
from util.compute.precision import NativeScalerWithGradNormCount
from util.data.labelled import labelled_images
from util.data.presets import eval_transform, probe_transform
from util.data.transforms import channel_stats
from util.errors import TrainingError, UserError
from util.evaluate.exact import eval_loader
from util.evaluate.metrics import best_metric
from util.evaluate.report import evaluate_and_report
from util.lars import LARS
from util.lr_sched import scale_learning_rate
from util.processes.collectives import check_agreement, get_world_size, log
from util.processes.group import shut_down
from util.processes.parallel import wrap_model
from util.recipes import classifier
from util.recipes.epoch_end import ClassifierEpochEnd, count_trained
from util.recipes.labels import classifier_info, target_loss
from util.recipes.probe import cache_features, encoder_digest
from util.rng import seed_all
from util.run.guard import RunGuard
from util.run.run_log import log_arguments, make_log_writer
from util.run.start import RunState, announce, close_run, gives_folder_back, open_run, train_loader
from util.weights.encoder import check_final_norm


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; `add_help=False`, so that launchers can take it as a parent."""
    parser = argparse.ArgumentParser("MAE linear probing", add_help=False)
    classifier.add_classifier_args(parser, global_pool=False)
    # fmt: off
    flag = add_schedule_args(
        parser, batch_size=512, epochs=90, warmup_epochs=10, blr=0.1, min_lr=0.0, weight_decay=0
    )
    flag("--no_aug", action="store_true", help="train on the centre crop instead of random crops")
    flag("--cache_features", action="store_true",
         help="run the encoder once and train the head on its features, which are kept in memory")
    flag("--cache_views", default=1, type=at_least(1), metavar="V",
         help="of --cache_features; 1: the centre crop of each image, more: V random crops, used in turn")
    add_training_args(parser, backward=False, folder="./output_linprobe")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read or written."""
    classifier.check_classifier_args(args, get_args_parser())
    if args.batch_size < 2 and not args.eval:
        raise UserError(f"--batch_size {args.batch_size}: BatchNorm needs at least 2 images per process")
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


@gives_folder_back
def main(args: argparse.Namespace) -> None:
    run = open_run(args, check_args, get_args_parser())
    device = run.device
    # The flags of its model come with it
    checkpoint = classifier.resume_classifier(args, "linprobe", run.given)
    start = classifier.read_start(args)
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)

    # Data
    centre = functools.partial(eval_transform, always_crop=True, uint8=True)  # normalised on the device
    augment = not args.no_aug and not (args.cache_features and args.cache_views == 1)
    train_set = None
    if not args.eval:
        random_crop = functools.partial(probe_transform, uint8=True)
        train_set = labelled_images("train", args, random_crop if augment else centre)
    val_set = labelled_images(getattr(args, "split", "val"), args, centre)
    classifier.prepare_classes(args, train_set, val_set, checkpoint, run.given)
    check_agreement(args, images=len(train_set or []), evaluated=len(val_set))
    val_loader = eval_loader(val_set, args, run.pin_memory)
    loader, sampler = train_loader(train_set, args, run.pin_memory) if train_set else (None, None)
    log_arguments(args)

    # Model: only the head learns
    seed_all(args.seed)
    model = classifier.build_classifier(args)
    if args.finetune and not args.eval:
        check_final_norm(classifier.start_from(model, args, start, run.given))
        del start
    put_on_probe(model)
    model_without_ddp = model.to(device)
    if args.eval:
        classifier.load_for_eval(model, checkpoint, val_set)
        evaluate_and_report(val_loader, model, device, args, val_set, report=True)
        shut_down()
        return
    compiled = not args.cache_features and compile_model(model, "forward_features", args, device)

    # Optimizer
    scale_learning_rate(args, get_world_size())
    optimizer = LARS(model_without_ddp.head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    loss_scaler = NativeScalerWithGradNormCount(enabled=run.amp_dtype == torch.float16, device=device.type)
    criterion = (target_loss(args, train_set) or torch.nn.CrossEntropyLoss()).to(device)

    # Resume
    info = classifier_info(args, val_set, "linprobe", checkpoint)
    data = (train_set, val_set)
    state = RunState(args, model_without_ddp, optimizer, loss_scaler, info, best_acc1=-1.0, data=data)
    state.restore(checkpoint)
    log_writer = make_log_writer(args.log_dir, state.purge_step, args)
    millions = count_trained(model_without_ddp) / 1e6
    announce(
        run, args, log_writer,
        data=f"{train_set.describe()}; evaluation: {val_set.describe()}",
        model=f"{millions:.3f} M trained parameters, {args.nb_classes} {val_set.targets.words}",
        step=", compiled" if compiled else "",
        steps_per_epoch=len(loader),
        metrics=("loss", f"perf/test_{best_metric(args, val_set.targets.task)}", "perf/test_loss"),
    )  # fmt: skip

    # With cached features the head alone is the model that is trained and evaluated
    trained = model_without_ddp
    if args.cache_features:
        loader, val_loader = cache_features(
            model_without_ddp, train_set, val_set, args, device, run.pin_memory
        )
        trained, sampler = model_without_ddp.head, loader.sampler
    model = wrap_model(trained, device) if args.distributed else trained

    # Training
    after = ClassifierEpochEnd(args, state, trained, val_loader, val_set, device, log_writer)
    guard = RunGuard(args, state.save, train_set, len(loader), state.meters)
    before = encoder_digest(model_without_ddp)
    if stats := state.unfinished_epoch(evaluates=True):
        after.finish(args.start_epoch - 1, stats)
    for epoch in guard.epochs(sampler):
        stats = train_one_epoch(
            model, criterion, loader, optimizer, device, epoch, loss_scaler,
            None, None, log_writer, args, guard,
        )  # fmt: skip
        after.end(epoch, stats, guard)

    if encoder_digest(model_without_ddp) != before:
        raise TrainingError(
            "the frozen encoder changed while the head was trained; do not use this run's figures"
        )
    log(f"the encoder is unchanged (SHA-256 {before[:16]})")
    close_run(log_writer, guard)


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
