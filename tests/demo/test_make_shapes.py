"""demo/make_shapes.py: what is in the painted pictures, as a table for --labels."""

import csv
import subprocess
import sys
from argparse import Namespace

import numpy as np
from golden_utils import REPO
from PIL import Image

from util.data.labels import read_labels
from util.demo_set.files import CLASSES, ensure_demo_data
from util.demo_set.scene import render


def test_facts_leave_the_picture_as_it_is():
    facts = {}
    plain, told = (render("gear", np.random.default_rng([1, 2]), into) for into in (None, facts))
    assert np.array_equal(plain, told)
    assert 0.38 <= facts["size"] <= 0.53 and 0.1 < facts["fill"] < 1 and 0 < facts["x"] < 1


def test_a_table_of_every_picture_that_the_scripts_take(tmp_path):
    table, root = tmp_path / "labels.csv", tmp_path / "set"
    command = [sys.executable, "demo/make_shapes.py", str(table), "--counts", "2", "1"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "30 pictures" in done.stdout, done.stderr
    ensure_demo_data(root, train=2, val=1, workers=1)
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["path"] for row in rows} == {str(path.relative_to(root)) for path in root.rglob("*.jpg")}
    assert all(row["class"] == row["path"].split("/")[1] for row in rows)
    args = Namespace(labels=str(table), data_path=str(root), label_columns=["class"])
    assert read_labels(args, "val").classes == list(CLASSES)
    args.label_columns = ["round", "living", "hollow", "covered", "blurred"]
    files = read_labels(args, "train")
    assert files.targets.task == "labels" and files.labels[0].tolist()[:3] == [1, 0, 0]  # a ball
    args.label_columns = ["size", "fill"]
    assert read_labels(args, "train").targets.task == "numbers"
    folder = [sys.executable, "demo/make_shapes.py", str(tmp_path)]
    done = subprocess.run(folder, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is a folder; name a file" in done.stderr


def test_pictures_with_masks_that_segmentation_takes(tmp_path):
    root, plain = tmp_path / "shapes", tmp_path / "set"
    command = [sys.executable, "demo/make_shapes.py", str(root), "--masks", "--counts", "1", "1"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "20 pictures with masks of 11 classes" in done.stdout, done.stderr
    ensure_demo_data(plain, train=1, val=1, workers=1)
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES, 1):
            picture = (root / split / "images" / f"{name}_0000.jpg").read_bytes()
            assert picture == (plain / split / name / f"{name}_0000.jpg").read_bytes()
            mask = np.asarray(Image.open(root / split / "masks" / f"{name}_0000.png"))
            assert set(np.unique(mask)) == {0, label} and 0.01 < (mask > 0).mean() < 0.9
    assert (root / "classes.txt").read_text().split() == ["background", *CLASSES]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "name a new folder" in done.stderr
