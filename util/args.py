"""Command-line parts that the main scripts share, and how a user's mistake is reported."""

import argparse
import contextlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from util.interrupt import Interrupted


class UserError(Exception):
    """A mistake of the user's: its text is one line that says what, where and what to do. Exit code 2."""


class TrainingError(Exception):
    """Training cannot go on, through no mistake of the command line: one line. Exit code 1."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with one line on errors instead of the whole usage text; --help keeps a description's
    lines.
    """

    def __init__(self, *args, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs):
        super().__init__(*args, formatter_class=formatter_class, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The parsed command line; its `given` lists the names that were on it, the rest has defaults."""
    args = parser.parse_args(argv)
    absent = object()
    probe = argparse.Namespace(**dict.fromkeys(vars(args), absent))
    parser.parse_args(argv, probe)
    args.given = [name for name, value in vars(probe).items() if value is not absent]
    return args


def run_script(main: Callable, parser: argparse.ArgumentParser) -> None:
    """Calls `main(args)` with the command line; what ends it early becomes one line and an exit status.

    2: a mistake of the user's; 1: training cannot go on; 75: a signal, after saving; 130: Ctrl-C twice. With
    several processes, the one that failed first has the last word, and takes the others down.
    """
    args = parse_args(parser)
    with errors_in_one_line(parser.prog):
        try:
            main(args)
        except Interrupted as stop:
            print(f"{parser.prog}: {stop}", file=sys.stderr, flush=True)
            sys.exit(stop.status)


def run_benchmark(main: Callable, parser: argparse.ArgumentParser) -> None:
    """The same for benchmarks, whose numbers must all be above zero, unless zero means something; ends with
    what `main(args)` returns.
    """
    args = parser.parse_args()
    with errors_in_one_line(parser.prog):
        given = [(flag, n) for flag, v in vars(args).items() for n in (v if isinstance(v, list) else [v])]
        for flag, number in given:
            if type(number) not in (int, float):
                continue
            least = "at least 0" if flag in _MAY_BE_ZERO else "above 0"
            if not math.isfinite(number) or number < 0 or (number == 0 and least == "above 0"):
                raise UserError(f"--{flag} {number}: must be {least}")
        if args.json and not os.path.isdir(os.path.dirname(args.json) or "."):
            raise UserError(f"--json {args.json}: there is no such folder")
        sys.exit(main(args))


@contextlib.contextmanager
def errors_in_one_line(name: str) -> Iterator[None]:
    """Turns errors that end script `name` into its last line and an exit status, on all processes."""
    try:
        yield
    except (UserError, TrainingError) as error:
        _fail(f"{name}: error: {error}", 2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        _fail(f"{name}: interrupted", 130)
    except Exception:
        _fail(None, 1)


def _fail(message: str | None, status: int) -> None:
    """Ends the script with `message`, or with the traceback of an error of ours, on all processes."""
    if "torch" in sys.modules:  # else there are no other processes; small scripts start without it
        from util import distributed

        if distributed.get_world_size() > 1:
            lost = None if message else distributed.lost_contact(sys.exc_info()[1])
            text = message or lost or traceback.format_exc().rstrip()
            distributed.fail(text, status, own_fault=not lost)
    if message is None:
        raise
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def image_size(text: str) -> int | tuple[int, int]:
    """argparse type of image sizes in pixels: "224" is 224 x 224, "32x128" is 32 high and 128 wide."""
    numbers = [int(part) for part in text.lower().split("x")]
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(text)
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


image_size.__name__ = "image size (224, or 32x128 for height x width)"


def size_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image size as `image_size` returns it."""
    return (size, size) if isinstance(size, int) else tuple(size)


def default_workers(processes: int | None = None) -> int:
    """Loader processes by default: one for each usable core, which `processes` share, at most 16.

    A core gives some 500 images a second (benchmarks/bench_loader.py), and a large GPU takes more than 5,000.

    Args:
        processes: default: what torchrun started on this machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(16, max(1, cores // processes))


def add_data_args(parser: argparse.ArgumentParser) -> None:
    """Where the images are and how they are read."""
    group = parser.add_argument_group("data")
    flag = group.add_argument
    # fmt: off
    flag("--data_path", "--data", default=None, metavar="PATH",
         help="ImageFolder root with train/ (and val/), a folder of images, or a text file that lists "
              "images; default: a small demo set, made on first use")
    flag("--in_chans", default=3, type=int, help="channels of the images")
    flag("--mean", default=None, type=float, nargs="+", help="channel means of pixels in [0, 1]")
    flag("--std", default=None, type=float, nargs="+", help="channel standard deviations")
    flag("--bad_images", default="error", choices=["error", "skip"],
         help="a file that is no image: stop, or skip it (at most 1 %% of the set)")
    flag("--num_workers", default=default_workers(), type=int,
         help="loader processes (default: one per core, at most 16; torchrun's processes share the cores)")
    flag("--pin_mem", action="store_true", help="pin batches in memory for faster copies to the GPU")
    flag("--no_pin_mem", action="store_false", dest="pin_mem")
    # fmt: on
    group.set_defaults(pin_mem=True)


def add_run_args(parser: argparse.ArgumentParser) -> None:
    """Where results go, what they start from, which device and precision computes them."""
    flag = parser.add_argument_group("run").add_argument
    # fmt: off
    flag("--output_dir", default="./output_dir", help="folder of checkpoints and log.txt")
    flag("--log_dir", default="./output_dir", help="folder of TensorBoard curves")
    flag("--device", default="auto", help="auto (cuda, else mps, else cpu) or a torch device")
    flag("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "none"],
         help="mixed precision; auto: bf16 where the GPU has it, else fp16; none on CPU")
    flag("--seed", default=0, type=int)
    flag("--resume", default="", metavar="auto|FILE|URL",
         help="go on from a checkpoint; auto: the newest good one in --output_dir, if any")
    flag("--start_epoch", default=0, type=int, metavar="N")
    flag("--max_steps", default=0, type=int, metavar="N",
         help="save and stop after N optimizer steps in all (0: no limit)")
    flag("--keep_checkpoints", default=0, type=int, metavar="N", help="keep the newest N only (0: all)")
    flag("--save_minutes", default=0, type=float, metavar="N",
         help="also save inside epochs, when N minutes have passed since the last save (0: no)")
    flag("--skip_nonfinite", default=0, type=int, metavar="N",
         help="go on without the step after up to N losses in a row that are not finite (0: stop)")
    flag("--print_freq", default=20, type=int, metavar="N", help="steps between log lines")
    # fmt: on


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
    # fmt: on
    group.set_defaults(compile=None)


def add_distributed_args(parser: argparse.ArgumentParser, fsdp: bool = False) -> None:
    """Processes; normally the launcher's environment says all of it. `fsdp`: the script can shard a model."""
    group = parser.add_argument_group("distributed training")
    group.add_argument("--world_size", default=1, type=int, help="number of processes")
    group.add_argument("--local_rank", "--local-rank", default=-1, type=int, help="set by old launchers")
    group.add_argument("--dist_on_itp", action="store_true", help="started by OpenMPI")
    group.add_argument("--dist_url", default="env://", help="where the processes meet")
    group.add_argument("--dist_timeout", default=30, type=float, metavar="MINUTES",
                       help="after which waiting for another process is an error")  # fmt: skip
    if fsdp:
        group.add_argument("--fsdp", action="store_true",
                           help="share weights, gradients and optimizer state among the processes, for "
                           "models that do not fit otherwise (FSDP2); results stay the same")  # fmt: skip


_MAY_BE_ZERO = {"workers", "num_workers", "seeds", "overlap", "hop_us"}  # of benchmarks

# The smallest value of each flag that has one, whichever script has it; floats must be finite too
_AT_LEAST = dict.fromkeys(["batch_size", "accum_iter", "epochs", "print_freq", "in_chans", "recount", "k"], 1)
_AT_LEAST |= dict.fromkeys(["num_workers", "keep_checkpoints", "max_steps", "start_epoch", "save_minutes"], 0)
_AT_LEAST |= dict.fromkeys(["skip_nonfinite", "warmup_epochs", "lr", "blr", "min_lr", "weight_decay"], 0)
_AT_LEAST |= dict.fromkeys(["mixup", "cutmix", "color_jitter"], 0)
_ABOVE_ZERO = {"layer_decay", "clip_grad", "temperature", "dist_timeout"}


def check_common_args(args: argparse.Namespace) -> None:
    """Raises UserError for values that cannot work of the flags that the scripts share, or most of them."""
    for flag, least in _AT_LEAST.items():
        value = getattr(args, flag, None)
        if value is not None and (not math.isfinite(value) or value < least):
            raise UserError(f"--{flag} {value}: must be at least {least}" + _finite_text(value))
    for flag in sorted(_ABOVE_ZERO):
        value = getattr(args, flag, None)
        if value is not None and (not math.isfinite(value) or value <= 0):
            advice = "; leave it out for no clipping" if flag == "clip_grad" else ""
            raise UserError(f"--{flag} {value}: must be above 0{_finite_text(value)}{advice}")
    start_epoch, epochs = getattr(args, "start_epoch", 0), getattr(args, "epochs", None)
    if epochs is not None and start_epoch >= epochs:
        raise UserError(f"--start_epoch {start_epoch}: must be below --epochs {epochs}")


def _finite_text(value: float) -> str:
    return "" if math.isfinite(value) else " and finite"
