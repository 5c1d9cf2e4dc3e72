"""What there is to export: any checkpoint that this code understands, as models with all their settings."""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import models_mae
import models_vit
from util.data.transforms import channel_stats
from util.errors import UserError
from util.sizes import size_pair
from util.weights.encoder import encoder_state, has_encoder
from util.weights.export_load import config_info, load_any
from util.weights.hugging_face import decoder_from_hugging_face
from util.weights.model_info import read_model_info
from util.weights.state import compare_state

# Tensors beside a model's own that change nothing of what it computes
_UNUSED = ("pooler.", "vit.pooler.", "embeddings.mask_token", "vit.embeddings.mask_token")


@dataclass
class Source:
    """A checkpoint read for export; its models are in eval mode, float32, on the CPU.

    kind: the file in words. part: "full" (an MAE with decoder), "encoder" or "classifier". vit: the encoder,
    with the head of a classifier. mae: the full model (its encoder's tensors are those of `vit`), or None.
    info: sizes (embed_dim, depth, num_heads, mlp_dim, input_size, patch_size, in_chans, of a full model also
    decoder_*), `model` (the name or None), mean, std, mask_ratio, norm_pix_loss, of a classifier nb_classes,
    class_names, global_pool, recipe. state: the tensors under this code's names, heads of probes as stored.
    content: what the file holds besides tensors. notes: what was assumed, to be told.
    """

    path: str
    kind: str
    part: str
    vit: models_vit.VisionTransformer
    mae: models_mae.MaskedAutoencoderViT | None
    info: dict
    state: dict[str, torch.Tensor]
    content: dict
    notes: list[str] = field(default_factory=list)

    @property
    def pooled(self) -> bool:
        """Whether the encoder's output is the normed mean of its patch tokens (it has no norm of tokens)."""
        return self.vit.global_pool

    def images(self, number: int, seed: int = 0) -> torch.Tensor:
        """A random batch (number, C, H, W), as normalised images are distributed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(number, self.info["in_chans"], *self.info["input_size"], generator=generator)

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """The checkpoint's own model on images: all tokens (N, 1 + L, D), normed unless `pooled`."""
        if self.mae is not None:
            in_order = torch.arange(self.mae.patch_embed.num_patches).expand(len(images), -1)
            return self.mae.forward_encoder(images, 0.0, in_order)[0]
        tokens = self.vit.forward_tokens(images)
        return tokens if self.pooled else self.vit.norm(tokens)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes) of a classifier; by BatchNorm and linear layer where it is a probe."""
        if "head.1.weight" not in self.state:
            return self.vit(images)
        mean, variance = self.state["head.0.running_mean"], self.state["head.0.running_var"]
        features = F.batch_norm(self.vit.forward_features(images), mean, variance, eps=1e-6)
        return F.linear(features, self.state["head.1.weight"], self.state["head.1.bias"])


def read_source(path: str, args, decoder: bool = True) -> Source:
    """Reads a checkpoint file, URL, or folder of a Hugging Face or timm model.

    Args:
        decoder: a full MAE may be one; else its encoder is taken.
        args: encoder_only (leave decoder or head), and what a file may not say: input_size, num_heads,
            decoder_num_heads, mean, std, mask_ratio, norm_pix_loss (None: as the file says).

    Raises:
        UserError: unreadable, no ViT encoder in it, one that computes something else than this code's, or
            one whose settings neither the file nor the flags tell.
    """
    content = load_any(path)
    state, kind = encoder_state(content)
    if "decoder.mask_token" in state:
        state = decoder_from_hugging_face(state)
    state = {key: value for key, value in state.items() if not key.startswith(_UNUSED)}
    if not has_encoder(state) or "blocks.0.mlp.fc1.weight" not in state:
        some = ", ".join(list(state)[:3]) or "no tensors"
        raise UserError(f"--resume {path}: holds no encoder to export; it is {kind} (keys: {some})")
    if infinite := [key for key, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"--resume {path}: its weights are not finite ({infinite[0]}); nothing was exported")
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    part = "encoder"
    whole = {"mask_token", "decoder_embed.weight", "decoder_pred.weight"} <= state.keys()
    if decoder and whole and not args.encoder_only:
        part = "full"
    elif not args.encoder_only and ("head.weight" in state or "head.1.weight" in state):
        part = "classifier"
    keep = {"full": (), "classifier": ("decoder", "mask_token")}.get(part, ("decoder", "mask_token", "head."))
    state = {key: value for key, value in state.items() if not keep or not key.startswith(keep)}
    source = Source(path, kind, part, None, None, {}, state, content)
    source.info = _read_info(source, args)
    _build(source)
    content.pop("model", None)
    content.pop("optimizer", None)
    return source


def _read_info(source: Source, args) -> dict:
    """`Source.info`: from flags, else the file's settings, else its tensors, else a default that is told."""
    state, content = source.state, source.content
    stored = content.get("model_info") or content.get("args") or {}
    stored = {**config_info(source.path, content), **(stored if isinstance(stored, dict) else {})}
    info = read_model_info({"model": state, "args": stored})
    for name in ("class_names", "mask_ratio", "norm_pix_loss", "mean", "std"):
        given = getattr(args, name, None)
        info[name] = stored.get(name) if given is None else given
    info["patch_size"] = _square_patch(source)
    info["embed_dim"], info["mlp_dim"] = state["cls_token"].shape[-1], len(state["blocks.0.mlp.fc1.weight"])
    info["depth"] = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    info["num_heads"] = args.num_heads or stored.get("num_heads") or _named_heads(source, info.get("model"))
    info["input_size"] = _input_size(source, info, args)
    if info["mask_ratio"] is None:
        info["mask_ratio"] = 0.75
    if info["norm_pix_loss"] is None:
        info["norm_pix_loss"] = False
        if source.part == "full":
            source.notes.append("the file does not say whether it was trained with --norm_pix_loss: taken as "
                                "no; if it was, pass the flag")  # fmt: skip
    eps = (content.get("config") or {}).get("layer_norm_eps", 1e-6)
    if eps != 1e-6:
        source.notes.append(f"its norms have eps {eps:g}, this code's 1e-06; the comparison decides")
    if info["mean"] is None or info["std"] is None:
        source.notes.append("the file does not say which mean and std its images had: taken as this code's "
                            "default; else pass --mean and --std")  # fmt: skip
    info["mean"], info["std"] = channel_stats(info["in_chans"], info["mean"], info["std"])
    if source.part == "full":
        width = state["decoder_embed.weight"].shape[0]
        depth = len({key.split(".")[1] for key in state if key.startswith("decoder_blocks.")})
        info |= {"decoder_embed_dim": width, "decoder_depth": depth}
        info["decoder_mlp_dim"] = state["decoder_blocks.0.mlp.fc1.weight"].shape[0] if depth else 4 * width
        given = args.decoder_num_heads or stored.get("decoder_num_heads")
        info["decoder_num_heads"] = given or _named_decoder_heads(source, info, stored)
    return info


