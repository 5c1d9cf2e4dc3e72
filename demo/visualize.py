"""Shows what a pre-trained model sees: original, masked, reconstruction, reconstruction + visible.

    python demo/visualize.py --resume out/checkpoint-399.pth photo.jpg
    python demo/visualize.py --resume out/checkpoint-399.pth DIR --rows 6 --mask_ratio 0.5 0.75 0.9
    python demo/visualize.py --resume out/checkpoint-399.pth photo.jpg --mask_file mask.png
    python demo/visualize.py --resume out/checkpoint-399.pth photo.jpg --attention
    python demo/visualize.py --resume mae_visualize_vit_large.pth photo.jpg --output large.png

Without images, some of the demo set are shown. The same command gives the same bytes. A row's mask depends on
--seed and the row's number; larger ratios hide what smaller ones hide, and more.

Models trained with --norm_pix_loss predict patches without brightness and contrast; both are taken from the
original patch to draw them, and the headings say so.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.cli.parser import ArgumentParser, run_script
from util.compute.precision import resolve_device
from util.data.depth import depth_of, view
from util.data.find import ImageFiles, PathList, find_images
from util.data.inputs import find_inputs
from util.data.read import BadImage
from util.data.transforms import normalize_batch
from util.demo_set.files import ensure_demo_data
from util.errors import UserError
from util.evaluate.output import check_output
from util.figures.attention import attention_grid
from util.figures.canvas import panel_layout, save_png
from util.figures.reconstruction import mask_noise, ratio_grid, read_mask
from util.files import printable
from util.processes.collectives import log, warn
from util.rng import fixed_noise, takes_noise
from util.weights.build import build
from util.weights.describe import WeightsFile
from util.weights.flags import add_decoder_args, add_weights_args
from util.weights.size import describe_file

DEMO_ROWS = 5  # when no image is named
MAX_PIXELS = 170_000_000  # of a picture: viewers (and Pillow) refuse larger ones


def ratio(text: str) -> float:
    """argparse type of a mask ratio."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number (name images before it)") from None


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser("MAE pictures", add_help=False)
    # fmt: off
    parser.add_argument("images", nargs="*", metavar="IMAGE|FOLDER",
                        help="image files, folders of images, .txt lists of images; default: the demo set")
    add_weights_args(parser)
    add_decoder_args(parser)
    flag = parser.add_argument_group("masking").add_argument
    flag("--mask_ratio", type=ratio, nargs="+", metavar="RATIO",
         help="share of patches to hide; several are drawn side by side (default: 0.75)")
    flag("--mask_file", metavar="PNG",
         help="a picture of what to hide, instead of --mask_ratio: white is hidden, black is seen; any size; "
              "cut like a photograph to the centre part that the model sees; a patch goes by its mean")
    flag("--seed", type=int, default=2, help="of the random masks")
    flag = parser.add_argument_group("pictures").add_argument
    flag("--output", default="reconstruction.png", metavar="FILE.png",
         help="picture to write; replaces one that is there")
    flag("--attention", action="store_true",
         help="also write FILE-attention.png: where the class token looks in the last block, per head, "
              "nothing hidden; for files without decoder only that")
    flag("--rows", type=int, metavar="N",
         help=f"draw N of the images, evenly spread (default: all, {DEMO_ROWS} of the demo set)")
    flag("--pages", default="first", choices=["first", "all"],
         help="of files with several pages or pictures: the first one is an image, or all are")
    flag("--bad_images", default="error", choices=["error", "skip"],
         help="a file that is no image: stop, or leave it out")
    flag("--device", default="auto", help="auto (cuda, else mps, else cpu) or a torch device")
    # fmt: on
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read."""
    if args.mask_file and args.mask_ratio:
        raise UserError("--mask_file and --mask_ratio: give one of them")
    args.mask_ratio = args.mask_ratio or [0.75]
    for ratio in args.mask_ratio:
        if not 0 < ratio < 1:
            raise UserError(f"--mask_ratio {ratio}: must lie between 0 and 1, both excluded")
    if args.rows is not None and args.rows < 1:
        raise UserError(f"--rows {args.rows}: must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: must lie between 0 and 2^63 - 1")
    if not args.output.lower().endswith(".png"):
        raise UserError(f"--output {args.output}: must end in .png")
    check_output("--output", args.output)


def choose_images(args: argparse.Namespace) -> tuple[list[str], Sequence[str]]:
    """(paths, names) of the pictures to draw."""
    if args.images:
        files, names = find_inputs(args.images, args.bad_images, args.pages)
        rows = args.rows or len(files.paths)
    else:
        files: ImageFiles = find_images(ensure_demo_data(log=log), "val")
        names, rows = PathList(map(files.paths.name, range(len(files.paths)))), args.rows or DEMO_ROWS
        log(f"no image given: showing {rows} of the demo set")
    indices = np.linspace(0, len(names) - 1, min(rows, len(names))).round().astype(int)
    return [files.paths[i] for i in indices], names.take(indices)


def read_images(
    paths: list[str], names: Sequence[str], weights: WeightsFile, skip: bool
) -> tuple[torch.Tensor, list[str]]:
    """Normalised images (N, C, H, W) on the CPU, cut as in pre-training's evaluation, and their labels."""
    depth, images, labels = depth_of(weights), [], []
    for path, name in zip(paths, names, strict=True):
        try:
            images.append(view(path, weights.input_size, weights.sizes["in_chans"], depth))
            labels.append(printable(name))
        except BadImage as error:
            if not skip:
                raise BadImage(
                    error.path, f"{error.reason}; leave it out, or pass --bad_images skip"
                ) from None
            warn(f"left out: {error}")
    if not images:
        raise UserError("no images: none of the files is readable")
    return normalize_batch(torch.stack(images), "cpu", weights.mean, weights.std), labels


