"""Time to quality: processor seconds of a recipe and of the baseline, and what they reach, in pairs.

    python records/measure.py --cells DIR --json records/fast-tiny.json

Rules and results: records/README.md. DIR is what `python demo/prepare_elpv.py DIR --labels both` writes. All
runs are made in one process with one thread; the order of a pair is reversed with each seed. What is in the
JSON file is not measured again, so that a record can be measured in parts.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image

import main_pretrain
from engine_pretrain import evaluate
from util.cli.flags import at_least
from util.cli.parser import ArgumentParser, parse_args, run_script
from util.data.dataset import build_val_dataset
from util.data.loader import build_loader
from util.data.sampler import EvalSampler
from util.errors import UserError
from util.evaluate.features import encoder_features, extract_features
from util.evaluate.knn import knn_from_features, knn_loaders
from util.files import replacing
from util.processes.collectives import log
from util.run import owner
from util.weights.files import read_file
from util.weights.names import list_checkpoints

COMMON = (
    "--model mae_vit_tiny_patch16 --norm_pix_loss --batch_size 32 --warmup_epochs 1 --num_workers 0 "
    "--device cpu --vis_freq 0 --save_freq 1000 --print_freq 1000"
)
TASKS = {  # the third was not looked at while recipes were chosen
    "painted": "--input_size 64 --patch_size 8",
    "cells": "--input_size 96 --patch_size 12 --in_chans 1",
    "digits": "--input_size 32 --patch_size 4 --in_chans 1",
}
RECIPES = {"baseline": "recipes/baseline-tiny.txt", "fast": "recipes/fast-tiny.txt"}
QUALITY = {"loss": -1, "probe": 1, "knn": 1}  # figure: its sign where better


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    flag = parser.add_argument
    flag("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    flag("--seeds", default=6, type=at_least(2))
    flag("--cells", default="", metavar="DIR", help="the solar cells, with four labels")
    fast = str(ROOT / RECIPES["fast"])
    flag("--fast", default=fast, metavar="FILE", help=f"flags of the recipe (default: {RECIPES['fast']})")
    flag("--flags", default="", metavar="TEXT", help="flags of both sides, such as --amp_dtype, as one text")
    flag("--json", default="records/record.json", metavar="FILE", help="what is measured is added to it")
    return parser


def make_digits(folder: Path) -> Path:
    """scikit-learn's 1,797 digits of 8 pixels as grey PNGs of 32, every fourth in val/."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / ("val" if i % 4 == 3 else "train") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((image * 255 / 16).clip(0, 255).astype("uint8"))
        picture.resize((32, 32), Image.Resampling.BICUBIC).save(place / f"{i:04}.png")
    return folder


def probe(train, train_labels, val, val_labels) -> float:
    """Accuracy in percent of ridge regression on standardised features; its strength is chosen on `train`."""
    from sklearn.linear_model import RidgeClassifierCV

    mean, std = train.mean(0), train.std(0) + 1e-6
    train, val = (((part - mean) / std).double().numpy() for part in (train, val))
    ridge = RidgeClassifierCV(alphas=[10.0**power for power in range(0, 6)]).fit(train, train_labels.numpy())
    return 100 * ridge.score(val, val_labels.numpy())


def measure(words: str, task: str, seed: int, folder: Path) -> dict[str, float]:
    """Processor seconds of a training and its quality: held-out loss with 75 % masked, a ridge probe and
    k-NN of the mean patch features.
    """
    flags = f"{COMMON} {task} {words} --seed {seed} --output_dir {folder} --log_dir {folder}".split()
    parser = ArgumentParser(parents=[main_pretrain.get_args_parser()])
    args = parse_args(parser, flags)
    began = time.process_time()
    main_pretrain.main(args)
    seconds = time.process_time() - began
    owner.release()

    model = main_pretrain.build_model(args)
    content = read_file(str(list_checkpoints(folder)[0]), "--resume", verify=True)
    model.load_state_dict(content["model"])
    args.mask_ratio, args.amp_dtype, device = 0.75, "none", torch.device("cpu")
    images = build_val_dataset(args)
    loader = build_loader(images, EvalSampler(len(images), 1, 0), 32, 0, False)
    loss = evaluate(loader, model, device, args)
    model.eval()
    features = functools.partial(encoder_features, model)
    train, val = (extract_features(features, part, device, args) for part in knn_loaders(args))
    knn = knn_from_features(*train, *val)["acc1"]
    return {"seconds": seconds, "loss": loss, "probe": probe(*train, *val), "knn": knn}


def compared(pairs: list[tuple[dict, dict]]) -> dict[str, tuple[float, float]]:
    """{figure: (baseline's mean, fast one's mean, p)}; p: one-sided, of a paired t-test that the fast recipe
    is better. Of the time, logarithms are tested.
    """
    from scipy.stats import ttest_rel

    found = {}
    for name, sign in {"seconds": -1, **QUALITY}.items():
        base, fast = ([run[name] for run in side] for side in zip(*pairs, strict=True))
        of = math.log if name == "seconds" else float
        test = ttest_rel([sign * of(v) for v in fast], [sign * of(v) for v in base], alternative="greater")
        found[name] = statistics.fmean(base), statistics.fmean(fast), float(test.pvalue)
    return found


def table(runs: dict[str, dict]) -> str:
    """A line a task: mean of each figure, baseline -> fast, p; and how many times less processor time."""
    lines = ["| task | seeds | processor s | times less | held-out loss | ridge probe (%) | k-NN (%) |"]
    lines.append("|" + " --- |" * 7)
    for task in TASKS:
        keys = [(key, key.replace("baseline", "fast")) for key in runs if key.startswith(f"{task} baseline")]
        pairs = [(runs[base], runs[fast]) for base, fast in keys if fast in runs]
        if len(pairs) < 2:
            continue
        found = compared(pairs)
        ratios = [math.log(base["seconds"] / fast["seconds"]) for base, fast in pairs]
        less = math.exp(statistics.fmean(ratios))
        rows = zip(found.values(), (1, 4, 1, 1), strict=True)
        cells = [f"{base:.{digits}f} -> {fast:.{digits}f} (p {p:.2g})" for (base, fast, p), digits in rows]
        lines.append(f"| {' | '.join([task, str(len(pairs)), cells[0], f'{less:.2f}', *cells[1:]])} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    path = Path(args.json)
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    recipes = {"baseline": f"@{ROOT / RECIPES['baseline']}", "fast": f"@{Path(args.fast).resolve()}"}
    with tempfile.TemporaryDirectory() as scratch:
        data = {"painted": "", "cells": f"--data_path {args.cells}"}
        if "digits" in args.tasks:
            data["digits"] = f"--data_path {make_digits(Path(scratch, 'digits'))}"
        if "cells" in args.tasks and not args.cells:
            raise UserError(
                "--cells DIR: where are they? (python demo/prepare_elpv.py), or name other --tasks"
            )
        first = f"{TASKS['painted']} {args.flags}"
        # What a process does once is not counted
        measure(f"{recipes['fast']} --max_steps 2", first, 0, Path(scratch, "first"))
        for seed in range(args.seeds):
            for task in args.tasks:
                for recipe in list(recipes)[:: 1 if seed % 2 == 0 else -1]:
                    if (key := f"{task} {recipe} {seed}") in runs:
                        continue
                    folder = Path(scratch, key.replace(" ", "-"))
                    flags = f"{TASKS[task]} {data[task]} {args.flags}"
                    runs[key] = measure(recipes[recipe], flags, seed, folder)
                    with replacing(path) as temporary:
                        temporary.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
                    log(f"{key}: {runs[key]}")
    log(table(runs))


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
