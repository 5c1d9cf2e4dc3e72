"""Position tables: the fixed 2-D sine-cosine one, and resizing of a trained one to another grid."""

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
    table = np.concatenate([_sincos_1d(embed_dim // 2, x), _sincos_1d(embed_dim // 2, y)], axis=1)  # (L, D)
    return np.concatenate([np.zeros((1, embed_dim)), table]) if cls_token else table


def _sincos_1d(dim: int, positions: np.ndarray) -> np.ndarray:
    """(L, dim): sines, then cosines, of position times frequency 10000^(-i / (dim / 2))."""
    frequencies = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angles = np.outer(positions.reshape(-1), frequencies)  # (L, dim / 2)
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
        model: has `pos_embed` (1, T, D) and `patch_embed` with `num_patches` and `grid_size` (rows, columns).
        checkpoint_model: a state dict; edited.
        old_grid: (rows, columns) that the table was made for. Left out, a square is assumed, unless the table
            has the model's own length.

    Raises:
        ValueError: the table is not square and `old_grid` was not given.
    """
    if "pos_embed" not in checkpoint_model:
        return False
    table = checkpoint_model["pos_embed"]
    new_grid = tuple(model.patch_embed.grid_size)
    extra_tokens = model.pos_embed.shape[1] - model.patch_embed.num_patches
    old_length = table.shape[1] - extra_tokens
    if old_grid is None:
        if old_length == model.patch_embed.num_patches:
            return False
        side = round(old_length**0.5)
        if side * side != old_length:
            raise ValueError(
                f"a position table of {old_length} patches is not square: its grid must be given"
            )
        old_grid = (side, side)
    if tuple(old_grid) == new_grid:
        return False
    checkpoint_model["pos_embed"] = resize_pos_embed(table, tuple(old_grid), new_grid, extra_tokens)
    return True
