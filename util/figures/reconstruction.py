"""Pictures of what a masked autoencoder sees and predicts: original, masked, reconstruction, pasted.

Training writes them every few epochs, `demo/visualize.py` when asked. All of it is deterministic: the
same weights, images and noise give the same bytes of PNG, and nothing of the caller's state changes.
"""

import os
from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from util.data.read import BadImage, open_pil
from util.errors import UserError
from util.figures.canvas import Panels, as_pictures
from util.rng import fixed_noise, masked_by

PANELS = ("original", "masked", "reconstruction", "reconstruction + visible")
BORROWED_STATISTICS = "original patch mean/std"  # what the panels of a norm_pix_loss model must say
GREY = 0.5  # of removed patches


def read_mask(path: str | os.PathLike, grid: tuple[int, int], sizes: Sequence[tuple] = ()) -> Tensor:
    """Reads a mask picture or `.npy`, bool (L,) in image order: True where a patch shall be removed.

    White is removed, black stays. The picture may have any size: like a photograph, it is cut to the largest
    centred part of the model's shape; a patch is removed when its part is brighter than mid-grey on average.

    Args:
        grid: (rows, columns) of patches.
        sizes: (height, width) that it may have, if not any.

    Raises:
        UserError: no picture, of another size, or one that removes all patches or none.
    """
    try:
        pixels = mask_pixels(os.fspath(path))
    except UserError as error:
        raise UserError(f"--mask_file {error}") from None
    height, width = pixels.shape
    if sizes and (height, width) not in sizes:
        wanted = " or ".join(f"{rows}x{columns}" for rows, columns in sizes)
        raise UserError(f"--mask_file {path}: is {height}x{width}, and must be {wanted} (patches, or pixels)")
    rows, columns = grid
    scale = min(height / rows, width / columns)
    top, left = (height - rows * scale) / 2, (width - columns * scale) / 2
    box = (left, top, left + columns * scale, top + rows * scale)
    image = Image.fromarray(pixels.astype(np.float32))
    means = np.asarray(image.resize((columns, rows), Image.Resampling.BOX, box=box))
    removed = torch.from_numpy(means > 0.5).flatten()
    if removed.all() or not removed.any():
        share = "all" if removed.all() else "none"
        raise UserError(
            f"--mask_file {path}: removes {share} of the {rows}x{columns} patches; white is removed"
        )
    return removed


def mask_pixels(path: str) -> np.ndarray:
    """Brightness, float64 (H, W) in [0, 1], of a mask picture or `.npy`; raises BadImage."""
    try:
        pixels = np.load(path) if path.lower().endswith(".npy") else _brightness(path)
        if pixels.ndim != 2:
            raise ValueError(f"its shape is {pixels.shape}")
        if pixels.dtype.kind not in "biuf" or not ((pixels >= 0) & (pixels <= 255)).all():
            raise ValueError("its values are no numbers from 0 to 255")
        return pixels.astype(np.float64) / (255 if pixels.max(initial=0) > 1 else 1)
    except BadImage:
        raise
    except Exception as error:  # on a damaged .npy numpy raises whatever its parsers run into
        raise BadImage(path, f"is no mask of rows and columns: {error}") from None


def _brightness(path: str) -> np.ndarray:
    pixels = np.asarray(open_pil(path, "L"))  # refuses what is no picture
    with Image.open(path) as image:
        if image.mode.startswith("I") and (deep := np.asarray(image)).max(initial=0) <= 255:
            return deep  # 16 bits that hold 8 or fewer; `open_pil` takes the upper half of each
    return pixels


def mask_noise(removed: Tensor, rows: int) -> tuple[Tensor, float]:
    """(noise (rows, L) float32, mask ratio) that make a model remove the patches `removed`, bool (L,)."""
    length, hidden = len(removed), int(removed.sum())
    ratio = hidden / length
    if int(length * (1 - ratio)) != length - hidden:  # rounding; with half a patch to spare on both sides
        ratio = (hidden - 0.5) / length
    return removed.float().expand(rows, -1), ratio


