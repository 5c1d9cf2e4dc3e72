"""Fault campaign: kills a run at random moments, resumes it until done, compares it with an undisturbed one.

    python tests/faults.py --runs 10 --kills 5                 ten pre-trainings, each killed five times
    python tests/faults.py --runs 4 --kills 3 --processes 2    one of two processes is killed each time
    python tests/faults.py --job finetune --runs 2 --kills 3
    python tests/faults.py --data shards --flags="--shuffle near"    the images lie in four tars
    python tests/faults.py --flags="--accum_iter 3 --repeated_aug 2 --keep_checkpoints 1"

Each run saves after every step (--save_minutes of a few milliseconds), so that kills also fall into saves.
Prints the count and exits with 1 unless weights, optimizer and log.txt are those of the undisturbed run, bit
for bit, and so is checkpoint-best.pth where the job writes one.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from archive_utils import make_shards
from golden_utils import REPO
from image_utils import make_folder

from util.weights.files import read_file

COMMON = (
    "--input_size 32 --patch_size 8 --batch_size 4 --warmup_epochs 1 --num_workers 1 --device cpu --log_dir="
)
JOBS = {
    "pretrain": "main_pretrain.py --model mae_vit_tiny_patch16 --decoder_embed_dim 32 --decoder_depth 1 "
    "--decoder_num_heads 2 --vis_freq 0 --save_freq 1000",
    "finetune": "main_finetune.py --model vit_tiny_patch16 --mixup 0.8 --cutmix 1.0",
    "linprobe": "main_linprobe.py --model vit_tiny_patch16",
}


def command(args, data: Path, output: Path) -> list[str]:
    words = [*JOBS[args.job].split(), *COMMON.split(), "--epochs", str(args.epochs)]
    words += ["--data_path", str(data), "--output_dir", str(output), "--resume", "auto"]
    words += ["--save_minutes", "0.0001", "--keep_checkpoints", "2", *shlex.split(args.flags)]
    if args.processes > 1:
        port = str(random.randint(20000, 29000))
        words = ["-m", "torch.distributed.run", "--nproc_per_node", str(args.processes),
                 "--master_addr", "127.0.0.1", "--master_port", port, *words]  # fmt: skip
    return [sys.executable, *words]


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


def run_once(args, data: Path, output: Path, kill_after: float | None, rng: random.Random) -> bool:
    """One start; killed `kill_after` seconds after training began. Returns whether it ended well."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    options = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    process = subprocess.Popen(command(args, data, output), cwd=REPO, env=env, **options)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if kill_after is not None and "Epoch: [" in line:
            time.sleep(kill_after)
            if args.processes > 1:
                os.kill(rng.choice(children(process.pid)), signal.SIGKILL)
            else:
                os.killpg(process.pid, signal.SIGKILL)
            kill_after = None
    code = process.wait(timeout=60)
    if code not in (0, 1, -signal.SIGKILL):
        sys.exit(f"unexpected exit status {code}:\n{''.join(lines[-30:])}")
    return code == 0


def identical_content(ours, theirs) -> bool:
    """Whether nested dicts and lists hold the same values, tensors bit for bit."""
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(identical_content(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(identical_content, ours, theirs))
    return ours == theirs


def results(output: Path, last: str) -> dict:
    """What a finished run left: by file and entry, what must be the same however often it was killed."""
    found = {}
    for name in (last, "checkpoint-best.pth"):
        if (output / name).exists():
            content = read_file(output / name)
            for entry in ("model", "optimizer", "scaler", "epoch", "best_acc1", "stats"):
                found[f"{name}: {entry}"] = content.get(entry)
    lines = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    # The id of a run, which is its own, is no result
    found["log.txt"] = [{name: value for name, value in line.items() if name != "run"} for line in lines]
    return found


def campaign(args, folder: Path) -> tuple[int, int]:
    """(identical runs, kills)."""
    data = make_folder(folder / "data" / "train", 24, classes=2).parent
    make_folder(data / "val", 6, classes=2)
    if args.data == "shards":
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        data = make_shards(folder / "shards", data)
    last = f"checkpoint-{args.epochs - 1}.pth"
    if not run_once(args, data, folder / "undisturbed", None, random.Random()):
        sys.exit("the undisturbed run failed")
    expected = results(folder / "undisturbed", last)
    best = args.job == "pretrain" or "checkpoint-best.pth: model" in expected
    if len(expected["log.txt"]) != args.epochs or not best:
        sys.exit(f"the undisturbed run left {sorted(expected)}, {len(expected['log.txt'])} lines in log.txt")
    identical = kills = 0
    for number in range(args.runs):
        rng = random.Random(f"{args.seed}-{number}")
        output = folder / f"run-{number}"
        left = args.kills
        while not run_once(args, data, output, rng.uniform(0, args.spread) if left else None, rng):
            kills += 1
            left = max(left - 1, 0)
        final = results(output, last)
        other = [name for name in expected.keys() | final.keys()
                 if not identical_content(expected.get(name), final.get(name))]  # fmt: skip
        identical += not other
        told = f"DIFFERENT: {', '.join(sorted(other))}" if other else "identical"
        print(f"run {number}: {args.kills - left} kills, {told}", flush=True)
        if not other:
            shutil.rmtree(output)
    return identical, kills


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", default="pretrain", choices=JOBS)
    parser.add_argument("--data", default="folder", choices=["folder", "shards"], help="where the images lie")
    parser.add_argument("--runs", default=3, type=int)
    parser.add_argument("--kills", default=5, type=int, help="of each run")
    parser.add_argument("--processes", default=1, type=int)
    parser.add_argument("--flags", default="", help="further flags of the script")
    parser.add_argument("--epochs", default=12, type=int)
    parser.add_argument("--spread", default=2.0, type=float, help="kill within so many seconds of training")
    parser.add_argument("--seed", default=0, type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        identical, kills = campaign(args, Path(folder))
    count = f"{identical} of {args.runs} runs identical to the undisturbed one"
    print(f"{count}, {kills} kills, {args.processes} processes")
    sys.exit(identical != args.runs)


if __name__ == "__main__":
    main()
