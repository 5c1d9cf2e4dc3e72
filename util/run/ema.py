"""`--ema`: an exponential moving average of the weights that are trained, beside them.

It is `model_ema` in a checkpoint, a whole state dict, so that every reader takes it with `--weights_key
model_ema`. Of a sharded model each process averages its own share.
"""

import contextlib
from collections.abc import Iterator

import torch

from util.processes.collectives import is_main_process, note
from util.processes.parallel import is_sharded, own_share
from util.weights.state import check_state, model_state


class Ema:
    """average = decay * average + (1 - decay) * weights, after each step that `optimizer` makes.

    Args:
        model: bare, on its device, sharded if it will be. decay: above 0 and below 1.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, decay: float):
        self.model, self.decay = model, decay
        self.weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.clone() for name, p in self.weights.items()}
        optimizer.register_step_post_hook(lambda optimizer, *_: self.update(optimizer))

    def _pair(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(weights, average), of a sharded model this process's share."""
        both = self.weights.values(), self.average.values()
        return tuple([t.to_local() if is_sharded(t) else t for t in tensors] for tensors in both)

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the weights in, unless the step was none: a fused one is called all the same, on a GPU, which
        nobody waits for, with `found_inf` (see `NativeScalerWithGradNormCount`).
        """
        weights, average = self._pair()
        share, found_inf = 1 - self.decay, getattr(optimizer, "found_inf", None)
        difference = torch._foreach_sub(weights, average)
        torch._foreach_mul_(difference, share if found_inf is None else share * (1 - found_inf))
        torch._foreach_add_(average, difference)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the model has the average for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(*self._pair(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**self.model.state_dict(), **self.average}

    @torch.no_grad()
    def restore(self, source: str, content: dict) -> None:
        """Goes on from a checkpoint's average or, where it has none, from the model's weights as they are.

        Raises UserError for an average of another model.
        """
        if "model_ema" in content:
            state = model_state({"model": content["model_ema"]}, f"--resume {source}")
            check_state(self.model, state, f"--resume {source}, model_ema")
        else:
            state = self.weights
            if is_main_process():
                note(
                    f"--ema {self.decay}: {source} holds no average, so that it begins with the weights there"
                )
        for name, average in self.average.items():
            value = state[name]
            average.copy_(value if is_sharded(value) else own_share(value, average))
