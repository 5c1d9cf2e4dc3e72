"""Entries beside the tensors: plain data when saved, old files read, strange values in one line."""

import argparse
import enum
import json
import math
import os
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from export_utils import make_mae, run_export, save_mae

from util.errors import UserError
from util.run import checkpoint, resume
from util.run.guard import RunGuard
from util.run.run_log import log_run
from util.weights.files import read_file
from util.weights.schema import check_settings, plain, stored_settings


class Mode(enum.Enum):
    FAST = 1


class Word(enum.StrEnum):
    SLOW = "slow"


def loss(x):
    return x


SETTINGS = dict(
    path=pathlib.PurePosixPath("a/b"), windows=pathlib.PureWindowsPath("c\\d"), number=np.float64(0.5),
    count=np.int32(7), yes=np.bool_(True), text=np.str_("x"), array=np.arange(4).reshape(2, 2),
    mode=Mode.FAST, word=Word.SLOW, dtype=torch.bfloat16, device=torch.device("cpu"), names={"b", "a"},
    size=torch.Size([2, 3]),
    inner=argparse.Namespace(where=pathlib.PurePosixPath("c"), lr=np.float32(0.25)), none=None, raw=b"\xff",
    pair=(1, 2.5), function=loss, kind=dict,
)  # fmt: skip
PLAIN = dict(
    path="a/b", windows="c\\d", number=0.5, count=7, yes=True, text="x", array=[[0, 1], [2, 3]], mode="FAST",
    word="slow", dtype="torch.bfloat16", device="cpu", names=["a", "b"], size=(2, 3),
    inner={"where": "c", "lr": 0.25}, none=None, raw="\udcff", pair=(1, 2.5), function="loss", kind="dict",
)  # fmt: skip


