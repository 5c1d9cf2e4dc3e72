"""Draws how figures change over the blocks of an encoder: lines in panels, without a plotting library."""

import itertools

from PIL import Image, ImageDraw, ImageFont

from util.figures.canvas import BACKGROUND, FAINT_INK, INK, RULE, Colour

WIDTH, HEIGHT, ENTRY, MARGIN = 560, 380, 278, 18  # of a panel and of an entry of the legend, in pixels
COLOURS: list[Colour] = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (120, 94, 20)]
DASHED = ", class token"  # ends the names of dashed lines
Series = dict[str, list[tuple[int, float]]]  # {name: (block, value) of each point}


def draw_depth(title: str, panels: dict[str, Series], levels: dict[str, float]) -> Image.Image:
    """An RGB picture of panels side by side, with the same axes, and a legend below.

    Args:
        panels: {heading: series}. Names that are alike up to the first comma share a colour; a series of one
            point is a dot.
        levels: {name: value} of dotted horizontal lines in every panel.
    """
    font = ImageFont.load_default(13)
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    groups = list(dict.fromkeys(name.split(",")[0] for name in names))
    looks = {
        name: (COLOURS[groups.index(name.split(",")[0]) % len(COLOURS)], 6 * name.endswith(DASHED))
        for name in names
    } | dict.fromkeys(levels, (FAINT_INK, 2))
    points = [point for series in panels.values() for line in series.values() for point in line]
    blocks = sorted({block for block, _ in points})
    scale = nice_range([value for _, value in points] + list(levels.values()))
    per_row = max(1, WIDTH * len(panels) // ENTRY)
    top = 2 * MARGIN + 20
    below = top + HEIGHT
    size = WIDTH * len(panels) + MARGIN, below + 20 * -(-len(looks) // per_row) + MARGIN
    picture = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN - 4), title, INK, ImageFont.load_default(16))
    flat = {name: [(blocks[0], value), (blocks[-1], value)] for name, value in levels.items()}
    for i, (heading, series) in enumerate(panels.items()):
        box = (i * WIDTH + 46, top + 22, (i + 1) * WIDTH - MARGIN, below - 48)
        draw.text(((box[0] + box[2]) / 2, top), heading, INK, font, anchor="ma")
        _draw_panel(draw, box, blocks, scale, flat | series, looks)
    for i, (name, (ink, gap)) in enumerate(looks.items()):
        x, y = MARGIN + i % per_row * ENTRY, below + 20 * (i // per_row) + 6
        _draw_line(draw, [(x, y), (x + 34, y)], ink, gap)
        draw.text((x + 42, y), name, INK, font, anchor="lm")
    return picture


def _draw_panel(draw, box, blocks: list[int], scale, series: Series, looks: dict) -> None:
    left, top, right, bottom = box
    low, high, step = scale
    font, first, across = ImageFont.load_default(13), blocks[0], max(blocks[-1] - blocks[0], 1)

    def place(block: float, value: float) -> tuple[float, float]:
        x = left + 12 + (block - first) / across * (right - left - 24)
        return x, bottom - (value - low) / (high - low) * (bottom - top)

    for tick in range(round((high - low) / step) + 1):
        _, y = place(first, low + tick * step)
        draw.line((left, y, right, y), RULE)
        draw.text((left - 6, y), f"{low + tick * step:g}", FAINT_INK, font, anchor="rm")
    for block in blocks[:: -(-len(blocks) // 16)]:
        draw.text((place(block, low)[0], bottom + 5), str(block), FAINT_INK, font, anchor="ma")
    draw.text(((left + right) / 2, bottom + 22), "block", FAINT_INK, font, anchor="ma")
    for name, line in series.items():
        ink, gap = looks[name]
        spots = [place(*point) for point in line]
        _draw_line(draw, spots, ink, gap)
        for x, y in spots if gap != 2 else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)


def _draw_line(draw, points: list[tuple[float, float]], ink: Colour, gap: int) -> None:
    """`gap`: pixels that dashes, and what is between them, are long; 0: a full line."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        dx, dy = x1 - x0, y1 - y0
        length = max((dx * dx + dy * dy) ** 0.5, 1e-9)
        dash = gap or length
        for i in range(max(1, round(length / dash / 2))):
            a, b = 2 * i * dash / length, min(1.0, (2 * i + 1) * dash / length)
            draw.line((x0 + a * dx, y0 + a * dy, x0 + b * dx, y0 + b * dy), ink, 2)


def nice_range(values: list[float]) -> tuple[float, float, float]:
    """(low, high, step) of an axis for finite `values`: multiples of a step of 1, 2 or 5 times a power of
    ten, at most eight of them.
    """
    low, high = min(values), max(values)
    steps = (unit * 10.0**power for power in range(-6, 300) for unit in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step <= 6 and high + step > high)
    low, high = step * (low // step), step * -(-high // step)
    return low, max(high, low + step), step
