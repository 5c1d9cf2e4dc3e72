"""Hostile entries: each entry of a checkpoint as each strange value, before each script that reads it.

    python tests/hostile.py                 all of them, some minutes
    python tests/hostile.py --cases 2000    as many, drawn with --seed

A script must refuse the file in one line of at most 1,000 printable characters, or do what it does with the
file as it was or with the entry left out, or warn. Prints the counts, and exits with 1 unless all do.
"""

import argparse
import contextlib
import copy
import io
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import torch
from golden_utils import REPO, TINY
from image_utils import make_folder
from safetensors.torch import load_file
from torch import nn

sys.path.append(str(REPO / "demo"))
import visualize

import export
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import models_mae
import models_vit
import predict
from util.cli.parser import ArgumentParser, parse_args
from util.errors import TrainingError, UserError
from util.processes import signals
from util.run.checkpoint import finish_saving

warnings.filterwarnings("ignore")
NORM = partial(nn.LayerNorm, eps=1e-6)
SMALL = {key: TINY[key] for key in ("embed_dim", "depth", "num_heads")} | {"norm_layer": NORM}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 4}


def nested(depth: int):
    return [nested(depth - 1)] if depth else []


def values() -> dict:
    """Strange values by their names."""
    table = torch.randn(1, 17, 24)
    return {
        "text": "x",
        "no text": "",
        "escapes": "\x1b[31mred\n\r\u202e\ud800",
        "long": "x" * 5_000_000,
        "list": [],
        "texts": ["x"],
        "pair": ["x", "y"],
        "dict": {},
        "other": {"a": 1},
        "true": True,
        "zero": 0,
        "minus": -7,
        "large": 10**9,
        "larger": 10**30,
        "endless": 10**5000,
        "half": 0.5,
        "nan": float("nan"),
        "inf": float("inf"),
        "-inf": float("-inf"),
        "bytes": b"\xff\x00",
        "set": {1, "a"},
        "nested": nested(300),
        "nans": [float("nan")] * 3,
        "huge": [10**400] * 3,
        "many": [0.5] * 5000,
        "namespace": argparse.Namespace(a=1),
        "numpy": np.int64(-3),
        "path": Path("a/b"),
        "dtype": torch.float16,
        "tensor": torch.zeros(2, 3),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(1, 0, 24),
        "sparse": table.to_sparse(),
        "meta": table.to("meta"),
        "float8": table.to(torch.float8_e4m3fn),
        "complex": table.to(torch.complex64),
        "int": table.long(),
        "expanded": torch.zeros(1).expand(1, 10**12, 24),
        "quantized": torch.quantize_per_tensor(table, 0.1, 0, torch.qint8),
        "ranks": torch.zeros([1] * 60),
        "infinite": torch.full((1, 17, 24), float("inf")),
        "tensors": {"a": torch.zeros(2), "\x1b[2J" * 99: table},
    }


# What is no mistake: the value is one that this entry may have, or has always meant what it then means
MEANT = {
    "true": ("norm_pix_loss", "global_pool", "evaluated"),
    "zero": ("mask_ratio", "epoch", "best_acc1", "step"),
    "half": ("mask_ratio", "best_acc1"),
    "list": ("class_names", "meters"),
    "large": ("epoch", "step"),
    "dict": ("stats", "scaler", "model_info", "args", "state"),
    "other": ("stats", "args"),
    "infinite": ("exp_avg",),
    "namespace": ("args",),
    "texts": ("class_names",),
    "pair": ("class_names",),
}

ARGS = [
    "model", "input_size", "patch_size", "in_chans", "mean", "std", "mask_ratio", "norm_pix_loss",
    "num_heads", "decoder_num_heads", "lr", "data_path", "repeated_aug", "trainable_blocks", "output_dir",
    "init", "init_taken", "weights_key",
]  # fmt: skip
INFO = [
    "model", "global_pool", "input_size", "patch_size", "in_chans", "nb_classes", "mean", "std",
    "class_names", "recipe", "num_heads",
]  # fmt: skip
RUN = [
    "epoch", "step", "samples", "effective_batch", "optimizer", "scaler", "args", "model_info", "meters",
    "stats", "best_acc1", "evaluated", "model",
]  # fmt: skip
STATE = [
    "pos_embed", "cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight",
    "blocks.0.mlp.fc1.bias", "norm.weight", "head.weight", "mask_token", "decoder_pred.weight",
    "new\x1b[2J\nkey", "n" * 10**6,
]  # fmt: skip
OPTIMIZER = [
    "param_groups", "state", "param_groups.0.lr", "param_groups.0.betas", "param_groups.0.params",
    "param_groups.0.amsgrad", "state.0", "state.0.exp_avg", "state.0.step",
]  # fmt: skip
ENTRIES = [
    *(("args", name) for name in ARGS), *(("model_info", name) for name in INFO), *((name,) for name in RUN),
    *(("model", name) for name in STATE), *(("optimizer", *name.split(".")) for name in OPTIMIZER),
]  # fmt: skip


