"""What there is to export: any checkpoint that this code understands, with its models and all settings."""

from argparse import Namespace
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models_mae import MaskedAutoencoderViT
from models_seg import SegmentationTransformer
from models_vit import VisionTransformer
from util.errors import UserError
from util.files import some
from util.rng import takes_noise
from util.weights.build import build
from util.weights.describe import WeightsFile, describe
from util.weights.encoder import encoder_state
from util.weights.files import read_file
from util.weights.flags import stored_targets
from util.weights.schema import check_settings, stored_settings
from util.weights.state import compare_state


@dataclass
class Source(WeightsFile):
    """A weights file and its models, which are in eval mode, float32, on the CPU.

    `part` may also be "segmenter", a checkpoint of main_segment.py with its head; `vit` then has that head.
    """

    half: bool = False  # whether the numbers are those of float16, and to be written so
    vit: VisionTransformer | None = None  # the encoder, with the head of a classifier; a probe's is one layer
    mae: MaskedAutoencoderViT | None = None  # the full model (its encoder's tensors are those of `vit`)

    @property
    def info(self) -> dict:
        """All settings in one dict: those of `WeightsFile`, and embed_dim, mlp_dim, decoder_mlp_dim, ...

        nb_classes, global_pool and recipe are there for a classifier only, decoder_* for a full model only.
        """
        names = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "registers")
        info = {name: self.sizes[name] for name in names if name in self.sizes} | self.decoder
        names = (
            "model",
            "input_size",
            "mean",
            "std",
            "pixel_range",
            "mask_ratio",
            "norm_pix_loss",
            "class_names",
        )
        info |= {name: getattr(self, name) for name in names}
        info |= {"mlp_dim": len(self.state["blocks.0.mlp.fc1.weight"]), "global_pool": self.pooled}
        if self.part == "full":
            bias = self.state.get("decoder_blocks.0.mlp.fc1.bias")
            info["decoder_mlp_dim"] = 4 * info["decoder_embed_dim"] if bias is None else len(bias)
        if self.part == "segmenter":
            info |= {"nb_classes": self.vit.num_classes, "recipe": self.recipe}
        if self.part == "classifier":
            info |= {"nb_classes": self.vit.num_classes, "recipe": self.recipe}
            names = [*(self.class_names or []), *range(len(self.class_names or []), self.vit.num_classes)]
            info |= stored_targets(self.content, names, f"--resume {self.path}").info()
        return info

    @property
    def pooled(self) -> bool:
        """Whether the encoder's output is the normed mean of its patch tokens (it has no norm of tokens)."""
        return self.vit.global_pool

    def images(self, number: int, seed: int = 0) -> torch.Tensor:
        """A random batch (number, C, H, W), as normalised images are distributed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(number, self.sizes["in_chans"], *self.input_size, generator=generator)

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


def read_source(path: str, args: Namespace, decoder: bool = True, pixels: bool = False) -> Source:
    """Reads a checkpoint file, URL, or folder of a Hugging Face or timm model.

    Args:
        args: encoder_only (leave decoder or head), half (round to float16), and what a file may not say:
            input_size, num_heads, decoder_num_heads, mean, std, mask_ratio, norm_pix_loss (None: as it says).
        decoder: a full MAE may be one; else its encoder is taken.
        pixels: so may a model that gives each pixel a class.

    Raises:
        UserError: unreadable, no ViT encoder in it, one that computes something else than this code's, or
            one whose settings neither the file nor the flags tell.
    """
    content = read_file(
        path, "--resume", not getattr(args, "no_verify", False), getattr(args, "weights_key", "")
    )
    parts = ["encoder"] if args.encoder_only else ["full"] * decoder + ["classifier", "encoder"]
    weights = describe(content, path, args, *parts, override=True)
    half = getattr(args, "half", False)
    if half:  # the models below are those of the rounded numbers
        weights.state = {name: _rounded(name, value, path) for name, value in weights.state.items()}
    source, state = Source(**vars(weights), half=half), encoder_state(content)[0]
    segments = weights.part == "encoder" and not args.encoder_only and "head.classify.weight" in state
    if segments and pixels:
        source.part, source.vit = "segmenter", _segmenter(weights, state)
    else:
        source.vit = build(weights, "encoder" if weights.part == "full" else weights.part, fold_probe=True)
    if segments and not pixels:
        source.notes.append(
            "its head, which gives each pixel a class, is left out; --to torch_export takes it"
        )
    source.mae = build(weights) if weights.part == "full" else None
    if source.mae is not None and not takes_noise(source.mae):
        raise UserError(f"--resume {path}: its model draws its own masks, so that no copy can be compared "
                        "with it; pass --encoder_only")  # fmt: skip
    if args.mask_ratio is not None:
        source.mask_ratio = args.mask_ratio
    stored, config = stored_settings(content, f"--resume {path}", "mean", "std"), content.get("config", {})
    check_settings(config, f"--resume {path}: its config.json", "layer_norm_eps")
    eps = config.get("layer_norm_eps")
    if eps not in (None, 1e-6):
        source.notes.append(f"its norms have eps {eps:g}, this code's 1e-06; the comparison decides")
    if any(getattr(args, name) is None and stored.get(name) is None for name in ("mean", "std")):
        source.notes.append("the file does not say which mean and std its images had: taken as this code's "
                            "default; else pass --mean and --std")  # fmt: skip
    return source


def _rounded(name: str, value: torch.Tensor, path: str) -> torch.Tensor:
    rounded = value.half().to(value.dtype) if value.is_floating_point() else value
    if value.is_floating_point() and not rounded.isfinite().all():
        raise UserError(f"--half: {name} of {path} has numbers that float16 cannot hold")
    return rounded


def _segmenter(weights: WeightsFile, state: dict) -> SegmentationTransformer:
    """The model of a checkpoint of main_segment.py; its head and layers are those that the tensors fit."""
    linear = "head.norm.running_mean" in state
    width = len(state["head.norm.running_mean" if linear else "head.up1.weight"])
    head = dict(head="linear" if linear else "upsample", num_layers=width // weights.sizes["embed_dim"])
    try:
        model = SegmentationTransformer(len(state["head.classify.weight"]), **head, **weights.sizes)
    except ValueError as error:
        raise UserError(f"--resume {weights.path}: {error}") from None
    state = {name: value for name, value in state.items() if name in model.state_dict()}
    if differences := [name for names in compare_state(model, state) for name in names]:
        raise UserError(
            f"--resume {weights.path}: its head is none of main_segment.py's ({some(differences)})"
        )
    model.load_state_dict(state)
    return model.eval()
