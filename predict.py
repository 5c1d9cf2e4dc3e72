"""Says what is on pictures, or writes their features, or how badly they are reconstructed.

    python predict.py --resume tuned/checkpoint-best.pth photo.jpg DIR
    python predict.py --resume tuned/checkpoint-best.pth DIR --top_k 3 --csv predictions.csv
    python predict.py --resume out/checkpoint-399.pth DIR --features features.npz --feature_kind mean
    python predict.py --resume out/checkpoint-399.pth DIR --loss losses.csv --map maps

Classes, several labels or numbers come from any checkpoint of main_finetune.py or main_linprobe.py, classes
from released fine-tuned files too; features from any of our checkpoints, pre-training's as well, and from
released, timm's and Hugging Face's files.
Pictures are prepared as in the evaluation of the recipe, with the size and statistics stored in the file.
Nothing is masked, shuffled or augmented: the same images give the same bytes again, at any --batch_size and
--num_workers. Among other images, a picture's numbers agree to about 6 digits (float32 rounding).

The .npz holds `features`, float32 (n, D) or, for patches, (n, L, D); `files`; `feature_kind`; and `grid`, the
rows and columns of patches. With --layer they are of an inner block, through the norm of the last, and the
file says `layer`.

--loss, of files with a decoder, hides each patch of an image equally often (--masks, the same for all images)
and writes the mean reconstruction error of its patches when they are hidden, and the largest patch's: both
are anomaly scores. --map DIR adds a float32 .npy (rows, columns) for each image, named in the column `map`.
Here pictures are cut to the largest centred part of the model's shape.

Output files that exist are replaced when the new ones are complete. The table goes to stdout, everything else
that is printed to stderr.
"""

import argparse

from util.cli.flags import at_least, check_flags, inner_fraction, seed_number
from util.cli.parser import ArgumentParser, run_script
from util.cli.progress import progress_bar
from util.compute.precision import resolve_amp_dtype, resolve_device
from util.console import say
from util.data.inputs import find_inputs
from util.data.targets import Targets
from util.errors import TrainingError, UserError
from util.evaluate import output
from util.evaluate.anomaly import complementary_masks, image_losses, loss_loader, mask_count
from util.evaluate.predict import KINDS, predict, prediction_loader
from util.files import counted, printable, some
from util.processes.collectives import note, warn
from util.rng import takes_noise
from util.sizes import default_workers
from util.weights.build import build
from util.weights.describe import WeightsFile
from util.weights.flags import add_decoder_args, add_weights_args, stored_targets
from util.weights.size import describe_file


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser("MAE prediction", add_help=False)
    # fmt: off
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER",
                        help="image files, folders of images (to any depth), .txt lists of images")
    add_weights_args(parser)
    flag = parser.add_argument_group("classes").add_argument
    flag("--top_k", "--topk", type=at_least(1), metavar="K",
         help="classes per image (default: 5, or all there are)")
    flag("--csv", metavar="FILE", help="write them to FILE instead of printing a table")
    flag("--class_names", metavar="FILE",
         help="a text file of one name a line, for checkpoints that store none")
    flag = parser.add_argument_group("features").add_argument
    flag("--features", metavar="FILE.npz",
         help="write features; classes only come with them if --csv or --top_k is given too")
    flag("--feature_kind", choices=KINDS,
         help="mean of the patch tokens (default), class token (cls), or all patch tokens (patches), after "
              "the final norm; a classifier with global pooling has no norm for the last two")
    flag("--layer", type=at_least(1), metavar="N",
         help="of block N, counted from 1, instead of the last; through the same norm as the last block's")
    flag = parser.add_argument_group("losses").add_argument
    flag("--loss", metavar="FILE.csv",
         help="write how badly each image is reconstructed: the mean of its patches when they are hidden, "
              "and the largest; needs a file with a decoder")
    flag("--map", metavar="DIR", help="also write the loss of each patch: a .npy (rows, columns) per image, "
         "into a new folder")
    flag("--masks", type=at_least(2), metavar="M",
         help="complementary masks: each patch is hidden equally often (default: 4, or the least above it "
              "for which that is possible)")
    flag("--mask_ratio", type=inner_fraction,
         help="share of patches that a mask hides (default: that of training)")
    flag("--seed", type=seed_number, help="of the masks (default: 0)")
    add_decoder_args(parser)
    flag = parser.add_argument_group("run").add_argument
    flag("--batch_size", default=64, type=at_least(1), help="images per loader batch")
    flag("--num_workers", default=default_workers(), type=at_least(0),
         help="loader processes (default: one per core, at most 16)")
    flag("--pages", default="first", choices=["first", "all"],
         help="of files with several pages or pictures: the first one is an image, or all are")
    flag("--bad_images", default="error", choices=["error", "skip"],
         help="a file that is no image: stop, or leave it out")
    flag("--device", default="auto", help="auto (cuda, else mps, else cpu) or a torch device")
    flag("--amp_dtype", default="none", choices=["auto", "bf16", "fp16", "none"],
         help="mixed precision: faster on a GPU, but features to 2 or 3 digits only")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read."""
    check_flags(args, get_args_parser())
    if args.feature_kind and not args.features:
        raise UserError(f"--feature_kind {args.feature_kind}: needs --features FILE.npz")
    if args.layer and (not args.features or args.csv or args.top_k):
        raise UserError(f"--layer {args.layer}: needs --features FILE.npz, without --csv and --top_k, which "
                        "are of the last block")  # fmt: skip
    of_losses = ("map", "masks", "mask_ratio", "seed", "norm_pix_loss", "decoder_num_heads")
    others = ("csv", "top_k", "class_names", "features", "feature_kind") if args.loss else of_losses
    for name in others:
        if getattr(args, name) is not None:
            text = "writes nothing else; run once more for" if args.loss else "only goes with"
            first, last = ("--loss", f"--{name}") if args.loss else (f"--{name}", "--loss FILE.csv")
            raise UserError(f"{first}: {text} {last}")
    if args.map:
        output.check_new_folder("--map", args.map)
    if args.features and not args.features.endswith(".npz"):
        text = "an .npz archive all the same: numpy.load(...)['features']; better name it .npz"
        warn(f"--features {args.features}: becomes {text}")
    for flag in ("csv", "features", "loss"):
        if getattr(args, flag) is not None:
            output.check_output(f"--{flag}", getattr(args, flag), args.resume, *args.images)


def read_names(path: str, count: int) -> list[str]:
    """The `count` class names that a text file lists; raises UserError for another number of them."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--class_names {path}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    if len(names) != count:
        raise UserError(f"--class_names {path}: has {len(names)} lines, the checkpoint {count} classes")
    return names


