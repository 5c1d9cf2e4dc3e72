"""An encoder or classifier as torch.export's program, `.pt2`."""

from pathlib import Path

import torch

from util.export import graph
from util.export.files import render
from util.export.source import Source


def write(source: Source, folder: Path) -> None:
    """Writes `model.pt2`, an ExportedProgram whose number of images is free, and `config.json`."""
    model = graph.Graph(source).eval()
    program = torch.export.export(model, (source.images(2),), dynamic_shapes=graph.FREE_BATCH)
    torch.export.save(program, folder / "model.pt2")
    graph.write_config(source, folder)


def check(source: Source, path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Loads the program and runs it at two numbers of images."""
    return graph.outputs(source, torch.export.load(path / "model.pt2").module())


def usage(source: Source, folder: str) -> str:
    """Code that loads the export."""
    return render("torch_export.py", source, folder=folder, output=graph.Graph(source).output)
