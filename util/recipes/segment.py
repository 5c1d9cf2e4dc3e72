"""What segmentation does beside its loop: the model, evaluation, what ends an epoch."""

import argparse
import colorsys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from models_seg import SegmentationTransformer
from util.data.depth import depth_of
from util.data.loader import build_loader
from util.data.sampler import EvalSampler
from util.data.segments import CropBoth, SegmentedImages
from util.data.transforms import normalize_batch
from util.errors import UserError
from util.evaluate import segments
from util.figures.canvas import as_pictures, draw_grid, save_png
from util.files import printable, replacing
from util.processes.collectives import get_rank, get_world_size, is_main_process, log, warn
from util.recipes.classifier import build_classifier
from util.recipes.epoch_end import ClassifierEpochEnd
from util.run.run_log import write_log

SHOWN, SIDE = 6, 160  # pictures of the overlay figure, and their side in pixels
MAX_CLASSES = 256  # of the table


class PixelLoss(nn.Module):
    """Cross entropy, the mean over the pixels of a class (number K is none); 0 where there are none.

    weight: (K,), of the pixels of each class in that mean, if they do not count alike.
    """

    def __init__(self, weight: torch.Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, H, W) and masks int64 (N, H, W) -> a number."""
        ignore = logits.shape[1]
        total = F.cross_entropy(logits, masks, self.weight, ignore_index=ignore, reduction="sum")
        if self.weight is None:
            return total / (masks != ignore).sum().clamp(min=1)
        weights = F.pad(self.weight, (0, 1))[masks].sum()
        return total / weights.clamp(min=torch.finfo(weights.dtype).tiny)


def pixel_weights(pixels: dict[int, int], args: argparse.Namespace) -> torch.Tensor | None:
    """`--class_weight`: (K,) from the number of pixels of each class; None without it."""
    if not args.class_weight:
        return None
    counts = torch.tensor([pixels.get(label, 0) for label in range(args.nb_classes)], dtype=torch.float64)
    weights = counts.sum() / counts.clamp(min=1) / (counts > 0).sum()  # scikit-learn's "balanced"
    return torch.where(counts > 0, weights, 0).float()


def build_segmenter(args: argparse.Namespace, **extra) -> SegmentationTransformer:
    """The named model with a head for pixels; sets `args.patch_size`. UserError for sizes that do not fit."""
    head = "upsample" if args.mode == "finetune" else "linear"
    args.global_pool = False
    return build_classifier(args, make=SegmentationTransformer, head=head, num_layers=args.layers, **extra)


def adopt_head(args: argparse.Namespace, content: dict, source: str, given: set[str]) -> list[str]:
    """Takes what is this script's own from the settings in a checkpoint; UserError where a flag differs.
    Returns the names of its classes.
    """
    stored = content.get("args") if isinstance(content.get("args"), dict) else {}
    for name, kind in (("mode", str), ("layers", int), ("ignore_index", int)):
        theirs, own = stored.get(name), getattr(args, name)
        if not isinstance(theirs, kind):
            continue
        if name in given and own != theirs:
            raise UserError(f"--{name} {own}: {source} was trained with {theirs}; leave the flag out")
        setattr(args, name, theirs)
    if "short_side" not in given and isinstance(stored.get("short_side"), int):
        args.short_side = stored["short_side"]  # another is another way to evaluate the same model
    return content["model_info"].get("class_names") or []


def whole_images(dataset: SegmentedImages, args, pin_memory: bool = False) -> DataLoader:
    """This process's share of an evaluation, one image at a time, as their sizes differ."""
    sampler = EvalSampler(len(dataset), get_world_size(), get_rank())
    return build_loader(dataset, sampler, 1, args.num_workers, pin_memory)