def choose_masks(
    args: argparse.Namespace, rows: int, grid: tuple[int, int]
) -> list[tuple[str, torch.Tensor, float]]:
    """(title, noise (rows, L), mask ratio) of every masking; UserError for one that hides all or nothing."""
    length = grid[0] * grid[1]
    if args.mask_file:
        removed = read_mask(args.mask_file, grid)
        return [(f"{int(removed.sum())} of {length} patches masked", *mask_noise(removed, rows))]
    noise, masks = fixed_noise(rows, length, args.seed), []
    for ratio in args.mask_ratio:
        kept = int(length * (1 - ratio))
        if not 0 < kept < length:
            raise UserError(f"--mask_ratio {ratio}: keeps {kept or 'none'} of {length} patches")
        masks.append((f"{100 * ratio:g}% masked", noise, ratio))
    return masks


def check_size(rows: int, columns: int, input_size: tuple[int, int]) -> None:
    """Raises UserError for a picture that no viewer would open."""
    height, _, column_w, margin = panel_layout(*input_size)
    pixels = (rows * (height + margin // 2)) * (columns * (column_w + margin // 2))
    if pixels > MAX_PIXELS:
        most = rows * MAX_PIXELS // pixels
        raise UserError(
            f"{rows} rows: a picture of {pixels / 1e6:.0f} million pixels, which few viewers open; "
            f"pass --rows N, at most {most}"
        )


def write(picture: Image.Image, path: str) -> None:
    try:
        save_png(picture, path)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from None
    log(f"wrote {printable(path)} ({picture.width} x {picture.height} pixels)")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    device = resolve_device(args.device)
    parts = ["full", "encoder"] if args.attention else ["full"]
    weights = describe_file(args, *parts)
    attention_only = weights.part == "encoder"
    model = build(weights)
    for note in weights.notes:
        log(f"note: {printable(note)}")
    paths, names = choose_images(args)
    masks = choose_masks(args, len(paths), model.patch_embed.grid_size)
    heads = weights.sizes["num_heads"] if args.attention else 0
    check_size(len(paths), max(1 + 3 * len(masks), 2 + heads), weights.input_size)
    images, labels = read_images(paths, names, weights, args.bad_images == "skip")
    model, name = model.to(device), printable(os.path.basename(weights.path))

    if args.mask_file and not attention_only and not takes_noise(model):
        raise UserError(f"--mask_file: the model of {weights.path} draws its own masks; leave the flag out")
    if attention_only:
        log(
            f"{printable(weights.path)} holds no decoder ({printable(weights.kind)}): no reconstructions, "
            "attention only"
        )
    else:
        masks = [(title, noise[: len(images)], ratio) for title, noise, ratio in masks]
        how = f", {masks[0][0]}" if len(masks) == 1 else ""
        caption = f"{name}{how}" + ("" if args.mask_file else f", seed {args.seed}")
        write(ratio_grid(model, images, masks, weights.mean, weights.std, caption, labels), args.output)
    if args.attention:
        caption = f"{name}: attention of the class token, last block; brightest: each map's largest value"
        output = f"{args.output[:-4]}-attention{args.output[-4:]}"
        write(attention_grid(model, images, weights.mean, weights.std, caption, labels), output)


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
