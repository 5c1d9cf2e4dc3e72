"""What a state dict is, and whether it fits a model."""

import re

import torch

from util.errors import UserError
from util.files import shown, some
from util.weights.schema import can_be_shown, real, whole

_PREFIXES = ("module.", "_orig_mod.")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Entries of a loss scaler's state, where it is in use
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
_OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)  # counters, masks


def model_state(content: dict, source: str = "the checkpoint") -> dict[str, torch.Tensor]:
    """The model's tensors of a loaded checkpoint ('model', 'state_dict' or the dict itself), prefixes
    removed.

    Raises:
        UserError: they stand elsewhere, or one is of a kind that no model of this code has.
    """
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict):
        raise UserError(f"{source}: its model is a {type(state).__name__}, not a dict of tensors")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    for key, value in tensors.items():
        if reason := odd(value):
            raise UserError(f"{source}: its tensor {shown(key)} is {reason}, which no model here can take")
    for key, value in state.items() if not tensors else ():
        if isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()):
            way = " (as DeepSpeed's are)" if key == "module" else ""
            raise UserError(f"{source}: its tensors are under {shown(repr(key))}{way}, not under 'model'; "
                            "save them anew as {'model': tensors}")  # fmt: skip
    return strip_prefixes(tensors)


def odd(tensor: torch.Tensor) -> str:
    """What is unusual of a tensor from a file, in words; "" for plain numbers on the CPU."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "sparse or nested"
    if tensor.is_meta:
        return "without data (on the device meta)"
    if tensor.is_quantized or tensor.dtype not in _FLOATS + _OTHERS:
        return f"of the kind {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"{shown(tuple(tensor.shape), 40)} made of fewer numbers"
    return ""


def strip_prefixes(state: dict) -> dict:
    """Removes what DistributedDataParallel and torch.compile put in front of every key."""
    for prefix in _PREFIXES * 2:
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def describe_kind(state: dict) -> str:
    """What kind of model a state dict belongs to, in words; the first are "Hugging Face" for its files."""
    if any(key.startswith(("vit.embeddings.", "embeddings.patch_embeddings.")) for key in state):
        if "classifier.weight" in state:
            return "Hugging Face ViT classifier"
        decoder = " with decoder" if "decoder.mask_token" in state else ", encoder only"
        return f"Hugging Face ViTMAE{decoder}"
    if foreign := foreign_kind(state):
        return foreign
    if "patch_embed.proj.weight" not in state:
        decoder = any(key.startswith(("decoder_", "decoder.")) for key in state)
        return "a decoder without its encoder" if decoder else "not a vision transformer"
    if "mask_token" in state and "decoder_pred.weight" in state:
        return f"full MAE (encoder and {'cross-attention ' if is_cross(state) else ''}decoder)"
    if "head.1.weight" in state:
        return "linear probe (encoder, BatchNorm, head)"
    if "head.weight" in state:
        return "classifier" + (" (global pool)" if "fc_norm.weight" in state else " (class token)")
    return "encoder only"


def is_cross(state: dict) -> bool:
    """Whether the decoder in a state dict is that of `models_cross`."""
    return "decoder_blocks.0.attn.kv.weight" in state


def registers(state: dict) -> int:
    """Number of the encoder's register tokens in a state dict."""
    token = state.get("reg_token")
    return token.shape[1] if token is not None and token.ndim == 3 else 0


def not_finite(state: dict) -> str:
    """Name of the first tensor of a state dict with NaN or inf in it; "" if there is none."""
    bad = (k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all())
    return shown(next(bad, ""))


def foreign_kind(state: dict) -> str:
    """What kind of transformer, other than a plain ViT, a state dict belongs to, in words; "" for no such."""
    for key in state:
        if match := re.match(r"(\w+)\.embeddings\.", key):
            return f"a model of Hugging Face's {shown(match[1], 30)}, no ViT or ViTMAE"
        if key.endswith((".attn.q_bias", ".attn.relative_position_bias_table")):
            return "a BEiT or alike (q_bias or relative positions in its attention), no plain ViT"
    proj = state.get("patch_embed.proj.weight")
    if proj is not None and getattr(proj, "ndim", 4) == 5:
        return "a model of videos (its patch embedding is a Conv3d)"
    for name, what in ("cls_token", "class token"), ("pos_embed", "positional embedding"):
        if hasattr(proj, "ndim") and name not in state:
            return f"a transformer whose {what} ({name}) is not in the file"
    return ""


