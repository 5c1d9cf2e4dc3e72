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
from util.compute.compile import compile_model
from util.compute.precision import NativeScalerWithGradNormCount, has_fused_adamw
from util.data.dataset import build_pretrain_dataset, build_val_dataset
from util.data.loader import build_loader
from util.data.sampler import EvalSampler
from util.data.transforms import channel_stats
from util.errors import UserError
from util.lr_sched import scale_learning_rate
from util.processes.collectives import check_agreement, get_rank, get_world_size, is_main_process, log
from util.processes.parallel import check_fsdp, full_copy, wrap_model
from util.rng import seed_all
from util.run.guard import RunGuard
from util.run.resume import read_resume
from util.run.run_log import log_arguments, make_log_writer, write_log
from util.run.start import Run, RunState, announce, close_run, gives_folder_back, open_run, train_loader
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

    flag = add_schedule_args(
        parser, batch_size=64, epochs=400, warmup_epochs=40, blr=1e-3, min_lr=0.0, weight_decay=0.05
    )
    flag("--clip_grad", type=above(0, "; leave it out for no clipping"),
         help="largest gradient norm (default: no clipping)")

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
    # fmt: on

    add_training_args(parser, fsdp=True)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read or written."""
    check_flags(args, get_args_parser())
    check_fsdp(args)
    if args.batch_size % args.repeated_aug:
        raise UserError(
            f"--repeated_aug {args.repeated_aug}: --batch_size {args.batch_size} must be a multiple of it, "
            "so that all crops of an image lie in one batch"
        )


def build_model(args: argparse.Namespace) -> models_mae.MaskedAutoencoderViT:
    """The named model with the sizes that the flags override; raises UserError for sizes that do not fit."""
    sizes = ("patch_size", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    overrides = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    try:
        model = models_mae.MODELS[args.model](
            img_size=args.input_size, in_chans=args.in_chans, norm_pix_loss=args.norm_pix_loss, **overrides
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--model {args.model}: {error}") from None
    patches = model.patch_embed.num_patches
    kept = int(patches * (1 - args.mask_ratio))
    if not 0 < kept < patches:
        raise UserError(f"--mask_ratio {args.mask_ratio}: keeps {kept or 'none'} of {patches} patches")
    return model


class EpochEnd:
    """What comes after an epoch's training and its checkpoint: validation loss, k-NN, card, figures, log.

    Args:
        model: bare.
        val_set: validation images, each of which counts once; or None.
    """

    def __init__(self, args: argparse.Namespace, run: Run, model, dataset, val_set, log_writer):
        self.args, self.device, self.model, self.log_writer = args, run.device, model, log_writer
        self.val_loader = self.growth = self.pictures = None
        if val_set is not None:
            sampler = EvalSampler(len(val_set), get_world_size(), get_rank())
            loader = build_loader(val_set, sampler, args.batch_size, args.num_workers, run.pin_memory)
            self.val_loader = loader
        if args.knn_freq or args.card_freq:
            from util.evaluate.growth import Growth  # with the labelled sets, which all else does without

            self.growth = Growth(args, run.pin_memory)
        if args.vis_freq and is_main_process():
            from util.figures.training import pick_images

            self.pictures = pick_images(val_set or dataset)

    def finish(self, epoch: int, stats: dict[str, float], last: bool = False) -> None:
        """All processes call this when `epoch` is trained; `stats`: its averages; `last`: none follows."""
        args, log_writer, final = self.args, self.log_writer, last or epoch + 1 == self.args.epochs
        look = args.vis_freq and (final or epoch % args.vis_freq == 0)
        due = self.growth.due(epoch, final) if self.growth else []
        whole = full_copy(self.model) if look or due else None
        record = {**{f"train_{name}": value for name, value in stats.items()}, "epoch": epoch}
        if look and self.val_loader is not None:
            record["val_loss"] = evaluate(self.val_loader, whole, self.device, args)
            log(f"Epoch: [{epoch}] held-out loss: {record['val_loss']:.4f}")
        if look and self.pictures is not None:
            from util.figures.training import write_pictures

            write_pictures(whole, self.pictures, args, epoch, record.get("val_loss"), log_writer)
        if due:
            record |= self.growth.measure(whole, self.device, epoch, due)
        if log_writer is not None:
            for name in [name for name in record if name.startswith(("val_", "knn_", "card_"))]:
                log_writer.add_scalar(name, record[name], int((epoch + 1) * 1000))
            log_writer.flush()
        write_log(args.output_dir, record)


@gives_folder_back
def main(args: argparse.Namespace) -> None:
    run = open_run(args, check_args, get_args_parser())
    device = run.device
    checkpoint = read_resume(args)
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)
    log_arguments(args)

    # Data: no padding and no partial batch
    dataset = build_pretrain_dataset(args)
    check_agreement(args, images=len(dataset))
    loader, sampler = train_loader(dataset, args, run.pin_memory, "images of the set")
    val_set = build_val_dataset(args) if args.vis_freq else None

    # Model
    seed_all(args.seed)
    model_without_ddp = model = build_model(args).to(device)
    model.grad_checkpointing = args.grad_checkpointing
    compiled = compile_model(model, "forward", args, device)
    if args.distributed:
        model = wrap_model(model, device, args.fsdp)

    # Optimizer: biases and norms are not decayed
    scale_learning_rate(args, get_world_size())
    groups = param_groups_weight_decay(model_without_ddp, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=has_fused_adamw(device))
    loss_scaler = NativeScalerWithGradNormCount(enabled=run.amp_dtype == torch.float16, device=device.type)

    # Resume
    state = RunState(args, model_without_ddp, optimizer, loss_scaler, data=(dataset, val_set))
    state.restore(checkpoint)
    log_writer = make_log_writer(args.log_dir, state.purge_step)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    announce(
        run, args, log_writer,
        data=f"{dataset.describe()}; held out: {val_set.describe() if val_set else 'none'}",
        model=f"{millions:.1f} M parameters",
        step=", compiled" if compiled else "",
        steps_per_epoch=len(loader),
        metrics=("train_loss", "val_loss", "knn_acc1"),
    )  # fmt: skip
    if args.repeated_aug > 1:
        log(
            f"repeated augmentation: {args.repeated_aug} crops of each decoded image, each a sample of the "
            f"batch; {args.epochs} epochs are {args.epochs * args.repeated_aug} effective epochs"
        )

    # Training
    after = EpochEnd(args, run, model_without_ddp, dataset, val_set, log_writer)
    guard = RunGuard(args, state.save, dataset, len(loader), state.meters)
    if stats := state.unfinished_epoch():
        after.finish(args.start_epoch - 1, stats)
    for epoch in guard.epochs(sampler):
        stats = train_one_epoch(model, loader, optimizer, device, epoch, loss_scaler, log_writer, args, guard)
        dataset.report_bad_images()
        if guard.inside_epoch:
            break
        if guard.stopped or epoch + 1 == args.epochs or epoch % args.save_freq == 0:
            state.save(epoch, stats=stats)
        if guard.signal_came():  # there may be little time: the rest of the epoch comes after resuming
            break
        after.finish(epoch, stats, guard.reached_max_steps)

    close_run(log_writer, guard)


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
