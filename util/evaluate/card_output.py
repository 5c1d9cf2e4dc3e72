"""Writes a report card: a table in Markdown, JSON, a picture."""

import itertools
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.errors import TrainingError
from util.evaluate.card import DRAWS, HELD, PROTOCOLS, RESAMPLES, Column, Plan, Row
from util.evaluate.normal import SCORES
from util.figures.canvas import BACKGROUND, FAINT_INK, INK, RULE, save_png
from util.files import printable, replacing
from util.processes.collectives import log

DEPTH = {"knn": "k-NN", "linear": "linear", "linear_norm": "BN, linear", "rank": "effective rank"}
COMPARED = {  # and their colours
    "knn": (0, 114, 178), "linear": (213, 94, 0), "linear_norm": (0, 158, 115), "attentive": (204, 121, 167)
}  # fmt: skip
WIDTH, HEIGHT = 560, 420  # of a panel, in pixels
STEPS = [unit * 10.0**power for power in range(-2, 12) for unit in (1, 2, 5)]  # of its axis


def card_record(
    columns: dict[str, Column], args: Namespace, plan: Plan, train_set, val_set, seconds: float, anomaly=None
) -> dict:
    """All of a card that can be written as JSON; `anomaly`: of `measure_anomaly`."""
    found = {}
    if anomaly is not None:
        text, rows = anomaly
        pair = f"{SCORES['loss']}: above {SCORES['brightness']}", rows["loss"], rows["brightness"]
        found = {"anomaly": {"what": text, "rows": {key: _plain(row) for key, row in rows.items()},
                             "difference": _difference(*pair)}}  # fmt: skip
    return found | {
        "finetune": args.finetune,
        "data": {"train": train_set.describe(), "val": val_set.describe()},
        "images": list(next(iter(columns.values())).images),  # without those that cannot be read
        "metric": plan.task.name,
        "seed": plan.seed,
        "steps": plan.steps,
        "seconds": round(seconds, 1),
        "columns": {
            name: {
                "rows": {key: _plain(row) for key, row in column.rows.items()},
                "depth": column.depth,
            }
            for name, column in columns.items()
        },
        "differences": differences(columns),
    }


def _plain(row) -> dict:
    return {name: value for name, value in vars(row).items() if name not in ("samples", "protocol")}


def differences(columns: dict[str, Column]) -> list[dict]:
    """How much better the first column is than each other, and attentive probing than a linear layer: with
    95 % intervals of the difference on the same resampled images.
    """
    (own, first), *others = columns.items()
    pairs = [
        (f"{PROTOCOLS[key]}: {own} above {name}", first.rows[key], column.rows[key])
        for name, column in others
        for key in COMPARED
        if key in first.rows and key in column.rows
    ]
    for key in ("linear", "linear_norm") if "attentive" in first.rows else ():
        text = f"{own}: attentive above {PROTOCOLS[key]}"
        pairs.append((text, first.rows["attentive"], first.rows[key]))
    return [_difference(*pair) for pair in pairs]


def _difference(text: str, one: Row, two: Row) -> dict:
    low, high = np.nanpercentile(one.samples - two.samples, [2.5, 97.5]).tolist()
    return {"what": text, "difference": one.score - two.score, "low": low, "high": high}


def _images(read: int, data: str) -> str:
    """What the data is, which says its number of images; of which so many were read, if not all."""
    return printable(data if data.startswith(f"{read:,} image") else f"{read:,} of {data}")


def markdown(record: dict) -> str:
    """The card as text: what was measured, how, and the tables."""
    columns, (train, val) = record["columns"], record["images"]
    head = ["protocol", "block, tokens; chosen", *columns]
    first = next(iter(columns.values()))["rows"]
    rows = []
    for key, title in PROTOCOLS.items():
        if key in first:
            own = first[key]
            place = f"{own['block']}, {own['tokens']}; {own['setting']}"
            rows.append([title, place, *(_interval(column["rows"].get(key)) for column in columns.values())])
    lines = [
        f"# Report card of {printable(record['finetune'])}",
        "",
        f"- {record['metric']} on {_images(val, record['data']['val'])}",
        f"- learned from {_images(train, record['data']['train'])}",
        f"- k, T, learning rate, block and tokens were chosen on {HELD:.0%} of those; then all taught",
        f"- in brackets: 95 % intervals, of {RESAMPLES} bootstrap samples of the evaluated images",
        f"- with few labels: mean of {DRAWS} draws and its interval over them; block and tokens are those of",
        "  the row `linear`, and the same part chose the rate",
        "- what was chosen is the first column's; the others chose for themselves (card.json)",
        "- the paper's own probe, with LARS and random crops, is main_linprobe.py",
        f"- seed {record['seed']}, {record['steps']} steps of 256 images a probe, {record['seconds']:.0f} s",
        "",
        *_table(head, rows),
    ]
    if figures := {key: row["figures"] for key, row in first.items() if row["figures"]}:
        head = ["", *next(iter(figures.values()))]
        cells = [["-" if v is None else f"{v:.4g}" for v in found.values()] for found in figures.values()]
        rows = [[PROTOCOLS[key], *row] for key, row in zip(figures, cells, strict=True)]
        lines += ["", f"Further figures of {next(iter(columns))}:", "", *_table(head, rows)]
    if record["differences"]:
        lines += ["", "Differences, on the same images:", ""]
        lines += [f"- {one['what']}: {_interval(one, '+.1f')}" for one in record["differences"]]
    if anomaly := record.get("anomaly"):
        rows = [[SCORES[key], _interval(row)] for key, row in anomaly["rows"].items()]
        lines += ["", f"Anomalies: {printable(anomaly['what'])}.", "", *_table(["score", "AUROC (%)"], rows)]
        lines += ["", f"{anomaly['difference']['what']}: {_interval(anomaly['difference'], '+.1f')}"]
    for name, column in columns.items():
        if len(column["depth"]["rank"]) > 1:
            lines += ["", f"Over depth, {name}:", "", *_depth_table(column["depth"])]
    return "\n".join(lines)


