"""Weights files, checkpoints, models' folders: read so that nothing in them is executed."""

import contextlib
import hashlib
import json
import pickletools
import re
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch

from util.errors import UserError
from util.files import nameable, shown
from util.processes.collectives import is_main_process, log
from util.sizes import default_workers
from util.weights.schema import STAND_INS, plain

_ENTRIES = ("args", "model_info", "epoch")  # in the metadata of our safetensors
_FLIPPED = "the file was changed after it was written (bits flipped?); take another, or --no_verify reads it"


def read_file(
    source: str | Path, flag: str = "", verify: bool = True, weights_key: str | None = None
) -> dict:
    """Reads a file, https URL or folder of weights to CPU tensors, executing nothing (`weights_only=True`).
    hf://OWNER/NAME is a folder of Hugging Face's hub, timm:NAME one of timm's.

    The reference's `argparse.Namespace` is allowed and turned into a dict, paths and numpy's numbers in it to
    plain ones; `.safetensors` become {'model': tensors} and the entries `args`, `model_info` and `epoch` that
    exports store in them. A folder is one of a Hugging Face or timm model: 'config' and 'preprocessor' are
    its JSON files, 'settings' what they say in this code's words.

    Args:
        flag: that `source` was given to, if any, for messages.
        verify: compare all bytes with the checksums in the file. torch's files before version 1.6 (no zip
            archives) have none, nor have `.safetensors` that another program wrote.
        weights_key: which of several models in it is its 'model' then, "" for the usual one
            (`util.weights.layouts`); None: the file as it is.

    Raises:
        UserError: missing, damaged, no checkpoint, or content that only unsafe loading could read.
    """
    named = f"{flag} {source}".strip()
    if weights_key is not None:
        from util.weights.layouts import take_weights

        return take_weights(read_file(source, flag, verify), weights_key, named)
    path = fetch(source, flag)
    if path.is_dir():
        from util.weights.folder import read_settings, weights_files

        content, *others = [read_file(part, flag, verify) for part in weights_files(path, named)]
        if others:
            parts = [part.get("model", part) for part in (content, *others)]
            content = {"model": {key: value for part in parts for key, value in part.items()}}
        return content | read_settings(path, named)
    try:
        blob = path.resolve()  # of Hugging Face's cache, which names them by their SHA-256
        if verify and path.is_symlink() and re.fullmatch(r".*/blobs/[0-9a-f]{64}", blob.as_posix()):
            with open(blob, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != blob.name:
                    raise ValueError(f"{_FLIPPED}; remove {blob}")
        if path.suffix == ".safetensors":
            content = _read_safetensors(path, verify)
        else:
            if verify:
                check_archive(path)
            with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings(action="ignore"):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{named}: no such file") from None
    except Exception as error:
        if "://" in str(source):
            path.unlink(missing_ok=True)  # the next start downloads it again
        raise UserError(f"{named}: cannot be read as a checkpoint: {_reason(error, path)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{named}: holds a {type(content).__name__}, not a checkpoint")
    return content | {name: plain(content[name]) for name in ("args", "model_info") if name in content}


def fetch(source: str | Path, flag: str = "") -> Path:
    """The path of a file or folder; of an https URL that of the copy in torch's cache, made if need be, of
    hf:// and timm: that of a folder in Hugging Face's.

    A copy is known by the whole address, or by the hash in its name, which is checked.

    Raises:
        UserError: another kind of address, or it cannot be downloaded.
    """
    source = str(source)
    if source.startswith(("hf://", "timm:")):
        from util.weights.folder import hub_folder

        return hub_folder(source, flag)
    if "://" not in source:
        return Path(source)
    if not source.startswith("https://"):
        raise UserError(f"{flag} {source}: only https:// addresses and files can be loaded".strip())
    name = PurePosixPath(urlsplit(source).path).name[-100:]
    hashed = re.search(r"-([0-9a-f]{8,})\.", name)
    if not hashed:
        name = f"{hashlib.sha256(source.encode()).hexdigest()[:16]}-{name}"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.exists():
        log(f"{source}: taken from {path}, where it was downloaded before")
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = hashed[1] if hashed else None
        torch.hub.download_url_to_file(source, str(path), prefix, progress=is_main_process())
    except Exception as error:  # of the network, the server, the disk, the hash
        raise UserError(f"{flag} {source}: cannot be downloaded: {shown(str(error), 200)}".strip()) from None
    return path


def check_archive(path: str | Path) -> None:
    """Compares all records of a file of `torch.save` with their checksums, which torch does not do.

    Raises:
        zipfile.BadZipFile, OSError, ...: damaged; of a record it names it.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # torch's older format, or nothing of torch's: no checksums
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(record.CRC for record in records):  # torch can be told to leave them out
        parts = [records[i :: default_workers()] for i in range(default_workers())]
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(lambda part: _read_through(path, part), parts))


def _read_through(path: str | Path, records: list[zipfile.ZipInfo]) -> None:
    # In Python 3.12 and 3.13 threads that share an archive read at each other's places
    with zipfile.ZipFile(path) as archive:
        for record in records:
            as_folder = record.external_attr & 0x10  # torch would leave that tensor's memory as it is
            if record.compress_size != record.file_size or as_folder:
                raise zipfile.BadZipFile(f"Bad size of {shown(record.filename)}")
            with archive.open(record) as file:  # which compares the checksum at the end
                while file.read(1 << 20):
                    pass


def digest(tensors: dict[str, torch.Tensor], entries: dict[str, str]) -> str:
    """8 hexadecimal digits by which a change in tensors, their names or the `entries` beside is noticed."""

    def checksum(name: str) -> int:
        value = tensors[name].detach().contiguous()
        label = f"{name} {value.dtype} {tuple(value.shape)}".encode()
        return zlib.crc32(value.reshape(-1).view(torch.uint8).numpy(), zlib.crc32(label))

    with ThreadPoolExecutor(default_workers()) as pool:
        sums = list(pool.map(checksum, sorted(tensors)))
    return f"{zlib.crc32(json.dumps([sums, sorted(entries.items())]).encode()):08x}"


def _read_safetensors(path: Path, verify: bool) -> dict:
    from safetensors import safe_open  # comes with timm
    from safetensors.torch import load_file

    with nameable(path) as named:
        with safe_open(named, "pt") as file:
            stored = file.metadata() or {}
        content = {"model": load_file(named)}
    written = stored.pop("digest", None)
    if verify and written is not None and digest(content["model"], stored) != written:
        raise ValueError(_FLIPPED)
    for name in _ENTRIES:
        with contextlib.suppress(KeyError, ValueError):
            content[name] = json.loads(stored[name])
    return content


def _reason(error: Exception, path: Path) -> str:
    """Why a file cannot be read, in words."""
    text = str(error).strip()
    if text.startswith(("Bad CRC", "Bad size", "Bad magic number for file", "File name in directory")):
        return f"{_FLIPPED} ({shown(text)})"
    if isinstance(error, zipfile.BadZipFile | EOFError) and text:
        return "it is damaged or incomplete (cut off?)"
    if "PytorchStreamReader" in text or "central directory" in text:
        return "it is damaged or incomplete (cut off?)"
    if "Weights only load failed" in text or "Unsupported" in text:
        found = re.search(r"GLOBAL (?:builtins\.)?([\w.]+)", text)
        where = f" ({shown(found[1])}{_place(path, found[1])})" if found else ""
        return f"it is no checkpoint of tensors, or asks to execute code, which is refused{where}"
    reason = text.splitlines()[0] if text else type(error).__name__
    if found := re.match("a numpy value of kind (.+)", reason):
        reason += _place(path, found[1])
    # "101" and "EOFError" is what rubbish and empty files give
    return "it is no checkpoint, or damaged" if len(reason.split()) == 1 else shown(reason, 200)


def _place(path: Path, name: str) -> str:
    """The entry of a file in which pickle names something, in words; "" where that cannot be seen."""
    last, texts = "", {}
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        record = next(r for r in archive.namelist() if r.endswith("/data.pkl"))
        for code, value, _ in pickletools.genops(archive.read(record)):
            if code.name == "GLOBAL" and value.replace(" ", ".").endswith(name):
                return f" in '{shown(last)}'" if last else ""
            if "UNICODE" in code.name and value == name:
                return f" in '{shown(last)}'" if last else ""
            if "UNICODE" in code.name:
                last = fresh = value
                continue
            if code.name in ("BINPUT", "LONG_BINPUT") and fresh is not None:
                texts[value] = fresh
            elif code.name in ("BINGET", "LONG_BINGET"):
                last = texts.get(value, last)
            fresh = None
    return ""
