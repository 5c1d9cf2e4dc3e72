"""Vision Transformer classifier for fine-tuning, linear probing and feature extraction.

The encoder has the parameter names of `models_mae.MaskedAutoencoderViT`, so that a pre-trained file loads
with `strict=False`; on top come pooling, a norm and a linear head ("An Image is Worth 16x16 Words", arXiv
2010.11929, and MAE, arXiv 2111.06377, appendix A).

The two ways of pooling are spelled out here instead of left to timm's `VisionTransformer`, whose meaning of
`global_pool` and of the norm that goes with it changed between versions; only its block and patch embedding
are used.

Shape letters: N images, C channels, H x W pixels, L patches, D width.
"""

from functools import partial

import torch
from timm.models.vision_transformer import PatchEmbed
from torch import nn

from util.cli.flags import Constructors
from util.compute.blocks import Block, add_registers, drop_registers, run_blocks


class VisionTransformer(nn.Module):
    """ViT classifier.

    Arguments are timm's, `global_pool` and `registers`:
        global_pool: False ("token"): final `norm`, then the class token. True ("avg"): mean over the patch
            tokens (class token left out), then `fc_norm`; there is no `norm` then.
        img_size: int or (height, width) in pixels, divisible by patch_size (int or pair).
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 leaves the head out (logits are then the features).
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias, norm_layer: the blocks.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 over the blocks.
        drop_rate: dropout before the head; pos_drop_rate: before the blocks; proj_drop_rate and
            attn_drop_rate: inside them.
        embed_layer, block_fn: constructors of patch embedding and blocks.
        registers: learned tokens without a position that go through the blocks beside the others (timm's
            `reg_tokens`; arXiv 2309.16588).
        block: what else timm's block takes (act_layer, mlp_layer, attn_layer, init_values, qk_norm, ...).

    `pos_drop`, `patch_drop` and `norm_pre` are timm's places between positional embedding and blocks; the
    latter two do nothing unless replaced. Setting `grad_checkpointing` trades time for memory
    (`util.compute.blocks.run_blocks`).

    Raises ValueError when sizes do not fit each other, and for other ways of pooling.
    """

    num_prefix_tokens = 1  # the class token

    def __init__(
        self,
        global_pool=False,
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=True,
        drop_rate=0.0,
        pos_drop_rate=0.0,
        proj_drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        norm_layer=None,
        embed_layer=PatchEmbed,
        block_fn=Block,
        registers=0,
        **block,
    ):
        super().__init__()
        _check_sizes(img_size, patch_size, embed_dim, num_heads)
        self.global_pool, norm_layer = _is_mean(global_pool), norm_layer or nn.LayerNorm
        self.num_classes, self.grad_checkpointing = num_classes, False
        self.embed_dim = self.num_features = embed_dim

        # The order of registration is that of the optimizer's parameter groups, which is part of what a
        # checkpoint's optimizer state means: `head` comes before `fc_norm`, but after `norm`.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        self.patch_embed = embed_layer(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.pos_drop, self.patch_drop, self.norm_pre = (
            nn.Dropout(pos_drop_rate),
            nn.Identity(),
            nn.Identity(),
        )
        block = {name: value for name, value in block.items() if value is not None}  # None: timm's own
        self.blocks = nn.Sequential(
            *(
                block_fn(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                    norm_layer=norm_layer,
                    **block,
                )
                for i in range(depth)
            )
        )
        if not self.global_pool:
            self.norm = norm_layer(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        if self.global_pool:
            self.fc_norm = norm_layer(embed_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialises for a run from scratch: truncated normal (std 0.02), biases 0, norms 1 / 0."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(self._init_weights)
        if self.reg_token is not None:
            nn.init.trunc_normal_(self.reg_token, std=0.02)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed although they have more than one dimension."""
        return {"pos_embed", "cls_token", "reg_token"}

    def get_classifier(self) -> nn.Module:
        """The head; `nn.Identity` where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: bool | str | None = None) -> None:
        """Puts a new head on, drawn as at the start; 0: none. ValueError for another way of pooling than the
        model's, which has another norm.
        """
        if global_pool not in (None, "") and _is_mean(global_pool) != self.global_pool:
            raise ValueError(f"global_pool={global_pool!r}: the model was made with {self.global_pool}")
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head.apply(self._init_weights).to(self.pos_embed)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) -> tokens of the last block, no norm (N, 1 + L, D), class token first."""
        x = self.patch_embed(x)  # (N, L, D)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)  # (N, 1, D)
        x = self.pos_drop(torch.cat([cls_token, x], dim=1) + self.pos_embed)  # (N, 1 + L, D)
        x = add_registers(self, self.norm_pre(self.patch_drop(x)))
        return drop_registers(self, run_blocks(self.blocks, x, self.grad_checkpointing))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) -> pooled, normed features (N, D)."""
        x = self.forward_tokens(x)  # (N, 1 + L, D)
        if self.global_pool:
            return self.fc_norm(x[:, 1:].mean(dim=1))  # over the patches
        return self.norm(x)[:, 0]  # the class token

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features (N, D) -> logits (N, num_classes); with `pre_logits` what enters the head (N, D)."""
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W), normalised -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _is_mean(global_pool: bool | str) -> bool:
    """Whether a way of pooling, ours or timm's word for it, is the mean; ValueError for others."""
    ways = {"avg": True, "token": False}
    if global_pool not in (*ways, True, False):
        raise ValueError(f"global_pool={global_pool!r}: must be True (avg) or False (token)")
    return ways.get(global_pool, global_pool)


