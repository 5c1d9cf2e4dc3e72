"""Every script on a GPU as a user starts it, with its flags, compiled as is the default there."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_main_pretrain import assert_same, run, weights
from test_main_segment import make_masked
from test_teacher import write_teacher
from transfer_utils import given_args, make_pictures, read_log

import export
import main_evaluate
import main_finetune
import main_knn
import main_linprobe
import main_segment
import predict
from util.run import owner

DEVICE = os.environ.get("MAE_TEST_DEVICE", "cuda")  # cpu: a trial of this file
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nano")]

# Compiled as is the default: what changes the graph
COMPILED = ["default", "fp16", "graphs", "recomputed", "cross_half", "registers", "block", "hog", "teacher"]
COMPILED += ["sizes"]
NANO = ["--model", "mae_vit_nano", "--device", DEVICE, "--vis_freq", "1", "--save_freq", "1", "--lr", "1e-3"]
WAYS = {
    "default": "",
    "norm_pix_loss": "--norm_pix_loss",
    "fp16": "--amp_dtype fp16",
    "float32": "--amp_dtype none",
    "graphs": "--compile_mode reduce-overhead",
    "recomputed": "--grad_checkpointing",
    "accumulated": "--accum_iter 2 --clip_grad 1",
    "repeated": "--repeated_aug 2",
    "workers": "--num_workers 2",
    "reference": "--loader reference",
    "cross": "--decoder cross",
    "cross_half": "--decoder cross --predict_ratio 0.5",
    "registers": "--registers 3",
    "block": "--mask block",
    "grid": "--mask grid",
    "inverse_block": "--mask inverse_block",
    "file": "--mask file --mask_file MASK",
    "visible": "--visible_loss 0.5",
    "hog": "--target hog",
    "pca": "--target pca",
    "lowpass": "--target lowpass",
    "teacher": "--target teacher --teacher TEACHER",
    "muon": "--opt muon",
    "muon_fp16": "--opt muon --amp_dtype fp16",
    "nadamuon": "--opt nadamuon --opt_args ns_steps=3",
    "lion": "--opt lion",
    "adamw_args": "--opt adamw --opt_args eps=1e-7",
    "ema": "--ema 0.9",
    "wsd": "--schedule wsd --cooldown 1",
    "sizes": "--size_schedule 16:0 32:0.5",
    "grey": "--in_chans 1",
    "measured": "--knn_freq 1 --card_freq 1",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name in WAYS: path}."""
    folder = tmp_path_factory.mktemp("files")
    hidden = np.zeros((4, 4), np.uint8)
    hidden[:3] = 255
    Image.fromarray(hidden).save(folder / "mask.png")
    return {"MASK": str(folder / "mask.png"), "TEACHER": str(write_teacher(folder / "teacher.pth"))}


@pytest.mark.parametrize("way", WAYS)
def test_pre_training_learns_what_it_learns_on_a_cpu(way, images, files, tmp_path, capsys):
    """Masks are drawn on the device, so losses differ by the draw: 4 epochs of 3 steps, some 20 % of them."""
    flags = [files.get(word, word) for word in WAYS[way].split()]
    logs, how = {}, [] if way in COMPILED else ["--no_compile"]
    for device in (DEVICE, "cpu"):
        words = [*NANO, "--epochs", "4", *how, *flags, "--device", device]
        if device == "cpu":
            words += ["--amp_dtype", "none", "--no_compile", "--compile_mode", "default"]
        logs[device] = run(images, tmp_path / f"on-{device}", *words)
        owner.release()
    said = capsys.readouterr().err
    assert "compile" not in said and "warning" not in said, said
    for name in ("train_loss", "val_loss"):
        found, expected = ([line[name] for line in logs[device]] for device in (DEVICE, "cpu"))
        assert found == pytest.approx(expected, rel=0.2), name


