"""Draws pictures in rows and columns with headings, and writes them: the canvas of every figure here."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.files import replacing

MIN_PANEL_WIDTH, MAX_SCALED_HEIGHT = 160, 640  # pixels
BACKGROUND, INK, FAINT_INK, RULE = (255, 255, 255), (24, 24, 27), (95, 95, 105), (200, 200, 206)
Colour = tuple[int, int, int]


class Panels(NamedTuple):
    """Columns of pictures that `draw_grid` puts text around, with its arguments of these names."""

    headings: Sequence[str]
    columns: Sequence[Tensor]
    groups: Sequence[tuple[str, int]] | None = None

    def draw(self, caption: str | None = None, row_labels: Sequence[str] | None = None) -> Image.Image:
        return draw_grid(self.headings, self.columns, caption, row_labels, self.groups)

    def save(self, folder: str | os.PathLike, names: Sequence[str], first: int = 0) -> None:
        """Writes each panel as NUMBER-NAME-HEADING.png, rows from number `first` on; or OSError."""
        titles = [title for title, count in self.groups or [("", len(self.columns))] for _ in range(count)]
        for title, heading, column in zip(titles, self.headings, self.columns, strict=True):
            kind = re.sub(r"\W+", "-", f"{title} {heading.partition(' (')[0]}".lower()).strip("-")
            for row, (name, panel) in enumerate(zip(names, column, strict=True), first):
                stem = re.sub(r"[^\w.-]+", "_", name)[-80:]
                path = Path(folder) / f"{row:03d}-{stem}-{kind}.png"
                save_png(Image.fromarray(panel_pixels(panel)), path)


def as_pictures(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images (N, C, H, W) on the CPU, with the normalisation undone: values in [0, 1]."""
    mean, std = (torch.tensor(v, dtype=images.dtype).view(1, -1, 1, 1) for v in (mean, std))
    return (images.cpu() * std + mean).clamp(0, 1)


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
    groups: Sequence[tuple[str, int]] | None = None,
) -> Image.Image:
    """Draws columns of pictures with text around them.

    Args:
        headings: one per column; a part in brackets at the end goes below, in a fainter colour.
        columns: tensors (N, C, H, W) of one size, values in [0, 1]. Small ones are enlarged by a whole factor
            without smoothing, to at least 160 pixels of width unless that makes them taller than 640.
        caption: text over everything.
        row_labels: N texts for the left margin.
        groups: (title, number of columns) from left to right; a title stands over a rule above its columns,
            and groups are set apart. "" has no title.

    Returns an RGB picture.
    """
    n, _, height, width = columns[0].shape
    panel_h, panel_w, column_w, size = panel_layout(height, width)
    font, big_font = ImageFont.load_default(size), ImageFont.load_default(size * 1.2)
    margin, gap, line = size, size // 2, round(size * 1.4)
    groups = groups or [("", len(columns))]

    labels = [shorten(label, font, max(MIN_PANEL_WIDTH, 12 * size)) for label in row_labels or []]
    label_w = round(max(map(font.getlength, labels))) + gap if labels else 0
    lefts, spans, x = [], [], margin + label_w
    for _, count in groups:
        spans.append((x, x + count * (column_w + gap) - gap))
        lefts += [x + i * (column_w + gap) for i in range(count)]
        x = spans[-1][1] + 3 * gap
    right = spans[-1][1]
    captions = wrap(caption or "", big_font, right - margin)
    blocks = [heading_lines(heading, font, column_w) for heading in headings]
    titles_y = margin + len(captions) * round(line * 1.2) + (gap if captions else 0)
    headings_y = titles_y + (line + gap if any(title for title, _ in groups) else 0)
    panels_y = headings_y + max(map(len, blocks)) * line + gap // 2

    below = panels_y + n * (panel_h + gap) - gap
    canvas = Image.new("RGB", (right + margin, below + margin), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(captions):
        draw.text((margin, margin + i * round(line * 1.2)), text, INK, big_font)
    for (title, _), (start, end) in zip(groups, spans, strict=True):
        if title:
            text = shorten(title, font, end - start)
            draw.text(((start + end) // 2, titles_y), text, INK, font, anchor="ma")
            draw.line((start, headings_y - gap, end - 1, headings_y - gap), RULE)
    for row, label in enumerate(labels):
        y = panels_y + row * (panel_h + gap) + panel_h // 2
        draw.text((margin + label_w - gap, y), label, INK, font, anchor="rm")
    for left, block, panels in zip(lefts, blocks, columns, strict=True):
        centre = left + column_w // 2
        for i, (text, colour) in enumerate(block):
            draw.text((centre, headings_y + i * line), text, colour, font, anchor="ma")
        for row, panel in enumerate(panels):
            pixels = panel_pixels(panel).repeat(panel_w // width, axis=0).repeat(panel_w // width, axis=1)
            canvas.paste(Image.fromarray(pixels), (centre - panel_w // 2, panels_y + row * (panel_h + gap)))
    return canvas


def panel_layout(height: int, width: int) -> tuple[int, int, int, int]:
    """(panel height, panel width, column width, font size) in pixels for pictures of a size."""
    scale = max(1, min(-(-MIN_PANEL_WIDTH // width), MAX_SCALED_HEIGHT // height))
    column_w = max(width * scale, MIN_PANEL_WIDTH)  # a tall, thin panel still leaves its heading room
    return height * scale, width * scale, column_w, min(max(13, column_w // 16), 40)


def save_png(image: Image.Image, path: str | os.PathLike) -> str | os.PathLike:
    """Writes `image` to `path` as a whole or not at all and returns `path`; OSError when it cannot."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
    return path
