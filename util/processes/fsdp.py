"""`--fsdp`: each process keeps a share of every weight, gradient and optimizer state, for models that do not
fit otherwise (FSDP2, `torch.distributed.fsdp.fully_shard`; ZeRO stage 3, arXiv 1910.02054).

A block's weights are gathered when it computes and dropped after it; gradients are averaged, and each process
keeps its share of them. Blocks compute in the precision that autocast gives them, as with
DistributedDataParallel: weights travel in float32, and both give the same numbers. (FSDP2's own mixed
precision would also round norms and position tables to 16 bits.) So autograd keeps autocast's 16-bit copies
of all weights, 2 bytes a parameter, up to the backward pass, unless blocks are computed again
(--grad_checkpointing).

All that is not training takes a `full_copy`, a plain model that any process may call as often as it likes.
Checkpoints hold whole tensors: `util.run.writer.snapshot` gathers them, one at a time; `load_state` and
`split_optimizer_state` take this process's share, so that runs with and without --fsdp read each other's
(all three in `util.processes.parallel`).
(`torch.distributed.checkpoint.state_dict` would name the optimizer's entries by parameter, not by number, and
have a fresh optimizer make a step.)
"""

import copy
import warnings

import torch

from util.errors import UserError


def shard_model(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Splits the parameters of `model` among all processes, in place, each block as a unit; returns it.

    Every process must have the same weights. Parameters become DTensors, so make the optimizer afterwards.

    Raises:
        UserError: this version of torch cannot do it on `device`.
    """
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise UserError(f"--fsdp: does not work on CPU with torch {torch.__version__}; install a newer one")
    if device.type == "cuda" and torch.distributed.get_backend() != "nccl":
        raise UserError("--fsdp: needs NCCL, which torch for Windows has not; leave it out")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The loss does not change the view in place that this speaks of, and nobody else uses it
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    empty = {}
    for p in model.parameters():
        empty[id(p)] = torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    without_weights = copy.deepcopy(model, empty)  # deepcopy takes what its memo has in place of a copy
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in [*model.blocks, *getattr(model, "decoder_blocks", [])]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    object.__setattr__(model, "without_weights", without_weights)  # no submodule: not in the state dict
    return model
