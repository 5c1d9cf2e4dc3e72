"""Optimizers of timm by name (`timm.optim.create_optimizer_v2`)."""

import ast
import difflib
from argparse import Namespace

import timm
import torch
from timm import optim

from util.errors import UserError

# Families whose state is not made of tensors of the parameters' shapes, which is what a checkpoint holds
_OTHER_STATES = ("adafactor", "kron", "laprop", "nadamlegacy", "novograd")


def by_name(groups: list[dict], args: Namespace, adamw: dict) -> torch.optim.Optimizer:
    """timm's optimizer `args.opt` with its own defaults, which `args.opt_args` override; of "adamw" torch's,
    with the defaults `adamw`.

    Muon and its relatives treat matrices; they give what is none (biases, norms, tokens, position tables) to
    their AdamW part, by its shape.

    Raises:
        UserError: there is none of that name, it needs another package, or takes no such arguments.
    """
    settings, name = optimizer_settings(args), args.opt
    try:
        if name == "adamw":
            return torch.optim.AdamW(groups, lr=args.lr, **{**adamw, **settings})
        check_name(name)
        try:
            return for_gpu(optim.create_optimizer_v2(groups, name, lr=args.lr, **settings))
        except (ImportError, AssertionError) as error:  # apex, bitsandbytes
            raise UserError(f"--opt {name}: needs a package that is not installed ({error})") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"--opt {name} --opt_args {' '.join(args.opt_args)}: {error}") from None


def for_gpu(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Gives timm's Muon on a GPU the steps of `BatchedMuon`; its settings and state stay as they are."""
    if type(optimizer).__name__ == "Muon" and optimizer.param_groups[0]["params"][0].is_cuda:
        from util.compute.batched_muon import BatchedMuon

        optimizer.__class__ = BatchedMuon
    return optimizer


def try_step(optimizer: torch.optim.Optimizer, args: Namespace) -> None:
    """Makes a step; raises UserError where `args.opt_args` have a value that only shows as wrong in one."""
    flags = f"--opt {args.opt} --opt_args {' '.join(args.opt_args)}"
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.ones_like(param)
    try:
        optimizer.step()
    except Exception as error:  # whatever its code makes of such a value
        raise UserError(f"{flags}: a step fails: {error}") from None
    if not all(param.isfinite().all() for param in params):
        raise UserError(f"{flags}: a step makes weights that are not finite")


def check_name(name: str) -> None:
    """Raises UserError unless timm has an optimizer of that name which runs here can use and save."""
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


def optimizer_settings(args: Namespace) -> dict:
    """`args.opt_args` as keyword arguments: numbers, words, tuples as Python writes them."""
    settings = {}
    for pair in args.opt_args:
        name, equals, text = pair.partition("=")
        if name in settings:
            raise UserError(f"--opt_args {pair}: {name} is there twice; leave one out")
        if not equals or not name.isidentifier() or name in ("lr", "weight_decay", "params"):
            own = f", as --{name} is a flag" if name in ("lr", "weight_decay") else ""
            raise UserError(f"--opt_args {pair}: must be NAME=VALUE{own}")
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[name] = text
    if isinstance(steps := settings.get("ns_steps"), int) and steps < 1:  # timm would leave out what Muon is
        raise UserError(f"--opt_args ns_steps={steps}: must be 1 or more")
    return settings