def called(script, words: list[str]):
    """Runs a script's main with its own parser."""
    parser = ArgumentParser(parents=[script.get_args_parser()])
    try:
        return script.main(parse_args(parser, words))
    finally:
        finish_saving()
        signals.clear()


class Scripts:
    """Calls each script on a file, and returns what can be compared with what it does on another."""

    def __init__(self, folder: Path):
        self.folder, self.output, self.number = folder, "", 0
        models_mae.MODELS["mae_small"] = partial(models_mae.MaskedAutoencoderViT, **SMALL, **DECODER)
        models_vit.MODELS["small"] = partial(models_vit.VisionTransformer, **SMALL)
        data = make_folder(folder / "data" / "train", 8, classes=2).parent
        make_folder(data / "val", 4, classes=2)
        self.data = ["--data_path", str(data), "--num_workers", "0", "--device", "cpu", "--batch_size", "4"]
        self.sizes = ["--input_size", "32", "--patch_size", "8"]
        self.files = {
            "pretrain": self.run(main_pretrain, "mae_small"),
            "finetune": self.run(main_finetune, "small"),
        }

    def run(self, script, model: str) -> dict:
        """The checkpoint of one epoch."""
        words = ["--model", model, "--epochs", "1", "--warmup_epochs", "0", "--log_dir="]
        called(script, [*self.data, *self.sizes, *words, "--output_dir", self.new()])
        return torch.load(Path(self.output, "checkpoint-0.pth"), weights_only=True)

    def new(self) -> str:
        self.number += 1
        self.output = str(self.folder / f"out-{self.number}")
        return self.output

    def trained(self, name: str) -> dict:
        content = torch.load(Path(self.output, name), weights_only=True)
        return {key: value.numpy().tobytes() for key, value in content["model"].items()}

    def weights(self, file: Path) -> dict:
        return {key: value.numpy().tobytes() for key, value in load_file(file).items()}

    def resume(self, path, script=main_pretrain, model="mae_small"):
        words = ["--resume", path, "--model", model, "--epochs", "2", "--warmup_epochs", "0", "--log_dir="]
        called(script, [*self.data, *self.sizes, *words, "--output_dir", self.new()])
        return self.trained("checkpoint-1.pth")

    def resume_classes(self, path):
        return self.resume(path, main_finetune, "small")

    def evaluate(self, path):
        called(
            main_finetune, [*self.data, "--eval", "--resume", path, "--output_dir", self.new(), "--log_dir="]
        )

    def start(self, path, script=main_finetune):
        words = ["--finetune", path, "--model", "small", "--max_steps", "1", "--log_dir="]
        called(script, [*self.data, *self.sizes, *words, "--output_dir", self.new()])
        return self.trained("checkpoint-0-step1.pth")

    def init(self, path):
        words = ["--init", path, "--model", "mae_small", "--max_steps", "1", "--log_dir="]
        called(main_pretrain, [*self.data, *self.sizes, *words, "--output_dir", self.new()])
        return self.trained("checkpoint-0-step1.pth")

    def probe(self, path):
        return self.start(path, main_linprobe)

    def knn(self, path):
        return called(main_knn, [*self.data, *self.sizes, "--finetune", path, "--model", "small"])

    def predict(self, path):
        called(predict, [self.data[1] + "/val", "--resume", path, "--num_workers", "0", "--device", "cpu"])

    def features(self, path):
        file = self.new() + ".npz"
        called(predict, [self.data[1] + "/val", "--resume", path, "--num_workers", "0", "--device", "cpu",
                         "--features", file])  # fmt: skip
        return np.load(file)["features"].tobytes()

    def visualize(self, path):
        file = self.new() + ".png"
        called(visualize, [self.data[1] + "/val", "--resume", path, "--device", "cpu", "--output", file])
        return Path(file).read_bytes()

    def export(self, path):
        called(export, ["--resume", path, "--to", "safetensors", "--output", self.new()])
        return self.weights(Path(self.output, "model.safetensors"))

    def export_timm(self, path):
        called(export, ["--resume", path, "--to", "timm", "--output", self.new()])
        return Path(self.output, "config.json").read_text(encoding="utf-8"), self.weights(
            Path(self.output, "model.safetensors")
        )


