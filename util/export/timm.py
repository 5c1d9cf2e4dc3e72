"""An encoder or classifier as timm's VisionTransformer."""

from pathlib import Path

import timm
import torch

from util.data.depth import range_text
from util.errors import UserError
from util.export.files import render, write_json, write_safetensors
from util.export.source import Source, read_source
from util.files import read_json
from util.weights.folder import weights_files

# timm's model of the same architecture, and its settings of those that have weights of an MAE; and what the
# name alone says: patch, width, blocks, heads, classes
_NAMES = {
    "vit_tiny_patch16": ("vit_tiny_patch16_224", (16, 192, 12, 3, 1000)),
    "vit_small_patch16": ("vit_small_patch16_224", (16, 384, 12, 6, 1000)),
    "vit_base_patch16": ("vit_base_patch16_224.mae", (16, 768, 12, 12, 0)),
    "vit_large_patch16": ("vit_large_patch16_224.mae", (16, 1024, 24, 16, 0)),
    "vit_huge_patch14": ("vit_huge_patch14_224.mae", (14, 1280, 32, 16, 0)),
}
_READS_FOLDERS = hasattr(timm.models._hub, "load_model_config_from_path")  # newer versions know `local-dir:`


def _model(source: Source) -> tuple[str, dict]:
    """Name and arguments with which `timm.create_model` builds the encoder or classifier of `source`.

    Only arguments that differ from what the name says are there.
    """
    info = source.info
    name, usual = _NAMES.get(info.get("model"), _NAMES["vit_tiny_patch16"])
    usual = dict(zip(("patch_size", "embed_dim", "depth", "num_heads", "num_classes"), usual, strict=True))
    usual |= {"img_size": (224, 224), "in_chans": 3, "mlp_ratio": 4.0}
    args = {
        "img_size": tuple(info["input_size"]),
        **{key: info[key] for key in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads")},
        "num_classes": source.vit.num_classes,
        "mlp_ratio": info["mlp_dim"] / info["embed_dim"],
    }
    args = {key: value for key, value in args.items() if value != usual[key]}
    args |= {"reg_tokens": info["registers"]} if "registers" in info else {}
    return name, args | ({"global_pool": "avg"} if source.pooled else {})


def write(source: Source, folder: Path) -> None:
    """Writes `model.safetensors`, and the `config.json` that `local-dir:` reads."""
    info, (name, args), state = source.info, _model(source), source.vit.state_dict()
    if count := args.get("reg_tokens"):  # timm gives them places, all 0 here
        first, table = state["pos_embed"].split([1, source.vit.patch_embed.num_patches], dim=1)
        state["pos_embed"] = torch.cat([first, table.new_zeros(1, count, table.shape[2]), table], dim=1)
    write_safetensors(folder / "model.safetensors", state)
    classes = args.pop("num_classes", source.vit.num_classes)
    pooling = "avg" if source.pooled else "token"
    config = {
        "architecture": name.split(".")[0],
        "num_classes": classes,
        "num_features": info["embed_dim"],
        "global_pool": pooling,
        "pretrained_cfg": {
            "input_size": [info["in_chans"], *info["input_size"]],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875 if max(info["input_size"]) <= 224 else 1.0,
            "crop_mode": "center",
            "mean": list(info["mean"]),
            "std": list(info["std"]),
            "num_classes": classes,
            # timm before 1.0.31 takes what it names for weights of 3 channels, whatever they are
            "first_conv": "patch_embed.proj" if info["in_chans"] == 3 else None,
            "classifier": "head",
        },
        "model_args": {"global_pool": pooling, "num_heads": info["num_heads"], **args},
    }
    if info["pixel_range"]:  # beside pretrained_cfg, where timm passes over what it does not know
        config["pixel_range"] = list(info["pixel_range"])
        limits = range_text(info["pixel_range"])
        text = f"pixel range {limits} (low high): mean and std are of (value - low) / (high - low), clipped"
        config["pretrained_cfg"]["notes"] = [text]
    if names := list(info.get("class_names") or []):
        config["label_names"] = names + [f"LABEL_{i}" for i in range(len(names), classes)]
    write_json(folder / "config.json", config)


def check(source: Source, path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Loads what lies at `path` with timm, by its `checkpoint_path` and by its `local-dir:`.

    Raises:
        UserError: timm cannot load it as the model that its tensors tell.
    """
    name, args = _model(source)
    file = weights_files(path, f"--resume {path}")[0] if path.is_dir() else path
    config = path / "config.json"
    try:
        models = {"checkpoint_path": timm.create_model(name, checkpoint_path=str(file), **args)}
        if _READS_FOLDERS and config.exists() and "architecture" in read_json(config):
            models["local-dir"] = timm.create_model(f"local-dir:{path}", pretrained=True)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: timm cannot load it: {reason}") from None
    images, outputs = source.images(2), {}
    tokens, features = source.tokens(images), source.vit.forward_features(images)
    for way, model in models.items():
        theirs = model.eval().forward_features(images)
        without = torch.cat([theirs[:, :1], theirs[:, model.num_prefix_tokens :]], dim=1)
        outputs[f"tokens, {way}"] = without, tokens
        outputs[f"features, {way}"] = model.forward_head(theirs, pre_logits=True), features
        if source.vit.num_classes:
            outputs[f"logits, {way}"] = model(images), source.logits(images)
    return outputs


def usage(source: Source, folder: str) -> str:
    """Code that loads the export."""
    name, args = _model(source)
    if "img_size" in args and len(set(args["img_size"])) == 1:
        args["img_size"] = args["img_size"][0]
    return render("timm.py", source, folder=folder, name=name, args=args)


def read(path: str, args) -> Source:
    """Reads a folder or file of timm's; raises UserError where it is none."""
    source = read_source(path, args)
    theirs = source.kind.startswith("Hugging Face")
    if theirs or source.part == "full" or "head.1.weight" in source.state:
        advice = "pass --from hf" if theirs else "the main scripts take it as it is"
        raise UserError(f"--from timm --resume {path}: is no file of timm's but {source.kind}; {advice}")
    return source
