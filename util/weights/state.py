"""What a state dict is, and whether it fits a model."""

import torch

from util.errors import UserError
from util.files import some

_PREFIXES = ("module.", "_orig_mod.")


def model_state(content: dict, source: str = "the checkpoint") -> dict[str, torch.Tensor]:
    """The model's tensors of a loaded checkpoint ('model', 'state_dict' or the dict itself), prefixes
    removed.
    """
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict):
        raise UserError(f"{source}: its model is a {type(state).__name__}, not a dict of tensors")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return strip_prefixes(tensors)


def stored_settings(content: dict) -> dict:
    """What a loaded checkpoint says of its model beside the tensors: `model_info` or `args`, under the names
    of flags; of a folder what its `config.json` says; {} of a file with tensors only.
    """
    entries = content.get("settings"), content.get("model_info") or content.get("args")
    return {name: v for entry in entries if isinstance(entry, dict) for name, v in entry.items()}


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
    if "patch_embed.proj.weight" not in state:
        decoder = any(key.startswith(("decoder_", "decoder.")) for key in state)
        return "a decoder without its encoder" if decoder else "not a vision transformer"
    if "mask_token" in state and "decoder_pred.weight" in state:
        return "full MAE (encoder and decoder)"
    if "head.1.weight" in state:
        return "linear probe (encoder, BatchNorm, head)"
    if "head.weight" in state:
        return "classifier" + (" (global pool)" if "fc_norm.weight" in state else " (class token)")
    return "encoder only"


def compare_state(model: torch.nn.Module, state: dict) -> tuple[list[str], list[str], list[str]]:
    """(missing keys, unexpected keys, "key: shape in the file, shape in the model") of a state dict for a
    model.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    mismatched = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
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
            "(a checkpoint-*.pth of pre-training, or a mae_visualize_*.pth)"
        )
    parts = [("different shapes", mismatched), ("missing keys", missing), ("unexpected keys", unexpected)]
    details = "; ".join(f"{len(keys)} {name} ({some(keys, 3)})" for name, keys in parts if keys)
    raise UserError(
        f"{source}: is of another architecture ({kind}): {details}; pass the flags it was trained with"
    )


def check_entries(content: dict, source: str) -> None:
    """Raises UserError unless what a checkpoint says beside its tensors is what resuming needs."""

    def number(value, least) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    def numbers(value) -> bool:
        return isinstance(value, dict) and all(isinstance(v, int | float) for v in value.values())

    def optimizer(value) -> bool:
        groups = value.get("param_groups") if isinstance(value, dict) else None
        return isinstance(groups, list) and all(isinstance(g, dict) for g in groups) and "state" in value

    tests = {
        "epoch": lambda v: number(v, -1),
        "step": lambda v: number(v, 0),
        "samples": lambda v: number(v, 0) and number(content.get("effective_batch"), 1),
        "optimizer": optimizer,
        "scaler": lambda v: v is None or isinstance(v, dict),
        "args": lambda v: isinstance(v, dict),
        "meters": lambda v: v is None or (isinstance(v, list) and all(isinstance(m, dict) for m in v)),
        "stats": lambda v: v is None or numbers(v),
        "best_acc1": lambda v: isinstance(v, int | float),
        "model_info": lambda v: isinstance(v, dict),
    }
    for name, test in tests.items():
        if name in content and not test(content[name]):
            raise UserError(f"{source}: its '{name}' is none that a run has written; take another file")


def check_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Raises ValueError unless an optimizer's saved state fits `optimizer` in numbers, shapes and kinds.

    torch looks at numbers only, and its fused kernels then read and write beside tensors of another shape.
    """
    groups, own = state["param_groups"], optimizer.param_groups
    if len(groups) != len(own):
        raise ValueError(f"{len(groups)} parameter groups, not {len(own)}")
    for saved, group in zip(groups, own, strict=True):
        for name, value in group.items():
            theirs, kinds = saved.get(name, value), (int, float)
            if name == "params":
                same = isinstance(theirs, list) and len(theirs) == len(value)
            elif isinstance(value, tuple):
                same = isinstance(theirs, tuple | list) and len(theirs) == len(value)
                same = same and all(isinstance(v, kinds) for v in theirs)
            else:
                same = not isinstance(value, kinds) or isinstance(value, bool) or isinstance(theirs, kinds)
            if not same:
                raise ValueError(f"'{name}' of a parameter group is {str(theirs)[:40]}")
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
            if isinstance(value, torch.Tensor) and value.shape in shapes and value.is_floating_point():
                continue
            if name != "step" or not isinstance(value, int | float):
                raise ValueError(f"'{name}' of parameter {number} has another shape or kind")
