"""An encoder or classifier as timm's VisionTransformer: weights, `config.json`, comparison."""

import json
import os
from pathlib import Path

import timm
import torch

from util.errors import UserError
from util.export.files import write_json, write_safetensors
from util.export.source import Source

# timm's model of the same architecture, and its settings of those that have weights of an MAE; and what the
# name alone says: patch, width, blocks, heads, classes
_NAMES = {
    "vit_tiny_patch16": ("vit_tiny_patch16_224", (16, 192, 12, 3, 1000)),
    "vit_small_patch16": ("vit_small_patch16_224", (16, 384, 12, 6, 1000)),
    "vit_base_patch16": ("vit_base_patch16_224.mae", (16, 768, 12, 12, 0)),
    "vit_large_patch16": ("vit_large_patch16_224.mae", (16, 1024, 24, 16, 0)),
    "vit_huge_patch14": ("vit_huge_patch14_224.mae", (14, 1280, 32, 16, 0)),
}


def timm_model(source: Source) -> tuple[str, dict]:
    """Name and arguments with which `timm.create_model` builds the encoder or classifier of `source`.

    Only arguments that differ from what the name says are there.
    """
    info = source.info
    name, usual = _NAMES.get(info.get("model"), _NAMES["vit_tiny_patch16"])
    usual = dict(zip(("patch_size", "embed_dim", "depth", "num_heads", "num_classes"), usual, strict=True))
    usual |= {"img_size": (224, 224), "in_chans": 3, "mlp_ratio": 4.0}
    wanted = {key: info[key] for key in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads")}
    wanted = {"img_size": tuple(info["input_size"]), **wanted, "num_classes": source.vit.num_classes}
    wanted["mlp_ratio"] = info["mlp_dim"] / info["embed_dim"]
    args = {key: value for key, value in wanted.items() if value != usual[key]}
    if source.pooled:
        args["global_pool"] = "avg"
    return name, args


def create_line(source: Source, file: str) -> str:
    """The line of code that loads the exported `file`."""
    name, args = timm_model(source)
    if "img_size" in args and len(set(args["img_size"])) == 1:
        args["img_size"] = args["img_size"][0]
    rest = "".join(f", {key}={json.dumps(value)}" for key, value in args.items())
    return f'timm.create_model("{name}"{rest}, checkpoint_path="{file}")'


def write_timm(source: Source, folder: Path, **entries) -> None:
    """Writes `model.safetensors`, and the `config.json` that `local-dir:` reads; `entries` go into it."""
    write_safetensors(folder / "model.safetensors", source.vit.state_dict())
    info, (name, args) = source.info, timm_model(source)
    classes = args.pop("num_classes", source.vit.num_classes)
    cfg = {
        "input_size": [info["in_chans"], *info["input_size"]],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.875 if max(info["input_size"]) <= 224 else 1.0,
        "crop_mode": "center",
        "mean": list(info["mean"]),
        "std": list(info["std"]),
        "num_classes": classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {
        "architecture": name.split(".")[0],
        "num_classes": classes,
        "num_features": info["embed_dim"],
        "global_pool": "avg" if source.pooled else "token",
        "pretrained_cfg": cfg,
        **entries,
    }
    config["model_args"] = {"global_pool": config["global_pool"], "num_heads": info["num_heads"], **args}
    if info.get("class_names"):
        names = list(info["class_names"])
        config["label_names"] = names + [f"LABEL_{i}" for i in range(len(names), classes)]
    write_json(folder / "config.json", config)


@torch.no_grad()
def compare_timm(source: Source, models: dict[str, torch.nn.Module]) -> dict[str, float]:
    """Largest differences between the eager model and timm's, {"what, of which": difference}."""
    images, result = source.images(2), {}
    tokens, features = source.tokens(images), source.vit.forward_features(images)
    for name, model in models.items():
        model.eval()
        theirs = model.forward_features(images)
        result[f"tokens, {name}"] = (theirs - tokens).abs().max().item()
        pooled = model.forward_head(theirs, pre_logits=True)
        result[f"features, {name}"] = (pooled - features).abs().max().item()
        if source.vit.num_classes:
            result[f"logits, {name}"] = (model(images) - source.logits(images)).abs().max().item()
    return result


def check_timm(source: Source, folder: Path) -> dict[str, float]:
    """Loads the export with timm in both ways and compares."""
    name, args = timm_model(source)
    file = str(folder / "model.safetensors")
    models = {"checkpoint_path": timm.create_model(name, checkpoint_path=file, **args)}
    if reads_folders():
        models["local-dir"] = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return compare_timm(source, models)


def reads_folders() -> bool:
    """Whether this version of timm knows `local-dir:`."""
    return hasattr(timm.models._hub, "load_model_config_from_path")


def load_original(source: Source) -> torch.nn.Module:
    """timm's own model of what `source` was read from, for `--from timm`.

    Raises:
        UserError: timm cannot load it as the model that its tensors tell.
    """
    path = Path(source.path)
    name, args = timm_model(source)
    files = ("model.safetensors", "pytorch_model.bin")
    file = next((path / name for name in files if (path / name).exists()), path)
    try:
        if path.is_dir() and "architecture" in source.content.get("config", {}) and reads_folders():
            return timm.create_model(f"local-dir:{path}", pretrained=True)
        return timm.create_model(name, checkpoint_path=os.fspath(file), **args)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--from timm --resume {path}: timm cannot load it: {reason}") from None


def timm_usage(source: Source, folder: str) -> str:
    """Code that loads the export."""
    tail = "logits = model(images)" if source.vit.num_classes else "features = model(images)"
    width = source.vit.num_classes or source.info["embed_dim"]
    shape = ", ".join(map(str, (source.info["in_chans"], *source.info["input_size"])))
    lines = [
        "import timm",
        "import torch",
        "",
        f"model = {create_line(source, f'{folder}/model.safetensors')}.eval()",
        f"images = torch.randn(2, {shape})  # normalised with the checkpoint's mean and std",
        "with torch.no_grad():",
        f"    tokens = model.forward_features(images)  # (2, {source.vit.pos_embed.shape[1]}, "
        f"{source.info['embed_dim']})",
        f"    {tail}  # (2, {width})",
    ]
    return "\n".join(lines)
