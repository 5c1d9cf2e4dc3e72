"""The reconstruction pictures that training writes for a few fixed images with fixed masks."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from util.data.transforms import normalize_batch
from util.figures.canvas import save_png
from util.figures.reconstruction import evaluation_mode, ratio_panels
from util.processes.collectives import warn
from util.rng import fixed_masks


def pick_images(dataset: torch.utils.data.Dataset, count: int = 8, epoch: int = 0) -> torch.Tensor:
    """(n, C, H, W): n <= `count` images spread evenly over a data set, as it gives them in `epoch`."""
    indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    return torch.stack([dataset[(epoch, int(index))][0] for index in indices])


def write_pictures(
    model: torch.nn.Module,
    images: torch.Tensor,
    args: Namespace,
    epoch: int,
    val_loss: float | None,
    log_writer,
) -> Path | None:
    """Draws original, masked, reconstruction and reconstruction + visible after an epoch.

    Goes to `reconstruction-{epoch}.png` in `args.output_dir` and to TensorBoard. A picture that cannot be
    written is warned about; training goes on.

    Args:
        model: the bare model.
        images: (n, C, H, W) of `pick_images`.
        args: mask_ratio, mean, std, output_dir.
    """
    device = next(model.parameters()).device
    caption = f"epoch {epoch}, {args.mask_ratio:.0%} masked"
    if val_loss is not None:
        caption += f", held-out loss {val_loss:.4f}"
    normalized = normalize_batch(images, device, args.mean, args.std)
    with evaluation_mode(model):  # with --size_schedule it is of another size in training
        noise = fixed_masks(model, len(images), args.mask_ratio)
        if hasattr(model, "take_masks"):  # of `util.recipes.mask_folder`
            normalized, noise = model.take_masks(normalized, noise)
        panels = ratio_panels(model, normalized, [("", noise, args.mask_ratio)], args.mean, args.std)
        picture = panels.draw(caption)
    if log_writer is not None:
        x = int((epoch + 1) * 1000)
        log_writer.add_image("reconstruction", np.asarray(picture), x, dataformats="HWC")
    if not args.output_dir:
        return None
    path = Path(args.output_dir) / f"reconstruction-{epoch}.png"
    try:
        save_png(picture, path)
    except OSError as error:
        warn(f"{path}: not written: {error.strerror or error}")
        return None
    return path
