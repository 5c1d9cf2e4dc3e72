"""main_evaluate.py: the report card of a file, what it writes, and what it refuses; and --card_freq."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_utils import REPO
from PIL import Image
from sklearn import metrics
from transfer_utils import given_args, make_mae, make_pictures, read_log, released_files

import main_evaluate
import main_pretrain
import models_mae
import predict
from util.cli.parser import ArgumentParser, parse_args
from util.errors import UserError
from util.evaluate import card, card_output
from util.evaluate.card import PROTOCOLS

# The small model has no name, so that its heads are told
FLAGS = "--num_workers 0 --device cpu --steps 4 --num_heads 3"


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(card, "RESAMPLES", 50)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return released_files(tmp_path_factory.mktemp("files"))["full"]


def run(words, **paths):
    words = [*FLAGS.split(), *words.split()]
    for name, value in paths.items():
        words += [f"--{name}", str(value)]
    return main_evaluate.main(given_args(main_evaluate, words))


def test_a_card_beside_its_baselines(pictures, encoder, tmp_path, capsys):
    columns = run("--baselines", data_path=pictures, finetune=encoder, output_dir=tmp_path)
    printed = capsys.readouterr().out
    text = (tmp_path / "card.md").read_text()
    assert text in printed + "\n" and "features of 48 images (1 of 3072 numbers and 1 times 16" in printed
    for title in PROTOCOLS.values():
        assert f"| {title} " in text
    assert "k-NN: encoder above random encoder: " in text and "attentive above linear: " in text
    record = json.loads((tmp_path / "card.json").read_text())
    assert list(record["columns"]) == ["encoder", "random encoder", "raw pixels"] == list(columns)
    own = record["columns"]["encoder"]
    assert own["rows"]["linear"]["score"] == columns["encoder"].rows["linear"].score > 80
    assert own["rows"]["knn_dino"]["block"] == 2 and own["rows"]["knn_dino"]["tokens"] == "class"
    assert len(own["depth"]["linear_norm"]) == 4 and len(own["depth"]["attentive"]) == 1
    pixels = record["columns"]["raw pixels"]["rows"]
    assert "knn_dino" not in pixels and pixels["linear"]["tokens"] == "pixels"
    assert Image.open(tmp_path / "card.png").width > 1000  # two panels
    [line] = read_log(tmp_path)
    assert line["card_linear"] == own["rows"]["linear"]["score"] and line["finetune"] == str(encoder)


def test_the_same_card_again_at_any_batch_size_and_another_of_another_seed(pictures, encoder, tmp_path):
    records = {}
    for name, words in {"a": "--batch_size 64", "b": "--batch_size 5", "c": "--seed 1"}.items():
        run(words + " --token_blocks 1 2", data_path=pictures, finetune=encoder, output_dir=tmp_path / name)
        records[name] = json.loads((tmp_path / name / "card.json").read_text())
        del records[name]["seconds"]
    assert records["a"] == records["b"] != records["c"]


def test_an_interrupted_card_harms_nothing(pictures, encoder, tmp_path, monkeypatch):
    run("--token_blocks 0", data_path=pictures, finetune=encoder, output_dir=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"card.md", "card.json", "card.png", "log.txt"}
    assert "attentive" not in json.loads(before["card.json"])["columns"]["encoder"]["rows"]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(card_output.json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--token_blocks 0 --seed 1", data_path=pictures, finetune=encoder, output_dir=tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in ("card.json", "card.png", "log.txt"))


KINDS = {"class": "kind", "labels": "bright red", "numbers": "light place"}


@pytest.fixture(scope="module")
def table(pictures, tmp_path_factory):
    """What is to be said of the pictures; three in a row are a group."""
    rs, rows = np.random.RandomState(0), ["path,kind,bright,red,light,place,group"]
    for i, path in enumerate(sorted(pictures.rglob("*.png"))):
        kind = path.parent.name
        light = {"bright": 180, "dark": 70, "red": 103}[kind] + rs.normal()
        labels = f"{int(kind == 'bright')},{int(kind == 'red')}"
        rows.append(f"{path.relative_to(pictures)},{kind},{labels},{light},{5 * light + 1e6},g{i // 3}")
    path = tmp_path_factory.mktemp("table") / "labels.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def changed(table, folder, old, new):
    path = folder / "changed.csv"
    text = table.read_text()
    assert len(re.findall(old, text)) > 0
    path.write_text(re.sub(old, new, text))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_of_a_table(kind, pictures, table, encoder, tmp_path, capsys):
    words = f"--label_columns {KINDS[kind]} --steps 20"
    [column] = run(words, labels=table, data_path=pictures, finetune=encoder, output_dir=tmp_path).values()
    record, text = json.loads((tmp_path / "card.json").read_text()), (tmp_path / "card.md").read_text()
    assert record["metric"] == {"class": "accuracy (%)", "labels": "AUROC (%)", "numbers": "R2 x 100"}[kind]
    rows = record["columns"]["encoder"]["rows"]
    assert rows["linear_norm"]["score"] > 80 and rows["knn"]["score"] > 80  # colours are plain to see
    assert ("few_5" in rows) == (kind == "class") and rows["linear"]["figures"].keys() == {
        "class": {"accuracy", "balanced_accuracy", "f1", "kappa"},
        "labels": {"accuracy", "balanced_accuracy", "f1", "auroc", "average_precision", "kappa"},
        "numbers": {"mae", "rmse", "r2"},
    }[kind]
    assert "Further figures of encoder:" in text and "24 images" in text
    if kind != "class":  # other labels of the evaluated images choose nothing else
        swapped = changed(
            table, tmp_path, r"(?m)^(val/\w+/\d.png,\w+),(\d),(\d),([\d.]+),([\d.]+)", r"\1,\3,\2,\5,\4"
        )
        [other] = run(words, labels=swapped, data_path=pictures, finetune=encoder, output_dir="").values()
        for key, row in column.rows.items():
            twin = other.rows[key]
            assert (row.block, row.tokens, row.setting) == (twin.block, twin.tokens, twin.setting)
        assert other.rows["linear_norm"].score < column.rows["linear_norm"].score - 20


def test_a_card_of_a_fold(pictures, table, encoder, tmp_path):
    words, evaluated = "--label_columns bright red --folds 3 --token_blocks 0 --fold", []
    for fold in range(3):
        run(f"{words} {fold}", labels=table, data_path=pictures, finetune=encoder, output_dir=tmp_path)
        record = json.loads((tmp_path / "card.json").read_text())
        assert sum(record["images"]) == 48 and record["metric"] == "AUROC (%)"
        evaluated.append(record["images"][1])
    assert sum(evaluated) == 48 and min(evaluated) >= 12  # each image once


CLASS, LABELS, NUMBERS = (f"--label_columns {columns}" for columns in KINDS.values())
BAD_TABLES = {
    "a row without a file": ("train/red/0", "train/red/99", CLASS, "1 of 48 rows have no file there"),
    "a file without a row": ("train/red/0.png.*\n", "", CLASS, "1 of 48 files have no row: train/red/0.png"),
    "one image of a class": (
        "path",
        "path",
        "--label_columns place --task class",
        "48 classes of one image",
    ),
    "labels alike in val": (r"(?m)^(val.*?),\d,\d,", r"\1,1,0,", LABELS, "are not defined for 2 of 2: .*all"),
    "labels alike in train": (
        r"(?m)^(train.*?),\d,\d,",
        r"\1,1,0,",
        LABELS,
        "bright, red: alike in all images",
    ),
    "text": (r"(?m)^(train/red/0.png,red,0,1),[\d.]+", r"\1,heavy", NUMBERS, "heavy, which is no number"),
    "numbers alike in val": (r"(?m)^(val.*?,\d,\d,).*,", r"\g<1>1,2,", NUMBERS, "R2 x 100 is not defined"),
    "one group": (",g[0-9]+", ",g1", LABELS, "train/: all images are of one group"),
    "fold": (
        r"(?m)^(\w+/red/.*),g\d+$",
        r"\1,a",
        CLASS + " --folds 2",
        "fold 0 of 2: .* has no image of 1 class .red",
    ),
    "folders": (
        "in/red/0.png,red",
        "in/red/0.png,dark",
        CLASS,
        "1 row of another class than the file's fold",
    ),
    "thresholds": ("path", "path", LABELS + " --thresholds auto", "chosen while a model is trained"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables(case, pictures, table, encoder, tmp_path, capsys):
    old, new, words, message = BAD_TABLES[case]
    bad = changed(table, tmp_path, old, new)
    with pytest.raises(UserError, match=message) as error:
        run(words, labels=bad, data_path=pictures, finetune=encoder, output_dir=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    assert not capsys.readouterr().out  # no settings either


def test_the_reconstruction_error_as_an_anomaly_score(pictures, encoder, tmp_path):
    words = "--normal bright --decoder_num_heads 4 --token_blocks 0 --norm_pix_loss --labels"
    run(words.removesuffix(" --labels"), data_path=pictures, finetune=encoder, output_dir=tmp_path)
    found, text = (
        json.loads((tmp_path / "card.json").read_text())["anomaly"],
        (tmp_path / "card.md").read_text(),
    )
    assert found["what"].startswith("16 images that are not bright against 8 that are; dark images of train")
    assert found["rows"]["brightness"]["score"] == 100 and "| mean brightness " in text
    # As predict.py --loss writes them
    words = ["--resume", encoder, pictures / "val", "--loss", tmp_path / "loss.csv", "--decoder_num_heads", 4]
    words += ["--num_heads", 3, "--norm_pix_loss", "--num_workers", 0, "--device", "cpu"]
    predict.main(parse_args(ArgumentParser(parents=[predict.get_args_parser()]), [*map(str, words)]))
    with open(tmp_path / "loss.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    odd = ["bright" not in row["path"] for row in rows]
    for key in ("loss", "largest"):
        expected = 100 * metrics.roc_auc_score(odd, [float(row[key]) for row in rows])
        assert found["rows"][key]["score"] == pytest.approx(expected)
        assert found["rows"][key]["low"] <= expected <= found["rows"][key]["high"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--finetune FILE is needed"),
        (
            "--finetune FILE --normal blue --decoder_num_heads 4",
            "--normal blue: must be one of several classes; there are 3 classes: bright, dark, red",
        ),
        ("--finetune ENCODER --normal red", "holds no decoder"),
        ("--finetune FILE --token_blocks 3", "--token_blocks 3: the encoder has 2 blocks"),
        ("--finetune FILE --token_blocks -1", "--token_blocks -1: the encoder has 2 blocks, from 1"),
        ("--finetune FILE --memory 1e-6", "--memory 1e-06: features of 48 images"),
        ("--finetune FILE --in_chans 1", "--in_chans 1: .* has 3; leave the flag out"),
        ("--finetune FILE --input_size 64", "--input_size 64x64: does not give the 16 patches"),
        ("--finetune /none.pth", "--finetune /none.pth: "),
        ("--finetune FILE --data_path FEW", "no class has two images"),
        ("--finetune FILE --data_path OTHER", "the classes of train and val differ"),
    ],
)
def test_bad_input(words, message, pictures, encoder, tmp_path):
    few, other = tmp_path / "few", tmp_path / "other"
    make_pictures(few, per_class=1)
    make_pictures(other, classes=("bright", "dark"), per_class=1)
    shutil.move(other / "val/dark", other / "val/red")
    words = words.replace("ENCODER", str(encoder.parent / "mae_encoder.pth")).replace("FILE", str(encoder))
    words = words.replace("FEW", str(few)).replace("OTHER", str(other))
    paths = {} if "data_path" in words else {"data_path": pictures}
    with pytest.raises(UserError, match=message):
        run(words, **paths, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_read_are_not_counted(pictures, encoder, tmp_path):
    data = shutil.copytree(pictures, tmp_path / "data")
    for name in ("train/dark/2.png", "val/red/1.png"):
        (data / name).write_bytes((data / name).read_bytes()[:200])
    run("--bad_images skip --token_blocks 0", data_path=data, finetune=encoder, output_dir=tmp_path / "out")
    text = (tmp_path / "out/card.md").read_text()
    assert "on 23 of 24 images in 3" in text and "learned from 23 of 24 images in 3" in text


def test_small_cards_while_training(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models_mae.MODELS, "mae_test", lambda **kwargs: make_mae())
    words = "--model mae_test --input_size 32 --patch_size 8 --epochs 3 --warmup_epochs 1 --batch_size 8"
    words += " --num_workers 0 --device cpu --vis_freq 0 --knn_freq 2"
    states = []
    for name, freq in (("without", 0), ("with", 2)):
        folder = tmp_path / name
        more = ["--log_dir", "", "--output_dir", str(folder), "--data_path", str(pictures)]
        main_pretrain.main(given_args(main_pretrain, [*words.split(), "--card_freq", str(freq), *more]))
        states.append(torch.load(folder / "checkpoint-2.pth", weights_only=True)["model"])
    plain, carded = (read_log(tmp_path / name) for name in ("without", "with"))
    figures = {"card_knn", "card_linear_norm", "card_linear_dinov2", "card_block", "card_rank"}
    assert [figures & line.keys() for line in carded] == [figures, set(), figures]
    assert carded[2]["card_linear_norm"] > 60 and carded[2]["knn_acc1"] == plain[2]["knn_acc1"]
    assert "Epoch: [2] report card: knn " in capsys.readouterr().out
    for key, value in states[0].items():  # training has not noticed
        assert torch.equal(value, states[1][key])


@pytest.mark.slow
def test_the_same_card_in_two_processes(encoder, tmp_path):
    pictures = make_pictures(tmp_path / "pictures", per_class=24)  # 72 images: three groups
    words = [*FLAGS.split(), "--finetune", str(encoder), "--data_path", str(pictures), "--token_blocks", "1"]
    records = []
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            "--nproc_per_node",
            str(count),
            "main_evaluate.py",
            *words,
            "--output_dir",
            tmp_path / str(count),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, cwd=REPO, env=environment, capture_output=True)
        records.append(json.loads((tmp_path / str(count) / "card.json").read_text()) | {"seconds": 0})
        assert len(read_log(tmp_path / str(count))) == 1
    assert records[0] == records[1]
