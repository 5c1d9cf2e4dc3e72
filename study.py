r"""Makes a study: rows of flags, each pre-trained and carded with several seeds, one table and one picture.

    python study.py --study ratio --flags "--data_path DIR --model mae_vit_base_patch16 --norm_pix_loss"
    python study.py rows.txt --seeds 3 --parallel 2 --output_dir mine

A line of rows.txt is a row, `NAME: FLAGS` of main_pretrain.py; a first line `all: FLAGS` is for all of them.
Each run is main_pretrain.py and then main_evaluate.py, as processes. The same command goes on after an
interruption: what is done is kept, and a run that was killed resumes. --cluster slurm submits a job for each
run; when they have ended, --table shows them. In --output_dir: study.md, study.json, study.png and a folder
for each run.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import main_pretrain
from util.cli.flags import at_least, check_flags
from util.cli.parser import ArgumentParser, parse_args, run_script
from util.console import write
from util.errors import TrainingError, UserError
from util.evaluate.knn import knn_sets
from util.figures.canvas import BACKGROUND, FAINT_INK, INK, RULE, save_png, shorten
from util.files import check_writable, printable, replacing
from util.processes.collectives import log
from util.recipes.study_rows import check_row, read_rows
from util.recipes.study_runs import REPO, Run, RunJob, Runner, card_flags
from util.report.page import nice_range
from util.slurm.submit import add_slurm_args, check_slurm_args, sbatch_script, submit

STUDIES = sorted(path.stem.removeprefix("study_") for path in REPO.glob("recipes/study_*.txt"))
COLUMNS = {"val_loss": ("held-out loss", 4), "knn": ("k-NN (%)", 1), "linear": ("linear probe (%)", 1)}
TIMES = {"seconds": "time (s)", "processor": "processor time (s)"}
COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (120, 94, 20)]
LOSS_FLAGS = {"--mask_ratio", "--mask", "--target", "--norm_pix_loss", "--visible_loss"}  # of another loss
LABEL, WIDTH, LINE, MARGIN = 230, 300, 26, 18  # of the names, a panel, a row, the border, in pixels


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; `add_help=False`, as those of the other scripts."""
    parser = argparse.ArgumentParser("MAE study", add_help=False)
    # fmt: off
    flag = parser.add_argument
    flag("rows", nargs="?", metavar="FILE", help="rows, a line each: NAME: FLAGS")
    flag("--study", choices=STUDIES, help="built-in rows (recipes/study_*.txt), after the paper's")
    flag("--flags", default="", metavar="TEXT", help="flags before those of every row, as one text")
    flag("--seeds", default=3, type=at_least(1), metavar="N", help="runs of each row, with seeds 0 to N - 1")
    flag("--output_dir", default="./output_study", help="where all goes (default: %(default)s)")
    flag("--parallel", default=1, type=at_least(1), metavar="N", help="runs at a time, dealt over the GPUs")
    flag("--card", default="small", choices=["small", "full", "none"],
         help="main_evaluate.py of each encoder; none: for images without labels")
    flag("--keep", action="store_true", help="keep the checkpoints of finished runs")
    flag("--table", action="store_true", help="make no run: only the table of those that are done")
    add_slurm_args(parser)
    parser.set_defaults(cluster="local", ngpus=1, nodes=1)
    return parser


def planned(args: argparse.Namespace) -> list[Run]:
    """All runs, seed by seed, so that a study that is cut short has whole comparisons.

    Raises:
        UserError: a row that a script would refuse.
    """
    if bool(args.rows) == bool(args.study):
        raise UserError("what is to be studied: a FILE of rows, or --study NAME; one of both")
    rows = read_rows(args.rows or str(REPO / "recipes" / f"study_{args.study}.txt"), args.flags)
    cards, looked_at = {}, set()
    for row in rows:
        own = check_row(row, main_pretrain, files=not args.table)
        cards[row] = None if args.card == "none" else card_flags(own, args.card == "full")
        if args.card != "none" and str(own.data_path) not in looked_at:
            looked_at.add(str(own.data_path))
            try:
                knn_sets(own)
            except UserError as error:
                raise UserError(f"{error}; a card needs labels, --card none does without") from None
    place = Path(args.output_dir).resolve()
    pairs = [(seed, row) for seed in range(args.seeds) for row in rows]
    return [Run(row, seed, place / row.folder / f"seed-{seed}", cards[row]) for seed, row in pairs]


