"""What an evaluation reports per class and per image: tables, a CSV file, a picture."""

import csv
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from util.data.labelled import LabelledImages
from util.evaluate.exact import Predictions, closing_line, predict_samples, summarize
from util.evaluate.metrics import measures_all
from util.evaluate.targets import (
    figures_line,
    measure_predictions,
    target_table,
    write_target_predictions,
)
from util.files import printable, replacing
from util.processes.collectives import is_main_process, log, warn

MAX_CLASSES = 100  # of the per-class table and of the confusion picture


def evaluate_and_report(
    loader, model, device, args, dataset: LabelledImages, report: bool
) -> dict[str, float]:
    """Evaluates and prints the closing line; with `report` also what is known per class and per image.

    That is, in `args.output_dir`: for at most 100 classes a table (printed, and `per_class.txt`) and a
    picture (`confusion.png`); with `args.save_predictions` a `predictions.csv`. With `args.labels` or
    `args.best` there are all figures of the task too, None where one is not defined.
    """
    task = dataset.targets.task if measures_all(args) else None
    predictions = predict_samples(loader, model, device, args, task)
    stats = {} if task in ("labels", "numbers") else summarize(predictions)
    if task:
        stats |= {"loss": math.fsum(predictions.losses) / len(predictions.losses)}
        stats |= measure_predictions(predictions, dataset)
    if report and is_main_process():
        folder = Path(args.output_dir) if args.output_dir else None
        _write_reports(predictions, folder, args, dataset)
    if task:
        log(f"figures of {len(predictions.indices)} images\n{figures_line(stats)}")
    if "acc1" not in stats:
        return stats
    log(f"Accuracy of the network on the {len(predictions.labels)} test images: {stats['acc1']:.1f}%")
    log(closing_line(stats))  # which stays the last
    return stats


def _write_reports(predictions, folder, args, dataset) -> None:
    names = [printable(name) for name in dataset.classes]
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        if dataset.targets.task != "class":
            log(table := target_table(predictions, dataset))
            if folder is not None:
                with replacing(folder / "per_class.txt") as temporary:
                    temporary.write_text(table + "\n", encoding="utf-8")
        elif len(names) <= MAX_CLASSES:  # however many outputs the head has
            if predictions.top[:, 0].max() >= len(names):
                names.append("(other classes)")
            matrix = confusion_matrix(predictions, len(names))
            table = per_class_table(matrix, names)
            log(table)
            if folder is not None:
                with replacing(folder / "per_class.txt") as temporary:
                    temporary.write_text(table + "\n", encoding="utf-8")
                with replacing(folder / "confusion.png") as temporary:
                    draw_confusion(matrix, names).save(temporary, format="PNG")
        if args.save_predictions and dataset.targets.task != "class":
            write_target_predictions(folder / "predictions.csv", predictions, dataset)
        elif args.save_predictions:
            names = dataset.classes + [f"class {i}" for i in range(len(dataset.classes), args.nb_classes)]
            write_predictions(folder / "predictions.csv", predictions, dataset.files.paths, names)
        if args.save_predictions:
            log(f"predictions: {printable(folder / 'predictions.csv')}")
    except OSError as error:
        warn(f"{folder}: reports were not written: {error.strerror or error}")


def confusion_matrix(predictions: Predictions, num_classes: int) -> np.ndarray:
    """int64 (K, K): entry [i, j] counts the samples of class i that were taken for class j, or, in the last
    column, for one beyond it.
    """
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (predictions.labels, np.minimum(predictions.top[:, 0], num_classes - 1)), 1)
    return matrix


def per_class_table(matrix: np.ndarray, class_names: list[str]) -> str:
    """A text table: per class the samples, how many were right, and what it was else taken for most often."""
    width = max(len("class"), *(len(name) for name in class_names))
    lines = [f"{'class':{width}s}  samples  correct  acc (%)  most often taken for"]
    for i, name in enumerate(class_names):
        samples, correct = int(matrix[i].sum()), int(matrix[i, i])
        wrong = matrix[i].copy()
        wrong[i] = 0
        other = f"{class_names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else "-"
        accuracy = f"{100 * correct / samples:7.2f}" if samples else "      -"
        lines.append(f"{name:{width}s}  {samples:7d}  {correct:7d}  {accuracy}  {other}")
    return "\n".join(lines)


def write_predictions(path: str | Path, predictions: Predictions, paths, class_names: list[str]) -> None:
    """Writes a CSV file, one line per sample in the order of the data set.

    Columns: path, label, prediction (class names), correct (0 or 1), confidence (probability of the
    prediction), loss; where outputs were kept also the probability of each class.
    """
    each = [] if predictions.outputs is None else class_names
    shares = None if not each else torch.from_numpy(predictions.outputs).softmax(dim=1).tolist()
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with replacing(path) as temporary, open(temporary, "w", **text) as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "prediction", "correct", "confidence", "loss", *each])
        for i, index in enumerate(predictions.indices.tolist()):
            label, best = predictions.labels[i], predictions.top[i, 0]
            figures = f"{predictions.confidence[i]:.6f}", f"{predictions.losses[i]:.6f}"
            figures += tuple(f"{share:.6f}" for share in shares[i]) if each else ()
            writer.writerow(
                [paths[index], class_names[label], class_names[best], int(label == best), *figures]
            )


def draw_confusion(matrix: np.ndarray, class_names: list[str]) -> Image.Image:
    """A confusion matrix as a picture: rows are true classes, columns predictions, shade is the share."""
    count = len(class_names)
    cell = 48 if count <= 12 else 26 if count <= 30 else 14
    font = ImageFont.load_default(size=min(14, cell - 2))
    names = [name if len(name) <= 20 else name[:19] + "…" for name in class_names]
    margin = 42 + max(int(font.getlength(name)) for name in names)
    side = margin + count * cell + 12
    picture = Image.new("RGB", (max(side, 320), side), "white")
    draw = ImageDraw.Draw(picture)
    draw.text(
        (8, 6), "rows: true class, columns: prediction", fill="black", font=ImageFont.load_default(size=13)
    )
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    for i in range(count):
        y = margin + i * cell
        draw.text((margin - 6, y + cell / 2), names[i], fill="black", font=font, anchor="rm")
        _draw_upwards(picture, names[i], (y + cell / 2, margin - 6), font)
        for j in range(count):
            x, share = margin + j * cell, shares[i, j]
            shade = tuple(round(255 + (dark - 255) * share) for dark in (8, 48, 107))
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=shade, outline=(225, 225, 225))
            if cell >= 26 and matrix[i, j]:
                ink = "white" if share > 0.4 else "black"
                size = ImageFont.load_default(size=13 if cell == 48 else 9)
                draw.text((x + cell / 2, y + cell / 2), str(matrix[i, j]), fill=ink, font=size, anchor="mm")
    return picture


def _draw_upwards(picture: Image.Image, text: str, bottom_centre: tuple[float, float], font) -> None:
    """Writes `text` rotated, reading upwards from `bottom_centre` (x, y)."""
    _, _, right, bottom = font.getbbox(text)
    label = Image.new("RGB", (max(int(right), 1), max(int(bottom), 1) + 2), "white")
    ImageDraw.Draw(label).text((0, 0), text, fill="black", font=font)
    label = label.rotate(90, expand=True)
    picture.paste(label, (int(bottom_centre[0] - label.width / 2), int(bottom_centre[1] - label.height)))
