"""The flags that the main scripts share, and argparse types of numbers that have bounds."""

import argparse
import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass

from util.errors import UserError
from util.sizes import default_workers


class Constructors(MutableMapping):
    """{name: constructor} of the models in a module's namespace as it is now: what `--model` may be.

    A constructor is a function of public name that can be called with keywords alone.
    """

    def __init__(self, namespace: dict):
        self.namespace = namespace

    def __getitem__(self, name: str) -> Callable:
        value = self.namespace.get(name) if isinstance(name, str) and not name.startswith("_") else None
        if isinstance(value, type) or not callable(value):
            raise KeyError(name)
        with contextlib.suppress(TypeError, ValueError):  # functions in C have no signature
            signature = inspect.signature(value)
            parameters = signature.parameters.values()
            signature.bind()  # TypeError where something must be given
            if any(p.kind is p.VAR_KEYWORD or p.name == "img_size" for p in parameters):
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in list(self.namespace) if name in self])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __setitem__(self, name: str, constructor: Callable) -> None:
        self.namespace[name] = constructor

    def __delitem__(self, name: str) -> None:
        del self.namespace[name]


def construct(constructor: Callable, **sizes):
    """constructor(**sizes), without those of them that it gives its model itself, as the reference's do."""
    while True:
        try:
            return constructor(**sizes)
        except TypeError as error:
            found = re.search(r"multiple values for keyword argument '(\w+)'", str(error))
            if found is None or sizes.pop(found[1], None) is None:
                raise


@dataclass(frozen=True)
class Bounded:
    """An argparse type of a number with bounds. It converts only: `check_flags` refuses what lies outside, so
    that the words name flag and value, and a fork's Namespace is checked as well.

    kind: int or float. allows: whether a number may be. rule: how it must be, in words. advice: what to do.
    """

    kind: type
    allows: Callable[[float], bool]
    rule: str
    advice: str = ""

    def __call__(self, text: str) -> float:
        return self.kind(text)

    @property
    def __name__(self) -> str:  # argparse says it of a text that is no number
        return self.kind.__name__


def at_least(least: float, kind: type = int) -> Bounded:
    return Bounded(kind, lambda value: least <= value < math.inf, f"be at least {least}")


def above(limit: float, advice: str = "") -> Bounded:
    return Bounded(float, lambda value: limit < value < math.inf, f"be above {limit}", advice)


fraction = Bounded(float, lambda value: 0 <= value <= 1, "lie between 0 and 1")
inner_fraction = Bounded(float, lambda value: 0 < value < 1, "lie between 0 and 1, both excluded")
seed_number = Bounded(int, lambda value: -(2**63) <= value < 2**64, "lie between -2^63 and 2^64 - 1")


class OneOrMore(argparse.Action):
    """Stores one value as it is, several as a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def pixel_value(text: str) -> float | str:
    """argparse type of a number, or of the word auto."""
    return text if text == "auto" else float(text)


def check_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises UserError for values in `args` that the `Bounded` types of `parser` do not allow."""
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if isinstance(action.type, Bounded) and value is not None and not action.type.allows(value):
            finite = "" if abs(value) < math.inf or "lie" in action.type.rule else " and finite"
            raise UserError(f"--{action.dest} {value}: must {action.type.rule}{finite}{action.type.advice}")
    starts = [getattr(args, name) for name in ("init", "finetune", "eval") if hasattr(args, name)]
    if getattr(args, "weights_key", "") and starts and not any(starts):
        raise UserError(f"--weights_key {args.weights_key}: is of a file to start from, and none is given")
    epochs = getattr(args, "epochs", None)
    if epochs is not None and (start_epoch := getattr(args, "start_epoch", 0)) >= epochs:
        raise UserError(f"--start_epoch {start_epoch}: must be below --epochs {epochs}")
    if epochs is not None and not getattr(args, "eval", False):
        from util.cli.schedule import check_schedule  # with torch

        check_schedule(args)


