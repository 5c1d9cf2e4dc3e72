"""Builds the model that a weights file holds: masked autoencoder, encoder or classifier."""

from collections.abc import Sequence

import torch
from torch import nn

import models_vit
from models_mae import MODELS as MAE_MODELS
from models_mae import MaskedAutoencoderViT
from util.errors import UserError
from util.weights.encoder import load_encoder
from util.weights.model_info import read_model_info
from util.weights.predict_weights import Weights, check_heads, count_blocks, settle
from util.weights.state import check_state

# (decoder width, decoder blocks) of the named models -> decoder heads
_DECODER_HEADS = {(512, 8): 16, (256, 4): 8}


def build_mae(
    weights: Weights, norm_pix_loss: bool | None = None, decoder_heads: int | None = None
) -> MaskedAutoencoderViT:
    """The masked autoencoder of a file with a decoder, in eval mode.

    Args:
        norm_pix_loss: for files that do not say whether they predict normalised pixels; None: not given.
        decoder_heads: for files whose decoder is no named model's.

    Raises:
        UserError: no decoder, flags that contradict the file, or something that it does not say.
    """
    source, state, stored = weights.source, weights.state, weights.stored
    if not weights.has_decoder:
        raise UserError(
            f"--resume {source}: holds no decoder ({weights.kind}), which reconstructions need; pass a "
            "checkpoint-*.pth of main_pretrain.py or a released mae_visualize_vit_*.pth"
        )
    width, depth = state["mask_token"].shape[-1], count_blocks(state, "decoder_blocks")
    name = stored.get("model")
    known = stored.get("decoder_num_heads")
    if known is None and name in MAE_MODELS:
        with torch.device("meta"):
            named = MAE_MODELS[name]()
        sizes = (named.cls_token.shape[-1], len(named.blocks))
        if sizes == (weights.sizes["embed_dim"], weights.sizes["depth"]):
            known = named.decoder_blocks[0].attn.num_heads
    heads = settle("--decoder_num_heads", decoder_heads, known, source)
    heads = _DECODER_HEADS.get((width, depth)) if heads is None else heads
    if heads is None:
        raise UserError(
            f"--resume {source}: does not say its decoder's number of attention heads (width {width}, "
            f"{depth} blocks); pass --decoder_num_heads"
        )
    check_heads("--decoder_num_heads", heads, width)
    normalised = settle("--norm_pix_loss", norm_pix_loss, stored.get("norm_pix_loss"), source)
    if normalised is None:
        weights.notes.append(
            f"{source} does not say whether it predicts normalised pixels; taken for plain pixels "
            "(--norm_pix_loss if not)"
        )
    try:
        model = MaskedAutoencoderViT(
            **weights.sizes,
            decoder_embed_dim=width,
            decoder_depth=depth,
            decoder_num_heads=heads,
            norm_pix_loss=bool(normalised),
        )
    except ValueError as error:
        raise UserError(f"--resume {source}: {error}") from None
    check_state(model, state, f"--resume {source}")
    model.load_state_dict(state)
    return model.eval()


def build_encoder(weights: Weights) -> models_vit.VisionTransformer:
    """The encoder of a file as a model without head, in eval mode: a classifier's with its own pooling norm.

    Raises UserError for tensors that do not fit, and for a file without any final norm.
    """
    pooled = "fc_norm.weight" in weights.state
    model = models_vit.VisionTransformer(global_pool=pooled, num_classes=0, **weights.sizes)
    report = load_encoder(model, weights.source, "--resume", weights.content)
    if {"norm.weight", "fc_norm.weight"} & set(report.missing):
        raise UserError(
            f"--resume {weights.source}: has no final norm ({weights.kind}), so its features are not known"
        )
    return model.eval()


def build_classifier(weights: Weights) -> tuple[models_vit.VisionTransformer, list[str]]:
    """The classifier of a fine-tuned or probed file, in eval mode, and the names of its classes.

    Raises:
        UserError: the file holds no classifier.
    """
    info = read_model_info(weights.content)
    if "recipe" not in info:
        raise UserError(
            f"--resume {weights.source}: holds no classifier ({weights.kind}); pass --features FILE.npz for "
            "its features, or a checkpoint of main_finetune.py or main_linprobe.py"
        )
    count = info["nb_classes"]
    model = models_vit.VisionTransformer(
        global_pool=info.get("global_pool", False), num_classes=count, **weights.sizes
    )
    if info["recipe"] == "linprobe":
        norm = nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6)  # as main_linprobe.py trains it
        model.head = nn.Sequential(norm, model.head)
    check_state(model, weights.state, f"--resume {weights.source}")
    model.load_state_dict(weights.state)
    return model.eval(), class_names(info.get("class_names"), count)


def class_names(names: Sequence[str] | None, count: int) -> list[str]:
    """`count` names: those there are, then "class 7" for outputs without one."""
    return [*(names or ())][:count] + [f"class {i}" for i in range(len(names or ()), count)]
