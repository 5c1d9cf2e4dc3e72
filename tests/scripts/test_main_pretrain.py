"""The pre-training script as a user runs it: what it prints and writes, resuming, and wrong inputs."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from golden_utils import REPO
from image_utils import make_folder
from PIL import Image

import main_pretrain
from util.cli.parser import ArgumentParser, parse_args
from util.errors import UserError
from util.processes import signals
from util.weights.files import read_file

TINY = [
    *(
        "--model",
        "mae_vit_tiny_patch16",
        "--input_size",
        "32",
        "--patch_size",
        "8",
        "--decoder_embed_dim",
        "32",
    ),
    *("--decoder_depth", "1", "--decoder_num_heads", "2", "--batch_size", "4", "--epochs", "2"),
    *("--warmup_epochs", "1", "--num_workers", "0", "--vis_freq", "0", "--device", "cpu"),
]


def run(images, output, *flags):
    """Runs main() in this process; returns the lines of log.txt, without the run's id."""
    parser = ArgumentParser(prog="main_pretrain.py", parents=[main_pretrain.get_args_parser()])
    command = ["--data_path", str(images), "--output_dir", str(output), "--log_dir", "", *TINY, *flags]
    main_pretrain.main(parse_args(parser, command))
    log = output / "log.txt"
    lines = log.read_text().splitlines() if log.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key != "run"} for line in lines]


