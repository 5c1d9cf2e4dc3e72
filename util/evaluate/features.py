"""Frozen features of whole data sets: for k-NN, and to train a probe's head with the encoder run once."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist

from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.compute.precision import autocast, resolve_amp_dtype
from util.data.loader import Batch
from util.data.transforms import normalize_batch
from util.evaluate.exact import drop_unreadable, in_groups
from util.processes.collectives import get_world_size


def encoder_features(model: torch.nn.Module, images: torch.Tensor, global_pool: bool = True) -> torch.Tensor:
    """Features (N, D) of normalised images (N, C, H, W): encoder, final norm, pooling; no patch is masked.

    Args:
        model: a `models_mae.MaskedAutoencoderViT`, or a `models_vit.VisionTransformer`. One with `fc_norm`
            (global pooling) has no final norm over tokens: it gives its own pooled features whatever
            `global_pool` says.
        global_pool: mean over the patch tokens, else the class token.
    """
    if hasattr(model, "fc_norm"):
        return model.forward_features(images)
    if isinstance(model, VisionTransformer):
        x = model.norm(model.forward_tokens(images))
        return x[:, 1:].mean(dim=1) if global_pool else x[:, 0]
    own = type(model).forward_encoder if isinstance(model, MaskedAutoencoderViT) else None
    if own not in (None, MaskedAutoencoderViT.forward_encoder):  # a client's
        x = model.forward_encoder(images, 0.0)[0]  # shuffled, which pooling does not see
        return x[:, 1:].mean(dim=1) if global_pool else x[:, 0]
    x = model.patch_embed(images) + model.pos_embed[:, 1:]
    cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls_token, x], dim=1)
    for block in model.blocks:
        x = block(x)
    x = model.norm(x)
    return x[:, 1:].mean(dim=1) if global_pool else x[:, 0]


@torch.no_grad()
def extract_features(
    feature_fn: Callable[[torch.Tensor], torch.Tensor],
    data_loader: Iterable,
    device,
    args=None,
    keep_all: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of every sample of a loader, of all processes, in the order of the data set.

    Args:
        feature_fn: normalised images on `device` -> (N, D).
        data_loader: batches as `in_groups` takes them, dealt over processes by
            `util.data.sampler.EvalSampler`.
        args: if given: amp_dtype, mean, std.
        keep_all: an unreadable file has the features of the picture in its place, so that row i belongs to
            index i; else it has none.

    Returns:
        features float32 (n, D) and labels int64 (n,), on the CPU.
    """
    device = torch.device(device)
    amp_dtype = resolve_amp_dtype(getattr(args, "amp_dtype", "auto"), device)
    mean, std = getattr(args, "mean", None), getattr(args, "std", None)
    rows = []
    for images, labels, indices in in_groups(data_loader):
        with autocast(device, amp_dtype):
            features = feature_fn(normalize_batch(images, device, mean, std))
        rows.append((features.float().cpu(), labels, indices))
    columns = [torch.cat(parts) for parts in zip(*rows, strict=True)] if rows else None
    if columns and not keep_all:
        columns = drop_unreadable(data_loader, columns, columns[2])
    columns = _gather(columns)
    order = torch.argsort(columns[2], stable=True)
    return columns[0][order], columns[1][order]


def _gather(columns: list[torch.Tensor] | None) -> list[torch.Tensor]:
    """Joins the CPU tensors of all processes along the first dimension; None: this process has none."""
    if get_world_size() == 1:
        if columns is None:
            raise ValueError("the loader gave no samples")
        return columns
    shapes = [None] * get_world_size()
    own = [(tuple(c.shape), str(c.dtype)) for c in columns] if columns else None
    dist.all_gather_object(shapes, own)
    template = next(shape for shape in shapes if shape)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    joined = []
    for i, (shape, dtype) in enumerate(template):
        counts = [s[i][0][0] if s else 0 for s in shapes]
        padded = torch.zeros(max(counts), *shape[1:], dtype=getattr(torch, dtype.removeprefix("torch.")))
        if columns:
            padded[: len(columns[i])] = columns[i]
        padded = padded.to(device)
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        joined.append(torch.cat([part[:count].cpu() for part, count in zip(parts, counts, strict=True)]))
    return joined


class FeatureLoader:
    """A loader of features in memory: batches of features (N, D), labels int64 (N,), indices int64 (N,).

    Sample i of epoch e is view e % V of image i, where the ordinary path would augment the image anew.

    Args:
        features: float32 (V, n, D), one per view; labels: int64 (n,).
        sampler: yields indices or (epoch, index), as for images; drop_last: only full batches.
        dataset: the images; an evaluation asks it which could not be decoded.
    """

    def __init__(
        self, features: torch.Tensor, labels: torch.Tensor, sampler, batch_size, drop_last=False, dataset=None
    ):
        self.dataset = dataset
        self.features, self.labels, self.sampler = features, labels, sampler
        self.batch_size, self.drop_last = batch_size, drop_last

    def __len__(self) -> int:
        count = len(self.sampler)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        keys = iter(self.sampler)
        while batch := list(itertools.islice(keys, self.batch_size)):
            if self.drop_last and len(batch) < self.batch_size:
                return
            epoch = batch[0][0] if isinstance(batch[0], tuple) else 0
            indices = torch.tensor([key[1] if isinstance(key, tuple) else key for key in batch])
            yield Batch(self.features[epoch % len(self.features)][indices], self.labels[indices], indices)
