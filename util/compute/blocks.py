"""Transformer blocks and a stack of them, which keeps its activations or computes them again in the backward
pass."""

import functools
from collections.abc import Callable, Iterable

import torch
from timm.models import vision_transformer
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

# Intel's AMX, which multiplies bf16 matrices in hardware
CPU_HAS_MATRIX_UNIT = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
FEW_TOKENS = 260  # 224 pixels in patches of 14, and some


class Block(vision_transformer.Block):
    """timm's block, same parameters and numbers, which saves copies in the attention's backward pass and can
    leave out tokens that nobody reads.
    """

    def forward(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Tokens (N, L, D) -> (N, L - start, D): those from place `start` on, which attend to all L."""
        x = x[:, start:] + self.drop_path1(self.ls1(self.attend(self.norm1(x), start)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def attend(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """The same shapes. timm's order of axes makes query, key and value one after the other in memory,
        and their gradients must be put side by side again for the layer that made them.
        """
        attn, (n, length, _) = self.attn, x.shape
        if not attn.fused_attn:
            return attn(x)[:, start:]
        qkv = attn.qkv(x).view(n, length, 3, attn.num_heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (N, heads, L, D / heads)
        q, k = attn.q_norm(q[:, :, start:]), attn.k_norm(k)
        x = attention(q, k, v, attn.attn_drop.p if self.training else 0.0)
        return attn.proj_drop(attn.proj(x.transpose(1, 2).flatten(2)))  # (N, L - start, D)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v (arXiv 1706.03762): (N, heads, L, D), keys and values (N, heads, M, D) ->
    (N, heads, L, D).
    """
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and not dropout
    if not (slow and CPU_HAS_MATRIX_UNIT and k.shape[-2] <= FEW_TOKENS):
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    # There the backward pass of torch's fused attention, which leaves that unit unused, takes twice as long.
    # At some 400 tokens it can be the faster one, and what it needs not keep is large. Scores in float32,
    # as it has them: bf16 would make an error of 1 % for scores around 4, of 4 % for 16.
    with torch.autocast("cpu", enabled=False):
        scores = q.float() * q.shape[-1] ** -0.5 @ k.float().transpose(-2, -1)  # (N, heads, L, M)
        return scores.softmax(-1).to(v.dtype) @ v


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