def evaluate_masks(loader, predict, args, device, names: list[str], report: bool) -> dict[str, float]:
    """Figures of all pixels, printed; with `report` also the table per class and overlays, in the folder."""
    matrix = segments.count_pixels(loader, predict, args.input_size, len(names), device, args)
    if not matrix.sum():
        raise UserError(f"--data_path {printable(args.data_path)}: no pixel of the masks is of a class")
    stats = segments.summarize_pixels(matrix)
    if report and is_main_process():
        table = ""
        if len(names) <= MAX_CLASSES:
            table = segments.pixel_table(matrix, [printable(name) for name in names])
        log(table or f"{len(names)} classes: no table")
        if args.output_dir:
            _write_reports(Path(args.output_dir), table, loader.dataset, predict, args, device)
    log(f"* mIoU {stats['miou']:.3f} mAcc {stats['macc']:.3f} pixel acc {stats['pixel_acc']:.3f}")
    return stats


def _write_reports(folder: Path, table: str, dataset, predict, args, device) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "per_class.txt") as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
        save_png(draw_overlays(dataset, predict, args, device), folder / "segmentation.png")
    except OSError as error:
        warn(f"{printable(folder)}: reports were not written: {error.strerror or error}")


def segment_by_neighbours(args, train_set, val_set, names: list[str], model, device) -> dict[str, float]:
    """Segments by the nearest patches of training images, one crop of each: no training, one evaluation."""
    train_set.transform = CropBoth(args.input_size, depth_of(args))
    loader = build_loader(train_set, EvalSampler(len(train_set)), segments.GROUP, args.num_workers)
    bank = segments.make_bank(loader, model, len(names), device, args)
    log(f"bank: {len(bank[0]):,} patches of {len(train_set):,} images")
    predict = segments.neighbours(model, *bank, len(names))
    stats = evaluate_masks(whole_images(val_set, args), predict, args, device, names, report=True)
    write_log(args.output_dir, {f"test_{name}": value for name, value in stats.items()})
    return stats


def colours(count: int) -> torch.Tensor:
    """(count + 1, 3) in [0, 1]: a colour for each class, dark grey for the first, and white for no class."""
    hues = [colorsys.hsv_to_rgb(i * 0.61803 % 1, 0.75, 0.95) for i in range(count - 1)]
    return torch.tensor([(0.2, 0.2, 0.2), *hues, (1, 1, 1)])


@torch.no_grad()
def draw_overlays(dataset: SegmentedImages, predict, args, device):
    """A few images, the middle square of each, with their masks and the predictions over them."""
    palette, columns = colours(dataset.num_classes), ([], [], [])
    for index in np.unique(np.linspace(0, len(dataset) - 1, SHOWN).astype(int)):
        image, mask, _ = dataset[int(index)]
        image = normalize_batch(image[None], device, args.mean, args.std)[0]
        size = tuple(mask.shape)
        found = segments.segment(predict, image, args.input_size, size).argmax(0).cpu()
        shown = F.interpolate(as_pictures(image[None], args.mean, args.std), size, mode="bilinear")[0]
        shown = shown[:3] if len(shown) >= 3 else shown[:1].expand(3, -1, -1)
        short = min(size)
        y, x = (size[0] - short) // 2, (size[1] - short) // 2
        over = [shown, *(0.35 * shown + 0.65 * palette[m].permute(2, 0, 1) for m in (mask, found))]
        for column, picture in zip(columns, over, strict=True):
            square = picture[None, :, y : y + short, x : x + short]
            column.append(F.interpolate(square, (SIDE, SIDE), mode="nearest-exact")[0])
    headings = ("image", "mask (white: ignored)", "prediction")
    return draw_grid(headings, [torch.stack(column) for column in columns])


@dataclass
class SegmentationEpochEnd(ClassifierEpochEnd):
    """As of a classifier, by mIoU. val_loader: of `whole_images`. names: of the classes."""

    names: list[str]

    def evaluate(self, model: torch.nn.Module, report: bool) -> dict[str, float]:
        training = model.training
        predict = segments.probabilities(model.eval(), self.device, self.args)
        test = evaluate_masks(self.val_loader, predict, self.args, self.device, self.names, report)
        model.train(training)
        return test

    def judge(self, test: dict[str, float]) -> tuple[bool, str]:
        state = self.state
        is_best, state.best_acc1 = test["miou"] > state.best_acc1, max(state.best_acc1, test["miou"])
        return is_best, f"best mIoU so far: {state.best_acc1:.3f} %"
