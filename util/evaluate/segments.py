"""Segmentation of images of any size by sliding windows, and its exact figures.

Each image is computed alone, in the same groups of windows, and pixels are counted: figures are the same at
any batch size and number of processes, to the last digit.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F

from util.compute.precision import autocast, resolve_amp_dtype
from util.data.transforms import normalize_batch
from util.evaluate.exact import drop_unreadable
from util.evaluate.output import aligned
from util.processes.collectives import gather

GROUP = 8  # windows per forward pass
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the k-NN on patches, as of DINO's on images (arXiv 2104.14294)


def window_starts(length: int, window: int) -> list[int]:
    """Where windows begin along a side of `length` >= `window` pixels: even steps of half one at most."""
    count = 1 + math.ceil(2 * (length - window) / window)
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]


def segment(
    predict: Callable, image: torch.Tensor, window: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """Scores of the pixels of one image, the mean over the windows that see them.

    Args:
        predict: windows (N, C, *window) -> scores (N, K, *window), for example probabilities.
        image: (C, H, W), normalised, no smaller than `window`.
        size: of the result, (height, width).

    Returns float32 (K, *size).
    """
    places = [(top, left) for top in window_starts(image.shape[1], window[0])
              for left in window_starts(image.shape[2], window[1])]  # fmt: skip
    total = None
    count = image.new_zeros(image.shape[1:], dtype=torch.float32)
    for first in range(0, len(places), GROUP):
        part = places[first : first + GROUP]
        cut = torch.stack([image[:, y : y + window[0], x : x + window[1]] for y, x in part])
        for (y, x), scores in zip(part, predict(cut), strict=True):
            if total is None:
                total = scores.new_zeros((len(scores), *image.shape[1:]))
            total[:, y : y + window[0], x : x + window[1]] += scores
            count[y : y + window[0], x : x + window[1]] += 1
    return F.interpolate((total / count)[None], size, mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def count_pixels(loader: Iterable, predict: Callable, window, num_classes: int, device, args) -> np.ndarray:
    """int64 (K, K): entry [i, j] counts the pixels of class i that were taken for class j, of all processes.

    Args:
        loader: batches of one image and its mask; values of the mask from K on are not counted.
        predict: as of `segment`.
        args: mean, std.
    """
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    dataset, seen = getattr(loader, "dataset", None), []
    for images, masks, indices in loader:
        seen.append(indices)
        if dataset is not None and dataset.bad[indices].any():
            continue  # another picture took the place of one that cannot be read, and is counted itself
        images = normalize_batch(images, device, args.mean, args.std)
        for image, mask in zip(images, masks, strict=True):
            found = segment(predict, image, window, tuple(mask.shape)).argmax(0).cpu()
            counted = mask < num_classes
            pairs = mask[counted] * num_classes + found[counted]
            matrix += torch.bincount(pairs, minlength=num_classes**2).view_as(matrix)
    if seen:
        drop_unreadable(loader, [], torch.cat(seen))  # says which
    return sum(gather(matrix.numpy()))


def probabilities(model: torch.nn.Module, device, args) -> Callable:
    """`predict` of `segment`: the softmax of what the model, in eval mode, gives. args: amp_dtype."""
    amp_dtype = resolve_amp_dtype(getattr(args, "amp_dtype", "auto"), torch.device(device))

    def predict(windows: torch.Tensor) -> torch.Tensor:
        with autocast(device, amp_dtype):
            return model(windows).softmax(dim=1)

    return predict


def neighbours(
    model: torch.nn.Module, bank: torch.Tensor, classes: torch.Tensor, num_classes: int
) -> Callable:
    """`predict` of `segment`: of each patch, the classes of the nearest patches of a bank, by cosine.

    Args:
        model: has `forward_patches`.
        bank: (M, D), of length 1. classes: int64 (M,).
    """
    votes = F.one_hot(classes, num_classes).float()

    def predict(windows: torch.Tensor) -> torch.Tensor:
        patches = F.normalize(model.forward_patches(windows).float(), dim=1)  # (N, D, h, w)
        n, _, h, w = patches.shape
        near, which = (patches.permute(0, 2, 3, 1).flatten(0, 2) @ bank.T).topk(min(NEIGHBOURS, len(bank)))
        weights = (near / TEMPERATURE).softmax(dim=1)
        scores = torch.einsum("pk,pkc->pc", weights, votes[which])
        scores = scores.view(n, h, w, num_classes).permute(0, 3, 1, 2)
        return F.interpolate(scores, windows.shape[-2:], mode="bilinear", align_corners=False)

    return predict


@torch.no_grad()
def make_bank(loader: Iterable, model: torch.nn.Module, num_classes: int, device, args, most: int = 50_000):
    """Patches of training images, at most `most`, with the class that most of their pixels have.

    Args:
        loader: batches of windows with masks of their size; every process sees all.
        args: mean, std, seed.

    Returns (bank (M, D) of length 1, classes int64 (M,)) on `device`.
    """
    features, classes = [], []
    patch = model.patch_embed.patch_size
    for images, masks, _ in loader:
        images = normalize_batch(images, device, args.mean, args.std)
        tokens = F.normalize(model.forward_patches(images), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
        blocks = masks.unfold(1, patch[0], patch[0]).unfold(2, patch[1], patch[1]).flatten(3).flatten(0, 2)
        votes = torch.stack([(blocks == number).sum(1) for number in range(num_classes)], dim=1)
        seen = votes.sum(1) > 0
        features.append(tokens[seen.to(device)].float())
        classes.append(votes.argmax(1)[seen])
    features, classes = torch.cat(features), torch.cat(classes)
    if len(features) > most:
        draw = torch.Generator().manual_seed(args.seed % 2**63)
        kept = torch.randperm(len(features), generator=draw)[:most]
        features, classes = features[kept.to(device)], classes[kept]
    return features, classes.to(device)


def summarize_pixels(matrix: np.ndarray) -> dict[str, float]:
    """Percent, of a matrix of `count_pixels`: miou (mean over the classes that masks or predictions have),
    macc (over those that masks have), pixel_acc.
    """
    right, there, said = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    union = there + said - right
    ious = right[union > 0] / union[union > 0]
    accuracies = right[there > 0] / there[there > 0]
    return {
        "miou": 100 * float(ious.mean()),
        "macc": 100 * float(accuracies.mean()),
        "pixel_acc": 100 * int(right.sum()) / int(matrix.sum()),
    }


def pixel_table(matrix: np.ndarray, names: list[str]) -> str:
    """A text table: per class its share of the pixels, IoU, accuracy, and what it was else taken for."""
    rows = [["class", "share (%)", "IoU (%)", "acc (%)", "most often taken for"]]
    for i, name in enumerate(names):
        there, right = int(matrix[i].sum()), int(matrix[i, i])
        wrong = np.where(np.arange(len(matrix)) == i, 0, matrix[i])
        parts = (right, there + int(matrix[:, i].sum()) - right), (right, there)
        shares = [f"{100 * part / whole:.2f}" if whole else "-" for part, whole in parts]
        other = names[wrong.argmax()] if wrong.any() else "-"
        rows.append([name, f"{100 * there / matrix.sum():.2f}", *shares, other])
    return aligned(rows, (1, 2, 3))
