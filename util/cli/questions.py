"""Flags that ask another question than the default's; `util.recipes.questions` makes it of the model."""

import argparse

from util.cli.flags import above, at_least
from util.errors import UserError

PIXELS, NO_PIXELS = ("pixels", "norm_pixels"), ("hog", "pca", "lowpass", "teacher")


def add_question_args(parser: argparse.ArgumentParser) -> None:
    """Crops, masks, targets, and a teacher."""
    flag = parser.add_argument_group("questions").add_argument
    # fmt: off
    flag("--crop_scale", default=[0.2, 1.0], nargs=2, type=float, metavar=("LOW", "HIGH"),
         help="share of an image's area in its random crop (default: 0.2 1)")
    flag("--mask", default="random", choices=["random", "block", "grid", "inverse_block", "file"],
         help="hides any patches, blocks, all but one of every 2x2, all but a block, or what a file says")
    flag("--mask_file", default="", metavar="FILE|DIR",
         help="of --mask file: a picture or .npy, white is hidden; or a folder with one for each image")
    flag("--visible_loss", default=0, type=at_least(0, float), metavar="W", help="weight of visible patches")
    flag("--target", choices=[*PIXELS, *NO_PIXELS],
         help="what is predicted of a patch (default: pixels; norm_pixels is --norm_pix_loss)")
    flag("--target_size", type=at_least(1), metavar="N", help="pca: components; lowpass: pixels a side")

    flag = parser.add_argument_group("teacher").add_argument
    flag("--teacher", default="", metavar="FILE", help="weights of a model whose encoder is imitated as well")
    flag("--teacher_loss", choices=["attention", "features"], help="what of it (default: attention)")
    flag("--teacher_weight", type=above(0), help="of the distance to it in the loss (default: 1)")
    flag("--teacher_block", type=at_least(1), help="the model's block that imitates (default: the last)")


def settle_target(args: argparse.Namespace) -> None:
    """Has `args.target` and `args.norm_pix_loss` say the same; raises UserError where they do not, and for
    crops that cannot be.
    """
    target = args.target or PIXELS[args.norm_pix_loss]
    if args.norm_pix_loss and target != "norm_pixels":
        raise UserError(f"--norm_pix_loss, --target {target}: two targets; give one of them")
    args.target, args.norm_pix_loss = target, target == "norm_pixels"
    low, high = args.crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"--crop_scale {low:g} {high:g}: must rise, above 0 and up to 1")


def asks(args: argparse.Namespace) -> bool:
    """Whether any of those flags asks for something."""
    other = args.mask != "random" or args.target not in PIXELS, args.mask_file, args.visible_loss
    taught = args.teacher, args.teacher_loss, args.teacher_weight, args.teacher_block
    return any((*other, args.target_size, *taught))
