"""Draws the figures of a study's rows: a dot for each seed, a stroke for their mean."""

import statistics

from PIL import Image, ImageDraw, ImageFont

from util.figures.canvas import BACKGROUND, FAINT_INK, INK, RULE, shorten
from util.report.page import nice_range

COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (120, 94, 20)]
LABEL, WIDTH, LINE, MARGIN = 230, 300, 26, 18  # of the names, a panel, a row, the border, in pixels


def draw_study(panels: dict[str, dict[str, list[float]]]) -> Image.Image:
    """An RGB picture of panels side by side, with the same rows.

    Args:
        panels: {heading: {row: the values of its seeds, or none}}; each panel has a value at least.
    """
    font, rows = ImageFont.load_default(13), list(next(iter(panels.values())))
    top, bottom = MARGIN + LINE, MARGIN + LINE * (len(rows) + 1)
    size = LABEL + (WIDTH + MARGIN) * len(panels) + MARGIN, bottom + LINE + MARGIN
    picture = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        text = shorten(row, font, LABEL - 2 * MARGIN)
        draw.text((LABEL - MARGIN, top + LINE * (i + 0.5)), text, INK, font, anchor="rm")
    for k, (heading, values) in enumerate(panels.items()):
        left = LABEL + k * (WIDTH + MARGIN)
        low, high, step = nice_range([value for seeds in values.values() for value in seeds])
        draw.text((left + WIDTH / 2, MARGIN), heading, INK, font, anchor="ma")

        def place(value: float, left=left, low=low, high=high) -> float:
            return left + 16 + (value - low) / (high - low) * (WIDTH - 32)

        for tick in range(round((high - low) / step) + 1):
            x = place(low + tick * step)
            draw.line((x, top, x, bottom), RULE)
            draw.text((x, bottom + 5), f"{low + tick * step:g}", FAINT_INK, font, anchor="ma")
        for i, seeds in enumerate(values.values()):
            y, ink = top + LINE * (i + 0.5), COLOURS[i % len(COLOURS)]
            for value in seeds:
                draw.ellipse((place(value) - 3, y - 3, place(value) + 3, y + 3), outline=ink)
            if seeds:
                mean = place(statistics.fmean(seeds))
                draw.line((mean, y - 9, mean, y + 9), ink, 3)
    return picture
