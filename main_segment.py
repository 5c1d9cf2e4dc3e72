r"""Segments images: a pre-trained encoder under a head that gives each pixel a class.

Look at it run, with no data and no GPU, after a pre-training of the tiny model on the demo set:
    python demo/make_shapes.py --masks shapes
    python main_segment.py --data_path shapes --finetune output_dir/checkpoint-9.pth --mode linear \
        --model vit_tiny_patch16 --input_size 64 --patch_size 8 --epochs 5 --warmup_epochs 1

On your images (DIR/train/images/..., DIR/train/masks/..., DIR/val/...; masks: PNGs of class numbers):
    python main_segment.py --data_path DIR --finetune mae_pretrain_vit_base.pth --model vit_base_patch16

Evaluate; everything about the model is in the checkpoint:
    python main_segment.py --eval --resume output_segment/checkpoint-best.pth --data_path DIR
"""

import argparse

import torch

import models_vit
from engine_finetune import train_one_epoch
from util.cli.flags import above, add_schedule_args, add_training_args, at_least, check_flags, fraction
from util.cli.parser import ArgumentParser, run_script
from util.compute.compile import compile_model
from util.compute.optimizer import add_optimizer_args, build_optimizer, check_optimizer_args
from util.compute.precision import NativeScalerWithGradNormCount
from util.data import segments
from util.data.depth import depth_of
from util.data.transforms import channel_stats
from util.errors import UserError
from util.evaluate.segments import probabilities
from util.lr_decay import param_groups_lrd
from util.lr_sched import scale_learning_rate
from util.processes.collectives import check_agreement, get_world_size
from util.processes.group import shut_down
from util.processes.parallel import check_fsdp, wrap_model
from util.recipes import classifier, segment
from util.recipes.epoch_end import count_trained
from util.rng import seed_all
from util.run.guard import RunGuard
from util.run.run_log import log_arguments, make_log_writer
from util.run.start import RunState, announce, close_run, gives_folder_back, open_run, train_loader
from util.sizes import image_size, size_pair
from util.weights.describe import make_model_info


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; `add_help=False`, so that launchers can take it as a parent."""
    parser = argparse.ArgumentParser("MAE segmentation", add_help=False)
    flag = parser.add_argument_group("model").add_argument
    # fmt: off
    flag("--model", default="vit_large_patch16", choices=models_vit.MODELS, metavar="MODEL",
         help=f"one of {', '.join(models_vit.MODELS)}")
    flag("--input_size", default=224, type=image_size, help="pixels of a window: 224, or 32x128")
    flag("--patch_size", type=at_least(1), help="default: the model's")
    flag("--finetune", default="", metavar="FILE|URL|FOLDER", help="weights to start from")
    flag("--nb_classes", type=at_least(1), help="default: one more than the largest value in the masks")
    flag("--mode", default="finetune", choices=["finetune", "linear", "knn"],
         help="finetune: train all, under a head that doubles the resolution twice; linear: one layer on the "
              "frozen encoder's patches (default --blr 3e-2, else 1e-3); knn: no training, each patch is as "
              "its nearest ones in train/")
    flag("--layers", default=1, type=at_least(1), metavar="N",
         help="blocks whose patches the head sees, evenly spaced up to the last: 1 or 4")
    flag = parser.add_argument_group("segmentation").add_argument
    flag("--ignore_index", default=255, type=at_least(0), help="value of a mask that is no class")
    flag("--class_weight", choices=["balanced"],
         help="pixels of rare classes count more, so that all classes count as much as others")
    flag("--short_side", type=at_least(1), metavar="PIXELS",
         help="images are evaluated with a shorter side of so many (default: a window's, which sees most of "
              "them); longer sides by overlapping windows, figures at the masks' own size")
    flag("--eval", action="store_true", help="only evaluate the checkpoint given with --resume")
    flag("--split", default="val", choices=["val", "test"], help="the folder that --eval evaluates")
    flag = add_schedule_args(
        parser, batch_size=16, epochs=50, warmup_epochs=5, blr=None, min_lr=1e-6, weight_decay=0.05
    )
    add_optimizer_args(flag)
    flag("--layer_decay", default=0.75, type=above(0), help="learning rate of a block over that of the next")
    flag("--clip_grad", type=above(0, "; leave it out for no clipping"), help="largest gradient norm")
    flag("--drop_path", default=0.1, type=fraction, help="stochastic depth of the last block")
    add_training_args(parser, fsdp=True, folder="./output_segment")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read or written."""
    check_flags(args, get_args_parser())
    check_fsdp(args)
    check_optimizer_args(args)
    if args.eval and (not args.resume or args.resume == "auto"):
        raise UserError("--eval needs the checkpoint to evaluate: --resume FILE")
    if args.split != "val" and not args.eval:
        raise UserError(f"--split {args.split}: only with --eval; training chooses its best epoch by val")
    if args.mode == "knn" and (args.resume or not args.finetune):
        raise UserError("--mode knn: trains nothing; pass the encoder with --finetune FILE")
    args.input_size = size_pair(args.input_size)
    if args.blr is None and args.lr is None:
        args.blr = 1e-3 if args.mode == "finetune" else 3e-2


