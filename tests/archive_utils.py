"""Archives of a folder for tests, and a web server that serves parts of files, with faults on demand."""

import contextlib
import http.server
import io
import os
import re
import tarfile
import threading
import time
import zipfile
from pathlib import Path


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def make_tar(path: Path, folder: Path, names=None, wrapper: str = "", **more: bytes) -> Path:
    """A tar of files of `folder`, all or those named, and of further members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in files_of(folder) if names is None else names:
            tar.add(folder / name, wrapper + name)
        for name, content in more.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_zip(path: Path, folder: Path) -> Path:
    """A zip of a folder, every other file deflated."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(files_of(folder)):
            archive.write(folder / name, name, zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED)
    return path


def make_shards(place: Path, folder: Path, count: int = 4) -> Path:
    """Tars with every `count`-th file of a folder each."""
    for number in range(count):
        make_tar(place / f"{number:03d}.tar", folder, files_of(folder)[number::count])
    return place


def make_parquet(place: Path, folder: Path, rows_per_group: int = 5) -> Path:
    """Parquet files as Hugging Face writes an image folder: one for each split."""
    import json

    import pyarrow as pa
    from pyarrow import parquet

    place.mkdir()
    for split in sorted(os.listdir(folder)):
        names = files_of(folder / split)
        classes = sorted({name.split("/")[0] for name in names})
        images = [{"bytes": (folder / split / n).read_bytes(), "path": os.path.basename(n)} for n in names]
        labels = [classes.index(name.split("/")[0]) for name in names]
        table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
        features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        parquet.write_table(table, place / f"{split}-00000-of-00001.parquet", row_group_size=rows_per_group)
    return place


@contextlib.contextmanager
def serve(folder: Path, wait: float = 0.0):
    """A server on loopback; yields what holds its `address`, the `requests` so far (start, bytes), and
    `faults`: a list of functions of the handler that take the places of the next answers, "" for none."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(wait)
            if state.faults and (fault := state.faults.pop(0)):
                return fault(self)
            try:
                data = (folder / self.path.lstrip("/").split("?")[0]).read_bytes()
            except OSError:
                return self.send_error(404)
            start, stop = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            part = data[start : stop + 1]
            state.requests.append((start, len(part)))
            self.answer(part, f"bytes {start}-{start + len(part) - 1}/{len(data)}")

        def answer(self, part: bytes, content_range: str, length: int | None = None):
            self.send_response(206)
            self.send_header("Content-Range", content_range)
            self.send_header("Content-Length", str(len(part) if length is None else length))
            self.send_header("ETag", '"1"')
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *_):
            pass

    class State:
        requests, faults = [], []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = State()
    state.requests, state.faults = [], []
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
