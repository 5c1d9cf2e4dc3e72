"""Shows what a pre-trained model sees: original, masked, reconstruction, reconstruction + visible.

    python demo/visualize.py --resume out/checkpoint-399.pth photo.jpg
    python demo/visualize.py --resume out/checkpoint-399.pth DIR --rows 6 --mask_ratio 0.5 0.75 0.9
    python demo/visualize.py --resume out/checkpoint-399.pth photo.jpg --mask_file mask.png
    python demo/visualize.py --resume out/checkpoint-399.pth photo.jpg --attention
    python demo/visualize.py --resume out/checkpoint-399.pth DIR --rows 6 --pca --neighbours
    python demo/visualize.py --resume out/checkpoint-399.pth photo.jpg --full_size tiles
    python demo/visualize.py

Without --resume it takes a small model of painted pictures (demo/shipped); without images, some of the demo
set. The same command gives the same bytes. A row's mask depends on --seed and the row's number; larger ratios
hide what smaller ones hide, and more.

Models trained with --norm_pix_loss predict patches without brightness and contrast; both are taken from the
original patch to draw them, and the headings say so.
"""

import argparse
import functools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.cli.flags import Bounded, at_least, check_flags
from util.cli.parser import ArgumentParser, run_script
from util.compute.precision import resolve_device
from util.data.depth import depth_of, make_reader
from util.data.find import ImageFiles, PathList, find_images
from util.data.inputs import find_inputs, views
from util.data.transforms import EvalTransform, normalize_batch
from util.demo_set.files import SHIPPED, ensure_demo_data
from util.errors import UserError
from util.evaluate.output import check_output
from util.figures import reconstruction
from util.figures.attention import attention_panels
from util.figures.canvas import Panels, panel_layout, save_png
from util.figures.features import neighbour_panels, pca_panels
from util.files import check_writable, printable
from util.processes.collectives import log
from util.rng import fixed_noise, takes_noise
from util.weights.build import build
from util.weights.describe import WeightsFile
from util.weights.flags import add_decoder_args, add_weights_args
from util.weights.size import at_size, describe_file

