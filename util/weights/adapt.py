"""A file's tensors for other channels, patches or grids than they were trained with, by timm's rules."""

import math
from collections.abc import Collection

import torch
from timm.layers import resample_patch_embed

from util.files import some
from util.pos_embed import get_2d_sincos_pos_embed, resize_pos_embed
from util.weights.hugging_face import decoder_from_hugging_face
from util.weights.schema import stored_settings

DECODER = ("decoder_", "mask_token")  # what a masked autoencoder's decoder is called by


def adapt_channels(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """A patch embedding (D, C, p, p) for other `channels`, as timm's `adapt_input_conv` does it from colour:
    for one they are summed, for more repeated and scaled by C / `channels`.
    """
    own, kind = weight.shape[1], weight.dtype
    if channels == 1:  # a grey image gives what it gave as C equal channels
        return weight.float().sum(dim=1, keepdim=True).to(kind)
    weight = weight.float().repeat(1, math.ceil(channels / own), 1, 1)[:, :channels]
    return (weight * (own / float(channels))).to(kind)


def adapt_patch_embed(
    weight: torch.Tensor, wanted: torch.Size, asked: Collection[str]
) -> tuple[torch.Tensor, list[str]]:
    """A patch embedding (D, C, p, p) in the shape `wanted`, as far as the flags `asked` for (in_chans,
    patch_size) allow it, and what was done.
    """
    told, (_, own, *patch), (_, channels, *new_patch) = [], weight.shape, wanted
    if own != channels and "in_chans" in asked:
        weight = adapt_channels(weight, channels)
        how = "repeated and scaled" if channels > own else "the first ones scaled"
        told.append(f"patch embedding: {own} channels, {'summed' if channels == 1 else how} for {channels}")
    if patch != new_patch and "patch_size" in asked:
        weight = resample_patch_embed(weight, new_patch)
        old, new = ("x".join(map(str, size)) for size in (patch, new_patch))
        told.append(f"patch embedding: patches of {old} pixels, resampled for {new}")
    return weight, told


def fit_table(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> tuple[torch.Tensor, str]:
    """A position table (1, 1 + rows * columns, D) of the grid `old` for the grid `new`, and in words how: the
    fixed one is computed anew, a learned one is resized bicubically.
    """
    width = table.shape[2]
    if width % 4 == 0:
        fixed, own = (torch.from_numpy(get_2d_sincos_pos_embed(width, g, cls_token=True)) for g in (old, new))
        if torch.allclose(table[0].double(), fixed, rtol=0, atol=5e-3):  # bfloat16 is off by 4e-3 at most
            return own.to(torch.promote_types(table.dtype, torch.float32))[None], "computed anew"
    return resize_pos_embed(table, old, new), "resized"


def take_decoder(model: torch.nn.Module, state: dict, content: dict, report) -> dict:
    """`state` with the decoder as the masked autoencoder `model` takes it, or without it.

    Args:
        content: of the file. report: `util.weights.encoder.LoadReport` of the encoder, which is told.
    """
    state = decoder_from_hugging_face(state) if "decoder.mask_token" in state else state
    own = {key: value for key, value in model.state_dict().items() if key.startswith(DECODER)}
    theirs = {key: value for key, value in state.items() if key.startswith(DECODER)}
    if not theirs.keys() & {"mask_token", "decoder_embed.weight"}:
        report.decoder = f"none in the file ({report.kind}); a new one, as initialised here"
        return state
    table, ((rows, columns), grid) = theirs.get("decoder_pos_embed"), report.resized or ((0, 0), None)
    if grid and table is not None and table.shape == (1, 1 + rows * columns, own["mask_token"].shape[-1]):
        theirs["decoder_pos_embed"], _ = fit_table(table, (rows, columns), grid)
    odd = [key for key in own if key not in theirs or theirs[key].shape != own[key].shape]
    # After the patch embedding was adapted it predicts other pixels, perhaps as many
    new = [key for key in theirs if key.startswith("decoder_pred.")] if report.adapted else []
    odd = [key for key in odd if key not in new] + [key for key in theirs if key not in own]
    heads = stored_settings(content, report.source, "decoder_num_heads").get("decoder_num_heads")
    odd += [] if heads in (None, model.decoder_blocks[0].attn.num_heads) else [f"{heads} heads"]
    left = theirs if odd else new
    report.decoder = f"taken, but for {some(new)}, new for other patches" if new else "taken"
    if odd:
        report.decoder = f"the file's does not fit ({some(odd, 2)}); a new one, as initialised here"
    report.unexpected += left
    return {key: value for key, value in (state | theirs).items() if key not in left}
