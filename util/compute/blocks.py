"""Transformer blocks and a stack of them, which keeps its activations or computes them again in the backward
pass."""

import functools
from collections.abc import Callable, Iterable

import torch
from timm import layers
from timm.models import vision_transformer
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

# Intel's AMX, which multiplies bf16 matrices in hardware
CPU_HAS_MATRIX_UNIT = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
FEW_TOKENS = 260  # 224 pixels in patches of 14, and some


class Block(vision_transformer.Block):
    """timm's block, whose attention is `Attention` and whose drop paths are `DropPath`; another `attn_layer`
    or assigned module runs as it is.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The module that timm made is kept, as another one would draw its weights anew; not every version
        # of timm can be told to make it of another class
        if type(self.attn) is vision_transformer.Attention and not kwargs.get("scale_attn_norm"):
            self.attn.__class__ = Attention
        for path in (self.drop_path1, self.drop_path2):
            if type(path) is layers.DropPath:
                path.__class__ = DropPath

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False):
        """Tokens (N, L, D) -> (N, L, D) as timm's, which tells attention of masks even where there are none:
        a client's, written for an older timm, takes tokens alone.
        """
        if attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Attention(vision_transformer.Attention):
    """timm's attention, same parameters and numbers, with a cheaper backward pass."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False):
        """Tokens (N, L, D) -> (N, L, D). timm's order of axes makes query, key and value one after the other
        in memory, and their gradients must be put side by side again for the layer that made them.
        """
        how = {"attn_mask": attn_mask} if attn_mask is not None else {}
        how |= {"is_causal": True} if is_causal else {}
        if how or not self.fused_attn:
            return super().forward(x, **how)
        n, length, _ = x.shape
        qkv = self.qkv(x).view(n, length, 3, self.num_heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (N, heads, L, D / heads)
        x = attention(self.q_norm(q), self.k_norm(k), v, self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class DropPath(layers.DropPath):
    """timm's drop path, same numbers. Where `factors` were drawn before, a graph of it holds no rate."""

    factors: torch.Tensor | None = None  # (N, 1, 1): 0, or 1 over the share of paths that is kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A branch (N, L, D) -> (N, L, D), 0 for some of the images."""
        return super().forward(x) if self.factors is None else x * self.factors.to(x.dtype)


def draw_paths(block: torch.nn.Module, x: torch.Tensor, *_, **named) -> list[DropPath]:
    """Draws which paths of a timm block drop for tokens (N, L, D), in the order of its forward pass; returns
    the modules that hold it. Draws nothing where the order could be another one: in a block of another kind,
    with another drop path, or with dropout between.
    """
    if type(block).forward not in (Block.forward, vision_transformer.Block.forward):
        return []
    paths = [path for path in (block.drop_path1, block.drop_path2) if type(path) is not torch.nn.Identity]
    if not all(type(path) is DropPath for path in paths):
        return []
    if paths and any(isinstance(module, torch.nn.Dropout) and module.p for module in block.modules()):
        return []
    for path in paths:
        path.factors = layers.DropPath.forward(path, x.new_ones(len(x), 1, 1))
    return paths


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
    """A forward method of blocks that keeps its inputs alone and runs again in the backward pass."""

    @functools.wraps(method)
    def forward(block: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return method(block, *inputs)
        return checkpoint(lambda *inputs: method(block, *inputs), *inputs, use_reentrant=False)

    return forward


def run_blocks(
    blocks: Iterable[torch.nn.Module], x: torch.Tensor, recompute: bool = False, *more: torch.Tensor
) -> torch.Tensor:
    """Tokens (N, L, D) through all `blocks` -> (N, L, D); `more`: what each of them takes beside.

    recompute: keep only what enters each block and run the block again in the backward pass: the memory of
    activations falls from all blocks' to about one's, for a third more work (arXiv 1604.06174). Loss and
    gradients are the same, and random draws (drop path) come out the same in both passes.
    """
    recompute = recompute and torch.is_grad_enabled()
    for block in blocks:
        x = checkpoint(block, x, *more, use_reentrant=False) if recompute else block(x, *more)
    return x


def add_registers(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Tokens (N, T, D), and behind them a model's R register tokens, if it has any (N, T + R, D)."""
    registers = getattr(model, "reg_token", None)
    return x if registers is None else torch.cat([x, registers.expand(x.shape[0], -1, -1)], dim=1)


def drop_registers(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Tokens (N, T + R, D) without those (N, T, D)."""
    registers = getattr(model, "reg_token", None)
    return x if registers is None else x[:, : -registers.shape[1]]
