"""Files of an export: a folder that appears whole or not at all, safetensors, JSON, text by template."""

import contextlib
import importlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from util.errors import UserError
from util.export.source import Source
from util.files import nameable, printable, replacing_folder, shown, some
from util.weights.files import digest

# All that an export writes: --overwrite deletes folders of these files, and no other
WRITTEN = {
    "README.md", "config.json", "model.onnx", "model.onnx.data", "model.pt2", "model.pth",
    "model.safetensors", "preprocessor_config.json",
}  # fmt: skip


def require(target: str, packages: Iterable[str]) -> None:
    """Imports the packages of a target; raises UserError with the `pip install` line when some are absent."""
    absent = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if error.name not in (name, None):  # it is there, but something of its own is not
                raise UserError(f"{target}: the package {name} cannot be imported: {error}") from None
            absent.append(name)
    if absent:
        raise UserError(
            f"{target}: needs {' and '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not "
            f"installed: pip install {' '.join(absent)}"
        )


def check_output(output: str | Path, overwrite: bool) -> Path:
    """The folder that an export may make; raises UserError where something is in its way."""
    path = Path(output).resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    if path.is_dir() and (there := sorted(p.name for p in path.iterdir())):
        if not overwrite:
            raise UserError(f"--output {output}: exists and is not empty; pass --overwrite or another folder")
        if strange := [name for name in there if name not in WRITTEN]:
            raise UserError(
                f"--output {output}: --overwrite replaces folders of an earlier export only, and this one "
                f"also holds {some(strange, 3)}; name another folder"
            )
    return path


@contextlib.contextmanager
def output_folder(path: Path, size: int) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it at the end, removed after an exception.

    What was at `path` stays until then.

    Args:
        size: bytes that will be written.

    Raises:
        UserError: the place cannot be written, or has not that much room.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < 1.1 * size:
            raise UserError(
                f"--output {path}: {free / 2**20:.0f} MB are free, {1.1 * size / 2**20:.0f} MB are needed"
            )
        with replacing_folder(path) as folder, nameable(folder) as named:
            yield named
    except OSError as error:
        if error.errno is None:  # a library's own, which has nothing to do with the disk
            raise
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from None


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character as JSON writes it


def write_safetensors(path: Path, state: dict[str, torch.Tensor], **entries) -> None:
    """Writes tensors, `entries` (what JSON can hold), and a digest of both, which `read_file` compares."""
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    stored = {"format": "pt", **{name: json.dumps(v) for name, v in entries.items()}}
    save_file(tensors, path, stored | {"digest": digest(tensors, stored)})


def render(template: str, source: Source, /, **values) -> str:
    """The text `templates/TEMPLATE.jinja`, which sees `source`, the `shape` of two images, and `values`."""
    shape = (2, source.info["in_chans"], *source.info["input_size"])
    text = _TEMPLATES.get_template(f"{template}.jinja").render(source=source, shape=shape, **values)
    return text.rstrip("\n")


def last_part(path) -> str:
    """A path without its folders, of Windows too: where things lay concerns nobody."""
    return shown(PurePath(str(path).replace("\\", "/")).name, 300)


def _cell(value) -> str:
    """Text that stays in its cell of a Markdown table."""
    return _plain(value).replace("|", "\\|")


def _plain(value) -> str:
    """Text in which a page of Markdown sees no HTML."""
    value = value.replace("\n", " ") if isinstance(value, str) else value
    return shown(value, 300).replace("&", "&amp;").replace("<", "&lt;")


def _quoted(text: str) -> str:
    """A string as Python and JSON write it, on one line."""
    line = json.dumps(str(text), ensure_ascii=False)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")), undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
_TEMPLATES.filters |= {
    "cell": _cell, "last_part": last_part, "number": "{:g}".format, "plain": _plain, "printable": printable,
    "quoted": _quoted,
}  # fmt: skip
