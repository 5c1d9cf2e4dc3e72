"""Weights files, checkpoints and their names, models' folders: read so that nothing in them is executed."""

import argparse
import contextlib
import json
import re
from pathlib import Path

import torch

from util.errors import UserError

_NAME = re.compile(r"checkpoint-(\d+)(?:-step(\d+))?\.pth")
_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin", "model.pth")


def read_file(source: str | Path, flag: str = "") -> dict:
    """Reads a file, https URL or folder of weights to CPU tensors, executing nothing (`weights_only=True`).

    The reference's `argparse.Namespace` is allowed and turned into a dict; `.safetensors` become {'model':
    tensors} and the entries `args`, `model_info` and `epoch` that exports store in them. A folder is one of a
    Hugging Face or timm model: 'config' and 'preprocessor' are its JSON files, 'settings' what they say in
    this code's words.

    Raises:
        UserError: missing, damaged, no checkpoint, or content that only unsafe loading could read; names
            the `flag` that `source` was given to, if any.
    """
    source = str(source)
    named = f"{flag} {source}".strip()
    if "://" not in source and Path(source).is_dir():
        return _read_folder(Path(source), flag, named)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            if source.startswith("https://"):
                hashed = re.search(r"-[0-9a-f]{8,}\.", source.rsplit("/", 1)[-1]) is not None
                content = torch.hub.load_state_dict_from_url(
                    source, map_location="cpu", check_hash=hashed, weights_only=True
                )
            elif "://" in source:
                raise UserError(f"{named}: only https:// addresses and files can be loaded")
            elif source.endswith(".safetensors"):
                content = _read_safetensors(source)
            else:
                content = torch.load(source, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{named}: no such file") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if len(reason.split()) == 1:  # "101" and "EOFError" is what rubbish and empty files give
            reason = "it is no checkpoint, or damaged"
        if "PytorchStreamReader" in reason or "central directory" in reason:
            reason = "it is damaged or incomplete (cut off?)"
        if "Weights only load failed" in reason or "Unsupported" in reason:
            reason = "it is no checkpoint of tensors, or asks to execute code, which is refused"
        raise UserError(f"{named}: cannot be read as a checkpoint: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{named}: holds a {type(content).__name__}, not a checkpoint")
    if isinstance(content.get("args"), argparse.Namespace):
        content["args"] = vars(content["args"])
    return content


def _read_safetensors(path: str) -> dict:
    from safetensors import safe_open  # comes with timm
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        stored = file.metadata() or {}
    content = {"model": load_file(path)}
    for name in ("args", "model_info", "epoch"):
        with contextlib.suppress(KeyError, ValueError):
            content[name] = json.loads(stored[name])
    return content


def _read_folder(folder: Path, flag: str, named: str) -> dict:
    from util.weights.hugging_face import settings_of_folder

    index = folder / "model.safetensors.index.json"
    files = [name for name in _IN_FOLDERS if (folder / name).exists()][:1]
    if index.exists():  # large models come in parts
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
    if not files:
        raise UserError(f"{named}: is a folder without {' or '.join(_IN_FOLDERS)}")
    parts = [read_file(folder / name, flag) for name in files]
    content = parts[0] if len(parts) == 1 else {"model": {k: v for p in parts for k, v in p["model"].items()}}
    for entry, name in (("config", "config.json"), ("preprocessor", "preprocessor_config.json")):
        if (folder / name).exists():
            content[entry] = read_json(folder / name)
    try:
        content["settings"] = settings_of_folder(content.get("config", {}), content.get("preprocessor", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{named}: its config.json {error}") from None
    return content


def read_json(path: Path) -> dict:
    """A JSON object; raises UserError where the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints of a folder, the furthest first by their names."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found = [path for path in Path(output_dir).iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=position_in_name, reverse=True)


def position_in_name(path: Path) -> tuple[int, int]:
    """(complete epochs, micro-steps of the next) that a checkpoint's name says."""
    epoch, step = _NAME.fullmatch(path.name).groups()
    return (int(epoch), int(step)) if step else (int(epoch) + 1, 0)


def is_inside_epoch(path: Path) -> bool:
    """Whether a checkpoint's name says that its epoch was not complete."""
    return _NAME.fullmatch(path.name)[2] is not None
