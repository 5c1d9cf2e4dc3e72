"""Reconstruction of an image at its own size, as the tiles that a model was made for."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from util.figures.reconstruction import PANELS, reconstruct
from util.rng import fixed_noise


def padded_size(size: Sequence[int], tile: Sequence[int]) -> tuple[int, int]:
    """The next (height, width) of whole tiles."""
    return tuple(-(-side // part) * part for side, part in zip(size, tile, strict=True))


def reconstruct_full(
    model: torch.nn.Module,
    image: Tensor,
    ratio: float,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """The panels of `reconstruct`, each (1, C, H, W), of an image (C, H, W) of any size.

    Its edges are repeated at right and bottom up to whole tiles of the model's size, each of which has a mask
    of its own: that of its number in `fixed_noise` with `seed`.
    """
    (height, width), (h, w) = image.shape[1:], model.patch_embed.img_size
    full = padded_size((height, width), (h, w))
    rows, columns = full[0] // h, full[1] // w
    whole = F.pad(image[None], (0, full[1] - width, 0, full[0] - height), mode="replicate")[0]
    tiles = whole.unflatten(2, (columns, w)).unflatten(1, (rows, h))
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)  # (rows * columns, C, h, w)
    noise = fixed_noise(len(tiles), model.patch_embed.num_patches, seed)
    parts = [
        reconstruct(model, *part, ratio, mean, std)
        for part in zip(tiles.split(batch_size), noise.split(batch_size), strict=True)
    ]
    panels = {}
    for name in PANELS:
        x = torch.cat([part[name] for part in parts]).unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
        panels[name] = x.flatten(3).flatten(1, 2)[None, :, :height, :width]
    return panels
