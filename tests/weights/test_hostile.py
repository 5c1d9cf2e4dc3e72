"""Hostile and broken files: a clear error or a skip, never a crash, a hang, or code that runs."""

import io
import os
import pickle
import random
import shutil
import subprocess

import numpy as np
import pytest
import torch
from golden_utils import GOLDEN, TINY_MAE
from image_utils import make_folder, picture
from PIL import Image

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import models_mae
from util.cli.parser import ArgumentParser, parse_args
from util.data.read import BadImage, read_image
from util.errors import TrainingError, UserError
from util.run import resume, start
from util.weights import files


def mutations(data: bytes, count: int, seed: int):
    """`count` damaged versions of a file: bytes changed, cut off, repeated, or swapped for others."""
    rng = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(data)
        kind = rng.randrange(4)
        if kind == 0:
            for _ in range(rng.choice([1, 4, 64])):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        elif kind == 1:
            del damaged[rng.randrange(len(damaged)) :]
        elif kind == 2:
            start = rng.randrange(len(damaged))
            damaged[start:start] = damaged[start : start + rng.randrange(1, 200)]
        else:
            start = rng.randrange(min(len(damaged), 2000))
            damaged[start : start + 8] = rng.randbytes(8)
        yield bytes(damaged)


@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoints(tmp_path):
    original = (GOLDEN / "checkpoint-0.pth").read_bytes()
    read = refused = 0
    for data in mutations(original, 150, seed=0):
        path = tmp_path / "damaged.pth"
        path.write_bytes(data)
        try:
            content = files.read_file(path)
            model = models_mae.mae_vit(TINY_MAE)
            args = type("Args", (), {"resume": str(path), "output_dir": "", "eval": False})()
            resume.load_model(args, model, torch.optim.AdamW(model.parameters()), None)
            assert isinstance(content, dict)
            read += 1  # the damage is in numbers or in padding
        except UserError as error:
            assert "\n" not in str(error) and "damaged.pth" in str(error)
            refused += 1
    assert refused > 20 and read + refused == 150


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_damaged_images(tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(picture(0, 24, 24)).save(buffer, kind)
    for data in mutations(buffer.getvalue(), 60, seed=1):
        path = tmp_path / "damaged"
        path.write_bytes(data)
        try:
            image = read_image(str(path))
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        except BadImage as error:
            assert "\n" not in str(error)


class Trap:
    """A pickle that makes a folder when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("script, flag", [
    (main_pretrain, "--resume"), (main_finetune, "--finetune"), (main_finetune, "--resume"),
    (main_linprobe, "--finetune"), (main_knn, "--finetune"),
])  # fmt: skip
def test_a_malicious_pickle_behind_any_flag_is_refused(tmp_path, script, flag):
    make_folder(tmp_path / "data" / "train", 8, classes=2)
    make_folder(tmp_path / "data" / "val", 4, classes=2)
    evil, trap = tmp_path / "evil.pth", tmp_path / "executed"
    evil.write_bytes(pickle.dumps({"model": Trap(trap)}))
    parser = ArgumentParser(parents=[script.get_args_parser()])
    name = "mae_vit_tiny_patch16" if script is main_pretrain else "vit_tiny_patch16"
    command = [
        "--data_path",
        str(tmp_path / "data"),
        "--model",
        name,
        "--input_size",
        "32",
        "--patch_size",
        "8",
    ]
    command += ["--batch_size", "4", "--num_workers", "0", "--device", "cpu", flag, str(evil)]
    if script is not main_knn:
        command += ["--output_dir", str(tmp_path / "out"), "--log_dir", ""]
    with pytest.raises(UserError, match=r"evil\.pth"):
        script.main(parse_args(parser, command))
    assert not trap.exists()


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or not shutil.which("mount"), reason="needs root for a tmpfs"
)
def test_a_full_disk_keeps_training_and_the_old_checkpoint(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path / "data", 8)
    output = tmp_path / "small"
    output.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(output)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        parser = ArgumentParser(parents=[main_pretrain.get_args_parser()])
        command = [
            "--data_path",
            str(tmp_path / "data"),
            "--model",
            "mae_vit_tiny_patch16",
            "--input_size",
            "32",
        ]
        command += [
            "--patch_size",
            "8",
            "--batch_size",
            "4",
            "--num_workers",
            "0",
            "--device",
            "cpu",
            "--epochs",
            "2",
        ]
        command += [
            "--decoder_depth",
            "1",
            "--decoder_embed_dim",
            "32",
            "--save_freq",
            "1",
            "--vis_freq",
            "0",
        ]
        command += ["--output_dir", str(output), "--log_dir", "", "--save_minutes", "100"]
        main_pretrain.main(parse_args(parser, [*command, "--epochs", "1"]))
        size = (output / "checkpoint-0.pth").stat().st_size
        filler = shutil.disk_usage(output).free - size // 2  # half a checkpoint fits
        (output / "filler").write_bytes(b"x" * filler)
        monkeypatch.setattr(start, "prepare_output_dir", lambda *_: None)  # as if it filled up later
        with pytest.raises(TrainingError, match="the last checkpoint could not be written"):
            main_pretrain.main(parse_args(parser, [*command, "--resume", "auto"]))
        error = capsys.readouterr().err
        assert "NO CHECKPOINT WAS WRITTEN" in error and "no space left on device" in error
        assert len((output / "log.txt").read_text().splitlines()) == 2  # training went on to the end
        assert files.read_file(output / "checkpoint-0.pth")["epoch"] == 0
        assert not list(output.glob(".checkpoint*")) and not (output / "checkpoint-1.pth").exists()
    finally:
        subprocess.run(["umount", str(output)], check=True)
