"""Runs a classifier or an encoder over image files and returns what comes out.

Every figure is the same at any batch size and number of loader processes: images go through the model in
fixed groups (`util.evaluate.exact.in_groups`), in order, never masked, shuffled or augmented.
"""

from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from models_vit import VisionTransformer
from util.compute.precision import autocast, casting_once, resolve_amp_dtype
from util.compute.prefetch import on_host
from util.data.dataset import ImageDataset
from util.data.depth import depth_of
from util.data.find import ImageFiles
from util.data.labelled import LabelledImages
from util.data.loader import build_loader
from util.data.presets import eval_transform
from util.data.targets import Targets
from util.errors import UserError
from util.evaluate.exact import in_groups, on_device
from util.weights.describe import WeightsFile

KINDS = ("mean", "cls", "patches")


@dataclass
class Predictions:
    """One row per readable image, in order.

    rows: int64 (n,), which of the images it is. classes: int64 (n, k), best first, and probabilities: float32
    (n, k); both None without a head. Of several labels and of numbers all in the order of the outputs.
    features: float32 (n, D) or (n, L, D), or None.
    """

    rows: np.ndarray
    classes: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    features: np.ndarray | None = None


def prediction_loader(
    files: ImageFiles, weights: WeightsFile, args: Namespace, pin_memory: bool = False
) -> torch.utils.data.DataLoader:
    """Batches of `files`, uint8, under the evaluation's transform of the recipe that made the weights.

    A probe's and a bare encoder's is that of probing and k-NN: resize to size / 0.875, centre crop; a
    fine-tuned classifier's the same up to 224 pixels, above it without the margin.

    Args:
        args: batch_size, num_workers, bad_images.
    """
    tuned, channels = weights.recipe == "finetune", weights.sizes["in_chans"]
    names = ("input_size", "mean", "std", "pixel_range")
    stats = Namespace(in_chans=channels, **{name: getattr(weights, name, None) for name in names})
    transform = eval_transform(stats, always_crop=not tuned, uint8=True)
    dataset = LabelledImages(files, transform, channels, 0, args.bad_images, depth_of(weights))
    return batches_of(dataset, args, pin_memory)


def batches_of(dataset: ImageDataset, args: Namespace, pin_memory: bool) -> torch.utils.data.DataLoader:
    """All samples of `dataset` in order; `args`: batch_size, num_workers."""
    batches = -(-len(dataset) // args.batch_size)
    workers = args.num_workers if batches > 1 else 0  # starting processes takes longer than one batch
    return build_loader(dataset, range(len(dataset)), args.batch_size, min(workers, batches), pin_memory)


def pool_tokens(model: torch.nn.Module, tokens: torch.Tensor, kind: str) -> torch.Tensor:
    """Features of the last block's tokens (N, 1 + L, D) of a `VisionTransformer`: (N, D), or (N, L, D).

    Args:
        kind: "mean" of the patch tokens, "cls" token, or all "patches" in row-major order. They have gone
            through the final norm. A classifier with global pooling has a norm for the mean only (the
            features that its head sees); its class token and patches come as its last block gives them.
    """
    if model.global_pool:
        return model.fc_norm(tokens[:, 1:].mean(dim=1)) if kind == "mean" else _part(tokens, kind)
    tokens = model.norm(tokens)
    return tokens[:, 1:].mean(dim=1) if kind == "mean" else _part(tokens, kind)


def _part(tokens: torch.Tensor, kind: str) -> torch.Tensor:
    return tokens[:, 0] if kind == "cls" else tokens[:, 1:]


def _best(values: torch.Tensor, task: str, top_k: int) -> list[torch.Tensor]:
    """Places and values (N, K) of the best classes, best first, or of all labels or numbers."""
    if task == "class":
        return list(values.topk(top_k, dim=1)[::-1])
    return [torch.arange(values.shape[1], device=values.device).expand_as(values), values]


@torch.no_grad()
def predict(
    model: torch.nn.Module,
    loader: Iterable,
    device: torch.device,
    amp_dtype: str = "none",
    top_k: int = 0,
    feature_kind: str | None = None,
    progress=None,
    stats: Namespace | None = None,
    targets: Targets | None = None,
) -> Predictions:
    """Runs `model`, a `VisionTransformer` in eval mode on `device`, over the images of a loader.

    Args:
        top_k: so many of the best classes of each image, or all labels or numbers; 0: none.
        feature_kind: one of `KINDS`; None: no features.
        progress: of `util.cli.progress.progress_bar`, or None.
        stats: mean and std, to normalise uint8 images with; None: ImageNet's.
        targets: what the model predicts; default: one class.
    """
    dtype = resolve_amp_dtype(amp_dtype, device)
    dataset, done = loader.dataset, 0
    parts, features = [], None
    targets = targets or Targets()
    plain = type(model) is VisionTransformer  # a client's class says itself what its features and logits are
    way = "mean" if model.global_pool else "cls"

    def results() -> Iterator[list[torch.Tensor]]:
        for images, _, indices in in_groups(on_device(loader, device, stats)):
            with autocast(device, dtype):
                tokens = model.forward_tokens(images) if feature_kind else None
                values = pool_tokens(model, tokens, feature_kind) if feature_kind else None
                if plain and feature_kind and top_k:  # the encoder runs once
                    logits = model.forward_head(pool_tokens(model, tokens, way))
                else:
                    logits = model(images) if top_k else None
                if not plain and feature_kind == way:
                    values = model.forward_features(images)
            columns = _best(targets.values(logits.float()), targets.task, top_k) if top_k else []
            yield [indices, *columns, *([values.float()] if feature_kind else [])]

    with casting_once(device, dtype, model):
        for columns in on_host(results()):
            if feature_kind:
                *columns, values = columns
                if features is None:  # one block for all: they may take most of the memory
                    features = allocate((len(dataset), *values.shape[1:]))
                features[done : done + len(values)] = values.numpy()
            parts.append([column.clone() for column in columns])
            done += len(columns[0])
            if progress:
                progress.update(len(columns[0]))
    rows, *best = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    readable = dataset.bad.numpy()[rows] == 0
    if not readable.all():  # other pictures took their places in the batches
        rows, best = rows[readable], [column[readable] for column in best]
        features = None if features is None else features[readable]
    return Predictions(rows, *(best or (None, None)), features)


def allocate(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array for --features; UserError where memory does not have the room."""
    try:
        return np.empty(shape, dtype=np.float32)
    except MemoryError:
        size = 4 * np.prod(shape, dtype=float) / 2**30
        raise UserError(
            f"--features: {size:.1f} GB of memory are needed; pass fewer images at a time"
        ) from None