def _interval(row: dict | None, form: str = ".1f") -> str:
    if row is None:
        return "-"
    value = row.get("score", row.get("difference"))
    return f"{value:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def _depth_table(depth: dict) -> list[str]:
    found = {key: {(block, tokens): value for block, tokens, value in rows} for key, rows in depth.items()}
    pools = ("class", "mean")
    head = ["block", *(f"{title}, {pool}" for title in DEPTH.values() for pool in pools), "attentive"]
    rows = []
    for block in sorted({block for block, _, _ in depth["rank"]}):
        values = [found[key].get((block, pool)) for key in DEPTH for pool in pools]
        values.append(found.get("attentive", {}).get((block, "patches")))
        rows.append([str(block), *("-" if value is None else f"{value:.1f}" for value in values)])
    return _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table whose columns stand under each other on a terminal too."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    cells = [head, ["-" * width for width in widths], *rows]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return [f"| {' | '.join(row)} |" for row in padded]


def draw_depth(record: dict) -> Image.Image:
    """The metric over the blocks, a panel for each encoder: thin lines are of the class token, grey ones of
    raw pixels (BatchNorm, linear).
    """
    names = [name for name, column in record["columns"].items() if len(column["depth"]["rank"]) > 1]
    depths = {name: column["depth"] for name, column in record["columns"].items()}
    points = [point for depth in depths.values() for key in COMPARED for point in depth.get(key, ())]
    last, values = max(block for block, *_ in points), [value for *_, value in points]
    step = next(step for step in STEPS if max(values) - min(values) <= 6 * step)
    low, high = step * (min(values) // step), step * (max(values) // step + 1)
    picture = Image.new("RGB", (WIDTH * len(names), HEIGHT + 75), BACKGROUND)
    font = ImageFont.load_default(13)
    draw = ImageDraw.Draw(picture)
    name = printable(Path(record["finetune"]).name)
    title = f"{record['metric']} of {name}, over its blocks (thin: class token)"
    draw.text((18, 12), title, INK, ImageFont.load_default(16))
    for i, name in enumerate(names):

        def place(block: float, value: float, left=i * WIDTH + 60) -> tuple[float, float]:
            x = left + (block - 1) / max(last - 1, 1) * (WIDTH - 90)
            return x, HEIGHT - (value - low) / (high - low) * (HEIGHT - 70)

        draw.text((place((1 + last) / 2, 0)[0], 42), name, INK, font, anchor="ma")
        for tick in range(round((high - low) / step) + 1):
            y = place(1, low + tick * step)[1]
            draw.line((i * WIDTH + 46, y, (i + 1) * WIDTH - 18, y), RULE)
            draw.text((i * WIDTH + 40, y), f"{low + tick * step:g}", FAINT_INK, font, anchor="rm")
        for block in range(last, 0, last // -16):
            draw.text((place(block, low)[0], HEIGHT + 5), f"{block}", FAINT_INK, font, anchor="ma")
        pixels = (value for d in depths.values() for block, _, value in d["linear_norm"] if block == 0)
        for value in pixels:
            draw.line((*place(1, value), *place(last, value)), FAINT_INK)
        for (key, ink), tokens in itertools.product(COMPARED.items(), ("class", "mean", "patches")):
            spots = [place(b, value) for b, kind, value in depths[name].get(key, ()) if kind == tokens]
            draw.line(spots, ink, 1 if tokens == "class" else 3)
            for x, y in spots:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
    for i, (key, ink) in enumerate(COMPARED.items()):
        x, y = 18 + 125 * i + 40 * (i > 2), HEIGHT + 50  # "BatchNorm, linear" is long
        draw.line((x, y, x + 25, y), ink, 3)
        draw.text((x + 32, y), PROTOCOLS[key].split(":")[0], INK, font, anchor="lm")
    return picture


def write_card(folder: str, record: dict, text: str) -> None:
    """Writes card.md, card.json and card.png, each whole or not at all; without a `folder` nothing.
    TrainingError where one cannot be written.
    """
    if not folder:
        return
    picture = draw_depth(record)
    try:
        for name, content in {"card.md": text, "card.json": json.dumps(record, indent=1)}.items():
            with replacing(Path(folder) / name) as temporary:
                temporary.write_text(content + "\n", encoding="utf-8")
        save_png(picture, Path(folder) / "card.png")
    except OSError as error:
        raise TrainingError(f"{folder}: the card was not written: {error.strerror or error}") from None
    log(f"wrote {printable(Path(folder) / 'card.md')}, card.json and card.png")
