"""What the targets `torch_export` and `onnx` share: the model as a graph without Python."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from util.export.files import write_json
from util.export.source import Source

# The number of images is free; torch 2.6 makes a graph of one number only where there is no largest
FREE_BATCH = ({0: torch.export.Dim("batch", max=2**20)},)


class Graph(nn.Module):
    """The classifier, of images or of pixels, or the encoder with all its normed tokens (with global pooling:
    its features).

    Args:
        source: its `vit` is used, not copied.
    """

    def __init__(self, source: Source):
        super().__init__()
        self.vit = source.vit
        self.output = "logits" if source.vit.num_classes else "features" if source.pooled else "tokens"
        self.output = "pixel_logits" if source.part == "segmenter" else self.output

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W), normalised -> logits (N, classes), tokens (N, 1 + L, D), features (N, D), or
        of pixels logits (N, classes, H, W).
        """
        if self.output == "tokens":
            return self.vit.norm(self.vit.forward_tokens(images))
        return self.vit(images)  # features, where there is no head


def write_config(source: Source, folder: Path) -> None:
    """Writes `config.json`: what a program that runs the graph must know."""
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
        names = ("task", "thresholds", "target_mean", "target_std")
        config |= {name: info[name] for name in names if name in info}
    write_json(folder / "config.json", config)


def outputs(source: Source, model: Callable) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{what: (the graph's, the checkpoint's own)} at one and three images."""
    output, found = Graph(source).output, {}
    eager = {"tokens": source.tokens, "logits": source.logits, "features": source.vit.forward_features}
    eager["pixel_logits"] = source.vit
    for number in (1, 3):
        images = source.images(number)
        found[f"{output}, batch of {number}"] = model(images), eager[output](images)
    return found