def _square_patch(source: Source) -> int:
    height, width = source.state["patch_embed.proj.weight"].shape[-2:]
    if height != width:
        raise UserError(f"--resume {source.path}: has patches of {height}x{width}; only square ones can be")
    return width


def _input_size(source: Source, info: dict, args) -> tuple[int, int]:
    patches, side = source.state["pos_embed"].shape[1] - 1, info["patch_size"]
    size = args.input_size if args.input_size is not None else info.get("input_size")
    if size is None:
        raise UserError(f"--resume {source.path}: does not say the image size that its {patches} positions "
                        "are for; pass --input_size")  # fmt: skip
    height, width = size_pair(size)
    if height % side or width % side or (height // side) * (width // side) != patches:
        raise UserError(
            f"--input_size {height}x{width}: does not give the {patches} patches of {side}x{side} pixels "
            f"that {source.path} is for"
        )
    return height, width


def _named_heads(source: Source, name: str | None) -> int:
    if name not in models_vit.MODELS:
        width = source.state["cls_token"].shape[-1]
        raise UserError(f"--resume {source.path}: its encoder of width {width} is of no named model, and the "
                        "file does not say its number of heads; pass --num_heads")  # fmt: skip
    with torch.device("meta"):
        return models_vit.MODELS[name]().blocks[0].attn.num_heads


def _named_decoder_heads(source: Source, info: dict, stored: dict) -> int:
    """Heads of the decoder of the model that the file names, or of the one of this size if it is as wide."""
    name = stored.get("model") if stored.get("model") in models_mae.MODELS else f"mae_{info.get('model')}"
    if name in models_mae.MODELS:
        with torch.device("meta"):
            model = models_mae.MODELS[name]()
        if name == stored.get("model") or model.mask_token.shape[-1] == info["decoder_embed_dim"]:
            return model.decoder_blocks[0].attn.num_heads
    raise UserError(f"--resume {source.path}: does not say its decoder's number of heads; pass "
                    "--decoder_num_heads")  # fmt: skip


def _build(source: Source) -> None:
    """Makes the models from the tensors, without copying them; raises UserError where they do not fit."""
    state, info = source.state, source.info
    sizes = {name: info[name] for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads")}
    sizes |= {"img_size": info["input_size"], "mlp_ratio": info["mlp_dim"] / info["embed_dim"]}
    sizes["norm_layer"] = partial(nn.LayerNorm, eps=1e-6)
    info["global_pool"] = "fc_norm.weight" in state
    classes = info.get("nb_classes", 0) if source.part == "classifier" else 0
    try:
        with torch.device("meta"):
            source.vit = models_vit.VisionTransformer(info["global_pool"], num_classes=classes, **sizes)
            if source.part == "full":
                decoder = {k: info[k] for k in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")}
                source.mae = models_mae.MaskedAutoencoderViT(
                    **sizes, **decoder, norm_pix_loss=info["norm_pix_loss"]
                )
    except ValueError as error:
        raise UserError(f"--resume {source.path}: {error}") from None
    model, fitted = source.mae or source.vit, dict(state)
    if "head.1.weight" in state:
        fitted = {**{k: v for k, v in state.items() if not k.startswith("head.")}, **_fold_probe(state)}
    missing, unexpected, mismatched = compare_state(model, fitted)
    if missing or unexpected or mismatched:
        some = "; ".join((mismatched + unexpected + missing)[:3])
        raise UserError(f"--resume {source.path} ({source.kind}): is not a plain ViT of this code: "
                        f"{len(missing)} tensors are missing, {len(unexpected)} are not known, "
                        f"{len(mismatched)} have other shapes ({some})")  # fmt: skip
    model.load_state_dict(fitted, assign=True)
    if source.mae is not None:
        own = source.vit.state_dict()
        source.vit.load_state_dict({k: v for k, v in fitted.items() if k in own}, assign=True)
        source.mae.eval()
    source.vit.eval()


def _fold_probe(state: dict) -> dict[str, torch.Tensor]:
    """A linear probe's BatchNorm and linear layer as one linear layer that computes the same."""
    weight, bias = state["head.1.weight"].double(), state["head.1.bias"].double()
    scale = (state["head.0.running_var"].double() + 1e-6).rsqrt()
    shift = weight @ (state["head.0.running_mean"].double() * scale)
    return {"head.weight": (weight * scale).float(), "head.bias": (bias - shift).float()}
