"""Runs the fine-tuning, probing and k-NN scripts in this process on a small model and small pictures."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from golden_utils import TINY, TINY_MAE
from PIL import Image
from torch import nn

import models_mae
import models_vit
from util.cli.parser import ArgumentParser, parse_args

NORM = partial(nn.LayerNorm, eps=1e-6)
COMMON = "--model vit_test --input_size 32 --num_workers 0 --device cpu --print_freq 1000"


def vit_test(**kwargs):
    """A named model small enough for tests."""
    return models_vit.VisionTransformer(**{**TINY, "norm_layer": NORM, **kwargs})


def make_pictures(
    root: Path, classes=("bright", "dark", "red"), per_class=8, splits=("train", "val")
) -> Path:
    """An ImageFolder of noisy pictures whose colour tells the class."""
    rs = np.random.RandomState(0)
    colours = [(180, 180, 180), (70, 70, 70), (190, 60, 60), (60, 60, 190)]
    for split in splits:
        for name, colour in zip(classes, colours, strict=False):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                noise = rs.normal(0, 25, (44, 40, 3))
                Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def make_mae(seed=0):
    torch.manual_seed(seed)
    return models_mae.MaskedAutoencoderViT(**TINY_MAE, norm_layer=NORM)


def given_args(script, words: list[str]):
    """The arguments as the script gets them from its command line."""
    return parse_args(ArgumentParser(parents=[script.get_args_parser()]), words)


def run(script, *flags, **paths):
    """Calls a script's `main` with `flags` (one string or several) and `--name path` for each of `paths`."""
    words = [*COMMON.split(), *" ".join(flags).split()]
    for name, value in paths.items():
        words += [f"--{name}", str(value)]
    if "output_dir" in paths and "log_dir" not in paths:
        words += ["--log_dir", ""]
    return script.main(given_args(script, words))


def read_log(folder: Path) -> list[dict]:
    """The lines of log.txt, without the run's id."""
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "run"} for record in records]


def state_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


def same_state(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def released_files(folder: Path) -> dict[str, Path]:
    """Files with the layouts of the released ones, from one encoder: encoder only, full, fine-tuned."""
    mae = make_mae()
    encoder = {k: v for k, v in mae.state_dict().items() if not k.startswith("decoder") and k != "mask_token"}
    torch.manual_seed(1)
    classifier = vit_test(global_pool=True, num_classes=9)
    contents = {"encoder": encoder, "full": mae.state_dict(), "finetuned": classifier.state_dict()}
    paths = {}
    for name, state in contents.items():
        paths[name] = folder / f"mae_{name}.pth"
        torch.save({"model": state}, paths[name])
    return paths
