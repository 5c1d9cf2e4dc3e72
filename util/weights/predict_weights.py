"""What a weights file says about its model, so that no flags need to be repeated.

Our checkpoints store their flags. Released files hold tensors only: width and depth tell which of the named
models it is, and the few things that no tensor shows are asked for.
"""

import argparse
import functools
import re
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

import models_vit
from util.data.transforms import channel_stats
from util.errors import UserError
from util.sizes import image_size, size_pair
from util.weights.encoder import encoder_state, has_encoder, stored_grid
from util.weights.files import load_checkpoint
from util.weights.hugging_face import decoder_from_hugging_face


@dataclass
class Weights:
    """A weights file and what it says about its model.

    kind: in words. state: tensors under this code's names. sizes: arguments of the encoder's constructor.
    input_size: (height, width) in pixels. mean, std: one per channel. stored: its flags, {} where it has
    none. notes: lines to print, on what could not be known.
    """

    source: str
    content: dict
    kind: str
    state: dict[str, torch.Tensor]
    stored: dict
    sizes: dict = field(default_factory=dict)
    input_size: tuple[int, int] = (0, 0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def has_decoder(self) -> bool:
        return {"mask_token", "decoder_embed.weight", "decoder_pred.weight"} <= self.state.keys()


def add_weights_args(parser: argparse.ArgumentParser) -> None:
    """Flags of the weights file, and of what it may not say about itself."""
    flag = parser.add_argument_group("model").add_argument
    # fmt: off
    flag("--resume", required=True, metavar="FILE|URL", help="the checkpoint; its model's sizes come with it")
    flag("--input_size", type=image_size, help="only for files that do not say it: 224, or 32x128 "
         "(height x width)")
    flag("--num_heads", type=int, help="only for files that do not say it: attention heads of the encoder")
    flag("--mean", type=float, nargs="+", help="only for files that do not say it; default: ImageNet's")
    flag("--std", type=float, nargs="+", help="only for files that do not say it; default: ImageNet's")
    # fmt: on


def add_decoder_args(parser: argparse.ArgumentParser) -> None:
    """Flags of what a released file with a decoder may not say, for `build_mae`."""
    flag = parser.add_argument_group("model of a released file").add_argument
    flag("--norm_pix_loss", action="store_true", default=None,
         help="only for files that do not say it: the model predicts normalised patches")  # fmt: skip
    flag("--decoder_num_heads", type=int, help="only for files that do not say it")


def settle(flag: str, given, stored, source: str):
    """The value of a flag that a file may store too; UserError where the two differ."""
    if given is None or stored is None:
        return stored if given is None else given
    if _plain(given) != _plain(stored):
        own, theirs = (_text(value, "x" if flag == "--input_size" else " ") for value in (given, stored))
        raise UserError(f"{flag} {own}: {source} was trained with {theirs}; leave the flag out")
    return stored


def _plain(value):
    if isinstance(value, list | tuple):
        values = [round(float(v), 6) for v in value]
        return values[0] if len(set(values)) == 1 else values
    return value


def _text(value, separator: str) -> str:
    return separator.join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def read_weights(args: argparse.Namespace) -> Weights:
    """Reads `args.resume`, any file that `encoder` understands, and works out the encoder's sizes.

    Args:
        args: resume, input_size, num_heads, mean, std (None where not given).

    Raises:
        UserError: unreadable, no vision transformer in it, flags that contradict it, or something that
            neither it nor a flag says.
    """
    source = str(args.resume)
    content = load_checkpoint(source, "--resume")
    state, kind = encoder_state(content)
    if "decoder.mask_token" in state:
        state = decoder_from_hugging_face(state)
    if not has_encoder(state):
        some = ", ".join(list(state)[:3]) or "no tensors"
        raise UserError(f"--resume {source}: has no usable encoder keys ({kind}; keys: {some})")
    if bad := [
        key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()
    ]:
        raise UserError(
            f"--resume {source}: its weights are not finite ({bad[0]}); take an earlier checkpoint"
        )
    stored = content.get("model_info") or content.get("args") or {}
    weights = Weights(source, content, kind, state, stored if isinstance(stored, dict) else {})
    patch = state["patch_embed.proj.weight"].shape
    if patch[-1] != patch[-2]:
        raise UserError(
            f"--resume {source}: has patches of {patch[-2]}x{patch[-1]} pixels; only square ones are read"
        )
    width = patch[0]
    weights.input_size = _input_size(weights, args.input_size, patch[-1])
    stats = (
        settle(f"--{name}", getattr(args, name), weights.stored.get(name), source) for name in ("mean", "std")
    )
    weights.mean, weights.std = channel_stats(patch[1], *stats)
    hidden = state.get("blocks.0.mlp.fc1.bias", torch.empty(4 * width))
    weights.sizes = {
        "img_size": weights.input_size,
        "patch_size": patch[-1],
        "in_chans": patch[1],
        "embed_dim": width,
        "depth": count_blocks(state, "blocks"),
        "mlp_ratio": len(hidden) / width,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    weights.sizes["num_heads"] = _heads(weights, args.num_heads)
    return weights


def count_blocks(state: dict, name: str) -> int:
    return len({match[1] for key in state if (match := re.match(rf"{name}\.(\d+)\.", key))})


def _input_size(weights: Weights, given, patch: int) -> tuple[int, int]:
    """(height, width): what the file stores, else the flag, else the square that has as many patches."""
    given = None if given is None else size_pair(given)
    positions = weights.state["pos_embed"].shape[1] - 1
    grid, side = stored_grid(weights.content, weights.state), round(positions**0.5)
    if grid is not None:
        return settle("--input_size", given, (grid[0] * patch, grid[1] * patch), weights.source)
    if given is not None:
        if (given[0] // patch) * (given[1] // patch) != positions or given[0] % patch or given[1] % patch:
            raise UserError(
                f"--input_size {given[0]}x{given[1]}: {weights.source} has {positions} patches of "
                f"{patch}x{patch} pixels, which is another size"
            )
        return given
    if side * side != positions:
        raise UserError(
            f"--resume {weights.source}: does not say the grid of its {positions} patches of {patch}x{patch} "
            "pixels; pass --input_size HEIGHTxWIDTH"
        )
    return side * patch, side * patch


@functools.cache
def _named_heads() -> dict[tuple[int, int], int]:
    """{(width, blocks): heads} of the named models."""
    heads = {}
    for constructor in models_vit.MODELS.values():
        with torch.device("meta"):
            model = constructor()
        heads[model.embed_dim, len(model.blocks)] = model.blocks[0].attn.num_heads
    return heads


def _heads(weights: Weights, given: int | None) -> int:
    """Attention heads of the encoder, which no tensor shows: the named model's, else the flag's."""
    width, depth = weights.sizes["embed_dim"], weights.sizes["depth"]
    named, stored = _named_heads().get((width, depth)), weights.stored.get("num_heads")
    if stored is None and "model" in weights.stored:  # nobody stores a name with another number
        stored = named
    if stored is not None:
        return check_heads("--num_heads", settle("--num_heads", given, stored, weights.source), width)
    heads = named if given is None else given
    if heads is None:
        raise UserError(
            f"--resume {weights.source}: does not say its number of attention heads (width {width}, "
            f"{depth} blocks are no named model's); pass --num_heads"
        )
    return check_heads("--num_heads", heads, width)


def check_heads(flag: str, heads: int, width: int) -> int:
    if heads < 1 or width % heads:
        raise UserError(f"{flag} {heads}: must divide the width of {width}")
    return heads
