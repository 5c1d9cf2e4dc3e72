"""What an evaluation reports per class, label or number and per image: tables, a CSV file, a picture."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from util.data.labelled import LabelledImages
from util.data.targets import Targets
from util.evaluate.exact import Predictions, closing_line, predict_samples, summarize
from util.evaluate.metrics import METRICS, best_thresholds, measure, measures_all
from util.evaluate.output import aligned, csv_writer
from util.figures.canvas import save_png
from util.files import counted, printable, replacing, some
from util.processes.collectives import gather, is_main_process, log, warn

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
    kept = task or ("class" if report and args.save_predictions else None)
    predictions = predict_samples(loader, model, device, args, kept)
    stats = {} if task in ("labels", "numbers") else summarize(predictions)
    if task:
        stats |= {"loss": math.fsum(predictions.losses) / len(predictions.losses)}
        targets, found = dataset.targets, None
        if is_main_process():  # computed once, the same on each
            found = measure(task, *values_of(predictions, dataset), targets.thresholds or 0.5)
        stats |= gather(found)[0]
    if report and is_main_process():
        folder = Path(args.output_dir) if args.output_dir else None
        _write_reports(predictions, folder, args, dataset)
    if task:
        log(f"figures of {counted(len(predictions.indices), 'image')}\n{figures_line(stats)}")
    if "acc1" not in stats:
        return stats
    log(f"Accuracy of the network on the {len(predictions.labels)} test images: {stats['acc1']:.1f}%")
    log(closing_line(stats))  # which stays the last
    return stats


def _write_reports(predictions, folder, args, dataset) -> None:
    names, table = [printable(name) for name in dataset.classes], ""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        if dataset.targets.task != "class":
            table = target_table(predictions, dataset)
        elif len(names) <= MAX_CLASSES:  # however many outputs the head has
            if predictions.top[:, 0].max() >= len(names):
                names.append("(other classes)")
            matrix = confusion_matrix(predictions, len(names))
            table = per_class_table(matrix, names)
            if folder is not None:
                save_png(draw_confusion(matrix, names), folder / "confusion.png")
        if table:
            log(table)
        if table and folder is not None:
            with replacing(folder / "per_class.txt") as temporary:
                temporary.write_text(table + "\n", encoding="utf-8")
            log(f"this table: {printable(folder / 'per_class.txt')}")
        if args.save_predictions:
            if dataset.targets.task == "class":
                names = dataset.classes + [f"class {i}" for i in range(len(dataset.classes), args.nb_classes)]
                write_predictions(folder / "predictions.csv", predictions, dataset.files.paths, names)
            else:
                write_target_predictions(folder / "predictions.csv", predictions, dataset)
            log(f"predictions: {printable(folder / 'predictions.csv')}")
    except OSError as error:
        warn(f"{folder}: reports were not written: {error.strerror or error}")


def values_of(predictions: Predictions, dataset: LabelledImages) -> tuple[np.ndarray, np.ndarray]:
    """(labels in their own units, float64 (n, K) probabilities or numbers) of predictions with outputs."""
    values = dataset.targets.values(torch.from_numpy(predictions.outputs)).numpy()
    return dataset.files.labels[predictions.indices], values


def figures_line(stats: dict[str, float | None]) -> str:
    """e.g. `* auroc 0.9132 f1 0.7201 kappa undefined`, without accuracies in percent."""
    words = (f"{name} {'undefined' if v is None else f'{v:.4f}'}" for name, v in stats.items())
    return "* " + " ".join(word for word in words if not word.startswith("acc1 ") and word[:5] != "acc5 ")


def target_table(predictions: Predictions, dataset: LabelledImages) -> str:
    """A text table: figures of each label or number."""
    targets, (labels, values) = dataset.targets, values_of(predictions, dataset)
    names, labelled = METRICS[targets.task], targets.task == "labels"
    rows = [["name", *names, *(["images with it", "threshold"] if labelled else [])]]
    for k, name in enumerate(targets.names):
        threshold = targets.thresholds[k] if labelled else 0.5
        own = measure(targets.task, labels[:, k : k + 1], values[:, k : k + 1], threshold)
        cells = ["-" if own[metric] is None else f"{own[metric]:.4g}" for metric in names]
        rows.append([printable(name), *cells])
        rows[-1] += [f"{int(labels[:, k].sum())}", f"{threshold:g}"] if labelled else []
    return aligned(rows, ())


def choose_thresholds(loader, model, device, args, targets: Targets) -> None:
    """Sets the thresholds of `targets` to those of the best F1 on a loader's images, on all processes."""
    predictions = predict_samples(loader, model, device, args, targets.task)
    values = targets.values(torch.from_numpy(predictions.outputs)).numpy()
    targets.thresholds = best_thresholds(predictions.labels, values)
    pairs = zip(targets.names, targets.thresholds, strict=True)
    text = f"thresholds, by F1 of {counted(len(values), 'image')} held out of train"
    log(f"{text}: {some((f'{name} {value:.4f}' for name, value in pairs), 10)}")


