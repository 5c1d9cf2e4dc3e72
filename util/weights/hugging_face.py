"""Hugging Face's names of a ViT's or ViTMAE's tensors and settings, turned into this code's and back."""

import re

import torch

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
HF_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
# The decoder's blocks: of the public files, of version 5's modules, and of files that version 5 writes
_HF_DECODER_LAYER = re.compile(
    r"decoder\.(?:decoder_layers|decoder_encoder\.layers?)\.(\d+)\.(.+)\.(weight|bias)"
)
_HF_QKV = re.compile(r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)")
# Ours -> the names of the public files, which every version of transformers reads
_TO_HF_BLOCK = {
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
_TO_HF_OUTER = {ours: theirs for theirs, ours in _HF_OUTER.items()}


def from_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of a Hugging Face ViT or ViTMAE encoder under this code's names; q, k, v become one tensor.

    Keys of the decoder and others that the encoder does not have keep their names.
    """
    result, parts = {}, {}
    for key, value in state.items():
        name = key.removeprefix("vit.")
        layer = None if key.startswith("decoder.") else HF_LAYER.fullmatch(name)
        if name in _HF_OUTER:
            result[_HF_OUTER[name]] = value
        elif not (layer and _take_block("blocks", layer, value, result, parts)):
            result[key] = value
    return _join_qkv(result, parts)


def decoder_from_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `from_hugging_face` left of a ViTMAE's decoder brought under this code's names."""
    result, parts = {}, {}
    for key, value in state.items():
        layer = _HF_DECODER_LAYER.fullmatch(key)
        if not (layer and _take_block("decoder_blocks", layer, value, result, parts)):
            result[key.removeprefix("decoder.")] = value
    return _join_qkv(result, parts)


def _take_block(blocks: str, layer: re.Match, value, result: dict, parts: dict) -> bool:
    """Puts a tensor of a block into `result`, or into `parts` if it is q, k or v; whether it was known."""
    number, name, kind = layer.groups()
    if qkv := _HF_QKV.fullmatch(name):
        parts.setdefault((blocks, number, kind), {})[qkv[1][0]] = value
    elif name in _HF_BLOCK:
        result[f"{blocks}.{number}.{_HF_BLOCK[name]}.{kind}"] = value
    else:
        return False
    return True


def _join_qkv(result: dict, parts: dict) -> dict:
    for (blocks, number, kind), values in parts.items():
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
        info: `util.weights.export_source.Source.info`.
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


def classifier_config(info: dict) -> dict:
    """`config.json` of Hugging Face's ViTForImageClassification, `architectures` left out."""
    names = list(info.get("class_names") or [])
    names += [f"LABEL_{i}" for i in range(len(names), info["nb_classes"])]
    return {
        "model_type": "vit",
        **vit_config(info),
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def info_of_config(config: dict) -> dict:
    """What a `config.json` of Hugging Face's ViT or ViTMAE says of the model, in this code's words.

    Raises:
        ValueError: it describes a model that this code does not have.
    """
    if config.get("model_type") not in ("vit", "vit_mae"):
        raise ValueError(f"is of model_type {config.get('model_type')!r}, not vit or vit_mae")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"uses the activation {config['hidden_act']!r}; only gelu is known here")
    size = config.get("image_size", 224)
    info = {
        "num_heads": config.get("num_attention_heads", 12),
        "input_size": (size, size) if isinstance(size, int) else tuple(size),
    }
    if config["model_type"] == "vit_mae":
        info["decoder_num_heads"] = config.get("decoder_num_attention_heads", 16)
        info["norm_pix_loss"] = bool(config.get("norm_pix_loss", False))
        info["mask_ratio"] = float(config.get("mask_ratio", 0.75))
    labels = config.get("id2label")
    if labels and list(labels.values()) != [f"LABEL_{i}" for i in range(len(labels))]:
        info["class_names"] = [labels[str(i)] for i in range(len(labels))]
    return info
