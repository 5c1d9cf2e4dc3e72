"""Writes one page on a run, or on several side by side, that any browser opens without a network.

    python report.py out
    python report.py out tuned --output both.html

On it: the curves of log.txt, settings, versions and data; the pictures, report card and predictions that lie
in the folder, and what `python plan.py DIR` printed if it lies there as plan.txt; then what the newest
checkpoint makes of some held-out images: best and worst reconstructed ones, principal components of patch
features, nearest neighbours, attention. What differs between runs is marked.

The training scripts write the page with --report. Nothing else in a run's folder is touched.
"""

import argparse
from pathlib import Path

from util.cli.flags import at_least, check_flags
from util.cli.parser import ArgumentParser, run_script
from util.compute.precision import resolve_device
from util.errors import UserError
from util.evaluate.output import check_output
from util.report.page import write_report
from util.run.owner import is_at_work, read_record


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser("MAE report", add_help=False)
    # fmt: off
    flag = parser.add_argument
    flag("runs", nargs="+", metavar="RUN", help="--output_dir of a training")
    flag("--output", metavar="FILE.html", help="default, of one run: report.html in its folder")
    flag("--images", default=200, type=at_least(0), metavar="N",
         help="held-out images that the model looks at (default: %(default)s; 0: no pictures of the model)")
    flag("--device", default="auto", help="auto (cuda, else mps, else cpu) or a torch device")
    return parser


def main(args: argparse.Namespace) -> None:
    check_flags(args, get_args_parser())
    if not args.output and len(args.runs) > 1:
        raise UserError(f"{len(args.runs)} runs: pass --output FILE.html")
    device, output = resolve_device(args.device), Path(args.output or Path(args.runs[0]) / "report.html")
    if args.output:
        check_output("--output", args.output)
        if not args.output.lower().endswith((".html", ".htm")):
            raise UserError(f"--output {args.output}: must end in .html")
    runs = [(run, is_at_work(run), read_record(run).get("environment", "")) for run in args.runs]
    write_report(runs, output, args.images, device)


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
