"""Pictures of the demo set: an object of `shapes.py` among clutter, lit, shadowed, partly hidden.

Everything but the outline is drawn independently of the class: colours, textures, size, place, background,
light, lens blur, sensor noise, JPEG quality, and for most classes the turn. Neither a colour histogram nor
a pixel at a fixed place tells the class, while masked patches follow from visible ones at several scales:
contours, shading, textures.
"""

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from util.demo_set.shapes import FAMILIES, TURN, clutter
from util.demo_set.textures import TAU, background, blur, colour, contrasting, mix, noise, texture, to_image

SUPERSAMPLE = 3  # polygons are drawn at three times the size and averaged, for smooth edges


def rasterise(loops, corner, height, width) -> np.ndarray:
    """Coverage (H, W) in [0, 1] of polygons in pixels, in the window whose top left is `corner` (x, y)."""
    image = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    draw = ImageDraw.Draw(image)
    for points, fill in loops:
        draw.polygon([tuple(p) for p in ((points - corner) * SUPERSAMPLE).tolist()], fill=255 * fill)
    return np.asarray(image.reduce(SUPERSAMPLE), np.float32) / 255


def shade(height, light, gloss) -> tuple[np.ndarray, np.ndarray]:
    """Diffuse factor (1 where flat) and highlight, both (H, W), of a height field in pixels."""
    down, right = np.gradient(height)
    length = np.sqrt(right**2 + down**2 + 1)
    facing = (light[2] - right * light[0] - down * light[1]) / length
    half = light + np.array([0, 0, 1], np.float32)
    half /= np.linalg.norm(half)
    shine = np.clip((half[2] - right * half[0] - down * half[1]) / length, 0, 1) ** 24
    return 0.35 + 0.65 * np.clip(facing, 0, 1) / light[2], gloss * (shine - half[2] ** 24)


def colours_of(part, mask, u, v, radius, tones, patterns, light, gloss) -> np.ndarray:
    """Colours (H, W, 3) of one layer with coverage `mask`: its tone, patterned on u, v, under the light."""
    pattern, albedo = patterns[part.tone], tones[part.tone]
    if part.surface is not None:
        height, own = part.surface(u, v)
        height, pattern = height * radius, pattern if own is None else own
    elif part.relief:
        wide = max(1.0, part.relief * radius)
        height = 2 * wide * np.sqrt(np.maximum(2 * blur(mask, wide) - 1, 0) + 0.02)
    else:
        height = np.zeros_like(mask)
    if pattern is not None:
        albedo = mix(pattern, albedo, tones[2 if part.tone == 1 else 1])
    diffuse, shine = shade(height, light, gloss)
    return albedo * diffuse[..., None] + shine[..., None]


def paint(picture, parts, matrix, centre, tones, light, rng) -> np.ndarray:
    """Draws an object into `picture` (H, W, 3) in place: the shadow it casts, then its layers.

    Returns which pixels it covers, bool (H, W).

    matrix (2, 2) and centre (x, y) take the object's coordinates to pixels; tones: three colours; light (3,):
    unit vector to the lamp.
    """
    radius = math.sqrt(abs(np.linalg.det(matrix)))
    placed = [[(points @ matrix.T + centre, fill) for points, fill in part.loops] for part in parts]
    every = np.concatenate([points for loops in placed for points, _ in loops])
    margin = 4 + 0.35 * radius
    x0, y0 = (int(max(0, n)) for n in every.min(0) - margin)
    x1, y1 = (int(min(size, n)) for size, n in zip(picture.shape[1::-1], every.max(0) + margin, strict=True))
    covered = np.zeros(picture.shape[:2], bool)
    if x1 - x0 < 4 or y1 - y0 < 4:
        return covered
    window, size = picture[y0:y1, x0:x1], (y1 - y0, x1 - x0)
    lift, soft = rng.uniform(0.03, 0.22) * radius, rng.uniform(0.5, 1 + 0.12 * radius)
    dark = rng.uniform(0.2, 0.6)
    all_loops = [loop for loops in placed for loop in loops]
    cast = rasterise(all_loops, (x0 - light[0] * lift, y0 - light[1] * lift), *size)
    window *= 1 - dark * blur(cast, soft)[..., None]
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32) + 0.5
    inverse, (x, y) = np.linalg.inv(matrix).tolist(), (x - float(centre[0]), y - float(centre[1]))
    u, v = (row[0] * x + row[1] * y for row in inverse)
    patterns = [*(texture(rng, u, v) * rng.uniform(0, 1) ** 2 for _ in range(2)), None]
    gloss = (0.0, 0.3, 0.8)[rng.integers(3)]
    for part, loops in zip(parts, placed, strict=True):
        mask = rasterise(loops, (x0, y0), *size)
        colours = colours_of(part, mask, u, v, radius, tones, patterns, light, gloss)
        window += mask[..., None] * (colours - window)
        covered[y0:y1, x0:x1] |= mask > 0.5
    return covered


def pose(rng, angle, radius, squash) -> np.ndarray:
    """Matrix (2, 2): mirror or not, turn by `angle`, foreshorten by `squash`, scale to `radius` pixels."""

    def turn(a):
        return np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])

    tilt, mirror = rng.uniform(0, TAU), np.diag([rng.choice([-1, 1]), 1])
    return turn(tilt) @ np.diag([1, squash]) @ turn(-tilt) @ turn(angle) @ mirror * radius


