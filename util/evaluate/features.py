"""Frozen features of whole data sets: for k-NN, and to train a probe's head with the encoder run once."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist

from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.compute.blocks import drop_registers
from util.compute.precision import autocast, casting_once, resolve_amp_dtype
from util.compute.prefetch import on_host
from util.data.loader import Batch
from util.evaluate.exact import drop_unreadable, in_groups, on_device
from util.figures.attention import encode
from util.processes.collectives import gather, get_world_size, is_main_process

ROWS = 4096  # features that each process sends in one go, at most


def encoder_features(model: torch.nn.Module, images: torch.Tensor, global_pool: bool = True) -> torch.Tensor:
    """Features (N, D) of normalised images (N, C, H, W): encoder, final norm, pooling; no patch is masked.

    Args:
        model: a `models_mae.MaskedAutoencoderViT`, or a `models_vit.VisionTransformer`. One with `fc_norm`
            (global pooling) has no final norm over tokens: it gives its own pooled features whatever
            `global_pool` says.
        global_pool: mean over the patch tokens, else the class token.
    """
    if hasattr(model, "fc_norm") or (isinstance(model, VisionTransformer) and not global_pool):
        return model.forward_features(images)
    if isinstance(model, VisionTransformer):
        return model.norm(model.forward_tokens(images))[:, 1:].mean(dim=1)
    own = type(model).forward_encoder if isinstance(model, MaskedAutoencoderViT) else None
    if own not in (None, MaskedAutoencoderViT.forward_encoder):  # a client's
        x = model.forward_encoder(images, 0.0)[0]  # shuffled, which pooling does not see
        return x[:, 1:].mean(dim=1) if global_pool else x[:, 0]
    x = model.norm(drop_registers(model, encode(model, images, len(model.blocks))))
    return x[:, 1:].mean(dim=1) if global_pool else x[:, 0]


@torch.no_grad()
def extract_features(
    feature_fn: Callable[[torch.Tensor], torch.Tensor],
    data_loader: Iterable,
    device,
    args=None,
    keep_all: bool = False,
    everywhere: bool = True,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Features of every sample of a loader, of all processes, in the order of the data set.

    Args:
        feature_fn: normalised images on `device` -> (N, D).
        data_loader: batches as `in_groups` takes them, dealt over processes by
            `util.data.sampler.EvalSampler`.
        args: if given: amp_dtype, mean, std.
        keep_all: an unreadable file has the features of the picture in its place, so that row i belongs to
            index i; else it has none.
        everywhere: every process gets all; else the first alone, the others None.

    Returns:
        features float32 (n, D) and labels int64 (n,), on the CPU.
    """
    device = torch.device(device)
    amp_dtype = resolve_amp_dtype(getattr(args, "amp_dtype", "auto"), device)

    def results() -> Iterator[tuple[torch.Tensor, ...]]:
        for images, labels, indices in in_groups(on_device(data_loader, device, args)):
            with autocast(device, amp_dtype):
                features = feature_fn(images)
            yield features.float(), labels, indices

    model = getattr(feature_fn, "__self__", None)  # of a method
    with casting_once(device, amp_dtype, model if isinstance(model, torch.nn.Module) else None):
        # Cloned, as it comes in page-locked memory
        groups = [[part.clone() for part in group] for group in on_host(results())]
    blocks, *columns = map(list, zip(*groups, strict=True)) if groups else ([], [], [])
    del groups
    columns = [torch.cat(column) if column else torch.empty(0, dtype=torch.int64) for column in columns]
    if not keep_all:
        rows = torch.arange(len(columns[0]))
        kept, *columns = drop_unreadable(data_loader, [rows, *columns], columns[1])
        if len(kept) < len(rows):
            blocks = [torch.cat(blocks)[kept]]
    return _gather(blocks, *columns, everywhere)


def _gather(
    blocks: list[torch.Tensor], labels: torch.Tensor, indices: torch.Tensor, everywhere: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Joins the features, of which each process has some `blocks`, and labels in the order of the indices.

    Empties `blocks`: beside the result a process holds what it has not sent yet, and some rows of each.
    """
    shapes = gather(tuple(blocks[0].shape[1:]) if blocks else None)
    all_labels, all_indices = (gather(column.numpy()) for column in (labels, indices))
    counts = [len(column) for column in all_labels]
    if not any(counts):
        raise ValueError("the loader gave no samples")
    wanted = everywhere or is_main_process()
    order = np.argsort(np.concatenate(all_indices), kind="stable")
    places = torch.empty(len(order), dtype=torch.int64)
    places[torch.from_numpy(order)] = torch.arange(len(order))
    shape = next(shape for shape in shapes if shape is not None)
    whole = torch.empty(len(order) if wanted else 0, *shape)
    rows = min(ROWS, max(1, 2**26 // math.prod(shape)))  # 256 MB
    own = _in_rows(blocks, shape, rows)
    for start in range(0, max(counts), rows):
        parts = _exchange(next(own), everywhere)
        for part, place, count in zip(parts, places.split(counts), counts, strict=wanted):
            place = place[start : min(start + rows, count)]
            whole[place] = part[: len(place)].cpu()
    return (whole, torch.from_numpy(np.concatenate(all_labels)[order])) if wanted else None


def _in_rows(blocks: list[torch.Tensor], shape: tuple[int, ...], count: int) -> Iterator[torch.Tensor]:
    """Cuts `blocks`, which are emptied, into `count` rows each, the last filled up, and goes on with empty
    ones.
    """
    blocks.reverse()  # the first is the last to be taken from a list
    while True:
        block, filled = torch.zeros(count, *shape), 0
        while blocks and filled < count:
            rows = blocks.pop()
            taken = rows[: count - filled]
            block[filled : filled + len(taken)] = taken
            filled += len(taken)
            if len(taken) < len(rows):
                blocks.append(rows[len(taken) :])
        yield block


def _exchange(block: torch.Tensor, everywhere: bool) -> list[torch.Tensor]:
    """The `block` of each process, on every process or, [] elsewhere, on the first alone."""
    if get_world_size() == 1:
        return [block]
    block = block.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    receives = everywhere or is_main_process()
    parts = [torch.empty_like(block) for _ in range(get_world_size() if receives else 0)]
    if everywhere:
        dist.all_gather(parts, block)
    else:
        dist.gather(block, parts or None)
    return parts


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
