"""Hugging Face's names of a ViT's or ViTMAE's tensors and settings, turned into this code's and back."""

import re
from collections.abc import Callable

import torch

from util.files import shown

# Hugging Face's names (of its files, then of its newer modules) -> ours, inside a block
_HF_BLOCK = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HF_OUTER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
}
_HF_LAYER = re.compile(r"(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
# The decoder's blocks: of the public files, of version 5's modules, and of files that version 5 writes
_HF_DECODER_LAYER = re.compile(
    r"decoder\.(?:decoder_layers|decoder_encoder\.layers?)\.(\d+)\.(.+)\.(weight|bias)"
)
_HF_QKV = re.compile(r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)")
# Ours -> the names of the public files (the first above), which every version of transformers reads
_TO_HF_BLOCK = {ours: theirs for theirs, ours in reversed(_HF_BLOCK.items())}
_TO_HF_OUTER = {ours: theirs for theirs, ours in _HF_OUTER.items()}


def from_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of a Hugging Face ViT or ViTMAE encoder under this code's names; q, k, v become one tensor.

    Keys of the decoder and others that the encoder does not have keep their names.
    """
    return _rename(state, _HF_LAYER, "blocks", lambda key: _HF_OUTER.get(key.removeprefix("vit."), key))


def decoder_from_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `from_hugging_face` left of a ViTMAE's decoder brought under this code's names."""
    known = ("decoder.decoder_", "decoder.mask_token")  # other code's decoder may have blocks of that name

    def rename(key: str) -> str:
        return key.removeprefix("decoder.") if key.startswith(known) else key

    return _rename(state, _HF_DECODER_LAYER, "decoder_blocks", rename)


def _rename(state: dict, layer: re.Pattern, blocks: str, rename: Callable[[str], str]) -> dict:
    """The keys that match `layer` are `blocks` here; `rename` gives the names of all others."""
    result, parts = {}, {}
    for key, value in state.items():
        number, name, kind = match.groups() if (match := layer.fullmatch(key)) else ("", "", "")
        if qkv := _HF_QKV.fullmatch(name):
            parts.setdefault((number, kind), {})[qkv[1][0]] = value
        elif name in _HF_BLOCK:
            result[f"{blocks}.{number}.{_HF_BLOCK[name]}.{kind}"] = value
        else:
            result[rename(key)] = value
    for (number, kind), values in parts.items():
        if values.keys() == set("qkv"):
            result[f"{blocks}.{number}.attn.qkv.{kind}"] = torch.cat([values[letter] for letter in "qkv"])
    return result


def to_hugging_face(state: dict[str, torch.Tensor], prefix: str = "vit.") -> dict[str, torch.Tensor]:
    """A state dict of this code (encoder, full MAE, class-token classifier) under Hugging Face's names.

    Args:
        prefix: before the encoder's keys; "vit." in all of their models but the bare encoders.
    """
    result = {}
    for key, value in state.items():
        start, _, rest = key.partition(".")
        if start in ("blocks", "decoder_blocks"):
            layers = f"{prefix}encoder.layer" if start == "blocks" else "decoder.decoder_layers"
            number, rest = rest.split(".", 1)
            name, kind = rest.rsplit(".", 1)
            if name == "attn.qkv":
                for letter, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    result[f"{layers}.{number}.attention.attention.{letter}.{kind}"] = part.clone()
            else:
                result[f"{layers}.{number}.{_TO_HF_BLOCK[name]}.{kind}"] = value
        elif key in _TO_HF_OUTER:
            name = _TO_HF_OUTER[key]
            result[name if name.startswith("classifier.") else prefix + name] = value
        else:  # the decoder's others have the same names there
            result[f"decoder.{key}"] = value
    return result


def vit_config(info: dict) -> dict:
    """The part of `config.json` that Hugging Face's ViT and ViTMAE share.

    Args:
        info: `util.export.source.Source.info`.
    """
    height, width = info["input_size"]
    return {
        "hidden_size": info["embed_dim"],
        "num_hidden_layers": info["depth"],
        "num_attention_heads": info["num_heads"],
        "intermediate_size": info["mlp_dim"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "image_size": height if height == width else [height, width],
        "patch_size": info["patch_size"],
        "num_channels": info["in_chans"],
    }


def mae_config(info: dict) -> dict:
    """`config.json` of Hugging Face's ViTMAE, `architectures` left out.

    For a bare encoder the decoder's numbers, which are not used, are the library's defaults.
    """
    return {
        "model_type": "vit_mae",
        **vit_config(info),
        "decoder_hidden_size": info.get("decoder_embed_dim", 512),
        "decoder_num_hidden_layers": info.get("decoder_depth", 8),
        "decoder_num_attention_heads": info.get("decoder_num_heads", 16),
        "decoder_intermediate_size": info.get("decoder_mlp_dim", 2048),
        "mask_ratio": info["mask_ratio"],
        "norm_pix_loss": info["norm_pix_loss"],
    }


def problem_type(info: dict) -> dict[str, str]:
    """The entry of a classifier's `config.json` for several labels or numbers; none for one class."""
    words = {"labels": "multi_label_classification", "numbers": "regression"}
    return {"problem_type": words[info["task"]]} if "task" in info else {}


def classifier_config(info: dict) -> dict:
    """`config.json` of Hugging Face's ViTForImageClassification, `architectures` left out."""
    names = list(info.get("class_names") or [])
    names += [f"LABEL_{i}" for i in range(len(names), info["nb_classes"])]
    return {
        "model_type": "vit",
        **vit_config(info),
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        **problem_type(info),
    }


def info_of_config(config: dict) -> dict:
    """What a `config.json` of Hugging Face's ViT or ViTMAE says of the model, in this code's words.

    Raises:
        ValueError: it describes a model that this code does not have.
    """
    if config.get("model_type") not in ("vit", "vit_mae"):
        raise ValueError(f"is of model_type {shown(config.get('model_type'))!r}, not vit or vit_mae")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"uses the activation {shown(config['hidden_act'])!r}; only gelu is known here")
    size = config.get("image_size", 224)
    info = {
        "num_heads": config.get("num_attention_heads", 12),
        "input_size": (size, size) if isinstance(size, int) else tuple(size),
    }
    if config["model_type"] == "vit_mae":
        info["decoder_num_heads"] = config.get("decoder_num_attention_heads", 16)
        info["norm_pix_loss"] = config.get("norm_pix_loss", False)
        info["mask_ratio"] = config.get("mask_ratio", 0.75)
    labels = config.get("id2label")
    if labels and list(labels.values()) != [f"LABEL_{i}" for i in range(len(labels))]:
        info["class_names"] = [labels[str(i)] for i in range(len(labels))]
    return info


def settings_of_folder(config: dict, preprocessor: dict) -> dict:
    """What the `config.json` and `preprocessor_config.json` of a folder, timm's or Hugging Face's, say.

    Returns num_heads, input_size, mean, std, class_names, ..., in this code's words; only what is there.

    Raises:
        ValueError, KeyError, TypeError: they describe a model that this code does not have, or are damaged.
    """
    info = {}
    if "architecture" in config:  # timm's
        cfg, args = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
        info = {"num_heads": args.get("num_heads"), "class_names": config.get("label_names")}
        info |= {"mean": cfg.get("mean"), "std": cfg.get("std"), "pixel_range": config.get("pixel_range")}
        info["input_size"] = args.get("img_size") or cfg.get("input_size", [])[1:] or None
    elif config:
        info = info_of_config(config)
    for name in ("mean", "std"):
        if (values := preprocessor.get(f"image_{name}")) is not None:
            info[name] = values
    if limits := preprocessor.get("pixel_range"):  # then they are of the files' own values
        pairs = list(zip(limits[::2], limits[1::2], strict=True))
        bands = list(zip(info["mean"], info["std"], pairs * (len(info["mean"]) // len(pairs)), strict=True))
        info["mean"] = [round((mean - low) / (high - low or 1), 9) for mean, _, (low, high) in bands]
        info["std"] = [round(std / (high - low or 1), 9) for _, std, (low, high) in bands]
        info["pixel_range"] = limits
    return {name: value for name, value in info.items() if value is not None}
