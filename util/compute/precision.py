"""Device, mixed precision and the scaled backward pass."""

import contextlib
import functools
from collections.abc import Iterator

import torch

from util.compute.blocks import CPU_HAS_MATRIX_UNIT
from util.errors import UserError
from util.processes.collectives import all_reduce_sum, is_main_process, warn
from util.processes.group import check_kernels
from util.processes.parallel import is_sharded, whole_tensor


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a `--device` value; "auto" takes cuda, else mps, else cpu. A GPU becomes CUDA's current
    one, whose streams, events and memory are meant where none is named.

    Raises:
        UserError: no such device here, or one that this torch was not built for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        if device.type == "cuda":
            check_kernels(device)
            torch.cuda.set_device(device)
        else:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--device {name}: not usable here ({reason}); --device auto takes what there is"
        ) from None
    return device


def resolve_amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of an `--amp_dtype` value; None means full precision.

    "auto" is bf16 on GPUs that compute in it, else fp16; full precision on CPU and on mps. Warns, once, where
    bf16 is asked for of a GPU that only imitates it.

    Raises:
        UserError: fp16 on a CPU, where torch has no scaler for it.
    """
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp_dtype fp16: not on CPU; take bf16 or none")
    if name == "bf16" and device.type == "cuda":
        _warn_of_emulation(device)
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[name]


@functools.cache  # once
def _warn_of_emulation(device: torch.device) -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False) and is_main_process():
        name = torch.cuda.get_device_name(device)
        warn(f"--amp_dtype bf16: {name} only imitates it, slowly; --amp_dtype auto takes fp16 there")


def prepare_device(device: torch.device, amp_dtype: torch.dtype | None) -> str:
    """Lets a GPU that has TF32 multiply float32 matrices in it, and a CPU keep the memory of a step for the
    next; returns the words for the log on what is computed in what.

    TF32 has float32's range and 10 bits of mantissa, bf16 has 7: what autocast leaves in float32, or all with
    `--amp_dtype none`, runs on the matrix units at a precision that the rest does not reach. A float32
    run there agrees with a CPU's to about 3 digits only; nothing changes elsewhere or in float64.
    """
    text = f"{amp_dtype or torch.float32}"
    if device.type == "cpu":
        from util.compute.memory import keep_freed_memory  # a GPU does without

        keep_freed_memory()
        if amp_dtype is None and CPU_HAS_MATRIX_UNIT:
            text += " (this CPU has a matrix unit for bf16: --amp_dtype bf16 is faster)"
    if device.type != "cuda":
        return text
    torch.set_float32_matmul_precision("high")  # a GPU without TF32 stays in float32
    has_tf32 = torch.version.cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    return text + (", float32 matrix products in TF32" if has_tf32 else "")


def has_fused_adamw(device: torch.device) -> bool:
    """Whether AdamW can update a parameter in one pass over memory there (`fused=True`)."""
    return device.type in ("cuda", "cpu")


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Context of the forward pass: autocast in `dtype`, or nothing for None.

    In training it keeps no copies of the weights: each is used once, and with --grad_checkpointing the copies
    of all blocks would stay until the forward pass ends.
    """
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=not torch.is_grad_enabled())


@contextlib.contextmanager
def casting_once(device: torch.device, dtype: torch.dtype | None, model=None) -> Iterator[None]:
    """Context around many forward passes under `autocast` without gradients, which cast each weight once.

    Autocast keeps its copies until the outermost context ends, and of weights that learn only; so frozen ones
    of `model` count as such meanwhile. Between the passes nothing is cast.
    """
    if dtype is None:
        yield
        return
    frozen = [p for p in model.parameters() if not p.requires_grad] if model is not None else []
    try:
        for p in frozen:
            p.requires_grad_(True)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


class NativeScalerWithGradNormCount:
    """Backward pass and optimizer step, with loss scaling where fp16 needs it.

    Args:
        enabled: scale the loss (fp16 only). Default: when a GPU is there, as forks expect.
        device: type of the device that computes, "cuda" or other.
    """

    state_dict_key = "amp_scaler"

    def __init__(self, enabled: bool | None = None, device: str = "cuda"):
        enabled = torch.cuda.is_available() if enabled is None else enabled
        self._scaler = torch.amp.GradScaler(device, enabled=enabled)

    def __call__(
        self, loss, optimizer, clip_grad=None, parameters=None, create_graph=False, update_grad=True
    ) -> torch.Tensor | None:
        """Adds the gradients of `loss`; with `update_grad` also clips to `clip_grad` and steps.

        With `parameters`, no step is made when their gradients' norm is not finite: the model stays.

        Returns the gradients' total norm before clipping, a tensor on the device, when `parameters` are given
        and a step was made; else None.
        """
        self._scaler.scale(loss).backward(create_graph=create_graph)
        if not update_grad:
            return None
        norm = None
        if parameters is not None:
            parameters = [p for p in parameters if p.grad is not None]
            self._scaler.unscale_(optimizer)
            norm = total_norm([p.grad for p in parameters])
            if clip_grad is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
        if self._scaler.is_enabled() or norm is None:
            self._scaler.step(optimizer)
            self._scaler.update()
        elif norm.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False):
            # As GradScaler does: fused AdamW and LARS make no step where this is not 0, and nothing waits
            optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(norm)).float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif torch.isfinite(norm):
            optimizer.step()
        return norm

    def state_dict(self) -> dict:
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Takes a saved scaler state; an empty one (saved without scaling) or a disabled scaler changes
        nothing.
        """
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(state)


ROW = 4096  # entries that are squared and added up in their own precision


def total_norm(grads: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all entries of `grads`, a scalar; of all processes' shares where they are split."""
    if not grads or any(grad.device.type != "cpu" for grad in grads):
        return whole_tensor(torch.nn.utils.get_total_norm(grads))
    split = any(map(is_sharded, grads))
    square = square_on_cpu([grad.to_local() if split else grad for grad in grads])
    dtype = functools.reduce(torch.promote_types, {grad.dtype for grad in grads}, torch.float32)
    return (all_reduce_sum(square) if split else square).sqrt().to(dtype)


def square_on_cpu(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all entries of tensors on a CPU, a float64 scalar, right to 1e-6.

    Rows of `ROW` entries are added up in float32, and these in float64. A norm or dot product of a whole
    tensor in float32 is off by 1e-5 after 10^6 entries where it adds up one after the other, as torch's does
    and some machines' BLAS. The bits depend neither on threads nor on where a tensor lies in memory.
    """
    squares, rests = [], []
    for entries in (tensor.flatten() for tensor in tensors):
        whole = len(entries) // ROW * ROW
        if whole:
            squares.append(_row_norms(entries[:whole].view(-1, ROW)).double().square().sum())
        if whole < len(entries):
            rests.append(entries[whole:])
    if len(rests) == 1:
        squares.append(_row_norms(rests[0][None]).double().square().sum())
    elif rests:  # small tensors at once, as each call takes longer than their sum
        squares.append(square_on_cpu([torch.cat(rests)]))
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
