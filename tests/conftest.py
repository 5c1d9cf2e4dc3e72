"""Shared test set-up: deterministic, one thread."""

import multiprocessing
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from util.processes import signals
from util.run import owner

torch.set_num_threads(1)
_START = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
HAS = {
    "posix": hasattr(os, "fork")
    and hasattr(os, "mkfifo"),  # pipes, links, signals to others; Windows has none
    "forks": _START == "fork",  # workers see what a test has patched
}


def pytest_configure(config):
    """Only the tests of a GPU see it, so that `make test` tests the same on every machine."""
    if "not gpu" in config.option.markexpr or "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    for marker in item.iter_markers("needs"):
        if missing := [name for name in marker.args if not HAS[name]]:
            pytest.skip(f"needs {', '.join(missing)}")


@pytest.fixture(autouse=True)
def usual_signals():
    """main() installs signal handlers, and opens a folder; a test leaves neither behind."""
    yield
    signals.clear()
    owner.release()
