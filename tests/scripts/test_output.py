"""What the scripts say and write: any name on any console, a full disk, lines that others grep, odd flags."""

import ast
import io
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from golden_utils import REPO, TINY_MAE
from transfer_utils import given_args, make_pictures, read_log, vit_test

import export
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import models_mae
import models_vit
import predict
from util import console
from util.cli.parser import ArgumentParser, parse_args
from util.data.transforms import channel_stats
from util.errors import TrainingError, UserError

ODD = ("caf\udce9", "猫", "a\nb\x1b[31m")  # not UTF-8, not cp1252, not one line
SMALL_MAE = "--batch_size 8 --warmup_epochs 0 --epochs 2 --vis_freq 0"


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setitem(models_vit.MODELS, "vit_test", vit_test)
    monkeypatch.setitem(
        models_mae.MODELS, "mae_vit_test", partial(models_mae.MaskedAutoencoderViT, **TINY_MAE)
    )
    monkeypatch.setattr(console, "_told", set())


@pytest.fixture
def consoles(monkeypatch):
    """Strict streams of an encoding; returns what was written to both so far."""

    def switch(encoding):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        return lambda: "".join(stream.buffer.getvalue().decode(encoding) for stream in streams)

    return switch


def run(script, *flags, **paths):
    """Calls a script's `main` on small models and pictures."""
    mae = script is main_pretrain
    model = "mae_vit_test --patch_size 8" if mae else "vit_test"
    common = f"--model {model} --input_size 32 --num_workers 0 --device cpu"
    words = " ".join([common, *flags]).split()
    if script is not main_knn:
        paths = {"log_dir": "", **paths}
    return script.main(given_args(script, words + [str(w) for n, v in paths.items() for w in (f"--{n}", v)]))


def run_predict(*words):
    predict.main(parse_args(ArgumentParser(parents=[predict.get_args_parser()]), list(map(str, words))))


def test_a3_c7_any_name_on_any_console(tmp_path, consoles):
    root, out = make_pictures(tmp_path / "d\udce9", ODD, per_class=4), tmp_path / "o\udce9\x1b"
    said = consoles("cp1252")
    flags = "--batch_size 4 --warmup_epochs 0 --save_predictions --nb_classes 3"
    for epochs in (1, 2):
        run(
            main_finetune,
            flags,
            f"--epochs {epochs} --resume auto",
            data_path=root,
            output_dir=out,
            log_dir=out,
        )
    run(main_knn, "", data_path=root, output_dir=out, finetune=out / "checkpoint-1.pth")
    lines = said()
    assert [name in lines for name in (r"caf\xe9", r"\u732b", r"a\nb\x1b[31m", "\x1b", "猫")] == [
        True
    ] * 3 + [False] * 2
    assert [row.get("epoch") for row in read_log(out)] == [0, 1, None] and list(
        out.glob("events.out.tfevents.*")
    )
    table = (out / "per_class.txt").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 4 and r"caf\xe9" in table and "猫" in table and "\x1b" not in table
    assert len((out / "predictions.csv").read_bytes().split(b"\xe9")) > 12
    said = consoles("utf-8")
    common = ("--resume", out / "checkpoint-1.pth", root / "val", "--device", "cpu", "--num_workers", 0)
    run_predict(*common)
    run_predict(*common, "--csv", tmp_path / "c\udce9", "--features", tmp_path / "f\udce9.npz")
    assert "猫" in said() and said().count("\n") < 25 and "\x1b" not in said()
    words = [
        "--resume",
        str(out / "checkpoint-1.pth"),
        "--to",
        "safetensors",
        "--output",
        str(tmp_path / "e\udce9"),
    ]
    export.main(parse_args(ArgumentParser(parents=[export.get_args_parser()]), words))
    code = said().rsplit("load_file(", 1)[1].split("\n")[0].removesuffix("))")
    assert ast.literal_eval(code) == str(tmp_path / "e\udce9" / "model.safetensors")
    card = (tmp_path / "e\udce9" / "README.md").read_text(encoding="utf-8")
    assert r"caf\xe9, 猫" in card.replace(r"a\nb\x1b[31m, ", "") and "\x1b" not in card
    run_predict("--resume", tmp_path / "e\udce9" / "model.safetensors", root / "val", *common[3:])


