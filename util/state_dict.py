"""What a state dict is, and whether it fits a model."""

import torch

from util.args import UserError

_PREFIXES = ("module.", "_orig_mod.")


def model_state(content: dict) -> dict[str, torch.Tensor]:
    """The model's tensors of a loaded checkpoint ('model', 'state_dict' or the dict itself), prefixes
    removed.
    """
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict):
        raise UserError(f"the checkpoint's model is a {type(state).__name__}, not a dict of tensors")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return strip_prefixes(tensors)


def strip_prefixes(state: dict) -> dict:
    """Removes what DistributedDataParallel and torch.compile put in front of every key."""
    for prefix in _PREFIXES * 2:
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def describe_kind(state: dict) -> str:
    """What kind of model a state dict belongs to, in words."""
    if any(key.startswith(("vit.embeddings.", "embeddings.patch_embeddings.")) for key in state):
        return "Hugging Face ViTMAE" + (
            " with decoder" if "decoder.mask_token" in state else ", encoder only"
        )
    if "patch_embed.proj.weight" not in state:
        return (
            "a decoder without its encoder" if "decoder_pred.weight" in state else "not a vision transformer"
        )
    if "mask_token" in state and "decoder_pred.weight" in state:
        return "full MAE (encoder and decoder)"
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
    if kind == "encoder only" and any(key.startswith("decoder_") for key in missing):
        raise UserError(
            f"{source}: holds an encoder only; to go on with pre-training the decoder is needed too "
            "(a checkpoint-*.pth of pre-training, or a mae_visualize_*.pth)"
        )
    parts = [("different shapes", mismatched), ("missing keys", missing), ("unexpected keys", unexpected)]
    details = "; ".join(f"{len(keys)} {name} ({_some(keys)})" for name, keys in parts if keys)
    raise UserError(
        f"{source}: is of another architecture ({kind}): {details}; pass the flags it was trained with"
    )


def _some(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")
