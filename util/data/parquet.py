"""Images in Parquet files, in the layout of Hugging Face's data sets: a column of {bytes, path}, and a label.

They can only be read by row group, often hundreds of images, of which each process keeps some. Of larger sets
`--shuffle near` helps; who reads those for many epochs makes tars of them first (`tools/make_shards.py`).
"""

import functools
import json
import os
import threading
from collections.abc import Iterator

import numpy as np

from util.data.stores import Shard, open_shard
from util.errors import UserError
from util.files import printable

KEPT = 1 << 27  # bytes of images that a process keeps
_lock = threading.Lock()
_groups: dict[tuple, object] = {}  # of this process, by shard and number: the images of row groups


@functools.lru_cache(maxsize=64)
def _open(shard: Shard) -> tuple:
    """(pyarrow's file, name of the image column, of the label's or None, the row after each row group)."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{printable(shard.address)}: needs pyarrow: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(open_shard(shard))
    except pyarrow.ArrowInvalid as error:
        raise OSError(f"damaged or truncated ({str(error).splitlines()[0]})") from None
    schema = file.schema_arrow
    structs = [column for column in schema if pyarrow.types.is_struct(column.type)]
    images = [column.name for column in structs if column.type.get_field_index("bytes") >= 0]
    if not images:
        raise OSError(f"has no column of images (bytes and path); its columns: {', '.join(schema.names)}")
    label = next((name for name in ("label", "labels", "cls", "class") if name in schema.names), None)
    ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
    return file, images[0], label, ends


def parquet_rows(shard: Shard) -> Iterator[tuple[str | int | None, str]]:
    """(label, file name) of each row; raises OSError, and UserError without pyarrow."""
    file, image, label, _ = _open(shard)
    stored = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    names = (stored.get("info", {}).get("features", {}).get(label) or {}).get("names") or []
    if names != sorted(names):  # their order is that of the labels, and stays
        names = [f"{number:05d} {name}" for number, name in enumerate(names)]
    table = file.read([f"{image}.path", *([label] if label else [])], use_threads=False)
    paths = table.column(image).combine_chunks().field("path").to_pylist()
    labels = table.column(label).to_pylist() if label else [None] * len(paths)
    for row, (path, value) in enumerate(zip(paths, labels, strict=True)):
        known = isinstance(value, int) and 0 <= value < len(names)
        yield names[value] if known else value, os.path.basename(path) if path else f"{row:08d}.png"


def parquet_image(shard: Shard, row: int) -> bytes:
    """The bytes of a row's image; raises OSError."""
    with _lock:  # pyarrow's file is for one thread at a time
        ends = _open(shard)[3]
        group = int(np.searchsorted(ends, row, "right"))
        value = _row_group(shard, group)[row - (int(ends[group - 1]) if group else 0)].as_py()
    if value is None:
        raise OSError("a row without bytes: its image lies elsewhere")
    return value


def _row_group(shard: Shard, group: int):
    """A row group's images, kept as long as there is room; the one that was wanted longest ago goes first."""
    kept = _groups.pop((shard, group), None)
    if kept is None:
        file, image, *_ = _open(shard)
        table = file.read_row_group(group, [f"{image}.bytes"], use_threads=False)
        kept = table.column(image).combine_chunks().field("bytes")
        while len(_groups) > 1 and kept.nbytes + sum(other.nbytes for other in _groups.values()) > KEPT:
            del _groups[next(iter(_groups))]
    _groups[shard, group] = kept
    return kept
