"""Hugging Face's names of a ViT's or ViTMAE's tensors, turned into this code's."""

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
_HF_QKV = re.compile(r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)")


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
        elif layer and (qkv := _HF_QKV.fullmatch(layer[2])):
            parts.setdefault((layer[1], layer[3]), {})[qkv[1][0]] = value
        elif layer and layer[2] in _HF_BLOCK:
            result[f"blocks.{layer[1]}.{_HF_BLOCK[layer[2]]}.{layer[3]}"] = value
        else:
            result[key] = value
    for (number, kind), values in parts.items():
        if values.keys() == set("qkv"):
            result[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat([values[letter] for letter in "qkv"])
    return result
