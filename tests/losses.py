"""Losses of the three recipes, step by step: two commits can be compared bit for bit.

    make same-losses BASE=REV                  the working tree against commit REV
    make same-losses BASE=REV HEAD=REV2        two commits
    python tests/losses.py --base REV --tolerance 1e-12      where rounding may change
    python tests/losses.py --write             writes tests/golden/losses/, which a test reads

Every script runs 100 steps of a tiny model on small drawn pictures, in float64 and in float32, on one CPU
thread; this file of the working tree drives both commits through what forks rely on (`get_args_parser`,
`main`, MODELS, TensorBoard's `add_scalar`). Compared are the loss of each step and the figures in log.txt.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO / "tests" / "golden" / "losses"
RECIPES, PRECISIONS, STEPS = ("pretrain", "finetune", "linprobe"), ("float64", "float32"), 100
COMMON = (
    "--input_size 32 --patch_size 8 --batch_size 8 --num_workers 0 --device cpu --max_steps 100 --epochs 20"
)
FLAGS = {
    "pretrain": "--model mae_vit_tiny_patch16 --decoder_embed_dim 32 --decoder_depth 2 --decoder_num_heads 4 "
    "--norm_pix_loss --warmup_epochs 2 --blr 8e-3 --vis_freq 10 --save_freq 20 --clip_grad 2",
    "finetune": "--model vit_tiny_patch16 --warmup_epochs 2 --blr 8e-3 --mixup 0.8 --cutmix 1.0",
    "linprobe": "--model vit_tiny_patch16 --warmup_epochs 2 --blr 1",
}


def draw_pictures(root: Path) -> Path:
    """Writes 3 classes of 14 training and 4 validation PNGs, the same wherever and whenever it is called."""
    draws = np.random.RandomState(0)
    y, x = np.mgrid[0:44, 0:52] / 52
    for split, count in (("train", 14), ("val", 4)):
        for number in range(3):
            folder = root / split / f"c{number}"
            folder.mkdir(parents=True)
            for i in range(count):
                speeds = draws.uniform(2, 10 + 8 * number, (3, 2))
                waves = np.stack([np.sin(a * x + b * y + draws.uniform(0, 6)) for a, b in speeds], axis=-1)
                picture = 127 + 60 * waves + draws.normal(0, 12, waves.shape)
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def in_float64(constructor):
    """A named model whose weights and inputs are float64."""

    def make(**kwargs):
        model = constructor(**kwargs).double()
        model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(), *inputs[1:]))
        return model

    return make


def run(root: Path, precision: str, steps: int = STEPS) -> dict[str, list[float]]:
    """{recipe: losses of its steps, then log.txt's figures} of the checkout `root`, in this process."""
    sys.path.insert(0, str(root))
    import torch
    from torch.utils.tensorboard import SummaryWriter

    torch.set_num_threads(1)
    import models_mae
    import models_vit

    if precision == "float64":
        torch.set_default_dtype(torch.float64)
        for models in (models_mae.MODELS, models_vit.MODELS):
            models.update({name: in_float64(constructor) for name, constructor in models.items()})
    seen: list[tuple[str, float]] = []
    SummaryWriter.add_scalar = lambda self, name, value, *args, **kwargs: seen.append((name, value))
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        data = draw_pictures(Path(folder) / "data")
        for recipe in RECIPES:
            script, out = __import__(f"main_{recipe}"), Path(folder) / recipe
            words = f"{COMMON} {FLAGS[recipe]} --max_steps {steps}".split()
            words += ["--data_path", str(data), "--output_dir", str(out), "--log_dir", str(out)]
            seen.clear()
            args = argparse.ArgumentParser(parents=[script.get_args_parser()]).parse_args(words)
            with contextlib.redirect_stdout(io.StringIO()):
                script.main(args)
            losses = [float(value) for name, value in seen if name in ("train_loss", "loss")]
            assert len(losses) == steps, f"{recipe}: {len(losses)} losses"
            for line in (out / "log.txt").read_text().splitlines():
                record = json.loads(line)
                losses += [record[name] for name in sorted(record) if name.endswith(("loss", "norm", "acc1"))]
            result[recipe] = losses
    return result


def run_elsewhere(root: Path) -> dict[str, list[float]]:
    """{"recipe-precision": figures} of a checkout, each precision in a process of its own."""
    found = {}
    for precision in PRECISIONS:
        call = f"losses.run(pathlib.Path({str(root)!r}), {precision!r})"
        code = f"import json, pathlib, losses; print(json.dumps({call}))"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO / "tests")}
        done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{root}: {precision} failed\n{done.stderr[-3000:]}")
        lines = json.loads(done.stdout.splitlines()[-1])
        found |= {f"{recipe}-{precision}": values for recipe, values in lines.items()}
    return found


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two lists of figures; infinite where their lengths differ."""
    if len(ours) != len(theirs):
        return float("inf")
    return max(abs(a - b) / max(abs(b), 1e-300) for a, b in zip(ours, theirs, strict=True))


def read_golden(name: str) -> list[float]:
    lines = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [float(line) for line in lines if not line.startswith("#")]


def checkout(revision: str, folder: Path) -> Path:
    git = ["git", "-C", str(REPO)]
    if subprocess.run([*git, "worktree", "add", "--detach", "-q", str(folder), revision]).returncode:
        sys.exit(f"{revision}: is no commit here")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", metavar="REV", help="the commit to compare with")
    parser.add_argument("--head", metavar="REV", help="the other commit (default: the working tree)")
    parser.add_argument("--tolerance", default=0.0, type=float, help="relative; of float64 only")
    parser.add_argument("--write", action="store_true", help="write the golden files from the working tree")
    args = parser.parse_args()
    if not args.write and not args.base:
        parser.error("--base REV or --write")
    if args.write:
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for name, values in run_elsewhere(REPO).items():
            head = f"# {name}: {STEPS} losses, then log.txt's figures; tests/losses.py, one thread\n"
            (GOLDEN / f"{name}.txt").write_text(head + "".join(f"{v!r}\n" for v in values), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            theirs = run_elsewhere(checkout(args.base, Path(folder) / "base"))
            ours = run_elsewhere(checkout(args.head, Path(folder) / "head") if args.head else REPO)
        finally:
            for name in ("base", "head"):
                command = ["git", "-C", str(REPO), "worktree", "remove", "--force", str(Path(folder) / name)]
                subprocess.run(command, capture_output=True)
    bad = False
    for name, values in ours.items():
        far = difference(values, theirs[name])
        allowed = args.tolerance if name.endswith("float64") else float("inf") if args.tolerance else 0.0
        bad |= far > allowed
        text = "identical" if far == 0 else f"largest relative difference {far:.2e}"
        print(f"{name}: {len(values)} figures, {text}{' - TOO FAR' if far > allowed else ''}")
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
