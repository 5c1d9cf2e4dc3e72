"""Seeding by position."""

import random

import numpy as np
import pytest
import torch

from util.rng import seed_step


def draws() -> list:
    return [random.random(), np.random.rand(), torch.rand(3).tolist(), torch.randperm(9).tolist()]


def test_d10_a_step_seeds_the_cpu_and_its_device_alone(monkeypatch):
    """torch.manual_seed asks every backend, which takes ten times as long; the draws are the same."""
    seed_step(3, 1, 2, 5)
    expected = draws()

    def slow(seed):
        raise AssertionError("all backends are walked")

    seen = []
    monkeypatch.setattr(torch, "manual_seed", slow)
    monkeypatch.setattr(torch.cuda, "manual_seed", seen.append)
    for device in ("cpu", "cuda"):
        seed_step(3, 1, 2, 5, torch.device(device))
        assert draws() == expected
    assert seen == [torch.default_generator.initial_seed()]  # the number that all devices had
    with pytest.raises(AssertionError):
        seed_step(3, 1, 2, 5)
