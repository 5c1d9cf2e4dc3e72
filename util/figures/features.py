"""What an encoder's features hold, to be seen: principal components of patches as colours, nearest images.

The same weights and images give the same bytes. The recipe is DINOv2's (arXiv 2304.07193): a first component
parts the foreground from the rest, and three components of the foreground are red, green and blue. Other than
there, that first component is of what differs inside the images: of a young encoder's features the colour of
whole images would be it.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.compute.blocks import drop_registers
from util.figures.attention import encode
from util.figures.canvas import Panels, as_pictures
from util.figures.reconstruction import evaluation_mode


@torch.no_grad()
def patch_features(model: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Patch tokens (N, L, D), float32 on the CPU, of whole, unmasked images (N, C, H, W).

    They have gone through the final norm; that of a classifier with global pooling is not for them, and they
    come as its last block gives them.
    """
    norm = getattr(model, "norm", nn.Identity())
    with evaluation_mode(model):
        parts = [norm(encode(model, part, len(model.blocks))) for part in images.split(batch_size)]
    return torch.cat([drop_registers(model, part)[:, 1:].float().cpu() for part in parts])


def components(features: Tensor, count: int = 3) -> Tensor:
    """Scores (n, count), float64, of rows (n, D) on their first principal components, the largest first.

    The number of largest size in each component is positive, so that nothing hangs on a library's choice.
    """
    centred = features.double() - features.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    vectors = vectors[:, -count:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return centred @ (vectors * largest.sign())


def colours(scores: Tensor) -> Tensor:
    """(n, 3) -> float32 in [0, 1]: of each component what lies between its 1st and 99th percentile."""
    low, high = (torch.quantile(scores, share, dim=0) for share in (0.01, 0.99))
    spread = (high - low).clamp_min(1e-6 * (high - low).amax() + 1e-12)  # one that is nothing but rounding
    return ((scores - low) / spread).clamp(0, 1).float()


def foreground(first: Tensor, threshold: float = 0.0) -> Tensor:
    """bool: where the first component (N, rows, columns) is above `threshold` of its standard deviations.

    Its sign is taken so that most patches at the pictures' edges are below.
    """
    edges = torch.cat([first[:, [0, -1]].flatten(), first[:, :, [0, -1]].flatten()])
    scaled = first / first.std().clamp_min(1e-12)
    return (-scaled if edges.median() > 0 else scaled) > threshold


def pca_panels(
    model: nn.Module, images: Tensor, mean: Sequence[float], std: Sequence[float], threshold: float = 0.0
) -> Panels:
    """A row per image: the picture, and three principal components of its patches' features as colours: those
    of the image alone, those of all images, and those of the foreground of all, the rest black.

    Other arguments as of `util.figures.reconstruction.ratio_panels` and `foreground`.
    """
    features = patch_features(model, images)  # (N, L, D)
    n, length, _ = features.shape
    rows = features.flatten(0, 1)
    alone = torch.stack([colours(components(one)) for one in features])
    joint = colours(components(rows)).view(n, length, 3)
    within = (features - features.mean(dim=1, keepdim=True)).flatten(0, 1)
    first = components(within, 1).view(n, *model.patch_embed.grid_size)
    shown = foreground(first, threshold).flatten()
    front = torch.zeros(n * length, 3)
    if shown.sum() > 3:
        front[shown] = colours(components(rows[shown]))
    columns = [as_pictures(images, mean, std)]
    for values in (alone, joint, front.view(n, length, 3)):
        maps = values.transpose(1, 2).unflatten(-1, model.patch_embed.grid_size)
        columns.append(F.interpolate(maps, size=images.shape[-2:], mode="nearest"))
    return Panels(["original", "PCA of each image", "PCA of all", "PCA of all foreground"], columns)


def nearest(features: Tensor, queries: Sequence[int], count: int) -> Tensor:
    """(Q, count): of features (n, D) the rows most like each of `queries` by cosine, without itself.

    Of rows that are equally like it the first comes first.
    """
    unit = F.normalize(features.double(), dim=1)
    likeness = unit[list(queries)] @ unit.T
    likeness[range(len(queries)), list(queries)] = -2.0
    return likeness.argsort(dim=1, descending=True, stable=True)[:, : min(count, len(unit) - 1)]


def neighbour_panels(
    model: nn.Module,
    read: Callable[[Sequence[int]], tuple[Tensor, list[int]]],
    total: int,
    shown: Sequence[int],
    count: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Panels:
    """A row for each image of `shown`, and the `count` of all `total` images that are nearest to it.

    Likeness is the cosine of the means of the patches' features.

    Args:
        read: (images (N, C, H, W), normalised; their numbers) of numbers below `total`, without those that
            cannot be read.
    """
    features, there = [], []
    for start in range(0, total, 32):
        images, kept = read(range(start, min(start + 32, total)))
        features += [patch_features(model, images).mean(dim=1)] if kept else []
        there += kept
    order = nearest(torch.cat(features), [there.index(number) for number in shown], count)
    wanted = torch.tensor(there)[order].T.tolist()  # a list for each column
    columns = [as_pictures(read(numbers)[0], mean, std) for numbers in (shown, *wanted)]
    return Panels(["image", *(f"neighbour {i + 1}" for i in range(len(wanted)))], columns)
