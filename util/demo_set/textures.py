"""Colours, textures and backgrounds of the demo set's pictures, drawn with NumPy and Pillow.

Fields and pictures are float32 in [0, 1]. Scalars are Python floats: float64 scalars would widen them.
"""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

TAU = 2 * math.pi


def to_image(picture) -> Image.Image:
    """8-bit Pillow image of a float picture (H, W, 3) or field (H, W); values are clipped to [0, 1]."""
    return Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))


def blur(picture, radius) -> np.ndarray:
    """Gaussian blur of a float picture or field, at 8 bits, for Pillow blurs no float images."""
    return np.asarray(to_image(picture).filter(ImageFilter.GaussianBlur(float(radius))), np.float32) / 255


def noise(rng, height, width, cell_y, cell_x=None) -> np.ndarray:
    """Smooth noise (H, W) in [0, 1], whose bumps measure cell_y x cell_x pixels."""
    rows, columns = max(2, round(height / cell_y) + 1), max(2, round(width / (cell_x or cell_y)) + 1)
    grid = Image.fromarray(rng.random((rows, columns), np.float32))
    return np.clip(np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)


def fractal(rng, height, width, roughness) -> np.ndarray:
    """Noise (H, W) with a power-law spectrum, like clouds or soil; `roughness` 0.3 (smooth) to 1 (rough)."""
    cell, weight, total, field = max(height, width) / rng.uniform(1, 3), 1.0, 0.0, 0.0
    while cell > 1.5:
        field, total = field + weight * noise(rng, height, width, cell), total + weight
        cell, weight = cell / 2, weight * roughness
    return np.clip((field / total - 0.5) * 2 + 0.5, 0, 1)


def colour(rng) -> np.ndarray:
    """Random colour (3,), mostly of moderate saturation, as in photographs."""
    hue, saturation, value = rng.random(), rng.beta(1.3, 2.2), rng.uniform(0.15, 1)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def contrasting(rng, other, distance=0.35) -> np.ndarray:
    """Random colour (3,) that can be told from the colour `other`."""
    for _ in range(12):
        candidate = colour(rng)
        if np.linalg.norm(candidate - other) > distance:
            return candidate
    return np.float32(1) - np.round(other)


def mix(field, low, high) -> np.ndarray:
    """Picture (H, W, 3): `low` where the field is 0, `high` where it is 1; each a colour or a picture."""
    return low + field[..., None] * (high - low)


