"""What a run's folder holds: log.txt, the newest checkpoint, texts and predictions that its scripts wrote."""

import csv
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from util.errors import UserError
from util.files import counted
from util.weights.files import read_file
from util.weights.names import list_checkpoints
from util.weights.schema import in_words

MATRIX = 30  # classes that a confusion matrix has at most; of more only the commonest confusions are shown
TEXTS = {"card.md": "Report card", "plan.txt": "What plan.py found", "per_class.txt": "Each class"}


@dataclass
class RunFolder:
    """records: of log.txt, one an epoch; others: those without an epoch. going_on: a process works there.
    content: of the newest checkpoint, {} without one. notes: what could not be read, for the page.
    """

    path: Path
    name: str
    going_on: bool
    environment: str
    records: list[dict]
    others: list[dict]
    notes: list[str]
    checkpoint: Path | None = None
    content: dict = field(default_factory=dict)

    @property
    def settings(self) -> dict:
        found = self.content.get("args")
        return found if isinstance(found, dict) else {}

    @property
    def state(self) -> str:
        done, epochs = self.records[-1]["epoch"] + 1 if self.records else 0, self.settings.get("epochs")
        text = f"{done} of {counted(epochs, 'epoch')}" if isinstance(epochs, int) else counted(done, "epoch")
        if self.going_on:
            return f"This run is going on: {text} logged, and what is below will change."
        return f"Complete: {text}." if done == epochs else f"Not complete, and not going on: {text}."

    @property
    def facts(self) -> dict[str, str]:
        """Environment, fingerprints of the data (numbers of images, digests of names), settings."""
        found, listing = {"environment": self.environment or "not recorded"}, self.content.get("run")
        listing = listing if isinstance(listing, dict) else {}
        for kind, part in (("training", listing), ("held-out", listing.get("held_out"))):
            part = part if isinstance(part, dict) else {}
            names = {"images": "images", "files": "digest of names", "labels": "digest of labels"}
            found |= {
                f"{kind} {text}": in_words(key, part[key]) for key, text in names.items() if key in part
            }
        settings = {str(name): in_words(str(name), value) for name, value in self.settings.items()}
        return found | dict(sorted(settings.items()))

    @property
    def texts(self) -> dict[str, str]:
        """{title: text} of what scripts wrote to be read, and what else log.txt says."""
        found = {}
        for name, title in TEXTS.items():
            if (path := self.path / name).is_file():
                found[title] = path.read_text(encoding="utf-8", errors="replace")[:200_000]
        lines = "\n".join(map(json.dumps, self.others[-20:]))
        return found | ({"Also in log.txt": lines} if lines else {})


def read_run(path: str, going_on: bool, environment: str) -> RunFolder:
    """Reads a folder; raises UserError where it is no run's. What cannot be read in it becomes a note."""
    folder, advice = Path(path), "name the --output_dir of a training"
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; {advice}")
    try:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        if going_on or environment:
            advice = "its first epoch is not over; let it go on, and try again then"
        raise UserError(f"{path}: holds no log.txt; {advice}") from None
    except OSError as error:
        raise UserError(f"{path}/log.txt: cannot be read ({error.strerror})") from None
    records, others, broken = read_log(lines)
    notes = [f"Lines of log.txt that cannot be read and are left out: {broken}."] if broken else []
    run = RunFolder(folder, folder.resolve().name, going_on, environment, records, others, notes)
    for checkpoint in list_checkpoints(folder)[:1]:
        try:
            run.content, run.checkpoint = read_file(checkpoint), checkpoint
        except UserError as error:
            notes.append(str(error))
    return run


def read_log(lines: list[str]) -> tuple[list[dict], list[dict], int]:
    """(a record an epoch, records without an epoch, number of lines that are neither).

    Of an earlier run in the same folder only the epochs before those of the last one count.
    """
    epochs, others, broken = [], [], 0
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            broken += bool(line.strip())
        elif type(record.get("epoch")) is not int or abs(record["epoch"]) > 10**9:
            others.append(record)
        elif not epochs or record["epoch"] < epochs[-1]["epoch"]:
            epochs.append(record)
    return epochs[::-1], others[::-1], broken


def read_confusion(path: Path) -> dict | None:
    """Of a predictions.csv of classes 'names', 'right', 'images', 'commonest' (true, predicted, number), and
    'counts' (rows: true, columns: predicted) of at most `MATRIX` classes; None without such a file.
    """
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            rows = csv.reader(file)
            if next(rows, [])[1:3] != ["label", "prediction"]:
                return None
            pairs = Counter(tuple(row[1:3]) for row in rows if len(row) > 2)
    except (OSError, csv.Error):
        return None
    names = sorted({name for pair in pairs for name in pair})
    wrong = [(*pair, number) for pair, number in pairs.most_common() if pair[0] != pair[1]]
    counts = [[pairs[one, two] for two in names] for one in names] if len(names) <= MATRIX else []
    right = pairs.total() - sum(number for *_, number in wrong)
    return {
        "names": names,
        "right": right,
        "images": pairs.total(),
        "commonest": wrong[:20],
        "counts": counts,
    }