def say_input(weights: WeightsFile, images: int, device) -> None:
    size = "x".join(map(str, weights.input_size))
    name = printable(weights.path)
    note(f"{name}: {printable(weights.kind)}, {size} pixels; {counted(images, 'image')}; {device}")


def say_left_out(dataset) -> None:
    if left_out := dataset.bad_paths():
        warn(f"could not decode {len(left_out)} of the images, which are left out: {some(left_out)}")


def write_all_losses(args: argparse.Namespace, device) -> None:
    """What --loss and --map ask for."""
    weights = describe_file(args, "full")
    model = build(weights)
    for text in weights.notes:
        note(f"note: {printable(text)}")
    if not takes_noise(model):
        raise UserError(f"--loss: the model of {args.resume} draws its own masks, so they cannot be chosen")
    ratio = weights.mask_ratio if args.mask_ratio is None else args.mask_ratio
    count = mask_count(ratio, args.masks)
    masks = complementary_masks(model.patch_embed.num_patches, count, ratio, args.seed or 0)
    files, _ = find_inputs(args.images, args.bad_images, args.pages)
    loader = loss_loader(files, weights, args, pin_memory=device.type == "cuda")
    say_input(weights, len(files.paths), device)
    hidden = count - round(count * (1 - ratio))
    note(f"{count} masks of {100 * ratio:g} % of the patches: each is hidden {hidden} times")
    progress = progress_bar(len(files.paths))
    model.to(device)
    rows, losses = image_losses(model, loader, device, masks, args.amp_dtype, progress, stats=weights)
    progress.close()
    say_left_out(loader.dataset)
    paths, maps = [files.paths[i] for i in rows], []
    if args.map:
        maps = output.write_maps(args.map, paths, losses, model.patch_embed.grid_size)
        grid = "x".join(map(str, model.patch_embed.grid_size))
        note(f"wrote {printable(args.map)}: {counted(len(maps), 'map')} of {grid} patches")
    output.write_losses(args.loss, paths, losses, maps)
    note(f"wrote {printable(args.loss)}: {counted(len(paths), 'image')}")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    device = resolve_device(args.device)
    resolve_amp_dtype(args.amp_dtype, device)
    if args.loss:
        return write_all_losses(args, device)
    wants_classes = not args.features or bool(args.csv or args.top_k)
    part = "classifier" if wants_classes else "encoder"
    weights = describe_file(args, part)
    model, names, name, targets = build(weights), [], printable(args.resume), Targets()
    if wants_classes:
        stored, count = weights.class_names or [], model.num_classes
        names = [*stored[:count], *(f"class {i}" for i in range(len(stored), count))]
        names = read_names(args.class_names, count) if args.class_names else names
        targets = stored_targets(weights.content, names, f"--resume {args.resume}")
        if targets.task != "class" and args.top_k:
            raise UserError(f"--top_k {args.top_k}: {args.resume} predicts {targets.task}, and all are given")
        args.top_k = min(5, len(names)) if args.top_k is None else args.top_k
        if args.top_k > len(names):
            raise UserError(f"--top_k {args.top_k}: {args.resume} has {counted(len(names), 'class')}")
    kind = (args.feature_kind or "mean") if args.features else None
    if kind in ("cls", "patches") and model.global_pool:
        note(f"note: {name} has a norm for the mean of its patches only: {kind} come without a norm")

    if args.layer:
        if args.layer > len(model.blocks):
            raise UserError(f"--layer {args.layer}: {args.resume} has {counted(len(model.blocks), 'block')}")
        model.blocks = model.blocks[: args.layer]

    files, _ = find_inputs(args.images, args.bad_images, args.pages)
    loader = prediction_loader(files, weights, args, pin_memory=device.type == "cuda")
    say_input(weights, len(files.paths), device)
    progress = progress_bar(len(files.paths))
    top_k = args.top_k if wants_classes else 0
    model.to(device)
    result = predict(model, loader, device, args.amp_dtype, top_k, kind, progress, weights, targets)
    progress.close()
    say_left_out(loader.dataset)
    paths = [files.paths[i] for i in result.rows]
    if args.features:
        output.write_features(args.features, paths, result, kind, model.patch_embed.grid_size, args.layer)
        note(f"wrote {printable(args.features)}: {kind} features {'x'.join(map(str, result.features.shape))}")
    if args.csv:
        output.write_csv(args.csv, paths, names, result, targets)
        note(f"wrote {printable(args.csv)}: {counted(len(paths), 'image')}")
    elif wants_classes and not say(output.table(paths, names, result, targets)):
        raise TrainingError("the table could not be written to stdout")


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
