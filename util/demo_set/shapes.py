"""Outlines of the ten object families of the demo set (`util/demo_set/files.py`), and of its clutter.

Every family is a function `family(rng) -> list[Part]` that draws one random member: number of teeth, points,
spokes or veins, proportions and details vary, so that no template fits a class. Coordinates are the object's,
x to the right, y down, about inside [-1, 1] x [-1, 1]. Pose, colour, texture, light: `scene.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TAU = 2 * np.pi


class Part(NamedTuple):
    """One layer of an object.

    loops: list of (points float (N, 2), fill): polygons drawn in order; 1 adds to the layer, 0 cuts a hole.
    tone: which of the object's colours it has (0, 1 or 2).
    relief: height of the bevel that shading gives the layer, in units of the object's radius; 0 is flat.
    surface: None, or function (u, v) -> (height in radii, pattern in [0, 1] or None), all float (H, W).
    """

    loops: list
    tone: int = 0
    relief: float = 0.12
    surface: Callable | None = None


def ellipse(cx, cy, rx, ry=None, n=36) -> np.ndarray:
    """Points (n, 2) of an ellipse; a circle when `ry` is left out."""
    a = np.linspace(0, TAU, n, endpoint=False)
    return np.stack([cx + rx * np.cos(a), cy + (rx if ry is None else ry) * np.sin(a)], 1)


def box(x0, y0, x1, y1) -> np.ndarray:
    """Points (4, 2) of an axis-aligned rectangle."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)


def polar(radius, angle) -> np.ndarray:
    """Points (N, 2) from radii and angles."""
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def stroke(path, width) -> np.ndarray:
    """Outline (2N, 2) of a line of `width` (a number, or one per point) along the N points of `path`."""
    path = np.asarray(path, float)
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True) + 1e-9
    side = np.stack([-along[:, 1], along[:, 0]], 1) * (np.asarray(width, float).reshape(-1, 1) / 2)
    return np.concatenate([path + side, (path - side)[::-1]])


def gear(rng) -> list[Part]:
    """Toothed disc with a bore, sometimes with lightening holes and a hub."""
    teeth, root, flank = rng.integers(7, 17), rng.uniform(0.7, 0.84), rng.uniform(0.1, 0.22)
    step = TAU / teeth
    angles = (np.arange(teeth)[:, None] * step + np.array([0, flank, 0.5, 0.5 + flank]) * step).ravel()
    bore = rng.uniform(0.12, 0.34)
    loops = [(polar(np.tile([root, 1, 1, root], teeth), angles), 1)]
    if rng.random() < 0.5:
        count, at = rng.integers(3, 8), (root + bore) / 2
        size = min((root - bore) * rng.uniform(0.2, 0.34), at * np.sin(np.pi / count) * 0.75)
        loops += [(ellipse(at * np.cos(a), at * np.sin(a), size), 0) for a in np.arange(count) * TAU / count]
    loops.append((ellipse(0, 0, bore), 0))
    parts = [Part(loops, 0, 0.1)]
    if rng.random() < 0.5:
        parts.append(Part([(ellipse(0, 0, bore * 1.45), 1), (ellipse(0, 0, bore), 0)], 1, 0.1))
    return parts


def star(rng) -> list[Part]:
    """Star of 4 to 8 points, plain or with each ray folded into a light and a dark half."""
    count, inner = rng.integers(4, 9), rng.uniform(0.3, 0.55)
    angles = np.arange(2 * count) * np.pi / count
    points = polar(np.tile([1, inner], count), angles)
    parts = [Part([(points, 1)], 0, rng.uniform(0.08, 0.25))]
    if rng.random() < 0.5:
        halves = [(np.array([[0, 0], points[2 * i], points[2 * i + 1]]), 1) for i in range(count)]
        parts.append(Part(halves, 1, 0.0))
    return parts


