"""LARS, the optimizer of linear probing with large batches (arXiv 1708.03888), in the form MAE uses it."""

import torch

from util.compute.precision import square_on_cpu


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum; 1-D tensors (biases) are neither scaled nor decayed.

    For a tensor p with more than one dimension and gradient g: u = g + weight_decay * p, then
    u *= trust_coefficient * |p| / |u| (left as it is where either norm is 0). For all tensors then
    mu = momentum * mu + u and p -= lr * mu. The momentum buffer is called `mu` in the state.

    Written with `torch._foreach_*`: a fixed handful of kernels per step whatever the number of tensors, and
    no device-host synchronisation. As torch's fused optimizers it takes the attributes `grad_scale` (what
    gradients are divided by) and `found_inf` (a tensor; not zero: everything stays as it is), so that a
    gradient scaler need not wait for the device either.
    """

    def __init__(self, params, lr=0, weight_decay=0, momentum=0.9, trust_coefficient=0.001):
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, trust_coefficient=trust_coefficient
        )
        super().__init__(params, defaults)
        self._step_supports_amp_scaling = True  # torch.amp.GradScaler asks for it

    @torch.no_grad()
    def step(self, closure=None):
        """Does one step; returns the loss when a `closure` that evaluates it is given, else None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = self._scaled_gradients(params, group, grad_scale)
            for p in params:
                if "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            buffers = [self.state[p]["mu"] for p in params]
            kept = [t.clone() for t in (*params, *buffers)] if found_inf is not None else []
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
            for tensor, old in zip((*params, *buffers), kept, strict=False):
                tensor.copy_(torch.where(found_inf > 0, old, tensor))
        return loss

    @staticmethod
    def _scaled_gradients(params, group, grad_scale=None):
        """Gradients of `params` in order; those of matrices decayed and scaled by the trust ratio."""
        updates = [p.grad if grad_scale is None else p.grad / grad_scale for p in params]
        matrices = [i for i, p in enumerate(params) if p.ndim > 1]
        if not matrices:
            return updates
        weights = [params[i] for i in matrices]
        decayed = torch._foreach_add([updates[i] for i in matrices], weights, alpha=group["weight_decay"])
        weight_norms, update_norms = norms(weights), norms(decayed)
        ratios = [
            torch.where((w > 0) & (u > 0), group["trust_coefficient"] * w / u, 1.0)
            for w, u in zip(weight_norms, update_norms, strict=True)
        ]
        for i, update in zip(matrices, torch._foreach_mul(decayed, ratios), strict=True):
            updates[i] = update
        return updates


def norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The 2-norm of each tensor, a scalar; on a CPU torch's own is off by 1e-5 after 10^6 float32 entries."""
    if any(t.device.type != "cpu" for t in tensors):
        return torch._foreach_norm(tensors)
    return [square_on_cpu([t]).sqrt().to(t.dtype) for t in tensors]
