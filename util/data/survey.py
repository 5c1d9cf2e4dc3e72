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
from util.data.read import BadImage, _explain, _open, read_image
from util.data.transforms import EvalTransform

SIDE = 16  # of a thumbnail, in pixels
ALIKE = 0.985  # cosine of two thumbnails, from which their pictures are compared
SAME, SAME_SMALL = 0.96, 0.985  # cosine of the pictures at COMPARED x COMPARED, from which they are the same
COMPARED = 32  # pixels
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
            picture = Image.fromarray(_grey(array)[:, :, 0])
        else:
            picture = Image.open(file)
            (width, height), kind = picture.size, picture.mode
            channels = 1 if kind in ("1", "L") else 3
            picture.draft(kind, (4 * SIDE, 4 * SIDE))
            picture.seek(page)
        picture = picture if picture.mode == "L" else picture.convert("RGB")
        thumbnail = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX).convert("RGB"))
    except Exception as error:  # on broken files parsers raise whatever they run into
        return _explain(error)
    if (
        channels == 3
        and np.ptp(thumbnail.astype(np.int16), axis=2).max() <= 2
        and kind in ("P", "RGB", "RGBA")
    ):
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

    Near ones are the same picture stored anew: compressed, resized, made brighter. Thumbnails are compared
    all with all, by the cosine of what is left when each one's mean is taken away; those alike are compared
    again at COMPARED x COMPARED pixels.
    """
    places = [(s, n) for s, part in enumerate(surveys) for n, seen in enumerate(part.looks) if seen]
    looks = [surveys[s].looks[n] for s, n in places]
    first: dict[bytes, int] = {}
    exact = [
        (places[i], places[j]) for j, seen in enumerate(looks) if (i := first.setdefault(seen.digest, j)) != j
    ]
    single = [i for i, seen in enumerate(looks) if first[seen.digest] == i and not seen.flat]
    if not single:
        return exact, []
    vectors = _directions(np.stack([looks[i].thumbnail for i in single]))
    near = []
    for start in range(0, len(vectors), 1024):
        alike = vectors[start : start + 1024] @ vectors[start:].T > ALIKE
        for one, other in alike.triu(1).nonzero().tolist():
            i, j = places[single[start + one]], places[single[start + other]]
            small = all(min(surveys[s].looks[n].size) <= COMPARED for s, n in (i, j))
            if _likeness(*(surveys[s].path(n) for s, n in (i, j))) > (SAME_SMALL if small else SAME):
                near.append((i, j))
    return exact, near


def _directions(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (n, ...) -> float32 (n, D): each one's mean taken away, of length 1."""
    vectors = torch.from_numpy(pictures).flatten(1).float()
    return torch.nn.functional.normalize(vectors - vectors.mean(dim=1, keepdim=True), dim=1)


def _likeness(one: str, other: str) -> float:
    """Cosine of two pictures at COMPARED x COMPARED pixels; 0 of a deep and an 8-bit one."""
    pictures = []
    for path in (one, other):
        try:
            array = read_image(path, 3)
        except BadImage:  # deep, or of other channels
            with _open(path) as file:
                array = _grey(decode(file, file.read(HEAD), getattr(path, "page", 0)))
        pictures.append(EvalTransform(COMPARED)(array).numpy())
    if pictures[0].shape != pictures[1].shape:
        return 0.0
    vectors = _directions(np.stack(pictures))
    return float(vectors[0] @ vectors[1])


def _grey(array: np.ndarray) -> np.ndarray:
    """(H, W, C) of any type -> uint8 (H, W, 1): the channels' mean, from its least value to its largest."""
    grey = array.mean(axis=2, dtype=np.float64, keepdims=True)
    return np.uint8(255 * (grey - grey.min()) / max(np.ptp(grey), 1e-12))


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
