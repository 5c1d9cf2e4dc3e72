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
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness import run_benchmark

from util.cli.parser import ArgumentParser

IMPORTS = ("pass", "import torch", "import timm.optim", "import main_pretrain")
MOMENTS = {  # by the line of output that tells of them
    "imports done, arguments read": re.compile(r""),
    "data found, model and optimizer made": re.compile("effective batch: "),
    "first step done": re.compile(r"Epoch: \[0\]  \[ *0/"),
}


def time_import(statement: str) -> dict[str, float]:
    """Seconds of a process that runs `statement`, by the clock and of the processor."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"clock": seconds, "processor": used}


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


def report(imports: dict[str, list], scripts: list[dict], own: Counter, whole: list) -> dict:
    """Prints the tables; returns the medians."""
    medians = {"imports": {}, "script": {}}
    print(f"\n{'':44s}{'clock':>10s}{'processor':>12s}")
    for name, rounds in imports.items():
        clock, used = (statistics.median(r[kind] for r in rounds) for kind in ("clock", "processor"))
        medians["imports"][name] = {"clock": clock, "processor": used}
        print(f"{name if name != 'pass' else 'Python itself':44s}{clock:8.2f} s{used:10.2f} s")
    print("\nmain_pretrain.py, seconds after its start, by the clock")
    for moment in scripts[0]:
        medians["script"][moment] = statistics.median(r[moment] for r in scripts)
        print(f"{moment:44s}{medians['script'][moment]:8.2f} s")
    total = sum(own.values())
    ours = {path.stem for path in ROOT.glob("*.py")} | {"util"}
    mine = sum(seconds for name, seconds in own.items() if name in ours)
    print(f"\nimport main_pretrain, {total:.2f} s under -X importtime; in a package's own modules:")
    for name, seconds in [*own.most_common(8), ("this repository", mine)]:
        print(f"    {name:40s}{seconds:8.2f} s{100 * seconds / total:8.1f} %")
    print("the largest imports, each with what it imports first:")
    for name, seconds in whole[:15]:
        print(f"    {name:40s}{seconds:8.2f} s{100 * seconds / total:8.1f} %")
    return medians


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--batch_size", default=4, type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--flags", default="", help="further flags of main_pretrain.py, in one string")
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    return parser


def main(options: argparse.Namespace) -> None:
    imports, scripts = {statement: [] for statement in IMPORTS}, []
    for _ in range(options.rounds + 1):
        for statement, rounds in imports.items():
            rounds.append(time_import(statement))
        scripts.append(time_script(options))
    imports = {statement: rounds[1:] for statement, rounds in imports.items()}
    own, whole = import_costs()
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    medians = report(imports, scripts[1:], own, whole)
    if options.json:
        result = {"settings": vars(options), "medians": medians, "imports": imports, "script": scripts[1:]}
        result |= {"seconds_in_own_modules": dict(own.most_common()), "largest_imports": whole[:50]}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_benchmark(main, get_args_parser())
