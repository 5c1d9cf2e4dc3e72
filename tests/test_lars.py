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