READERS = {
    "pretrain": ("resume", "init", "start", "probe", "knn", "features", "visualize", "export", "export_timm"),
    "finetune": (
        "resume_classes",
        "evaluate",
        "start",
        "init",
        "knn",
        "predict",
        "features",
        "export",
        "export_timm",
    ),
}


def changed(content: dict, entry: tuple[str, ...], *value) -> dict | None:
    """A copy of a checkpoint with an entry that is `value`, or left out; None if there is no such place."""
    content = copy.copy(content)
    place = content
    for name in entry[:-1]:
        name = int(name) if name.isdecimal() else name
        if not isinstance(place, list) and name not in place:
            return None
        place[name] = copy.copy(place[name])
        place = place[name]
    last = int(entry[-1]) if entry[-1].isdecimal() else entry[-1]
    if value:
        place[last] = value[0]
    elif last in place:
        del place[last]
    return content


class Fuzz:
    """Runs cases and counts what came of them."""

    def __init__(self, folder: Path):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.scripts, self.values = Scripts(folder), values()
        self.path, self.good, self.counts, self.bad = str(folder / "file.pth"), {}, Counter(), []

    def cases(self) -> list[tuple[str, str, tuple[str, ...], str]]:
        """(kind of file, script, entry, name of the value) of all there are."""
        return [
            (kind, reader, entry, value)
            for kind, readers in READERS.items()
            for entry in ENTRIES
            if changed(self.scripts.files[kind], entry) is not None
            for value in self.values
            if entry[-1] not in MEANT.get(value, ())
            for reader in readers
        ]

    def outcome(self, reader: str, content: dict) -> tuple[str, object, str]:
        """("done", result and output, warnings), ("refused", line, "") or ("crashed", traceback, "")."""
        torch.save(content, self.path)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                result = getattr(self.scripts, reader)(self.path)
            except (UserError, TrainingError) as error:
                return "refused", str(error), ""
            except BaseException:
                return "crashed", traceback.format_exc()[-1500:], ""
        said = [line for line in out.getvalue().splitlines() if line.startswith("* ") or ".jpg" in line]
        text = out.getvalue().replace("\n", "")
        if not text.isprintable() or len(text) > 50_000:
            self.bad.append(f"{reader}: {len(text)} characters of output: {text[:300]!a}")
        return "done", (result, said), err.getvalue()

    def expected(self, kind: str, reader: str, entry: tuple[str, ...]) -> list:
        """What the script does with the file as it was, and with the entry left out."""
        for key in [(kind, reader), (kind, reader, entry)]:
            if key not in self.good:
                content = self.scripts.files[kind]
                content = changed(content, entry) if len(key) == 3 else content
                self.good[key] = self.outcome(reader, content)[1]
        return [self.good[kind, reader], self.good[kind, reader, entry]]

    def run(self, kind: str, reader: str, entry: tuple[str, ...], value: str) -> None:
        content = changed(self.scripts.files[kind], entry, self.values[value])
        how, what, warned = self.outcome(reader, content)
        self.counts[how] += 1
        name = f"{kind} {reader} {'.'.join(entry)[:60]!a} = {value}"
        if how == "crashed":
            self.bad.append(f"{name}: a traceback\n{what}")
        elif how == "refused" and (len(what) > 1000 or not what.isprintable()):
            self.bad.append(f"{name}: a message of {len(what)} characters: {what[:300]!a}")
        elif how == "done" and "warning" not in warned and what not in self.expected(kind, reader, entry):
            self.bad.append(f"{name}: taken without a word")
        if len(warned) > 3000 or not warned.replace("\n", "").isprintable():
            self.bad.append(f"{name}: a warning of {len(warned)} characters: {warned[:300]!a}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, help="so many of them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        cases = fuzz.cases()
        for case in random.Random(args.seed).sample(cases, min(args.cases or len(cases), len(cases))):
            fuzz.run(*case)
    for text in fuzz.bad:
        print(text)
    count = ", ".join(f"{number} {how}" for how, number in sorted(fuzz.counts.items()))
    print(f"{fuzz.counts.total()} cases: {count}; {len(fuzz.bad)} wrong; {time.monotonic() - start:.0f} s")
    sys.exit(bool(fuzz.bad))


if __name__ == "__main__":
    main()
