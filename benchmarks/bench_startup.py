"""How long until training runs: importing main_pretrain.py, and from the command to the first step done.

    python benchmarks/bench_startup.py --json startup.json

Starts new processes in turns: bare Python, `import torch`, `import timm.optim` (which imports torch, and
torchvision for its own use), `import main_pretrain`, and the script itself with ViT-B on the demo set, on CPU
unless `--device` says otherwise, until its first log line. One round more than `--rounds` is run and the
first thrown away, so that files are in the page cache and the demo set is there: a second start. Medians over
rounds, by the clock and in processor time. The packages' shares come from `python -X importtime`: time spent
in a package's own modules, and the largest imports with all that they import in turn.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial

from harness import ROOT, Parser, finish, median_of, print_table, run_benchmark, say, take_turns

IMPORTS = ("pass", "import torch", "import timm.optim", "import main_pretrain")
MOMENTS = {  # by the line of output that tells of them
    "imports done, arguments read": re.compile(r""),
    "data found, model and optimizer made": re.compile("effective batch: "),
    "first step done": re.compile(r"Epoch: \[0\]  \[ *0/"),
}


def time_import(statement: str) -> dict[str, float]:
    """Seconds of a process that runs `statement`, by the clock and of the processor."""
    before, start = sum(os.times()[2:4]), time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)
    seconds = time.perf_counter() - start
    return {"clock": seconds, "processor": sum(os.times()[2:4]) - before}


def time_script(options: argparse.Namespace) -> dict[str, float]:
    """Seconds from the start of main_pretrain.py to each of MOMENTS; it is ended then."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", "main_pretrain.py", "--model", options.model, "--norm_pix_loss"]
        command += ["--batch_size", str(options.batch_size), "--device", options.device, "--print_freq", "1"]
        command += ["--output_dir", folder, "--log_dir", folder, *options.flags.split()]
        left, seconds = dict(MOMENTS), {}
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                name = next(iter(left), None)
                if name and left[name].search(line):
                    seconds[name] = time.perf_counter() - start
                    del left[name]
                if not left:
                    process.kill()
                    break
        if left:
            sys.exit(f"main_pretrain.py ended with status {process.returncode} before: {next(iter(left))}")
    return seconds


def import_costs() -> tuple[Counter, list[tuple[str, float]]]:
    """Seconds in each package's own modules, and of the largest imports with what they import."""
    command = [sys.executable, "-X", "importtime", "-c", "import main_pretrain"]
    lines = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=True).stderr
    own, whole = Counter(), []
    for alone, total, name in re.findall(r"import time: +(\d+) \| +(\d+) \| +(\S+)", lines):
        own[name.split(".")[0]] += int(alone) / 1e6
        whole.append((name, int(total) / 1e6))
    whole.sort(key=lambda item: -item[1])
    return own, whole


def main(options: argparse.Namespace) -> int:
    ways = {statement: partial(time_import, statement) for statement in IMPORTS}
    turns = take_turns(options.rounds + 1, {**ways, "script": partial(time_script, options)})
    rounds = {name: figures[1:] for name, figures in turns.items()}
    scripts = rounds.pop("script")
    say()
    print_table(["", "clock", "processor"], (
        (name if name != "pass" else "Python itself",
         *(f"{median_of(figures, kind):.2f} s" for kind in ("clock", "processor")))
        for name, figures in rounds.items()
    ))  # fmt: skip
    rows = [(moment, f"{median_of(scripts, moment):.2f} s") for moment in MOMENTS]
    print_table(["\nmain_pretrain.py, seconds after its start, by the clock"], rows)
    own, whole = import_costs()
    total, ours = sum(own.values()), {path.stem for path in ROOT.glob("*.py")} | {"util"}
    mine = sum(seconds for name, seconds in own.items() if name in ours)
    for heading, costs in [
        (f"\nimport main_pretrain, {total:.2f} s under -X importtime; in a package's own modules:",
         [*own.most_common(8), ("this repository", mine)]),
        ("the largest imports, each with what it imports first:", whole[:15]),
    ]:  # fmt: skip
        rows = [(f"    {name}", f"{cost:.2f} s", f"{100 * cost / total:.1f} %") for name, cost in costs]
        print_table([heading], rows, width=10)
    costs = {"seconds_in_own_modules": dict(own.most_common()), "largest_imports": whole[:50]}
    return finish(options, {"imports": rounds, "script": scripts, **costs})


if __name__ == "__main__":
    parser = Parser(__doc__, batch_size=4, device="cpu", rounds=3)
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--flags", default="", help="further flags of main_pretrain.py, in one string")
    run_benchmark(main, parser)
