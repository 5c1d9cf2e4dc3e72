"""Flags of labels as they are (`--labels`), what is checked before the first step, and the losses."""

import argparse
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup

from util.cli.flags import at_least, pixel_value
from util.data.labelled import LabelledImages, labelled_images
from util.data.targets import TASKS, targets_of
from util.errors import UserError
from util.evaluate.metrics import METRICS, best_metric, measures_all, require_sklearn, undefined
from util.files import some
from util.processes.collectives import is_main_process, warn
from util.run.resume import Checkpoint
from util.weights.describe import make_model_info, read_model_info


def add_label_args(parser: argparse.ArgumentParser, trains: bool = True) -> None:
    """Flags of the table of labels; `trains`: also those of a loss and of the best checkpoint."""
    flag = parser.add_argument_group("labels").add_argument
    # fmt: off
    flag("--labels", metavar="FILE.csv",
         help="labels of the images: a column 'path', one or more of labels, perhaps 'split' and 'group' "
              "(default: class folders)")
    flag("--label_columns", nargs="+", metavar="NAME", help="(default: all others)")
    flag("--task", default="auto", choices=["auto", *TASKS],
         help="one class, several labels (0 or 1), or numbers (default: what the columns look like)")
    flag("--group_column", metavar="NAME", help="images of a group never lie in two folds (default: 'group')")
    flag("--folds", default=0, type=at_least(0), metavar="K", help="cross-validation with K folds (0: none)")
    flag("--fold", default=0, type=at_least(0), metavar="I", help="number of the fold that is val, from 0")
    flag("--thresholds", default=None, nargs="+", type=pixel_value, metavar="P",
         help="of several labels: probability from which each is there, one or one for each (default: 0.5), "
              "or auto: that of the best F1 on a fifth of train, which is held out of training")
    if not trains:
        return
    flag("--best", choices=["acc1", "loss", *METRICS["class"], *METRICS["numbers"]], metavar="METRIC",
         help="what checkpoint-best.pth is best in (default: acc1, of labels auroc, of numbers r2); given, "
              "all metrics are computed for class folders too")
    flag("--class_weight", choices=["balanced"], help="rare classes and labels count as much as others")


def check_label_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags of labels that cannot work, before anything is read."""
    if not args.labels:
        for name in ("label_columns", "group_column", "folds", "thresholds"):
            if getattr(args, name):
                raise UserError(f"--{name}: needs --labels FILE.csv")
        if args.task not in ("auto", "class"):
            raise UserError(f"--task {args.task}: needs --labels FILE.csv")
    if args.folds == 1 or (args.folds and args.fold >= args.folds) or (args.fold and not args.folds):
        raise UserError(
            f"--fold {args.fold} --folds {args.folds}: take --folds of 2 or more, and a --fold below"
        )
    if args.folds and getattr(args, "split", "val") == "test":
        raise UserError("--folds: divides train and val; --split test is none of them")
    trains = hasattr(args, "best") and not getattr(args, "eval", False)
    if "auto" in (args.thresholds or ()) and (len(args.thresholds) > 1 or not trains):
        raise UserError("--thresholds auto: stands alone, and thresholds are chosen while a model is trained")
    if bad := [value for value in args.thresholds or () if value != "auto" and not 0 < value < 1]:
        raise UserError(f"--thresholds {bad[0]}: must lie between 0 and 1, both excluded")
    if measures_all(args):
        require_sklearn("--labels" if args.labels else f"--best {args.best}")


def adopt_targets(args: argparse.Namespace, info: dict, source: str, given: set[str]) -> None:
    """Takes task, columns and thresholds of a checkpoint's `model_info` where they were not given; UserError
    where its labels cannot be those of class folders, or a flag says otherwise.
    """
    stored = targets_of(info, info.get("class_names") or [], f"--resume {source}")
    if stored.task != "class" and not args.labels:
        raise UserError(
            f"--resume {source}: predicts {stored.task} ({some(stored.names)}); pass --labels FILE.csv"
        )
    if "task" in given and args.task not in ("auto", stored.task):
        raise UserError(f"--task {args.task}: {source} was trained with {stored.task}; leave the flag out")
    args.task = stored.task if args.labels else args.task
    if stored.task != "class" and not args.label_columns:
        args.label_columns = list(stored.names)
    if stored.task == "labels" and "thresholds" not in given:
        args.thresholds = stored.thresholds


def prepare_targets(
    args: argparse.Namespace,
    train: LabelledImages | None,
    val: LabelledImages,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Settles what the model's outputs mean: the classes of an evaluation are the checkpoint's, numbers are
    standardised as it says, else by `train`.

    Raises UserError for a metric that the task has not, or that validation leaves undefined.
    """
    targets, task = val.targets, val.targets.task
    info = {} if checkpoint is None else read_model_info(checkpoint.content, f"--resume {checkpoint.source}")
    names = info.get("class_names") or []
    if getattr(args, "eval", False) and args.labels and task == "class" and set(val.classes) <= set(names):
        places = np.array([names.index(name) for name in val.classes], np.int32)
        val.files.labels = places[val.files.labels]
        val.files.classes = targets.names = list(names)
    if task == "numbers":
        stored = targets_of(info if "target_mean" in info else {}, val.classes)
        if "target_mean" not in info and train is not None:
            stored.mean, stored.std = (f(train.files.labels, axis=0).tolist() for f in (np.mean, np.std))
        targets.mean, targets.std = stored.mean, stored.std
    if task != "class" and getattr(args, "nb_classes", None) not in (None, len(targets.names)):
        raise UserError(
            f"--nb_classes {args.nb_classes}: there are {len(targets.names)} {task}; leave it out"
        )
    if task == "labels":
        auto = args.thresholds == ["auto"]
        given = (info.get("thresholds") if auto else args.thresholds) or [0.5]
        if len(given) not in (1, len(targets.names)):
            raise UserError(
                f"--thresholds: {len(given)} values for {len(targets.names)} labels; pass one, or one each"
            )
        targets.thresholds = given * len(targets.names) if len(given) == 1 else given
        args.thresholds = ["auto"] if auto else targets.thresholds
    elif args.thresholds:
        raise UserError(f"--thresholds: are of several labels, and these are {targets.words}; leave it out")
    if args.labels:  # as a run that is resumed finds them
        args.task, args.label_columns = task, args.label_columns if task == "class" else targets.names
    if train is not None and hasattr(train.files, "targets"):
        train.files.targets = targets
    if measures_all(args):
        _check_metric(args, val, train is not None)