def add_training_args(
    parser: argparse.ArgumentParser, backward: bool = True, fsdp: bool = False, folder: str = "./output_dir"
) -> None:
    """The flags of a training beside those of its recipe; the rest: see the groups below."""
    flag = add_data_args(parser)
    flag("--shuffle", default="full", choices=["full", "near"],
         help="order of an epoch; near: of images in archives, so that most reads are of neighbours, for "
              "stores that are slow to answer")  # fmt: skip
    add_run_args(parser, folder)
    add_speed_args(parser, backward)
    add_distributed_args(parser, fsdp)


def add_data_args(parser: argparse.ArgumentParser) -> Callable:
    """Where the images are and how they are read; returns what adds flags to the group."""
    group = parser.add_argument_group("data")
    flag = group.add_argument
    # fmt: off
    flag("--data_path", "--data", default=None, nargs="+", action=OneOrMore, metavar="PATH",
         help="ImageFolder root with train/ (and val/), a folder of images, a text file that lists images, "
              "or archives of such folders (.tar, .zip, .parquet): one, a folder or a pattern of them "
              "('shards/{000..127}.tar'), also http(s), s3 or gs addresses; several make one set; default: "
              "a small demo set, made on first use")
    flag("--pages", default="first", choices=["first", "all"],
         help="of files with several pages or pictures: the first one is an image, or all are")
    flag("--in_chans", default=3, type=at_least(1), help="channels of the images")
    flag("--mean", default=None, type=float, nargs="+", help="channel means of pixels in [0, 1]")
    flag("--std", default=None, type=float, nargs="+", help="channel standard deviations")
    flag("--pixel_range", default="auto", type=pixel_value, nargs="+", metavar="LOW HIGH",
         help="values that are black and white in images of more than 8 bits, once or per channel (default: "
              "what the files declare, else measured on some of them)")
    flag("--bad_images", default="error", choices=["error", "skip"],
         help="a file that is no image: stop, or skip it (at most 1 %% of the set)")
    flag("--num_workers", default=default_workers(), type=at_least(0),
         help="loader processes (default: one per core, at most 16; torchrun's processes share the cores)")
    flag("--pin_mem", action="store_true", help="pin batches in memory for faster copies to the GPU")
    flag("--no_pin_mem", action="store_false", dest="pin_mem")
    group.set_defaults(pin_mem=True)
    return flag


def add_run_args(parser: argparse.ArgumentParser, folder: str) -> None:
    """Where results go, what they start from, what computes them; `folder`: the default of where."""
    flag = parser.add_argument_group("run").add_argument
    # fmt: off
    flag("--output_dir", default=folder, help=f"folder of checkpoints and log.txt (default: {folder})")
    flag("--log_dir", default=folder, help="folder of curves (default: --output_dir)")
    flag("--tracker", default=["tensorboard"], nargs="+", metavar="NAME",
         choices=["tensorboard", "wandb", "trackio", "mlflow", "none"],
         help="who draws the curves: tensorboard, wandb, trackio, mlflow, or none; one or several")
    flag("--track_checkpoints", action="store_true", help="hand them the checkpoints as well")
    flag("--device", default="auto", help="auto (cuda, else mps, else cpu) or a torch device")
    flag("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "none"],
         help="mixed precision; auto: bf16 where the GPU has it, else fp16; none on CPU")
    flag("--seed", default=0, type=seed_number)
    flag("--resume", default="", metavar="auto|FILE|URL",
         help="go on from a checkpoint; auto: the furthest good one of the run in --output_dir, if any")
    add_verify_arg(flag)
    flag("--start_epoch", default=0, type=at_least(0), metavar="N")
    flag("--max_steps", default=0, type=at_least(0), metavar="N",
         help="save and stop after N optimizer steps in all (0: no limit)")
    flag("--keep_checkpoints", default=0, type=at_least(0), metavar="N",
         help="keep the newest N of this run only (0: all)")
    flag("--save_minutes", default=0, type=at_least(0, float), metavar="N",
         help="also save inside epochs, when N minutes have passed since the last save (0: no)")
    flag("--skip_nonfinite", default=0, type=at_least(0), metavar="N",
         help="go on without the step after up to N losses in a row that are not finite (0: stop)")
    flag("--report", action="store_true", help="write report.html into --output_dir at the end (report.py)")
    flag("--print_freq", default=20, type=at_least(1), metavar="N", help="steps between log lines")


