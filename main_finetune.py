r"""Fine-tunes a pre-trained encoder for classification, or evaluates the result (MAE, arXiv 2111.06377).

Look at it run, with no data and no GPU, after a pre-training of the tiny model on the demo set:
    python main_finetune.py --finetune output_dir/checkpoint-9.pth --model vit_tiny_patch16 --input_size 64 \
        --patch_size 8 --epochs 5 --warmup_epochs 1 --output_dir finetuned

On your images (DIR/train/CLASS/..., DIR/val/CLASS/...), one GPU:
    python main_finetune.py --data_path DIR --finetune mae_pretrain_vit_base.pth --model vit_base_patch16 \
        --batch_size 64 --epochs 100 --blr 5e-4 --layer_decay 0.65 --mixup 0.8 --cutmix 1.0

Evaluate; everything about the model is in the checkpoint:
    python main_finetune.py --eval --resume finetuned/checkpoint-best.pth --data_path DIR

The recipes of the paper are in FINETUNE.md.
"""

import argparse
from collections.abc import Callable

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from engine_finetune import train_one_epoch
from util.cli.flags import above, add_schedule_args, add_training_args, at_least, fraction
from util.cli.parser import ArgumentParser, run_script
from util.compute.compile import compile_model
from util.compute.optimizer import add_optimizer_args, build_optimizer, check_optimizer_args
from util.compute.precision import NativeScalerWithGradNormCount
from util.data.labelled import LabelledImages, labelled_images
from util.data.transforms import channel_stats
from util.errors import UserError
from util.evaluate.exact import eval_loader
from util.evaluate.metrics import best_metric
from util.evaluate.report import evaluate_and_report
from util.lr_decay import param_groups_lrd
from util.lr_sched import scale_learning_rate
from util.processes.collectives import check_agreement, get_world_size
from util.processes.group import shut_down
from util.processes.parallel import check_fsdp, wrap_model
from util.recipes import classifier
from util.recipes.epoch_end import ClassifierEpochEnd, count_trained
from util.recipes.labels import classifier_info, label_mixup, target_loss
from util.rng import seed_all
from util.run.guard import RunGuard
from util.run.run_log import log_arguments, make_log_writer
from util.run.start import RunState, announce, close_run, gives_folder_back, open_run, train_loader


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; `add_help=False`, so that launchers can take it as a parent."""
    parser = argparse.ArgumentParser("MAE fine-tuning", add_help=False)
    classifier.add_classifier_args(parser, global_pool=True)
    # fmt: off
    flag = add_schedule_args(
        parser, batch_size=64, epochs=50, warmup_epochs=5, blr=1e-3, min_lr=1e-6, weight_decay=0.05
    )
    add_optimizer_args(flag)
    flag("--layer_decay", default=0.75, type=above(0), help="learning rate of a block over that of the next")
    flag("--clip_grad", type=above(0, "; leave it out for no clipping"),
         help="largest gradient norm (default: no clipping)")
    flag("--drop_path", default=0.1, type=fraction, help="stochastic depth of the last block")
    flag("--trainable_blocks", default=None, type=float, metavar="N",
         help="train only the last N blocks; 0: the head, 0.5: also the last MLP (default: all)")
    flag = parser.add_argument_group("augmentation").add_argument
    flag("--color_jitter", type=at_least(0, float), help="strength; used without --aa only")
    flag("--aa", default="rand-m9-mstd0.5-inc1", help='timm\'s AutoAugment policy, "" for none')
    flag("--smoothing", default=0.1, type=fraction, help="label smoothing")
    flag("--reprob", default=0.25, type=fraction, help="probability of random erasing")
    flag("--remode", default="pixel", help="what erased pixels become: pixel, rand or const")
    flag("--recount", default=1, type=at_least(1), help="most areas erased per image")
    flag("--resplit", action="store_true", help="accepted for old commands; does nothing")
    flag("--mixup", default=0, type=at_least(0, float), help="mixup alpha, 0: off (published recipe: 0.8)")
    flag("--cutmix", default=0, type=at_least(0, float), help="cutmix alpha, 0: off (published recipe: 1.0)")
    flag("--cutmix_minmax", default=None, type=float, nargs="+", help="range of the box, instead of alpha")
    flag("--mixup_prob", default=1.0, type=fraction, help="probability of mixup or cutmix")
    flag("--mixup_switch_prob", default=0.5, type=fraction, help="of cutmix when both are on")
    flag("--mixup_mode", default="batch", choices=["batch", "pair", "elem"], help="what shares a weight")
    add_training_args(parser, fsdp=True, folder="./output_finetune")
    return parser


def uses_mixup(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read or written."""
    classifier.check_classifier_args(args, get_args_parser())
    check_fsdp(args)
    check_optimizer_args(args)
    if uses_mixup(args) and args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size}: mixup and cutmix pair images, so it must be even")
    if args.cutmix_minmax is not None:
        if len(args.cutmix_minmax) != 2:
            raise UserError("--cutmix_minmax: takes two numbers, smallest and largest")
        if not 0 <= args.cutmix_minmax[0] < args.cutmix_minmax[1] <= 1:
            text = " ".join(map(str, args.cutmix_minmax))
            raise UserError(f"--cutmix_minmax {text}: must rise and lie between 0 and 1")
    if args.remode not in ("pixel", "rand", "const"):
        raise UserError(f"--remode {args.remode}: must be pixel, rand or const")


