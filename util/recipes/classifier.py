"""What fine-tuning, linear probing and k-NN share: flags, the way to a checkpoint, classes, model.

The recipes themselves (optimizer, augmentation, head, epoch loop) stand in `main_finetune.py` and
`main_linprobe.py`.
"""

import argparse
from collections.abc import Collection

import torch

import models_vit
from util.cli.flags import at_least, check_flags, construct
from util.data.depth import adopt_pixel_range
from util.data.labelled import LabelledImages, check_classes, count_classes
from util.errors import UserError
from util.files import check_writable, printable
from util.processes.collectives import is_main_process, log, warn
from util.recipes.labels import add_label_args, adopt_targets, check_label_args, prepare_targets
from util.run.resume import Checkpoint, read_resume
from util.sizes import image_size
from util.weights.describe import read_model_info
from util.weights.encoder import LoadReport, encoder_state, has_encoder, load_into
from util.weights.files import read_file
from util.weights.flags import adopt_model_info, check_class_names, warn_of_other_stats
from util.weights.state import check_state, model_state, registers


def add_classifier_args(parser: argparse.ArgumentParser, global_pool: bool) -> None:
    """Flags of the classifier and its evaluation; `global_pool`: the default way of pooling."""
    flag = parser.add_argument_group("model").add_argument
    # fmt: off
    flag("--model", default="vit_large_patch16", choices=models_vit.MODELS, metavar="MODEL",
         help=f"one of {', '.join(models_vit.MODELS)}")
    flag("--input_size", default=224, type=image_size, help="pixels: 224, or 32x128 (height x width)")
    flag("--patch_size", type=at_least(1), help="default: the model's")
    flag("--finetune", default="", metavar="FILE|URL|FOLDER",
         help="weights to start from: a pre-training checkpoint, a released file, timm's or Hugging Face's")
    flag("--global_pool", action="store_true", help="classify the mean of the patch tokens")
    flag("--cls_token", action="store_false", dest="global_pool", help="classify the class token")
    flag("--nb_classes", type=at_least(1), help="default: as many as the data has")
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--eval", action="store_true", help="only evaluate the checkpoint given with --resume")
    flag("--split", default="val", choices=["val", "test"], help="the folder that --eval evaluates")
    flag("--dist_eval", action="store_true",
         help="accepted for old commands: evaluation is always spread over the processes, and exact")
    flag("--save_predictions", action="store_true",
         help="write predictions.csv (one line per validation image) to --output_dir")
    add_label_args(parser)
    parser.set_defaults(global_pool=global_pool)


