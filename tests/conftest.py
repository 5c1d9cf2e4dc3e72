"""Shared test set-up: deterministic, one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from util.processes import signals

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def usual_signals():
    """main() installs signal handlers; a test leaves none behind."""
    yield
    signals.clear()