def test_a2_a_full_disk_under_everything_but_the_checkpoints(tmp_path, monkeypatch, capsys):
    root, out = make_pictures(tmp_path / "d"), tmp_path / "out"
    from tensorboard.summary.writer.record_writer import RecordWriter

    from util.evaluate import report
    from util.run import run_log

    room = [0] * 99 + [1] * 12

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for place in (run_log, report):
        monkeypatch.setattr(place, "open", full, raising=False)
    monkeypatch.setattr(report, "replacing", full)
    monkeypatch.setattr(RecordWriter, "write", lambda *args: None if room.pop() else full())
    run(
        main_finetune,
        "--epochs 2 --batch_size 8 --warmup_epochs 0",
        data_path=root,
        output_dir=out,
        log_dir=tmp_path / "curves",
    )
    err = capsys.readouterr().err
    assert len(err.splitlines()) == err.count("No space left on device") == 3, err  # curves, log.txt, reports
    assert (out / "checkpoint-1.pth").exists()


def test_a2_the_console_fills_while_training(tmp_path, monkeypatch, capsys):
    class Filling(io.StringIO):
        def write(self, text):
            if "[1]" in text:
                raise OSError(28, "No space left on device")
            return super().write(text)

    root, out = make_pictures(tmp_path / "d"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Filling())
        run(main_pretrain, SMALL_MAE, data_path=root, output_dir=out)
    assert [row["epoch"] for row in read_log(out)] == [0, 1] and (out / "checkpoint-1.pth").exists()
    assert capsys.readouterr().err.count("stdout: cannot be written") == 1


def test_a2_a_table_that_is_lost_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "say", lambda text: False)
    monkeypatch.setattr(predict, "note", lambda text: None)
    root = make_pictures(tmp_path / "d", per_class=1, splits=("val",))
    torch.save({"model": vit_test(num_classes=3, global_pool=True).state_dict()}, tmp_path / "x.pth")
    words = ("--input_size", 32, "--num_heads", 3, "--device", "cpu", "--num_workers", 0)
    with pytest.raises(TrainingError, match="the table could not be written to stdout"):
        run_predict("--resume", tmp_path / "x.pth", root, *words)


def test_b10_lines_that_scripts_grep(tmp_path, capsys):
    root = make_pictures(tmp_path / "d")
    out = tmp_path / "out"
    run(
        main_finetune,
        "--epochs 1 --batch_size 8 --warmup_epochs 0 --max_steps 3",
        data_path=root,
        output_dir=out,
    )
    lines = capsys.readouterr().out.splitlines()
    acc = read_log(out)[-1]["test_acc1"]
    assert f"Accuracy of the network on the 24 test images: {acc:.1f}%" in lines
    assert f"Max accuracy: {acc:.2f}%" in lines and f"best accuracy so far: {acc:.3f} %" in lines
    assert sum(line.startswith("Averaged stats: lr: ") for line in lines) == 1
    assert "stopped by --max_steps 3" in lines
    run(main_pretrain, SMALL_MAE, "--max_steps 1", data_path=root, output_dir=tmp_path / "pre")
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("Averaged stats: lr: ") for line in lines) == 1
    assert lines.count("stopped by --max_steps 1") == 1


def test_a13_the_line_of_k_nn_survives_a_resume(tmp_path):
    root, out = make_pictures(tmp_path / "d", per_class=4), tmp_path / "out"
    flags = f"{SMALL_MAE} --save_freq 1"
    run(main_pretrain, flags, "--max_steps 1", data_path=root, output_dir=out)
    run(main_knn, "", data_path=root, output_dir=out, finetune=out / "checkpoint-0.pth")
    run(main_pretrain, flags, "--resume auto", data_path=root, output_dir=out)
    log = read_log(out)
    assert [row.get("epoch") for row in log] == [0, None, 1] and "knn_acc1" in log[1]


