"""LARS: the reference's four steps."""

import numpy as np
import torch
from golden_utils import golden

from util.lars import LARS


def test_golden_steps():
    expected = golden("lars")
    params = {name: torch.nn.Parameter(torch.from_numpy(expected[name]).clone()) for name in "wbz"}
    optimizer = LARS(params.values(), lr=0.3, weight_decay=0.01, momentum=0.9, trust_coefficient=0.02)
    for step in range(4):
        for name, parameter in params.items():
            parameter.grad = torch.from_numpy(expected[f"grad{step}/{name}"]).clone()
        optimizer.step()
        for name, parameter in params.items():
            np.testing.assert_allclose(
                parameter.detach(), expected[f"step{step}/{name}"], rtol=1e-9, atol=1e-15
            )


def test_zero_gradient_and_missing_gradient():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    unused = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = LARS([weight, unused], lr=1.0)
    weight.grad = torch.zeros(2, 3)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 3)) and torch.equal(unused, torch.ones(2, 3))
    assert set(optimizer.state) == {weight}


def test_gradients_are_not_changed():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = LARS([weight], lr=1.0, weight_decay=0.1)
    weight.grad = torch.full((2, 3), 2.0)
    optimizer.step()
    assert torch.equal(weight.grad, torch.full((2, 3), 2.0))


def test_state_survives_saving():
    def run(steps, state=None, weight=None):
        weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3) if weight is None else weight)
        optimizer = LARS([weight], lr=0.1)
        if state:
            optimizer.load_state_dict(state)
        for step in steps:
            weight.grad = torch.full((2, 3), float(step + 1))
            optimizer.step()
        return weight.detach().clone(), optimizer.state_dict()

    straight, _ = run(range(4))
    half, state = run(range(2))
    resumed, _ = run(range(2, 4), state, half)
    assert torch.equal(straight, resumed)


def test_attributes_of_a_gradient_scaler():
    """found_inf leaves all as it is, also with gradients that are not finite; grad_scale divides."""

    def run(gradients, **attributes):
        weight = torch.nn.Parameter(torch.arange(1.0, 7).reshape(2, 3))
        bias = torch.nn.Parameter(torch.ones(3))
        optimizer = LARS([weight, bias], lr=0.1, weight_decay=0.1)
        for i, gradient in enumerate(gradients):
            weight.grad, bias.grad = torch.full((2, 3), gradient), torch.full((3,), gradient)
            if i == len(gradients) - 1:
                vars(optimizer).update(attributes)
            optimizer.step()
        return [t.clone() for t in (weight.detach(), bias.detach())] + [
            optimizer.state[p]["mu"] for p in (weight, bias)
        ]

    before, one, zero = run([2.0]), torch.tensor(1.0), torch.tensor(0.0)
    for bad in (float("nan"), float("inf")):
        for got, expected in zip(run([2.0, bad], found_inf=one), before, strict=True):
            assert torch.equal(got, expected)
    plain = run([2.0, 3.0])
    for attributes, value in [({"found_inf": zero}, 3.0), ({"grad_scale": torch.tensor(4.0)}, 12.0)]:
        for got, expected in zip(run([2.0, value], **attributes), plain, strict=True):
            # Torch's bounds for float32; 6 entries, two steps: a rounding of 6e-8 for each operation
            torch.testing.assert_close(got, expected)


def test_a_gradient_scaler_hands_its_findings_to_the_optimizer():
    optimizer = LARS([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    parameter = optimizer.param_groups[0]["params"][0]
    scaler.scale((parameter * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter, torch.ones(2, 3)) and scaler.get_scale() == 2.0