def expose(picture, rng) -> np.ndarray:
    """A float picture as uint8 (H, W, 3): uneven light, white balance, contrast, lens blur, sensor noise."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    angle, amount = rng.uniform(0, TAU), rng.uniform(0, 0.4)
    lamp = 1 + amount * math.cos(angle) * x + amount * math.sin(angle) * y
    lamp -= rng.uniform(0, 0.2) * (x * x + y * y)
    if rng.random() < 0.25:  # the shade of something outside the picture
        shadow = noise(rng, height, width, rng.uniform(25, 70)) - 0.5
        edge = np.clip(shadow * rng.uniform(5, 50) + 0.5, 0, 1)
        lamp = lamp * (1 - rng.uniform(0.2, 0.5) * edge)
    balance = rng.uniform(0.88, 1.12, 3).astype(np.float32) * rng.uniform(0.95, 1.2)
    level = np.linspace(0, 1, 256) ** rng.uniform(0.7, 1.2)
    contrast, lift = rng.uniform(0.7, 1.05), rng.uniform(-0.06, 0.06)
    curve = np.clip(255 * (0.5 + (level - 0.5) * contrast + lift), 0, 255).astype(int).tolist()
    image = to_image(picture * lamp[..., None] * balance).point(curve * 3)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    grain = rng.standard_normal(picture.shape, np.float32) * rng.uniform(0.5, 5)
    return np.clip(np.asarray(image, np.float32) + grain + 0.5, 0, 255).astype(np.uint8)


def render(name, rng, facts: dict | None = None) -> np.ndarray:
    """One picture uint8 (H, W, 3) of class `name`, 96 to 160 px a side; depends on `name` and `rng` only.

    `facts`, a dict, gets what is in it: x, y (centre of the object over width and height), size (its radius
    over the shorter side), fill (its area over that of a circle of this radius), clutter and covers (numbers
    of small things behind and before it), blurred (the background), mask (bool (H, W), where it is seen).
    """
    height, width = np.clip(rng.integers(96, 161) * rng.uniform(0.75, 1.34, 2), 96, 160).astype(int).tolist()
    short, middle = min(height, width), np.array([width, height]) / 2
    picture = background(rng, height, width)
    picture += rng.uniform(0.1, 0.75) * (picture.mean((0, 1)) - picture)  # of less contrast than the object
    azimuth, elevation = rng.uniform(0, TAU), rng.uniform(0.5, 1.1)
    flat = np.array([math.cos(azimuth), math.sin(azimuth)]) * math.cos(elevation)
    light = np.array([*flat, math.sin(elevation)], np.float32)
    radius = short * rng.uniform(0.38, 0.53)
    centre = middle + np.maximum(middle - 0.9 * radius, 0) * rng.uniform(-0.7, 0.7, 2)

    def scatter(count, around, spread, low, high):
        covered = np.zeros(picture.shape[:2], bool)
        for _ in range(count):
            matrix = pose(rng, rng.uniform(0, TAU), rng.uniform(low, high), rng.uniform(0.5, 1))
            place = around + spread * rng.uniform(-1, 1, 2)
            parts, colours = clutter(rng), [colour(rng) for _ in range(3)]
            covered |= paint(picture, parts, matrix, place, colours, light, rng)
        return covered

    behind_it = rng.integers(0, 5)
    scatter(behind_it, middle, middle, 0.05 * short, 0.16 * short)
    blurred = rng.random() < 0.4
    if blurred:  # depth of field: all so far lies behind
        picture = blur(picture, rng.uniform(0.5, 2.5))
    top, left = np.maximum(centre[::-1] - radius / 2, 0).astype(int)
    behind = picture[top : top + int(radius), left : left + int(radius)].mean((0, 1))
    first = contrasting(rng, behind)
    tones = [first, contrasting(rng, first), contrasting(rng, first, 0.5)]
    angle = rng.normal(0, TURN[name]) if name in TURN else rng.uniform(0, TAU)
    squash = 1 if name == "ball" else rng.uniform(0.62, 1)
    parts, matrix = FAMILIES[name](rng), pose(rng, angle, radius, squash)
    mask = paint(picture, parts, matrix, centre, tones, light, rng)
    bearing = rng.uniform(0, TAU)
    edge = centre + radius * rng.uniform(0.65, 1.0) * np.array([math.cos(bearing), math.sin(bearing)])
    covers = (0, 0, 1, 1, 2)[rng.integers(5)]
    covered = scatter(covers, edge, 0.25 * radius, 0.15 * radius, 0.45 * radius)
    if facts is not None:
        loops = [(points @ matrix.T + centre, fill) for part in parts for points, fill in part.loops]
        fill = rasterise(loops, (0, 0), height, width).sum() / (math.pi * radius**2)
        facts |= {"x": centre[0] / width, "y": centre[1] / height, "size": radius / short, "fill": fill}
        facts |= {"clutter": int(behind_it), "covers": covers, "blurred": blurred}
        facts["mask"] = mask & ~covered
    return expose(picture, rng)


def encode(picture, rng) -> bytes:
    """JPEG bytes of a picture uint8 (H, W, 3), quality 70 to 95, colour subsampled or not."""
    buffer, quality, subsampling = io.BytesIO(), int(rng.integers(70, 96)), int(rng.choice([0, 2]))
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()