def compare_state(model: torch.nn.Module, state: dict) -> tuple[list[str], list[str], list[str]]:
    """(missing keys, unexpected keys, "key: shape in the file, shape in the model") of a state dict for a
    model.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    mismatched = []
    for key, value in own.items():
        theirs = state.get(key, value)
        if theirs.shape != value.shape:
            shape = shown(tuple(theirs.shape), 40)
            mismatched.append(f"{key}: {shape} in the file, {tuple(value.shape)} in the model")
        elif theirs.is_floating_point() != value.is_floating_point():
            mismatched.append(f"{key}: {theirs.dtype} in the file, {value.dtype} in the model")
    return missing, unexpected, mismatched


def check_state(model: torch.nn.Module, state: dict, source: str) -> None:
    """Raises UserError, naming what differs, unless `state` fits `model` exactly."""
    missing, unexpected, mismatched = compare_state(model, state)
    if not (missing or unexpected or mismatched):
        return
    kind = describe_kind(state)
    alone = kind == "encoder only" or kind.startswith("linear probe")
    if alone and any(key.startswith("decoder_") for key in missing):
        raise UserError(
            f"{source}: holds an encoder only; to go on with pre-training the decoder is needed too "
            "(a checkpoint-*.pth of pre-training, or a mae_visualize_*.pth); --init starts a new run from it"
        )
    parts = [("different shapes", mismatched), ("missing keys", missing), ("unexpected keys", unexpected)]
    details = "; ".join(f"{len(keys)} {name} ({some(keys, 3)})" for name, keys in parts if keys)
    raise UserError(
        f"{source}: is of another architecture ({kind}): {details}; pass the flags it was trained with"
    )


def check_entries(content: dict, source: str) -> None:
    """Raises UserError unless what a checkpoint says beside its tensors is what resuming needs."""

    number = whole(0, 2**53)

    def numbers(value) -> bool:
        return isinstance(value, dict) and all(isinstance(v, int | float) for v in value.values())

    def optimizer(value) -> bool:
        groups = value.get("param_groups") if isinstance(value, dict) else None
        return isinstance(groups, list) and all(isinstance(g, dict) for g in groups) and "state" in value

    def meter(value) -> bool:  # total, count, recent values
        if not isinstance(value, list | tuple) or len(value) != 3 or not isinstance(value[2], list | tuple):
            return False
        return number(value[1]) and all(isinstance(v, int | float) for v in (value[0], *value[2]))

    def meters(value) -> bool:
        return isinstance(value, dict) and all(isinstance(k, str) and meter(m) for k, m in value.items())

    tests = {
        "epoch": whole(-1, 10**9),
        "step": number,
        "samples": lambda v: number(v) and whole(1, 2**53)(content.get("effective_batch")),
        "optimizer": optimizer,
        "scaler": lambda v: v is None or (numbers(v) and (not v or v.keys() >= _SCALER)),
        "args": lambda v: isinstance(v, dict) and can_be_shown(v),
        "meters": lambda v: v is None or (isinstance(v, list) and all(map(meters, v))),
        "stats": lambda v: v is None or numbers(v),
        "best_acc1": real(-1, 100),
        "evaluated": lambda v: isinstance(v, bool),
        "model_info": lambda v: isinstance(v, dict),
        "run": lambda v: isinstance(v, dict) and can_be_shown(v),
    }
    for name, test in tests.items():
        if name in content and not test(content[name]):
            raise UserError(f"{source}: its '{name}' is none that a run has written "
                            f"({shown(content[name])}); take another file")  # fmt: skip


def check_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Raises ValueError unless an optimizer's saved state fits `optimizer` in numbers, shapes and kinds.

    torch looks at numbers only, and its fused kernels then read and write beside tensors of another shape.
    """
    groups, own = state["param_groups"], optimizer.param_groups
    if len(groups) != len(own):
        raise ValueError(f"{len(groups)} parameter groups, not {len(own)}")
    for saved, group in zip(groups, own, strict=True):
        for name, value in group.items():
            theirs, number = saved.get(name, value), real(-1e30, 1e30)
            if name == "params":
                same = isinstance(theirs, list) and len(theirs) == len(value) and all(map(whole(0), theirs))
            elif isinstance(value, tuple):
                same = isinstance(theirs, tuple | list) and len(theirs) == len(value)
                same = same and all(map(number, theirs))
            elif name in ("foreach", "capturable", "differentiable", "fused"):  # how a step is computed
                same = theirs is None or isinstance(theirs, bool)
            elif isinstance(value, str):
                same = theirs == value
            else:
                same = theirs is value if value is None or isinstance(value, bool) else number(theirs)
            if not same:
                raise ValueError(f"'{name}' of a parameter group is {shown(theirs, 40)}")
    parameters = dict(
        pair
        for saved, group in zip(groups, own, strict=True)
        for pair in zip(saved["params"], group["params"], strict=True)
    )
    entries = state["state"]
    if not isinstance(entries, dict) or (entries and set(entries) != set(parameters)):
        raise ValueError(f"state of other parameters than the {len(parameters)} of the model")
    for number, entry in entries.items():
        for name, value in entry.items() if isinstance(entry, dict) else [("state", None)]:
            shapes = [()] if name == "step" else [parameters[number].shape]
            if isinstance(value, torch.Tensor) and value.dtype in _FLOATS and not odd(value):
                same = value.shape in shapes
            elif name == "use_muon":
                same = isinstance(value, bool)
            else:
                same = name == "step" and real(0, 2**53)(value)
            if not same:
                raise ValueError(f"'{shown(name)}' of parameter {number} has another shape or kind")