def spiral(rng) -> list[Part]:
    """Band wound 1.6 to 3 times around a centre, evenly or ever wider."""
    turns, power = rng.uniform(1.6, 3.0), rng.uniform(0.85, 1.3)
    t = np.linspace(0.06, 1, 120)
    radius = 0.9 * t**power
    gap = 0.9 * power * t ** (power - 1) / turns
    return [Part([(stroke(polar(radius, TAU * turns * t), gap * rng.uniform(0.42, 0.62)), 1)], 0, 0.1)]


def leaf(rng) -> list[Part]:
    """Pointed blade on a bent midrib, with a stem, side veins and at times a serrated edge."""
    t = np.linspace(0, 1, 60)
    bend, shift = rng.uniform(-0.35, 0.35), rng.uniform(0.6, 1.1)
    middle = np.stack([2 * t - 1, bend * (np.sin(np.pi * t) - 0.5)], 1)
    half = rng.uniform(0.32, 0.55) * np.sin(np.pi * t**shift) ** rng.uniform(0.8, 1.2)
    if rng.random() < 0.4:
        half = half * (1 + 0.16 * ((t * rng.integers(8, 15)) % 1 - 0.5))
    veins = [(stroke(middle[:-3], np.linspace(0.09, 0.03, 57)), 1)]
    for i in np.linspace(8, 46, rng.integers(4, 8)).astype(int):
        for sign in (-1, 1):
            tip = middle[i] + np.array([0.3, sign * half[min(i + 9, 59)] * 0.86])
            veins.append((stroke(np.linspace(middle[i], tip, 4), [0.05, 0.045, 0.035, 0.02]), 1))
    stem = stroke([middle[0] + [0.06, 0], middle[0] - [0.12, 0], middle[0] - [0.3, bend * 0.3]], 0.07)
    return [Part([(stem, 1)], 1), Part([(stroke(middle, 2 * half), 1)], 0, 0.1), Part(veins, 1, 0.0)]


def house(rng) -> list[Part]:
    """Front of a house: walls, roof, chimney, door and rows of windows with panes."""
    w, top, base = rng.uniform(0.55, 0.85), rng.uniform(-0.35, 0.05), rng.uniform(0.75, 0.95)
    eave, ridge, peak = w + rng.uniform(0.05, 0.15), rng.uniform(0, 0.6) * w, rng.uniform(-1, -0.75)
    chimney_x, chimney_w = rng.choice([-1, 1]) * rng.uniform(0.25, 0.45), rng.uniform(0.07, 0.13)
    chimney = box(chimney_x - chimney_w, peak + 0.02, chimney_x + chimney_w, top)
    roof = np.array([[-eave, top], [-ridge, peak], [ridge, peak], [eave, top]])
    columns, rows = rng.integers(2, 4), 1 if top > -0.15 else rng.integers(1, 3)
    door_column, size = rng.integers(columns), w / columns * rng.uniform(0.5, 0.66)
    floor, openings, bars = (base - top) / rows, [], []
    for row in range(rows):
        for column in range(columns):
            x, y = -w + (2 * column + 1) * w / columns, top + (row + 0.48) * floor
            if row == rows - 1 and column == door_column:
                openings.append((box(x - size * 0.8, y - size * 0.8, x + size * 0.8, base), 1))
                continue
            high = min(size, 0.38 * floor)
            openings.append((box(x - size, y - high, x + size, y + high), 1))
            bars.append((box(x - 0.025, y - high, x + 0.025, y + high), 1))
            bars.append((box(x - size, y - 0.025, x + size, y + 0.025), 1))
    stack, walls = Part([(chimney, 1)], 0, 0.03), Part([(box(-w, top - 0.02, w, base), 1)], 0, 0.03)
    return [stack, walls, Part([(roof, 1)], 1, 0.06), Part(openings, 2, 0.0), Part(bars, 0, 0.0)]


def ring(rng) -> list[Part]:
    """Torus: a round tube bent into a circle, with or without coloured bands."""
    tube = rng.uniform(0.13, 0.3)
    bands = int(rng.integers(3, 9)) if rng.random() < 0.4 else 0

    def surface(u, v):
        height = np.sqrt(np.maximum(tube**2 - (np.hypot(u, v) - 1 + tube) ** 2, 0))
        return height, np.clip(6 * np.sin(bands * np.arctan2(v, u)) - 1, 0, 1) if bands else None

    return [Part([(ellipse(0, 0, 1, n=60), 1), (ellipse(0, 0, 1 - 2 * tube, n=60), 0)], 0, 0.0, surface)]