def masked_images(args: argparse.Namespace, *splits: str) -> list[segments.SegmentedImages]:
    """The images of some splits with their masks, whole but for train's; sets `args.nb_classes`."""
    found = [segments.find_masked(split, args) for split in splits]
    counts = [segments.look_at_masks(*pair, args) for pair in found]
    args.nb_classes = segments.count_masked_classes(args, *counts)
    options = args.nb_classes, args.ignore_index, args.in_chans, args.seed, args.bad_images, depth_of(args)
    sets = []
    for split, pair, pixels in zip(splits, found, counts, strict=True):
        transform = segments.WholeImage(args.input_size, args.short_side, options[-1])
        if split == "train" and args.mode != "knn":
            transform = segments.CropBoth(args.input_size, options[-1])
        sets.append(segments.SegmentedImages(*pair, transform, *options))
        sets[-1].pixels = pixels  # {class: how many}, of the masks that were looked at
    return sets


@gives_folder_back
def main(args: argparse.Namespace) -> None:
    run = open_run(args, check_args, get_args_parser())
    device = run.device
    # The flags of its model come with it
    checkpoint = classifier.resume_classifier(args, "segment", run.given)
    stored = segment.adopt_head(args, checkpoint.content, checkpoint.source, run.given) if checkpoint else []
    start = classifier.read_start(args)
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)

    # Data
    sets = masked_images(args, *(["train"] * (not args.eval)), args.split)
    train_set, val_set = sets if len(sets) == 2 else (None, *sets)
    names = segments.read_class_names(args, stored)
    check_agreement(args, images=len(train_set or []), evaluated=len(val_set))
    if args.eval:
        classifier.make_report_dir(args.output_dir)
    log_arguments(args)

    # Model: the pre-trained encoder under a new head
    seed_all(args.seed)
    model = segment.build_segmenter(args, drop_path_rate=args.drop_path if args.mode == "finetune" else 0.0)
    if args.eval:
        classifier.load_for_eval(model, checkpoint, val_set)
        predict = probabilities(model.to(device).eval(), device, args)
        segment.evaluate_masks(segment.whole_images(val_set, args), predict, args, device, names, report=True)
        return shut_down()
    if args.finetune:
        classifier.start_from(model, args, start, run.given)
        del start
    model_without_ddp = model.to(device)
    if args.mode == "knn":
        segment.segment_by_neighbours(args, train_set, val_set, names, model.eval(), device)
        return shut_down()
    classifier.set_trainable_blocks(model, 0 if args.mode == "linear" else None)
    loader, sampler = train_loader(train_set, args, run.pin_memory)
    model.grad_checkpointing = args.grad_checkpointing
    compiled = compile_model(model, "forward", args, device)
    if args.distributed:
        model = wrap_model(model, device, args.fsdp)

    # Optimizer: earlier layers learn more slowly
    scale_learning_rate(args, get_world_size())
    undecayed = model_without_ddp.no_weight_decay()
    groups = param_groups_lrd(model_without_ddp, args.weight_decay, undecayed, args.layer_decay)
    optimizer = build_optimizer(groups, args, device)
    loss_scaler = NativeScalerWithGradNormCount(enabled=run.amp_dtype == torch.float16, device=device.type)
    criterion = segment.PixelLoss(segment.pixel_weights(train_set.pixels, args)).to(device)

    # Resume
    info = make_model_info(args, names, "segment")
    data = (train_set, val_set)
    state = RunState(args, model_without_ddp, optimizer, loss_scaler, info, best_acc1=-1.0, data=data)
    state.restore(checkpoint)
    log_writer = make_log_writer(args.log_dir, state.purge_step, args)
    announce(
        run, args, log_writer,
        data=f"{train_set.describe()}; evaluation: {val_set.describe()}",
        model=f"{count_trained(model_without_ddp) / 1e6:.1f} M trained parameters, {args.nb_classes} classes",
        step=f"{', compiled' if compiled else ''}; loss: {criterion}",
        steps_per_epoch=len(loader),
        metrics=("loss", "perf/test_miou"),
    )  # fmt: skip

    # Training
    val_loader = segment.whole_images(val_set, args, run.pin_memory)
    after = segment.SegmentationEpochEnd(
        args, state, model_without_ddp, val_loader, val_set, device, log_writer, names
    )
    guard = RunGuard(args, state.save, train_set, len(loader), state.meters)
    if stats := state.unfinished_epoch(evaluates=True):
        after.finish(args.start_epoch - 1, stats)
    for epoch in guard.epochs(sampler):
        stats = train_one_epoch(
            model, criterion, loader, optimizer, device, epoch, loss_scaler,
            args.clip_grad, None, log_writer, args, guard,
        )  # fmt: skip
        after.end(epoch, stats, guard)

    close_run(log_writer, guard)


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
