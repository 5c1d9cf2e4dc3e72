"""Builds the model that a weights file holds: masked autoencoder, encoder or classifier."""

import torch
from torch import nn

from models_cross import CrossDecoderViT
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.cli.flags import construct
from util.errors import UserError
from util.files import counted, some
from util.weights.describe import WeightsFile, named_constructor
from util.weights.encoder import part_state
from util.weights.state import compare_state, is_cross


def build(
    weights: WeightsFile, part: str = "", fold_probe: bool = False
) -> MaskedAutoencoderViT | VisionTransformer:
    """The model of a weights file in eval mode, float32, on the CPU; its tensors are those of `weights`. The
    constructor that the file names makes it, if there is one, so that a client's own class computes.

    Args:
        part: "full", "classifier" or "encoder" (a model without head, which pools as the file's does);
            default: what `weights` describes.
        fold_probe: make one linear layer of the BatchNorm and linear layer that a probe's head is.

    Raises:
        UserError: tensors are missing, are not known, or have other shapes: no plain ViT of this code.
    """
    part = part or weights.part
    state = part_state(weights.state, part)
    probe = "head.1.weight" in state
    head = state.get("head.1.weight", state.get("head.weight"))
    if part == "full":
        options = {**weights.decoder, "norm_pix_loss": weights.norm_pix_loss}
    else:
        options = {"global_pool": "fc_norm.weight" in state, "num_classes": 0 if head is None else len(head)}
    plain = MaskedAutoencoderViT if part == "full" else VisionTransformer
    make = named_constructor(weights.constructor, part) or plain
    make = CrossDecoderViT if is_cross(state) else make
    try:
        with torch.device("meta"):
            model = construct(make, **weights.sizes, **options)
            if probe:
                norm = nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6)  # as main_linprobe.py's
                model.head = nn.Sequential(norm, model.head)
    except (TypeError, ValueError) as error:
        raise UserError(f"--resume {weights.path}: {error}") from None
    missing, unexpected, mismatched = compare_state(model, state)
    if missing or unexpected or mismatched:
        differences = some(mismatched + unexpected + missing, 3, "; ")
        raise UserError(f"--resume {weights.path} ({weights.kind}): is not a plain ViT of this code: "
                        f"{counted(len(missing), 'tensor')} missing, {len(unexpected)} not known, "
                        f"{len(mismatched)} of other shapes ({differences})")  # fmt: skip
    if probe and fold_probe:
        state, model.head = _fold_probe(state), model.head[1]
    model.load_state_dict(state, assign=True)
    return model.eval()


def random_encoder(weights: WeightsFile) -> MaskedAutoencoderViT:
    """An encoder as that of a weights file was before its pre-training, drawn from the global generators, in
    eval mode, float32, on the CPU; it has a decoder that is good for nothing.
    """
    make = named_constructor(weights.constructor, "full") or MaskedAutoencoderViT
    decoder = {"decoder_embed_dim": 8, "decoder_depth": 0, "decoder_num_heads": 1}
    try:
        return construct(make, **weights.sizes, **decoder).eval()
    except (TypeError, ValueError) as error:
        raise UserError(f"{weights.path}: no random encoder of its sizes: {error}") from None


def _fold_probe(state: dict) -> dict[str, torch.Tensor]:
    weight, bias = state["head.1.weight"].double(), state["head.1.bias"].double()
    scale = (state["head.0.running_var"].double() + 1e-6).rsqrt()
    shift = weight @ (state["head.0.running_mean"].double() * scale)
    others = {key: value for key, value in state.items() if not key.startswith("head.")}
    return {**others, "head.weight": (weight * scale).float(), "head.bias": (bias - shift).float()}
