"""Labels from a table: whose row is whose, splits, folds, and what is refused in one line."""

import csv
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.data.dataset import find_split
from util.data.folds import deal
from util.data.labelled import build_dataset, labelled_images
from util.data.labels import read_labels
from util.errors import UserError

NAMES = [f"{split}/{kind}/{i}.png" for split in ("train", "val") for kind in ("cat", "dog") for i in range(4)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Small pictures in class folders, and the same in one folder."""
    root = tmp_path_factory.mktemp("labels")
    for i, name in enumerate(NAMES):
        for path in (root / "folders" / name, root / "flat" / name.replace("/", "_")):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(path)
    return root


def row_of(name: str, i: int) -> dict:
    split, kind, _ = name.split("/")
    found = {"path": name, "split": split, "group": f"g{i // 2}", "kind": kind}
    return {**found, "old": i % 2, "big": i % 3 // 2, "weight": 100.5 + i, "height": -2 * i}


ROWS = [row_of(name, i) for i, name in enumerate(NAMES)]


def write(path: Path, rows=ROWS, columns=("path", "kind"), delimiter=",", start="") -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(start)
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows([row[name] for name in columns] for row in rows)
    return path


def args_of(pictures, table, where="folders", **more) -> Namespace:
    return Namespace(data_path=str(pictures / where), labels=str(table), input_size=8, **more)


def changed(row: int, **cells) -> list[dict]:
    return [{**r, **(cells if i == row else {})} for i, r in enumerate(ROWS)]


def test_a_class_is_that_of_class_folders(pictures, tmp_path):
    for start, delimiter in (("", ","), ("\ufeff", ";"), ("", "\t")):  # as spreadsheets write them
        table = write(tmp_path / "a.csv", delimiter=delimiter, start=start)
        for split in ("train", "val"):
            found, args = read_labels(args_of(pictures, table), split), args_of(pictures, table)
            folders = find_split(args, split)
            assert [*found.paths] == [*folders.paths] and found.classes == folders.classes == ["cat", "dog"]
            assert np.array_equal(found.labels, folders.labels) and found.targets.task == "class"
            assert found.paths.digest() != ""
    assert "4 images in 2 classes" not in found.describe() and "8 images in 2 classes" in found.describe()
    image, label = build_dataset(False, args_of(pictures, table))[5]
    assert label == 1 and image.shape == (3, 8, 8)


@pytest.mark.parametrize("paths", ["inside", "full"])
def test_rows_by_other_paths(pictures, tmp_path, paths):
    if paths == "inside":  # of the folder of the split: names must differ between splits
        rows = [{**r, "path": r["path"].split("/", 1)[1]} for r in ROWS]
        with pytest.raises(UserError, match=r"line 10: cat/0\.png has a row already \(line 2\); remove one"):
            read_labels(args_of(pictures, write(tmp_path / "a.csv", rows)), "train")
        table = write(tmp_path / "a.csv", rows[:8])
        with pytest.raises(UserError, match="one row is of two files"):
            read_labels(args_of(pictures, table), "train")
        return
    rows = [{**r, "path": str(pictures / "folders" / r["path"])} for r in ROWS]
    assert len(read_labels(args_of(pictures, write(tmp_path / "a.csv", rows)), "val").paths) == 8


def test_splits_by_a_column_beat_folders_and_are_needed_without(pictures, tmp_path):
    flat = [{**r, "path": r["path"].replace("/", "_")} for r in ROWS]
    table = write(tmp_path / "a.csv", flat, ("path", "split", "kind"))
    assert read_labels(args_of(pictures, table, "flat"), "val").paths[0].endswith("val_cat_0.png")
    table = write(tmp_path / "b.csv", flat)
    with pytest.raises(UserError, match=r"no images in train; splits are a column 'split'"):
        read_labels(args_of(pictures, table, "flat"), "train")
    turned = [{**r, "split": {"train": "Val", "val": "training"}[r["split"]]} for r in ROWS]
    table = write(tmp_path / "c.csv", turned, ("path", "split", "kind"))
    assert "/val/" in read_labels(args_of(pictures, table), "train").paths[0]
    with pytest.raises(UserError, match="line 4: split is tset; it must be train, val or test"):
        table = write(tmp_path / "d.csv", changed(2, split="tset"), ("path", "split", "kind"))
        read_labels(args_of(pictures, table), "train")


def test_an_evaluation_needs_its_own_split_only(pictures, tmp_path):
    rows = [*ROWS, {"path": "test/cat/0.png", "kind": "cat"}]  # and no file of it
    table = write(tmp_path / "a.csv", rows)
    assert len(read_labels(args_of(pictures, table), "train").paths) == 8
    assert len(read_labels(args_of(pictures, table, eval=True, split="val"), "val").paths) == 8
    with pytest.raises(UserError, match=r"1 of 17 rows have no file there: test/cat/0\.png; remove them"):
        read_labels(args_of(pictures, table, eval=True, split="test"), "test")


def test_several_labels_and_numbers_by_what_columns_look_like(pictures, tmp_path):
    table = write(tmp_path / "a.csv", columns=("path", "old", "big"))
    files = read_labels(args_of(pictures, table), "train")
    assert files.targets.task == "labels" and files.classes == ["old", "big"]
    assert files.labels[:3].tolist() == [[0, 0], [1, 0], [0, 1]]
    assert "8 images with 2 labels (old, big) in" in files.describe()
    table = write(tmp_path / "b.csv", columns=("path", "weight", "height"))
    dataset = labelled_images("train", args_of(pictures, table))
    assert dataset.targets.task == "numbers" and dataset.label(3) == (103.5, -6.0)
    dataset.targets.mean, dataset.targets.std = [100.5, 0.0], [2.0, 3.0]
    assert dataset.label(3) == (1.5, -2.0)
    assert read_labels(args_of(pictures, table, label_columns=["weight"]), "val").labels.shape == (8, 1)
    assert read_labels(
        args_of(pictures, write(tmp_path / "c.csv", columns=("path", "old"))), "val"
    ).classes == [
        "0",
        "1",
    ]


def test_columns_without_a_name_are_no_labels(pictures, tmp_path):
    rows = [
        {**row, "": i} for i, row in enumerate(ROWS)
    ]  # as pandas writes an index, and sheets a last comma
    table = write(tmp_path / "a.csv", rows, ("", "path", "weight", ""))
    files = read_labels(args_of(pictures, table), "train")
    assert files.classes == ["weight"] and files.labels[:2].tolist() == [[100.5], [101.5]]


def test_the_labels_are_in_the_identity_of_a_run(pictures, tmp_path):
    before, after = (
        labelled_images("train", args_of(pictures, write(tmp_path / "a.csv", rows, ("path", "old", "big"))))
        for rows in (ROWS, changed(0, old=1))
    )
    assert before.listing()["files"] == after.listing()["files"]
    assert before.listing()["labels"] != after.listing()["labels"]


KINDS = [{**r, "kind": f"a {r['kind']}"} for r in ROWS]  # other words than the folders'
BOTH, NUMBERS = ("path", "kind"), ("path", "weight", "height")
BAD = {
    "rows without a file": (
        [*ROWS, {**ROWS[0], "path": "train/cat/x.png"}],
        BOTH,
        r"1 of 17 rows have no file there: train/cat/x\.png; remove them, or add the files",
    ),
    "files without a row": (
        ROWS[:-2],
        BOTH,
        r"2 of 16 files have no row: val/dog/2\.png, val/dog/3\.png; add rows, or list",
    ),
    "a class with one image": (
        [{**KINDS[0], "kind": "yak"}, *KINDS[1:]],
        BOTH,
        r"1 class of one image \(yak\), which cannot be in train and in val",
    ),
    "a class that val lacks": (
        [{**r, "kind": "yak"} for r in KINDS[:2]] + KINDS[2:],
        BOTH,
        r"val has no image of 1 class \(yak\); add some",
    ),
    "one class": (
        [{**r, "kind": "cow"} for r in ROWS],
        BOTH,
        "cow: alike in all images of train, so there is nothing to learn",
    ),
    "all labels alike": (
        [{**r, "old": 0} for r in ROWS],
        ("path", "old", "big"),
        "old: alike in all images of train, so there is nothing to learn; leave it out",
    ),
    "text": (changed(3, weight="heavy"), NUMBERS, "line 5: weight is heavy, which is no number"),
    "text in a column": (changed(3, weight="heavy"), NUMBERS[:2], "line 5: weight is heavy, which is no nu"),
    "not a number": (changed(3, weight="nan"), NUMBERS, "line 5: weight is nan, which is no number"),
    "too large": (changed(3, weight="-3e200"), NUMBERS, "line 5: weight is -3e200, beyond what float32"),
    "no label": (changed(3, old=2), ("path", "old", "big"), "old is 2, which is neither 0 nor 1"),
    "empty": (changed(1, kind=""), BOTH, "line 3: kind is empty; fill it in, or remove the row"),
    "two classes": (ROWS, ("path", "kind", "old"), "one class is one column"),
    "another class than the folder's": (
        changed(0, kind="dog"),
        BOTH,
        r"1 row of another class than the file's folder: train/cat/0\.png is dog",
    ),
    "empty group": (changed(1, group=""), ("path", "group", "kind"), "line 3: group is empty; fill it in"),
    "empty path": (changed(1, path=""), BOTH, "line 3: path is empty; fill it in, or remove the row"),
    "folders of Windows": (
        changed(0, path=r"train\\cat\\0.png"),
        BOTH,
        r"1 of 16 rows have no file there: train\\+cat\\+0\.png \(folders are parted by /\); remove them",
    ),
    "no path": (ROWS, ("kind", "old"), "no column is named path or file"),
    "no rows": ([], BOTH, "has no rows; a header"),
    "a name twice": (ROWS, ("path", "kind", "kind"), "two columns are named kind"),
    "no labels": (ROWS, ("path", "split"), "has no label column beside path, split"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_in_one_line(pictures, tmp_path, case):
    rows, columns, text = BAD[case]
    options = {"task": "class"} if case == "two classes" else {}
    with pytest.raises(UserError, match=text) as error:
        read_labels(args_of(pictures, write(tmp_path / "a.csv", rows, columns), **options), "train")
    assert "\n" not in str(error.value) and str(error.value).startswith(f"--labels {tmp_path / 'a.csv'}: ")


def test_a_column_named_twice_on_the_command_line(pictures, tmp_path):
    table = write(tmp_path / "a.csv", ROWS, ("path", "kind", "old"))
    args = args_of(pictures, table, label_columns=["old", "kind", "old"])
    with pytest.raises(UserError, match=r"^--label_columns old: is named twice; name each column once$"):
        read_labels(args, "train")


def test_a_row_cut_short_and_a_file_that_is_no_table(pictures, tmp_path):
    (tmp_path / "a.csv").write_text("path,kind\ntrain/cat/0.png\n")
    with pytest.raises(UserError, match="line 2: has 1 cells, the header 2"):
        read_labels(args_of(pictures, tmp_path / "a.csv"), "train")
    (tmp_path / "b.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"--labels .*b\.csv: "):
        read_labels(args_of(pictures, tmp_path / "b.csv"), "train")
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_labels(args_of(pictures, tmp_path / "c.csv"), "train")


def test_pages_of_a_file_are_a_group(tmp_path):
    pages, rows = [Image.new("L", (8, 8), i) for i in range(3)], []
    (tmp_path / "flat").mkdir()
    for i in range(8):
        pages[0].save(tmp_path / f"flat/{i}.tif", save_all=True, append_images=pages[1:])
        rows += [{"path": f"{i}.tif#{page}", "kind": "ab"[i % 2]} for page in (1, 2, 3)]
    args = args_of(tmp_path, write(tmp_path / "a.csv", rows), "flat", pages="all", folds=2, fold=0)
    files = {split: {p.split("#")[0] for p in read_labels(args, split).paths} for split in ("train", "val")}
    assert len(files["train"]) == len(files["val"]) == 4 and not files["train"] & files["val"]


@pytest.mark.parametrize("columns", [("kind",), ("old", "big"), ("weight",)])
def test_folds_never_part_a_group(pictures, tmp_path, columns):
    table = write(tmp_path / "a.csv", columns=("path", "group", *columns))
    group_of = {name: row["group"] for name, row in zip(NAMES, ROWS, strict=True)}
    seen = []
    for fold in range(3):
        args = args_of(pictures, table, folds=3, fold=fold)
        sets = [read_labels(args, split) for split in ("train", "val")]
        paths = [{str(Path(p).relative_to(pictures / "folders")) for p in files.paths} for files in sets]
        assert paths[0] | paths[1] == set(NAMES) and not paths[0] & paths[1]
        assert not {group_of[p] for p in paths[0]} & {group_of[p] for p in paths[1]}
        seen += paths[1]
    assert sorted(seen) == sorted(NAMES)  # each image is in val once


def test_deal_of_many_random_groups():
    for seed in range(20):
        rs = np.random.RandomState(seed)
        count, folds = rs.randint(30, 300), rs.randint(2, 8)
        groups, strata = rs.randint(0, rs.randint(folds, count), count), rs.randint(0, 3, count)
        fold = deal(groups, strata, folds)
        assert all(len(set(fold[groups == g])) == 1 for g in groups) and np.array_equal(
            fold, deal(groups, strata, folds)
        )
        alone = deal(
            np.arange(count), strata, folds
        )  # without groups: within one image of each class's share
        for k in range(3):
            per_fold = np.bincount(alone[strata == k], minlength=folds)
            assert per_fold.max() - per_fold.min() <= 1


def test_a_fold_that_leaves_a_class_out(pictures, tmp_path):
    rows = [{**r, "group": r["kind"] if r["kind"] == "cat" else r["path"]} for r in ROWS]
    table = write(tmp_path / "a.csv", rows, ("path", "group", "kind"))
    with pytest.raises(
        UserError, match=r"fold 0 of 2: (val|train) has no image of 1 class \(cat\); .* fewer folds"
    ):
        read_labels(args_of(pictures, table, folds=2, fold=1), "train")


def test_groups_in_train_and_val_are_a_warning(pictures, tmp_path, capsys):
    rows = [{**r, "group": f"g{i % 8}"} for i, r in enumerate(ROWS)]
    table = write(tmp_path / "a.csv", rows, ("path", "group", "kind"))
    for split in ("train", "val"):
        read_labels(args_of(pictures, table), split)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "8 groups are in train and in val (g0, g1, g2, g3, g4, ...)" in told
