"""The recipes' losses are those in `tests/golden/losses`."""

import json
import os
import subprocess
import sys

import losses
import PIL
import pytest
from golden_utils import REPO

# Another CPU sums in another order, which 100 steps of training amplify; one machine is bit-identical
# (`make same-losses`). Of the first 12 steps, each 1e-15 off, what is left is far below this. Pillow before
# 13 rounds some pixels of the crops of fine-tuning and probing otherwise: 3.4e-4 with 12.3.
STEPS, BOUND = 12, 1e-9
NEW_PILLOW = int(PIL.__version__.split(".")[0]) >= 13


@pytest.fixture(scope="module")
def figures():
    # As torch 2.14 draws, and 2.11 does not; the bounds are 100 std away
    code = "import json, torch, losses; torch.nn.init.trunc_normal_ = torch.nn.init.normal_; "
    code += f"print(json.dumps(losses.run(losses.REPO, 'float64', {STEPS})))"
    command, env = [sys.executable, "-c", code], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO / "tests", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("recipe", losses.RECIPES)
def test_losses_are_the_recorded_ones(figures, recipe):
    ours, golden = figures[recipe][:STEPS], losses.read_golden(f"{recipe}-float64")
    assert len(golden) > losses.STEPS
    assert losses.difference(ours, golden[:STEPS]) < (BOUND if NEW_PILLOW or recipe == "pretrain" else 2e-3)


def test_a_difference_is_seen():
    assert losses.difference([1.0, 2.0], [1.0, 2.0]) == 0
    assert losses.difference([1.0, 2.0 + 1e-9], [1.0, 2.0]) == pytest.approx(5e-10)
    assert losses.difference([1.0], [1.0, 2.0]) == float("inf")
