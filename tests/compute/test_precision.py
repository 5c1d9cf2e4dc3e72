"""The norm of all gradients, and what the log says of the precision."""

import numpy as np
import pytest
import torch

from util.compute import precision
from util.compute.precision import total_norm
from util.lars import norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_of_all_gradients(dtype):
    grads = [torch.randn(shape, dtype=dtype) for shape in [(3, 5), (7,), ()]]
    grads.append(torch.randn(4, 6, dtype=dtype).t())  # not contiguous
    expected = torch.cat([grad.double().flatten() for grad in grads]).norm()
    norm = total_norm(grads)
    assert norm.shape == () and norm.dtype == dtype
    # 47 squares, rounded by 6e-8 or 1.1e-16 at random: sqrt(47) of that for their sum, half for its root
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6 if dtype == torch.float32 else 1e-14)


def one_after_the_other(a, b):
    """A dot product in float32 that adds up its terms in order, as some machines' BLAS does."""
    return torch.tensor(np.cumsum((a * b).numpy(), dtype=np.float32)[-1])


@pytest.mark.parametrize("dot", [torch.dot, one_after_the_other])
def test_c1_many_entries_are_added_up_well_on_any_machine(monkeypatch, dot):
    """To 1e-6. Rows of 4096 squares are added up in float32: at worst, one after the other, off by some
    sqrt(4096) x 6e-8 / 2 = 2e-6 each, at random; 4096 rows in float64 average that to 3e-8.
    """
    monkeypatch.setattr(torch, "dot", dot)
    torch.manual_seed(0)
    grads = [torch.randn(2**22) for _ in range(4)]
    expected = torch.cat(grads).double().norm().item()
    assert total_norm(grads).item() == pytest.approx(expected, rel=1e-6)
    assert norms([torch.cat(grads)])[0].item() == pytest.approx(expected, rel=1e-6)  # what LARS takes


def test_c1_the_imitated_machine_does_add_up_badly():
    torch.manual_seed(0)
    grad = torch.randn(2**22)
    assert one_after_the_other(grad, grad).item() != pytest.approx(
        grad.double().square().sum().item(), rel=1e-5
    )


def test_c1_the_norm_depends_neither_on_threads_nor_on_places_in_memory():
    torch.manual_seed(0)
    grads, room = [torch.randn(n) for n in (300_000, 4096, 77)], torch.empty(300_100)
    expected = total_norm(grads)
    for start in range(0, 40, 3):
        moved = room[start : start + 300_000].copy_(grads[0])
        assert torch.equal(total_norm([moved, *grads[1:]]), expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(total_norm(grads), expected)
    finally:
        torch.set_num_threads(threads)


def test_c1_half_precision_gradients_have_a_norm_in_float32():
    grads = [torch.randn(5000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    norm = total_norm(grads)
    expected = torch.cat(grads).double().norm().item()
    # Sums of 4096 float32 terms, see above
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(expected, rel=1e-6)


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
