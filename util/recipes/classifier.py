"""What fine-tuning and linear probing share: flags, data, model, evaluation reports, best checkpoint.

The recipes themselves (optimizer, augmentation, head, epoch loop) stand in `main_finetune.py` and
`main_linprobe.py`.
"""

import argparse
import os
from pathlib import Path

import torch

import models_vit
from util.cli.flags import check_common_args
from util.data.labelled import LabelledImages, check_classes, count_classes
from util.data.loader import build_loader
from util.data.sampler import EpochSampler, EvalSampler
from util.errors import UserError
from util.evaluate.exact import closing_line, predict_samples, summarize
from util.evaluate.report import (
    MAX_CLASSES,
    confusion_matrix,
    draw_confusion,
    per_class_table,
    write_predictions,
)
from util.processes.collectives import get_rank, get_world_size, is_main_process, log, warn
from util.run.run_log import write_log
from util.sizes import image_size
from util.weights.describe import read_model_info
from util.weights.encoder import LoadReport, encoder_state, has_encoder, load_encoder
from util.weights.files import find_newest, load_checkpoint
from util.weights.flags import adopt_model_info, check_class_names, warn_of_other_stats
from util.weights.state import check_entries, check_state, model_state


def add_classifier_args(parser: argparse.ArgumentParser, global_pool: bool) -> None:
    """Flags of the classifier and its evaluation; `global_pool`: the default way of pooling."""
    flag = parser.add_argument_group("model").add_argument
    # fmt: off
    flag("--model", default="vit_large_patch16", choices=models_vit.MODELS, metavar="MODEL",
         help=f"one of {', '.join(models_vit.MODELS)}")
    flag("--input_size", default=224, type=image_size, help="pixels: 224, or 32x128 (height x width)")
    flag("--patch_size", type=int, help="default: the model's")
    flag("--finetune", default="", metavar="FILE|URL",
         help="weights to start from: a pre-training checkpoint, a released, timm or Hugging Face file")
    flag("--global_pool", action="store_true", help="classify the mean of the patch tokens")
    flag("--cls_token", action="store_false", dest="global_pool", help="classify the class token")
    flag("--nb_classes", default=None, type=int, help="default: as many as the data has")
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--eval", action="store_true", help="only evaluate the checkpoint given with --resume")
    flag("--dist_eval", action="store_true",
         help="accepted for old commands: evaluation is always spread over the processes, and exact")
    flag("--save_predictions", action="store_true",
         help="write predictions.csv (one line per validation image) to --output_dir")
    # fmt: on
    parser.set_defaults(global_pool=global_pool)


def check_classifier_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read or written."""
    check_common_args(args)
    if args.eval and (not args.resume or args.resume == "auto"):
        raise UserError("--eval needs the checkpoint to evaluate: --resume FILE")
    for flag in ("patch_size", "nb_classes"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: must be at least 1")
    if args.save_predictions and not args.output_dir:
        raise UserError("--save_predictions: needs an --output_dir to write to")
    if args.save_predictions and args.eval:
        make_report_dir(args.output_dir)


def make_report_dir(folder: str) -> None:
    """Makes the folder of a result that is not a checkpoint; raises UserError unless it can be written."""
    if not folder or not is_main_process():
        return
    probe = Path(folder) / f".write-test-{os.getpid()}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None


def read_resume(args: argparse.Namespace, recipe: str, parser: argparse.ArgumentParser) -> dict | None:
    """Reads what `--resume` names and takes the model's flags from it; returns its content, None without one.

    `--resume auto` becomes the newest checkpoint of the run, if there is any: it is checked like any other.

    Args:
        recipe: "finetune" or "linprobe", the script that calls.
        parser: its flags; tells what was given when `args` has no `given`, which is set then.

    Raises UserError where a flag on the command line says something else than the checkpoint.
    """
    if getattr(args, "given", None) is None:
        args.given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    newest = None
    if args.resume == "auto":
        newest = find_newest(args.output_dir) if args.output_dir else None
        args.resume = str(newest[0]) if newest else "auto"
    if not args.resume or args.resume == "auto":
        return None
    content = newest[1] if newest else load_checkpoint(args.resume, "--resume")
    check_entries(content, f"--resume {args.resume}")
    model_state(content, f"--resume {args.resume}")
    info = read_model_info(content)
    if "recipe" not in info:
        state, kind = encoder_state(content)
        advice = "; to start from its encoder, pass it with --finetune" if has_encoder(state) else ""
        raise UserError(f"--resume {args.resume}: holds no classifier ({kind}){advice}")
    written_by = info["recipe"]
    if written_by != recipe:
        raise UserError(f"--resume {args.resume}: was written by main_{written_by}.py; use that script")
    adopt_model_info(args, info, args.resume, set(args.given))
    stored = content.get("args") or {}
    if "optimizer" in content and not args.eval and "trainable_blocks" in stored:
        stored, own = stored["trainable_blocks"], getattr(args, "trainable_blocks", None)
        if stored != own:
            raise UserError(f"--trainable_blocks {own}: {args.resume} was trained with {stored}")
    return content


def prepare_classes(args, train: LabelledImages | None, val: LabelledImages, content: dict | None) -> None:
    """Checks that the class lists of data and checkpoint agree and sets `args.nb_classes`."""
    if train is not None:
        check_classes(train, val)
    if content is not None:
        info, given = read_model_info(content), "nb_classes" in args.given
        check_class_names(info, val.classes, args.resume, val.files.source, given)
    args.nb_classes = count_classes(args, val)


def train_loader(
    dataset: LabelledImages, args, pin_mem: bool
) -> tuple[torch.utils.data.DataLoader, EpochSampler]:
    """Loader of shuffled full batches and its sampler; raises UserError when no batch would be full."""
    sampler = EpochSampler(len(dataset), get_world_size(), get_rank(), args.seed, batch_size=args.batch_size)
    loader = build_loader(dataset, sampler, args.batch_size, args.num_workers, pin_mem, drop_last=True)
    if len(loader) == 0:
        raise UserError(
            f"--batch_size {args.batch_size}: {get_world_size()} x {args.batch_size} is more than the "
            f"{len(dataset)} training images, so that no batch would be full"
        )
    return loader, sampler


def eval_loader(
    dataset: LabelledImages, args, pin_mem: bool, epoch: int | None = None
) -> torch.utils.data.DataLoader:
    """Loader of this process's share of `dataset`, each sample once; `epoch`: that of its augmentation."""
    sampler = EvalSampler(len(dataset), get_world_size(), get_rank(), epoch)
    return build_loader(dataset, sampler, args.batch_size, args.num_workers, pin_mem)


