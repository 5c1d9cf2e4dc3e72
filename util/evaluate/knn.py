"""Weighted k-nearest-neighbour classification on frozen features (DINO, arXiv 2104.14294, appendix F.1)."""

import functools
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F

from util.data.labelled import LabelledImages, check_classes, labelled_images
from util.data.presets import eval_transform
from util.data.targets import Targets
from util.errors import UserError
from util.evaluate.exact import eval_loader
from util.evaluate.features import ROWS, encoder_features, extract_features
from util.evaluate.metrics import measure
from util.processes.collectives import gather, is_main_process, log


def knn_accuracy(
    model_or_feature_fn: torch.nn.Module | Callable,
    train_loader: Iterable,
    val_loader: Iterable,
    device,
    k: int = 20,
    temperature: float = 0.07,
    args=None,
    targets: Targets | None = None,
) -> dict[str, float | None]:
    """Accuracy of k-NN on the validation images, with the training images' features as the memory.

    The first process votes, and alone holds all features, n x D x 4 bytes (on a CPU twice); every process
    holds its share of them until it has sent it.

    Args:
        model_or_feature_fn: a model of this code (its mode is restored; of a MAE model the mean over the
            patch tokens is taken), or a function from normalised images to features (N, D).
        train_loader, val_loader: batches (images, labels[, indices]) without random augmentation; with
            several processes dealt by `util.data.sampler.EvalSampler`.
        k: neighbours, at most the number of training images is used.
        temperature: a neighbour of cosine similarity s votes with weight exp(s / temperature).
        args: if given: amp_dtype; mean, std, to normalise uint8 images with.
        targets: what the labels are; given, all figures of that task are returned.

    Returns:
        acc1, acc5 in percent (not of several labels, or numbers), the same on all processes.
    """
    model = model_or_feature_fn if isinstance(model_or_feature_fn, torch.nn.Module) else None
    feature_fn = model_or_feature_fn if model is None else lambda images: encoder_features(model, images)
    was_training = model is not None and model.training
    if model is not None:
        model.eval()
    loaders = (train_loader, val_loader)
    train, val = (extract_features(feature_fn, part, device, args, everywhere=False) for part in loaders)
    if model is not None:
        model.train(was_training)
    # On one process alone: the others would hold as many features, to find the same
    found = None
    if is_main_process():
        single = targets is None or targets.task == "class"
        found = knn_from_features(*train, *val, k, temperature, device) if single else {}
        if targets is not None:
            found |= _figures(*train, *val, k, temperature, device, targets)
    return gather(found)[0]


def _figures(
    train_features, train_labels, val_features, val_labels, k, temperature, device, targets: Targets
) -> dict[str, float | None]:
    """All figures of a task; labels int64 (n,), or float32 (n, K), numbers standardised."""
    if targets.task == "class":
        train_labels = F.one_hot(train_labels, len(targets.names)).float()
    votes = knn_votes(train_features, train_labels, val_features, [(k, temperature)], 0, device)
    values = torch.cat([vote.cpu() for _, vote in votes]).double()
    if targets.task == "numbers":
        values, val_labels = targets.values(values), targets.values(val_labels.double())
    return measure(targets.task, val_labels.numpy(), values.numpy(), targets.thresholds or 0.5)


@torch.no_grad()
def knn_from_features(
    train_features, train_labels, val_features, val_labels, k=20, temperature=0.07, device="cpu"
) -> dict[str, float]:
    """As `knn_accuracy`, from features (n, D) and labels int64 (n,) of both sets; votes on `device`."""
    num_classes = int(max(train_labels.max(), val_labels.max())) + 1
    hits1 = hits5 = 0
    votes = knn_votes(train_features, train_labels, val_features, [(k, temperature)], num_classes, device)
    for rows, vote in votes:
        best = vote.topk(min(5, num_classes), dim=1).indices == val_labels[rows].to(device)[:, None]
        hits1 += int(best[:, 0].sum())
        hits5 += int(best.any(dim=1).sum())
    return {"acc1": 100.0 * hits1 / len(val_labels), "acc5": 100.0 * hits5 / len(val_labels)}


@torch.no_grad()
def knn_votes(
    features: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    settings: Sequence[tuple[int, float]],
    num_classes: int,
    device="cpu",
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields (rows of the queries, their votes (rows, num_classes)) on `device`, for each of `settings` in
    turn and then for further rows.

    Args:
        features, labels: (n, D) and int64 (n,) of the memory, or values (n, K), whose weighted means (rows,
            K) are yielded. queries: (m, D).
        settings: (k, temperature); where there are fewer neighbours than k, all vote.
    """
    labels, most = labels.to(device), min(max(k for k, _ in settings), len(features))
    memory = torch.empty_like(features, device=device)
    for unit, part in zip(memory.split(ROWS), features.split(ROWS), strict=True):
        unit.copy_(F.normalize(part.to(device), dim=1))
    step = max(1, 2**26 // len(memory))  # similarities of one go: 256 MB
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        similarity = F.normalize(queries[rows].to(device), dim=1) @ memory.T  # (rows, n)
        nearest, ids = similarity.topk(most, dim=1)  # the nearest first
        for k, temperature in settings:
            # Relative to the nearest: the same ranking, and no overflow at small temperatures
            weights = ((nearest[:, :k] - nearest[:, :1]) / temperature).exp()
            if labels.ndim == 1:
                votes = nearest.new_zeros(len(nearest), num_classes)
                yield rows, votes.scatter_add_(1, labels[ids[:, :k]], weights)
            else:
                shares = weights / weights.sum(dim=1, keepdim=True)
                yield rows, (shares[..., None] * labels[ids[:, :k]]).sum(dim=1)


def knn_sets(args: Namespace) -> list[LabelledImages]:
    """The images of `train` and `val`, uint8, not augmented; UserError without labels, or with others."""
    centre = functools.partial(eval_transform, always_crop=True, uint8=True)
    datasets = [labelled_images(split, args, centre) for split in ("train", "val")]
    check_classes(*datasets)
    return datasets


def knn_loaders(args: Namespace, pin_memory: bool = False) -> tuple | None:
    """Loaders of `knn_sets`; None, with a line that says why, where there are none.

    Args:
        args: data_path, input_size, batch_size, num_workers; if present also in_chans, mean, std, bad_images.
    """
    try:
        return tuple(eval_loader(dataset, args, pin_memory) for dataset in knn_sets(args))
    except UserError as error:
        log(f"no k-NN accuracy and no report card: {error}")
        return None
