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


def _of_phase(name: str) -> property:
    def now(self):
        own = self._parameters.get(name, self.last_size)
        return self.phase.get(name, own) if self.training else own

    return property(now)


class Sized(MaskedAutoencoderViT):
    """A masked autoencoder with a `phase`: {attribute: what it is in training mode}, and its `last_size`.

    torch 2.11 cannot compile a property that looks its own name up in `__dict__`.
    """

    img_size = _of_phase("img_size")
    pos_embed = _of_phase("pos_embed")
    decoder_pos_embed = _of_phase("decoder_pos_embed")


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
        model.phase, model.last_size = {}, model.img_size
        model.patch_embed.strict_img_size = False  # `embed_visible` compares the size
        model.__class__ = type("Sized", (Sized, type(model)), {})
        old = dataset.transform
        crop = old.transforms[0] if dataset.global_draws else old
        dataset.transforms = [
            (first, reference_transform(size, args.mean, args.std, crop.scale) if dataset.global_draws
             else PretrainTransform(size, crop.scale, crop.depth))
            for first, size in self.phases
        ]  # fmt: skip
        dataset.__class__ = SizedImages

    def begin(self, epoch: int) -> None:
        """Sets the model to an epoch's images; says so where they change. (The images know their epoch.)"""
        size = [size for first, size in self.phases if first <= epoch][-1]
        if size == self.told:
            return
        args, model, patch = self.args, self.model, self.model.patch_size
        own, grid = (tuple(side // patch for side in s) for s in (model.last_size, size))
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
    """[(first epoch, (height, width)), ...] of `args.size_schedule`; shares are rounded to epochs, .5 up."""
    flag, phases, share = f"--size_schedule {' '.join(args.size_schedule)}", [], -1.0
    for part in args.size_schedule:
        text, _, number = part.rpartition(":")
        try:
            (height, width), before, share = size_pair(image_size(text)), share, float(number)
            first = int(share * args.epochs + 0.5)
        except (ValueError, OverflowError):
            raise UserError(f"{flag}: {part} must be SIZE:SHARE, as 160:0.5") from None
        last, (low, narrow) = phases[-1] if phases else (-1, (0, 0))
        length = height * width // patch**2
        faults = {
            "the first share must be 0": not phases and share != 0,
            "shares must rise and stay below 1": not before < share < 1,
            "sizes must rise": height < low or width < narrow or (height, width) == (low, narrow),
            f"patches of {patch} pixels do not divide it": height % patch or width % patch,
            f"--mask_ratio {args.mask_ratio} keeps no patch of it, or all": (
                not 0 < int(length * (1 - args.mask_ratio)) < length
            ),
            f"of --epochs {args.epochs} none is left for a size": first == last or first >= args.epochs,
        }
        if fault := next((text for text, found in faults.items() if found), ""):
            raise UserError(f"{flag}: {part}: {fault}")
        phases.append((first, (height, width)))
    if (height, width) != size_pair(args.input_size):
        raise UserError(f"{flag}: must end with --input_size; pass --input_size {height}x{width}")
    for name in ("fsdp", "teacher"):
        if getattr(args, name, None):
            raise UserError(f"{flag}: not with --{name}; leave one out")
    return phases