def exact(value):
    """Value and type of each part."""
    if isinstance(value, dict):
        return {key: exact(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [exact(v) for v in value]
    return type(value), value


def test_a1_any_setting_becomes_plain_data():
    assert exact(plain(SETTINGS)) == exact(PLAIN)
    endless = []
    endless.append(endless)
    assert "[[" in str(plain(endless))  # no end, no error
    assert plain({(1, 2): 3, 4: 5, None: 6}) == {"(1, 2)": 3, 4: 5, None: 6}


def test_a1_what_is_kept_as_text_is_said_once(capsys):
    class Odd:
        pass

    plain({"a": Odd()}), plain({"a": Odd()})
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a setting of type Odd is kept as its text" in error


def run_args(folder, **changes):
    return argparse.Namespace(
        output_dir=folder, resume="auto", batch_size=2, accum_iter=1, start_epoch=0, **changes
    )


def test_a1_a_checkpoint_with_any_setting_can_be_resumed(tmp_path):
    """As public launchers do it: args.output_dir is a Path; numpy also in what else is saved."""
    model, args = make_mae().requires_grad_(True), run_args(pathlib.Path(tmp_path), **SETTINGS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=np.float64(1e-3))
    checkpoint.save_model(
        args, 3, model, model, optimizer, None, best_acc1=np.float32(12.5), stats={"loss": np.float64(1)}
    )
    checkpoint.finish_saving()
    content = torch.load(tmp_path / "checkpoint-3.pth", weights_only=True)  # no allow-list needed
    assert content["args"]["output_dir"] == str(tmp_path) and content["args"]["function"] == "loss"
    assert exact(content["best_acc1"]) == (float, 12.5) and type(content["stats"]["loss"]) is float
    assert type(content["optimizer"]["param_groups"][0]["lr"]) is float
    resume.load_model(args, model, optimizer, None)
    assert args.start_epoch == 4


@pytest.mark.parametrize("namespace", [False, True])
def test_a1_older_files_with_paths_and_numpy_values_are_read(tmp_path, namespace):
    args = {name: SETTINGS[name] for name in ("path", "number", "count", "yes", "text", "array", "dtype")}
    args["posix"] = pathlib.PosixPath("/x/y") if os.name == "posix" else "/x/y"
    args["big"] = np.array([1, 2], ">f4")
    torch.save({"model": {}, "args": argparse.Namespace(**args) if namespace else args}, tmp_path / "a.pth")
    expected = {name: PLAIN.get(name) for name in args} | {"posix": "/x/y", "big": [1.0, 2.0]}
    assert exact(read_file(tmp_path / "a.pth")["args"]) == exact(expected)


def test_a1_what_cannot_be_read_safely_is_named_with_its_place(tmp_path):
    for value, name in ((loss, "test_schema.loss"), (Mode.FAST, "test_schema.Mode"), (print, "print")):
        torch.save({"model": {}, "args": {"lr": 0.1, "first": 1, "mine": value}}, tmp_path / "a.pth")
        with pytest.raises(UserError, match=rf"asks to execute code, which is refused \({name} in 'mine'\)"):
            read_file(tmp_path / "a.pth")
    torch.save({"model": {}, "args": {"a": np.array([{}], dtype=object)}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a numpy value of kind O"):
        read_file(tmp_path / "a.pth")


def test_a1_the_file_of_a_bad_batch_and_tensorboard_get_plain_data(tmp_path):
    args = argparse.Namespace(output_dir=tmp_path, seed=np.int64(5), path=tmp_path, lr=np.float64(0.5))
    entry = {"images": torch.zeros(1), "indices": None, "loss": torch.tensor(math.nan), "epoch": 0, "step": 1}
    RunGuard(args)._write(entry, [], [entry])
    assert torch.load(tmp_path / "nonfinite-1.pth", weights_only=True)["rng"]["seed"] == 5
    told = []
    log_run(SimpleNamespace(add_run=lambda text, settings, *_: told.append(settings)), args)
    assert exact(told[0]) == exact({"lr": 0.5, "output_dir": str(tmp_path), "path": str(tmp_path), "seed": 5})


WRONG = [
    ("mean", "x"), ("mean", [True]), ("mean", [math.nan] * 3), ("mean", [10**400]), ("std", [0.0]),
    ("std", []),
    ("input_size", ["x"]), ("input_size", -4), ("input_size", 10**5000), ("input_size", [8] * 4),
    ("num_heads", True), ("num_heads", 3.0), ("nb_classes", 10**9), ("nb_classes", True), ("model", ["x"]),
    ("class_names", 3), ("class_names", ["a", 1]), ("recipe", "x"), ("recipe", ["x"]), ("mask_ratio", 1),
    ("norm_pix_loss", "no"), ("global_pool", 1), ("layer_norm_eps", "x"), ("mean", torch.zeros(1, 0, 3)),
]  # fmt: skip


def test_c6_a_setting_that_cannot_be_is_one_line():
    for name, value in WRONG:
        with pytest.raises(UserError, match=rf"^F is damaged: {name} is ") as error:
            check_settings({name: value}, "F")
        assert len(str(error.value)) < 200 and str(error.value).isprintable()
        with pytest.raises(UserError):
            stored_settings({"args": {name: value}}, "F", name)
        assert stored_settings({"args": {name: value}}, "F", "in_chans") == {}  # who does not need it


def test_c6_settings_that_a_file_may_have():
    good = dict(
        mean=(0.5, 0.4, 0.3), std=[1e-3], input_size=[32, 48], nb_classes=0, class_names=[], mask_ratio=0
    )
    check_settings(
        {**good, "norm_pix_loss": None, "global_pool": False, "num_heads": 3, "other": object()}, "F"
    )
    assert stored_settings({"args": {"mean": None}, "settings": "x"}, "F", "mean") == {}


def test_c7_a_card_escapes_and_shortens_what_a_file_says(tmp_path):
    path, _ = save_mae(tmp_path, data_path="/x/\x1b[2J", note="y" * 10**6, more=[["\n"]], input_size="32")
    run_export("--resume", path, "--to", "safetensors", "--output", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert len(card) < 10_000 and card.replace("\n", "").isprintable() and "\\x1b[2J" in card
    assert json.loads(json.dumps(read_file(tmp_path / "out" / "model.safetensors")["args"]))