def build_classifier(args: argparse.Namespace, **extra) -> models_vit.VisionTransformer:
    """The named model with the sizes that the flags say; raises UserError for sizes that do not fit."""
    if args.patch_size is not None:
        extra["patch_size"] = args.patch_size
    try:
        model = models_vit.MODELS[args.model](
            img_size=args.input_size,
            in_chans=args.in_chans,
            num_classes=args.nb_classes,
            global_pool=args.global_pool,
            **extra,
        )
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    args.patch_size = model.patch_embed.patch_size[0]
    return model


def start_from(model: torch.nn.Module, args: argparse.Namespace, content: dict | None = None) -> LoadReport:
    """Loads the encoder of `--finetune FILE` (or its `content`, once read) and says what was taken."""
    content = load_checkpoint(args.finetune, "--finetune") if content is None else content
    report = load_encoder(model, args.finetune, content=content)
    log(str(report))
    warn_of_other_stats(args, content, args.finetune)
    return report


def load_for_eval(model: torch.nn.Module, content: dict, source: str) -> None:
    """Loads a checkpoint's weights into `model`; raises UserError, naming what differs, unless they fit."""
    state = model_state(content, f"--resume {source}")
    check_state(model, state, f"--resume {source}")
    model.load_state_dict(state)
    if not all(value.isfinite().all() for value in state.values() if value.is_floating_point()):
        warn(f"--resume {source}: has weights that are not finite")
    log(f"evaluating {source}" + (f", epoch {content['epoch']}" if "epoch" in content else ""))


def evaluate_and_report(
    loader, model, device, args, dataset: LabelledImages, report: bool
) -> dict[str, float]:
    """Evaluates and prints the closing line; with `report` also what is known per class and per image.

    That is, in `args.output_dir`: for at most 100 classes a table (printed, and `per_class.txt`) and a
    picture (`confusion.png`); with `args.save_predictions` a `predictions.csv`.
    """
    predictions = predict_samples(loader, model, device, args)
    stats = summarize(predictions)
    if report and is_main_process():
        folder = Path(args.output_dir) if args.output_dir else None
        _write_reports(predictions, folder, args, dataset)
    log(closing_line(stats))
    return stats


def _write_reports(predictions, folder, args, dataset) -> None:
    names = list(dataset.classes)
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        if len(names) <= MAX_CLASSES:  # however many outputs the head has
            if predictions.top[:, 0].max() >= len(names):
                names.append("(other classes)")
            matrix = confusion_matrix(predictions, len(names))
            table = per_class_table(matrix, names)
            log(table)
            if folder is not None:
                (folder / "per_class.txt").write_text(
                    table + "\n", encoding="utf-8", errors="backslashreplace"
                )
                draw_confusion(matrix, names).save(folder / "confusion.png")
        if args.save_predictions:
            names = dataset.classes + [f"class {i}" for i in range(len(dataset.classes), args.nb_classes)]
            write_predictions(folder / "predictions.csv", predictions, dataset.files.paths, names)
            log(f"predictions: {folder / 'predictions.csv'}")
    except OSError as error:
        warn(f"{folder}: reports were not written: {error.strerror or error}")


def record_epoch(args, epoch: int, train: dict, test: dict, n_parameters: int, log_writer) -> None:
    """Appends the epoch's line to log.txt and writes the accuracies to TensorBoard."""
    record = {f"train_{name}": value for name, value in train.items()}
    record |= {f"test_{name}": value for name, value in test.items()}
    write_log(args.output_dir, {**record, "epoch": epoch, "n_parameters": n_parameters})
    if log_writer is not None:
        for name, value in test.items():
            log_writer.add_scalar(f"perf/test_{name}", value, epoch)
        log_writer.flush()


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
