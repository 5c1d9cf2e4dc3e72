"""What a checkpoint says beside its tensors: made plain when it is saved, known when it is read."""

import argparse
import enum
import os
import re
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np
import torch

from util.errors import UserError
from util.files import shown
from util.processes.collectives import is_main_process, note

_told: set[str] = set()  # kinds of values that were stored as text, each said once


def plain(value, depth: int = 0):
    """Settings as what any reader knows: None, numbers, text, lists, tuples and dicts; tensors stay.

    Paths and enums become text, numpy's numbers and arrays Python's, namespaces dicts, sets lists, torch's
    dtypes and devices text. Of anything else its name or text is kept, which a note says once.
    """
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, enum.Enum):
        return value.value if type(value.value) is str else value.name
    if isinstance(value, os.PathLike | bytes):
        return os.fsdecode(value)
    for kind in (bool, int, float, str):  # kinds derived of these: numpy.float64, numpy.str_
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if depth < 20:
        if isinstance(value, dict):
            return {_plain_key(key): plain(v, depth + 1) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return (tuple if isinstance(value, tuple) else list)(plain(v, depth + 1) for v in value)
        if isinstance(value, set | frozenset):
            return sorted((plain(v, depth + 1) for v in value), key=str)
        if hasattr(value, "tolist"):  # of numpy
            return plain(value.tolist(), depth + 1)
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    kind = type(value).__name__
    text = getattr(value, "__qualname__", None) or shown(value, 200)
    if kind not in _told and is_main_process():
        _told.add(kind)
        note(f"note: a setting of type {kind} is kept as its text: {shown(text)}")
    return text


def _plain_key(key):
    return key if key is None or type(key) in (bool, int, float, str) else str(plain(key))


# Older files hold paths and numpy's numbers as pickle stores them. Reading calls these instead of the classes
# that the files name, so that nothing of another library runs on what a file says.


class _Kind:
    """In place of numpy.dtype."""

    def __init__(self, code: str = "", *_):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.order = "<>"[state[1] == ">"]

    def values(self, data: bytes) -> np.ndarray:
        if not re.fullmatch(r"[iufbU]\d{1,4}", self.code):
            raise ValueError(f"a numpy value of kind {shown(self.code)}")
        return np.frombuffer(data, self.order + self.code)


class _Array:
    """In place of numpy.ndarray."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        self.values = kind.values(data).reshape(shape, order="CF"[fortran])

    def tolist(self) -> list:
        return self.values.tolist()


def _array(*_) -> _Array:
    return _Array()


def _scalar(kind: _Kind, data: bytes):
    return kind.values(data).item()


def _text_of_path(path: type) -> Callable:
    return lambda *parts: str(path(*parts))


_posix, _windows = _text_of_path(PurePosixPath), _text_of_path(PureWindowsPath)

# (what is called, what the file names), for torch.serialization.safe_globals
STAND_INS = [argparse.Namespace, (_Kind, "numpy.dtype"), (_Array, "numpy.ndarray")]
for _core in ("numpy.core.multiarray", "numpy._core.multiarray"):
    STAND_INS += (_array, f"{_core}._reconstruct"), (_scalar, f"{_core}.scalar")
for _module in ("pathlib", "pathlib._local"):
    STAND_INS += [(_posix, f"{_module}.{kind}") for kind in ("PosixPath", "PurePosixPath")]
    STAND_INS += [(_windows, f"{_module}.{kind}") for kind in ("WindowsPath", "PureWindowsPath")]


def whole(least: int = 1, most: int = 10**6) -> Callable:
    """Whether a value is a whole number within bounds."""
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most


def real(least: float, most: float) -> Callable:
    """Whether a value is a number within bounds; NaN is not."""
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and least <= v <= most


def several(test: Callable, most: int = 10**6) -> Callable:
    """Whether a value is a list of one to `most` that pass a test."""
    return lambda v: isinstance(v, list | tuple) and 1 <= len(v) <= most and all(map(test, v))


def _text(value) -> bool:
    return isinstance(value, str)


def _flag(value) -> bool:
    return isinstance(value, bool)


def _digits(value) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\d{1,6}", value) is not None


def _size(value) -> bool:
    # Other code stores text, or channels first; such a size counts only where it fits `pos_embed`
    return whole()(value) or several(whole(), 3)(value) or _digits(value)


def can_be_shown(value, depth: int = 0) -> bool:
    """Whether a value can be compared and printed: no endless nesting, no endless number."""
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return depth < 20 and all(can_be_shown(part, depth + 1) for part in parts)
    return not isinstance(value, int) or abs(value) < 2**64


RECIPES = ("finetune", "linprobe", "segment")  # whose checkpoints say which script they are of

# What readers take from `args`, `model_info` or a folder's config: a test, and what it wants in words
SETTINGS = {
    "model": (_text, "a name"),
    "recipe": (lambda v: _text(v) and v in RECIPES, " or ".join(RECIPES)),
    "input_size": (_size, "a size in pixels"),
    **dict.fromkeys(("patch_size", "in_chans"), (whole(), "a whole number above 0")),
    **dict.fromkeys(("num_heads", "decoder_num_heads"), (whole(), "a whole number above 0")),
    "nb_classes": (whole(0), "a number of classes"),
    "class_names": (lambda v: isinstance(v, list | tuple) and all(map(_text, v)), "a list of names"),
    "mask_ratio": (lambda v: real(0, 1)(v) and v < 1, "a share below 1"),
    "mean": (several(real(-1e6, 1e6)), "a list of numbers"),
    "std": (several(real(1e-9, 1e6)), "a list of numbers above 0"),
    "pixel_range": (several(real(-1e300, 1e300), 2**16), "pairs of numbers"),
    **dict.fromkeys(("norm_pix_loss", "global_pool"), (_flag, "true or false")),
    "layer_norm_eps": (real(0, 1), "a small number"),
    "task": (lambda v: _text(v) and v in ("class", "labels", "numbers"), "class, labels or numbers"),
    "thresholds": (several(real(0, 1)), "a list of probabilities"),
    "target_mean": (several(real(-1e300, 1e300)), "a list of numbers"),
    "target_std": (several(real(1e-300, 1e300)), "a list of numbers above 0"),
}  # fmt: skip


def check_settings(info: dict, where: str, *names: str) -> None:
    """Raises UserError, for the file `where`, unless the settings `names` (default: all) are what can be.

    None stands for a setting that is not said.
    """
    for name in names or SETTINGS:
        test, wanted = SETTINGS[name]
        if info.get(name) is not None and not test(info[name]):
            raise UserError(f"{where} is damaged: {name} is {shown(info[name])}, which is not {wanted}")


def stored_settings(content: dict, where: str, *names: str) -> dict:
    """The settings `names` that a loaded checkpoint says beside its tensors, checked.

    They stand in `model_info` or `args`, under the names of flags; a folder's `config.json` goes first. What
    is not said is left out.

    Raises:
        UserError: one is of a kind or size that it cannot have.
    """
    stored = said_settings(content)
    found = {name: stored[name] for name in names if stored.get(name) is not None}
    check_settings(found, where, *found)
    return found


def said_settings(content: dict) -> dict:
    """All that a loaded checkpoint says beside its tensors, whatever that is; see `stored_settings`."""
    info = content.get("model_info")
    entries = content.get("settings"), info if isinstance(info, dict) and info else content.get("args")
    return {name: v for entry in entries if isinstance(entry, dict) for name, v in entry.items()}


def comparable(value):
    """A setting in a form that can be compared: one size, mean or deviation stands for all sides or
    channels.
    """
    if isinstance(value, list | tuple) and value and all(map(real(-1e30, 1e30), value)):
        values = [round(float(v), 6) for v in value]
        return values[0] if len(set(values)) == 1 else values
    return value if isinstance(value, int | float | str) else shown(value)


def in_words(name: str, value) -> str:
    """The value of the setting `name` for a message, as it is given on a command line."""
    if name == "global_pool":
        return "global pooling" if value else "the class token"
    if name == "pixel_range" and value is None:
        return "that of 8 bits"
    if name == "input_size" and isinstance(value, int):
        value = (value, value)
    separator = "x" if name == "input_size" else " "
    return shown(separator.join(map(shown, value)) if isinstance(value, list | tuple) else value) or "none"
