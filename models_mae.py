"""Masked autoencoder with a vision-transformer backbone ("Masked Autoencoders Are Scalable Vision Learners",
arXiv 2111.06377).

    python models_mae.py     sends one image through the base model and prints the shape of every step

Shape letters: N images, C channels, H x W pixels, p patch size, L = (H / p) * (W / p) patches, K visible
patches, D encoder width, E decoder width.
"""

from functools import partial

import torch
from timm.models.vision_transformer import PatchEmbed
from torch import nn

from util.cli.flags import Constructors
from util.compute.blocks import Block, add_registers, drop_registers, run_blocks
from util.console import say
from util.pos_embed import get_2d_sincos_pos_embed


class MaskedAutoencoderViT(nn.Module):
    """Encoder over the visible patches, light decoder over all of them.

    Args:
        img_size: pixels, an int or (height, width); multiples of the patch size.
        patch_size: side of a square patch in pixels.
        in_chans: channels of the images.
        embed_dim, depth, num_heads: the encoder's width, number of blocks and heads.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the same of the decoder.
        mlp_ratio: hidden width of the blocks' MLPs over their width.
        norm_layer: constructor of the normalisations.
        norm_pix_loss: the target is each patch with its mean removed and its variance made one.
        registers: learned tokens beside the others in the encoder, dropped after it (arXiv 2309.16588).

    Setting `grad_checkpointing` trades time for memory (`util.compute.blocks.run_blocks`).

    Raises:
        ValueError: sizes that do not divide (image by patch, width by heads or by 4).
    """

    decoder_block = Block  # `models_cross` has another

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        mlp_ratio=4.0,
        norm_layer=nn.LayerNorm,
        norm_pix_loss=False,
        registers=0,
    ):
        super().__init__()
        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_sizes(img_size, patch_size, embed_dim, num_heads, decoder_embed_dim, decoder_num_heads)
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.norm_pix_loss, self.grad_checkpointing = norm_pix_loss, False

        # Encoder
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        tokens = self.patch_embed.num_patches + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)

        # Decoder
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            self.decoder_block(
                decoder_embed_dim, decoder_num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer
            )
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)

        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fixed positional embeddings; everything else drawn as the paper's appendix says."""
        for table in (self.pos_embed, self.decoder_pos_embed):
            values = get_2d_sincos_pos_embed(table.shape[-1], self.patch_embed.grid_size, cls_token=True)
            table.copy_(torch.from_numpy(values).unsqueeze(0))
        self.apply(self._init_weights)
        # The patch convolution is a linear layer on flattened patches and is drawn as one
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=0.02)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W), sides that p divides -> (N, L, p * p * C); inside a patch: row, column, channel."""
        (n, c, height, width), p = imgs.shape, self.patch_size
        if height % p or width % p:
            raise ValueError(f"images of {height}x{width} are not divisible by the patch size {p}")
        x = imgs.reshape(n, c, height // p, p, width // p, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(n, (height // p) * (width // p), p * p * c)

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, p * p * C) -> (N, C, H, W), the inverse of `patchify`; square if L is not the model's."""
        (n, length, numbers), p = x.shape, self.patch_size
        rows, columns = (side // p for side in self.img_size)
        if length != rows * columns:
            rows = columns = round(length**0.5)
        if length != rows * columns:
            raise ValueError(f"{length} patches are neither those of the model's images nor a square")
        x = x.reshape(n, rows, columns, p, p, numbers // p**2)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, numbers // p**2, rows * p, columns * p)

    def random_masking(self, x: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None = None):
        """Masks a random part of every image's tokens.

        Args:
            x: tokens (N, L, D).
            mask_ratio: share of tokens to mask; int(L * (1 - mask_ratio)) stay visible.
            noise: (N, L); where it is smallest, tokens stay visible. Default: uniform.

        Returns:
            Visible tokens (N, K, D) in shuffled order; mask (N, L) float, 0 visible and 1 masked, in image
            order; ids_restore (N, L), the place of each token in the shuffle.
        """
        n, length, _ = x.shape
        visible = int(length * (1 - mask_ratio))  # K
        if noise is None:
            noise = torch.rand(n, length, device=x.device)
        ids_shuffle = torch.argsort(noise, dim=1, stable=True)  # (N, L)
        ids_restore = torch.argsort(ids_shuffle, dim=1)  # (N, L)
        x = gather_tokens(x, ids_shuffle[:, :visible])  # (N, K, D)
        mask = (ids_restore >= visible).float()  # (N, L)
        return x, mask, ids_restore

    def embed_visible(self, x: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None = None):
        """(N, C, H, W) -> class token and visible tokens (N, 1 + K, D), mask (N, L), ids_restore (N, L)."""
        if x.shape[1:] != (self.in_chans, *self.img_size):
            sizes = "x".join(map(str, (self.in_chans, *self.img_size)))
            raise ValueError(f"images have shape {tuple(x.shape)}, the model takes N x {sizes}")
        x = self.patch_embed(x)  # (N, L, D)
        x = x + self.pos_embed[:, 1:]  # before masking: a token keeps its place
        fixed = {} if noise is None else {"noise": noise}  # an override need not know it
        x, mask, ids_restore = self.random_masking(x, mask_ratio, **fixed)  # (N, K, D)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls_token, x], dim=1), mask, ids_restore

    def forward_encoder(self, x: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None = None):
        """(N, C, H, W) -> latent (N, 1 + K, D), mask (N, L), ids_restore (N, L)."""
        x, mask, ids_restore = self.embed_visible(x, mask_ratio, noise)  # (N, 1 + K, D)
        x = run_blocks(self.blocks, add_registers(self, x), self.grad_checkpointing)
        return self.norm(drop_registers(self, x)), mask, ids_restore

    def forward_decoder(self, x: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """Latent (N, 1 + K, D) -> predicted patches (N, L, p * p * C)."""
        x = self.decoder_embed(x)  # (N, 1 + K, E)
        n, length = ids_restore.shape
        mask_tokens = self.mask_token.expand(n, length + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], mask_tokens.to(x.dtype)], dim=1)  # (N, L, E), shuffled
        patches = gather_tokens(patches, ids_restore)  # image order
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed  # (N, 1 + L, E)
        x = run_blocks(self.decoder_blocks, x, self.grad_checkpointing)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # (N, L, p * p * C)

    def predict(self, latent: torch.Tensor, mask: torch.Tensor, ids_restore: torch.Tensor):
        """Latent (N, 1 + K, D) -> predicted patches (N, L, p * p * C), and which of them count (N, L)."""
        return self.forward_decoder(latent, ids_restore), mask

    def forward_loss(self, imgs: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean squared error over the masked patches, a scalar in at least float32 whatever autocast says.

        Args:
            imgs: (N, C, H, W); pred: (N, L, p * p * C); mask: (N, L), 1 where a patch is masked.
        """
        target = self.patchify(imgs)  # (N, L, p * p * C)
        target = target.to(torch.promote_types(target.dtype, torch.float32))
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)  # (N, L, 1), unbiased
            target = (target - mean) / (variance + 1e-6).sqrt()
        loss = (pred.to(target.dtype) - target).square().mean(dim=-1)  # (N, L)
        return (loss * mask).sum() / mask.sum()

    def forward(self, imgs: torch.Tensor, mask_ratio: float = 0.75, noise: torch.Tensor | None = None):
        """Masks, encodes, decodes and scores a batch: all that training computes.

        Args:
            imgs: (N, C, H, W), normalised.
            mask_ratio: share of patches to mask.
            noise: (N, L) fixes the masking: where it is smallest, patches stay visible; default: drawn anew.

        Returns:
            loss (scalar; NaN if no patch is masked), pred (N, L, p * p * C), mask (N, L), 1 = masked.
        """
        fixed = {} if noise is None else {"noise": noise}  # an override need not know it
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, **fixed)
        pred, scored = self.predict(latent, mask, ids_restore)
        loss = self.forward_loss(imgs, pred, scored)
        return loss, pred, mask


def gather_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Tokens (N, L, D) at the places (N, K) -> (N, K, D)."""
    return torch.gather(x, 1, ids.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def check_sizes(img_size, patch_size, embed_dim, num_heads, decoder_embed_dim, decoder_num_heads) -> None:
    """Raises ValueError for sizes that no model can have."""
    if img_size[0] % patch_size or img_size[1] % patch_size:
        raise ValueError(
            f"image size {img_size[0]}x{img_size[1]} is not divisible by the patch size {patch_size}"
        )
    encoder, decoder = ("encoder", embed_dim, num_heads), ("decoder", decoder_embed_dim, decoder_num_heads)
    for name, width, heads in (encoder, decoder):
        if width % heads:
            raise ValueError(f"{name} width {width} is not divisible by its {heads} heads")
        if width % 4:
            raise ValueError(f"{name} width {width} is not divisible by 4, as its positional embedding needs")


def mae_vit(defaults: dict, make: type | None = None, **kwargs) -> MaskedAutoencoderViT:
    """A named model: its sizes, which `kwargs` override; `make`: another class of models."""
    return (make or MaskedAutoencoderViT)(
        **{"norm_layer": partial(nn.LayerNorm, eps=1e-6), **defaults, **kwargs}
    )


SMALL_DECODER = dict(decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8)


def mae_vit_micro_patch8(**kwargs) -> MaskedAutoencoderViT:
    sizes = dict(patch_size=8, embed_dim=144, depth=8, num_heads=3)
    return mae_vit({**sizes, "decoder_embed_dim": 128, "decoder_depth": 4, "decoder_num_heads": 4}, **kwargs)


def mae_vit_tiny_patch16(**kwargs) -> MaskedAutoencoderViT:
    return mae_vit(dict(patch_size=16, embed_dim=192, depth=12, num_heads=3, **SMALL_DECODER), **kwargs)


def mae_vit_small_patch16(**kwargs) -> MaskedAutoencoderViT:
    return mae_vit(dict(patch_size=16, embed_dim=384, depth=12, num_heads=6, **SMALL_DECODER), **kwargs)


def mae_vit_base_patch16_dec512d8b(**kwargs) -> MaskedAutoencoderViT:
    return mae_vit(dict(patch_size=16, embed_dim=768, depth=12, num_heads=12), **kwargs)


def mae_vit_large_patch16_dec512d8b(**kwargs) -> MaskedAutoencoderViT:
    return mae_vit(dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16), **kwargs)


def mae_vit_huge_patch14_dec512d8b(**kwargs) -> MaskedAutoencoderViT:
    return mae_vit(dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16), **kwargs)


mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b

MODELS = Constructors(globals())  # what `--model` may be: the functions above, and any other that is added


@torch.no_grad()
def print_shapes(model: MaskedAutoencoderViT, mask_ratio: float = 0.75) -> None:
    """Sends one random image through `model` and prints the name and shape of every step."""
    imgs = torch.randn(1, model.in_chans, *model.img_size)
    latent, mask, ids_restore = model.forward_encoder(imgs, mask_ratio)
    decoded = model.decoder_embed(latent)
    pred = model.forward_decoder(latent, ids_restore)
    tokens = model.patch_embed(imgs)
    steps = [
        ("image (N, C, H, W)", imgs),
        ("target patches, patchify (N, L, p*p*C)", model.patchify(imgs)),
        ("patch tokens, patch_embed (N, L, D)", tokens),
        ("positional embedding, pos_embed (1, 1+L, D)", model.pos_embed),
        ("visible tokens, random_masking (N, K, D)", model.random_masking(tokens, mask_ratio)[0]),
        ("mask, 1 = masked (N, L)", mask),
        ("place in the shuffle, ids_restore (N, L)", ids_restore),
        (f"latent, class token + {len(model.blocks)} blocks + norm (N, 1+K, D)", latent),
        ("decoder tokens, decoder_embed (N, 1+K, E)", decoded),
        ("with mask tokens, in image order, + decoder_pos_embed (1, 1+L, E)", model.decoder_pos_embed),
        (f"prediction, {len(model.decoder_blocks)} blocks + norm + linear (N, L, p*p*C)", pred),
        ("predicted image, unpatchify (N, C, H, W)", model.unpatchify(pred)),
        ("loss", model.forward_loss(imgs, pred, mask)),
    ]
    for name, tensor in steps:
        say(f"{name:68s} {tuple(tensor.shape)}")
    say(f"{int(mask.sum())} of {mask.shape[1]} patches masked, loss {steps[-1][1].item():.4f}")
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    torch.manual_seed(0)
    print_shapes(mae_vit_base_patch16())
