"""Takes the encoder out of any kind of weights file, and says exactly what was taken and what was not.

Understood: pre-training checkpoints of this code and of the reference, the released encoder-only, full and
fine-tuned files, timm's ViTs, Hugging Face's ViTMAE and ViT (both of their namings), as `.pth`,
`.safetensors` or folder, with or without the prefixes of DistributedDataParallel and torch.compile.
"""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from util.errors import UserError
from util.files import printable, shown, some
from util.pos_embed import interpolate_pos_embed
from util.processes.collectives import is_main_process, warn
from util.sizes import size_pair
from util.weights.adapt import DECODER, adapt_patch_embed, fit_table, take_decoder
from util.weights.files import read_file
from util.weights.hugging_face import from_hugging_face
from util.weights.layouts import own_names, take_weights
from util.weights.schema import stored_settings
from util.weights.state import compare_state, describe_kind, foreign_kind, model_state, not_finite, registers

# Keys that a file need not have: a recipe's head is new, so are registers asked for; norms go with pooling
_OPTIONAL = ("head.", "fc_norm.", "norm.", "reg_token")
_ENCODER = ("cls_token", "reg_token", "pos_embed", "patch_embed.", "blocks.")

# Dimensions of the tensors that sizes are read off: of every encoder, and of those that may be there
_RANKS = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
_LATER = {"head.weight": 2, "head.1.weight": 2, "mask_token": 3, "reg_token": 3}
_LATER |= {"blocks.0.mlp.fc1.bias": 1, "blocks.0.mlp.fc1.weight": 2, "decoder_blocks.0.mlp.fc1.bias": 1}

# Keys that a file may have besides, after or beside the encoder. Any other would change what it computes
_BESIDE = ("decoder", "mask_token", "masked_embed", "head", "pre_logits", "pooler", "classifier", "beside.",
           "teacher_map")  # fmt: skip


@dataclass
class LoadReport:
    """What `load_into` did."""

    source: str  # the file
    kind: str  # the file in words
    missing: list[str] = field(default_factory=list)  # the model's keys, not in the file: as initialised
    unexpected: list[str] = field(default_factory=list)  # the file's keys, not in the model: not used
    dropped: list[str] = field(default_factory=list)  # "key: shape" of the file's head: new in every recipe
    resized: tuple | None = None  # ((rows, columns) in the file, in the model) of the positional embedding
    way: str = "resized"  # or "computed anew": how it was brought there
    adapted: list[str] = field(default_factory=list)  # what flags asked to change of the file's tensors
    decoder: str = ""  # of a masked autoencoder: what became of the decoder

    def __str__(self) -> str:
        lines = [f"encoder: {printable(self.source)} ({self.kind})"]
        if self.resized:
            (rows, columns), (new_rows, new_columns) = self.resized
            way = f"{self.way} {'to' if self.way == 'resized' else 'for'} {new_rows}x{new_columns}"
            lines.append(f"  position table: {rows}x{columns} patches, {way}")
        lines += [f"  {text}" for text in self.adapted]
        lines += [f"  decoder: {self.decoder}"] if self.decoder else []
        lines.append(f"  missing keys, initialised here ({len(self.missing)}): {_shorten(self.missing)}")
        lines.append(f"  unexpected keys, not used ({len(self.unexpected)}): {_shorten(self.unexpected)}")
        if self.dropped:
            lines.append(f"  the file's head, not used ({len(self.dropped)}): {', '.join(self.dropped)}")
        return "\n".join(lines)


def _shorten(keys: list[str]) -> str:
    """All keys, those of a list of blocks as `decoder_blocks.* (96)`."""
    counts = Counter(re.sub(r"\.\d+\..*", ".*", key) for key in keys)
    return some((f"{key} ({n})" if key.endswith(".*") else key for key, n in counts.items()), 60) or "none"


