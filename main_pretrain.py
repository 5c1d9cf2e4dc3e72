r"""Pre-trains a masked autoencoder (MAE, arXiv 2111.06377).

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

import torch
from timm.optim import param_groups_weight_decay

import models_mae
from engine_pretrain import evaluate, train_one_epoch
from util.cli.flags import above, add_schedule_args, add_training_args, at_least, check_flags, inner_fraction
from util.cli.parser import ArgumentParser, run_script
from util.cli.questions import add_question_args, asks, settle_target
from util.compute.compile import compile_model
from util.compute.optimizer import add_optimizer_args, build_optimizer, check_optimizer_args
from util.compute.precision import NativeScalerWithGradNormCount
from util.data.dataset import build_pretrain_dataset, build_val_dataset
from util.data.transforms import channel_stats
from util.errors import UserError
from util.lr_sched import scale_learning_rate, stable_epochs
from util.processes.collectives import check_agreement, get_world_size
from util.processes.parallel import check_fsdp, wrap_model
from util.recipes.pretrain_end import EpochEnd
from util.rng import seed_all
from util.run.guard import RunGuard
from util.run.resume import read_resume
from util.run.run_log import log_arguments, make_log_writer
from util.run.start import RunState, announce, close_run, gives_folder_back, open_run, train_loader
from util.sizes import image_size


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; `add_help=False`, so that launchers can take it as a parent."""
    parser = argparse.ArgumentParser("MAE pre-training", add_help=False)
    # fmt: off
    flag = parser.add_argument_group("model").add_argument
    flag("--model", default="mae_vit_large_patch16", choices=models_mae.MODELS, metavar="MODEL",
         help=f"one of {', '.join(models_mae.MODELS)}")
    flag("--input_size", default=224, type=image_size, help="pixels: 224, or 32x128 (height x width)")
    flag("--mask_ratio", default=0.75, type=inner_fraction, help="share of patches to remove")
    flag("--norm_pix_loss", action="store_true", help="predict each patch normalised by its own statistics")
    flag("--patch_size", type=at_least(1), help="default: the model's")
    flag("--decoder_embed_dim", type=at_least(1), help="default: the model's")
    flag("--decoder_depth", type=at_least(1), help="default: the model's")
    flag("--decoder_num_heads", type=at_least(1), help="default: the model's")
    flag("--decoder", default="self", choices=["self", "cross"],
         help="self: the paper's; cross: masked patches look at the visible ones alone (models_cross.py)")
    flag("--registers", default=0, type=at_least(0), metavar="N", help="register tokens of the encoder")
    flag("--predict_ratio", default=1.0, type=float, metavar="R",
         help="with --decoder cross: share of the masked patches that a step predicts and scores")

    flag = parser.add_argument_group("start").add_argument
    flag("--init", default="", metavar="FILE|URL|FOLDER",
         help="weights to start from, with a new optimizer at epoch 0: all that --finetune of the other "
              "scripts takes; also hf://OWNER/NAME and timm:NAME")
    flag("--init_freeze", default=0, type=at_least(0), metavar="N",
         help="train only what --init does not hold for N epochs")
    flag("--extend_from", default="", metavar="FILE|URL",
         help="checkpoint of another run's stable phase (--schedule wsd, constant): a new run goes on there, "
              "for more --epochs or to cool down")

    flag = add_schedule_args(
        parser, batch_size=64, epochs=400, warmup_epochs=40, blr=1e-3, min_lr=0.0, weight_decay=0.05
    )
    flag("--clip_grad", type=above(0, "; leave it out for no clipping"),
         help="largest gradient norm (default: no clipping)")
    add_optimizer_args(flag)
    flag("--size_schedule", nargs="+", metavar="SIZE:SHARE",
         help="image sizes, and the shares of --epochs after which they begin: 160:0 192:0.5 224:0.75")

    flag = parser.add_argument_group("pre-training").add_argument
    flag("--loader", default="default", choices=["default", "reference"],
         help="default: fast uint8 pipeline; reference: Pillow and torchvision, float32")
    flag("--repeated_aug", default=1, type=at_least(1), metavar="R",
         help="crops of each image that is decoded, R samples of the batch; an epoch then has R times as "
              "many steps, and counts as R effective epochs")
    flag("--save_freq", default=20, type=at_least(1),
         help="epochs between checkpoints; the last is always saved")
    flag("--vis_freq", default=20, type=at_least(0),
         help="epochs between figures and validation losses (0: never)")
    flag("--knn_freq", default=0, type=at_least(0), metavar="N",
         help="epochs between k-NN accuracies of the encoder, with labelled train/ and val/ (0: never)")
    flag("--card_freq", default=0, type=at_least(0), metavar="N",
         help="epochs between small report cards of it (main_evaluate.py), with the same images (0: never)")

    add_question_args(parser)
    add_training_args(parser, fsdp=True)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read or written."""
    check_flags(args, get_args_parser())
    check_fsdp(args)
    check_optimizer_args(args)
    settle_target(args)
    if args.init:
        from util.recipes.init import check_init  # here and below: only runs with --init need it

        check_init(args)
    if args.predict_ratio != 1 and not (0 < args.predict_ratio < 1 and args.decoder == "cross"):
        raise UserError(f"--predict_ratio {args.predict_ratio}: must be above 0 and at most 1, and 1 without "
                        "--decoder cross")  # fmt: skip
    if args.batch_size % args.repeated_aug:
        raise UserError(
            f"--repeated_aug {args.repeated_aug}: --batch_size {args.batch_size} must be a multiple of it, "
            "so that all crops of an image lie in one batch"
        )


def build_model(args: argparse.Namespace) -> models_mae.MaskedAutoencoderViT:
    """The named model with the sizes that the flags override; raises UserError for sizes that do not fit."""
    sizes = ("patch_size", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "registers")
    overrides = {name: getattr(args, name) for name in sizes if getattr(args, name)}
    if args.decoder == "cross":
        from models_cross import CrossDecoderViT  # only runs with such a decoder need it

        overrides |= {"make": CrossDecoderViT, "predict_ratio": args.predict_ratio}
    try:
        model = models_mae.MODELS[args.model](
            img_size=args.input_size, in_chans=args.in_chans, norm_pix_loss=args.norm_pix_loss, **overrides
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--model {args.model}: {error}") from None
    if not isinstance(model, overrides.get("make", torch.nn.Module)):
        raise UserError(f"--decoder cross: {args.model} makes a model with a decoder of its own")
    patches = model.patch_embed.num_patches
    kept = int(patches * (1 - args.mask_ratio))
    if not 0 < kept < patches:
        raise UserError(f"--mask_ratio {args.mask_ratio}: keeps {kept or 'none'} of {patches} patches")
    return model


@gives_folder_back
def main(args: argparse.Namespace) -> None:
    run = open_run(args, check_args, get_args_parser())
    device = run.device
    checkpoint, init = read_resume(args), None
    if checkpoint or args.init or args.init_freeze:
        from util.recipes.init import Init

        init = Init(args, checkpoint, run.given)
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)
    log_arguments(args)

    # Data
    dataset = build_pretrain_dataset(args)
    check_agreement(args, images=len(dataset))
    val_set = build_val_dataset(args) if args.vis_freq else None

    # Model
    seed_all(args.seed)
    model = build_model(args)
    if init:
        init.load(model)
    if asks(args):
        from util.recipes.questions import ask

        ask(model, args, run, dataset, val_set)
    loader, sampler = train_loader(dataset, args, run.pin_memory, "images of the set")  # no partial batch
    if args.size_schedule:
        from util.recipes.sizes import SizeSchedule

        sizes = SizeSchedule(args, model, dataset)
    model_without_ddp = model = model.to(device)
    model.grad_checkpointing = args.grad_checkpointing
    compiled = compile_model(model, "forward", args, device)
    if args.distributed:
        model = wrap_model(model, device, args.fsdp)

    # Optimizer: biases and norms are not decayed
    scale_learning_rate(args, get_world_size())
    groups = param_groups_weight_decay(model_without_ddp, args.weight_decay)
    groups = init.groups(groups, model_without_ddp) if init else groups
    optimizer = build_optimizer(groups, args, device, betas=(0.9, 0.95))
    loss_scaler = NativeScalerWithGradNormCount(enabled=run.amp_dtype == torch.float16, device=device.type)

    # Resume
    state = RunState(args, model_without_ddp, optimizer, loss_scaler, data=(dataset, val_set))
    state.restore(checkpoint)
    log_writer = make_log_writer(args.log_dir, state.purge_step, args)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    announce(
        run, args, log_writer,
        data=f"{dataset.describe()}; held out: {val_set.describe() if val_set else 'none'}",
        model=f"{millions:.1f} M parameters",
        step=", compiled" if compiled else "",
        steps_per_epoch=len(loader),
        metrics=("train_loss", "val_loss", "knn_acc1"),
    )  # fmt: skip

    # Training
    after = EpochEnd(args, run, evaluate, state, dataset, val_set, log_writer)
    guard = RunGuard(args, state.save, dataset, len(loader), state.meters)
    if stats := state.unfinished_epoch():
        after.finish(args.start_epoch - 1, stats)
    for epoch in guard.epochs(sampler):
        if init:
            init.freeze(optimizer, epoch)
        if args.size_schedule:
            sizes.begin(epoch)
        stats = train_one_epoch(model, loader, optimizer, device, epoch, loss_scaler, log_writer, args, guard)
        dataset.report_bad_images()
        if guard.inside_epoch:
            break
        if guard.stopped or epoch + 1 in (stable_epochs(args), args.epochs) or epoch % args.save_freq == 0:
            state.save(epoch, stats=stats)
        if guard.signal_came():  # there may be little time: the rest of the epoch comes after resuming
            break
        after.finish(epoch, stats, guard.reached_max_steps)

    close_run(log_writer, guard)


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