@contextmanager
def evaluation_mode(model: torch.nn.Module):
    """Puts `model` into eval mode and gives each submodule its own mode back (frozen ones may be in eval)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def undo_patch_normalization(pred: Tensor, target: Tensor) -> Tensor:
    """Gives normalised predictions (N, L, p*p*C) the mean and deviation of the true patches `target`.

    Inverts the norm_pix_loss target, (patch - mean) / sqrt(unbiased variance + 1e-6), of arXiv 2111.06377.
    The model never predicted these statistics, hence the label that `column_headings` adds.
    """
    mean = target.mean(dim=-1, keepdim=True)
    var = target.var(dim=-1, keepdim=True, unbiased=True)
    return pred * (var + 1.0e-6).sqrt() + mean


@torch.no_grad()
def reconstruct(
    model: torch.nn.Module,
    images: Tensor,
    noise: Tensor,
    mask_ratio: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Tensor]:
    """Runs `model` (a `MaskedAutoencoderViT`) once on all of `images` and returns the panels to draw.

    Args:
        images: (N, C, H, W) float, normalised with the per-channel `mean` and `std` (C values each).
        noise: (N, L); the patches with the smallest values stay visible (see `fixed_noise`).
        mask_ratio: share of removed patches.

    Returns:
        {panel: (N, C, H, W)} in the order of `PANELS`, values in [0, 1], dtype of `images`, on the CPU:
        - "original": the input, normalisation undone;
        - "masked": the same, removed patches grey;
        - "reconstruction": the prediction of every patch, of the visible ones too;
        - "reconstruction + visible": removed patches from the prediction, visible ones from the original.

    Raises ValueError when `mean`, `std` or `noise` do not fit `images`.
    """
    n, channels = images.shape[:2]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"images have {channels} channels, mean has {len(mean)} values and std {len(std)}")
    expected = (n, model.patch_embed.num_patches)
    if noise.shape != expected:
        raise ValueError(f"noise must have the shape {expected} (images, patches), not {tuple(noise.shape)}")
    device = next(model.parameters()).device
    images = images.to(device)
    with evaluation_mode(model):
        _, pred, mask = masked_by(noise.to(device), model, images, mask_ratio)
    pred = pred.to(images.dtype)  # autocast may have made it half
    if model.norm_pix_loss:
        pred = undo_patch_normalization(pred, model.patchify(images))
    removed = (model.unpatchify(mask[..., None].expand_as(pred)) > 0.5).cpu()
    pictures = (as_pictures(x, mean, std) for x in (images, model.unpatchify(pred)))
    # A diverged model predicts NaN: black, instead of whatever a cast makes of it.
    original, prediction = (picture.nan_to_num(0.0) for picture in pictures)
    masked = original.masked_fill(removed, GREY)
    pasted = torch.where(removed, prediction, original)
    return dict(zip(PANELS, (original, masked, prediction, pasted), strict=True))


def column_headings(norm_pix_loss: bool, channels: int) -> tuple[str, ...]:
    """Returns the headings of the four panels; notes stand in brackets.

    With `norm_pix_loss` both panels that hold predictions say that brightness and contrast of every patch
    come from the original and not from the model. Channels that are not shown are noted too.
    """
    shown = {2: "channel 1 of 2"}.get(channels, f"channels 1-3 of {channels}" if channels > 3 else "")
    notes = [shown, "", *2 * [BORROWED_STATISTICS if norm_pix_loss else ""]]
    return tuple(f"{name} ({note})" if note else name for name, note in zip(PANELS, notes, strict=True))


def in_parts(model, images: Tensor, noise: Tensor, ratio: float, mean, std, batch_size: int) -> dict:
    """`reconstruct` of any number of rows, `batch_size` at a time."""
    pairs = zip(images.split(batch_size), noise.split(batch_size), strict=True)
    parts = [reconstruct(model, *pair, ratio, mean, std) for pair in pairs]
    return {name: torch.cat([part[name] for part in parts]) for name in PANELS}


def ratio_panels(
    model: torch.nn.Module,
    images: Tensor,
    maskings: Sequence[tuple[str, Tensor, float]],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 32,
) -> Panels:
    """The panels of `reconstruct` for one way of masking or several, a row per image, under headings that fit
    `model`: the original once, then three for each.

    Args:
        maskings: (title such as "75% masked", noise (N, L), mask ratio); one alone goes without its title.
        batch_size: images per forward pass; any number of rows fits into memory.
    """
    drawn = []
    for title, noise, ratio in maskings:
        drawn.append((title, in_parts(model, images, noise, ratio, mean, std, batch_size)))
    return side_by_side(model, drawn)


def side_by_side(model: torch.nn.Module, drawn: Sequence[tuple[str, dict[str, Tensor]]]) -> Panels:
    """Of ways of masking (title, panels of `reconstruct`): the original once, then three panels for each."""
    original = drawn[0][1]["original"]
    first, *headings = column_headings(model.norm_pix_loss, original.shape[1])
    columns = [original, *(panels[name] for _, panels in drawn for name in PANELS[1:])]
    groups = [("", 1), *((title, 3) for title, _ in drawn)]
    return Panels([first, *headings * len(drawn)], columns, groups if len(drawn) > 1 else None)


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
    panels = in_parts(model, tiles, noise, ratio, mean, std, batch_size)
    for name, panel in panels.items():
        x = panel.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
        panels[name] = x.flatten(3).flatten(1, 2)[None, :, :height, :width]
    return panels
