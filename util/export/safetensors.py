"""A checkpoint of this code as safetensors, its settings as metadata."""

from collections.abc import Callable
from pathlib import Path

import torch

import models_cross
import models_mae
import models_vit
from util.export.checkpoint import FULL, read_again, settings
from util.export.files import render, write_safetensors
from util.export.source import Source
from util.weights.state import is_cross

SIZES = ("patch_size", "in_chans", "registers")


def write(source: Source, folder: Path) -> None:
    """Writes `model.safetensors`: this code's tensors, as float16 if they are, and the settings."""
    epoch = source.content.get("epoch")
    entries = {"epoch": epoch} if isinstance(epoch, int) else {}
    state = source.state
    if source.half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    write_safetensors(folder / "model.safetensors", state, **settings(source), **entries)


def check(source: Source, path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Reads the file with nothing but itself to go by; of a full model loss and prediction too."""
    again, images = read_again(path / "model.safetensors"), source.images(2)
    what = "logits" if source.vit.num_classes else "tokens"
    outputs = {what: (getattr(again, what)(images), getattr(source, what)(images))}
    if source.mae is not None:
        noise = torch.rand(2, source.mae.patch_embed.num_patches, generator=torch.Generator().manual_seed(1))
        models = (again.mae, again.info["mask_ratio"]), (source.mae, source.info["mask_ratio"])
        theirs, ours = (mae(images, ratio, noise) for mae, ratio in models)
        outputs |= {"loss": (theirs[0], ours[0]), "prediction": (theirs[1], ours[1])}
    return outputs


def usage(source: Source, folder: str) -> str:
    """Code that loads the export with nothing but this code's model files."""
    info, full, cross = source.info, source.part == "full", is_cross(source.state)
    module = models_cross if cross else models_mae if full else models_vit
    args = {"img_size": tuple(info["input_size"])} | {key: info[key] for key in SIZES if key in info}
    if full:
        args |= {key: info[key] for key in FULL if key != "mask_ratio"}
    else:
        args |= {"global_pool": info["global_pool"], "num_classes": source.vit.num_classes}
    name = settings(source)["args"].get("model") if full else info.get("model")
    models = getattr(module, "MODELS", {})
    named = name in models and _makes(models[name], args, source.state)
    if not named:
        name = "CrossDecoderViT" if cross else "MaskedAutoencoderViT" if full else "VisionTransformer"
        args |= {key: info[key] for key in ("embed_dim", "depth", "num_heads")}
        args |= {"mlp_ratio": info["mlp_dim"] / info["embed_dim"]}
    values = {"folder": folder, "module": module.__name__, "name": name, "named": named, "args": args}
    return render("safetensors.py", source, **values)


def _makes(constructor: Callable, args: dict, state: dict[str, torch.Tensor]) -> bool:
    """Whether constructor(**args) is of the sizes of `state`, but for a probe's head."""

    def sizes(tensors: dict) -> dict:
        return {key: value.shape for key, value in tensors.items() if not key.startswith("head.")}

    try:
        with torch.device("meta"):
            return sizes(constructor(**args).state_dict()) == sizes(state)
    except (TypeError, ValueError):
        return False
