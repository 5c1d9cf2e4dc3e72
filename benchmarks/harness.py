"""What the benchmarks share: how their `main` is called."""

import argparse
import math
import os
import sys
from collections.abc import Callable

from util.cli.parser import errors_in_one_line
from util.errors import UserError

_MAY_BE_ZERO = {"workers", "num_workers", "seeds", "overlap", "hop_us"}  # of benchmarks


def run_benchmark(main: Callable, parser: argparse.ArgumentParser) -> None:
    """The same for benchmarks, whose numbers must all be above zero, unless zero means something; ends with
    what `main(args)` returns.
    """
    args = parser.parse_args()
    with errors_in_one_line(parser.prog):
        given = [(flag, n) for flag, v in vars(args).items() for n in (v if isinstance(v, list) else [v])]
        for flag, number in given:
            if type(number) not in (int, float):
                continue
            least = "at least 0" if flag in _MAY_BE_ZERO else "above 0"
            if not math.isfinite(number) or number < 0 or (number == 0 and least == "above 0"):
                raise UserError(f"--{flag} {number}: must be {least}")
        if args.json and not os.path.isdir(os.path.dirname(args.json) or "."):
            raise UserError(f"--json {args.json}: there is no such folder")
        sys.exit(main(args))
