"""Pictures of what a masked autoencoder sees and predicts: original, masked, reconstruction, pasted.

Training writes them every few epochs. All of it is deterministic: the
same weights, images and noise give the same bytes of PNG, and nothing of the caller's state changes.
"""

import os
from collections.abc import Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PANELS = ("original", "masked", "reconstruction", "reconstruction + visible")
BORROWED_STATISTICS = "original patch mean/std"  # what the panels of a norm_pix_loss model must say
GREY = 0.5  # of removed patches
MIN_PANEL_WIDTH, MAX_SCALED_HEIGHT = 160, 640  # pixels
BACKGROUND, INK, FAINT_INK = (255, 255, 255), (24, 24, 27), (95, 95, 105)
Colour = tuple[int, int, int]


def fixed_noise(rows: int | Sequence[int], length: int, seed: int) -> Tensor:
    """Returns masking noise (n, length) float32 in [0, 1) on the CPU; `length` is the number of patches L.

    `rows`: the n row numbers, or n for 0 ... n-1. A row depends on `seed`, its number and `length` only: a
    picture keeps its mask when others join it. It is 0/L ... (L-1)/L shuffled: no ties: devices sort alike.
    """
    rows = range(rows) if isinstance(rows, int) else rows
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    generator = np.random.RandomState()  # the legacy one: its numbers are frozen across numpy's versions
    noise = np.empty((len(rows), length), dtype=np.float32)
    for shuffled, row in zip(noise, rows, strict=True):
        generator.seed([*words, row])  # ten times faster than a new generator
        shuffled[:] = generator.permutation(length)
    return torch.from_numpy(noise / np.float32(length))


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
        _, pred, mask = model(images, mask_ratio=mask_ratio, noise=noise.to(device))
    pred = pred.to(images.dtype)  # autocast may have made it half
    if model.norm_pix_loss:
        pred = undo_patch_normalization(pred, model.patchify(images))
    removed = model.unpatchify(mask[..., None].expand_as(pred)) > 0.5

    mean, std = (torch.tensor(v, dtype=images.dtype, device=device).view(1, -1, 1, 1) for v in (mean, std))
    # A diverged model predicts NaN: black, instead of whatever a cast makes of it.
    original, prediction = (
        (x * std + mean).nan_to_num(0.0).clamp(0, 1) for x in (images, model.unpatchify(pred))
    )
    masked = original.masked_fill(removed, GREY)
    pasted = torch.where(removed, prediction, original)
    panels = (panel.cpu() for panel in (original, masked, prediction, pasted))
    return dict(zip(PANELS, panels, strict=True))


def column_headings(norm_pix_loss: bool, channels: int) -> tuple[str, ...]:
    """Returns the headings of the four panels; notes stand in brackets.

    With `norm_pix_loss` both panels that hold predictions say that brightness and contrast of every patch
    come from the original and not from the model. Channels that are not shown are noted too.
    """
    shown = {2: "channel 1 of 2"}.get(channels, f"channels 1-3 of {channels}" if channels > 3 else "")
    notes = [shown, "", *2 * [BORROWED_STATISTICS if norm_pix_loss else ""]]
    return tuple(f"{name} ({note})" if note else name for name, note in zip(PANELS, notes, strict=True))


