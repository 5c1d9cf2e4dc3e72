"""What an encoder is worth downstream, against the same encoder before any training.

    python benchmarks/bench_transfer.py --checkpoint a.pth b.pth c.pth --model tiny --input_size 64
    python benchmarks/bench_transfer.py --data_path DIR --pretrain_epochs 100 --json transfer.json

For every seed it fine-tunes, probes (features cached) and classifies by nearest neighbours, from the
pre-trained encoder and from a freshly initialised one, by calling the scripts as a user would, and prints
mean and spread (sample standard deviation) of the accuracy, or of another --metric, after the LAST epoch.
Without --checkpoint it pre-trains one encoder per seed first; fewer checkpoints than seeds are used in turn.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness import ROOT, Parser, finish, positive, print_table, run_benchmark, say

from models_mae import MODELS as MAE_MODELS
from util.demo_set.files import ensure_demo_data
from util.rng import seed_all
from util.sizes import image_size

PROBE = "--global_pool --batch_size 64 --epochs 100 --warmup_epochs 10 --lr 12.8 --cache_features"
FINETUNE = "--batch_size 64 --epochs 30 --warmup_epochs 5 --blr 2e-3 --layer_decay 0.75 --drop_path 0.1"
PRETRAIN = "--batch_size 64 --warmup_epochs 5 --blr 4e-3 --norm_pix_loss --decoder_depth 2 --vis_freq 0"


def run(script: str, flags: list[str], output: Path, commands: list[str]) -> list[dict]:
    """Runs a script unless its finished log is there; returns the lines of that log."""
    words = [script, *flags, "--output_dir", str(output)]
    commands.append("python " + shlex.join(words))
    if not (output / "done").exists():
        say(f"$ {commands[-1]}")
        output.mkdir(parents=True, exist_ok=True)
        (output / "log.txt").unlink(missing_ok=True)
        with open(output / "stdout.txt", "w", encoding="utf-8") as out:
            result = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        if result.returncode:
            sys.exit(f"{script} failed, see {output / 'stdout.txt'}")
        for weights in output.glob("checkpoint-*.pth"):
            if script != "main_pretrain.py":
                weights.unlink()
        (output / "done").touch()
    return [json.loads(line) for line in (output / "log.txt").read_text(encoding="utf-8").splitlines()]


def encoders(args, sizes: list[str], work: Path, commands: list[str]) -> dict[str, list[Path]]:
    """{"pre-trained": one file per seed, "random encoder": likewise}; makes what is not there."""
    found = {"pre-trained": [], "random encoder": []}
    for i, seed in enumerate(args.seeds):
        if args.checkpoint:
            found["pre-trained"].append(Path(args.checkpoint[i % len(args.checkpoint)]).resolve())
        else:
            output = work / f"pretrain-{seed}"
            flags = ["--model", f"mae_vit_{args.model}_patch16", *sizes, *shlex.split(args.pretrain_flags)]
            flags += ["--epochs", str(args.pretrain_epochs), "--seed", str(seed), "--keep_checkpoints", "1"]
            run("main_pretrain.py", [*flags, "--log_dir", ""], output, commands)
            found["pre-trained"].append(output / f"checkpoint-{args.pretrain_epochs - 1}.pth")
        path = work / f"random-{seed}.pth"
        seed_all(seed)
        model = MAE_MODELS[f"mae_vit_{args.model}_patch16"](
            img_size=image_size(args.input_size), patch_size=args.patch_size, in_chans=args.in_chans
        )
        torch.save({"model": model.state_dict(), "args": {"input_size": image_size(args.input_size)}}, path)
        found["random encoder"].append(path)
    return found


def measure(args, work: Path) -> dict:
    """{"figures": {task: {encoder: [accuracy per seed]}}, "commands": all commands}."""
    sizes = ["--input_size", args.input_size, "--patch_size", str(args.patch_size)]
    sizes += ["--in_chans", str(args.in_chans), "--num_workers", str(args.num_workers)]
    sizes += ["--data_path", str(Path(args.data_path).resolve())] if args.data_path else []
    commands = []
    files = encoders(args, sizes, work, commands)
    figures = {task: {kind: [] for kind in files} for task in args.tasks}
    for task in args.tasks:
        for kind, paths in files.items():
            for seed, path in zip(args.seeds, paths, strict=True):
                flags = ["--finetune", str(path), "--model", f"vit_{args.model}_patch16", *sizes]
                flags += ["--seed", str(seed), *shlex.split(args.label_flags)]
                if task == "knn":
                    script, key = "main_knn.py", f"knn_{args.metric}"
                else:
                    script = ("main_linprobe.py", "main_finetune.py")[task == "finetune"]
                    key = f"test_{args.metric}"
                    own = args.probe_flags if task == "probe" else args.finetune_flags
                    if task == "finetune" and args.few > 1:
                        data = Path(args.data_path) if args.data_path else ensure_demo_data()
                        flags += ["--data_path", str(one_in(args.few, data.resolve(), work))]
                    flags += [*shlex.split(own), "--log_dir", "", "--keep_checkpoints", "1"]
                records = run(script, flags, work / f"{task}-{kind.split()[0]}-{seed}", commands)
                figures[task][kind].append(records[-1][key])
        done = [row_of(task, figures[task]) for task in figures if figures[task]["random encoder"]]
        print_table([args.metric, *files, "gap, worst seeds"], done, name=20, width=20)
    return {"figures": figures, "commands": commands}


def one_in(few: int, data: Path, work: Path) -> Path:
    """An ImageFolder of links to the first 1/`few` of each class's training images, and to all of `val`."""
    folder = work / f"one_in_{few}"
    for kind in sorted(p for p in (data / "train").iterdir() if p.is_dir()):
        (folder / "train" / kind.name).mkdir(parents=True, exist_ok=True)
        files = sorted(kind.iterdir())
        for file in files[: max(1, len(files) // few)]:
            link = folder / "train" / kind.name / file.name
            if not link.exists():
                link.symlink_to(file.resolve())
    if not (folder / "val").exists():
        (folder / "val").symlink_to((data / "val").resolve())
    return folder


def row_of(task: str, kinds: dict[str, list[float]]) -> tuple[str, ...]:
    """Mean and spread per encoder, and the smallest gap between the two."""
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in kinds.values()]
    means = [statistics.mean(values) for values in kinds.values()]
    gap = min(kinds["pre-trained"]) - max(kinds["random encoder"])
    cells = (f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(means, spreads, strict=True))
    return task, *cells, f"{gap:+.3f}"


def main(args: argparse.Namespace) -> int:
    work = Path(args.work_dir).resolve()
    work.mkdir(parents=True, exist_ok=True)
    start = time.time()
    result = measure(args, work)
    say(f"seeds {args.seeds}; {time.time() - start:.0f} s")
    return finish(args, {**result, "seconds": round(time.time() - start)})


if __name__ == "__main__":
    parser = Parser(__doc__)
    flag = parser.add_argument
    # fmt: off
    flag("--data_path", default=None, help="ImageFolder with train/ and val/; default: the demo set")
    flag("--checkpoint", nargs="+", default=[], metavar="FILE", help="encoders; default: make them")
    flag("--model", default="tiny", choices=["tiny", "small", "base", "large"])
    flag("--input_size", default="64", help="pixels: 64, or 32x128 (height x width)")
    flag("--patch_size", default=8, type=positive())
    flag("--in_chans", default=3, type=positive())
    flag("--seeds", nargs="+", default=[0, 1, 2], type=positive(or_zero=True))
    flag("--tasks", nargs="+", default=["probe", "knn", "finetune"], choices=["probe", "knn", "finetune"])
    flag("--pretrain_epochs", default=50, type=positive())
    flag("--pretrain_flags", default=PRETRAIN, help=f"default: {PRETRAIN}")
    flag("--probe_flags", default=PROBE, help=f"default: {PROBE}")
    flag("--finetune_flags", default=FINETUNE, help=f"default: {FINETUNE}")
    flag("--label_flags", default="", help="flags of all scripts, such as '--labels FILE.csv'")
    flag("--metric", default="acc1", help="a figure of the scripts' log.txt (default: accuracy in %%)")
    flag("--few", default=1, type=positive(), metavar="N", help="fine-tune on one in N training images")
    flag("--num_workers", default=2, type=positive(or_zero=True))
    flag("--work_dir", default="transfer_output", help="outputs of all runs; finished runs are not repeated")
    # fmt: on
    run_benchmark(main, parser)
