"""Looks at every image of a split before a run: sizes, colours, unreadable files, duplicates, statistics."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from util.data.deep import decode
from util.data.depth import unit, view
from util.data.find import ImageFiles
from util.data.folders import ask_all
from util.data.headers import HEAD, NPY, why_no_image
from util.data.peek import is_deep
from util.data.read import _explain, _open

SIDE = 16  # of a thumbnail, in pixels
ALIKE, NOISE = 0.01, 0.001  # distances (1 - cosine) of two copies' thumbnails: the largest, the least to tell
GAP = 4  # from a picture's last copy to its next neighbour that distance grows more than this
NEIGHBOURS = 16  # of a picture that are looked at
FLAT = 1.0  # standard deviation of a thumbnail, in 255ths, below which an image counts as constant


@dataclass
class Look:
    """What one file holds. thumbnail: uint8 (SIDE, SIDE, 3). digest: of its bytes. channels: 1: all grey."""

    size: tuple[int, int]
    channels: int
    kind: str
    digest: bytes
    thumbnail: np.ndarray

    @property
    def flat(self) -> bool:
        """Whether it is one colour all over, which teaches nothing."""
        return bool(self.thumbnail.std(axis=(0, 1)).max() < FLAT)


@dataclass
class Survey:
    """What a split holds; all lists are over the files that were looked at.

    rows: their numbers in `files`. looks: one each, None where a file is unreadable. bad: (path, reason).
    """

    files: ImageFiles
    rows: np.ndarray
    looks: list[Look | None]
    bad: list[tuple[str, str]] = field(default_factory=list)

    def good(self) -> list[Look]:
        return [look for look in self.looks if look is not None]

    def path(self, number: int) -> str:
        return self.files.paths[int(self.rows[number])]


def look(path: str) -> Look | str:
    """One file, or in few words why it is no image. JPEGs are decoded at a fraction of their size."""
    try:
        with _open(path) as file:
            data = file.readall() if hasattr(file, "readall") else file.read()
        head, page = data[:HEAD], getattr(path, "page", 0)
        if reason := why_no_image(head):
            return reason
        digest, file = hashlib.blake2b(data + bytes(page), digest_size=16).digest(), io.BytesIO(data)
        if data.startswith(NPY) or is_deep(head, file):
            array = decode(file, head, page)
            (height, width, channels), kind = array.shape, f"{array.dtype}, {array.shape[2]} channels"
            grey = array.mean(axis=2, dtype=np.float64)  # from its least value to its largest
            picture = Image.fromarray(np.uint8(255 * (grey - grey.min()) / max(np.ptp(grey), 1e-12)))
        else:
            picture = Image.open(file)
            (width, height), kind = picture.size, picture.mode
            channels = 1 if kind in ("1", "L") else 3
            picture.draft(kind, (4 * SIDE, 4 * SIDE))
            picture.seek(page)
        picture = picture if picture.mode == "L" else picture.convert("RGB")
        # Bicubic: the boxes of the averages of a picture and of a resized copy end at other places
        small = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
        thumbnail = np.asarray(small.convert("RGB"))
    except Exception as error:  # on broken files parsers raise whatever they run into
        return _explain(error)
    coloured = np.ptp(thumbnail.astype(np.int16), axis=2).max() > 2
    if channels == 3 and kind in ("P", "RGB", "RGBA") and not coloured:
        channels = 1  # grey, stored as colour
    return Look((height, width), channels, kind, digest, thumbnail)


def survey(files: ImageFiles, most: int) -> Survey:
    """Looks at `files`, or at `most` of them, evenly spread."""
    count = len(files.paths)
    rows = np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
    found = Survey(files, rows, [])
    for row, answer in zip(rows, ask_all(look, [files.paths[int(row)] for row in rows]), strict=True):
        found.looks.append(None if isinstance(answer, str) else answer)
        if isinstance(answer, str):
            found.bad.append((files.paths[int(row)], answer))
    found.bad += files.skipped
    return found


def duplicates(surveys: Sequence[Survey]) -> tuple[list[tuple], list[tuple]]:
    """(exact, near) duplicates over all splits: pairs ((split, number), (split, number)), the first one seen
    first.

    Near ones are the same picture stored anew: compressed, resized, made brighter. Their thumbnails are much
    more alike than either is to any third picture (`_copies`).
    """
    places = [(s, n) for s, part in enumerate(surveys) for n, seen in enumerate(part.looks) if seen]
    looks = [surveys[s].looks[n] for s, n in places]
    first: dict[bytes, int] = {}
    exact = [
        (places[i], places[j]) for j, seen in enumerate(looks) if (i := first.setdefault(seen.digest, j)) != j
    ]
    single = [i for i, seen in enumerate(looks) if first[seen.digest] == i and not seen.flat]
    if len(single) < 2:
        return exact, []
    pairs = _copies(np.stack([looks[i].thumbnail for i in single]))
    return exact, [(places[single[i]], places[single[j]]) for i, j in pairs]


def _copies(thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of rows of uint8 (n, SIDE, SIDE, 3) that show the same picture, by the cosine of what is left
    when each one's mean, and then the set's, is taken away.

    What counts as alike depends on the set: cells of solar modules differ less than photographs and their
    copies do. So of a picture's neighbours those before the last gap are its copies, if it is theirs: the
    next one is GAP times as far away. Nothing beyond ALIKE is.
    """
    vectors = torch.from_numpy(thumbnails).flatten(1).float()
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(dim=1, keepdim=True), dim=1)
    count, found = min(NEIGHBOURS, len(vectors) - 1), set()
    for start in range(0, len(vectors), 1024):
        cosines = vectors[start : start + 1024] @ vectors.T
        cosines.diagonal(start).fill_(-1)
        values, others = cosines.topk(count, dim=1)
        distance = (1 - values).clamp_min(NOISE)
        if count < NEIGHBOURS:  # all others are in it, and behind them there is nothing
            distance = torch.nn.functional.pad(distance, (0, 1), value=2.0)
        gap = (distance[:, 1:] > GAP * distance[:, :-1]) & (distance[:, :-1] < ALIKE)
        copies = gap.flip(1).cumsum(dim=1).flip(1) > 0  # a gap comes here or further on
        found |= {(start + i, int(others[i, k])) for i, k in copies.nonzero().tolist()}
    return sorted((i, j) for i, j in found if i < j and (j, i) in found)


def pixel_statistics(
    found: Survey, channels: int, size, depth=None, most: int = 500
) -> tuple[list[float], list[float]]:
    """Means and standard deviations per channel, of pixels in [0, 1] as the model sees them: at its size.

    depth: of a set of deep images, as `util.data.examine.settle_range` returns it.
    """
    numbers = [n for n, seen in enumerate(found.looks) if seen is not None]
    chosen = [numbers[i] for i in np.linspace(0, len(numbers) - 1, min(len(numbers), most)).astype(int)]

    def moments(number: int) -> np.ndarray:
        pixels = unit(view(found.path(number), size, channels, depth), depth).double().flatten(1)
        return torch.stack([pixels.mean(dim=1), pixels.square().mean(dim=1)]).numpy()

    mean, square = np.mean(list(ask_all(moments, chosen)), axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return [round(float(m), 3) for m in mean], [round(max(float(s), 0.001), 3) for s in std]