def turned(u, v, angle) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates u, v (H, W) turned by `angle`."""
    return u * math.cos(angle) + v * math.sin(angle), v * math.cos(angle) - u * math.sin(angle)


def texture(rng, u, v, scale=1.0) -> np.ndarray:
    """One of seven random patterns (H, W) on coordinates u, v (H, W): it turns and foreshortens with them.

    They are: plain, stripes, checker, dots, grain, wood rings, mottled.
    """
    height, width = u.shape
    kind, frequency, hard = rng.integers(7), rng.uniform(5, 18) * scale, rng.uniform(0.6, 4)
    a, b = turned(u, v, rng.uniform(0, TAU))
    if kind == 0:
        return np.full(u.shape, rng.uniform(0, 0.3), np.float32)
    if kind == 1:
        field = 0.5 + hard * np.sin(frequency * a + rng.uniform(0, 3) * noise(rng, height, width, 24))
    elif kind == 2:
        field = 0.5 + 2 * hard * np.sin(frequency * a * 0.7) * np.sin(frequency * b * 0.7)
    elif kind == 3:
        field = 2 * hard * (np.cos(frequency * a) * np.cos(frequency * b) - rng.uniform(0.1, 0.5))
    elif kind == 4:
        cells = rng.permutation([rng.uniform(1.5, 3), rng.uniform(6, 30)])
        field = noise(rng, height, width, *cells.tolist())
    elif kind == 5:
        warp = 5 * noise(rng, height, width, 20)
        field = 0.5 + 0.8 * np.sin(frequency * np.hypot(a + 1.5, 0.25 * b) + warp)
    else:
        field = 0.5 + 2 * hard * (fractal(rng, height, width, rng.uniform(0.5, 0.9)) - 0.5)
    return np.clip(field, 0, 1)


def surface(rng, u, v) -> np.ndarray:
    """Background: one textured surface, seen square on."""
    first = colour(rng)
    return mix(texture(rng, u, v, rng.uniform(0.5, 2)), first, 0.5 * first + 0.5 * colour(rng))


def landscape(rng, u, v) -> np.ndarray:
    """Background: sky over an uneven horizon, and ground whose texture runs into a hazy distance."""
    (height, width), air = u.shape, colour(rng)
    line = rng.uniform(-0.6, 0.4) + rng.uniform(-0.1, 0.1) * u + 0.15 * noise(rng, 1, width, 12)
    depth = np.maximum(v - line, 0.05)
    near, other = contrasting(rng, air, 0.3), 0.6 * air + 0.4 * colour(rng)
    ground = mix(texture(rng, u / depth * 0.6, 1 / depth, 0.5), near, other)
    ground = mix(np.exp(-3 * depth) * 0.7, ground, air)
    sky = mix(fractal(rng, height, width, 0.55), air, 0.5 * air + 0.5 * colour(rng))
    sky *= 0.85 + 0.15 * v[..., None]
    return mix(np.clip((v - line) * 40 + 0.5, 0, 1), sky, ground)


def clouds(rng, u, v) -> np.ndarray:
    """Background: smooth to rough noise, from sky to soil."""
    return mix(fractal(rng, *u.shape, rng.uniform(0.5, 1.0)), colour(rng), colour(rng))


def tiles(rng, u, v) -> np.ndarray:
    """Background: bricks or tiles of varied tone, with joints."""
    rows, broad, thick = rng.uniform(1.5, 4), rng.uniform(1, 2.5), rng.uniform(0.05, 0.12)
    a, b = (field * rows for field in turned(u, v, rng.uniform(-0.4, 0.4)))
    a = a / broad + 0.5 * (np.floor(b) % 2)
    tone = rng.random((16, 16), np.float32)[np.floor(b).astype(int) % 16, np.floor(a).astype(int) % 16]
    inside = np.minimum(np.minimum(a % 1, 1 - a % 1) * broad, np.minimum(b % 1, 1 - b % 1))
    first = colour(rng)
    stone = mix(0.7 * tone + 0.3 * fractal(rng, *u.shape, 0.9), first, 0.5 * first + 0.5 * colour(rng))
    joint = (0.6 * first + 0.4 * colour(rng)) * rng.uniform(0.4, 1.3)
    return mix(np.clip((inside - thick) * 25 + 0.5, 0, 1), joint, stone)


def rubble(rng, u, v) -> np.ndarray:
    """Background: stones, that is, cells around scattered points with dark gaps."""
    points = rng.uniform(-1.2, 1.8, (2, rng.integers(12, 45), 1, 1)).astype(np.float32)
    distance = np.hypot(u[::2, ::2] - points[0], v[::2, ::2] - points[1])  # at half the size, for speed
    nearest, second = np.partition(distance, 1, axis=0)[:2]
    height = np.clip((second - nearest) / rng.uniform(0.05, 0.3), 0.25, 1)
    tone, first = rng.random(points.shape[1], np.float32)[distance.argmin(0)], colour(rng)
    cells = mix(tone, first, 0.5 * first + 0.5 * colour(rng)) * height[..., None]
    return np.asarray(to_image(cells).resize(u.shape[::-1], Image.Resampling.BILINEAR), np.float32) / 255


def lights(rng, u, v) -> np.ndarray:
    """Background: lights and things out of focus."""
    (height, width), first = u.shape, colour(rng)
    image = to_image(mix(noise(rng, height, width, 60), first, 0.5 * first + 0.5 * colour(rng)))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(rng.integers(10, 40)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(3, 18)
        fill = (*(int(255 * c) for c in colour(rng)), int(rng.integers(60, 200)))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(1, 4))), np.float32) / 255


def background(rng, height, width) -> np.ndarray:
    """Picture (H, W, 3) of one of the six kinds of background above."""
    v, u = np.mgrid[0:height, 0:width].astype(np.float32) / min(height, width) * 2 - 1
    return (surface, landscape, clouds, tiles, rubble, lights)[rng.integers(6)](rng, u, v)
