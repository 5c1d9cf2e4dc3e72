"""What plan.py proposes against PRETRAIN.md's "start from this": k-NN accuracy after the same processor time.

    python benchmarks/bench_plan.py DIR [DIR ...] --seconds 60 --seeds 0 1 2

Each DIR has labelled train/ and val/. The page's command is changed as the list under it says: a tiny model,
96 pixels in patches of 8 for small images, measured mean and std. A recipe's processor time per image is
measured once; then it makes as many updates as --seconds give, its schedule planned for that length. Where
they give none the encoder stays as it was drawn. One process, one thread, no GPU. Exits with 1 where the
plan's mean is lower on a set.
"""

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT, Parser, finish, positive, print_table, run_benchmark, say

import main_pretrain
from util.cli.parser import ArgumentParser

ALONE = ["--device", "cpu", "--num_workers", "0"]
QUIET = [*ALONE, "--vis_freq", "0", "--save_freq", "10000"]
START = ["--norm_pix_loss", "--batch_size", "256", "--accum_iter", "4", "--blr", "1.5e-4"]


def run(*words: str) -> tuple[str, float]:
    """(what the command printed, its processor time in seconds)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = sum(os.times()[2:4])  # of children that have ended
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=environment)
    used = sum(os.times()[2:4]) - before
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()[-500:]}")
    return done.stdout, used


def recipes(data: str) -> tuple[dict[str, list[str]], int]:
    """({name: flags of main_pretrain.py}, images of the training split)."""
    with tempfile.TemporaryDirectory() as folder:
        told, _ = run("plan.py", data, "--device", "cpu", "--no_trial", "--write", f"{folder}/recipe")
        plan = ArgumentParser(parents=[main_pretrain.get_args_parser()]).parse_args([f"@{folder}/recipe"])
    command = re.search(r"^python main_pretrain.py (.*) --output_dir", told, re.M)[1].split()
    page = ["--data_path", data, "--in_chans", str(plan.in_chans), "--model", "mae_vit_tiny_patch16", *START]
    if min(map(int, re.search(r"median (\d+) x (\d+)", told).groups())) < 112:
        page += ["--input_size", "96", "--patch_size", "8"]
    for name, values in (("--mean", plan.mean), ("--std", plan.std)):
        page += [name, *map(str, values)] if values else []
    images = int(re.search(r"train: ([\d,]+) images", told)[1].replace(",", ""))
    return {"page": page, "plan": command}, images


def seconds_per_image(words: list[str], output: str) -> float:
    """Processor time of training on an image: of 12 steps less that of 2."""
    small = ["--batch_size", "32", "--accum_iter", "1", "--epochs", "50", "--output_dir", output]
    short, long = (run("main_pretrain.py", *words, *QUIET, *small, "--max_steps", n)[1] for n in ("2", "12"))
    return (long - short) / (10 * 32)


def measure(words: list[str], images: int, cost: float, seconds: float, seed: int, output: str) -> dict:
    """k-NN accuracy in percent, updates, and processor time in seconds (of start and end, too) of one run."""
    args = ArgumentParser(parents=[main_pretrain.get_args_parser()]).parse_args(words)
    updates, used = int(seconds / (cost * args.batch_size * args.accum_iter)), 0.0
    same = [f"--{name}" for name in ("data_path", "in_chans", "input_size", "patch_size", "amp_dtype")]
    knn = [word for name in same if (value := getattr(args, name[2:])) for word in (name, str(value))]
    for name in ("mean", "std"):
        knn += [f"--{name}", *map(str, getattr(args, name))] if getattr(args, name) else []
    if updates:
        epochs = math.ceil(updates / math.ceil(images // args.batch_size / args.accum_iter))
        length = [
            "--epochs",
            str(epochs),
            "--warmup_epochs",
            str(math.ceil(epochs / 20) if epochs > 1 else 0),
        ]
        length += ["--max_steps", str(updates), "--seed", str(seed), "--output_dir", output]
        _, used = run("main_pretrain.py", *words, *QUIET, *length)
        newest = max(Path(output).glob("checkpoint-*.pth"), key=lambda path: path.stat().st_mtime)
        knn += ["--finetune", str(newest)]
    told, _ = run("main_knn.py", *knn, *ALONE, "--model", args.model[len("mae_") :], "--seed", str(seed))
    accuracy = float(re.search(r"k-NN Acc@1 ([\d.]+)", told)[1])
    return {"accuracy": accuracy, "updates": updates, "used": round(used, 1)}


def main(args: argparse.Namespace) -> int:
    found, sets = {}, {}
    for data in args.data:
        ways, images = recipes(data)
        with tempfile.TemporaryDirectory() as folder:
            costs = {name: seconds_per_image(words, folder) for name, words in ways.items()}
        say(f"{data}: " + ", ".join(f"{name} {1000 * cost:.1f} ms an image" for name, cost in costs.items()))
        sets[data] = ways, images, costs
    for seed in args.seeds:
        for data, (ways, images, costs) in sets.items():
            for name, words in ways.items():
                with tempfile.TemporaryDirectory() as folder:
                    row = measure(words, images, costs[name], args.seconds, seed, folder)
                found.setdefault(data, {}).setdefault(name, []).append({**row, "seed": seed})
                say(f"{data} {name} seed {seed}: {row}")
    means = {d: {w: statistics.mean(r["accuracy"] for r in rows) for w, rows in ways.items()}
             for d, ways in found.items()}  # fmt: skip
    print_table(("k-NN, %", "page", "plan"),
                [(d, f"{m['page']:.1f}", f"{m['plan']:.1f}") for d, m in means.items()])  # fmt: skip
    return finish(args, found, all(m["plan"] >= m["page"] for m in means.values()))


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("data", nargs="+", metavar="DIR", help="folders with labelled train/ and val/")
    parser.add_argument("--seconds", default=60, type=positive(float), help="of processor time for each run")
    parser.add_argument("--seeds", nargs="+", default=[0, 1, 2], type=int, help="of the runs")
    run_benchmark(main, parser)
