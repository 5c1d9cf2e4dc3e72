"""Makes one HTML page of one or more runs: no script, nothing from the network, all pictures inside."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from util.errors import UserError
from util.files import printable, replacing
from util.processes.collectives import log, warn
from util.report.folder import RunFolder, read_confusion, read_run
from util.report.pictures import embed, of_model, written

MOST = 5_000_000  # bytes of a page
WIDTH, HEIGHT, RIGHT, TOP, BOTTOM = 420, 250, 12, 12, 28  # of a panel of curves, and its margins
POINTS, ROWS = 400, 200  # of a line and of the table of epochs, at most; evenly spread


def write_report(runs: Sequence[tuple], output: Path, images: int, device: torch.device) -> None:
    """Writes the page of some runs.

    Args:
        runs: arguments of `read_run` for each.
        images: held-out images that the model looks at; 0: no pictures of it.

    Raises:
        UserError: a folder is no run's, or the page cannot be written.
    """
    found = [read_run(*run) for run in runs]
    if len({run.name for run in found}) < len(found):
        for number, run in enumerate(found, 1):
            run.name = f"{run.name} ({number})"
    pictures = []
    for run in found:
        drawn = list(written(run, 1 if len(found) > 1 else 3))
        drawn += of_model(run, images, device) if images else ()
        pictures += [(run.name, title, picture) for title, picture in drawn]
    budget, grids = MOST * 7 // 10 // max(1, len(pictures)), {}
    for name, title, picture in pictures:  # of several runs those of a kind beside each other
        kind = title.split()[0] if len(found) > 1 else ""
        grids.setdefault(kind, []).append((name, title, embed(picture, budget), picture.width))
    for run in found:
        run.confusion = read_confusion(run.path / "predictions.csv")
        run.rows = [run.records[i] for i in _spread(run.records, ROWS)]
        run.columns = dict.fromkeys(name for record in run.rows for name in record if name != "run")
    content = _TEMPLATES.get_template("report.html.jinja").render(
        runs=found, grids=grids.values(), panels=curves(found), facts=compare([run.facts for run in found]),
        width=WIDTH, height=HEIGHT, right=WIDTH - RIGHT,
    ).encode("utf-8", "backslashreplace")  # fmt: skip
    if len(content) > MOST:
        raise UserError(f"{output}: would have {len(content) / 1e6:.1f} MB; name fewer runs")
    try:
        with replacing(output) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None
    log(f"wrote {printable(output)}")


def write_at_end(folder: str, environment: str, device: torch.device) -> None:
    """The page of a run that is over. What goes wrong is warned about: all else of the run is on disk."""
    try:
        write_report([(folder, False, environment)], Path(folder) / "report.html", 200, device)
    except Exception as error:  # days of training do not fail for a picture
        warn(f"--report: not written: {error}")


def compare(facts: Sequence[dict[str, str]]) -> list[tuple[str, list[str], bool]]:
    """(name, value in each run, whether they differ), those that differ first."""
    names = dict.fromkeys(name for found in facts for name in found)
    rows = [(name, [found.get(name, "") for found in facts]) for name in names]
    return sorted(((*row, len(set(row[1])) > 1) for row in rows), key=lambda row: not row[2])


def curves(runs: Sequence[RunFolder]) -> list[dict]:
    """A panel for each figure that log.txt has, with the lines of all runs: title, lines, ticks."""
    grouped: dict[str, list] = {}
    for number, run in enumerate(runs):
        for name in dict.fromkeys(name for record in run.records for name in record):
            points = [(r["epoch"], r[name]) for r in run.records if type(r.get(name)) in (int, float)]
            points = [point for point in points if abs(point[1]) < 1e300]  # no NaN
            part, _, figure = name.partition("_")
            known = part in ("train", "val", "test", "knn") and figure
            title, label = (figure, part) if known else (part, figure) if part == "card" else (name, "")
            if points and name not in ("epoch", "n_parameters"):
                grouped.setdefault(title, []).append((number, label, points))
    return [_panel(title, lines, runs) for title, lines in grouped.items()]


def _panel(title: str, lines: list[tuple[int, str, list]], runs: Sequence[RunFolder]) -> dict:
    epochs, values = zip(*(point for _, _, points in lines for point in points), strict=True)
    first, across = min(epochs), max(max(epochs) - min(epochs), 1)
    low, high, step = nice_range(values)
    ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
    left = 14 + 8 * max(len(f"{tick:g}") for tick in ticks)  # a digit is no wider than 8
    labels, several = list(dict.fromkeys(label for _, label, _ in lines)), len(runs) > 1

    def place(epoch: float, value: float) -> tuple[float, float]:
        x = left + (epoch - first) / across * (WIDTH - left - RIGHT)
        return round(x, 1), round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    drawn = [
        {
            "label": f"{runs[number].name} {label}" if several else label or title,
            "colour": (number if several else labels.index(label)) % 6,
            "dash": labels.index(label) % 3 if several else 0,
            "last": points[-1], "ends": [f(points, key=lambda point: point[1]) for f in (min, max)],
            "points": [place(*points[i]) for i in _spread(points, POINTS)],
        }
        for number, label, points in lines
    ]  # fmt: skip
    x = [(place(epoch, low)[0], epoch) for epoch in range(first, first + across + 1, -(-across // 6))]
    y = [(place(first, tick)[1], f"{tick:g}") for tick in ticks]
    return {"title": title, "left": left, "lines": drawn, "x": x, "y": y}


def _spread(rows: Sequence, most: int) -> list[int]:
    """Indices of at most `most` rows, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)).tolist()


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


def nice_range(values: list[float]) -> tuple[float, float, float]:
    """(low, high, step) of an axis for finite `values`: multiples of a step of 1, 2 or 5 times a power of
    ten, at most eight of them.
    """
    low, high = min(values), max(values)
    if high - low < 1e-4 * (size := max(abs(low), abs(high))):  # one value: ticks of few digits around it
        low, high = low - 0.05 * size, high + 0.05 * size
    steps = (unit * 10.0**power for power in range(-6, 300) for unit in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step <= 6 and high + step > high)
    low, high = step * (low // step), step * -(-high // step)
    return low, max(high, low + step), step
