"""Attention in every precision; whole blocks are tested with the models."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from util.compute import blocks
from util.compute.blocks import attention


def make(queries: int, tokens: int, dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    """Query, key and value (2, 3, L, 16), and the gradient of the output; scores have a std of scale**2."""
    generator = torch.Generator().manual_seed(0)
    lengths = [queries, tokens, tokens, queries]
    made = [torch.randn(2, 3, length, 16, generator=generator).to(dtype) for length in lengths]
    made[0], made[1] = made[0] * scale, made[1] * scale
    return [t.requires_grad_() for t in made[:3]] + [made[3]]


EXACT, SINGLE, HALF = (
    (torch.float64, False, 1e-15),
    (torch.float32, False, 1e-6),
    (torch.bfloat16, False, 1e-2),
)


@pytest.mark.parametrize(("dtype", "autocast", "error"), [EXACT, SINGLE, HALF, (torch.bfloat16, True, 1e-2)])
@pytest.mark.parametrize(("queries", "tokens"), [(50, 50), (7, 50), (3, 401)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_attention_and_its_gradients(monkeypatch, dtype, autocast, error, queries, tokens, scale):
    monkeypatch.setattr(blocks, "CPU_HAS_MATRIX_UNIT", True)
    q, k, v, grad = make(queries, tokens, dtype, scale)
    if dtype != torch.bfloat16 or tokens == 401:
        error *= scale  # torch's own
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(q, k, v)
    assert out.dtype == dtype and out.shape == q.shape
    grads = torch.autograd.grad(out, (q, k, v), grad)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    right = scaled_dot_product_attention(*exact)
    for ours, theirs in zip(
        (out, *grads), (right, *torch.autograd.grad(right, exact, grad.double())), strict=True
    ):
        assert ours.dtype == dtype
        assert torch.linalg.norm(ours - theirs) <= error * torch.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("dtype", "tokens", "dropout", "grad", "written_out"),
    [
        (torch.bfloat16, 50, 0.0, True, True),
        (torch.bfloat16, 257, 0.0, True, True),
        (torch.bfloat16, 401, 0.0, True, False),  # its scores would fill the memory
        (torch.bfloat16, 50, 0.1, True, False),
        (torch.bfloat16, 50, 0.0, False, False),
        (torch.float32, 50, 0.0, True, False),
    ],
)
def test_written_out_only_where_it_is_faster(monkeypatch, dtype, tokens, dropout, grad, written_out):
    monkeypatch.setattr(blocks, "CPU_HAS_MATRIX_UNIT", True)
    calls = []
    monkeypatch.setattr(
        blocks,
        "scaled_dot_product_attention",
        lambda *args, **kw: calls.append(kw) or scaled_dot_product_attention(*args, **kw),
    )
    q, k, v, _ = make(tokens, tokens, dtype)
    with torch.set_grad_enabled(grad):
        attention(q * 1, k * 1, v * 1, dropout)
    assert calls == ([] if written_out else [{"dropout_p": dropout}])


def test_fused_on_a_cpu_without_matrix_unit(monkeypatch):
    monkeypatch.setattr(blocks, "CPU_HAS_MATRIX_UNIT", False)
    q, k, v, _ = make(50, 50, torch.bfloat16)
    assert attention(q, k, v).equal(scaled_dot_product_attention(q, k, v))
