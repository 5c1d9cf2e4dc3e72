"""Whether warm-up, cooldown and epochs fit together."""

import argparse

from util.errors import UserError
from util.lr_sched import stable_epochs
from util.processes.collectives import is_main_process, warn


def check_schedule(args: argparse.Namespace) -> None:
    """Warns of a warm-up that never ends; raises UserError for a cooldown that cannot be.

    Args:
        args: epochs; if present warmup_epochs, schedule, cooldown.
    """
    warmup, epochs = getattr(args, "warmup_epochs", 0), args.epochs
    if warmup >= epochs and is_main_process():
        text = f"--warmup_epochs {warmup}: not below --epochs {epochs}"
        warn(f"{text}, so the learning rate rises to the end and never falls; pass a smaller one")
    if getattr(args, "schedule", "cosine") != "wsd":
        if getattr(args, "cooldown", None):
            raise UserError(f"--cooldown {args.cooldown}: is the end of --schedule wsd, which is not given")
    elif (stable := stable_epochs(args)) < warmup:
        raise UserError(f"--schedule wsd: --warmup_epochs {warmup} and --cooldown {epochs - stable} are more "
                        f"than --epochs {epochs}")  # fmt: skip
