"""Where other code keeps a vision transformer's tensors in its files, and how it names them."""

import re

import torch

from util.errors import UserError
from util.files import printable, shown, some
from util.processes.collectives import is_main_process, note

# Entries that hold a model, the usual one first: of most code, DeepSpeed, self-distillation, moving averages
_ENTRIES = ("model", "state_dict", "module", "teacher", "student", "model_ema", "state_dict_ema", "ema")
# What wrappers and whole models put before the names of their encoder
_PREFIXES = ("", "module", "_orig_mod", "model", "backbone", "encoder", "vit", "student", "teacher")
# The tensor by which an encoder is found: ours and timm's, mmpretrain's, Hugging Face's
_ANCHOR = re.compile(
    r"((?:.+\.)??)(?:patch_embed\.proj(?:ection)?|(?:vit\.)?embeddings\.patch_embeddings\.projection)\.weight"
)
_OUTSIDE = ("head.", "decoder", "mask_token", "neck.", "classifier.")  # of the prefix, and yet of the model
_MMPRETRAIN = {  # its names, the backbone's prefix removed, in this order
    r"^neck\.ln1\.": "decoder_norm.", r"^neck\.": "", r"^ln1\.": "norm.", r"^ln2\.": "fc_norm.",
    r"^layers\.": "blocks.", r"^patch_embed\.projection\.": "patch_embed.proj.", r"\.ln([12])\.": r".norm\1.",
    r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.", r"\.ffn\.layers\.1\.": ".mlp.fc2.",
    r"^head\.(?:fc|layers\.head)\.": "head.",
}  # fmt: skip


def take_weights(content: dict, key: str = "", where: str = "") -> dict:
    """A loaded file with the weights to be read as its only 'model'; as it is where it holds no encoder.

    Args:
        key: an entry of the file or a prefix of its tensors' names; "": the usual entry, of which a note
            tells if there are others and `where`, the file for messages, is given.

    Raises UserError: the file holds no vision transformer of the name `key`.
    """
    there = [name for name, value in content.items() if _prefixes(value)]
    chosen = next((name for name in (key or _ENTRIES[0], *_ENTRIES, *there) if name in there), None)
    if key and key not in there:
        state = {str(k): v for k, v in content.get(chosen, content).items() if isinstance(v, torch.Tensor)}
        start = next((s for s in (f"{key}.", f"module.{key}.") if any(k.startswith(s) for k in state)), key)
        inside = {name[len(start) :]: v for name, v in state.items() if name.startswith(start)}
        if not _prefixes(inside):
            names = some(repr(name) for name in [*there, *_prefixes(state)] if name)
            raise UserError(f"--weights_key {key}: {where} holds no vision transformer of that name, but "
                            f"{names or 'none at all'}")  # fmt: skip
        content, chosen = {**content, "model": inside}, "model"
    elif where and not key and len(there) > 1 and is_main_process():
        note(f"{printable(where)}: holds weights as {some(map(repr, there))}; {shown(repr(chosen))} is taken "
             "(--weights_key NAME takes others)")  # fmt: skip
    if chosen is None:
        return content
    rest = {name: value for name, value in content.items() if name not in (*there, "model")}
    return {**rest, "model": content[chosen]}


def _prefixes(state) -> list[str]:
    """What stands before the names of the encoders in a state dict, without the last dot; a student's last.
    [] for anything else.
    """
    state = state if isinstance(state, dict) else {}
    matches = [_ANCHOR.fullmatch(str(key)) for key, v in state.items() if isinstance(v, torch.Tensor)]
    found = {match[1].removesuffix(".") for match in matches if match}
    return sorted(found, key=lambda prefix: (prefix.startswith("student"), len(prefix), prefix))


def own_names(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """A state dict without the prefix of its encoder and, of mmpretrain's and BEiT's, under our names; and
    what is to be said of that, in words. Hugging Face's names stay: `util.weights.hugging_face`.

    What stands outside of the prefix is called `beside.NAME`, unless it is a head or decoder.
    """
    there, told = _prefixes(state), ""
    prefix = next((name for name in there if all(part in _PREFIXES for part in name.split("."))), None)
    if there and prefix is None:
        told = f"; a vision transformer stands under {some(map(repr, there))} (--weights_key)"
    if prefix:
        others = some(repr(name) for name in there if name != prefix)
        told = f", under '{prefix}.'" + (f", not {others} (--weights_key)" if others else "")
        names = {key: key.removeprefix(f"{prefix}.") for key in state}
        names |= {k: f"beside.{k}" for k, own in names.items() if k == own and not k.startswith(_OUTSIDE)}
        state = {names[key]: state[key] for key in sorted(state, key=lambda key: names[key] != key)}
    if "patch_embed.projection.weight" in state:
        told += ", names of mmpretrain"
        for pattern, name in _MMPRETRAIN.items():
            state = {re.sub(pattern, name, key): value for key, value in state.items()}
    state = dict(state)
    for start in [key.removesuffix("q_bias") for key in state if key.endswith(".attn.q_bias")]:
        query, value = state[f"{start}q_bias"], state.get(f"{start}v_bias")  # BEiT's: the key's is zero
        if value is not None and f"{start}qkv.bias" not in state:
            state[f"{start}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
            del state[f"{start}q_bias"], state[f"{start}v_bias"]
    registers, table = (state.get(name) for name in ("reg_token", "pos_embed"))
    if getattr(registers, "ndim", 0) == getattr(table, "ndim", 0) == 3:
        count = registers.shape[1]
        told += f", {count} registers"
        if not table[:, 1 : 1 + count].any():  # timm's places for them, which ours have not
            state["pos_embed"] = torch.cat([table[:, :1], table[:, 1 + count :]], dim=1)
    return state, told