@pytest.mark.needs("posix")
def test_c2_the_scripts_start_where_posix_is_missing():
    code = """
import os, signal, sys
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "syslog"):
    sys.modules[name] = None
import torch, torchvision, timm.optim, numpy, PIL.Image  # which ask for the platform, not for the names
for name in ("fork", "register_at_fork", "statvfs", "sched_getaffinity", "getuid"):
    vars(os).pop(name, None)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "pthread_sigmask"):
    vars(signal).pop(name, None)
import main_pretrain, main_finetune, main_linprobe, main_knn, predict
from util.run.meters import peak_memory_mb
from util.sizes import default_workers
from util.processes import signals
signals.install()
main_pretrain.check_args(main_pretrain.get_args_parser().parse_args([]))
print(peak_memory_mb(), default_workers() > 0)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert result.stdout == "None True\n", result.stderr


@pytest.mark.parametrize("script", [main_finetune, main_linprobe, main_knn])
def test_c9_one_class(tmp_path, capsys, script):
    root = make_pictures(tmp_path / "d", classes=("only",))
    flags = "" if script is main_knn else "--epochs 1 --warmup_epochs 0 --batch_size 8"
    run(script, flags, data_path=root, output_dir=tmp_path / "out")
    assert capsys.readouterr().err.count("one class (only): nothing to tell apart") == 1


def test_c9_a_warm_up_longer_than_the_run(capsys):
    for words, count in (("", 1), ("--warmup_epochs 1", 0), ("--warmup_epochs 2", 1)):
        main_pretrain.check_args(given_args(main_pretrain, ["--epochs", "2", *words.split()]))
        assert capsys.readouterr().err.count("not below --epochs 2, so the learning rate rises") == count
    main_finetune.check_args(given_args(main_finetune, ["--epochs", "2", "--eval", "--resume", "x"]))
    assert capsys.readouterr().err == ""


def test_c9_statistics_of_0_to_255(capsys):
    for _ in range(2):
        channel_stats(3, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pass --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225" in err
    for mean, std in ((None, None), ([0.0], [1.0]), ([0.5], [0.5])):
        channel_stats(3, mean, std)
    assert capsys.readouterr().err == ""


def test_c9_features_that_are_no_npy(tmp_path, capsys):
    root = make_pictures(tmp_path / "d", per_class=1, splits=("val",))
    torch.save({"model": vit_test(num_classes=3, global_pool=True).state_dict()}, tmp_path / "x.pth")
    words = ("--input_size", 32, "--num_heads", 3, "--device", "cpu", "--num_workers", 0)
    run_predict("--resume", tmp_path / "x.pth", root, *words, "--features", tmp_path / "f.npy")
    assert capsys.readouterr().err.count("f.npy: becomes an .npz archive all the same") == 1
    assert np.load(tmp_path / "f.npy")["features"].shape == (3, 24)


@pytest.mark.parametrize("script", [main_pretrain, main_finetune, main_linprobe, main_knn])
def test_odd_seeds_and_devices(script):
    for words, message in (
        ("--seed 99999999999999999999", r"--seed 9{20}: must lie between -2\^63 and 2\^64 - 1"),
        ("--device meta", r"--device meta: not usable here \(it holds no numbers\)"),
        (f"--batch_size -1{'0' * 400}", "must be at least 1$"),
    ):
        with pytest.raises(UserError, match=message):
            script.main(given_args(script, words.split()))


def test_a4_rubbish_in_other_text_files(tmp_path):
    from demo.prepare_elpv import read_labels
    from util.demo_set.files import STAMP, is_complete
    from util.export.card import read_metrics

    for name in ("labels.csv", STAMP):
        (tmp_path / name).write_bytes(b"\xff\xfe\0")
    with pytest.raises(UserError, match=r"labels\.csv, line 1: not 'path probability type'"):
        read_labels(tmp_path)
    assert not is_complete(tmp_path, {})
    (tmp_path / "log.txt").write_bytes(b'\xff\xfe\n[1]\n{"epoch": 3, "x": 1}\n' + b'{"a":' * 100_000)
    assert json.dumps(read_metrics(tmp_path / "checkpoint-3.pth", 3)) == '{"epoch": 3, "x": 1}'
