"""Shared test set-up: deterministic, one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from util.processes import signals
from util.run import owner

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def usual_signals():
    """main() installs signal handlers, and opens a folder; a test leaves neither behind."""
    yield
    signals.clear()
    owner.release()
