"""The suite as other systems would run it: `make test-platforms`, of which CI runs `--short`.

    python tests/platforms/run.py [--short] [SYSTEM ...] [-- arguments of pytest]

What a SYSTEM (windows, mac, forkserver; default: all of them) lacks is in `sitecustomize.py`. Consoles show
the characters of cp1252 (Windows) or ASCII only.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
CONSOLE = {"windows": "cp1252", "mac": "ascii", "forkserver": "ascii"}
# Where systems differ: workers, files, signals, locks, what is printed, how a script starts
SHORT = {
    "windows": [
        "tests/test_console.py",
        "tests/test_files.py",
        "tests/run/test_owner.py",
        "tests/run/test_writer.py",
        "tests/data/test_workers.py::test_c3_everything_that_workers_get_can_be_pickled",
        "tests/data/test_sampler.py::test_workers_persist_and_use_one_thread",
        "tests/data/test_sampler.py::test_a_bad_image_is_one_clear_line_in_the_main_process",
        "tests/scripts/test_main_pretrain.py::test_a_signal_during_set_up_saves_after_the_first_step",
        "tests/scripts/test_main_pretrain.py::test_from_the_shell",
    ],
    "mac": ["tests/test_console.py", "tests/data/test_finetune_data.py"],
    "forkserver": ["tests/data/test_sampler.py::test_workers_persist_and_use_one_thread"],
}


def run(system: str, words: list[str], collect: bool) -> subprocess.CompletedProcess:
    """pytest as on a system; its output is returned if `collect`, else shown."""
    places = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "MAE_TEST_PLATFORM": system,
        "PYTHONPATH": os.pathsep.join(places),
        "PYTHONIOENCODING": CONSOLE[system],
        "PYTHONWARNDEFAULTENCODING": "1",
        "OMP_NUM_THREADS": "1",
    }
    to = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT) if collect else {}
    return subprocess.run([sys.executable, "-m", "pytest", *words], cwd=REPO, env=environment, **to)


def main() -> int:
    words = sys.argv[1:]
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help="default: all of them")
    parser.add_argument("--short", action="store_true", help="what CI runs: half a minute on 2 cores")
    args = parser.parse_args(own)
    if unknown := set(args.systems) - set(CONSOLE):
        parser.error(f"{unknown.pop()}: no such system; there are {', '.join(CONSOLE)}")
    failed = []
    systems = args.systems or list(CONSOLE)
    with ThreadPoolExecutor(2 if args.short else 1) as pool:
        chosen = [[*(SHORT[system] if args.short else []), *rest] for system in systems]
        for system, done in zip(systems, pool.map(run, systems, chosen, [args.short] * 3), strict=True):
            print(f"--- as on {system}: {'passed' if done.returncode == 0 else 'FAILED'}")
            print((done.stdout or b"").decode(errors="replace"), flush=True)
            failed += [system] if done.returncode else []
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
