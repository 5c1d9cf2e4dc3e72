"""demo/prepare_elpv.py on a package made here, and on the real one where it is installed."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "demo" / "prepare_elpv.py"
# Cells per (probability, type), none of them a multiple of four
GROUPS = {(0.0, "mono"): 22, (0.0, "poly"): 30, (1 / 3, "mono"): 5, (2 / 3, "poly"): 6, (1.0, "poly"): 17}


def load_script():
    spec = importlib.util.spec_from_file_location("prepare_elpv", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package laid out as elpv-dataset is, on the path of child processes; {file name: row}."""
    data = tmp_path / "site" / "elpv_dataset" / "data"
    (data / "images").mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise ImportError('is not to be imported')\n")
    rng, rows, number = np.random.default_rng(0), {}, 0
    for (probability, kind), count in GROUPS.items():
        for _ in range(count):
            number += 1
            name = f"cell{number:04d}.png"
            Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8)).save(data / "images" / name)
            rows[name] = (probability, kind)
    lines = [f"images/{name}  {p:<19} {kind}" for name, (p, kind) in rows.items()]
    (data / "labels.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    return data, rows


def prepare(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def assert_one_line_error(result, *parts):
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    for part in parts:
        assert str(part) in result.stderr


def test_makes_a_stratified_image_folder_of_identical_files(package, tmp_path):
    data, rows = package
    out = tmp_path / "deep" / "cells"
    result = prepare(out)
    assert result.returncode == 0 and result.stderr == ""
    files = {path.relative_to(out): path for path in out.rglob("*.png")}
    assert sorted(path.name for path in files) == sorted(rows)  # each exactly once
    assert [path.name for path in out.parent.iterdir()] == ["cells"]
    counts = Counter()
    for relative, path in files.items():
        split, label, name = relative.parts
        assert label == ("defective" if rows[name][0] >= 0.5 else "functional")
        assert path.read_bytes() == (data / "images" / name).read_bytes()
        counts[split, *rows[name]] += 1
    for key, count in GROUPS.items():
        assert abs(counts["val", *key] - count / 4) < 1 and counts["train", *key] > 0
    assert sum(n for key, n in counts.items() if key[0] == "val") == 20  # a quarter of all 80
    with Image.open(next(iter(files.values()))) as image:
        assert image.mode == "L"
    assert "CC BY-NC-SA 4.0" in result.stdout and "10.1016/j.solener.2019.02.067" in result.stdout
    for split in ("train", "val"):
        of_split = {key[1:]: n for key, n in counts.items() if key[0] == split}
        bad = sum(n for (p, _), n in of_split.items() if p >= 0.5)
        total = sum(of_split.values())
        assert f"{out / split}: {total} pictures ({bad} defective, {total - bad} functional)" in result.stdout


@pytest.mark.parametrize("labels", ["type", "both"])
def test_other_labels_of_the_same_split(package, tmp_path, labels):
    _, rows = package
    assert prepare(tmp_path / "defect").returncode == 0
    result = prepare(tmp_path / labels, "--labels", labels)
    assert result.returncode == 0 and result.stderr == ""
    names = [{p.name for p in (tmp_path / folder / "val").rglob("*.png")} for folder in ("defect", labels)]
    assert names[0] == names[1]
    classes = Counter()
    for path in (tmp_path / labels).rglob("*.png"):
        probability, kind = rows[path.name]
        state = "defective" if probability >= 0.5 else "functional"
        assert path.parent.name == (kind if labels == "type" else f"{kind}-{state}")
        classes[path.parts[-3], path.parent.name] += 1
    for (split, name), count in classes.items():
        line = next(x for x in result.stdout.splitlines() if x.startswith(f"{tmp_path / labels / split}:"))
        assert f"{count} {name}" in line
    assert_one_line_error(prepare(tmp_path / "x", "--labels", "colour"), "--labels", "colour")


def test_split_is_the_same_each_time_and_in_any_order_of_rows():
    script = load_script()
    rows = [(f"images/cell{n:04d}.png", n % 4 / 3, ("mono", "poly")[n % 3 == 0]) for n in range(500)]
    split = script.split_rows(rows)
    shuffled = script.split_rows([rows[i] for i in np.random.default_rng(1).permutation(500)])
    assert split == shuffled and len(split["val"]) == 125 and len(split["train"]) == 375
    # Written down, because a change of the split would make published figures incomparable
    assert [Path(row[0]).stem for row in split["val"][:4]] == ["cell0476", "cell0188", "cell0112", "cell0100"]


def test_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    result = subprocess.run(
        [sys.executable, "-S", str(SCRIPT), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert_one_line_error(result, "elpv-dataset is not installed", "pip install elpv-dataset")
    assert not list(tmp_path.iterdir())


def test_full_or_unwritable_folder_is_one_clear_line(package, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "note").write_text("keep me")
    assert_one_line_error(prepare(mine), mine, "not an empty folder")
    assert_one_line_error(prepare(mine / "note"), mine / "note", "not an empty folder")
    assert_one_line_error(prepare(mine / "note" / "out"), "cannot write")
    assert_one_line_error(prepare(), "OUT_DIR")
    assert [path.name for path in mine.iterdir()] == ["note"] and (mine / "note").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "empty").returncode == 0
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["train", "val"]


def test_damaged_package_is_one_clear_line_and_leaves_nothing(package, tmp_path):
    data, _ = package
    good = (data / "labels.csv").read_text()
    (data / "labels.csv").write_text(good + "images/cell0001.png  maybe  mono\n")
    assert_one_line_error(prepare(tmp_path / "out"), "labels.csv, line 81", "maybe")
    (data / "labels.csv").write_text("\n")
    assert_one_line_error(prepare(tmp_path / "out"), "lists no pictures")
    (data / "labels.csv").write_text(good)
    (data / "images" / "cell0007.png").unlink()
    assert_one_line_error(prepare(tmp_path / "out"), "cell0007.png is missing")
    (data / "labels.csv").unlink()
    assert_one_line_error(prepare(tmp_path / "out"), "no data/labels.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


@pytest.mark.extra
def test_the_real_package(tmp_path):
    result = prepare(tmp_path / "cells")
    assert result.returncode == 0, result.stderr
    count = {p: len(list((tmp_path / "cells" / p).iterdir())) for p in
             ("train/defective", "train/functional", "val/defective", "val/functional")}  # fmt: skip
    assert count == {
        "train/defective": 616,
        "train/functional": 1352,
        "val/defective": 205,
        "val/functional": 451,
    }
    for path in list((tmp_path / "cells").rglob("*.png"))[::100]:
        with Image.open(path) as image:
            assert image.size == (300, 300) and image.mode == "L"