def load_into(
    model: torch.nn.Module,
    source: str,
    flag: str = "--finetune",
    content: dict | None = None,
    asked: Collection[str] = (),
) -> LoadReport:
    """Loads the encoder of the file, https URL or folder `source` into `model`, in place; a head is left. A
    masked autoencoder also gets the decoder, if there is one that fits.

    A positional embedding is resized bicubically when the patch grid differs; of a masked autoencoder a fixed
    one is computed anew.

    Args:
        content: of `source`, where it has been read already.
        asked: names of flags that were given, to which the patch embedding is adapted: in_chans, patch_size.

    Raises:
        UserError: unreadable, no ViT encoder in it, or one of another architecture; names `flag` and the
        file's kind.
    """
    content = read_file(source, flag) if content is None else content
    state, kind = encoder_state(content, f"{flag} {source}")
    if not has_encoder(state):
        keys = some(state, 3) or "none"
        raise UserError(
            f"{flag} {source}: has no usable encoder keys; this file is {kind} (keys: {keys}). Pass a "
            "pre-training checkpoint or a mae_pretrain_*.pth"
        )
    beside, own = (*_BESIDE, *_ENCODER, "norm.", "fc_norm"), model.state_dict()
    if strange := [key for key in state if not _bare(key).startswith(beside) and key not in own]:
        raise UserError(
            f"{flag} {source} ({kind}): has tensors that the model does not know ({_shorten(strange[:5])}): "
            "its encoder computes something else; only plain ViTs with a class token can be used"
        )
    report = LoadReport(source, kind)
    for key in [k for k in state if k.startswith("head.")]:
        report.dropped.append(f"{shown(key)}: {tuple(state.pop(key).shape)}")
    _fit_pos_embed(model, state, content, report, flag)  # first, as the grid shows in the file's own patches
    proj, wanted = "patch_embed.proj.weight", model.patch_embed.proj.weight.shape
    patch = state[proj].shape[2:]
    state[proj], report.adapted = adapt_patch_embed(state[proj], wanted, asked)
    if hasattr(model, "decoder_pred"):
        state = take_decoder(model, state, content, report)
    missing, unexpected, mismatched = compare_state(model, state)
    lost = [k for k in missing if not k.startswith((*_OPTIONAL, *DECODER))]
    foreign = [k for k in unexpected if k.startswith(_ENCODER)]
    if mismatched or lost or foreign:
        raise UserError(_misfit_text(model, state, f"{flag} {source}", kind, mismatched + lost + foreign))
    _check_settings(model, content, report, f"{flag} {source}", None if "input_size" in asked else patch)
    if bad := not_finite(state):
        raise UserError(f"{flag} {source}: its weights are not finite ({bad}); take an earlier checkpoint")
    dropped = {text.split(":")[0] for text in report.dropped}
    report.missing = [key for key in missing if key not in dropped]
    report.unexpected += unexpected
    model.load_state_dict(state, strict=False)
    return report


def _check_settings(model, content: dict, report: LoadReport, where: str, patch: tuple | None) -> None:
    """Raises UserError for what no shape shows: another number of heads or, of a masked autoencoder, another
    size of images. `patch`: of the file; None: the size may be another.
    """
    if report.decoder and patch:
        grids = report.resized or (model.patch_embed.grid_size,) * 2
        sides = zip(grids, (patch, model.patch_embed.patch_size), strict=True)
        size, own = ("x".join(str(n * side) for n, side in zip(*pair, strict=True)) for pair in sides)
        if size != own:
            raise UserError(f"{where}: its positional embedding is for {size} pixels; pass --input_size "
                            f"{size}, or --input_size {own} to have it adapted")  # fmt: skip
    heads = stored_settings(content, where, "num_heads").get("num_heads")
    if heads not in (None, own := getattr(getattr(model.blocks[0], "attn", None), "num_heads", heads)):
        raise UserError(f"{where} ({report.kind}): its encoder has {heads} attention heads, the model {own}")


def check_final_norm(report: LoadReport) -> None:
    """Raises UserError where a frozen class token would come out of a norm that was never trained."""
    if "norm.weight" in report.missing:
        file = f"{report.source} ({report.kind})"
        raise UserError(f"--cls_token: {file} has no norm for the class token; pass --global_pool")


def encoder_state(content: dict, source: str = "the checkpoint") -> tuple[dict[str, torch.Tensor], str]:
    """(state dict with this code's key names, kind of the file in words) of a loaded checkpoint.

    Raises:
        UserError: as `model_state`; or tensors of other code that belong together do not fit each other.
    """
    try:
        state, told = own_names(model_state(take_weights(content), source))
        kind = describe_kind(state) + told
        if not state and {"param_groups", "state"} <= content.keys():
            kind = "an optimizer's state"
        state = from_hugging_face(state) if kind.startswith("Hugging Face") else state
        return state, kind + (f", of odd shapes: {odd}" if (odd := _odd_shapes(state)) else "")
    except RuntimeError:  # of torch.cat
        raise UserError(f"{source}: is damaged: its query, key and value have other shapes") from None


