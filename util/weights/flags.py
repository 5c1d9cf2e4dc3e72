"""Flags of programs that read weights files, and what is to be done where a file says the same or another."""

import argparse

import models_vit
from util.cli.flags import add_verify_arg
from util.data.targets import Targets, targets_of
from util.errors import UserError
from util.files import shown, some
from util.processes.collectives import is_main_process, warn
from util.sizes import image_size
from util.weights.schema import comparable, in_words, said_settings, stored_settings

# Flags that are also entries of a checkpoint's `model_info`
FLAGS = ("model", "global_pool", "input_size", "patch_size", "in_chans", "nb_classes", "mean", "std")


def add_weights_args(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Flags of the weights file, and of what it may not say; `default`: without it, one must be named."""
    flag = parser.add_argument_group("model").add_argument
    # fmt: off
    flag("--resume", required=default is None, default=default, metavar="FILE|URL|FOLDER",
         help="a checkpoint, a released file, or the folder of a Hugging Face or timm model; its sizes come "
         "with it" + (" (default: a small model of painted pictures, to look at)" if default else ""))
    flag("--input_size", type=image_size, help="224, or 32x128 (height x width): for files that do not say "
         "it, or another size than that of training, with a warning")
    flag("--num_heads", type=int, help="only for files that do not say it: attention heads of the encoder")
    flag("--mean", type=float, nargs="+", help="only for files that do not say it; default: ImageNet's")
    flag("--std", type=float, nargs="+", help="only for files that do not say it; default: ImageNet's")
    flag("--pixel_range", type=float, nargs="+", metavar=("LOW HIGH", "LOW HIGH"),
         help="only for files that do not say it: black and white of images of more than 8 bits")
    # fmt: on
    add_verify_arg(flag)


def add_decoder_args(parser: argparse.ArgumentParser) -> None:
    """Flags of what a released file with a decoder may not say."""
    flag = parser.add_argument_group("model of a released file").add_argument
    flag("--norm_pix_loss", action="store_true", default=None,
         help="only for files that do not say it: the model predicts normalised patches")  # fmt: skip
    flag("--decoder_num_heads", type=int, help="only for files that do not say it")


def settle(name: str, given, stored, path: str, override: bool = False):
    """The value of the flag --`name`: what the file stores, else what was `given`, else None.

    Raises UserError where the two differ; with `override` what was given wins instead.
    """
    if given is None or stored is None or override:
        return stored if given is None else given
    if comparable(given) != comparable(stored):
        own, theirs = in_words(name, given), in_words(name, stored)
        raise UserError(f"--{name} {own}: {path} was trained with {theirs}; leave the flag out")
    return stored


def adopt_model_info(args: argparse.Namespace, info: dict, source: str, given: set[str]) -> None:
    """Sets the flags that the user did not give to what a checkpoint says; `given`: names of those that were.

    Raises:
        UserError: a flag that was given says something else than the checkpoint; a model of unknown name.
    """
    if info.get("model", args.model) not in models_vit.MODELS:
        names = ", ".join(models_vit.MODELS)
        raise UserError(
            f"{source}: is of a model '{shown(info['model'])}', which is not known here ({names})"
        )
    for name in FLAGS:
        stored, own = info.get(name), getattr(args, name, None)
        if stored is None:
            continue
        if name in given and own is not None and comparable(own) != comparable(stored):
            flag = "--global_pool/--cls_token" if name == "global_pool" else f"--{name}"
            own, theirs = in_words(name, own), in_words(name, stored)
            raise UserError(f"{flag}: {own} was given, but {source} was trained with {theirs}; leave the "
                            "flag out")  # fmt: skip
        setattr(args, name, tuple(stored) if isinstance(stored, list) else stored)


def stored_targets(content: dict, names: list[str], where: str) -> Targets:
    """What the outputs `names` of a checkpoint's model are; UserError where what it says cannot be."""
    found = stored_settings(content, where, "task", "thresholds", "target_mean", "target_std")
    return targets_of(found, names, where)


def warn_of_other_stats(args: argparse.Namespace, content: dict, source: str) -> None:
    """Warns where the encoder in a file was trained with other means, deviations or range than `args` has."""
    stored = said_settings(content)
    for name in ("mean", "std", "pixel_range"):
        theirs, own = stored.get(name), getattr(args, name, None)
        if theirs is not None and comparable(theirs) != comparable(own) and is_main_process():
            theirs, own = in_words(name, theirs), in_words(name, own)
            warn(f"{source} was trained with --{name} {theirs}, now it is {own}")


def check_class_names(
    info: dict, class_names: list[str], source: str, data_path, nb_classes_given: bool = False
) -> None:
    """Raises UserError when a checkpoint's classes are not those of the data set, in number or in name.

    Where it stores no names, `nb_classes_given` says that the data may have the first few of its classes.
    """
    stored, count = info.get("class_names"), info.get("nb_classes")
    if count is not None and len(class_names) > count:
        raise UserError(f"{source}: has {count} classes, but {data_path} has {len(class_names)}")
    if not stored and count is not None and len(class_names) < count and not nb_classes_given:
        raise UserError(
            f"{source}: has {count} classes without names, but {data_path} has {len(class_names)}, whose "
            f"labels would mean others; if they are the first {len(class_names)}, pass --nb_classes {count}"
        )
    if stored and list(stored) != list(class_names):
        differing = sorted(set(stored) ^ set(class_names)) or ["the order"]
        raise UserError(
            f"{source}: its {len(stored)} classes are not the {len(class_names)} of {data_path} "
            f"(differing: {some(differing)})"
        )
