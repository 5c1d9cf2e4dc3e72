"""The flags that the main scripts share, and the values that they may have."""

import argparse
import math

from util.errors import UserError
from util.sizes import default_workers


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