def ball(rng) -> list[Part]:
    """Sphere, turned at random in space, with a checker, beach-ball or banded skin."""
    axis = np.linalg.qr(rng.normal(size=(3, 3)))[0].astype(np.float32)
    kind, across, down = rng.integers(4), int(rng.integers(2, 7)), int(rng.integers(2, 5))

    def surface(u, v):
        z = np.sqrt(np.maximum(1 - u * u - v * v, 0))
        x, y, up = (axis[i, 0] * u + axis[i, 1] * v + axis[i, 2] * z for i in range(3))
        meridian = np.clip(0.5 + 6 * np.sin(across * np.arctan2(y, x)), 0, 1)
        band = np.clip(0.5 + 6 * np.sin(2 * down * np.arccos(np.clip(up, -1, 1))), 0, 1)
        checker = meridian + band - 2 * meridian * band
        return z, (checker, checker, meridian, band)[kind]

    return [Part([(ellipse(0, 0, 1, n=60), 1)], 0, 0.0, surface)]


def tree(rng) -> list[Part]:
    """Conifer of stacked tiers, broad-leaved tree with a crown of clumps, or bare branches."""
    kind, trunk, parts = rng.integers(3), rng.uniform(0.06, 0.12), []
    if kind == 0:
        tiers, wide, low = rng.integers(2, 6), rng.uniform(0.5, 0.75), rng.uniform(0.45, 0.7)
        parts.append(Part([(box(-trunk, low - 0.1, trunk, 1), 1)], 1))
        for i in range(tiers):
            y1 = low - (low + 1) * i / tiers * 0.9
            y0, half = max(-1, y1 - (low + 1) / tiers * 1.25), wide * (1 - 0.75 * i / tiers)
            parts.append(Part([(np.array([[-half, y1], [0, y0], [half, y1], [0, y1 + 0.07]]), 1)], 0, 0.1))
        return parts
    branches, ends = [], []

    def grow(start, angle, length, width, level):
        end = start + length * np.array([np.sin(angle), -np.cos(angle)])
        branches.append((stroke([start, (start + end) / 2, end], [width, width * 0.8, width * 0.6]), 1))
        ends.append(end)
        if level:
            spread = rng.uniform(0.35, 0.65)
            for turn in (-spread, spread, 0)[: 2 + int(rng.random() < 0.4)]:
                shorter = length * rng.uniform(0.62, 0.8)
                grow(end, angle + turn + rng.normal(0, 0.1), shorter, width * 0.62, level - 1)

    grow(np.array([0, 1.0]), 0.0, rng.uniform(0.6, 0.75), trunk * 2, 4 if kind == 2 else 3)
    parts.append(Part(branches, 1, 0.05))
    if kind == 1:
        clumps = [(ellipse(x, max(y, -0.8), rng.uniform(0.2, 0.32), n=18), 1) for x, y in ends[2:]]
        parts += [Part(clumps[i::3], 0, 0.12) for i in range(3)]
    return parts


