"""The optimizer that `--opt` names: torch's AdamW, or any of timm's (`util.compute.named_optimizer`)."""

from argparse import Namespace
from collections.abc import Callable

import torch

from util.compute.precision import has_fused_adamw


def add_optimizer_args(flag: Callable) -> None:
    """The flags; `flag`: a group's `add_argument`."""
    flag("--opt", default="adamw", metavar="NAME", help="adamw, or an optimizer of timm: muon, lion, ...")
    flag("--opt_args", default=[], nargs="+", metavar="NAME=VALUE",
         help="what that optimizer takes beside learning rate and weight decay: momentum=0.9")  # fmt: skip


def build_optimizer(groups: list[dict], args: Namespace, device, **defaults) -> torch.optim.Optimizer:
    """The optimizer of parameter groups; `defaults`: AdamW's arguments in the recipe. Others have their own.

    Raises UserError for one that cannot be made.
    """
    if args.opt == "adamw" and not args.opt_args:
        return torch.optim.AdamW(groups, lr=args.lr, fused=has_fused_adamw(device), **defaults)
    from util.compute.named_optimizer import by_name

    return by_name(groups, args, {"fused": has_fused_adamw(device), **defaults})


def check_optimizer_args(args: Namespace) -> None:
    """Raises UserError for an optimizer that cannot be made or make a step, before anything is read."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((8, 8), (8,))]
    own = Namespace(**{**vars(args), "lr": 1e-3})
    optimizer = build_optimizer([{"params": params}], own, params[0].device)
    if args.opt_args:
        from util.compute.named_optimizer import try_step

        try_step(optimizer, args)
