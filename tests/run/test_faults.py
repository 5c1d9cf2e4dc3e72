"""A short fault campaign; the long one is `make test-faults`."""

import subprocess
import sys

import pytest
from golden_utils import REPO


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            ("--runs", "1", "--kills", "1", "--epochs", "3", "--spread", "0.5"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("--runs", "1", "--kills", "2", "--epochs", "4", "--processes", "2"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("--runs", "1", "--kills", "2", "--epochs", "4", "--job", "finetune"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("--runs", "1", "--kills", "2", "--epochs", "4", "--job", "linprobe"), marks=pytest.mark.slow
        ),
    ],
)
def test_killed_and_resumed_runs_end_with_the_undisturbed_weights(flags):
    result = subprocess.run(
        [sys.executable, "tests/faults.py", *flags], cwd=REPO, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 of 1 runs identical" in result.stdout
