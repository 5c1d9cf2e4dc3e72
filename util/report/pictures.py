"""The pictures of a report: those that lie in a run's folder, and what its model makes of some images."""

import base64
import functools
import io
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from util.data.dataset import find_split
from util.data.inputs import views
from util.data.labelled import labelled_files
from util.data.segments import find_masked
from util.demo_set.files import demo_root
from util.errors import UserError
from util.figures.attention import attention_panels
from util.figures.features import neighbour_panels, pca_panels
from util.figures.reconstruction import evaluation_mode, ratio_panels
from util.files import printable
from util.report.folder import RunFolder
from util.rng import fixed_noise, masked_by
from util.weights.build import build
from util.weights.describe import WeightsFile, describe

ROWS, EXTREMES, NEIGHBOURS, HEADS = 6, 3, 5, 6
_FOUND = {"card.png": "Report card over depth", "segmentation.png": "Segmentation"}


def written(run: RunFolder, most: int) -> Iterator[tuple[str, Image.Image]]:
    """(title, picture) of what the run's scripts drew; of reconstructions the last or, where there is room
    for `most` of them, first, middle and last.
    """
    drawn = sorted(run.path.glob("reconstruction-*.png"), key=lambda path: (len(path.name), path.name))
    if most > 1:
        drawn = [*drawn[:1], *drawn[len(drawn) // 2 :][:1], *drawn[-1:]]
    paths = {path: f"Reconstructions after epoch {path.stem.split('-')[-1]}" for path in drawn[-most:]}
    paths |= {run.path / name: title for name, title in _FOUND.items()}
    if not (run.path / "predictions.csv").is_file():  # of which the page makes a table
        paths[run.path / "confusion.png"] = "Confusion"
    for path, title in paths.items():
        try:
            if path.is_file():
                yield title, Image.open(path).convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            run.notes.append(f"{path.name} cannot be read ({error}).")


def of_model(run: RunFolder, count: int, device: torch.device) -> Iterator[tuple[str, Image.Image]]:
    """(title, picture) of what the newest checkpoint makes of `count` held-out images, or training images
    where there are none; a note where it cannot be.
    """
    if run.checkpoint is None:
        run.notes.append("No pictures of features: no checkpoint in the folder can be read.")
        return
    try:
        settings = {str(name): value for name, value in run.settings.items()}
        weights = describe(run.content, run.checkpoint, Namespace(), "full", "encoder")
        model = build(weights).to(device)
        yield from _draw(model, weights, _images(Namespace(**settings)), count)
    except Exception as error:  # whatever a file says of itself or a device lacks: there is more on the page
        known = isinstance(error, UserError | OSError)
        run.notes.append(f"No more pictures of features: {error if known else repr(error)}")


def _images(args: Namespace):
    """The held-out images of a run, which are only looked at: what its flags name."""
    args.bad_images = "skip"
    if getattr(args, "data_path", None) is None:
        args.data_path = str(demo_root())  # as it is: it is not painted for a picture
    for split in ("val", "train"):
        if hasattr(args, "ignore_index"):  # of a segmentation
            files, _ = find_masked(split, args)
        else:
            files = labelled_files(split, args) if getattr(args, "labels", None) else find_split(args, split)
        if files is not None:
            return files
    raise UserError(f"{args.data_path}: holds no images")


def _draw(model, weights: WeightsFile, files, count: int) -> Iterator[tuple[str, Image.Image]]:
    total, mean, std = len(files.paths), weights.mean, weights.std
    pool = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()
    paths = [files.paths[i] for i in pool]
    read = functools.partial(views, paths, weights=weights, skip=True)
    few, shown = read(np.unique(np.linspace(0, len(paths) - 1, ROWS).round().astype(int)).tolist())
    if not shown:
        raise UserError(f"{files.source}: none of {ROWS} images can be read")
    labels = [printable(files.paths.name(pool[i])) for i in shown]
    if weights.part == "full":
        yield _extremes(model, weights, read, files, pool)
    panels = pca_panels(model, few, mean, std)
    yield "Principal components of patch features as colours", panels.draw(None, labels)
    if len(pool) > 1:
        panels = neighbour_panels(model, read, len(pool), shown, NEIGHBOURS, mean, std)
        yield f"Nearest neighbours among {len(pool)} images", panels.draw(None, labels)
    panels = attention_panels(model, few, mean, std)
    panels = panels._replace(headings=panels.headings[: 2 + HEADS], columns=panels.columns[: 2 + HEADS])
    yield "Attention of the class token, last block", panels.draw(None, labels)


@torch.no_grad()
def _extremes(model, weights: WeightsFile, read, files, pool: list[int]) -> tuple[str, Image.Image]:
    """The best and worst reconstructed images, by the model's own loss, each with the mask of its place."""
    losses, there, ratio = [], [], weights.mask_ratio
    device, length = next(model.parameters()).device, model.patch_embed.num_patches
    for start in range(0, len(pool), 32):
        images, kept = read(range(start, min(start + 32, len(pool))))
        if kept:
            images, noise = images.to(device), fixed_noise(kept, length, seed=0).to(device)
            with evaluation_mode(model):
                _, pred, mask = masked_by(noise, model, images, ratio)
            parts = zip(*(x.split(1) for x in (images, pred, mask)), strict=True)
            losses += [model.forward_loss(*part).item() for part in parts]
            there += kept
    order = np.argsort(losses, kind="stable")
    chosen = [*order[:EXTREMES], *order[EXTREMES:][-EXTREMES:]]
    images, numbers = read([there[i] for i in chosen])
    masks = [("", fixed_noise(numbers, length, seed=0), ratio)]
    panels = ratio_panels(model, images, masks, weights.mean, weights.std)
    labels = [f"{losses[i]:.4f} {printable(Path(files.paths.name(pool[there[i]])).name)}" for i in chosen]
    title = f"Best and worst reconstructed of {len(there)} images, with their losses"
    return title, panels.draw(None, labels)


def embed(picture: Image.Image, most: int) -> str:
    """A picture as a data address of about `most` bytes: JPEG, smaller and coarser where it must be."""
    for scale, quality in ((1, 88), (1, 75), (0.75, 75), (0.6, 70), (0.5, 60), (0.3, 50)):
        width = round(min(picture.width, 1400) * scale)
        small = picture.resize((width, max(1, round(picture.height * width / picture.width))))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality, subsampling=0)
        if buffer.tell() <= most * 3 // 4:
            break
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