@pytest.mark.parametrize(
    "way", ["default", "fp16", "muon", "ema", "cross_half", "sizes", "registers", "file"]
)
def test_a_resumed_run_is_the_whole_one_bit_for_bit(way, images, files, tmp_path):
    flags = [*NANO, *(files.get(word, word) for word in WAYS[way].split()), "--epochs", "4"]
    flags += [] if way == "default" else ["--no_compile"]
    run(images, tmp_path / "whole", *flags)
    owner.release()
    for steps in ("4", "8", "0"):  # inside of epochs; 3 steps are one
        run(images, tmp_path / "parts", *flags, "--resume", "auto", "--max_steps", steps)
        owner.release()
    whole, parts = (weights(tmp_path / name / "checkpoint-3.pth") for name in ("whole", "parts"))
    assert_same(whole, parts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(labelled pictures, a checkpoint pre-trained on them on the GPU)."""
    root = tmp_path_factory.mktemp("trained")
    pictures = make_pictures(root / "pictures")
    words = ["--model", "mae_vit_tiny_patch16", "--device", DEVICE, "--no_compile"]
    run(pictures, root / "out", *words)
    owner.release()
    return pictures, root / "out/checkpoint-1.pth"


def call(script, words, **paths):
    words = words.split() + [str(word) for name, value in paths.items() for word in (f"--{name}", value)]
    try:
        return script.main(given_args(script, words))
    finally:
        owner.release()


COMMON = "--input_size 32 --num_workers 0 "
MODEL = "--model vit_tiny_patch16 --patch_size 8 "
PROBE = COMMON + MODEL + "--batch_size 8 --epochs 20 --warmup_epochs 1 --nb_classes 3 --lr 2 "
FINETUNE = (
    COMMON + MODEL + "--batch_size 8 --epochs 8 --warmup_epochs 1 --nb_classes 3 --blr 5e-2 --reprob 0 "
)
SCRIPTS = {
    "finetune": (main_finetune, FINETUNE),
    "finetune_drop_path": (main_finetune, FINETUNE + "--drop_path 0.2 --mixup 0.8 --cutmix 1.0"),
    "finetune_muon": (main_finetune, FINETUNE.replace("--blr 5e-2", "--lr 3e-3") + "--opt muon"),
    "finetune_ema": (main_finetune, FINETUNE + "--ema 0.9 --accum_iter 2"),
    "linprobe": (main_linprobe, PROBE),
    "linprobe_cached": (main_linprobe, PROBE + "--cache_features"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_classifiers_learn(name, trained, tmp_path, capsys):
    script, words = SCRIPTS[name]
    pictures, checkpoint = trained
    paths = {"data_path": pictures, "finetune": checkpoint, "output_dir": tmp_path, "log_dir": ""}
    call(script, f"{words} --device {DEVICE}", **paths)
    said = capsys.readouterr().err
    assert "compile" not in said and "warning" not in said, said
    assert read_log(tmp_path)[-1]["test_acc1"] > 80


def test_segmentation_learns(tmp_path, trained, monkeypatch, capsys):
    masked = make_masked(tmp_path / "masked")
    words = (
        COMMON
        + MODEL
        + f"--batch_size 4 --epochs 4 --warmup_epochs 1 --lr 3e-3 --nb_classes 3 --device {DEVICE}"
    )
    call(main_segment, words, data_path=masked, finetune=trained[1], output_dir=tmp_path / "o", log_dir="")
    said = capsys.readouterr().err
    assert "compile" not in said and "warning" not in said, said
    assert read_log(tmp_path / "o")[-1]["test_miou"] > 30


def test_knn_card_and_predictions_are_those_of_the_cpu(trained, tmp_path):
    """Features in float32 (TF32 on the GPU: 1e-3 of their norm)."""
    pictures, checkpoint = trained
    found, features = [], []
    for device in (DEVICE, "cpu"):
        words = f"{COMMON} --device {device} --amp_dtype none"
        knn = call(main_knn, f"{MODEL} {words} --k 5", data_path=pictures, finetune=checkpoint)
        columns = call(
            main_evaluate, words, data_path=pictures, finetune=checkpoint, output_dir=tmp_path / device
        )
        found.append([knn["knn_acc1"], *(row.score for row in columns["encoder"].rows.values())])
        file = tmp_path / f"{device}.npz"
        words = f"--device {device} --num_workers 0 --amp_dtype none --features {file}"
        predict.main(
            given_args(predict, ["--resume", str(checkpoint), str(pictures / "val"), *words.split()])
        )
        with np.load(file) as content:
            features.append(torch.from_numpy(content["features"]))
    assert found[0] == pytest.approx(found[1], abs=5)  # a picture of 24 is 4 points
    assert (features[0] - features[1]).norm() < 1e-3 * features[1].norm()


def test_a_checkpoint_of_a_gpu_is_exported(trained, tmp_path):
    words = ["--resume", str(trained[1]), "--to", "safetensors", "--output", str(tmp_path / "e")]
    export.main(given_args(export, words))
    assert (tmp_path / "e/model.safetensors").exists()