DEMO_ROWS = 5  # when no image is named
MOST_ROWS = 20  # when nobody says how many
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
    add_weights_args(parser, default=str(SHIPPED / "model.safetensors"))
    add_decoder_args(parser)
    flag = parser.add_argument_group("masking").add_argument
    flag("--mask_ratio", type=ratio, nargs="+", metavar="RATIO",
         help="share of patches to hide; several are drawn side by side (default: 0.75)")
    flag("--mask_file", metavar="PNG",
         help="a picture of what to hide, instead of --mask_ratio: white is hidden, black is seen; any size; "
              "cut like a photograph to the centre part that the model sees; a patch goes by its mean")
    flag("--seed", type=Bounded(int, range(2**63).__contains__, "lie between 0 and 2^63 - 1"), default=2,
         help="of the random masks")
    flag = parser.add_argument_group("pictures").add_argument
    flag("--output", default="reconstruction.png", metavar="FILE.png",
         help="picture to write; replaces one that is there")
    flag("--attention", action="store_true",
         help="also write FILE-attention.png: where the class token looks in the last block, per head, "
              "nothing hidden; for files without decoder only that, and the next two")
    flag("--pca", action="store_true",
         help="also write FILE-pca.png: three principal components of the patches' features as colours, of "
              "each image, of all, and of the foreground of all")
    flag("--foreground", type=Bounded(float, math.isfinite, "be finite"), default=0.0, metavar="T",
         help="of --pca: patches whose first component is more than T standard deviations above 0")
    flag("--neighbours", type=at_least(0), nargs="?", const=5, default=0, metavar="N",
         help="also write FILE-neighbours.png: of all images named, the N (default: 5) whose features are "
              "most like those of each that is drawn")
    flag("--full_size", choices=["tiles", "positions"],
         help="reconstruct each image at its own size, in a file of its own: tile by tile, each with a mask "
              "of its own, or as a whole with position tables of that size")
    flag("--save_images", metavar="DIR",
         help="also write each panel as a file of its own: NUMBER-NAME-PANEL.png")
    flag("--rows", type=at_least(1), metavar="N",
         help=f"draw N images, evenly spread (default: all up to {MOST_ROWS}, {DEMO_ROWS} of the demo set)")
    flag("--pages", default="first", choices=["first", "all"],
         help="of files with several pages or pictures: the first one is an image, or all are")
    flag("--bad_images", default="error", choices=["error", "skip"],
         help="a file that is no image: stop, or leave it out")
    flag("--device", default="auto", help="auto (cuda, else mps, else cpu) or a torch device")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read."""
    if args.mask_file and args.mask_ratio:
        raise UserError("--mask_file and --mask_ratio: give one of them")
    args.mask_ratio = args.mask_ratio or [0.75]
    for ratio in args.mask_ratio:
        if not 0 < ratio < 1:
            raise UserError(f"--mask_ratio {ratio}: must lie between 0 and 1, both excluded")
    if not args.output.lower().endswith(".png"):
        raise UserError(f"--output {args.output}: must end in .png")
    check_output("--output", args.output, *args.images, picture=True)
    check_flags(args, get_args_parser())
    if args.full_size and args.mask_file:
        raise UserError("--full_size and --mask_file: give one of them")
    if args.save_images:
        check_writable("--save_images", args.save_images)


def choose_images(args: argparse.Namespace) -> tuple[Sequence[str], Sequence[str], list[int]]:
    """(paths, names) of the images there are, and which of them to draw."""
    if not args.images and args.resume.startswith(str(SHIPPED)):
        args.images, args.rows = [str(SHIPPED / "samples")], args.rows or DEMO_ROWS
        log("no image given: the shipped model, and painted pictures that it has not seen")
    if args.images:
        files, names = find_inputs(args.images, args.bad_images, args.pages)
        if not args.rows and len(files.paths) > MOST_ROWS:
            log(f"drawing {MOST_ROWS} of {len(files.paths):,} images, evenly spread; --rows N draws more")
        rows = args.rows or MOST_ROWS
    else:
        files: ImageFiles = find_images(ensure_demo_data(log=log), "val")
        names, rows = PathList(map(files.paths.name, range(len(files.paths)))), args.rows or DEMO_ROWS
        log(f"no image given: showing {rows} of the demo set")
    chosen = np.linspace(0, len(names) - 1, min(rows, len(names))).round().astype(int)
    return files.paths, names, chosen.tolist()


def full_panels(model, weights: WeightsFile, path: str, args: argparse.Namespace) -> Panels:
    """The panels of one image at its own size."""
    channels, depth, mean, std = weights.sizes["in_chans"], depth_of(weights), weights.mean, weights.std
    pixels = make_reader(channels, depth)(path)
    check_size(1, 1 + 3 * len(args.mask_ratio), pixels.shape[:2])
    image = normalize_batch(EvalTransform(pixels.shape[:2], depth)(pixels)[None], "cpu", mean, std)[0]
    if args.full_size == "positions":
        size = reconstruction.padded_size(image.shape[1:], [weights.sizes["patch_size"]] * 2)
        model = build(at_size(weights, size)).to(next(model.parameters()).device)
    drawn = []
    for ratio in args.mask_ratio:
        panels = reconstruction.reconstruct_full(model, image, ratio, args.seed, mean, std)
        drawn.append((f"{100 * ratio:g}% masked", panels))
    return reconstruction.side_by_side(model, drawn)


def choose_masks(
    args: argparse.Namespace, rows: int, grid: tuple[int, int]
) -> list[tuple[str, torch.Tensor, float]]:
    """(title, noise (rows, L), mask ratio) of every masking; UserError for one that hides all or nothing."""
    length = grid[0] * grid[1]
    if args.mask_file:
        removed = reconstruction.read_mask(args.mask_file, grid)
        title = f"{int(removed.sum())} of {length} patches masked"
        return [(title, *reconstruction.mask_noise(removed, rows))]
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
        advice = f"pass --rows N, at most {most}" if most else "take fewer panels or a smaller image"
        raise UserError(
            f"{rows} rows: a picture of {pixels / 1e6:.0f} million pixels, which few viewers open; {advice}"
        )


def write(panels: Panels, caption: str, labels: list[str], output: str, args, first: int = 0) -> None:
    """Writes a picture of the panels and, with --save_images, each of them, rows numbered from `first`."""
    picture, place = panels.draw(caption, labels), f"--output {output}"
    try:
        save_png(picture, output)
        log(f"wrote {printable(output)} ({picture.width} x {picture.height} pixels)")
        if args.save_images:
            place = f"--save_images {args.save_images}"
            panels.save(args.save_images, labels, first)
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error.strerror or error})") from None


def main(args: argparse.Namespace) -> None:
    check_args(args)
    device = resolve_device(args.device)
    of_encoder = args.attention or args.pca or args.neighbours
    weights = describe_file(args, "full", *(["encoder"] if of_encoder else []))
    model = build(weights)
    for note in weights.notes:
        log(f"note: {printable(note)}")
    paths, names, indices = choose_images(args)
    if args.neighbours and len(paths) < 2:
        raise UserError(
            "--neighbours: needs several images; name a folder of them, and --rows how many to draw"
        )
    masks = choose_masks(args, len(indices), model.patch_embed.grid_size)
    heads, near = weights.sizes["num_heads"] * args.attention, min(args.neighbours, len(paths) - 1)
    widest = max(1 + 3 * len(masks), 2 + heads, 1 + near)
    if not args.full_size:
        check_size(len(indices), widest, weights.input_size)
    read = functools.partial(views, paths, weights=weights, skip=args.bad_images == "skip")
    images, indices = read(indices)
    if not indices:
        raise UserError("no images: none of the files is readable")
    labels = [printable(names[index]) for index in indices]
    model, name = model.to(device), printable(os.path.basename(weights.path))
    mean, std, (stem, end) = weights.mean, weights.std, os.path.splitext(args.output)

    if args.mask_file and weights.part == "full" and not takes_noise(model):
        raise UserError(f"--mask_file: the model of {weights.path} draws its own masks; leave the flag out")
    if weights.part == "encoder":
        kind = printable(weights.kind)
        log(f"{printable(weights.path)}: no decoder of pixels ({kind}), so features only, no reconstructions")
    elif args.full_size:
        how = f"{masks[0][0]}, " if len(masks) == 1 else ""
        caption = f"{name}, full size by {args.full_size}, {how}seed {args.seed}"
        for row, (index, label) in enumerate(zip(indices, labels, strict=True)):
            output = args.output if len(indices) == 1 else f"{stem}-{row}{end}"
            write(full_panels(model, weights, paths[index], args), caption, [label], output, args, row)
    else:
        masks = [(title, noise[: len(images)], ratio) for title, noise, ratio in masks]
        how = f", {masks[0][0]}" if len(masks) == 1 else ""
        caption = f"{name}{how}" + ("" if args.mask_file else f", seed {args.seed}")
        panels = reconstruction.ratio_panels(model, images, masks, mean, std)
        write(panels, caption, labels, args.output, args)
    if args.attention:
        caption = f"{name}: attention of the class token, last block; brightest: each map's largest value"
        panels = attention_panels(model, images, mean, std)
        write(panels, caption, labels, f"{stem}-attention{end}", args)
    if args.pca:
        caption = f"{name}: principal components of the patches' features, as red, green and blue"
        panels = pca_panels(model, images, mean, std, args.foreground)
        write(panels, caption, labels, f"{stem}-pca{end}", args)
    if args.neighbours:
        caption = f"{name}: nearest of {len(paths)} images, by the cosine of the means of patches' features"
        panels = neighbour_panels(model, read, len(paths), indices, args.neighbours, mean, std)
        write(panels, caption, labels, f"{stem}-neighbours{end}", args)


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