def names_in(folder):
    """What a user sees there."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def weights(path):
    return read_file(path)["model"]


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_run_prints_and_writes_what_it_should(images, tmp_path, capsys):
    log = run(
        images, tmp_path / "out", "--vis_freq", "1", "--log_dir", str(tmp_path / "tb"), "--norm_pix_loss"
    )
    out = capsys.readouterr().out
    texts = ["13 images", "2 classes", "effective batch: 4 x 1 process x 1 accumulated = 4", "M parameters"]
    texts += ["device: cpu, precision: torch.float32", "actual lr: 1.56e-05", "held-out loss"]
    for text in texts:
        assert text in out, f"{text!r} not in {out}"
    assert [line["epoch"] for line in log] == [0, 1]
    assert {"train_lr", "train_loss", "val_loss"} <= log[0].keys() and log[1]["train_loss"] < 3
    names = [f"{name}-{epoch}.{kind}" for name, kind in [("checkpoint", "pth"), ("reconstruction", "png")]
             for epoch in (0, 1)]  # fmt: skip
    assert names_in(tmp_path / "out") == sorted([*names, "log.txt"])
    assert list((tmp_path / "tb").glob("events.*"))
    with Image.open(tmp_path / "out" / "reconstruction-1.png") as picture:
        assert picture.width > 600
    content = read_file(tmp_path / "out" / "checkpoint-1.pth")
    assert content["epoch"] == 1 and content["args"]["model"] == "mae_vit_tiny_patch16"
    assert (
        "given" not in content["args"] and "\ngiven: " not in out
    )  # what was on the command line is no setting


@pytest.mark.parametrize("flags", [(), ("--loader", "reference", "--accum_iter", "2")])
def test_workers_do_not_change_a_result(images, tmp_path, flags):
    logs = [
        run(images, tmp_path / str(workers), "--num_workers", str(workers), "--epochs", "1", *flags)
        for workers in (0, 1, 3)
    ]
    assert logs[0] == logs[1] == logs[2]
    first = weights(tmp_path / "0" / "checkpoint-0.pth")
    for workers in (1, 3):
        assert_same(first, weights(tmp_path / str(workers) / "checkpoint-0.pth"))


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_after_an_epoch_and_resumed_is_uninterrupted_bit_for_bit(images, tmp_path, workers):
    flags = ("--num_workers", str(workers), "--vis_freq", "1")
    whole = run(images, tmp_path / "whole", *flags)
    run(images, tmp_path / "parts", *flags, "--max_steps", "3")  # 13 images, batches of 4: 3 steps an epoch
    assert (tmp_path / "parts" / "checkpoint-0.pth").exists()
    parts = run(images, tmp_path / "parts", *flags, "--resume", "auto")
    assert whole == parts
    assert_same(weights(tmp_path / "whole/checkpoint-1.pth"), weights(tmp_path / "parts/checkpoint-1.pth"))


def test_interrupted_inside_an_epoch_and_resumed_is_uninterrupted_bit_for_bit(images, tmp_path, capsys):
    flags = ("--accum_iter", "2", "--num_workers", "1")
    run(images, tmp_path / "whole", *flags)
    run(images, tmp_path / "parts", *flags, "--max_steps", "3")  # 2 updates an epoch: ends inside the second
    assert "stopped by --max_steps 3" in capsys.readouterr().out
    assert names_in(tmp_path / "parts") == ["checkpoint-0.pth", "checkpoint-1-step2.pth", "log.txt"]
    run(images, tmp_path / "parts", *flags, "--resume", "auto")
    assert_same(weights(tmp_path / "whole/checkpoint-1.pth"), weights(tmp_path / "parts/checkpoint-1.pth"))


def test_a_signal_during_set_up_saves_after_the_first_step(images, tmp_path, monkeypatch):
    build = main_pretrain.build_pretrain_dataset

    def build_and_be_told_to_stop(args):
        signal.raise_signal(signal.SIGTERM)
        return build(args)

    with monkeypatch.context() as patch, pytest.raises(signals.Interrupted, match="SIGTERM"):
        patch.setattr(main_pretrain, "build_pretrain_dataset", build_and_be_told_to_stop)
        run(images, tmp_path)
    signals.clear()
    assert names_in(tmp_path) == ["checkpoint-0-step1.pth"]


@pytest.mark.parametrize("resume", ["auto", "checkpoint-0.pth"])
def test_a_checkpoint_is_read_once(images, tmp_path, monkeypatch, resume):
    run(images, tmp_path, "--epochs", "1")
    reads, load = [], torch.load

    def counting(path, *rest, **named):
        reads.append(os.path.basename(path))
        return load(path, *rest, **named)

    monkeypatch.setattr(torch, "load", counting)
    run(images, tmp_path, "--resume", resume if resume == "auto" else str(tmp_path / resume))
    assert reads == ["checkpoint-0.pth"]


def test_repeated_augmentation(images, tmp_path, capsys):
    """Batches count crops, an epoch is R times as many steps; interrupted inside it, bit for bit the same."""
    flags = ["--epochs", "2", "--repeated_aug", "2", "--num_workers", "0"]
    run(images, tmp_path / "whole", *flags)  # 13 images, 2 in a batch of 4
    text = capsys.readouterr().out
    assert "= 4, 6 micro-steps an epoch" in text and "2 epochs are 4 effective epochs" in text
    run(images, tmp_path / "parts", *flags, "--max_steps", "8")
    with pytest.raises(UserError, match=r"inside an epoch, .*: repeated_aug 2 -> 4; keep to it"):
        run(images, tmp_path / "parts", *flags, "--repeated_aug", "4", "--resume", "auto")
    run(images, tmp_path / "parts", *flags, "--resume", "auto")
    assert_same(
        weights(tmp_path / "whole" / "checkpoint-1.pth"), weights(tmp_path / "parts" / "checkpoint-1.pth")
    )


def test_rectangular_images_of_one_channel(tmp_path):
    make_folder(tmp_path / "wide", 4, height=40, width=150)
    flags = ("--input_size", "32x128", "--in_chans", "1", "--vis_freq", "1", "--epochs", "1")
    assert len(run(tmp_path / "wide", tmp_path / "out", *flags)) == 1
    assert weights(tmp_path / "out/checkpoint-0.pth")["pos_embed"].shape == (1, 65, 192)


def test_clipping_and_schedule_reach_the_optimizer(images, tmp_path):
    log = run(
        images, tmp_path, "--clip_grad", "0.1", "--lr", "0.5", "--warmup_epochs", "0", "--min_lr", "0.25"
    )
    assert log[0]["train_lr"] > 0.4 and 0.25 < log[1]["train_lr"] < 0.4
    content = read_file(tmp_path / "checkpoint-1.pth")
    assert content["args"]["lr"] == 0.5 and content["optimizer"]["param_groups"][1]["weight_decay"] == 0.05


def make_bad(folder, count=13):
    make_folder(folder, count)
    (folder / "005.jpg").write_text("this is no image")
    return folder


@pytest.mark.parametrize(
    "flags, text",
    [
        (("--accum_iter", "0"), "--accum_iter 0: must be at least 1"),
        (("--mask_ratio", "1.0"), "--mask_ratio 1.0: must lie between 0 and 1"),
        (("--mask_ratio", "0"), "--mask_ratio 0.0: must lie between 0 and 1"),
        (("--mask_ratio", "0.99"), "keeps none of 16 patches"),
        (("--input_size", "30"), "30x30 is not divisible by the patch size 8"),
        (("--decoder_num_heads", "5"), "decoder width 32 is not divisible by its 5 heads"),
        (("--decoder_embed_dim", "34"), "decoder width 34 is not divisible by 4"),
        (("--batch_size", "14"), "--batch_size 14: 1 x 14 is more than the 13 images"),
        (("--repeated_aug", "3"), "--repeated_aug 3: --batch_size 4 must be a multiple of it"),
        (("--repeated_aug", "0"), "--repeated_aug 0: must be at least 1"),
        (("--device", "cuda:9"), "--device cuda:9: not usable here"),
        (("--amp_dtype", "fp16"), "--amp_dtype fp16: not on CPU"),
        (("--mean", "0.5", "0.5"), "--mean"),
        (("--resume", "none.pth"), "--resume none.pth: no such file"),
        (("--data_path", "nowhere"), "nowhere"),
    ],
)
def test_wrong_flags(images, tmp_path, flags, text):
    with pytest.raises(UserError) as error:
        run(images, tmp_path / "out", *flags)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.pth"))


def test_bad_images_are_named_or_skipped(tmp_path, capsys):
    make_bad(tmp_path / "images")
    with pytest.raises(UserError, match=r"005\.jpg"):
        run(tmp_path / "images", tmp_path / "out")
    log = run(tmp_path / "images", tmp_path / "out", "--bad_images", "skip", "--epochs", "1")
    out = capsys.readouterr()
    assert len(log) == 1 and "12 images" in out.out and "005.jpg" in out.out + out.err


def test_empty_and_imageless_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    for name in ("empty", "texts"):
        with pytest.raises(UserError, match=name):
            run(tmp_path / name, tmp_path / "out")


def test_a_checkpoint_of_another_architecture(images, tmp_path):
    run(images, tmp_path, "--epochs", "1")
    with pytest.raises(UserError, match="another architecture"):
        run(images, tmp_path, "--resume", str(tmp_path / "checkpoint-0.pth"), "--decoder_embed_dim", "64")


def test_from_the_shell(images, tmp_path):
    """One line on standard error and exit code 2; a good run exits with 0."""

    def shell(*flags):
        command = [
            sys.executable,
            "main_pretrain.py",
            "--data",
            str(images),
            *TINY,
            "--output_dir",
            str(tmp_path),
        ]
        command += ["--log_dir", str(tmp_path), "--max_steps", "1", *flags]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True)

    bad = shell("--input_size", "33")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "33x33" in bad.stderr
    good = shell()
    assert good.returncode == 0, good.stderr
    assert "stopped by --max_steps 1" in good.stdout and (tmp_path / "checkpoint-0-step1.pth").exists()


def test_an_older_checkpoint_gives_no_epoch_twice_and_weights_alone_harm_no_log(images, tmp_path):
    whole = run(images, tmp_path, "--save_freq", "1")
    assert run(images, tmp_path, "--save_freq", "1", "--resume", str(tmp_path / "checkpoint-0.pth")) == whole
    (tmp_path / "log.txt").write_text((tmp_path / "log.txt").read_text().splitlines()[0] + "\n")
    assert run(images, tmp_path, "--resume", "auto") == whole  # killed between saving and logging
    torch.save({"model": weights(tmp_path / "checkpoint-1.pth")}, tmp_path / "weights.pth")
    again = run(images, tmp_path, "--resume", str(tmp_path / "weights.pth"), "--epochs", "1")
    assert again[:2] == whole and len(again) == 3
