"""Vision Transformer that gives each pixel a class: the encoder of `models_vit`, and a head on its patches.

The encoder has the parameter names of `models_vit.VisionTransformer`, so that all files that start a
classifier start this.

Shape letters: N images, C channels, H x W pixels, h x w patches, L = h w, D width, K classes.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

import models_vit
from util.compute.blocks import add_registers, drop_registers, run_blocks

HEADS = ("linear", "upsample")


class LinearHead(nn.Module):
    """BatchNorm and one linear layer on the patches (DINOv2's linear segmentation, arXiv 2304.07193)."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D, h, w) -> (N, K, h, w)."""
        return self.classify(self.norm(x))


class UpsampleHead(nn.Module):
    """Two transposed convolutions, each of which doubles the resolution, and a linear layer."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        half, quarter = max(16, width // 2), max(16, width // 4)
        self.up1, self.norm1 = nn.ConvTranspose2d(width, half, 2, 2), LayerNorm2d(half)
        self.up2, self.norm2 = nn.ConvTranspose2d(half, quarter, 2, 2), LayerNorm2d(quarter)
        self.classify = nn.Conv2d(quarter, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D, h, w) -> (N, K, 4 h, 4 w)."""
        x = F.gelu(self.norm1(self.up1(x)))
        return self.classify(F.gelu(self.norm2(self.up2(x))))


class SegmentationTransformer(models_vit.VisionTransformer):
    """A ViT whose head sees the normed patch tokens of its last block or of several.

    Args:
        num_classes: K.
        head: "linear" or "upsample".
        num_layers: how many blocks, evenly spaced up to the last, the head sees side by side.
        sizes: as of `models_vit.VisionTransformer`.

    Raises ValueError for another head, and for more layers than blocks.
    """

    def __init__(self, num_classes: int, head: str = "upsample", num_layers: int = 1, **sizes):
        super().__init__(**{**sizes, "num_classes": 0, "global_pool": False})
        if head not in HEADS:
            raise ValueError(f"head {head!r}: must be one of {', '.join(HEADS)}")
        depth = len(self.blocks)
        if not 0 < num_layers <= depth:
            raise ValueError(f"{num_layers} layers: the model has {depth} blocks")
        self.num_classes = num_classes
        self.layers = [(i + 1) * depth // num_layers for i in range(num_layers)]  # blocks done at each
        make = LinearHead if head == "linear" else UpsampleHead
        self.head = make(num_layers * self.embed_dim, num_classes)
        self.head.apply(self._init_weights)

    def forward_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) -> normed patch tokens, of all layers side by side (N, layers D, h, w)."""
        grid = self.patch_embed.grid_size
        x = self.patch_embed(x)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)  # len(x) would fix the number in an export
        x = self.pos_drop(torch.cat([cls_token, x], dim=1) + self.pos_embed)
        x, done, found = add_registers(self, self.norm_pre(self.patch_drop(x))), 0, []
        for layer in self.layers:
            x, done = run_blocks(self.blocks[done:layer], x, self.grad_checkpointing), layer
            found.append(self.norm(drop_registers(self, x))[:, 1:])  # (N, L, D), without the class token
        return torch.cat(found, dim=-1).transpose(1, 2).unflatten(2, grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W), normalised -> logits of the pixels (N, K, H, W)."""
        logits = self.head(self.forward_patches(x)).float()
        return F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)
