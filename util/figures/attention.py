"""Where the class token looks: attention maps of the last block, drawn over the picture."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.compute.blocks import add_registers
from util.errors import UserError
from util.figures.canvas import Panels, as_pictures
from util.figures.reconstruction import evaluation_mode

# From nothing to the largest value: black, purple, red, orange, pale yellow; lightness rises evenly
_STOPS = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
COLOURS = np.stack(
    [np.interp(np.linspace(0, 5, 256), range(6), channel) for channel in zip(*_STOPS, strict=True)], axis=1
)


def block_attention(block: nn.Module, x: Tensor) -> Tensor:
    """Weights (N, heads, T, T) with which a timm `Block` mixes tokens x (N, T, D); rows sum to 1.

    Raises UserError for an attention module of a client's that makes none.
    """
    attn, seen = block.attn, []
    # Not fused, timm's attention makes them a tensor and hands it to its dropout
    fused, attn.fused_attn = getattr(attn, "fused_attn", None), False
    drop = getattr(attn, "attn_drop", torch.nn.Identity())
    hook = drop.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        block(x)
    finally:
        attn.fused_attn = fused
        hook.remove()
    if not seen:
        raise UserError(f"--attention: the model's {type(attn).__name__} does not show where it looks")
    return seen[0]


def encode(model: nn.Module, images: Tensor, blocks: int) -> Tensor:
    """Tokens of whole, unmasked images (N, C, H, W) after the first `blocks` of a model: (N, 1 + L, D), and
    those of registers behind them.
    """
    images = images.to(next(model.parameters()).device)
    x = model.patch_embed(images) + model.pos_embed[:, 1:]
    cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = add_registers(model, torch.cat([cls_token, x], dim=1))
    for block in model.blocks[:blocks]:
        x = block(x)
    return x


@torch.no_grad()
def class_token_attention(model: nn.Module, images: Tensor) -> Tensor:
    """How the class token of the last block spreads its attention over the patches of whole, unmasked images.

    Args:
        model: a `MaskedAutoencoderViT` or `VisionTransformer`; its mode is kept.
        images: (N, C, H, W), normalised.

    Returns:
        (N, heads, rows, columns) on the CPU. A map sums to at most 1: the class token
        itself and registers have the rest.
    """
    with evaluation_mode(model):
        x = encode(model, images, len(model.blocks) - 1)
        weights = block_attention(model.blocks[-1], x)[:, :, 0, 1 : 1 + model.patch_embed.num_patches]
    return weights.unflatten(-1, model.patch_embed.grid_size).cpu()


def overlay(pictures: Tensor, maps: Tensor) -> Tensor:
    """Colours (N, 3, H, W) of maps (N, rows, columns) over pictures (N, C, H, W) with values in [0, 1].

    Each map's largest value has the brightest colour, 0 the darkest; the picture shines through in grey.
    """
    shown = pictures[:, :3] if pictures.shape[1] >= 3 else pictures[:, :1]
    grey = shown.mean(dim=1, keepdim=True)
    heat = F.interpolate(maps[:, None], size=grey.shape[-2:], mode="nearest")
    heat = heat / heat.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    colours = torch.from_numpy(COLOURS / 255).to(grey.dtype)[(heat[:, 0] * 255).round().long()]
    return 0.35 * grey + 0.65 * colours.permute(0, 3, 1, 2)


def attention_panels(
    model: nn.Module, images: Tensor, mean: Sequence[float], std: Sequence[float], batch_size: int = 32
) -> Panels:
    """A row per image: the picture, the mean over the heads of the last block, and every head.

    Arguments as of `util.figures.reconstruction.ratio_panels`.
    """
    maps = torch.cat([class_token_attention(model, part) for part in images.split(batch_size)])
    pictures = as_pictures(images, mean, std)
    columns = [pictures, overlay(pictures, maps.mean(dim=1))]
    columns += [overlay(pictures, maps[:, head]) for head in range(maps.shape[1])]
    headings = ["original", "mean of heads", *(f"head {head + 1}" for head in range(maps.shape[1]))]
    return Panels(headings, columns)