def reconstruction_grid(
    model: torch.nn.Module,
    images: Tensor,
    noise: Tensor,
    mask_ratio: float,
    mean: Sequence[float],
    std: Sequence[float],
    caption: str | None = None,
    row_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Draws the panels of `reconstruct` (same arguments), a row per image, under headings that fit `model`.

    `caption` (such as "epoch 20, masked 75 %") and `row_labels` as in `draw_grid`; returns an RGB picture.
    """
    panels = reconstruct(model, images, noise, mask_ratio, mean, std)
    headings = column_headings(model.norm_pix_loss, images.shape[1])
    return draw_grid(headings, list(panels.values()), caption, row_labels)


def panel_pixels(panel: Tensor) -> np.ndarray:
    """Turns (C, H, W), values in [0, 1], into uint8 (H, W, 3): the first 3 channels, or the first as grey."""
    shown = panel[:3] if panel.shape[0] >= 3 else panel[:1].expand(3, -1, -1)
    return (shown * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cuts the middle out of `text` until it is at most `width` pixels wide (paths differ at the end)."""
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        cut = text[: kept // 2] + "..." + text[len(text) - (kept - kept // 2) :]
        if font.getlength(cut) <= width:
            return cut
    return "..."


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Breaks `text` between words into lines of at most `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(shorten(word, font, width))
    return lines


def heading_lines(heading: str, font: ImageFont.FreeTypeFont, width: float) -> list[tuple[str, Colour]]:
    """Splits "title (note)" into lines of at most `width` pixels with their colours."""
    title, bracket, note = heading.partition(" (")
    lines = [(text, INK) for text in wrap(title, font, width)]
    return lines + [(text, FAINT_INK) for text in wrap(bracket + note, font, width)]


def draw_grid(
    headings: Sequence[str],
    columns: Sequence[Tensor],
    caption: str | None = None,
    row_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Draws columns of pictures with text around them.

    Args:
        headings: one per column; a part in brackets at the end goes below, in a fainter colour.
        columns: tensors (N, C, H, W) of one size, values in [0, 1]. Small ones are enlarged by a whole factor
            without smoothing, to at least 160 pixels of width unless that makes them taller than 640.
        caption: text over everything.
        row_labels: N texts for the left margin.

    Returns an RGB picture.
    """
    n, _, height, width = columns[0].shape
    scale = max(1, min(-(-MIN_PANEL_WIDTH // width), MAX_SCALED_HEIGHT // height))
    panel_h, panel_w = height * scale, width * scale
    column_w = max(panel_w, MIN_PANEL_WIDTH)  # a tall, thin panel still leaves its heading room
    size = min(max(13, column_w // 16), 40)
    font, big_font = ImageFont.load_default(size), ImageFont.load_default(size * 1.2)
    margin, gap, line = size, size // 2, round(size * 1.4)

    labels = [shorten(label, font, MIN_PANEL_WIDTH) for label in row_labels or []]
    label_w = round(max(map(font.getlength, labels))) + gap if labels else 0
    grid_w = label_w + len(columns) * (column_w + gap) - gap
    captions = wrap(caption or "", big_font, grid_w)
    blocks = [heading_lines(heading, font, column_w) for heading in headings]
    headings_y = margin + len(captions) * round(line * 1.2) + (gap if captions else 0)
    panels_y = headings_y + max(map(len, blocks)) * line + gap // 2

    below = panels_y + n * (panel_h + gap) - gap
    canvas = Image.new("RGB", (grid_w + 2 * margin, below + margin), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(captions):
        draw.text((margin, margin + i * round(line * 1.2)), text, INK, big_font)
    for row, label in enumerate(labels):
        y = panels_y + row * (panel_h + gap) + panel_h // 2
        draw.text((margin + label_w - gap, y), label, INK, font, anchor="rm")
    for column, (block, panels) in enumerate(zip(blocks, columns, strict=True)):
        centre = margin + label_w + column * (column_w + gap) + column_w // 2
        for i, (text, colour) in enumerate(block):
            draw.text((centre, headings_y + i * line), text, colour, font, anchor="ma")
        for row, panel in enumerate(panels):
            pixels = panel_pixels(panel).repeat(scale, axis=0).repeat(scale, axis=1)
            canvas.paste(Image.fromarray(pixels), (centre - panel_w // 2, panels_y + row * (panel_h + gap)))
    return canvas


def grid_tensor(image: Image.Image) -> np.ndarray:
    """Returns uint8 (3, H, W), the layout that TensorBoard's `add_image` expects."""
    return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def save_png(image: Image.Image, path: str | os.PathLike) -> str | os.PathLike:
    """Writes `image` to `path` as a whole or not at all and returns `path`; OSError when it cannot.

    The temporary file lies in the same folder, so that the rename is atomic: no viewer meets half a picture.
    """
    folder, name = os.path.split(os.fspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG")
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise
    return path
