"""util/trackers: what trackers get is what log.txt has; a failing one ends nothing."""

import json
import sys
import types

import numpy as np
import pytest

import main_pretrain
from util.errors import UserError
from util.trackers import several

CHANNELS = {"val_loss", "train_loss"}


def run(tmp_path, *flags):
    """A tiny pre-training; returns the records of log.txt."""
    base = (
        "--model mae_vit_tiny_patch16 --input_size 32 --patch_size 16 --decoder_embed_dim 16 "
        "--decoder_depth 1 --decoder_num_heads 2 --batch_size 4 --epochs 2 --warmup_epochs 0 --num_workers 0 "
        "--vis_freq 1 --save_freq 1 --device cpu --print_freq 1"
    )
    parser = main_pretrain.ArgumentParser(parents=[main_pretrain.get_args_parser()])
    data = ["--data_path", str(tmp_path / "images"), "--output_dir", str(tmp_path / "run")]
    main_pretrain.main(parser.parse_args([*base.split(), *data, *flags]))
    return [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    draw = np.random.default_rng(0)
    for split, count in ("train", 8), ("val", 2):
        folder = tmp_path / "images" / split / "a"
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    return tmp_path


class Recorder(types.ModuleType):
    """A tracker that writes down its calls, and fails from `fails` on."""

    def __init__(self, fails: str = ""):
        super().__init__("util.trackers.wandb")
        self.calls, self.fails = [], fails
        for name in ("start", "scalars", "picture", "checkpoint", "finish"):
            setattr(self, name, lambda *args, name=name: self.call(name, *args))

    def call(self, name, *args):
        self.calls.append((name, *args))
        if name == self.fails:
            raise ConnectionError("no route\nto host")
        return "handle"


@pytest.fixture
def recorder(monkeypatch):
    def install(fails=""):
        recorder = Recorder(fails)
        monkeypatch.setitem(sys.modules, "util.trackers.wandb", recorder)
        monkeypatch.setattr(several, "check_installed", lambda names: None)
        return recorder

    return install


def test_a_tracker_gets_settings_curves_pictures_and_checkpoints(images, recorder):
    calls = recorder()
    records = run(images, "--tracker", "wandb", "tensorboard", "--track_checkpoints")
    kinds = [call[0] for call in calls.calls]
    assert kinds[0] == "start" and kinds[-1] == "finish" and kinds.count("start") == 1
    settings, _, name, run_id = calls.calls[0][1:]
    assert settings["mask_ratio"] == 0.75 and name == "run" and run_id == records[0]["run"]
    points = [(call[3], call[2]) for call in calls.calls if call[0] == "scalars"]
    held_out = [(epoch, values["val_loss"]) for epoch, values in points if "val_loss" in values]
    assert held_out == [(record["epoch"] + 1, record["val_loss"]) for record in records]
    assert [epoch for epoch, values in points if "train_loss" in values] == [0, 0.5, 1, 1.5]
    pictures = [call[3] for call in calls.calls if call[0] == "picture"]
    assert len(pictures) == 2 and all(p.dtype == np.uint8 and p.shape[2] == 3 for p in pictures)
    sent = [call[2].name for call in calls.calls if call[0] == "checkpoint"]
    assert sent == ["checkpoint-0.pth", "checkpoint-1.pth"]
    assert list((images / "run").glob("events.out.tfevents*"))  # --log_dir follows --output_dir


@pytest.mark.parametrize("fails", ["start", "scalars", "picture", "finish"])
def test_a_tracker_that_fails_warns_once_and_training_goes_on(images, recorder, fails, capsys):
    calls = recorder(fails)
    assert len(run(images, "--tracker", "wandb")) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "--tracker wandb" in line]
    assert len(lines) == 1 and "ConnectionError: no route" in lines[0]
    assert [call[0] for call in calls.calls].count(fails) == 1 and calls.calls[-1][0] == fails


@pytest.mark.parametrize("how", ["leaves", "cannot be imported"])
def test_a_tracker_that_exits_or_cannot_be_imported_ends_no_training(
    images, recorder, how, monkeypatch, capsys
):
    calls = recorder()
    if how == "leaves":
        calls.scalars = lambda *_: sys.exit(3)
    else:
        monkeypatch.setitem(sys.modules, "util.trackers.wandb", None)  # as import does for what fails
    assert len(run(images, "--tracker", "wandb", "tensorboard")) == 2
    kind = "SystemExit: 3" if how == "leaves" else "ModuleNotFoundError"
    lines = [line for line in capsys.readouterr().err.splitlines() if "--tracker wandb" in line]
    assert len(lines) == 1 and kind in lines[0]


def test_a_folder_of_the_name_is_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr(several, "PACKAGES", {"nobody": "nobody-skinny"})
    (tmp_path / "nobody").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="--tracker nobody: is not installed; pip install nobody-skinny"):
        several.check_installed(["nobody"])


def test_a_resumed_run_is_the_same_run_there(images, recorder):
    calls = recorder()
    run(images, "--tracker", "wandb", "--max_steps", "3", "--track_checkpoints")
    run(images, "--tracker", "wandb", "--resume", "auto", "--track_checkpoints")
    first, second = (call for call in calls.calls if call[0] == "start")
    assert first[4] == second[4]
    sent = [call[2].name for call in calls.calls if call[0] == "checkpoint"]
    assert sent == ["checkpoint-0.pth", "checkpoint-1.pth"]


def test_none_writes_no_curves(images):
    run(images, "--tracker", "none")
    assert not list((images / "run").glob("events.out*"))


def test_a_tracker_that_is_not_installed_is_one_line(images, monkeypatch):
    monkeypatch.setattr(several.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--tracker mlflow: is not installed; pip install mlflow-skinny"):
        run(images, "--tracker", "mlflow")
    assert not (images / "run").exists()


def test_none_beside_another_is_one_line(images):
    with pytest.raises(UserError, match=r"^--tracker none tensorboard: none stands alone$"):
        run(images, "--tracker", "none", "tensorboard")
    assert not (images / "run").exists()


@pytest.mark.extra
def test_the_real_packages_offline(images, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(images / "trackio"))  # read when it is imported
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow, trackio, _ = (pytest.importorskip(name) for name in ("mlflow", "trackio", "wandb"))
    names = ["--tracker", "wandb", "trackio", "mlflow", "--track_checkpoints"]
    run(images, *names, "--max_steps", "3")
    records = run(images, *names, "--resume", "auto")
    losses = [record["val_loss"] for record in records]

    client = mlflow.MlflowClient((images / "run" / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'mae'")
    (tracked,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(tracked.info.run_id, "val_loss")
    assert [(point.step, point.value) for point in history] == [(1000, losses[0]), (2000, losses[1])]
    assert tracked.info.status == "FINISHED" and tracked.data.params["mask_ratio"] == "0.75"
    kept = client.list_artifacts(tracked.info.run_id, "checkpoints")
    assert [item.path for item in kept] == ["checkpoints/checkpoint-0.pth", "checkpoints/checkpoint-1.pth"]

    files = list((images / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.stem.removeprefix("run-") for path in files} == {records[0]["run"]}

    (own,) = trackio.Api().runs("mae")
    assert own.name == f"run-{records[0]['run'][:8]}"
