"""torch.compile of what a training step computes, with the way back to eager mode where it fails."""

import functools
import types
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from util.compute.blocks import draw_paths, recomputing
from util.errors import UserError
from util.processes.collectives import warn

BACKEND = "inductor"


def compile_model(model: torch.nn.Module, method: str, args, device: torch.device) -> bool:
    """Compiles `model`'s training pass if `args.compile` says so (None: on CUDA); returns whether it does.

    The method is replaced on this instance only, so that the state dict keeps its names, and is used in
    training mode with gradients: evaluation runs eagerly, at any batch size. In a single process it becomes
    one graph. With several, each block becomes one: the gradients of a single graph would all come at its
    end, and none could be sent while others are computed.

    Args:
        method: what forward and backward pass go through, e.g. "forward"; without graph breaks. One that was
            assigned to this model or block alone stays as it is.
        args: compile, compile_mode, accum_iter, distributed.

    Raises:
        UserError: CUDA graphs were asked for where they cannot work.
    """
    enabled = device.type == "cuda" if args.compile is None else args.compile
    graphs = args.compile_mode == "reduce-overhead"
    if graphs and args.compile is not False and (args.distributed or args.accum_iter > 1):
        raise UserError("--compile_mode reduce-overhead: only in a single process with --accum_iter 1")
    if not enabled:
        return False
    if args.distributed:
        torch._dynamo.config.optimize_ddp = False  # would cut up blocks larger than a bucket of gradients
        # Recomputed in their graph: around it, `run_blocks` would take `_check` for a part of the first pass
        recompute, model.grad_checkpointing = getattr(model, "grad_checkpointing", False), False
        compiled = {}  # one for each class of blocks
        for block in [*model.blocks, *getattr(model, "decoder_blocks", [])]:
            if "forward" in vars(block):
                continue
            if type(block) not in compiled:
                forward = type(block).forward
                forward = recomputing(forward) if recompute else forward
                compiled[type(block)] = Compiled(forward, prepare=draw_paths)
            block.forward = types.MethodType(compiled[type(block)], block)
    elif method in vars(model):
        return False
    else:
        setattr(model, method, types.MethodType(Compiled(getattr(type(model), method), graphs), model))
    return True


def tensors_in(tree) -> list[torch.Tensor]:
    """The tensors of what a function takes or returns: nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Compiled:
    """A method of modules in compiled form; called like the plain function, with the module first.

    `prepare`, which takes what the method takes, draws outside the graph what it may hold no constants of,
    and returns the modules that have it in `factors`: blocks that drop paths at many rates are one graph.

    It is the plain function in evaluation mode, without gradients, and from the moment on that compiling
    fails, which is warned about once. Random numbers are those of the plain function (others in torch 2.6 on
    CPU).
    """

    def __init__(self, method, cuda_graphs: bool = False, prepare: Callable | None = None):
        functools.update_wrapper(self, method)  # the name lets pickle find the plain method
        self.method, self.cuda_graphs, self.prepare = method, cuda_graphs, prepare
        self.checked, self.failed = set(), False
        # Blocks that differ in a number (dropout) or in what learns are versions of one function
        name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(torch._dynamo.config, name, max(64, getattr(torch._dynamo.config, name)))
        # Else a graph would serve blocks with and without hooks alike, and hooks of later on not at all
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        how = {"fullgraph": True, "dynamic": False, "backend": BACKEND}
        if BACKEND == "inductor":
            how["options"] = {"fallback_random": True, "triton.cudagraphs": cuda_graphs}
        self.compiled = torch.compile(method, **how)

    def __call__(self, module: torch.nn.Module, *inputs, **named):
        if self.failed or not module.training or not torch.is_grad_enabled():
            return self.method(module, *inputs, **named)
        try:
            if id(module) not in self.checked:
                self._check(module, *inputs, **named)
            result = self._run(module, *inputs, **named)
            # The next run of a CUDA graph overwrites what it returned; the loss is read later
            return tree_map_only(torch.Tensor, torch.clone, result) if self.cuda_graphs else result
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            cause = getattr(error, "inner_exception", None) or error
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
        result = self.method(module, *inputs, **named)  # an error that is not the compiler's comes again here
        self.failed = True
        warn(f"torch.compile failed, training goes on without it (--no_compile): {reason}")
        return result

    def _run(self, module: torch.nn.Module, *inputs, **named):
        drawn = self.prepare(module, *inputs, **named) if self.prepare else ()
        try:
            return self.compiled(module, *inputs, **named)
        finally:
            for holder in drawn:
                holder.factors = None

    def _check(self, module: torch.nn.Module, *inputs, **named) -> None:
        """Forward and backward pass once, as torch compiles the latter only when it runs, where nothing could
        be done any more; for each module, as blocks that share this function may differ in what learns.
        Leaves no gradients and no random draws behind.
        """
        # On copies: of two inputs one may have come of the other, through a graph that is needed later
        inputs, named = tree_map_only(
            torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (inputs, named)
        )
        tensors = [*module.parameters(), *tensors_in(inputs), *tensors_in(named)]
        device = tensors[0].device if tensors else torch.device("cpu")
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            result = self._run(module, *inputs, **named)
            outputs = [t.sum() for t in tensors_in(result) if t.requires_grad]
            if outputs:
                with torch.autocast(device.type, enabled=False):
                    wanted = [t for t in tensors if t.requires_grad]
                    torch.autograd.grad(outputs, wanted, allow_unused=True)
        self.checked.add(id(module))
