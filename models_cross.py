"""Masked autoencoder whose decoder lets masked patches look at the visible ones, not at each other (CrossMAE,
"Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391).

Each query, a mask token at a place, is predicted by itself, so that any number of them can be: training
predicts and scores a random share of the masked patches, and its cost falls with that share. All decoder
blocks look at the encoder's last output; the paper's weighted sums of all its blocks are not here.

Shape letters: those of `models_mae`, and M queries.
"""

import torch
from timm.layers import Mlp
from torch import nn

from models_mae import MaskedAutoencoderViT, gather_tokens
from util.compute.blocks import attention, run_blocks


class CrossAttention(nn.Module):
    """Attention of one sequence over another one."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Queries (N, M, E) and what they look at (N, T, E) -> (N, M, E)."""
        q = self.q(x).unflatten(2, (self.num_heads, -1))  # (N, M, heads, E / heads)
        k, v = self.kv(context).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (N, heads, M or T, E / heads)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Cross-attention and MLP, each after a norm and around a skip connection."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, norm_layer: type):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = CrossAttention(dim, num_heads, qkv_bias)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Queries (N, M, E) and what they look at (N, T, E) -> (N, M, E)."""
        x = x + self.attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


class CrossDecoderViT(MaskedAutoencoderViT):
    """A masked autoencoder with such a decoder.

    Args:
        args, kwargs: of `MaskedAutoencoderViT`.
        predict_ratio: share of the masked patches, above 0 and up to 1, that a training step predicts and
            scores, drawn anew for each image; at least one. In eval mode all patches are predicted.
    """

    decoder_block = CrossBlock

    def __init__(self, *args, predict_ratio: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        if not 0 < predict_ratio <= 1:
            raise ValueError(f"predict_ratio {predict_ratio} is not above 0 and at most 1")
        self.predict_ratio = predict_ratio

    def forward_decoder(self, x: torch.Tensor, ids_restore: torch.Tensor, ids: torch.Tensor | None = None):
        """Latent (N, 1 + K, D) -> predicted patches (N, M, p * p * C), of the numbers `ids` (N, M) or all."""
        x = self.decoder_embed(x)  # (N, 1 + K, E)
        visible = ids_restore.argsort(dim=1)[:, : x.shape[1] - 1]  # (N, K)
        table = self.decoder_pos_embed.expand(len(x), -1, -1)
        first, table = table[:, :1], table[:, 1:]  # (N, 1, E) and (N, L, E)
        context = x + torch.cat([first, gather_tokens(table, visible)], dim=1)  # (N, 1 + K, E)
        queries = self.mask_token + (table if ids is None else gather_tokens(table, ids))  # (N, M, E)
        queries = run_blocks(self.decoder_blocks, queries, self.grad_checkpointing, context)
        return self.decoder_pred(self.decoder_norm(queries))  # (N, M, p * p * C)

    def predict(self, latent: torch.Tensor, mask: torch.Tensor, ids_restore: torch.Tensor):
        """As `MaskedAutoencoderViT`'s. In training mode patches that were not drawn are 0, not counted."""
        if not self.training:
            return super().predict(latent, mask, ids_restore)
        masked = mask.shape[1] + 1 - latent.shape[1]
        count = max(1, round(self.predict_ratio * masked))  # M
        # Numbers of masked patches lie above 1, those of visible ones below
        ids = (mask + torch.rand_like(mask)).topk(count, dim=1).indices  # (N, M)
        pred = self.forward_decoder(latent, ids_restore, ids)  # (N, M, p * p * C)
        everywhere = pred.new_zeros(*mask.shape, pred.shape[2])  # (N, L, p * p * C)
        everywhere.scatter_(1, ids.unsqueeze(2).expand_as(pred), pred)
        return everywhere, torch.zeros_like(mask).scatter_(1, ids, 1.0)
