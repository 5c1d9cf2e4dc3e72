"""An encoder or classifier as ONNX."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch

from util.export import graph
from util.export.files import render
from util.export.source import Source


def write(source: Source, folder: Path) -> None:
    """Writes `model.onnx` (and `model.onnx.data`, its weights), whose number of images is free."""
    model = graph.Graph(source).eval()
    logging.disable(logging.WARNING)
    # The exporter ignores `verbose` for some of its progress lines
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            model, (source.images(2),), folder / "model.onnx", dynamo=True, verbose=False,
            input_names=["images"], output_names=[model.output], dynamic_shapes=graph.FREE_BATCH,
        )  # fmt: skip
    logging.disable(logging.NOTSET)
    graph.write_config(source, folder)


def check(source: Source, path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Runs the graph with onnxruntime on the CPU at two numbers of images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    return graph.outputs(source, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]))


def usage(source: Source, folder: str) -> str:
    """Code that loads the export."""
    return render("onnx.py", source, folder=folder, output=graph.Graph(source).output)
