"""demo/run_demo.py: what it prints fits a screen, what its commands say is in files, a failure is shown."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from golden_utils import REPO

from demo import run_demo

TALKS = "for i in range(500): print(f'Epoch: [0] [{i}/500] loss: 1.0')"


def test_a_command_is_two_lines_and_a_file(tmp_path, capfd):
    run_demo.run(tmp_path / "log.txt", "-c", TALKS)
    printed = capfd.readouterr().out.splitlines()
    assert len(printed) == 3 and printed[1].startswith("$ python -c") and printed[2].endswith("log.txt")
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 500


def test_a_command_that_fails_shows_its_last_lines(tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        run_demo.run(tmp_path / "log.txt", "-c", f"{TALKS}\nimport sys; sys.exit('a fault'); ")
    told = capfd.readouterr().err.splitlines()
    assert stop.value.code == 1 and "a fault" in told and "log.txt" in told[-1] and len(told) <= 25


def fake_run(log: Path, script: str, *flags: str):
    """Writes what the demo reads of its commands, and prints nothing."""
    if "--output_dir" not in flags:  # the picture
        return
    folder = Path(flags[flags.index("--output_dir") + 1])
    folder.mkdir(exist_ok=True)
    record = {"epoch": 11, "train_loss": 0.7, "val_loss": 0.6, "test_acc1": 40.0}
    (folder / "log.txt").write_text(json.dumps(record) + "\n")


def test_all_of_it_fits_a_screen(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        run_demo, "run", lambda log, *command: (run_demo.say("\n$\n"), fake_run(log, *command))
    )
    run_demo.main(Namespace(output_dir=str(tmp_path / "demo"), epochs=12))
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 30 and "40.0 % right with the pre-trained encoder" in out


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True])
def test_the_demo_prints_at_most_60_lines(tmp_path, terminal):
    command = [sys.executable, "demo/run_demo.py", "--epochs", "2", "--output_dir", str(tmp_path / "demo")]
    if terminal:  # `script` gives it one
        command = ["script", "-qec", " ".join(command), "/dev/null"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len((result.stdout + result.stderr).splitlines()) <= 60
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"checkpoint-1.pth", "log.txt", "pretraining.txt", "probe-random", "reconstruction-1.png"} <= names
    assert "shipped.png" in names
