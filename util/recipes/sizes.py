"""`--size_schedule`: pre-training that begins with small images and ends with those of `--input_size`.

Only the position tables know an image's size. In training mode the model has those of the phase, made of
its own (`util.weights.adapt.fit_table`: the fixed ones are computed anew). Otherwise, and in its state dict,
it is the model of the last size: evaluation, figures and all readers of a checkpoint see nothing of phases.
"""

from argparse import Namespace

from models_mae import MaskedAutoencoderViT
from util.data.dataset import ImageDataset
from util.data.transforms import PretrainTransform, reference_transform
from util.errors import UserError
from util.processes.collectives import log
from util.sizes import image_size, size_pair
from util.weights.adapt import fit_table


class Sized(MaskedAutoencoderViT):
    """A masked autoencoder with a `phase`: {attribute: what it is in training mode}."""

    def _now(self, name: str, own):
        return self.phase.get(name, own) if self.training else own

    @property
    def img_size(self):
        return self._now("img_size", self.__dict__["img_size"])

    @property
    def pos_embed(self):
        return self._now("pos_embed", self._parameters["pos_embed"])

    @property
    def decoder_pos_embed(self):
        return self._now("decoder_pos_embed", self._parameters["decoder_pos_embed"])


class SizedImages(ImageDataset):
    """A training set with `transforms`: [(first epoch, transform), ...], the first one of epoch 0."""

    def read(self, path: str, draws):
        epoch = draws[0][1]  # draws: (seed, epoch, index[, repeat]), of one epoch all
        self.transform = [transform for first, transform in self.transforms if first <= epoch][-1]
        return super().read(path, draws)


class SizeSchedule:
    """Makes `model` a `Sized` one and `dataset` `SizedImages`, in place.

    Args:
        args: size_schedule, input_size, epochs, batch_size, mask_ratio, mean, std; teacher and fsdp, which do
            not go with it.

    Raises:
        UserError: sizes or shares that do not rise, or that this run or model cannot have.
    """

    def __init__(self, args: Namespace, model: MaskedAutoencoderViT, dataset: ImageDataset):
        self.args, self.model, self.told = args, model, None
        self.phases = read_phases(args, model.patch_size)
        model.phase, model.patch_embed.strict_img_size = {}, False  # `embed_visible` compares the size
        model.__class__ = type("Sized", (Sized, type(model)), {})
        old = dataset.transform
        dataset.transforms = [
            (first, reference_transform(size, args.mean, args.std) if dataset.global_draws
             else PretrainTransform(size, old.scale, old.depth))
            for first, size in self.phases
        ]  # fmt: skip
        dataset.__class__ = SizedImages

    def begin(self, epoch: int) -> None:
        """Sets the model to an epoch's images; says so where they change. (The images know their epoch.)"""
        size = [size for first, size in self.phases if first <= epoch][-1]
        if size == self.told:
            return
        args, model, patch = self.args, self.model, self.model.patch_size
        own, grid = (tuple(side // patch for side in s) for s in (model.__dict__["img_size"], size))
        tables = {name: model._parameters[name] for name in ("pos_embed", "decoder_pos_embed")}
        model.phase, self.told = {"img_size": size}, size
        if grid != own:
            for name, table in tables.items():
                model.phase[name] = fit_table(table.detach().cpu(), own, grid)[0].to(table)
        length = grid[0] * grid[1]
        visible = int(length * (1 - args.mask_ratio))
        tokens = (args.batch_size * (number + 1) for number in (visible, length))
        log(f"Epoch: [{epoch}] images of {size[0]}x{size[1]} pixels, {length} patches; tokens of a batch: "
            "{:,} in the encoder, {:,} in the decoder".format(*tokens))  # fmt: skip


def read_phases(args: Namespace, patch: int) -> list[tuple[int, tuple[int, int]]]:
    """[(first epoch, (height, width)), ...] of `args.size_schedule`; a share of the epochs is rounded, a half
    up.
    """
    flag, phases, last = f"--size_schedule {' '.join(args.size_schedule)}", [], -1.0
    for part in args.size_schedule:
        text, _, number = part.rpartition(":")
        try:
            (height, width), share = size_pair(image_size(text)), float(number)
        except ValueError:
            raise UserError(f"{flag}: {part} must be SIZE:SHARE, as 160:0.5") from None
        first = int(share * args.epochs + 0.5) if 0 <= share < 1 else -1
        if not phases and share != 0:
            raise UserError(f"{flag}: the first share must be 0, not {number}")
        if not last < share < 1:
            raise UserError(f"{flag}: shares must rise and stay below 1, and {part} does not")
        if phases and (
            height < phases[-1][1][0] or width < phases[-1][1][1] or (height, width) == phases[-1][1]
        ):
            raise UserError(f"{flag}: sizes must rise, and {part} does not")
        if height % patch or width % patch:
            raise UserError(f"{flag}: {part} is not divisible by the patch size {patch}")
        if not 0 < int(height * width // patch**2 * (1 - args.mask_ratio)) < height * width // patch**2:
            raise UserError(f"{flag}: of {text} pixels --mask_ratio {args.mask_ratio} keeps no patch, or all")
        if (phases and first == phases[-1][0]) or first >= args.epochs:
            raise UserError(
                f"{flag}: with --epochs {args.epochs} a size would have no epoch; pass more of them"
            )
        phases.append((first, (height, width)))
        last = share
    if phases[-1][1] != size_pair(args.input_size):
        height, width = phases[-1][1]
        raise UserError(f"{flag}: must end with --input_size; pass --input_size {height}x{width}")
    for name in ("fsdp", "teacher"):
        if getattr(args, name, None):
            raise UserError(f"{flag}: not with --{name}; leave one out")
    return phases
