"""util/run/owner.py: one run a folder, and whose checkpoints "auto" takes."""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from golden_utils import GOLDEN, REPO
from test_checkpoint import make_args, make_model, names, save

from util.errors import UserError
from util.run import checkpoint, owner, resume
from util.weights.files import read_file

HOST = socket.gethostname()
OWNER = "import sys; from util.run import owner; owner.claim(sys.argv[1]); print('held', flush=True); input()"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(owner, "PATIENCE", 0.3)
    monkeypatch.setattr(owner, "_SETTLE", 0.0)


@contextlib.contextmanager
def another_run(folder):
    command = [sys.executable, "-c", OWNER, str(folder)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=REPO, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a5_a_second_run_is_refused_with_the_owners_name_until_that_is_dead(tmp_path, capsys, monkeypatch):
    unfinished = tmp_path / ".checkpoint-0.pth.tmp-1"
    unfinished.write_bytes(b"of the first run")
    with another_run(tmp_path) as process:
        for _ in range(2):
            with pytest.raises(UserError) as error:
                owner.claim(tmp_path, waits=True)
            expected = f"--output_dir {tmp_path}: another run (process {process.pid} on {HOST}) works there"
            assert str(error.value).startswith(expected) and "remove" not in str(error.value)
        assert "waiting for its end" in capsys.readouterr().err and unfinished.exists()
        # One that is about to end is waited for
        monkeypatch.setattr(owner, "PATIENCE", 30.0)
        monkeypatch.setattr(owner.time, "sleep", lambda _, sleep=time.sleep: (process.kill(), sleep(0.1)))
        owner.claim(tmp_path, waits=True)
        checkpoint.prepare_output_dir(str(tmp_path), make_model())
    record = owner.read_record(tmp_path)
    assert (record["host"], record["pid"]) == (HOST, os.getpid()) and not unfinished.exists()
    owner.release()
    assert "pid" not in owner.read_record(tmp_path)


@pytest.mark.parametrize(
    ("known", "free"),
    [
        ({"host": HOST, "pid": os.getppid()}, False),
        ({"host": HOST, "pid": 2**22 + 1}, True),  # no such process
        ({"host": HOST, "pid": "x"}, True),
        ({"host": "elsewhere", "pid": 1}, False),
        ({"host": "elsewhere", "pid": 1, "slurm_job_id": "7"}, True),
        ({"host": "elsewhere", "pid": 1, "slurm_job_id": "8"}, False),
        ({"id": "of a run that has ended"}, True),
    ],
    ids=str,
)
@pytest.mark.needs("posix")  # Windows has locks everywhere
def test_a5_on_a_file_system_without_locks_the_record_stands_for_one(tmp_path, monkeypatch, known, free):
    def acquire(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(owner.filelock.FileLock, "acquire", acquire)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (tmp_path / ".run.json").write_text(json.dumps(known))
    if free:
        owner.claim(tmp_path)
        assert owner.read_record(tmp_path)["pid"] == os.getpid()
        owner.release()
        assert owner.read_record(tmp_path) == {name: known[name] for name in ("id",) if name in known}
    else:
        with pytest.raises(UserError, match=f"on {known['host']}\\) works there") as error:
            owner.claim(tmp_path)
        assert ("if it is gone for sure, remove" in str(error.value)) == (known["host"] != HOST)
        assert owner.read_record(tmp_path) == known


def begin(folder, epochs=(), source=None, anew=True):
    """A run in `folder` that saves after `epochs` and is then killed; returns its id."""
    owner.claim(folder)
    content = read_file(source) if source else {}
    run = owner.begin(source and str(source), content, anew)
    model = make_model()
    for epoch in epochs:
        optimizer, entry = torch.optim.AdamW(model.parameters()), {"id": run, "images": 1, "files": "x"}
        checkpoint.save_model(make_args(folder), epoch, model, model, optimizer, None, run=entry)
    owner.release()
    return run


def auto(folder):
    """What --resume auto takes: (file, id of the run that goes on)."""
    owner.claim(folder)
    found = resume.read_resume(make_args(folder))
    run = owner.begin(found and found.source, found.content if found else {}, anew=False)
    owner.release()
    return found and os.path.relpath(found.source, folder), run


def test_a7_the_furthest_is_known_by_what_is_inside(tmp_path, capsys):
    run = begin(tmp_path, (0, 1, 9, 10))
    future = time.time() + 1e8
    os.utime(tmp_path / "checkpoint-0.pth", (future, future))
    assert auto(tmp_path) == ("checkpoint-10.pth", run)
    shutil.copy(tmp_path / "checkpoint-0.pth", tmp_path / "checkpoint-500.pth")  # a name may say anything
    assert auto(tmp_path)[0] == "checkpoint-10.pth"
    assert "checkpoint-500.pth: its name says another epoch" in capsys.readouterr().err


def test_a7_keep_checkpoints_removes_by_position_and_only_this_runs(tmp_path):
    begin(tmp_path, (7, 8))
    run = begin(tmp_path, (0, 1, 2, 3))
    future = time.time() + 1e8
    os.utime(tmp_path / "checkpoint-0.pth", (future, future))
    model = make_model()
    args = make_args(tmp_path, keep_checkpoints=2)
    entry = {"id": run, "images": 1, "files": "x"}
    checkpoint.save_model(args, 4, model, model, torch.optim.AdamW(model.parameters()), None, run=entry)
    assert names(tmp_path) == [f"checkpoint-{epoch}.pth" for epoch in (3, 4, 7, 8)]


def test_a8_auto_never_goes_on_from_another_run(tmp_path, capsys):
    begin(tmp_path, (98, 99))
    run = begin(tmp_path)  # killed before its first save
    assert auto(tmp_path) == (None, run)
    resume.load_model(make_args(tmp_path, start_epoch=0), make_model(), None, None)
    out = capsys.readouterr().out
    assert "no checkpoint of this run" in out and "starting from scratch" in out
    assert "checkpoint-99.pth goes on from them" in out
    begin(tmp_path, (0,), anew=False)
    assert auto(tmp_path) == ("checkpoint-0.pth", run)


def test_a8_files_without_an_id_are_taken_where_the_folder_has_none(tmp_path, capsys):
    """Those of the reference and of older versions."""
    shutil.copy(GOLDEN / "checkpoint-0.pth", tmp_path)
    name, run = auto(tmp_path)
    assert name == "checkpoint-0.pth"
    assert auto(tmp_path)[0] == name  # killed before its first save, it starts from there again
    begin(tmp_path, (1,), tmp_path / name)
    assert auto(tmp_path)[0] == "checkpoint-1.pth" and not capsys.readouterr().err
    shutil.copytree(
        tmp_path, tmp_path / "emptied", ignore=lambda *_: ["checkpoint-0.pth", "checkpoint-1.pth"]
    )
    assert auto(tmp_path / "emptied")[0] is None  # whoever removes them wants to begin anew
    (tmp_path / ".run.json").unlink()
    for path in ("checkpoint-0.pth", "checkpoint-1.pth"):
        os.utime(tmp_path / path, (1e9 - 1e3 * int(path[11]),) * 2)
    assert auto(tmp_path)[0] == "checkpoint-1.pth" and run
    assert "checkpoint-0.pth was written after it" in capsys.readouterr().err


def test_a_file_that_lies_elsewhere_gives_its_id_and_is_found_again(tmp_path):
    run = begin(tmp_path / "a", (0, 1))
    assert begin(tmp_path / "b", (), tmp_path / "a" / "checkpoint-1.pth") == run
    assert auto(tmp_path / "b") == ("../a/checkpoint-1.pth", run)
    begin(tmp_path / "b", (2,), tmp_path / "a" / "checkpoint-1.pth")
    assert auto(tmp_path / "b") == ("checkpoint-2.pth", run)


def test_a_run_that_goes_back_is_another(tmp_path):
    """Else "auto" would return to the furthest of the old one."""
    old = begin(tmp_path, range(5))
    new = begin(tmp_path, (), tmp_path / "checkpoint-1.pth")
    assert new != old and auto(tmp_path)[0] == "checkpoint-1.pth"
    new = begin(tmp_path, (2,), tmp_path / "checkpoint-1.pth")
    assert auto(tmp_path) == ("checkpoint-2.pth", new)
    assert begin(tmp_path, (), tmp_path / "checkpoint-4.pth") == old


def test_a1_auto_is_an_error_where_none_can_be_read(tmp_path, capsys):
    begin(tmp_path, (0, 1))
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:5000])
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pth")}
    text = r"no checkpoint of this run in .* can be read \(checkpoint-1.pth, checkpoint-0.pth\), and nothing"
    with pytest.raises(UserError, match=text):
        resume.load_model(make_args(tmp_path), make_model(), None, None)
    assert capsys.readouterr().err.count("passed over") == 2
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.pth")}


