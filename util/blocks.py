"""Runs a stack of transformer blocks, keeping their activations or computing them again in the backward
pass."""

from collections.abc import Iterable

import torch
from torch.utils.checkpoint import checkpoint


def run_blocks(blocks: Iterable[torch.nn.Module], x: torch.Tensor, recompute: bool = False) -> torch.Tensor:
    """Tokens (N, L, D) through all `blocks`.

    recompute: keep only what enters each block and run the block again in the backward pass: the memory of
    activations falls from all blocks' to about one's, for a third more work (arXiv 1604.06174). Loss and
    gradients are the same, and random draws (drop path) come out the same in both passes.
    """
    recompute = recompute and torch.is_grad_enabled()
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x
