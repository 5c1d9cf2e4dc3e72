"""Evaluation that gives the same digits for any batch size and any number of processes, and what it reports.

Two things make the usual evaluation depend on how it is run. (1) A matrix product rounds differently for
another number of rows, so a sample's logits depend on the batch that it is in. Here the model always sees the
very same groups of `GROUP` samples (0..31, 32..63, ...), whatever the loader's batch size; whole groups are
dealt to the processes, and nothing is padded. (2) Floating-point sums depend on the order. Here every
sample's loss is collected and summed exactly (`math.fsum`), which is the same in any order. What remains
outside: another kind of device, library version or precision.
"""

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from util.distributed import get_world_size, warn
from util.image_io import printable
from util.precision import autocast, resolve_amp_dtype
from util.transforms import normalize_batch

GROUP = 32  # samples per forward pass of an evaluation
MAX_CLASSES = 100  # of the per-class table and of the confusion picture


class EvalSampler(torch.utils.data.Sampler):
    """Indices of one process's share of an evaluation: every num_replicas-th group of `GROUP`, in order.

    `epoch`: yields (epoch, index), for data sets whose augmentation depends on the epoch; None: plain
    indices.
    """

    def __init__(self, length: int, num_replicas: int = 1, rank: int = 0, epoch: int | None = None):
        self.epoch = epoch
        self.indices = [
            index
            for start in range(rank * GROUP, length, num_replicas * GROUP)
            for index in range(start, min(start + GROUP, length))
        ]

    def __iter__(self) -> Iterator[int | tuple[int, int]]:
        return iter(self.indices if self.epoch is None else [(self.epoch, index) for index in self.indices])

    def __len__(self) -> int:
        return len(self.indices)


@dataclass
class Predictions:
    """One entry per sample, in the order of the data set.

    indices, labels: int64 (n,); losses: float64 (n,), cross entropy; top: int64 (n, min(5, K)), the best
    classes, best first; confidence: float64 (n,), probability of the best class.
    """

    indices: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    top: np.ndarray
    confidence: np.ndarray