def confusion_matrix(predictions: Predictions, num_classes: int) -> np.ndarray:
    """int64 (K, K): entry [i, j] counts the samples of class i that were taken for class j, or, in the last
    column, for one beyond it.
    """
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (predictions.labels, np.minimum(predictions.top[:, 0], num_classes - 1)), 1)
    return matrix


def per_class_table(matrix: np.ndarray, class_names: list[str]) -> str:
    """A text table: per class the samples, how many were right, and what it was else taken for most often."""
    rows = [["class", "samples", "correct", "acc (%)", "most often taken for"]]
    for i, name in enumerate(class_names):
        samples, correct = int(matrix[i].sum()), int(matrix[i, i])
        wrong = np.where(np.arange(len(matrix)) == i, 0, matrix[i])
        other = f"{class_names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else "-"
        share = f"{100 * correct / samples:.2f}" if samples else "-"
        rows.append([name, str(samples), str(correct), share, other])
    return aligned(rows, (1, 2, 3))


def write_predictions(path: str | Path, predictions: Predictions, paths, class_names: list[str]) -> None:
    """Writes a CSV file, one line per sample in the order of the data set.

    Columns: path, label, prediction (class names), correct (0 or 1), confidence (probability of the
    prediction), loss; where outputs were kept also the probability of each class.
    """
    each = [] if predictions.outputs is None else class_names
    shares = torch.from_numpy(predictions.outputs).softmax(dim=1).numpy() if each else None
    with csv_writer(path) as writer:
        writer.writerow(["path", "label", "prediction", "correct", "confidence", "loss", *each])
        for i, index in enumerate(predictions.indices.tolist()):
            label, best = predictions.labels[i], predictions.top[i, 0]
            figures = predictions.confidence[i], predictions.losses[i], *(shares[i] if each else ())
            named = class_names[label], class_names[best], int(label == best)
            writer.writerow([paths[index], *named, *(f"{figure:.6f}" for figure in figures)])


def write_target_predictions(path: Path, predictions: Predictions, dataset: LabelledImages) -> None:
    """Writes a CSV file, one line per sample: path, then of each label its label, probability and whether
    that reaches its threshold; of each number its value and the prediction.
    """
    targets, (labels, values) = dataset.targets, values_of(predictions, dataset)
    words = ["label", "probability", "prediction"] if targets.thresholds else ["value", "prediction"]
    with csv_writer(path) as writer:
        writer.writerow(["path", *(f"{word} {name}" for name in targets.names for word in words)])
        for row, index in enumerate(predictions.indices.tolist()):
            cells = []
            for k, (label, value) in enumerate(zip(labels[row].tolist(), values[row].tolist(), strict=True)):
                if targets.thresholds:
                    cells += [int(label), f"{value:.6f}", int(value >= targets.thresholds[k])]
                else:
                    cells += [f"{label:.15g}", f"{value:.12g}"]
            writer.writerow([dataset.files.paths[index], *cells])


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
    title = "rows: true class, columns: prediction"
    draw.text((8, 6), title, fill="black", font=ImageFont.load_default(size=13))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    for i in range(count):
        y = margin + i * cell
        draw.text((margin - 6, y + cell / 2), names[i], fill="black", font=font, anchor="rm")
        _, _, right, bottom = font.getbbox(names[i])
        label = Image.new("RGB", (max(int(right), 1), max(int(bottom), 1) + 2), "white")
        ImageDraw.Draw(label).text((0, 0), names[i], fill="black", font=font)
        label = label.rotate(90, expand=True)  # reads upwards
        picture.paste(label, (int(y + cell / 2 - label.width / 2), int(margin - 6 - label.height)))
        for j in range(count):
            x, share = margin + j * cell, shares[i, j]
            shade = tuple(round(255 + (dark - 255) * share) for dark in (8, 48, 107))
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=shade, outline=(225, 225, 225))
            if cell >= 26 and matrix[i, j]:
                ink = "white" if share > 0.4 else "black"
                size = ImageFont.load_default(size=13 if cell == 48 else 9)
                draw.text((x + cell / 2, y + cell / 2), str(matrix[i, j]), fill=ink, font=size, anchor="mm")
    return picture
