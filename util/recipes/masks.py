"""`--mask`: which patches are hidden. A kind of mask is another order for the model's own shuffle.

Each kind makes noise (N, L) for `MaskedAutoencoderViT.random_masking`, where the smallest stay visible, of
uniform random numbers (N, DRAWS + L) in [0, 1), on their device and for all images at once. So each image
keeps int(L * (1 - ratio)) patches, as with random masks. `grid`: rows and columns of patches; `kept`: visible
ones; y, x: a patch's row and column.
"""

import torch
from torch import Tensor

BLOCKS = 15  # of a block-wise mask; they cover more than is hidden, and the last that is needed is cut
DRAWS = 4 * BLOCKS + 1  # numbers for blocks and sweep; one for each patch follows
LEAST_BLOCK = 16 / 196  # share of the image, and LONGEST, long over short side: of BEiT, arXiv 2106.08254
LONGEST = 1 / 0.3


def grid_noise(numbers: Tensor, grid: tuple[int, int], kept: int) -> Tensor:
    """Of every 2 x 2 patches the same one is visible, drawn for each image. Where the ratio wants fewer, some
    of these are; where it wants more, others as well, anywhere.
    """
    y, x = places(grid, numbers.device)
    corner = (4 * numbers[:, :1]).floor()
    regular = (y % 2 == (corner / 2).floor()) & (x % 2 == corner % 2)
    return numbers[:, DRAWS:] + ~regular


def block_noise(numbers: Tensor, grid: tuple[int, int], kept: int) -> Tensor:
    """Hides rectangles, one after the other, as BEiT: of 16/196 of the image up to all that is to be hidden,
    of sides 0.3 to 1 / 0.3, anywhere. Of the last one a part is hidden.
    """
    hidden = grid[0] * grid[1] - kept
    least = min(LEAST_BLOCK * (hidden + kept), hidden)
    draws = numbers[:, : 4 * BLOCKS].unflatten(1, (BLOCKS, 4))
    inside = in_rectangles(draws[..., 1:], least + draws[..., :1] * (hidden - least), grid, LONGEST)
    number = torch.arange(BLOCKS, device=numbers.device)[:, None]
    first = torch.where(inside, number, BLOCKS).amin(dim=1)  # the block that hides a patch; BLOCKS: none
    return BLOCKS - first + sweep(numbers[:, DRAWS - 1 : DRAWS], grid)


def inverse_block_noise(numbers: Tensor, grid: tuple[int, int], kept: int) -> Tensor:
    """One rectangle is visible, of sides 0.5 to 2, without a part of its last row or column; after data2vec
    2.0 (arXiv 2212.07525).
    """
    inside = in_rectangles(numbers[:, None, :3], torch.full_like(numbers[:, :1, None], kept), grid, 2.0)
    return sweep(numbers[:, DRAWS - 1 : DRAWS], grid) + ~inside[:, 0]


KINDS = {"grid": grid_noise, "block": block_noise, "inverse_block": inverse_block_noise}


def places(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column (L,) of each patch."""
    place = torch.arange(grid[0] * grid[1], device=device)
    return place // grid[1], place % grid[1]


def in_rectangles(draws: Tensor, area: Tensor, grid: tuple[int, int], longest: float) -> Tensor:
    """bool (N, B, L): the patches of rectangles of at least `area` (N, B, 1).

    Args:
        draws: (N, B, 3): for the shape, the place from above, that from the left.
        longest: of the long side over the short one; in a narrow grid it may be more.
    """
    (rows, columns), (y, x), (shape, top, left) = grid, places(grid, draws.device), draws.split(1, dim=-1)
    ratio = 1 + (2 * shape % 1) * (longest - 1)
    ratio = torch.where(shape < 0.5, ratio, 1 / ratio)  # as often upright as lying
    height = (area * ratio).sqrt().round().clamp(1, rows).maximum((area / columns).ceil())
    width = (area / height).ceil().clamp(max=columns)
    top, left = (top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor()
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


def sweep(draw: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, L) in [0, 1): patches in the order of rows or columns, from either end; what cuts a block."""
    (rows, columns), (y, x) = grid, places(grid, draw.device)
    way, last = (4 * draw).floor(), rows * columns - 1
    order = torch.where(way % 2 == 0, y * columns + x, x * rows + y)
    return torch.where(way < 2, order, last - order).to(draw.dtype) / (last + 1)
