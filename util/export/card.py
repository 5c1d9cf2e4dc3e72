"""The `README.md` beside an export: what the model is, how it was trained, how to load it."""

import json
from pathlib import Path, PurePath

import timm
import torch

from util.export.source import Source
from util.sizes import size_pair

# Settings of the machine, not of the training
_MACHINE = {
    "device", "dist_backend", "dist_eval", "dist_on_itp", "dist_timeout", "dist_url", "distributed", "given",
    "gpu", "job_dir", "keep_checkpoints", "knn_freq", "local_rank", "log_dir", "num_workers", "output_dir",
    "pin_mem", "print_freq", "rank", "resume", "save_freq", "save_minutes", "save_predictions", "start_epoch",
    "start_step", "vis_freq",
}  # fmt: skip


def read_metrics(path: str, epoch: int | None) -> dict:
    """The line of the `log.txt` beside a checkpoint for its epoch, or the last before it; {} without one.

    Args:
        path: the checkpoint.
        epoch: the last complete epoch in it; None: the log's last line.
    """
    found = {}
    log = Path(path).with_name("log.txt")
    if "://" in str(path) or not log.is_file():
        return {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line cut short by a full disk
        number = record.get("epoch") if isinstance(record, dict) else None
        if isinstance(number, int) and (epoch is None or number <= epoch):
            found = record
    return found


def make_card(source: Source, title: str, usage: str, differences: dict[str, float]) -> str:
    """Markdown with the front matter that model hubs read; the licence is left to who publishes it.

    Args:
        title: name of the target, in words.
        usage: code that loads the export.
        differences: what the check found.
    """
    info, content = source.info, source.content
    args = content.get("args") if isinstance(content.get("args"), dict) else {}
    task = "image-classification" if source.vit.num_classes else "image-feature-extraction"
    library = {"timm": "timm", "Hugging Face transformers": "transformers", "ONNX": "onnx"}.get(
        title, "pytorch"
    )
    name = info.get("model") or "vision transformer"
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n- masked-autoencoder\n- vit\n---",
        f"# {name}, {_WORDS[source.part]}",
        f"Exported for {title} from `{PurePath(source.path).name}` ({source.kind}). Masked autoencoder: "
        "[arXiv 2111.06377](https://arxiv.org/abs/2111.06377).",
        "## Load it",
        f"```python\n{usage}\n```",
        "## Model and images",
        _table(_model_rows(source)),
    ]
    if source.vit.num_classes and info.get("class_names"):
        parts += ["Classes, in the order of the outputs: " + ", ".join(map(str, info["class_names"])) + "."]
    parts += ["## Training data", _data_text(args)]
    parts += ["## Training arguments", _arguments_text(args)]
    parts += ["## Metrics", _metrics_text(source)]
    checks = {what: f"{value:.1e}" for what, value in differences.items()}
    parts += [
        "## Check",
        "Largest differences from the checkpoint on random images when this was written "
        f"(PyTorch {torch.__version__}, timm {timm.__version__}):",
        _table(checks),
        "## Licence",
        "To be filled in by who publishes this. The weights may be bound by the licences of the data and of "
        "the weights that the training started from.",
    ]
    return "\n\n".join(parts) + "\n"


_WORDS = {
    "full": "masked autoencoder (encoder and decoder)",
    "encoder": "encoder",
    "classifier": "classifier",
}


def _table(rows: dict) -> str:
    cells = {name: str(value).replace("|", "\\|").replace("\n", " ") for name, value in rows.items()}
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in cells.items())])


def _model_rows(source: Source) -> dict:
    info = source.info
    height, width = info["input_size"]
    rows = {
        "parameters": f"{sum(p.numel() for p in (source.mae or source.vit).parameters()) / 1e6:.1f} M",
        "encoder": f"{info['depth']} blocks, width {info['embed_dim']}, {info['num_heads']} heads",
    }
    if source.part == "full":
        rows["decoder"] = (
            f"{info['decoder_depth']} blocks, width {info['decoder_embed_dim']}, "
            f"{info['decoder_num_heads']} heads"
        )
        rows["predicts"] = (
            "patches normalised by their own mean and variance" if info["norm_pix_loss"] else "pixels"
        )
    if source.vit.num_classes:
        rows["classes"] = source.vit.num_classes
    pooling = "mean of the patch tokens, then the norm" if source.pooled else "class token, after the norm"
    rows |= {
        "pooling": pooling,
        "images": f"{height} x {width} pixels (height x width), {info['in_chans']} channels",
        "patches": f"{info['patch_size']} x {info['patch_size']} pixels",
        "mean": " ".join(f"{v:g}" for v in info["mean"]),
        "std": " ".join(f"{v:g}" for v in info["std"]),
    }
    return rows


def _data_text(args: dict) -> str:
    if "data_path" not in args:
        return "The checkpoint does not say."
    if not args["data_path"]:
        return "The built-in demo set of this code (drawn pictures)."
    return f"`{PurePath(str(args['data_path'])).name}` (the folder's or list's name; please describe it)."


def _arguments_text(args: dict) -> str:
    """What was set, a path by its last part only: where things lay concerns nobody."""
    rows = {}
    for name, value in sorted(args.items()):
        if name in _MACHINE or value is None or value == "":
            continue
        if isinstance(value, str) and ("/" in value or "\\" in value):
            value = PurePath(value.replace("\\", "/")).name
        if name == "input_size":
            value = "x".join(map(str, size_pair(value)))
        rows[name] = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return _table(rows) if rows else "The checkpoint does not say."


def _metrics_text(source: Source) -> str:
    epoch = source.content.get("epoch")
    record = read_metrics(source.path, epoch if isinstance(epoch, int) else None)
    if not record:
        return "There was no log.txt beside the checkpoint."
    rows = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in record.items() if k != "epoch"}
    return f"After epoch {record['epoch']} (counted from 0):\n\n{_table(rows)}"
