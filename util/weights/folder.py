"""Folders of models that Hugging Face's transformers, timm or this code wrote."""

import contextlib
import difflib
from pathlib import Path

from util.errors import UserError
from util.files import printable, read_json, shown, some
from util.processes.collectives import log
from util.weights.hugging_face import settings_of_folder

_SETTINGS = ("config.json", "preprocessor_config.json")
_NAMES = ("model.safetensors", "pytorch_model.bin", "model.pth")


def weights_files(folder: Path, named: str) -> list[Path]:
    """The files of a folder that hold a model's tensors: one, or the parts of a large model.

    Raises:
        UserError: there are none; says what the folder, `named` so by the user, is instead.
    """
    index = next((path for name in _NAMES if (path := folder / f"{name}.index.json").exists()), None)
    if index is not None:
        return [folder / name for name in _parts(index, named)]
    if file := next((path for name in _NAMES if (path := folder / name).exists()), None):
        return [file]
    if own := sorted(folder.glob("checkpoint-*.pth")):
        raise UserError(f"{named}: is a folder of checkpoints; pass one of them, such as {own[-1]}")
    if (folder / ".metadata").exists():
        raise UserError(f"{named}: is a checkpoint of torch.distributed.checkpoint, which is not read here")
    there = some(sorted(path.name for path in folder.iterdir()), 3) or "nothing"
    raise UserError(f"{named}: is a folder without {' or '.join(_NAMES)}; it holds {there}")


def _parts(index: Path, named: str) -> list[str]:
    """The files that hold a large model, as the file `index` says."""
    parts = read_json(index).get("weight_map")
    names = list(parts.values()) if isinstance(parts, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{named}: its {index.name} names no files of the folder")
    return sorted(set(names))


def read_settings(folder: Path, named: str) -> dict[str, dict]:
    """'config' and 'preprocessor', the JSON files of a folder, where they are there, and 'settings'.

    Raises:
        UserError: they describe a model that this code does not have, or are damaged.
    """
    names = dict(zip(("config", "preprocessor"), _SETTINGS, strict=True))
    found = {entry: read_json(folder / name) for entry, name in names.items() if (folder / name).exists()}
    try:
        settings = settings_of_folder(found.get("config", {}), found.get("preprocessor", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{named}: its config.json {error}") from None
    return {**found, "settings": settings}


def hub_folder(source: str, flag: str = "") -> Path:
    """The folder in Hugging Face's cache of hf://OWNER/NAME[@REVISION] or timm:NAME; what it lacks of weights
    and settings is downloaded.

    Raises UserError: no such model; or not in the cache, and there is no network.
    """
    from huggingface_hub import constants, hf_hub_download, utils  # comes with timm

    named, name = f"{flag} {source}".strip(), source[5:]
    name = _timm_home(name, named) if source.startswith("timm:") else name
    repository, _, revision = name.partition("@")
    wanted = " or ".join(_NAMES[:2])

    def get(file: str, cached: bool) -> Path | None:
        try:
            found = hf_hub_download(repository, file, revision=revision or None, local_files_only=cached)
            return Path(found)
        except utils.EntryNotFoundError as error:
            if isinstance(error, utils.LocalEntryNotFoundError) and not cached:
                raise UserError(
                    f"{named}: its weights ({wanted}) are not in the cache ({constants.HF_HUB_CACHE}), and "
                    "the hub cannot be reached; pass a file or folder, or download it where there is a "
                    f"network: hf download {repository}"
                ) from None
        except Exception as error:  # of the name, the server, the disk
            text = shown(" ".join(str(error).split()), 200)
            raise UserError(f"{named}: is no model that can be had from the hub ({text})") from None

    for cached in (True, False):
        for file in _NAMES[:2]:
            path = get(file, cached)
            if path is None and (index := get(f"{file}.index.json", cached)):
                path = index if all([get(part, cached) for part in _parts(index, named)]) else None
            if path is not None:
                for settings in _SETTINGS:
                    get(settings, cached)
                log(f"{source}: taken from {printable(path.parent)}")
                return path.parent
    raise UserError(f"{named}: the hub has no {wanted} of it")


def _timm_home(name: str, named: str) -> str:
    """OWNER/NAME on the hub of one of timm's pretrained models."""
    from timm.models import get_pretrained_cfg, list_pretrained

    with contextlib.suppress(RuntimeError):  # a model of that name, but no such tag
        if home := getattr(get_pretrained_cfg(name), "hf_hub_id", None):
            return home
    near = some(difflib.get_close_matches(name, list_pretrained("vit_*"), 3)) or "timm.list_pretrained()"
    raise UserError(f"{named}: timm has no weights of that name; it has {near}")
