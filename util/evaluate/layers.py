"""What every block of a frozen encoder makes of an image, in one forward pass; and the same of raw pixels."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.compute.blocks import drop_registers
from util.errors import UserError
from util.evaluate.features import encoder_features, extract_features
from util.processes.collectives import log

PIXEL_SIDE = 32  # of the small picture whose pixels are the features of the baseline


@dataclass
class Layers:
    """Features of n images, on the CPU.

    pooled: float32 (n, F, D), one vector for each of `sets`, which are (block, "class" or "mean").
    tokens: {block: float32 (n, L, E)}, the patch tokens of some blocks; blocks are counted from 1.
    labels: int64 (n,).
    """

    pooled: Tensor
    tokens: dict[int, Tensor]
    labels: Tensor
    sets: list[tuple[int, str]]


class EveryBlock(nn.Module):
    """Normalised images (N, C, H, W) -> a row (N, F * D + T * L * D) of what `Layers` holds of each.

    Tokens of every block go through the encoder's final norm, as in DINOv2's evaluation of inner blocks. A
    classifier with global pooling has a norm of the mean only: its tokens go through one without weights.

    Args:
        model: as `encoder_features` takes it, with `blocks`; a client's too.
        token_blocks: blocks whose patch tokens are kept.
    """

    def __init__(self, model: nn.Module, token_blocks: Sequence[int] = ()):
        super().__init__()
        self.model, self.token_blocks = model, tuple(token_blocks)
        self.sets = [(i + 1, pool) for i in range(len(model.blocks)) for pool in ("class", "mean")]
        width = model.cls_token.shape[-1]
        self.shape, self.token_shape = (len(self.sets), width), (model.patch_embed.num_patches, width)

    def forward(self, images: Tensor) -> Tensor:
        pooled, tokens = [], []

        def keep(block: int, output: Tensor) -> None:
            output = drop_registers(self.model, output)
            if hasattr(self.model, "fc_norm"):
                mean = self.model.fc_norm(output[:, 1:].mean(dim=1))
                normed = F.layer_norm(output, output.shape[-1:], eps=1e-6)
            else:
                normed = self.model.norm(output)
                mean = normed[:, 1:].mean(dim=1)
            pooled.extend([normed[:, 0], mean])
            if block in self.token_blocks:
                tokens.append(normed[:, 1:])

        hooks = [
            block.register_forward_hook(lambda _, __, output, i=i: keep(i + 1, output))
            for i, block in enumerate(self.model.blocks)
        ]
        try:
            encoder_features(self.model, images)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([part.flatten(1) for part in (*pooled, *tokens)], dim=1)


class RawPixels(nn.Module):
    """As `EveryBlock`, without an encoder: the pixels, of at most 32 x 32 a channel, are the one feature, the
    pixels of each patch its token.
    """

    sets, token_blocks = [(0, "pixels")], (0,)

    def __init__(self, sizes: dict, tokens: bool = True):
        super().__init__()
        self.patch, (height, width) = sizes["patch_size"], sizes["img_size"]
        self.side = min(height, PIXEL_SIDE), min(width, PIXEL_SIDE)
        self.token_blocks = self.token_blocks if tokens else ()
        channels = sizes["in_chans"]
        self.shape = 1, channels * math.prod(self.side)
        self.token_shape = height * width // self.patch**2, channels * self.patch**2

    def forward(self, images: Tensor) -> Tensor:
        parts = [F.adaptive_avg_pool2d(images, self.side).flatten(1)]
        if self.token_blocks:
            parts.append(F.unfold(images, self.patch, stride=self.patch).transpose(1, 2).flatten(1))
        return torch.cat(parts, dim=1)


def row_bytes(source: EveryBlock | RawPixels) -> int:
    """Bytes of what is kept of an image."""
    return 4 * (math.prod(source.shape) + len(source.token_blocks) * math.prod(source.token_shape))


def check_memory(sources: Iterable[EveryBlock | RawPixels], images: int, limit: float) -> None:
    """Says how much memory the features of `images` take; UserError above `limit` GB (2^30 bytes)."""
    source = max(sources, key=row_bytes)
    need = images * row_bytes(source) / 2**30
    (count, width), (length, token_width) = source.shape, source.token_shape
    kept = len(source.token_blocks)
    tokens = f" and {kept} times {length} patch tokens of {token_width}" if kept else ""
    text = f"features of {images} images ({count} of {width} numbers{tokens}): {need:.2f} GB of memory"
    if need > limit:
        raise UserError(
            f"--memory {limit:g}: {text}; pass fewer --token_blocks (0: none), a smaller set, or a larger "
            "--memory"
        )
    log(text)


def extract_layers(source: EveryBlock | RawPixels, loader, device, args=None) -> Layers | None:
    """The features of all images of a loader, in the order of the data set; None but on the first process.

    Args:
        loader, args: as of `extract_features`, so that no batch size changes a digit.
    """
    found = extract_features(source.forward, loader, device, args, everywhere=False)
    if found is None:
        return None
    rows, labels = found
    sizes = [math.prod(source.shape), *[math.prod(source.token_shape)] * len(source.token_blocks)]
    pooled, *tokens = rows.split(sizes, dim=1)
    tokens = [part.unflatten(1, source.token_shape) for part in tokens]
    tokens = dict(zip(source.token_blocks, tokens, strict=True))
    return Layers(pooled.unflatten(1, source.shape), tokens, labels, source.sets)


def effective_rank(pooled: Tensor) -> list[float]:
    """Of each feature of (n, F, D): exp of the entropy of the singular values' shares, of centred features
    (Roy and Vetterli 2007): from 1, all on a line, to D.
    """
    ranks = []
    for features in pooled.unbind(1):
        centred = (features - features.mean(dim=0)).double()
        rows = centred if len(centred) < centred.shape[1] else centred.T  # the smaller square
        values = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0).sqrt()
        shares = values / values.sum().clamp(min=1e-300)
        ranks.append(torch.special.entr(shares).sum().exp().item())
    return ranks