def fish(rng) -> list[Part]:
    """Fish from the side: body, forked tail, fins, gill and eye."""
    t = np.linspace(0, 1, 40)
    deep, tail = rng.uniform(0.26, 0.5), rng.uniform(0.3, 0.55)
    half = deep * np.sin(np.pi * np.minimum(t * 0.93 + 0.02, 1)) ** rng.uniform(0.6, 0.95) + 0.05 * t
    middle = np.stack([-0.95 + 1.5 * t, 0.04 * np.sin(5 * t + rng.uniform(0, TAU))], 1)
    fins = [(np.array([[0.45, 0], [0.98, -tail], [rng.uniform(0.6, 0.85), 0], [0.98, tail]]), 1)]
    x = rng.uniform(-0.4, -0.15)
    top, low = deep + rng.uniform(0.12, 0.3), deep + rng.uniform(0.08, 0.25)
    fins.append((np.array([[x, -deep * 0.7], [x + 0.2, -top], [x + 0.65, -deep * 0.6]]), 1))
    fins.append((np.array([[x + 0.1, deep * 0.7], [x + 0.4, low], [x + 0.5, deep * 0.6]]), 1))
    eye, size = (-0.68, -0.25 * deep), rng.uniform(0.07, 0.11)
    arc = np.linspace(-0.9, 0.9, 9)
    gill = stroke(np.stack([-0.52 + 0.1 * np.cos(arc), deep * 0.6 * np.sin(arc)], 1), 0.05)
    side_fin = np.array([[-0.38, 0.02], [-0.1, rng.uniform(0.02, 0.14)], [-0.14, 0.2]])
    body = Part([(stroke(middle, 2 * half), 1)], 0, 0.2)
    marks = Part([(gill, 1), (side_fin, 1), (ellipse(*eye, size * 0.5, n=12), 1)], 1, 0.0)
    iris = Part([(ellipse(*eye, size, n=16), 1), (ellipse(*eye, size * 0.55, n=12), 0)], 2, 0.0)
    return [Part(fins, 1, 0.05), body, marks, iris]


def wheel(rng) -> list[Part]:
    """Spoked wheel: tyre, rim, hub and 4 to 14 spokes, straight through the hub or swept."""
    rim, hub, count = rng.uniform(0.72, 0.88), rng.uniform(0.1, 0.24), rng.integers(4, 15)
    width, sweep = rng.uniform(0.25, 0.55) / np.sqrt(count), rng.uniform(-0.5, 0.5) * (rng.random() < 0.5)
    r, thick = np.linspace(hub * 0.8, rim + 0.02, 5), width * np.linspace(0.6, 0.5, 5)
    spokes = [(stroke(polar(r, a + sweep * r), thick), 1) for a in np.arange(count) * TAU / count]
    tyre = Part([(ellipse(0, 0, 1, n=60), 1), (ellipse(0, 0, rim, n=60), 0)], 0, 0.08)
    inner = Part([(ellipse(0, 0, rim, n=60), 1), (ellipse(0, 0, rim - 0.06, n=60), 0)], 1, 0.05)
    middle = Part([(ellipse(0, 0, hub), 1)], 2 * int(rng.random() < 0.5), 0.1)
    return [Part(spokes, 1, 0.05), inner, tyre, middle]


def clutter(rng) -> list[Part]:
    """A thing of no class: lens, pebble, slab, stick, wedge or crescent."""
    kind, thin = rng.integers(6), rng.uniform(0.12, 0.9)
    loops = [(ellipse(0, 0, 1, thin), 1)]
    if kind == 0:
        a = np.linspace(0, TAU, 40, endpoint=False)
        wave = sum(rng.uniform(0, 0.2) / k * np.cos(k * a + rng.uniform(0, TAU)) for k in (2, 3, 4, 5))
        loops = [(polar(0.75 * (1 + wave), a), 1)]
    elif kind == 1:
        loops = [(box(-1, -thin, 1, thin), 1)]
    elif kind == 2:
        t = np.linspace(-1, 1, 16)
        loops = [(stroke(np.stack([t, rng.uniform(-0.5, 0.5) * t * t], 1), rng.uniform(0.06, 0.25)), 1)]
    elif kind == 3:
        loops = [(polar(rng.uniform(0.6, 1, 3), np.arange(3) * TAU / 3 + rng.uniform(-0.4, 0.4, 3)), 1)]
    elif kind == 4:
        loops = [(ellipse(0, 0, 0.9), 1), (ellipse(rng.uniform(0.35, 0.7), 0, 0.85), 0)]
    return [Part(loops, int(rng.integers(3)), rng.uniform(0, 0.25))]


FAMILIES = {f.__name__: f for f in (ball, fish, gear, house, leaf, ring, spiral, star, tree, wheel)}
# Usual turn in radians of those that have an upright; the others turn freely
TURN = {"fish": 0.5, "leaf": 0.5, "house": 0.12, "tree": 0.12}
