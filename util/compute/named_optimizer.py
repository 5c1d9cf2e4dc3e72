"""Optimizers of timm by name (`timm.optim.create_optimizer_v2`)."""

import difflib

import timm
import torch
from timm import optim

from util.errors import UserError

# Families whose state is not made of tensors of the parameters' shapes, which is what a checkpoint holds
_OTHER_STATES = ("adafactor", "kron", "laprop", "nadamlegacy", "novograd")


def by_name(name: str, groups: list[dict], lr: float, settings: dict) -> torch.optim.Optimizer:
    """timm's optimizer `name` with its own defaults, which `settings` override.

    Muon and its relatives treat matrices; they give what is none (biases, norms, tokens, position tables) to
    their AdamW part, by its shape.

    Raises:
        UserError: there is none of that name, or it needs another package.
    """
    names = optim.list_optimizers()
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, 4)) or "adamw, lion, muon"
        raise UserError(f"--opt {name}: timm {timm.__version__} has none of that name; near: {near}")
    if optim.get_optimizer_info(name).second_order:
        raise UserError(f"--opt {name}: needs second derivatives, which no script here computes")
    if name == "nadam" or any(family in name for family in _OTHER_STATES):
        raise UserError(
            f"--opt {name}: keeps a state that no checkpoint here can hold; near: nadamw, adamw, lamb"
        )
    try:
        return optim.create_optimizer_v2(groups, name, lr=lr, **settings)
    except (ImportError, AssertionError) as error:  # apex, bitsandbytes
        raise UserError(f"--opt {name}: needs a package that is not installed ({error})") from None
