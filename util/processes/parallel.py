"""A model that several processes train: in DistributedDataParallel, or sharded (`util.processes.fsdp`)."""

import contextlib
import copy
import functools
from argparse import Namespace

import torch

from util.errors import UserError


def check_fsdp(args: Namespace) -> None:
    """Raises UserError where `args.fsdp` cannot work.

    Args:
        args: if present fsdp, eval, and distributed (see `init_distributed_mode`), which is
            not known yet where a job is submitted.
    """
    if not getattr(args, "fsdp", False) or getattr(args, "eval", False):
        return
    if not getattr(args, "distributed", True):
        raise UserError(
            "--fsdp: shares a model among several processes, and this is a single one; start with torchrun "
            "--nproc_per_node N, or leave it out"
        )


def wrap_model(model: torch.nn.Module, device: torch.device, fsdp: bool = False) -> torch.nn.Module:
    """`model` as several processes train it; make the optimizer afterwards.

    DistributedDataParallel around it, with the gradients in the buckets that are sent; with `fsdp` itself,
    sharded in place.
    """
    if fsdp:
        from util.processes.fsdp import shard_model

        return shard_model(model, device)
    wrapped = torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    _settle_buckets(wrapped)
    return wrapped


def is_sharded(thing: torch.nn.Module | torch.Tensor) -> bool:
    """Whether a model has gone through `shard_model`, or a tensor is split as such a model's are."""
    return hasattr(thing, "without_weights" if isinstance(thing, torch.nn.Module) else "full_tensor")


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor, on its device, for which all processes must call; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def full_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A sharded model as a plain one with copies of the whole weights, on the same device; any other model as
    it is. All processes must call it; what is done with the copy is each one's own affair.

    The copy takes the room of the weights alone: no gradients, no optimizer state.
    """
    if not is_sharded(model):
        return model
    whole = copy.deepcopy(model.without_weights)
    state = {name: whole_tensor(value) for name, value in model.state_dict().items()}
    whole.load_state_dict(state, assign=True)
    return whole.train(model.training)


def own_share(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy of this process's share of a whole `tensor`, sharded as `like` is; if that is not, `tensor`."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor

    everywhere = DTensor.from_local(tensor.to(like.device, like.dtype), like.device_mesh, run_check=False)
    return everywhere.redistribute(placements=like.placements)  # of what each has: nothing is sent


def load_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """`model.load_state_dict` of whole tensors that fit, for a sharded model as well."""
    own = model.state_dict()
    model.load_state_dict({name: own_share(value, own[name]) for name, value in state.items()})


def split_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """The 'state' of an optimizer's whole state dict as the parameters of `optimizer` are sharded, if at all.

    Args:
        state: {number of the parameter: {name: tensor or number}}, as in `optimizer.state_dict()`.
    """
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))

    def split(value, like):
        fits = isinstance(value, torch.Tensor) and like is not None and value.shape == like.shape
        return own_share(value, like) if fits else value

    return {
        number: {name: split(value, parameters.get(number)) for name, value in entry.items()}
        for number, entry in state.items()
    }


def without_gradient_traffic(model: torch.nn.Module, active: bool = True):
    """Context of a micro-step that is not the last of its accumulation window: gradients stay here."""
    if is_sharded(model):
        model.set_requires_gradient_sync(not active)
    return model.no_sync() if active and hasattr(model, "no_sync") else contextlib.nullcontext()


class _FirstEntries(torch.nn.Module):
    """Adds up an entry of each parameter, so that their gradients come last one first, as in training."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        super().__init__()
        self.sum = lambda: functools.reduce(torch.add, [p.flatten()[0] for p in parameters])

    def forward(self) -> torch.Tensor:
        return self.sum()


def _settle_buckets(wrapped: torch.nn.parallel.DistributedDataParallel) -> None:
    """Has the gradients' buckets laid out before the first step.

    They are laid out anew after the first backward pass, in the order in which gradients came. How the shares
    of three or more processes are added up depends on the place in a bucket: the first step of a resumed run
    would round otherwise than the same step of an undisturbed one.
    """
    model, broadcasts = wrapped.module, wrapped.broadcast_buffers
    wrapped.module = _FirstEntries([p for p in model.parameters() if p.requires_grad])
    wrapped.broadcast_buffers = False  # which this module has none of, and torch 2.14 refuses to send none
    wrapped().backward()
    wrapped.module, wrapped.broadcast_buffers = model, broadcasts
    model.zero_grad()
