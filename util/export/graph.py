"""An encoder or classifier as a graph without Python: torch.export's `.pt2`, and ONNX."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from util.export.files import write_json
from util.export.source import Source

# The number of images; torch 2.6 makes a graph of one number only where there is no largest
_BATCH = torch.export.Dim("batch", max=2**20)


class Graph(nn.Module):
    """The classifier, or the encoder with all its normed tokens (with global pooling: its features).

    Args:
        source: its `vit` is used, not copied.
    """

    def __init__(self, source: Source):
        super().__init__()
        self.vit = source.vit
        self.output = "logits" if source.vit.num_classes else "features" if source.pooled else "tokens"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W), normalised -> logits (N, classes), tokens (N, 1 + L, D) or features (N, D)."""
        if self.output == "tokens":
            return self.vit.norm(self.vit.forward_tokens(images))
        return self.vit(images)  # features, where there is no head


def write_torch_export(source: Source, folder: Path) -> None:
    """Writes `model.pt2`, an ExportedProgram whose number of images is free, and `config.json`."""
    with torch.no_grad():
        program = torch.export.export(
            Graph(source).eval(), (source.images(2),), dynamic_shapes=({0: _BATCH},)
        )
    torch.export.save(program, folder / "model.pt2")
    write_json(folder / "config.json", graph_config(source))


def write_onnx(source: Source, folder: Path) -> None:
    """Writes `model.onnx` (and `model.onnx.data`, its weights), whose number of images is free."""
    graph = Graph(source).eval()
    with torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph, (source.images(2),), folder / "model.onnx", dynamo=True, verbose=False,
            input_names=["images"], output_names=[graph.output],
            dynamic_shapes=({0: _BATCH},),
        )  # fmt: skip
    write_json(folder / "config.json", graph_config(source))


@contextlib.contextmanager
def _quiet():
    """No progress lines of the exporter, which ignores `verbose` for some."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            yield
    finally:
        logging.disable(level)


def graph_config(source: Source) -> dict:
    """What a program that runs the graph must know."""
    info = source.info
    config = {
        "input": "images",
        "output": Graph(source).output,
        "shape": [None, info["in_chans"], *info["input_size"]],
        "mean": list(info["mean"]),
        "std": list(info["std"]),
    }
    if source.vit.num_classes:
        config["class_names"] = info.get("class_names")
    return config


@torch.no_grad()
def check_torch_export(source: Source, folder: Path) -> dict[str, float]:
    """Loads the program and compares it at two numbers of images."""
    model = torch.export.load(folder / "model.pt2").module()
    return _compare(source, model)


def _compare(source: Source, model: Callable) -> dict[str, float]:
    """Largest differences from the checkpoint's own model at one and three images."""
    output, differences = Graph(source).output, {}
    eager = {"tokens": source.tokens, "logits": source.logits, "features": source.vit.forward_features}[
        output
    ]
    for number in (1, 3):
        images = source.images(number)
        differences[f"{output}, batch of {number}"] = (model(images) - eager(images)).abs().max().item()
    return differences


@torch.no_grad()
def check_onnx(source: Source, folder: Path) -> dict[str, float]:
    """Runs the graph with onnxruntime on the CPU and compares it at two numbers of images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return _compare(source, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))


def torch_export_usage(source: Source, folder: str) -> str:
    """Code that loads the export."""
    shape = ", ".join(map(str, (source.info["in_chans"], *source.info["input_size"])))
    lines = [
        "import torch",
        "",
        f'model = torch.export.load("{folder}/model.pt2").module()',
        f"images = torch.randn(2, {shape})  # normalised with the checkpoint's mean and std",
        f"{Graph(source).output} = model(images)",
    ]
    return "\n".join(lines)


def onnx_usage(source: Source, folder: str) -> str:
    """Code that loads the export."""
    shape = ", ".join(map(str, (source.info["in_chans"], *source.info["input_size"])))
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{folder}/model.onnx", providers=["CPUExecutionProvider"])',
        f"images = np.random.randn(2, {shape}).astype(np.float32)  # normalised images",
        f'({Graph(source).output},) = session.run(None, {{"images": images}})',
    ]
    return "\n".join(lines)