def add_verify_arg(flag: Callable) -> None:
    """The flag of scripts that read weights; `flag`: a group's or parser's `add_argument`."""
    flag("--no_verify", action="store_true",
         help="read weights without comparing them with the checksums in the file")  # fmt: skip
    flag(
        "--weights_key",
        default="",
        metavar="NAME",
        help="of a file with several models (model, model_ema, teacher, ...) or prefixes: which to take",
    )


def add_schedule_args(parser: argparse.ArgumentParser, **defaults: float) -> Callable:
    """Batch, epochs and learning rate, with a recipe's `defaults`; returns what adds flags to the group."""
    flag = parser.add_argument_group("optimization").add_argument
    # fmt: off
    flag("--batch_size", type=at_least(1), help="images per process and micro-step")
    flag("--accum_iter", default=1, type=at_least(1), help="micro-steps per optimizer step")
    flag("--epochs", type=at_least(1))
    flag("--warmup_epochs", type=at_least(0))
    flag("--blr", type=at_least(0, float), help="base learning rate: lr = blr * effective batch / 256")
    flag("--lr", type=at_least(0, float), help="absolute learning rate, instead of --blr")
    flag("--min_lr", type=at_least(0, float), help="the learning rate's at the end")
    flag("--weight_decay", type=at_least(0, float))
    flag("--schedule", default="cosine", choices=["cosine", "wsd", "constant"],
         help="learning rate after the warm-up: half a cosine; constant, then linearly to --min_lr (wsd); "
              "constant")
    flag("--cooldown", type=at_least(1), metavar="N", help="epochs of wsd's end (default: a fifth of all)")
    flag("--ema", type=inner_fraction, metavar="DECAY",
         help="keep the weights' moving average too: DECAY of it and 1 - DECAY of the weights at each step")
    parser.set_defaults(**defaults)
    return flag


def add_speed_args(parser: argparse.ArgumentParser, backward: bool = True) -> None:
    """How a training step is computed; results differ by rounding at most. `backward`: through the blocks."""
    group = parser.add_argument_group("speed and memory")
    flag = group.add_argument
    # fmt: off
    flag("--compile", action="store_true",
         help="compile the training step with torch.compile, which takes about a minute at the start "
              "(default: on CUDA; eager where it fails)")
    flag("--no_compile", action="store_false", dest="compile")
    flag("--compile_mode", default="default", choices=["default", "reduce-overhead"],
         help="reduce-overhead: replay CUDA graphs, for small models whose kernels are shorter than their "
              "launch; a single process, --accum_iter 1")
    if backward:
        flag("--grad_checkpointing", action="store_true",
             help="compute each block again in the backward pass instead of keeping what it computed: less "
                  "memory, about a third more time")
    group.set_defaults(compile=None)


def add_distributed_args(parser: argparse.ArgumentParser, fsdp: bool = False) -> None:
    """Processes; normally the launcher's environment says all of it. `fsdp`: the script can shard a model."""
    group = parser.add_argument_group("distributed training")
    group.add_argument("--world_size", default=1, type=int, help="number of processes")
    group.add_argument("--local_rank", "--local-rank", default=-1, type=int, help="set by old launchers")
    group.add_argument("--dist_on_itp", action="store_true", help="started by OpenMPI")
    group.add_argument("--dist_url", default="env://", help="where the processes meet")
    group.add_argument("--dist_timeout", default=30, type=above(0), metavar="MINUTES",
                       help="after which waiting for another process is an error")  # fmt: skip
    if fsdp:
        group.add_argument("--fsdp", action="store_true",
                           help="share weights, gradients and optimizer state among the processes, for "
                           "models that do not fit otherwise (FSDP2); results stay the same")  # fmt: skip