def in_words(values: list[float], digits: int) -> str:
    """Mean, and sample standard deviation of several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}" if values else ""


def write_table(args: argparse.Namespace, runs: list[Run]) -> str:
    """Writes study.md, study.json and study.png of what is done; returns the table. A time that is not whole,
    because a start was killed, is left out.
    """
    rows, place, record = list(dict.fromkeys(run.row for run in runs)), Path(args.output_dir), {}
    paper = any(row.paper for row in rows)
    head = ["row", "n", *(title for title, _ in COLUMNS.values()), *TIMES.values()]
    lines = [head + ["paper, ViT-L: fine-tuned / linear (%)"] * paper]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        states = [state for run in runs if run.row == row and "figures" in (state := run.state())]
        own = {name: [s["figures"][name] for s in states if name in s["figures"]] for name in COLUMNS}
        own |= {name: [s[name] for s in states if s["starts"] == s["ends"]] for name in TIMES}
        record[row.name] = {"flags": row.flags, **own}
        digits = {name: number for name, (_, number) in COLUMNS.items()} | dict.fromkeys(TIMES, 0)
        cells = [in_words(own[name], number) for name, number in digits.items()]
        lines.append([row.name, f"{len(states)} of {args.seeds}", *cells] + [row.paper] * paper)
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if len({_of_loss(row.flags) for row in rows}) > 1:
        text += "\nHeld-out losses of other targets or masks are no comparison; k-NN and probe are.\n"
    for name, content in {"study.md": text, "study.json": json.dumps(record, indent=1) + "\n"}.items():
        with replacing(place / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    panels = {title: {row: own[name] for row, own in record.items()} for name, (title, _) in COLUMNS.items()}
    if panels := {title: values for title, values in panels.items() if any(values.values())}:
        save_png(draw_study(panels), place / "study.png")
    return text


def _of_loss(flags: tuple[str, ...]) -> tuple[str, ...]:
    """Of a row's flags those, with their values, that change what the loss is of."""
    kept, words = False, []
    for word in flags:
        kept = word.split("=")[0] in LOSS_FLAGS if word.startswith("--") else kept
        words += [word] * kept
    return tuple(words)


def draw_study(panels: dict[str, dict[str, list[float]]]) -> Image.Image:
    """An RGB picture of panels side by side, with the same rows: a dot a seed, a stroke for their mean.

    Args:
        panels: {heading: {row: the values of its seeds, or none}}; each panel has a value at least.
    """
    font, rows = ImageFont.load_default(13), list(next(iter(panels.values())))
    top, bottom = MARGIN + LINE, MARGIN + LINE * (len(rows) + 1)
    size = LABEL + (WIDTH + MARGIN) * len(panels) + MARGIN, bottom + LINE + MARGIN
    picture = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        text = shorten(row, font, LABEL - 2 * MARGIN)
        draw.text((LABEL - MARGIN, top + LINE * (i + 0.5)), text, INK, font, anchor="rm")
    for k, (heading, values) in enumerate(panels.items()):
        left = LABEL + k * (WIDTH + MARGIN)
        low, high, step = nice_range([value for seeds in values.values() for value in seeds])
        draw.text((left + WIDTH / 2, MARGIN), heading, INK, font, anchor="ma")

        def place(value: float, left=left, low=low, high=high) -> float:
            return left + 30 + (value - low) / (high - low) * (WIDTH - 60)  # room for numbers

        for tick in range(round((high - low) / step) + 1):
            x = place(low + tick * step)
            draw.line((x, top, x, bottom), RULE)
            draw.text((x, bottom + 5), f"{low + tick * step:g}", FAINT_INK, font, anchor="ma")
        for i, seeds in enumerate(values.values()):
            y, ink = top + LINE * (i + 0.5), COLOURS[i % len(COLOURS)]
            for value in seeds:
                draw.ellipse((place(value) - 3, y - 3, place(value) + 3, y + 3), outline=ink)
            if seeds:
                mean = place(statistics.fmean(seeds))
                draw.line((mean, y - 9, mean, y + 9), ink, 3)
    return picture


def main(args: argparse.Namespace) -> str:
    """Returns the table."""
    check_flags(args, get_args_parser())
    runs = planned(args)
    left = [run for run in runs if "figures" not in run.state()]
    check_writable("--output_dir", args.output_dir, f"{printable(args.output_dir)}:")
    failed = {}
    if not args.table and args.cluster == "slurm":
        check_slurm_args(args)
        parser = ArgumentParser(parents=[main_pretrain.get_args_parser()])
        for run in left:
            if args.dry_run:
                write(sbatch_script(args, "mae_study"))
                break
            submit(RunJob(run, parse_args(parser, run.training), args.keep), args, "mae_study")
        return ""
    if not args.table:
        gpus = [str(i) for i in range(torch.cuda.device_count())]
        failed = Runner(args.parallel, gpus, args.keep).make(left)
    text = write_table(args, runs)
    drawn = ", study.png" if (Path(args.output_dir) / "study.png").exists() else "; nothing to draw yet"
    log(f"\n{text}\nin {printable(args.output_dir)}: study.md, study.json{drawn}")
    if failed:
        lines = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise TrainingError(
            f"{len(failed)} of {len(runs)} runs failed; the same command tries again: {lines}"
        )
    return text


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
