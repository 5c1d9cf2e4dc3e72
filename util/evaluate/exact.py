"""Evaluation that gives the same digits for any batch size and any number of processes, and what it reports.

Two things make the usual evaluation depend on how it is run. (1) A matrix product rounds differently for
another number of rows, so a sample's logits depend on the batch that it is in. Here the model always sees the
very same groups of `GROUP` samples (0..31, 32..63, ...), whatever the loader's batch size; whole groups are
dealt to the processes, and nothing is padded. (2) Floating-point sums depend on the order. Here every
sample's loss is collected and summed exactly (`math.fsum`), which is the same in any order. What remains
outside: another kind of device, library version or precision.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.utils.data import DataLoader

from util.compute.precision import autocast, casting_once, resolve_amp_dtype
from util.compute.prefetch import DevicePrefetcher
from util.data.labelled import LabelledImages
from util.data.loader import Batch, build_loader, open_batch
from util.data.sampler import GROUP, EvalSampler
from util.data.targets import sample_loss
from util.data.transforms import normalize_batch
from util.files import counted, some
from util.processes.collectives import gather, get_rank, get_world_size, warn


@dataclass
class Predictions:
    """One entry per sample, in the order of the data set.

    indices, labels: int64 (n,), or labels as the loader gives them; losses: float64 (n,), cross entropy or
    the task's; top: int64 (n, min(5, K)), the best classes, best first; confidence: float64 (n,), probability
    of the best class; outputs: float64 (n, K), the model's, or None where they are not kept.
    """

    indices: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    top: np.ndarray
    confidence: np.ndarray
    outputs: np.ndarray | None = None


def in_groups(batches: Iterable) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Cuts a stream of batches into groups of `GROUP`, (images, labels, indices); the last may be shorter.

    Batches are our loaders' or what `util.data.loader.open_batch` makes of others: labels are -1 where there
    are none, and samples are numbered in the order in which they come. A group is on the device of its
    batches.
    """
    held, count, seen = [], 0, 0
    for batch in batches:
        images, labels, indices = open_batch(batch)
        number = len(images)
        labels = torch.full((number,), -1) if labels is None else labels
        indices = torch.arange(seen, seen + number) if indices is None else indices
        seen += number
        held.append((images, labels, indices))
        count += number
        while count >= GROUP:
            joined = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*held, strict=True)]
            # A clone of a slice: its memory is laid out as if the group had come alone
            yield tuple(part[:GROUP].clone() for part in joined)
            held, count = [tuple(part[GROUP:] for part in joined)], count - GROUP
    if count:
        yield tuple(torch.cat(parts).clone() for parts in zip(*held, strict=True))


def on_device(batches: Iterable, device: torch.device, args=None) -> Iterator[list]:
    """The batches of a loader with all their tensors on `device`, where uint8 images are normalised; on a GPU
    the next one is on its way meanwhile.

    Args:
        args: if given: mean, std.
    """
    mean, std = getattr(args, "mean", None), getattr(args, "std", None)

    def move(batch) -> list[torch.Tensor]:
        images, *others = open_batch(batch)
        others = [part.to(device, non_blocking=True) for part in others if part is not None]
        return [normalize_batch(images, device, mean, std), *others]

    for batch, moved in DevicePrefetcher(batches, device, move):
        yield Batch(*moved) if isinstance(batch, Batch) else moved


def eval_loader(
    dataset: LabelledImages, args, pin_memory: bool = False, epoch: int | None = None
) -> DataLoader:
    """Loader of this process's share of `dataset`, each sample once; `epoch`: that of its augmentation.

    Args:
        args: batch_size, num_workers.
    """
    sampler = EvalSampler(len(dataset), get_world_size(), get_rank(), epoch)
    return build_loader(dataset, sampler, args.batch_size, args.num_workers, pin_memory)


@torch.no_grad()
def predict_samples(
    data_loader: Iterable, model: torch.nn.Module, device, args=None, task: str | None = None
) -> Predictions:
    """Runs the model over a loader and collects the predictions of all processes, the same on each.

    Args:
        data_loader: batches as `in_groups` takes them; with several processes each gives its own share, as
            `EvalSampler` deals it, with indices.
        model: images -> logits (N, K); its training mode is restored.
        args: if given: amp_dtype, mean, std (to normalise uint8 images).
        task: of `util.data.targets`, whose loss is taken, and all outputs kept; None: one class, and not.
    """
    device = torch.device(device)
    amp_dtype = resolve_amp_dtype(getattr(args, "amp_dtype", "auto"), device)
    losses_of = sample_loss(task or "class")
    # The bare model: DistributedDataParallel would wait in forward for processes that have no more groups
    model = model.module if hasattr(model, "module") else model
    was_training = model.training
    model.eval()
    rows = []
    with casting_once(device, amp_dtype, model):
        for images, labels, indices in in_groups(on_device(data_loader, device, args)):
            with autocast(device, amp_dtype):
                logits = model(images)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices
            confidence = logits.softmax(dim=1).amax(dim=1)
            outputs = [logits] if task else []
            rows.append((indices, labels, losses_of(logits, labels), top, confidence, *outputs))
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
    names = some(dataset.files.paths[i] for i in indices[dropped].tolist())
    warn(f"{counted(int(dropped.sum()), 'image')} left out of the figures, not decodable: {names}")
    return [column[~dropped] for column in columns]


def _gather(columns: list[torch.Tensor]) -> Predictions:
    """Joins the columns of all processes and puts them in the order of the data set."""
    columns = [c.double().numpy() if c.is_floating_point() else c.numpy() for c in columns]
    shares = filter(None, gather(columns))
    columns = [np.concatenate(parts) for parts in zip(*shares, strict=True)]
    if not columns:
        raise ValueError("the evaluation loader gave no samples")
    order = np.argsort(columns[0], kind="stable")
    pairs = zip(fields(Predictions), columns, strict=False)
    return Predictions(**{entry.name: column[order] for entry, column in pairs})


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
