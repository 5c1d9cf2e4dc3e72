"""Reads a table of labels: a CSV file with a column of paths and one or more of labels."""

import csv
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from util.errors import UserError
from util.files import shown, some

PATH = ("path", "file", "filename", "file_name", "image", "image_path")
WORDS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0, "no": 0.0, "yes": 1.0}
LARGEST = 1e18  # of numbers, whose squares float32 can hold


@dataclass
class Table:
    """place: flag and file, for messages. header: names of the columns. rows: cells, as text. lines: of the
    rows in the file.
    """

    place: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        place = self.header.index(name)
        return [row[place] for row in self.rows]

    def named(self, *names: str) -> str | None:
        """The first column of such a name, in small or large letters."""
        return next((name for name in self.header if name.lower() in names), None)

    def error(self, row: int, text: str) -> UserError:
        return UserError(f"{self.place}: line {self.lines[row]}: {text}")


def read_table(path: str) -> Table:
    """A CSV file with a header; its cells are parted by commas, semicolons or tabs. Columns without a name,
    such as pandas' index, are left out.

    Raises UserError for one that cannot be read, has rows of other lengths, a name twice or no paths.
    """
    place, rows, lines = f"--labels {path}", [], []
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            for row in reader:
                if any(cells := [cell.strip() for cell in row]):
                    rows.append(cells)
                    lines.append(reader.line_num)
    except (OSError, csv.Error) as error:
        raise UserError(f"{place}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(rows) < 2:
        raise UserError(f"{place}: has no rows; a header (path,label,...), then a line for each image")
    header = rows.pop(0)
    table = Table(place, header, rows, lines[1:])
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        raise UserError(f"{place}: two columns are named {some(twice)}; rename one")
    for row, cells in enumerate(rows):
        if len(cells) != len(header):
            raise table.error(row, f"has {len(cells)} cells, the header {len(header)}")
    named = [i for i, name in enumerate(header) if name]
    table.header, *table.rows = [[cells[i] for i in named] for cells in (header, *rows)]
    if table.named(*PATH) is None:
        raise UserError(f"{place}: no column is named {' or '.join(PATH)}; it has {some(header, 20)}")
    return table


def parse_labels(
    table: Table, wanted: list[str] | None, group: str | None, task: str | None
) -> tuple[str, list[str], np.ndarray]:
    """(task, names, labels of all rows) of a table: classes int32 (n,), else float64 (n, K).

    Args:
        wanted: label columns; None: all but those of path, split and `group`.
        task: of `util.data.targets.TASKS`; None or "auto": what the cells look like. Several columns of 0 and
            1 are labels; numbers with fractions or in several columns are numbers; one column of anything
            else is a class.

    Raises UserError for columns that are not there, empty cells, and text where numbers are.
    """
    others = [name for name in (table.named(*PATH), table.named("split"), group) if name]
    asked = [*(wanted or ()), *([group] if group else [])]
    if missing := [name for name in asked if name not in table.header]:
        raise UserError(f"{table.place}: has no column {some(missing)}; it has {some(table.header, 20)}")
    if twice := [name for name, count in Counter(wanted or ()).items() if count > 1]:
        raise UserError(f"--label_columns {some(twice)}: is named twice; name each column once")
    names = list(wanted or [name for name in table.header if name not in others])
    if not names:
        raise UserError(f"{table.place}: has no label column beside {some(others)}")
    columns = [table.column(name) for name in names]
    for name in (*others, *names):
        if "" in (cells := table.column(name)):
            raise table.error(cells.index(""), f"{name} is empty; fill it in, or remove the row")
    task = _guess(columns) if task in (None, "auto") else task
    if task == "class":
        if len(names) > 1:
            advice = "name it with --label_columns, or pass --task"
            raise UserError(f"{table.place}: one class is one column, and there are {some(names)}; {advice}")
        classes = sorted(set(columns[0]))
        number = {name: i for i, name in enumerate(classes)}
        return task, classes, np.array([number[cell] for cell in columns[0]], np.int32)
    read, kind = (_word, "neither 0 nor 1") if task == "labels" else (_number, "no number")
    parsed = [[read(cell) for cell in cells] for cells in columns]
    for name, cells, numbers in zip(names, columns, parsed, strict=True):
        if None in numbers:
            row, advice = numbers.index(None), "--task and --label_columns say which columns are what"
            raise table.error(row, f"{name} is {shown(cells[row])}, which is {kind}; {advice}")
        if max(numbers) > LARGEST or min(numbers) < -LARGEST:
            row, advice = int(np.argmax(np.abs(numbers))), "take another unit"
            raise table.error(
                row, f"{name} is {shown(cells[row])}, beyond what float32 computes with; {advice}"
            )
    return task, names, np.array(parsed, np.float64).T.copy()


def _guess(columns: list[list[str]]) -> str:
    cells = [cell for column in columns for cell in column]
    if len(columns) > 1:
        return "labels" if 2 * sum(_word(cell) is not None for cell in cells) > len(cells) else "numbers"
    numbers = [number for cell in cells if (number := _number(cell)) is not None]
    return "numbers" if 2 * len(numbers) > len(cells) and any(n % 1 for n in numbers) else "class"


def _word(text: str) -> float | None:
    return WORDS.get(text.lower())


def _number(text: str) -> float | None:
    try:
        return value if math.isfinite(value := float(text)) else None
    except ValueError:
        return None
