"""Position tables: the fixed 2-D sine-cosine one, and resizing of a trained one to another grid."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def get_2d_sincos_pos_embed(
    embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False
) -> np.ndarray:
    """Fixed sine-cosine position table of a patch grid.

    Half of the channels code the column (x), the other half the row (y).

    Args:
        embed_dim: width D, a multiple of 4.
        grid_size: patches per side, or (rows, columns).
        cls_token: puts a row of zeros in front, for the class token.

    Returns:
        float64 array (rows * columns [+ 1], D), tokens in row-major order.

    Raises:
        ValueError: D is no multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"the sine-cosine position table needs a width divisible by 4, got {embed_dim}")
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    y, x = np.meshgrid(np.arange(rows, dtype=np.float64), np.arange(columns, dtype=np.float64), indexing="ij")
    table = get_2d_sincos_pos_embed_from_grid(embed_dim, (x, y))  # (L, D)
    return np.concatenate([np.zeros((1, embed_dim)), table]) if cls_token else table


def get_2d_sincos_pos_embed_from_grid(embed_dim: int, grid: Sequence[np.ndarray]) -> np.ndarray:
    """(L, D) float64: half of the channels code the first array of `grid`, of any shape with L positions, the
    other half the second. D is a multiple of 4, else ValueError.
    """
    halves = [get_1d_sincos_pos_embed_from_grid(embed_dim // 2, positions) for positions in grid]
    return np.concatenate(halves, axis=1)


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: np.ndarray) -> np.ndarray:
    """(L, D) float64: sines, then cosines, of L positions times frequency 10000^(-i / (D / 2)). ValueError
    unless D is even.
    """
    if embed_dim % 2:
        raise ValueError(f"sines and cosines need an even width, got {embed_dim}")
    frequencies = 1.0 / 10000 ** (np.arange(embed_dim // 2, dtype=np.float64) / (embed_dim / 2.0))
    angles = np.outer(np.asarray(pos).reshape(-1), frequencies)  # (L, D / 2)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def resize_pos_embed(
    table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], extra_tokens: int = 1
) -> torch.Tensor:
    """Resizes the grid part of a position table (1, extra + rows * columns, D) bicubically; extra rows are
    kept.
    """
    extra, grid = table[:, :extra_tokens], table[:, extra_tokens:]
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([extra, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def interpolate_pos_embed(
    model: nn.Module, checkpoint_model: dict[str, torch.Tensor], old_grid: tuple[int, int] | None = None
) -> bool:
    """Fits `checkpoint_model["pos_embed"]` to the model's patch grid, in place; returns whether it changed.

    Args:
        model: has `pos_embed` (1, T, D) and `patch_embed` with `num_patches` and, unless its patches form a
            square, `grid_size` (rows, columns).
        checkpoint_model: a state dict; edited.
        old_grid: (rows, columns) that the table was made for. Left out, a square is assumed, unless the table
            has the model's own length.

    Raises:
        ValueError: a table is not square and its grid was not given.
    """
    if "pos_embed" not in checkpoint_model:
        return False
    table = checkpoint_model["pos_embed"]
    new_length = model.patch_embed.num_patches
    extra_tokens = model.pos_embed.shape[1] - new_length
    old_length = table.shape[1] - extra_tokens
    if old_grid is None:
        if old_length == new_length:
            return False
        old_grid = _square(old_length)
    new_grid = tuple(getattr(model.patch_embed, "grid_size", None) or _square(new_length))
    if tuple(old_grid) == new_grid:
        return False
    checkpoint_model["pos_embed"] = resize_pos_embed(table, tuple(old_grid), new_grid, extra_tokens)
    return True


def _square(length: int) -> tuple[int, int]:
    side = round(length**0.5)
    if side * side != length:
        raise ValueError(f"a position table of {length} patches is not square: its grid must be given")
    return side, side
