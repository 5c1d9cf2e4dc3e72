"""timm's Muon for a GPU: matrices of one shape make Newton-Schulz steps together, in one product each."""

from collections import defaultdict

import torch
from timm.optim import muon


class BatchedMuon(muon.Muon):
    """The same steps up to the rounding of products; alone, a ViT-B's 80 matrices are over 1,500 small ones,
    which take longer to start than to compute.

    timm's own step does the rest: what AdamW updates, convolutions, shares of FSDP, each matrix's first step
    (which makes its state), AdaMuon.
    """

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:  # no script here has one
            return super().step(closure)
        done = []
        for group in self.param_groups:
            if group.get("algo", "muon") != "muon":
                continue
            alike = defaultdict(list)
            for p in group["params"]:
                plain = type(p) is torch.nn.Parameter and p.ndim == 2 and p.grad is not None
                if plain and "momentum_buffer" in self.state.get(p, ()):
                    alike[p.shape].append(p)
            for params in alike.values():
                update(params, [self.state[p]["momentum_buffer"] for p in params], group)
                done += [(p, p.grad) for p in params]
        for p, _ in done:
            p.grad = None  # timm's step passes over it
        try:
            super().step()
        finally:
            for p, grad in done:
                p.grad = grad


def update(params: list[torch.Tensor], buffers: list[torch.Tensor], group: dict) -> None:
    """A step of matrices (out, in) of one shape, in place; the settings of `group` are timm's."""
    grads, lr = [p.grad for p in params], group["lr"]
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
    moves = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
    settings = {name: group[name] for name in ("eps", "safety_factor", "scale_eps") if name in group}
    coefficients = muon.resolve_ns_coefficients(group["ns_coefficients"], muon._COEFFICIENTS)
    moves = muon.zeropower_via_newtonschulz(torch.stack(moves), group["ns_steps"], coefficients, **settings)
    scale = muon.get_lr_scale(params[0].shape, group["adjust_lr_fn"]) if group["adjust_lr_fn"] else 1.0
    torch._foreach_add_(params, moves.unbind(), alpha=-lr * scale)
