"""Reads the golden numbers and fills models with the weights that they were computed with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

GOLDEN = Path(__file__).parent / "golden"
REPO = Path(__file__).parent.parent
TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=4)
TINY_MAE = dict(TINY, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=4)


def golden(name: str) -> dict:
    """Returns {key: array} of `tests/golden/<name>.npz`."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def facts() -> dict:
    return json.loads((GOLDEN / "facts.json").read_text())


def fill(model: torch.nn.Module, seed: int, std: float, skip: str | None = None) -> torch.nn.Module:
    """Fills `model`, cast to float64, from numpy's legacy generator in the order of the sorted state dict.

    `skip`: keys that contain this text keep their values ("pos_embed" for the MAE model, whose tables are
    fixed).
    """
    model = model.double()
    generator = np.random.RandomState(seed)
    state = model.state_dict()
    for key in sorted(state):
        if (skip and skip in key) or not state[key].is_floating_point():
            continue
        value = generator.standard_normal(tuple(state[key].shape)) * std
        if "norm" in key and key.endswith("weight"):
            value = value + 1
        state[key] = torch.from_numpy(np.asarray(value))
    model.load_state_dict(state)
    return model


def skip_without_fake_gpu():
    """Skips the test where torch cannot even think of a GPU that is not there (2.6 on a machine without)."""
    with FakeTensorMode():
        try:
            torch.empty(1, 1, device="cuda").uniform_()[:, :1].floor()
        except RuntimeError:
            pytest.skip(f"torch {torch.__version__} needs a GPU for this")
