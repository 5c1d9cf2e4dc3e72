"""Transformer blocks and a stack of them, which keeps its activations or computes them again in the backward
pass."""

import functools
from collections.abc import Callable, Iterable

import torch
from timm.models import vision_transformer
from torch.utils.checkpoint import checkpoint


class Block(vision_transformer.Block):
    """timm's block, same parameters and numbers, which can leave out tokens that nobody reads."""

    def forward(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Tokens (N, L, D) -> (N, L - start, D): those from place `start` on, which attend to all L."""
        if not start:
            return super().forward(x)
        attended = self.attn(self.norm1(x))[:, start:]
        x = x[:, start:] + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def recomputing(method: Callable) -> Callable:
    """A forward method of blocks that keeps its input alone and runs again in the backward pass."""

    @functools.wraps(method)
    def forward(block: torch.nn.Module, x: torch.Tensor, *few: int) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return method(block, x, *few)
        return checkpoint(lambda x: method(block, x, *few), x, use_reentrant=False)

    return forward


def run_blocks(
    blocks: Iterable[torch.nn.Module], x: torch.Tensor, recompute: bool = False, start: int = 0
) -> torch.Tensor:
    """Tokens (N, L, D) through all `blocks` -> (N, L - start, D), those from place `start` on.

    recompute: keep only what enters each block and run the block again in the backward pass: the memory of
    activations falls from all blocks' to about one's, for a third more work (arXiv 1604.06174). Loss and
    gradients are the same, and random draws (drop path) come out the same in both passes.
    """
    recompute, blocks = recompute and torch.is_grad_enabled(), list(blocks)
    for place, block in enumerate(blocks):
        # What leaves the last block is read, and nothing attends to it any more
        few = (start,) if start and place + 1 == len(blocks) and isinstance(block, Block) else ()
        x = checkpoint(block, x, *few, use_reentrant=False) if recompute else block(x, *few)
    return x if few or not start else x[:, start:]
