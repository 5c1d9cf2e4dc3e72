"""Reads what is to be exported or imported: a checkpoint file, a URL, a folder of another library's model."""

from pathlib import Path

from util.errors import UserError
from util.weights.files import load_checkpoint, read_entries, read_json
from util.weights.hugging_face import info_of_config

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth")


def load_any(path: str) -> dict:
    """Content of a file as `load_checkpoint` returns it; `config` and `preprocessor` of a folder besides."""
    folder = Path(path)
    if "://" in path or not folder.is_dir():
        content = load_checkpoint(path, "--resume")
        return (
            {**content, **read_entries(path)}
            if path.endswith(".safetensors") and "://" not in path
            else content
        )
    content = {"model": {}}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        for name in sorted(set(read_json(index).get("weight_map", {}).values())):
            content["model"] |= load_checkpoint(folder / name, "--resume")["model"]
    elif files := [folder / name for name in _WEIGHT_FILES if (folder / name).exists()]:
        content = load_any(str(files[0]))
    else:
        raise UserError(f"--resume {path}: is a folder without {' or '.join(_WEIGHT_FILES)}")
    for entry, name in (("config", "config.json"), ("preprocessor", "preprocessor_config.json")):
        if (folder / name).exists():
            content[entry] = read_json(folder / name)
    return content


def config_info(path: str, content: dict) -> dict:
    """What the `config.json` and `preprocessor_config.json` of a folder say, in this code's words.

    Raises:
        UserError: they describe a model that this code does not have.
    """
    config, info = content.get("config"), {}
    if config and "architecture" in config:  # timm's
        cfg, model_args = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
        info = {name: cfg[name] for name in ("mean", "std") if name in cfg}
        info |= {"num_heads": model_args.get("num_heads"), "class_names": config.get("label_names")}
        if "img_size" in model_args or "input_size" in cfg:
            info["input_size"] = model_args.get("img_size") or cfg["input_size"][1:]
    elif config:
        try:
            info = info_of_config(config)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--resume {path}: its config.json {error}") from None
    stats = content.get("preprocessor") or {}
    for name in ("mean", "std"):
        if isinstance(values := stats.get(f"image_{name}"), list):
            info[name] = values
    return {name: value for name, value in info.items() if value is not None}
