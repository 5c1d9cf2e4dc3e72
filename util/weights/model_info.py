"""What a classifier's checkpoint says about its model, so that evaluating it needs no flags repeated."""

from argparse import Namespace

import torch

import models_vit
from util.errors import UserError
from util.processes.collectives import is_main_process, warn
from util.sizes import size_pair
from util.weights.encoder import encoder_state, stored_grid

# Entry of a checkpoint's `model_info` -> the flag that says the same
FLAGS = {
    "model": "--model",
    "global_pool": "--global_pool/--cls_token",
    "input_size": "--input_size",
    "patch_size": "--patch_size",
    "in_chans": "--in_chans",
    "nb_classes": "--nb_classes",
    "mean": "--mean",
    "std": "--std",
}


def make_model_info(args: Namespace, class_names: list[str], recipe: str) -> dict:
    """The checkpoint entry `model_info`: how to build the model, prepare images, and name its classes.

    `recipe`: "finetune", or "linprobe" (the head is BatchNorm and linear layer).
    """
    info = {name: getattr(args, name) for name in FLAGS}
    return {
        **info,
        "input_size": size_pair(args.input_size),
        "class_names": list(class_names),
        "recipe": recipe,
    }


def read_model_info(content: dict) -> dict:
    """`model_info` of a loaded checkpoint; of a file without it, what its tensors (and stored flags) tell."""
    if isinstance(content.get("model_info"), dict):
        _check_info(content["model_info"])
        return dict(content["model_info"])
    state, _ = encoder_state(content)
    weight, table = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if weight is None or table is None:
        return {}
    info = {"in_chans": weight.shape[1], "patch_size": weight.shape[-1]}
    grid, side = stored_grid(content, state), round((table.shape[1] - 1) ** 0.5)
    if grid is None and side * side == table.shape[1] - 1:
        grid = (side, side)
    if grid is not None:
        info["input_size"] = (grid[0] * weight.shape[-2], grid[1] * weight.shape[-1])
    if "fc_norm.weight" in state or "norm.weight" in state:
        info["global_pool"] = "fc_norm.weight" in state
    for key in ("head.weight", "head.1.weight"):
        if key in state:
            info["nb_classes"] = state[key].shape[0]
            info["recipe"] = "finetune" if key == "head.weight" else "linprobe"
    if (name := _model_name(state)) is not None:
        info["model"] = name
    return info


def _check_info(info: dict) -> None:
    """Raises UserError for a `model_info` that no model can be built from."""

    def numbers(value, kind, least) -> bool:
        return isinstance(value, list | tuple) and all(isinstance(v, kind) and v >= least for v in value)

    tests = {
        "input_size": lambda v: numbers([v] if isinstance(v, int) else v, int, 1),
        "patch_size": lambda v: v is None or numbers([v], int, 1),
        "in_chans": lambda v: numbers([v], int, 1),
        "nb_classes": lambda v: v is None or numbers([v], int, 0),
        "mean": lambda v: v is None or numbers(v, int | float, float("-inf")),
        "std": lambda v: v is None or numbers(v, int | float, 0),
        "class_names": lambda v: (
            v is None or (isinstance(v, list) and all(isinstance(name, str) for name in v))
        ),
    }
    for name, test in tests.items():
        if name in info and not test(info[name]):
            raise UserError(f"the checkpoint's model_info is damaged: {name} is {str(info[name])[:40]!r}")


def _model_name(state: dict[str, torch.Tensor]) -> str | None:
    """The named model with this width and depth (no two share them)."""
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    for name, constructor in models_vit.MODELS.items():
        with torch.device("meta"):
            model = constructor()
        if (model.embed_dim, len(model.blocks)) == (state["cls_token"].shape[-1], depth):
            return name
    return None


def warn_of_other_stats(args: Namespace, content: dict, source: str) -> None:
    """Warns where the encoder in a file was trained with other means or deviations than `args` has."""
    entries = (content.get("model_info"), content.get("args"), {})
    stored = next(entry for entry in entries if isinstance(entry, dict))
    for name in ("mean", "std"):
        theirs, own = stored.get(name), getattr(args, name)
        if isinstance(theirs, list | tuple) and _plain(name, theirs, len(own)) != _plain(name, own):
            ours = " ".join(map(str, own))
            text = f"{source} was trained with --{name} {' '.join(map(str, theirs))}, now it is {ours}"
            if is_main_process():
                warn(text)


def adopt_model_info(args: Namespace, info: dict, source: str, given: set[str]) -> None:
    """Sets the flags that the user did not give to what a checkpoint says; `given`: names of those that were.

    Raises:
        UserError: a flag that was given says something else than the checkpoint; a model of unknown name.
    """
    if info.get("model", args.model) not in models_vit.MODELS:
        names = ", ".join(models_vit.MODELS)
        raise UserError(f"{source}: is of a model {info['model']!r}, which is not known here ({names})")
    for name, flag in FLAGS.items():
        stored = info.get(name)
        if stored is None:
            continue
        own = getattr(args, name, None)
        if name in given and own is not None and _plain(name, own, args.in_chans) != _plain(name, stored):
            raise UserError(
                f"{flag}: {_say(name, own)} was given, but {source} was trained with "
                f"{_say(name, stored)}; leave the flag out"
            )
        setattr(args, name, tuple(stored) if isinstance(stored, list) else stored)


def _plain(name: str, value, channels: int = 0):
    """A form that can be compared; one mean or deviation stands for all `channels`."""
    if name == "input_size":
        return size_pair(value)
    if isinstance(value, list | tuple):
        values = [round(float(v), 6) for v in value]
        return values * channels if len(values) == 1 and channels else values
    return value


def _say(name: str, value) -> str:
    if name == "global_pool":
        return "global pooling" if value else "the class token"
    if name == "input_size":
        return "x".join(map(str, size_pair(value)))
    return str(value)


def check_class_names(
    info: dict, class_names: list[str], source: str, data_path, nb_classes_given: bool = False
) -> None:
    """Raises UserError when a checkpoint's classes are not those of the data set, in number or in name.

    Where it stores no names, `nb_classes_given` says that the data may have the first few of its classes.
    """
    stored, count = info.get("class_names"), info.get("nb_classes")
    if count is not None and len(class_names) > count:
        raise UserError(f"{source}: has {count} classes, but {data_path} has {len(class_names)}")
    if not stored and count is not None and len(class_names) < count and not nb_classes_given:
        raise UserError(
            f"{source}: has {count} classes without names, but {data_path} has {len(class_names)}, whose "
            f"labels would mean others; if they are the first {len(class_names)}, pass --nb_classes {count}"
        )
    if stored and list(stored) != list(class_names):
        differing = sorted(set(stored) ^ set(class_names)) or ["the order"]
        raise UserError(
            f"{source}: its {len(stored)} classes are not the {len(class_names)} of {data_path} "
            f"(differing: {', '.join(differing[:5])})"
        )
