"""Where other code keeps a vision transformer's tensors in its files, and how it names them."""

import re

import torch

from util.errors import UserError
from util.files import shown, some
from util.processes.collectives import is_main_process, note

# Entries that hold a model, the usual one first: of most code, DeepSpeed, self-distillation, moving averages
_ENTRIES = ("model", "state_dict", "module", "teacher", "student", "model_ema", "state_dict_ema", "ema")
# What wrappers and whole models put before the names of their encoder
_PREFIXES = ("module", "_orig_mod", "model", "backbone", "encoder", "vit", "student", "teacher")
# The tensor by which an encoder is found: ours and timm's, mmpretrain's, Hugging Face's
_ANCHOR = re.compile(
    r"((?:.+\.)??)(?:patch_embed\.proj(?:ection)?|(?:vit\.)?embeddings\.patch_embeddings\.projection)\.weight"
)
_OUTSIDE = ("head.", "decoder", "mask_token", "neck.", "classifier.")  # of the prefix, and yet of the model
# mmpretrain (OpenMMLab), its backbone's prefix removed
_RULES = [
    (r"neck\.ln1\.", "decoder_norm."),
    (r"neck\.", ""),
    (r"(decoder_blocks|layers)\.(\d+)\.ln([12])\.", r"\1.\2.norm\3."),
    (r"(decoder_blocks|layers)\.(\d+)\.ffn\.layers\.0\.0\.", r"\1.\2.mlp.fc1."),
    (r"(decoder_blocks|layers)\.(\d+)\.ffn\.layers\.1\.", r"\1.\2.mlp.fc2."),
    (r"layers\.(\d+)\.", r"blocks.\1."),
    (r"patch_embed\.projection\.", "patch_embed.proj."),
    (r"ln1\.", "norm."),
    (r"ln2\.", "fc_norm."),
    (r"head\.(?:fc|layers\.head)\.", "head."),
]


def take_weights(content: dict, key: str = "", where: str = "") -> dict:
    """A loaded file with the weights to be read as its only 'model'; as it is where there is no choice.

    Args:
        key: an entry of the file or a prefix of its tensors' names (`--weights_key`); "": the usual entry,
            which a note says if `where` is given and there are others.
        where: the file, for messages.

    Raises:
        UserError: the file holds no weights of the name `key`.
    """
    there = [name for name, value in content.items() if _holds_encoder(value)]
    if not there and not key:
        return content
    flat = model_entry(content)
    chosen = next((name for name in (*_ENTRIES, *there) if name in there), "")
    if key:
        inside = {k[len(key) + 1 :]: v for k, v in flat.items() if str(k).startswith(f"{key}.")}
        if key not in there and not _holds_encoder(inside):
            names = [repr(name) for name in [*there, *sorted(_prefixes(flat))] if name]
            raise UserError(f"--weights_key {key}: {where} holds no vision transformer of that name, but "
                            f"{some(names) or 'none at all'}")  # fmt: skip
        content = content if key in there else {**content, "model": inside}
        chosen = key if key in there else "model"
    elif where and len(there) > 1 and is_main_process():
        note(f"{where}: holds weights as {some(map(repr, there))}; {shown(repr(chosen))} is taken "
             "(--weights_key NAME takes others)")  # fmt: skip
    rest = {name: value for name, value in content.items() if name not in (*there, "model")}
    return {**rest, "model": content[chosen]}


def model_entry(content: dict) -> dict:
    """The entry of a loaded file that holds its model, or all of it."""
    found = content.get("model", content.get("state_dict", content))
    return found if isinstance(found, dict) else {}


def _holds_encoder(value) -> bool:
    return isinstance(value, dict) and bool(_prefixes(value))


def _prefixes(state: dict) -> set[str]:
    """What stands before the names of the encoders in a state dict, without the last dot."""
    names = [k for k, v in state.items() if isinstance(k, str) and isinstance(v, torch.Tensor)]
    matches = map(_ANCHOR.fullmatch, names)
    return {match[1].removesuffix(".") for match in matches if match}


def own_names(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """A state dict without the prefix of its encoder and, of mmpretrain's and BEiT's, under our names; and
    what is to be said of that, in words. Hugging Face's names stay: `util.weights.hugging_face`.

    What stands outside of the prefix is called `beside.NAME`, unless it is a head or decoder.
    """
    there = sorted(_prefixes(state), key=lambda p: (p.startswith("student"), len(p), p))
    found = [prefix for prefix in there if all(part in ("", *_PREFIXES) for part in prefix.split("."))]
    prefix, told = found[0] if found else "", ""
    if there and not found:
        told = f"; a vision transformer stands under {some(map(repr, there))} (--weights_key)"
    if prefix:
        others = [name for name in there if name != prefix]
        told = f", under '{prefix}.'" + (f", not {some(map(repr, others))} (--weights_key)" if others else "")
        inside = {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}
        outside = {k: v for k, v in state.items() if not k.startswith(f"{prefix}.")}
        state = {k if k.startswith(_OUTSIDE) else f"beside.{k}": v for k, v in outside.items()} | inside
    if "patch_embed.projection.weight" in state:
        told += ", names of mmpretrain"
        state = {_renamed(key): value for key, value in state.items()}
    return _joined_biases(state), told


def _renamed(key: str) -> str:
    for pattern, replacement in _RULES:
        key = re.sub(f"^{pattern}", replacement, key)
    return key


def _joined_biases(state: dict) -> dict:
    """BEiT's way: query and value have a bias of their own, and the key's is zero."""
    state = dict(state)
    for key in [key for key in state if key.endswith(".attn.q_bias")]:
        start = key.removesuffix("q_bias")
        query, value, weight = (state.get(start + name) for name in ("q_bias", "v_bias", "qkv.weight"))
        if value is not None and weight is not None and len(weight) == 3 * len(query) == 3 * len(value):
            state[f"{start}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
            del state[key], state[f"{start}v_bias"]
    return state