def part_state(state: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The tensors, float32, of a part of a file: "full", "classifier" or "encoder".

    What stands beside that part and changes nothing of what it computes is left out; all else is there.
    """
    beside = {"full": (), "classifier": ("decoder", "mask_token")}.get(part, _BESIDE)
    beside += ("pooler", "beside.", "teacher_map")
    return {
        key: value.float() if value.is_floating_point() else value
        for key, value in state.items()
        if not _bare(key).startswith(beside)
    }


def _bare(key: str) -> str:
    return key.removeprefix("vit.").removeprefix("embeddings.")


def has_encoder(state: dict) -> bool:
    """Whether a state dict with this code's key names has the encoder of a vision transformer."""
    if foreign_kind(state) or not count_blocks(state) or not _RANKS.keys() <= state.keys():
        return False
    return not _odd_shapes(state) and state["pos_embed"].shape[1] > 1


def _odd_shapes(state: dict) -> str:
    """Of the tensors that sizes are read off, those of which that is not possible, in words."""
    ranks = [(key, rank, state[key]) for key, rank in (_RANKS | _LATER).items() if key in state]
    return some(f"{k} {shown(tuple(v.shape), 40)}" for k, n, v in ranks if v.ndim != n or not v.numel())


def count_blocks(state: dict, name: str = "blocks") -> int:
    """Blocks in a state dict, the encoder's or those of "decoder_blocks"."""
    return len({match[1] for key in state if (match := re.match(rf"{name}\.(\d+)\.", key))})


def stored_grid(state: dict, settings: dict) -> tuple[int, int] | None:
    """(rows, columns) that a file's positional embedding was made for, where its settings say so."""
    size = settings.get("input_size")  # of `stored_settings`, so that its parts are whole numbers
    if not isinstance(size, int | tuple | list) or len(size := size_pair(size)) != 2:
        return None
    patch_h, patch_w = state["patch_embed.proj.weight"].shape[-2:]
    grid = (size[0] // patch_h, size[1] // patch_w)
    # The reference stored a size that it did not use: believed only where it fits the positions
    return grid if grid[0] * grid[1] == state["pos_embed"].shape[1] - 1 else None


def _fit_pos_embed(model, state, content, report, flag) -> None:
    table, width = state["pos_embed"], model.pos_embed.shape[2]
    if table.shape[2] != width:
        return  # another width: reported with the other shapes
    stored = stored_settings(content, f"{flag} {report.source}", "input_size")
    grid, (rows, columns) = stored_grid(state, stored), model.patch_embed.grid_size
    if grid is None and rows != columns and table.shape == model.pos_embed.shape and is_main_process():
        warn(
            f"{report.source}: does not say the patch grid of its {rows * columns} positions; they are taken "
            f"for the model's {rows}x{columns}"
        )
    try:
        if interpolate_pos_embed(model, state, grid):
            side = round((table.shape[1] - 1) ** 0.5)
            report.resized = (grid or (side, side), tuple(model.patch_embed.grid_size))
            if hasattr(model, "decoder_pred"):
                state["pos_embed"], report.way = fit_table(table, *report.resized)
    except ValueError as error:
        raise UserError(
            f"{flag} {report.source}: {error}, and the file does not say it (or has none for the class "
            "token); use a checkpoint with its training arguments or the --input_size it was trained with"
        ) from None


def _misfit_text(model, state, where, kind, differences) -> str:
    """One line: what the file's encoder is, what the model's is, the first differences, what to do."""

    def sizes(state: dict) -> tuple[int, int, int, int, int]:
        width, channels, _, patch = state["patch_embed.proj.weight"].shape
        return count_blocks(state), width, channels, patch, registers(state)

    theirs, ours = sizes(state), sizes(model.state_dict())
    if theirs == ours:
        return (f"{where} ({kind}): its encoder is no plain ViT, though of the model's size: "
                f"{some(differences, 3, '; ')}")  # fmt: skip
    words = "{} blocks, width {}, {} channels, patch {}" + ", {} registers" * any((theirs[4], ours[4]))
    hints = ["--model"] if theirs[:2] != ours[:2] else []
    hints += [f"--registers {theirs[4]}"] if theirs[4] != ours[4] else []
    pairs = zip(("in_chans", "patch_size"), theirs[2:4], ours[2:4], strict=True)
    hints += [f"--{flag} {their} (--{flag} {our} adapts it)" for flag, their, our in pairs if their != our]
    return (
        f"{where} ({kind}): its encoder ({words.format(*theirs)}) does not fit the model "
        f"({words.format(*ours)}): {some(differences, 2, '; ')}. Check {' and '.join(hints) or '--model'}"
    )