def build_criterion(
    args: argparse.Namespace, dataset: LabelledImages | None = None
) -> tuple[torch.nn.Module, Callable | None]:
    """The loss of a training set, and what mixes a batch (images, labels) before it, if anything."""
    loss, mixup = target_loss(args, dataset, args.smoothing) if dataset else None, None
    if uses_mixup(args):
        options = {
            "mixup_alpha": args.mixup,
            "cutmix_alpha": args.cutmix,
            "cutmix_minmax": args.cutmix_minmax,
            "prob": args.mixup_prob,
            "switch_prob": args.mixup_switch_prob,
            "mode": args.mixup_mode,
        }
        if loss and loss.task != "class":
            mixup = label_mixup(loss.task, **options)
        else:
            mixup = Mixup(label_smoothing=args.smoothing, num_classes=args.nb_classes, **options)
    if loss or mixup:
        return loss or SoftTargetCrossEntropy(), mixup
    if args.smoothing > 0:
        return LabelSmoothingCrossEntropy(smoothing=args.smoothing), None
    return torch.nn.CrossEntropyLoss(), None


@gives_folder_back
def main(args: argparse.Namespace) -> None:
    run = open_run(args, check_args, get_args_parser())
    device = run.device
    # The flags of its model come with it
    checkpoint = classifier.resume_classifier(args, "finetune", run.given)
    start = classifier.read_start(args)
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)

    # Data
    train_set = None if args.eval else labelled_images("train", args)
    val_set = labelled_images(getattr(args, "split", "val"), args)
    classifier.prepare_classes(args, train_set, val_set, checkpoint, run.given)
    check_agreement(args, images=len(train_set or []), evaluated=len(val_set))
    val_loader = eval_loader(val_set, args, run.pin_memory)
    loader, sampler = train_loader(train_set, args, run.pin_memory) if train_set else (None, None)
    log_arguments(args)

    # Model: the pre-trained encoder under a new head
    seed_all(args.seed)
    model = classifier.build_classifier(args, drop_path_rate=args.drop_path)
    if args.eval:
        classifier.load_for_eval(model, checkpoint, val_set)
        evaluate_and_report(val_loader, model.to(device), device, args, val_set, report=True)
        shut_down()
        return
    if args.finetune:
        classifier.start_from(model, args, start, run.given)
        del start
    torch.nn.init.trunc_normal_(model.head.weight, std=2e-5)
    torch.nn.init.zeros_(model.head.bias)
    classifier.set_trainable_blocks(model, args.trainable_blocks)
    model_without_ddp = model.to(device)
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
    criterion, mixup = build_criterion(args, train_set)
    criterion.to(device)

    # Resume
    info = classifier_info(args, val_set, "finetune", checkpoint)
    data = (train_set, val_set)
    state = RunState(args, model_without_ddp, optimizer, loss_scaler, info, best_acc1=-1.0, data=data)
    state.restore(checkpoint)
    log_writer = make_log_writer(args.log_dir, state.purge_step, args)
    millions = count_trained(model_without_ddp) / 1e6
    announce(
        run, args, log_writer,
        data=f"{train_set.describe()}; evaluation: {val_set.describe()}",
        model=f"{millions:.1f} M trained parameters, {args.nb_classes} {val_set.targets.words}",
        step=f"{', compiled' if compiled else ''}; loss: {criterion}",
        steps_per_epoch=len(loader),
        metrics=("loss", f"perf/test_{best_metric(args, val_set.targets.task)}", "perf/test_loss"),
    )  # fmt: skip

    # Training
    after = ClassifierEpochEnd(args, state, model_without_ddp, val_loader, val_set, device, log_writer)
    guard = RunGuard(args, state.save, train_set, len(loader), state.meters)
    if stats := state.unfinished_epoch(evaluates=True):
        after.finish(args.start_epoch - 1, stats)
    for epoch in guard.epochs(sampler):
        stats = train_one_epoch(
            model, criterion, loader, optimizer, device, epoch, loss_scaler,
            args.clip_grad, mixup, log_writer, args, guard,
        )  # fmt: skip
        after.end(epoch, stats, guard)

    close_run(log_writer, guard)


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
