"""`--ema`: an exponential moving average of the weights that are trained; `model_ema` in checkpoints."""

import contextlib
from collections.abc import Iterator

import torch

from util.processes.collectives import is_main_process, note
from util.processes.parallel import is_sharded, own_share
from util.weights.state import check_state, model_state


class Ema:
    """average = decay * average + (1 - decay) * weights, after each step that `optimizer` makes.

    Args:
        model: bare, on its device, with the weights to begin with; of a sharded one each process averages its
            share.
        place, content: what errors call the checkpoint that the run goes on from, if any, whose average is
            taken over, and what it holds.

    Raises:
        UserError: that is of another model.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer, decay: float, place: str = "", content: dict | None = None
    ):
        self.model, self.decay = model, decay
        self.weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.clone() for name, p in self.weights.items()}
        optimizer.register_step_post_hook(lambda optimizer, *_: self.update(optimizer))
        if "model_ema" in (content or {}):
            state = model_state({"model": content["model_ema"]}, place)
            check_state(model, state, f"{place}: its model_ema")
            for name, average in self.average.items():
                average.copy_(own_share(state[name], average))
        elif content and is_main_process():
            note(f"--ema {decay}: {place} holds no average, so that it begins with the weights there")

    def _pair(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(weights, average), of a sharded model this process's shares."""
        both = self.weights.values(), self.average.values()
        return tuple([t.to_local() if is_sharded(t) else t for t in tensors] for tensors in both)

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the weights in, but of a step that a GPU will not make, and nobody waits for, as a fused
        optimizer's `found_inf` says there (`NativeScalerWithGradNormCount`).
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
        """All of a model's, so that `--weights_key model_ema` reads it anywhere."""
        return {**self.model.state_dict(), **self.average}
