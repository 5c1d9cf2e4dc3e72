"""The suite as other systems would run it: `make test-platforms`, of which CI runs `--short`.

    python tests/platforms/run.py [--short] [SYSTEM...] [-- arguments of pytest]

Of SYSTEM (windows, mac, forkserver; default: all of them) `sitecustomize.py` tells what is missing there. Its
consoles show the characters of cp1252 (Windows) or ASCII only.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
CONSOLE = {"windows": "cp1252", "mac": "ascii", "forkserver": "ascii"}
# Where systems differ: workers, files, signals, locks, what is printed, how a script starts
SHORT = {"windows": "test_console.py", "mac": "", "forkserver": ""}


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
        parser.error(f"{unknown.pop()}: no such system, there are {', '.join(CONSOLE)}")
    failed = []
    for system in args.systems or CONSOLE:
        print(f"--- as on {system}", flush=True)
        environment = {
            **os.environ,
            "MAE_TEST_PLATFORM": system,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
            "PYTHONIOENCODING": CONSOLE[system],
            "PYTHONWARNDEFAULTENCODING": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", *rest]
        if subprocess.run(command, cwd=REPO, env=environment).returncode:
            failed.append(system)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