def test_a_full_disk_gives_no_run_a_false_name(tmp_path, monkeypatch):
    begin(tmp_path, (0,))
    owner.claim(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, "_write_record", full)
    with pytest.raises(UserError, match="cannot be written"):
        owner.begin(None, {}, anew=True)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"id": 3}', '{"id": "x", "from": 7, "pid": []}', "\0"])
def test_a_record_without_sense_is_none(tmp_path, text):
    save(tmp_path, 3)
    (tmp_path / ".run.json").write_text(text)
    owner.claim(tmp_path)
    if '"x"' not in text:
        assert resume.read_resume(make_args(tmp_path)).source.endswith("checkpoint-3.pth")


def test_b7_save_model_returns_when_the_file_is_there(tmp_path):
    from util.misc import load_model, save_model

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    for epoch in range(3):
        path = save_model(make_args(tmp_path), epoch, model, model, optimizer, None)
        assert torch.equal(read_file(path)["model"]["cls_token"], model.cls_token)
    with pytest.raises(TypeError, match="mode"):
        save_model(make_args(tmp_path), 3, model, model, optimizer, None, mode="best")
    assert names(tmp_path) == ["checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-2.pth"]
    args = argparse.Namespace()
    assert load_model(args, model, optimizer, None) is None
    args.resume = str(path)
    assert load_model(args, model, optimizer, None)["epoch"] == 2 and args.start_epoch == 3


