"""Other masks, targets and losses of pre-training (`util.cli.questions`), made of a run's model in place."""

import os
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models_mae import MaskedAutoencoderViT
from util.cli.questions import PIXELS
from util.errors import UserError
from util.files import printable
from util.processes.collectives import log
from util.recipes.masks import DRAWS, KINDS
from util.rng import takes_noise
from util.run.start import Run


class Masked(MaskedAutoencoderViT):
    """A masked autoencoder with a kind of masks: `mask_kind`, of `util.recipes.masks`."""

    def mask_noise(self, draw: Callable, mask_ratio: float) -> Tensor:
        """Noise (N, L), made of `draw(M)`, uniform numbers (N, M)."""
        rows, columns = grid = tuple(side // self.patch_size for side in self.img_size)
        return self.mask_kind(draw(DRAWS + rows * columns), grid, int(rows * columns * (1 - mask_ratio)))

    def random_masking(self, x: Tensor, mask_ratio: float, noise: Tensor | None = None):
        """As the model's; drawn in the same place, from the same generator."""
        if noise is None:
            noise = self.mask_noise(lambda count: torch.rand(len(x), count, device=x.device), mask_ratio)
        return super().random_masking(x, mask_ratio, noise)


class Targeted(MaskedAutoencoderViT):
    """A masked autoencoder that predicts `target` (of `util.recipes.targets`; None: pixels)."""

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean of the patches' mean squared errors with weights: masked ones 1, visible ones visible_loss."""
        mask = mask.to(imgs.dtype)
        weight = mask + self.visible_loss * (1 - mask)
        if self.target is None:
            return super().forward_loss(imgs, pred, weight)
        target = self.target.of(self, imgs)  # (N, L, T)
        loss = (pred.to(target.dtype) - target).square().mean(dim=-1)
        return (loss * weight).sum() / weight.sum()


def ask(model: MaskedAutoencoderViT, args: Namespace, run: Run, dataset, val_set=None) -> None:
    """Changes `model` as the flags say; call it when the model has its first weights, before the optimizer.

    Args:
        args: gets mask_digest and the mask_ratio of a mask file, and what `make_student` sets.
        dataset: training images, for "pca"; both sets get the masks of a folder.

    Raises:
        UserError: flags or files that do not fit each other or the model.
    """
    own, bases, folder = type(model), [], os.path.isdir(args.mask_file)
    if (args.mask != "random" or args.mask_file) and not folder:
        if not takes_noise(model):
            raise UserError(f"--mask {args.mask}: {args.model} draws its own masks; leave the flag out")
        set_masks(model, args, run)
        bases.append(Masked)
    if args.target_size and args.target not in ("pca", "lowpass"):
        raise UserError(f"--target_size {args.target_size}: is for --target pca and lowpass")
    if args.target not in PIXELS or args.visible_loss:
        if args.visible_loss and getattr(args, "decoder", "self") == "cross":
            raise UserError("--visible_loss: not with --decoder cross, which predicts masked patches alone")
        if own.forward_loss is not MaskedAutoencoderViT.forward_loss:
            raise UserError(f"--target, --visible_loss: {args.model} has a forward_loss of its own")
        model.visible_loss, model.target = args.visible_loss, None
        if args.target not in PIXELS:
            set_target(model, args, run, dataset)
        bases.append(Targeted)
    if bases:
        model.__class__ = type("Asked", (*bases, own), {})
    flags = args.teacher, args.teacher_loss, args.teacher_weight, args.teacher_block
    if any(flags) and args.target != "teacher":
        from util.recipes.teacher import make_student

        make_student(model, args, run.device)
    if folder:
        from util.recipes.mask_folder import use_folder

        use_folder(model, args, dataset, val_set)


def set_masks(model: MaskedAutoencoderViT, args: Namespace, run: Run) -> None:
    """Gives `model` its masks; of a file they have the file's ratio."""
    if args.mask in KINDS and not args.mask_file:
        model.mask_kind = KINDS[args.mask]
        return
    if args.mask != "file" or not args.mask_file:
        raise UserError("--mask file and --mask_file need each other: --mask_file names a mask, or a folder")
    if "mask_ratio" in run.given or getattr(args, "size_schedule", None):
        raise UserError("--mask_file FILE: goes without --mask_ratio (the mask says it) and --size_schedule")
    from util.figures.reconstruction import mask_noise, read_mask
    from util.weights.files import digest

    grid = tuple(model.patch_embed.grid_size)
    hidden = read_mask(args.mask_file, grid, (grid, tuple(model.img_size)))
    noise, args.mask_ratio = mask_noise(hidden, 1)
    args.mask_digest, noise = digest({"mask": hidden}, {}), noise.to(run.device)
    model.mask_kind = lambda numbers, *_: noise.to(numbers).expand(len(numbers), -1)
    log(f"mask: {printable(args.mask_file)} hides {int(hidden.sum())} of {len(hidden)} patches")


def set_target(model: MaskedAutoencoderViT, args: Namespace, run: Run, dataset) -> None:
    """Gives `model` another target than pixels, and a new last layer of the decoder for it."""
    from util.recipes.targets import make_target

    model.target = make_target(model, args, run.device, dataset)
    model.decoder_pred = nn.Linear(model.decoder_pred.in_features, model.target.width)
    model._init_weights(model.decoder_pred)
    taken = getattr(args, "init_taken", {}).get("parameters", [])  # of --init, but this layer is new
    if isinstance(taken, list):
        taken[:] = [name for name in taken if not str(name).startswith("decoder_pred.")]
    log(f"target: {model.target.text}, {model.target.width} numbers a patch; no reconstructions are drawn")