def check_classifier_args(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises UserError for flags that cannot work, before anything is read or written."""
    check_flags(args, parser)
    check_label_args(args)
    if args.eval and (not args.resume or args.resume == "auto"):
        raise UserError("--eval needs the checkpoint to evaluate: --resume FILE")
    if getattr(args, "split", "val") != "val" and not args.eval:
        raise UserError(f"--split {args.split}: only with --eval; training chooses its best epoch by val")
    if args.save_predictions and not args.output_dir:
        raise UserError("--save_predictions: needs an --output_dir to write to")


def make_report_dir(folder: str) -> None:
    """Makes the folder of a result that is not a checkpoint; raises UserError unless it can be written."""
    if folder and is_main_process():
        check_writable("--output_dir", folder)


def resume_classifier(args: argparse.Namespace, recipe: str, given: set[str]) -> Checkpoint | None:
    """Reads what `--resume` names and takes the model's flags from it; None without one.

    Args:
        recipe: "finetune", "linprobe" or "segment", the script that calls.
        given: names of the flags on the command line.

    Raises UserError where one of those says something else than the checkpoint.
    """
    checkpoint = read_resume(args)
    if checkpoint is None:
        return None
    source, content, _ = checkpoint
    args.resume = source  # what "auto" has found stands in the log and in later checkpoints
    args.registers = registers(model_state(content, f"--resume {source}"))
    info = read_model_info(content, f"--resume {source}")
    if "recipe" not in info:
        state, kind = encoder_state(content, f"--resume {source}")
        advice = "; to start from its encoder, pass it with --finetune" if has_encoder(state) else ""
        raise UserError(f"--resume {source}: holds no classifier ({kind}){advice}")
    written_by = info["recipe"]
    if written_by != recipe:
        raise UserError(f"--resume {source}: was written by main_{written_by}.py; use that script")
    adopt_model_info(args, info, source, given)
    if hasattr(args, "labels"):  # masks are no such labels
        adopt_targets(args, info, source, given)
    return checkpoint


def prepare_classes(
    args: argparse.Namespace,
    train: LabelledImages | None,
    val: LabelledImages,
    checkpoint: Checkpoint | None,
    given: set[str],
) -> None:
    """Checks that the class lists of data and checkpoint agree, sets `args.nb_classes`, and makes the
    folder of an evaluation's predictions.
    """
    if train is not None:
        check_classes(train, val)
    prepare_targets(args, train, val, checkpoint)
    if checkpoint is not None:
        info = read_model_info(checkpoint.content, f"--resume {checkpoint.source}")
        check_class_names(info, val.classes, checkpoint.source, val.files.source, "nb_classes" in given)
    args.nb_classes = count_classes(args, val)
    if args.save_predictions and args.eval:
        make_report_dir(args.output_dir)


def build_classifier(args: argparse.Namespace, **extra) -> models_vit.VisionTransformer:
    """The named model with the sizes that the flags say; raises UserError for sizes that do not fit."""
    sizes = {name: getattr(args, name, None) for name in ("patch_size", "registers")}
    extra |= {name: value for name, value in sizes.items() if value}
    try:
        model = construct(
            models_vit.MODELS[args.model],
            img_size=args.input_size,
            in_chans=args.in_chans,
            num_classes=args.nb_classes,
            global_pool=args.global_pool,
            **extra,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--model {args.model}: {error}") from None
    own = model.patch_embed.patch_size[0]
    if args.patch_size not in (None, own):
        raise UserError(f"--patch_size {args.patch_size}: {args.model} always has {own}; leave the flag out")
    args.patch_size = own
    return model


def read_start(args: argparse.Namespace) -> dict | None:
    """The content of `--finetune FILE` for `start_from`, if any; `args` get its registers and pixel range."""
    if not getattr(args, "finetune", "") or getattr(args, "eval", False):
        return None
    content = _read(args)
    args.registers = registers(encoder_state(content, f"--finetune {args.finetune}")[0])
    if isinstance(getattr(args, "pixel_range", "auto"), str | list):  # not settled by --resume
        adopt_pixel_range(args, content, f"--finetune {args.finetune}", args.in_chans)
    return content


def _read(args: argparse.Namespace) -> dict:
    verify, key = not getattr(args, "no_verify", False), getattr(args, "weights_key", "")
    return read_file(args.finetune, "--finetune", verify, key)


def start_from(
    model: torch.nn.Module, args: argparse.Namespace, content: dict | None = None, asked: Collection[str] = ()
) -> LoadReport:
    """Loads the encoder of `--finetune FILE` (or its `content`, once read) and says what was taken. `asked`:
    names of the flags on the command line, to which the encoder is adapted (`load_into`).
    """
    if content is None:
        content = _read(args)
    report = load_into(model, args.finetune, content=content, asked=asked)
    log(str(report))
    warn_of_other_stats(args, content, args.finetune)
    return report


def load_for_eval(model: torch.nn.Module, checkpoint: Checkpoint, val_set) -> None:
    """Loads a checkpoint's weights into `model`, and says what evaluates them on which images; raises
    UserError, naming what differs, unless they fit."""
    source, content, _ = checkpoint
    state = model_state(content, f"--resume {source}")
    check_state(model, state, f"--resume {source}")
    model.load_state_dict(state)
    if not all(value.isfinite().all() for value in state.values() if value.is_floating_point()):
        warn(f"--resume {source}: has weights that are not finite")
    log(f"data: evaluation: {val_set.describe()}")
    log(f"evaluating {printable(source)}" + (f", epoch {content['epoch']}" if "epoch" in content else ""))


def set_trainable_blocks(model: torch.nn.Module, number: float | None) -> None:
    """Freezes all but the end of a `models_vit.VisionTransformer` (arXiv 2111.06377, section 4.3).

    Args:
        number: None trains everything; 0 the head only; 0.5 also the final norm and the last block's MLP with
            its norm; 1, 2, ... the final norm and that many last blocks.

    Raises:
        UserError: not such a number, or more blocks than there are.
    """
    if number is None:
        return
    depth = len(model.blocks)
    if number != 0.5 and number not in range(depth + 1):
        raise UserError(
            f"--trainable_blocks {number:g}: must be 0, 0.5 or a whole number up to the model's {depth}"
        )
    model.requires_grad_(False)
    parts = [model.head]
    if number:
        parts.append(model.fc_norm if model.global_pool else model.norm)
    if number == 0.5:
        parts += [model.blocks[-1].norm2, model.blocks[-1].mlp]
    elif number:
        parts += model.blocks[depth - int(number) :]
    for part in parts:
        part.requires_grad_(True)
    if number == depth:  # everything
        model.requires_grad_(True)
