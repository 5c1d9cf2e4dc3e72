"""Folders of models that Hugging Face's transformers, timm or this code wrote."""

from pathlib import Path

from util.errors import UserError
from util.files import read_json, some
from util.weights.hugging_face import settings_of_folder

_NAMES = ("model.safetensors", "pytorch_model.bin", "model.pth")


def weights_files(folder: Path, named: str) -> list[Path]:
    """The files of a folder that hold a model's tensors: one, or the parts of a large model.

    Raises:
        UserError: there are none; says what the folder, `named` so by the user, is instead.
    """
    index = next((path for name in _NAMES if (path := folder / f"{name}.index.json").exists()), None)
    if index is not None:
        parts = read_json(index).get("weight_map")
        names = list(parts.values()) if isinstance(parts, dict) else []
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise UserError(f"{named}: its {index.name} names no files of the folder")
        return [folder / name for name in sorted(set(names))]
    if file := next((path for name in _NAMES if (path := folder / name).exists()), None):
        return [file]
    if own := sorted(folder.glob("checkpoint-*.pth")):
        raise UserError(f"{named}: is a folder of checkpoints; pass one of them, such as {own[-1]}")
    if (folder / ".metadata").exists():
        raise UserError(f"{named}: is a checkpoint of torch.distributed.checkpoint, which is not read here")
    there = some(sorted(path.name for path in folder.iterdir()), 3) or "nothing"
    raise UserError(f"{named}: is a folder without {' or '.join(_NAMES)}; it holds {there}")


def read_settings(folder: Path, named: str) -> dict[str, dict]:
    """'config' and 'preprocessor', the JSON files of a folder, where they are there, and 'settings'.

    Raises:
        UserError: they describe a model that this code does not have, or are damaged.
    """
    names = {"config": "config.json", "preprocessor": "preprocessor_config.json"}
    found = {entry: read_json(folder / name) for entry, name in names.items() if (folder / name).exists()}
    try:
        settings = settings_of_folder(found.get("config", {}), found.get("preprocessor", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{named}: its config.json {error}") from None
    return {**found, "settings": settings}
