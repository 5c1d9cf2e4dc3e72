"""Small checkpoints of every kind, and `export.py` called as from the shell."""

import json
import sys
from functools import partial

import pytest
import torch
from golden_utils import TINY, TINY_MAE
from torch import nn

import export
import models_mae
import models_vit
from models_seg import SegmentationTransformer
from util.cli.parser import ArgumentParser, run_script

NORM = partial(nn.LayerNorm, eps=1e-6)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def shake(model, seed=0):
    """Moves every parameter from where it was initialised, so that none goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval().requires_grad_(False)


def make_mae(kind=models_mae.MaskedAutoencoderViT, **changes):
    return shake(kind(**{**TINY_MAE, "norm_layer": NORM, **changes}))


def make_vit(global_pool=False, **changes):
    return shake(
        models_vit.VisionTransformer(global_pool, **{**TINY, "num_classes": 5, "norm_layer": NORM, **changes})
    )


def save_mae(folder, mae=None, epoch=7, **changes):
    """A checkpoint as main_pretrain writes it, with a log.txt beside it."""
    mae = make_mae() if mae is None else mae
    args = dict(
        model="mae_vit_tiny_patch16", input_size=list(mae.img_size), patch_size=mae.patch_size,
        in_chans=mae.in_chans,
        mean=(MEAN * 2)[: mae.in_chans], std=(STD * 2)[: mae.in_chans], norm_pix_loss=mae.norm_pix_loss,
        mask_ratio=0.6, num_heads=3, decoder_num_heads=4, data_path="/home/somebody/photos", batch_size=64,
        epochs=400, output_dir="/home/somebody/out", finetune="", given=["epochs"],
    )  # fmt: skip
    path = folder / f"checkpoint-{epoch}.pth"
    torch.save({"model": mae.state_dict(), "epoch": epoch, "args": {**args, **changes}}, path)
    lines = [
        json.dumps({"train_loss": 0.9 - 0.01 * i, "epoch": i, "val_loss": 0.5}) for i in range(epoch + 3)
    ]
    (folder / "log.txt").write_text("\n".join([*lines, '{"train_loss": 0.1, "epo']), encoding="utf-8")
    return path, mae


def save_vit(folder, global_pool, probe=False, **changes):
    """A checkpoint as main_finetune or main_linprobe writes it."""
    vit = make_vit(global_pool, **changes)
    if probe:
        vit.head = nn.Sequential(nn.BatchNorm1d(24, affine=False, eps=1e-6), vit.head)
        vit.head[0].running_mean.normal_(), vit.head[0].running_var.uniform_(0.5, 2)
        vit.eval()
    height, width = vit.patch_embed.img_size
    info = dict(
        model="vit_tiny_patch16", global_pool=global_pool, input_size=(height, width), patch_size=8,
        nb_classes=5,
        in_chans=vit.patch_embed.proj.in_channels, mean=MEAN, std=STD, num_heads=3,
        class_names=["bee", "ant", "big cat", "d<o>g", "eel"], recipe="linprobe" if probe else "finetune",
    )  # fmt: skip
    path = folder / "checkpoint-best.pth"
    torch.save({"model": vit.state_dict(), "epoch": 2, "model_info": info, "args": {"lr": 1e-3}}, path)
    return path, vit


def save_segmenter(folder, head, layers):
    """A checkpoint as main_segment writes it."""
    model = shake(SegmentationTransformer(3, head, layers, **TINY, norm_layer=NORM))
    if head == "linear":
        model.head.norm.running_mean.normal_(), model.head.norm.running_var.uniform_(0.5, 2)
    info = {"model": "vit_tiny_patch16", "input_size": (32, 32), "patch_size": 8, "in_chans": 3,
            "num_heads": 3, "nb_classes": 3, "mean": MEAN, "std": STD, "global_pool": False,
            "recipe": "segment", "class_names": ["ground", "ball", "cube"]}  # fmt: skip
    path = folder / "checkpoint-best.pth"
    torch.save({"model": model.state_dict(), "model_info": info, "args": {"mode": "finetune"}}, path)
    return path, model


def run_export(*words):
    """Calls the script; raises what it raises, SystemExit at a mistake."""
    before, sys.argv = sys.argv, ["export.py", *map(str, words)]
    try:
        run_script(export.main, ArgumentParser(prog="export.py", parents=[export.get_args_parser()]))
    finally:
        sys.argv = before


def refused(capsys, *words, status=2) -> str:
    """The one line that the script ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_export(*words)
    assert stop.value.code == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("export.py: error: ")
    return error
