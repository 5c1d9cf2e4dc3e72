"""The norm of all gradients, and what the log says of the precision."""

import pytest
import torch

from util.compute import precision
from util.compute.precision import total_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_of_all_gradients(dtype):
    grads = [torch.randn(shape, dtype=dtype) for shape in [(3, 5), (7,), ()]]
    grads.append(torch.randn(4, 6, dtype=dtype).t())  # not contiguous
    expected = torch.cat([grad.double().flatten() for grad in grads]).norm()
    norm = total_norm(grads)
    assert norm.shape == () and norm.dtype == dtype
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6 if dtype == torch.float32 else 1e-14)


def test_many_entries_are_added_up_well():
    torch.manual_seed(0)
    grads = [torch.randn(2**22) for _ in range(4)]
    assert total_norm(grads).item() == pytest.approx(torch.cat(grads).double().norm().item(), rel=1e-5)


def test_norm_without_gradients_and_of_bad_ones():
    assert total_norm([]).item() == 0
    assert total_norm([torch.tensor([1.0, float("nan")])]).isnan()
    assert total_norm([torch.tensor([1.0]), torch.tensor([float("inf")])]).isinf()


@pytest.mark.parametrize(
    ("unit", "amp_dtype", "said"),
    [(True, None, True), (True, torch.bfloat16, False), (False, None, False)],
)
def test_a_cpu_with_a_matrix_unit_is_named(monkeypatch, unit, amp_dtype, said):
    monkeypatch.setattr(precision, "CPU_HAS_MATRIX_UNIT", unit)
    text = precision.prepare_device(torch.device("cpu"), amp_dtype)
    assert text.startswith(str(amp_dtype or torch.float32)) and ("--amp_dtype bf16" in text) == said