def _check_sizes(
    img_size: int | tuple[int, int], patch_size: int | tuple[int, int], embed_dim: int, num_heads: int
) -> None:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    patch_h, patch_w = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if height % patch_h or width % patch_w:
        raise ValueError(
            f"image size {height}x{width} is not divisible by the patch size {patch_h}x{patch_w}"
        )
    if embed_dim % num_heads:
        raise ValueError(f"width {embed_dim} is not divisible by the number of heads {num_heads}")


def vit(defaults: dict, make: type = VisionTransformer, **kwargs) -> VisionTransformer:
    """A named model: its sizes, which `kwargs` override; `make`: the class, if not the classifier."""
    return make(**{"norm_layer": partial(nn.LayerNorm, eps=1e-6), **defaults, **kwargs})


def vit_micro_patch8(**kwargs) -> VisionTransformer:
    """144 wide, 8 blocks, 3 heads: 2.0 M parameters without the head; the encoder that is shipped."""
    return vit(dict(patch_size=8, embed_dim=144, depth=8, num_heads=3), **kwargs)


def vit_tiny_patch16(**kwargs) -> VisionTransformer:
    """192 wide, 12 blocks, 3 heads: 5.5 M parameters without the head. For CPUs and small data sets."""
    return vit(dict(patch_size=16, embed_dim=192, depth=12, num_heads=3), **kwargs)


def vit_small_patch16(**kwargs) -> VisionTransformer:
    """384 wide, 12 blocks, 6 heads: 21.7 M parameters without the head."""
    return vit(dict(patch_size=16, embed_dim=384, depth=12, num_heads=6), **kwargs)


def vit_base_patch16(**kwargs) -> VisionTransformer:
    """768 wide, 12 blocks, 12 heads: 85.8 M parameters without the head (the paper's ViT-B)."""
    return vit(dict(patch_size=16, embed_dim=768, depth=12, num_heads=12), **kwargs)


def vit_large_patch16(**kwargs) -> VisionTransformer:
    """1024 wide, 24 blocks, 16 heads: 303 M parameters without the head (the paper's ViT-L)."""
    return vit(dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16), **kwargs)


def vit_huge_patch14(**kwargs) -> VisionTransformer:
    """1280 wide, 32 blocks, 16 heads, patch 14: 631 M parameters without the head (the paper's ViT-H)."""
    return vit(dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16), **kwargs)


MODELS = Constructors(globals())  # what `--model` may be: the functions above, and any other that is added