def in_groups(batches: Iterable) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Cuts a stream of batches (images, labels[, indices]) into groups of `GROUP`; the last may be shorter.

    Without indices the samples are numbered in the order in which they come.
    """
    held, count, seen = [], 0, 0
    for batch in batches:
        indices = batch[2] if len(batch) > 2 else torch.arange(seen, seen + len(batch[1]))
        seen += len(batch[1])
        held.append((batch[0], batch[1], indices))
        count += len(batch[1])
        while count >= GROUP:
            joined = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*held, strict=True)]
            # A clone of a slice: its memory is laid out as if the group had come alone
            yield tuple(part[:GROUP].clone() for part in joined)
            held, count = [tuple(part[GROUP:] for part in joined)], count - GROUP
    if count:
        yield tuple(torch.cat(parts).clone() for parts in zip(*held, strict=True))


@torch.no_grad()
def predict_samples(data_loader: Iterable, model: torch.nn.Module, device, args=None) -> Predictions:
    """Runs the model over a loader and collects the predictions of all processes, the same on each.

    Args:
        data_loader: batches (images, labels[, indices]); with several processes each gives its own share, as
            `EvalSampler` deals it, with indices.
        model: images -> logits (N, K); its training mode is restored.
        args: if given: amp_dtype, mean, std (to normalise uint8 images).
    """
    device = torch.device(device)
    amp_dtype = resolve_amp_dtype(getattr(args, "amp_dtype", "auto"), device)
    mean, std = getattr(args, "mean", None), getattr(args, "std", None)
    # The bare model: DistributedDataParallel would wait in forward for processes that have no more groups
    model = model.module if hasattr(model, "module") else model
    was_training = model.training
    model.eval()
    rows = []
    for images, labels, indices in in_groups(data_loader):
        images, labels = normalize_batch(images, device, mean, std), labels.to(device, non_blocking=True)
        with autocast(device, amp_dtype):
            logits = model(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows.append(
            (
                indices,
                labels,
                F.cross_entropy(logits, labels, reduction="none"),
                logits.topk(min(5, logits.shape[1]), dim=1).indices,
                logits.softmax(dim=1).amax(dim=1),
            )
        )
    model.train(was_training)
    columns = [torch.cat(parts).cpu() for parts in zip(*rows, strict=True)] if rows else []
    return _gather(drop_unreadable(data_loader, columns, columns[0]) if columns else columns)


def drop_unreadable(data_loader, columns: list[torch.Tensor], indices: torch.Tensor) -> list[torch.Tensor]:
    """Rows of `columns` without the samples whose files could not be decoded (--bad_images skip).

    Other pictures took their places in the batches; counted here, those would be counted twice.
    """
    dataset = getattr(data_loader, "dataset", None)
    bad = getattr(dataset, "bad", None)
    if bad is None or not (dropped := bad[indices] > 0).any():
        return columns
    names = ", ".join(printable(dataset.files.paths[i]) for i in indices[dropped].tolist()[:5])
    warn(f"{int(dropped.sum())} images could not be decoded and are left out of the figures: {names}")
    return [column[~dropped] for column in columns]


def _gather(columns: list[torch.Tensor]) -> Predictions:
    """Joins the columns of all processes and puts them in the order of the data set."""
    columns = [c.double().numpy() if c.is_floating_point() else c.numpy() for c in columns]
    if get_world_size() > 1:
        shares = [None] * get_world_size()
        dist.all_gather_object(shares, columns)
        columns = [np.concatenate(parts) for parts in zip(*filter(None, shares), strict=True)]
    if not columns:
        raise ValueError("the evaluation loader gave no samples")
    order = np.argsort(columns[0], kind="stable")
    return Predictions(
        **{f.name: column[order] for f, column in zip(fields(Predictions), columns, strict=True)}
    )


def summarize(predictions: Predictions) -> dict[str, float]:
    """acc1, acc5 (percent) and loss (mean) of `predictions`, from exact sums."""
    hits = predictions.top == predictions.labels[:, None]
    count = len(predictions.labels)
    return {
        "acc1": 100.0 * int(hits[:, 0].sum()) / count,
        "acc5": 100.0 * int(hits.any(axis=1).sum()) / count,
        "loss": math.fsum(predictions.losses) / count,
    }


def closing_line(stats: dict[str, float]) -> str:
    """The line that ends an evaluation, e.g. `* Acc@1 83.664 Acc@5 96.530 loss 0.731`."""
    return f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}"


def confusion_matrix(predictions: Predictions, num_classes: int) -> np.ndarray:
    """int64 (K, K): entry [i, j] counts the samples of class i that were taken for class j, or, in the last
    column, for one beyond it.
    """
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (predictions.labels, np.minimum(predictions.top[:, 0], num_classes - 1)), 1)
    return matrix


def per_class_table(matrix: np.ndarray, class_names: list[str]) -> str:
    """A text table: per class the samples, how many were right, and what it was else taken for most often."""
    width = max(len("class"), *(len(name) for name in class_names))
    lines = [f"{'class':{width}s}  samples  correct  acc (%)  most often taken for"]
    for i, name in enumerate(class_names):
        samples, correct = int(matrix[i].sum()), int(matrix[i, i])
        wrong = matrix[i].copy()
        wrong[i] = 0
        other = f"{class_names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else "-"
        accuracy = f"{100 * correct / samples:7.2f}" if samples else "      -"
        lines.append(f"{name:{width}s}  {samples:7d}  {correct:7d}  {accuracy}  {other}")
    return "\n".join(lines)


def write_predictions(path: str | Path, predictions: Predictions, paths, class_names: list[str]) -> None:
    """Writes a CSV file, one line per sample in the order of the data set.

    Columns: path, label, prediction (class names), correct (0 or 1), confidence (probability of the
    prediction), loss.
    """
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "prediction", "correct", "confidence", "loss"])
        for i, index in enumerate(predictions.indices.tolist()):
            label, best = predictions.labels[i], predictions.top[i, 0]
            figures = f"{predictions.confidence[i]:.6f}", f"{predictions.losses[i]:.6f}"
            writer.writerow(
                [paths[index], class_names[label], class_names[best], int(label == best), *figures]
            )


def draw_confusion(matrix: np.ndarray, class_names: list[str]) -> Image.Image:
    """A confusion matrix as a picture: rows are true classes, columns predictions, shade is the share."""
    count = len(class_names)
    cell = 48 if count <= 12 else 26 if count <= 30 else 14
    font = ImageFont.load_default(size=min(14, cell - 2))
    names = [name if len(name) <= 20 else name[:19] + "…" for name in class_names]
    margin = 42 + max(int(font.getlength(name)) for name in names)
    side = margin + count * cell + 12
    picture = Image.new("RGB", (max(side, 320), side), "white")
    draw = ImageDraw.Draw(picture)
    draw.text(
        (8, 6), "rows: true class, columns: prediction", fill="black", font=ImageFont.load_default(size=13)
    )
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    for i in range(count):
        y = margin + i * cell
        draw.text((margin - 6, y + cell / 2), names[i], fill="black", font=font, anchor="rm")
        _draw_upwards(picture, names[i], (y + cell / 2, margin - 6), font)
        for j in range(count):
            x, share = margin + j * cell, shares[i, j]
            shade = tuple(round(255 + (dark - 255) * share) for dark in (8, 48, 107))
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=shade, outline=(225, 225, 225))
            if cell >= 26 and matrix[i, j]:
                ink = "white" if share > 0.4 else "black"
                size = ImageFont.load_default(size=13 if cell == 48 else 9)
                draw.text((x + cell / 2, y + cell / 2), str(matrix[i, j]), fill=ink, font=size, anchor="mm")
    return picture


def _draw_upwards(picture: Image.Image, text: str, bottom_centre: tuple[float, float], font) -> None:
    """Writes `text` rotated, reading upwards from `bottom_centre` (x, y)."""
    _, _, right, bottom = font.getbbox(text)
    label = Image.new("RGB", (max(int(right), 1), max(int(bottom), 1) + 2), "white")
    ImageDraw.Draw(label).text((0, 0), text, fill="black", font=font)
    label = label.rotate(90, expand=True)
    picture.paste(label, (int(bottom_centre[0] - label.width / 2), int(bottom_centre[1] - label.height)))