def test_a5_one_that_would_overwrite_waits_for_none(tmp_path, capsys, monkeypatch):
    """What a run that ends in the meantime has saved is then lost."""
    monkeypatch.setattr(owner, "PATIENCE", 1e9)
    with another_run(tmp_path), pytest.raises(UserError, match="works there"):
        checkpoint.prepare_output_dir(str(tmp_path), make_model())
    assert "waiting" not in capsys.readouterr().err


def test_a8_another_runs_further_checkpoint_is_named(tmp_path, capsys):
    begin(tmp_path, (8, 9))
    run = begin(tmp_path, (0,))
    assert auto(tmp_path) == ("checkpoint-0.pth", run)
    assert "checkpoint-9.pth is another run's, and this one will overwrite" in capsys.readouterr().err


def test_auto_takes_the_best_checkpoint_where_no_other_is_left(tmp_path, capsys):
    """A fresh run would overwrite it."""
    run = begin(tmp_path, (0, 1))
    shutil.copy(tmp_path / "checkpoint-0.pth", tmp_path / "checkpoint-best.pth")
    assert auto(tmp_path) == ("checkpoint-1.pth", run) and not capsys.readouterr().err
    (tmp_path / "checkpoint-0.pth").unlink()
    (tmp_path / "checkpoint-1.pth").write_bytes(b"")
    assert auto(tmp_path) == ("checkpoint-best.pth", run)
    (tmp_path / "checkpoint-1.pth").unlink()
    (tmp_path / ".run.json").unlink()
    assert auto(tmp_path) == ("checkpoint-best.pth", run)
    resume.load_model(make_args(tmp_path, resume=""), make_model(), None, None)
    assert "--resume " + str(tmp_path / "checkpoint-best.pth") in capsys.readouterr().out
    with pytest.raises(UserError, match="this run would overwrite it"):
        best = str(tmp_path / "checkpoint-best.pth")
        resume.load_model(make_args(tmp_path, resume="", finetune=best), make_model(), None, None)
    (tmp_path / "checkpoint-best.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"can be read \(checkpoint-best.pth\)"):
        auto(tmp_path)


def test_a6_a_start_before_a_flipped_bit_can_be_made_twice(tmp_path, capsys):
    """It is another run, as the damaged file still says the old one's id; killed before its first save."""
    begin(tmp_path, (0, 1))
    content = bytearray((tmp_path / "checkpoint-1.pth").read_bytes())
    for place in range(len(content) // 4, len(content) // 2):  # one alone may lie between the records
        content[place] ^= 1
    (tmp_path / "checkpoint-1.pth").write_bytes(content)
    assert [auto(tmp_path)[0] for _ in range(2)] == ["checkpoint-0.pth"] * 2
    assert capsys.readouterr().err.count("passed over") == 2