def _check_metric(args: argparse.Namespace, val: LabelledImages, trains: bool) -> None:
    task, metric = val.targets.task, best_metric(args, val.targets.task)
    allowed = [*METRICS[task], "loss", *(["acc1"] if task == "class" else [])]
    if metric not in allowed:
        raise UserError(f"--best {metric}: figures of {task} are {', '.join(allowed)}")
    alike = undefined(task, val.files.labels, val.classes)
    if not alike:
        return
    text = f"{val.files.source}: auroc and average_precision are not defined for {len(alike)} of "
    text += f"{len(val.classes)}: {some(f'{name} ({why})' for name, why in alike)}"
    if metric in ("auroc", "average_precision") and len(alike) == len(val.classes) and trains:
        advice = "pass another --best, such as --best loss" if hasattr(args, "best") else "take other labels"
        raise UserError(f"{text}; {advice}")
    if is_main_process():
        warn(f"{text}; their means leave them out")


def threshold_set(args: argparse.Namespace, val: LabelledImages) -> LabelledImages | None:
    """The images of `train` that --thresholds auto holds out, prepared as those of `val`."""
    if getattr(args, "thresholds", None) != ["auto"]:
        return None
    held = labelled_images("held", args, lambda _: val.transform)
    held.files.targets = val.targets
    return held


def classifier_info(
    args: argparse.Namespace, dataset: LabelledImages, recipe: str, checkpoint: Checkpoint | None = None
) -> dict:
    """The entry `model_info` of a run's checkpoints: model, targets, and the best figure so far."""
    info = make_model_info(args, dataset.classes, recipe) | dataset.targets.info()
    held = checkpoint.content.get("model_info", {}).get("best") if checkpoint else None
    return {**info, "best": held} if held else info


class TargetLoss(torch.nn.Module):
    """Mean loss of outputs (N, K) and targets, of every sample alike whatever is in its batch.

    Args:
        task: "class": cross entropy, of int64 (N,) or soft targets (N, K); "labels": binary cross entropy,
            of (N, K), mean over labels; "numbers": smooth L1 of standardised numbers (N, K).
        smoothing: of labels, towards 1 / K or, of several labels, 1 / 2; soft targets have theirs.
        weight: (K,) of classes, or of labels that are there.
    """

    def __init__(self, task: str, smoothing: float = 0.0, weight: torch.Tensor | None = None):
        super().__init__()
        self.task, self.smoothing = task, smoothing
        self.register_buffer("weight", weight)

    def extra_repr(self) -> str:
        names = {"class": "cross entropy", "labels": "binary cross entropy", "numbers": "smooth L1"}
        return names[self.task] + (", balanced" if self.weight is not None else "")

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.task == "numbers":
            return F.smooth_l1_loss(outputs, targets)
        if self.task == "labels":
            targets = targets * (1 - self.smoothing) + self.smoothing / 2
            return F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=self.weight)
        smoothing = self.smoothing if targets.dim() == 1 else 0.0
        if targets.dim() == 1:  # with soft targets the mean is over samples, and not over their weights
            targets = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
        return F.cross_entropy(outputs, targets, self.weight, label_smoothing=smoothing)


def target_loss(
    args: argparse.Namespace, dataset: LabelledImages, smoothing: float = 0.0
) -> TargetLoss | None:
    """The loss of a training set; None for one class of equal weight, which has the recipe's own."""
    task, labels = dataset.targets.task, dataset.files.labels
    weight = None
    if getattr(args, "class_weight", None):
        if task == "numbers":
            raise UserError("--class_weight balanced: numbers have no classes; leave it out")
        if task == "class":
            counts = np.bincount(labels, minlength=args.nb_classes)
            weight = np.where(counts, len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 1.0)
        else:
            there = labels.sum(axis=0)
            weight = (len(labels) - there) / there
        weight = torch.tensor(weight, dtype=torch.float32)
    return None if task == "class" and weight is None else TargetLoss(task, smoothing, weight)


def label_mixup(task: str, **options) -> Callable:
    """timm's Mixup, of `options`, for several labels (N, K), which become the shares of the two pictures'.
    UserError for numbers: half of one picture over another need not have half of its number.
    """
    if task == "numbers":
        advice = "pass --mixup 0 --cutmix 0, and no --cutmix_minmax"
        raise UserError(f"--mixup, --cutmix: a mixed picture has no number of its own; {advice}")

    def mix(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.arange(len(images), device=images.device)  # as if each image were a class of its own
        images, shares = Mixup(**options, label_smoothing=0.0, num_classes=len(images))(images, places)
        return images, shares.to(labels.dtype) @ labels

    return mix
