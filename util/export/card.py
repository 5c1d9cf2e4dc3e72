"""The `README.md` beside an export: what the model is, how it was trained, how to load it."""

from pathlib import Path

import timm
import torch

from util.export.files import last_part, render
from util.export.source import Source
from util.files import shown
from util.report.folder import read_log
from util.run.recipe import GROUPS
from util.sizes import size_pair

# Settings of the machine, but those on which it depends what was trained on how many images
_MACHINE = {*GROUPS["machine"].split()} - {"world_size", "max_steps", "skip_nonfinite", "bad_images"}
_MACHINE |= {"dist_backend", "distributed", "given", "gpu", "job_dir", "rank", "start_step"}
PARTS = {
    "full": "masked autoencoder (encoder and decoder)",
    "encoder": "encoder",
    "classifier": "classifier",
    "segmenter": "classifier of pixels",
}


def read_metrics(path: str, epoch: int | None) -> dict:
    """The line of the `log.txt` beside a checkpoint for its epoch, or the last before it; {} without one.

    Args:
        path: the checkpoint.
        epoch: the last complete epoch in it; None: the log's last line.
    """
    log = Path(path).with_name("log.txt")
    if "://" in str(path) or not log.is_file():
        return {}
    records, *_ = read_log(log.read_text(encoding="utf-8", errors="replace").splitlines())
    return next((record for record in records[::-1] if epoch is None or record["epoch"] <= epoch), {})


def make_card(source: Source, title: str, library: str, usage: str, differences: dict[str, float]) -> str:
    """Markdown with the front matter that model hubs read; the licence is left to who publishes it.

    Args:
        title: name of the target, in words.
        library: what model hubs call it.
        usage: code that loads the export.
        differences: what the check found.
    """
    args, epoch = source.content.get("args"), source.content.get("epoch")
    args = args if isinstance(args, dict) else {}
    data = "" if args.get("data_path") is None else args["data_path"]
    metrics = read_metrics(source.path, epoch if isinstance(epoch, int) else None)
    metrics.pop("run", None)  # its id
    card = render(
        "card.md",
        source,
        title=title,
        library=library,
        usage=usage,
        part=PARTS[source.part],
        parameters=sum(p.numel() for p in (source.mae or source.vit).parameters()),
        data=_places(data) if "data_path" in args else None,
        arguments=_arguments(args),
        epoch=metrics.pop("epoch", None),
        metrics={name: f"{v:.6g}" if isinstance(v, float) else v for name, v in metrics.items()},
        differences={what: f"{value:.1e}" for what, value in differences.items()},
        torch=torch.__version__,
        timm=timm.__version__,
    )
    return card + "\n"


def _places(value) -> str:
    """The last part of a path, or of several."""
    return " and ".join(map(last_part, value if isinstance(value, list | tuple) else [value]))


def _arguments(args: dict) -> dict:
    """What was set, a path by its last part only."""
    rows = {}
    for name, value in sorted(args.items(), key=lambda item: str(item[0])):
        if name in _MACHINE or value is None or value == "":
            continue
        if name == "data_path" or (isinstance(value, str) and ("/" in value or "\\" in value)):
            value = _places(value)
        if name == "input_size" and isinstance(value, int | list | tuple):
            value = "x".join(map(shown, size_pair(value)))
        rows[name] = " ".join(map(shown, value)) if isinstance(value, list | tuple) else value
    return rows
