"""The optimizer that `--opt` names: torch's AdamW, or any of timm's."""

import ast
from argparse import Namespace
from collections.abc import Callable

import torch

from util.compute.precision import has_fused_adamw
from util.errors import UserError


def add_optimizer_args(flag: Callable) -> None:
    """The flags; `flag`: a group's `add_argument`."""
    flag("--opt", default="adamw", metavar="NAME", help="adamw, or an optimizer of timm: muon, lion, ...")
    flag("--opt_args", default=[], nargs="+", metavar="NAME=VALUE",
         help="what that optimizer takes beside learning rate and weight decay: momentum=0.9")  # fmt: skip


def build_optimizer(
    groups: list[dict], args: Namespace, device: torch.device, **defaults
) -> torch.optim.Optimizer:
    """The optimizer of parameter groups; `defaults`: AdamW's arguments in the recipe. Others have their own.

    Raises:
        UserError: unknown, not installed, or what `args.opt_args` says is none of its arguments.
    """
    settings = optimizer_settings(args)
    try:
        if args.opt == "adamw":
            defaults = {"fused": has_fused_adamw(device), **defaults, **settings}
            return torch.optim.AdamW(groups, lr=args.lr, **defaults)
        from util.compute.named_optimizer import by_name

        return by_name(args.opt, groups, args.lr, settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--opt {args.opt} {' '.join(args.opt_args)}: {error}") from None


def optimizer_settings(args: Namespace) -> dict:
    """`args.opt_args` as keyword arguments: numbers, words, tuples as Python writes them."""
    settings = {}
    for pair in args.opt_args:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier() or name in ("lr", "weight_decay", "params"):
            own = f", as --{name} is a flag" if name in ("lr", "weight_decay") else ""
            raise UserError(f"--opt_args {pair}: must be NAME=VALUE{own}")
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[name] = text
    return settings


def check_optimizer(args: Namespace) -> None:
    """Raises UserError for an optimizer that cannot be made, before anything is read."""
    if args.opt != "adamw" or args.opt_args:
        tensor = torch.nn.Parameter(torch.zeros(8, 8))
        build_optimizer([{"params": [tensor]}], Namespace(**{**vars(args), "lr": 1e-3}), tensor.device)
