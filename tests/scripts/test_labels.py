"""Labels from a table in all scripts: one class, several labels, numbers; figures, resuming, bad input."""

import csv
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_utils import REPO
from sklearn.utils.class_weight import compute_class_weight
from transfer_utils import given_args, make_pictures, read_log, run, same_state, state_of, vit_test

import export
import main_finetune
import main_knn
import main_linprobe
import models_vit
import predict
from util.cli.parser import ArgumentParser, parse_args
from util.data.labelled import labelled_images
from util.errors import UserError
from util.evaluate.knn import knn_votes
from util.evaluate.metrics import best_thresholds
from util.recipes.labels import TargetLoss, label_mixup, target_loss
from util.weights.describe import read_model_info
from util.weights.files import read_file

RECIPE = "--batch_size 8 --epochs 2 --warmup_epochs 0 --blr 0.05 --save_predictions"
LABELS, NUMBERS = "--label_columns bright red odd", "--label_columns light place"
TASKS = {"class": "--label_columns kind", "labels": LABELS, "numbers": NUMBERS}
KNN = ["--model", "vit_test", "--input_size", "32", "--num_workers", "0", "--device", "cpu"]
HEADER = ["path", "kind", "bright", "red", "odd", "light", "place", "group"]


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setitem(models_vit.MODELS, "vit_test", vit_test)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures in class folders, and a table that says several things of each."""
    root = make_pictures(tmp_path_factory.mktemp("pictures"))
    rs, rows = np.random.RandomState(0), []
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        kind = path.parent.name
        light = {"bright": 180, "dark": 70, "red": 103}[kind] + rs.normal()
        label = int(kind == "bright"), int(kind == "red"), i % 2
        rows.append([path.relative_to(root), kind, *label, f"{light:.3f}", 1e6 + i, f"g{i // 3}"])
    with open(root / "labels.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Finished runs' folders, by task."""
    folders = {task: tmp_path_factory.mktemp(task) for task in TASKS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models_vit.MODELS, "vit_test", vit_test)
        for task, folder in folders.items():
            start(main_finetune, data, RECIPE, TASKS[task], output_dir=folder)
    return folders


def start(script, data, *flags, **paths):
    return run(script, *flags, data_path=data, labels=data / "labels.csv", **paths)


def rows_of(folder):
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def call(script, *words):
    script.main(parse_args(ArgumentParser(parents=[script.get_args_parser()]), [*map(str, words)]))


def test_a_run_of_each_task(trained):
    logs = {task: read_log(folder)[-1] for task, folder in trained.items()}
    for task in ("class", "labels"):
        names = ("accuracy", "balanced_accuracy", "f1", "auroc", "average_precision", "kappa", "loss")
        assert all(logs[task][f"test_{name}"] >= 0 for name in names if name != "kappa")
        assert logs[task]["test_auroc"] > 0.6
    assert logs["class"]["test_acc1"] == pytest.approx(100 * logs["class"]["test_accuracy"])
    assert logs["numbers"]["test_rmse"] >= logs["numbers"]["test_mae"] > 0
    assert "test_acc1" not in logs["labels"] and "test_acc1" not in logs["numbers"]
    info = {task: torch.load(f / "checkpoint-1.pth", weights_only=True) for task, f in trained.items()}
    assert "task" not in info["class"]["model_info"] and "best_acc1" in info["class"]
    assert info["labels"]["model_info"]["class_names"] == ["bright", "red", "odd"]
    assert info["labels"]["model_info"]["thresholds"] == [0.5] * 3
    best = max(record["test_auroc"] for record in read_log(trained["labels"]))
    assert info["labels"]["model_info"]["best"] == {"metric": "auroc", "value": best}
    assert "auroc" in (trained["labels"] / "per_class.txt").read_text()


def test_figures_are_those_of_predictions_csv(trained, data):
    from sklearn import metrics

    rows = rows_of(trained["labels"])
    truth = np.array([[int(row[f"label {name}"]) for name in ("bright", "red", "odd")] for row in rows])
    shares = np.array([[float(row[f"probability {n}"]) for n in ("bright", "red", "odd")] for row in rows])
    found = read_log(trained["labels"])[-1]
    assert len(rows) == 24 and found["test_auroc"] == pytest.approx(metrics.roc_auc_score(truth, shares))
    assert all(int(r["prediction red"]) == (float(r["probability red"]) >= 0.5) for r in rows)
    rows, found = rows_of(trained["numbers"]), read_log(trained["numbers"])[-1]
    errors = [
        abs(float(r[f"value {n}"]) - float(r[f"prediction {n}"])) for r in rows for n in ("light", "place")
    ]
    assert found["test_mae"] == pytest.approx(np.mean(errors), rel=1e-6)
    words = ["--data_path", str(data), "--labels", str(data / "labels.csv"), *NUMBERS.split()]
    train = labelled_images("train", given_args(main_finetune, words))
    info = torch.load(trained["numbers"] / "checkpoint-0.pth", weights_only=True)["model_info"]
    assert info["target_mean"] == train.files.labels.mean(axis=0).tolist()
    assert info["target_std"] == train.files.labels.std(axis=0).tolist()
    assert float(rows[0]["value place"]) == 1e6 + 24  # as the table says it
    rows = rows_of(trained["class"])
    assert all(
        sum(float(r[n]) for n in ("bright", "dark", "red")) == pytest.approx(1, abs=2e-6) for r in rows
    )


@pytest.mark.parametrize("task", ["labels", "numbers"])
def test_evaluation_and_prediction_need_no_further_flags(trained, data, tmp_path, task, capsys):
    best = trained[task] / "checkpoint-1.pth"
    paths = {"resume": best, "output_dir": tmp_path}
    for size in (1, 64):
        start(main_finetune, data, f"--eval --save_predictions --batch_size {size}", **paths)
        assert rows_of(tmp_path) == rows_of(trained[task])
    call(predict, "--resume", best, data / "val", "--csv", tmp_path / "p.csv")
    with open(tmp_path / "p.csv", encoding="utf-8", newline="") as file:
        found = {row["path"]: row for row in csv.DictReader(file)}
    for row in rows_of(trained[task]):
        theirs = found[row["path"]]
        if task == "labels":
            assert abs(float(theirs["probability red"]) - float(row["probability red"])) < 2e-6
            assert theirs["prediction red"] == row["prediction red"]
        else:  # 7 digits
            assert float(theirs["place"]) == pytest.approx(float(row["prediction place"]), rel=1e-6)
    capsys.readouterr()
    call(predict, "--resume", best, data / "val" / "red" / "0.png")
    words = {"labels": ["bright", "odd", "%"], "numbers": ["light", "place"]}[task]
    assert all(word in capsys.readouterr().out for word in words[:1])
    with pytest.raises(UserError, match=f"--top_k 2: .* predicts {task}, and all are given"):
        call(predict, "--resume", best, data / "val", "--top_k", 2)
    with pytest.raises(UserError, match=f"predicts {task} .*; pass --labels FILE.csv"):
        run(main_finetune, "--eval", data_path=data, **paths)


def test_an_evaluation_of_some_of_the_classes(trained, data, tmp_path):
    rows = (data / "labels.csv").read_text().splitlines()
    some = [row for row in rows if not row.startswith("val/dark")]
    root = shutil.copytree(data, tmp_path / "data", ignore=lambda *_: {"dark"})
    table = root / "labels.csv"
    table.write_text("\n".join(row for row in some if "dark" not in row) + "\n")
    paths = {"data_path": root, "labels": table, "output_dir": tmp_path / "out"}
    resume = trained["class"] / "checkpoint-1.pth"
    run(main_finetune, "--eval --save_predictions", TASKS["class"], resume=resume, **paths)
    whole = {os.path.relpath(row.pop("path"), data): row for row in rows_of(trained["class"])}
    found = {os.path.relpath(row.pop("path"), root): row for row in rows_of(tmp_path / "out")}
    assert len(found) == 16
    for name, row in found.items():  # other groups of 32: to rounding
        assert row["label"] == whole[name]["label"] == name.split("/")[1]
        assert abs(float(row["dark"]) - float(whole[name]["dark"])) < 2e-6
    table.write_text(table.read_text().replace(",red,0,1", ",wine,0,1"))
    with pytest.raises(UserError, match=r"its 3 classes are not the 2 of .*wine"):
        run(main_finetune, "--eval", TASKS["class"], resume=resume, **paths)


@pytest.mark.parametrize("task", ["labels", "numbers"])
def test_an_export_says_what_its_outputs_are(trained, tmp_path, task):
    call(
        export,
        "--resume",
        trained[task] / "checkpoint-best.pth",
        "--to",
        "safetensors",
        "--output",
        tmp_path / "a",
    )
    card = (tmp_path / "a" / "README.md").read_text()
    assert ("sigmoid" in card) == (task == "labels") and ("standardised" in card) == (task == "numbers")
    again = read_file(str(tmp_path / "a" / "model.safetensors"), "--resume", True)
    info, own = read_model_info(again), torch.load(trained[task] / "checkpoint-best.pth", weights_only=True)
    for name in ("task", "thresholds", "target_mean", "target_std"):
        assert info.get(name) == own["model_info"].get(name)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"task": "music"}, "task is music, which is not class, labels or numbers"),
        ({"thresholds": [0.5]}, "is damaged: 1 values of thresholds for 3 labels"),
        ({"thresholds": [0.5, 2, 0.5]}, "thresholds is .* which is not a list of probabilities"),
        ({"task": "numbers", "target_mean": [0.0, 0.0]}, "2 values of target_mean for 3 numbers"),
        ({"task": "numbers", "target_std": [1.0, 0.0, 1.0]}, "which is not a list of numbers above 0"),
    ],
)
def test_targets_of_a_damaged_file_are_refused(trained, data, tmp_path, entry, text):
    content = torch.load(trained["labels"] / "checkpoint-1.pth", weights_only=True)
    content["model_info"] |= entry
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=text):
        call(predict, "--resume", tmp_path / "a.pth", data / "val")
    with pytest.raises(UserError, match=text):
        start(main_finetune, data, "--eval", resume=tmp_path / "a.pth")


def test_stopped_inside_an_epoch_and_resumed_is_undisturbed(trained, data, tmp_path):
    for max_steps in (2, 4):
        start(
            main_finetune, data, RECIPE, LABELS, f"--resume auto --max_steps {max_steps}", output_dir=tmp_path
        )
    other = shutil.copy(data / "labels.csv", tmp_path / "other.csv")  # the same table is the same
    run(main_finetune, RECIPE, LABELS, "--resume auto", data_path=data, labels=other, output_dir=tmp_path)
    for name in ("checkpoint-1.pth", "checkpoint-best.pth"):
        assert same_state(state_of(tmp_path / name), state_of(trained["labels"] / name))
    assert read_log(tmp_path) == read_log(trained["labels"])


def test_another_table_inside_an_epoch_is_an_error(data, tmp_path):
    start(main_finetune, data, RECIPE, LABELS, "--max_steps 2", output_dir=tmp_path)
    text = (data / "labels.csv").read_text().replace("train/red/0.png,red,0,1", "train/red/0.png,red,1,1")
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(UserError, match="saved inside an epoch, and this command differs: labels: others of"):
        run(main_finetune, RECIPE, LABELS, "--resume auto", data_path=data, labels=tmp_path / "b.csv",
            output_dir=tmp_path)  # fmt: skip


SCRIPT = """
import sys
sys.path[:0] = [{repo!r}, {tests!r}]
import models_vit
from transfer_utils import run, vit_test
models_vit.vit_test = vit_test
import main_finetune
run(main_finetune, "--eval --save_predictions", data_path={data!r}, labels={data!r} + "/labels.csv",
    resume={resume!r}, output_dir=sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("task", ["labels", "numbers"])
def test_figures_are_the_same_at_any_number_of_processes(trained, data, tmp_path, task):
    """More images than two groups of 32, so that both processes have some."""
    for path in (data / "val").rglob("?.png"):
        for i in range(3):
            shutil.copy(path, path.with_name(f"{path.stem}{i}.png"))
    rows = (data / "labels.csv").read_text().splitlines()
    more = [row.replace(".png", f"{i}.png") for row in rows if row.startswith("val") for i in range(3)]
    root = tmp_path / "data"
    shutil.copytree(data, root)
    (root / "labels.csv").write_text("\n".join([*rows, *more]) + "\n")
    for path in (data / "val").rglob("??.png"):
        path.unlink()
    script, printed = tmp_path / "run.py", []
    resume = str(trained[task] / "checkpoint-best.pth")
    script.write_text(SCRIPT.format(repo=str(REPO), tests=str(REPO / "tests"), data=str(root), resume=resume))
    for count in (1, 2, 3):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), str(script)]
        words, env = [*words, str(tmp_path / str(count))], {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=240)
        assert done.returncode == 0, done.stderr
        printed.append([line for line in done.stdout.splitlines() if line.startswith("* loss")])
    assert len(printed[0]) == 1 and printed[0] == printed[1] == printed[2]
    tables = [(tmp_path / str(count) / "predictions.csv").read_bytes() for count in (1, 2, 3)]
    assert tables[0] == tables[1] == tables[2] and tables[0].count(b"\n") == 97


@pytest.mark.parametrize("script", ["main_finetune", "main_linprobe"])
def test_thresholds_of_the_best_f1_on_images_held_out_of_train(data, tmp_path, script, capsys):
    from sklearn.metrics import f1_score

    script, words = {"main_finetune": main_finetune, "main_linprobe": main_linprobe}[script], RECIPE
    if script is main_linprobe:
        words += " --cache_features --lr 5"
    start(script, data, words, LABELS, "--thresholds auto", output_dir=tmp_path)
    told = capsys.readouterr().out
    best = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)
    thresholds = best["model_info"]["thresholds"]
    assert best["args"]["thresholds"] == ["auto"] and thresholds != [0.5] * 3
    args = given_args(main_finetune, ["--data_path", str(data), "--labels", str(data / "labels.csv"),
                                      *LABELS.split(), "--thresholds", "auto"])  # fmt: skip
    sets = {split: labelled_images(split, args) for split in ("train", "held", "val")}
    paths = {split: [*part.files.paths] for split, part in sets.items()}
    assert len(paths["train"]) + len(paths["held"]) == 24 and "18 images" in told  # groups of 3: two of eight
    assert not {*paths["train"]} & {*paths["held"]} and all("/train/" in path for path in paths["held"])
    # Predictions of those that were held out, and what other thresholds would give
    call(predict, "--resume", tmp_path / "checkpoint-1.pth", *paths["held"], "--csv", tmp_path / "p.csv")
    with open(tmp_path / "p.csv", encoding="utf-8", newline="") as file:
        found = {row["path"]: row for row in csv.DictReader(file)}
    for k, name in enumerate(("bright", "red", "odd")):
        shares = np.array([float(found[path][f"probability {name}"]) for path in paths["held"]])
        there, labels = (
            np.array([int(found[path][f"prediction {name}"]) for path in paths["held"]]),
            sets["held"].files.labels[:, k],
        )
        assert (there == (shares >= thresholds[k])).all()
        if 0 < labels.sum() < len(labels):
            others = [f1_score(labels, shares >= share) for share in shares]
            assert f1_score(labels, there) == pytest.approx(max(others))
        else:
            assert thresholds[k] == 0.5
    # An evaluation takes them from the checkpoint, and resuming goes on with the same images
    start(
        script,
        data,
        "--eval --save_predictions",
        resume=tmp_path / "checkpoint-1.pth",
        output_dir=tmp_path / "e",
    )
    assert rows_of(tmp_path / "e") == rows_of(tmp_path)
    start(script, data, words, LABELS, "--thresholds auto --max_steps 3", output_dir=tmp_path / "r")
    start(script, data, words, LABELS, "--thresholds auto --resume auto", output_dir=tmp_path / "r")
    again = torch.load(tmp_path / "r/checkpoint-1.pth", weights_only=True)
    assert again["model_info"]["thresholds"] == thresholds and read_log(tmp_path / "r") == read_log(tmp_path)


def test_an_average_of_the_weights_does_not_leave_its_thresholds_to_the_model(data, tmp_path):
    found = []
    for name, flags in ("plain", ""), ("averaged", "--ema 0.9"):
        words = [RECIPE, LABELS, "--thresholds auto --max_steps 3", flags]
        run(main_finetune, *words, data_path=data, labels=data / "labels.csv", output_dir=tmp_path / name)
        (inside,) = (tmp_path / name).glob("checkpoint-1-step*.pth")
        found.append(torch.load(inside, weights_only=True)["model_info"]["thresholds"])
    assert found[0] == found[1] != [0.5] * 3


def test_thresholds_choose_between_the_images(data):
    values = np.array([[0.9, 0.2], [0.6, 0.3], [0.4, 0.3], [0.1, 0.1]])
    assert best_thresholds(np.array([[1, 0], [1, 0], [0, 0], [0, 0]]), values) == [pytest.approx(0.5), 0.5]
    assert best_thresholds(np.array([[1, 1], [1, 1], [1, 1], [0, 1]]), values) == [pytest.approx(0.25), 0.5]
    assert best_thresholds(np.array([[1], [1]]), np.array([[0.0], [1.0]])) == [0.5]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--thresholds auto 0.5", "--thresholds auto: stands alone"),
        (
            "--thresholds auto --eval --resume x.pth",
            "--thresholds auto: stands alone, and thresholds are chosen",
        ),
        ("--thresholds auto --group_column one", "train is one group, so none is held out"),
        (
            "--thresholds 0.5 --label_columns kind",
            "--thresholds: are of several labels, and these are classes",
        ),
    ],
)
def test_thresholds_that_cannot_be(data, tmp_path, words, text):
    table = tmp_path / "labels.csv"
    rows = (data / "labels.csv").read_text().splitlines()
    table.write_text("\n".join(row + (",x" if i else ",one") for i, row in enumerate(rows)) + "\n")
    columns = "" if "label_columns" in words else LABELS
    with pytest.raises(UserError, match=text):
        run(main_finetune, columns, words, data_path=data, labels=table, output_dir=tmp_path / "out")


def test_predictions_of_class_folders_have_every_probability(data, tmp_path):
    run(main_finetune, RECIPE, data_path=data, output_dir=tmp_path)
    rows = rows_of(tmp_path)
    classes = ["bright", "dark", "red"]
    assert list(rows[0]) == ["path", "label", "prediction", "correct", "confidence", "loss", *classes]
    for row in rows:
        shares = [float(row[name]) for name in classes]
        assert sum(shares) == pytest.approx(1, abs=3e-6) and max(shares) == float(row["confidence"])
        assert classes[int(np.argmax(shares))] == row["prediction"]


def test_best_by_another_metric_with_class_folders(data, tmp_path):
    run(main_finetune, RECIPE, "--best kappa --epochs 3", data_path=data, output_dir=tmp_path)
    figures = [record["test_kappa"] for record in read_log(tmp_path)]
    best = torch.load(tmp_path / "checkpoint-best.pth", weights_only=True)
    assert best["epoch"] == figures.index(max(figures))
    assert best["model_info"]["best"] == {"metric": "kappa", "value": max(figures)}


def test_balanced_weights_are_scikit_learns(data):
    rs, words = np.random.RandomState(0), f"--data_path {data} --class_weight balanced".split()
    args = given_args(main_finetune, words)
    train, args.nb_classes = labelled_images("train", args), 3
    train.files.labels = rs.choice(3, len(train), p=[0.7, 0.2, 0.1])
    loss = target_loss(args, train, 0.0)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=train.files.labels)
    assert loss.weight.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    logits, labels = torch.randn(8, 3), torch.arange(8) % 3
    each = F.cross_entropy(logits, labels, reduction="none") * loss.weight[labels]
    torch.testing.assert_close(loss(logits, labels), each.mean())  # of samples, not of their weights


def test_mixed_labels_are_the_shares_of_the_pictures():
    torch.manual_seed(0)
    np.random.seed(0)
    images, labels = torch.rand(6, 1, 4, 4), (torch.rand(6, 5) < 0.5).float()
    mixed, soft = label_mixup("labels", mixup_alpha=0.8, cutmix_alpha=0.0)(images.clone(), labels)
    share = ((mixed - images.flip(0)) / (images - images.flip(0))).mean()
    torch.testing.assert_close(soft, share * labels + (1 - share) * labels.flip(0), rtol=0, atol=1e-5)
    assert 0.01 < share < 0.99
    loss = TargetLoss("labels", smoothing=0.2)(torch.zeros(6, 5), soft)
    torch.testing.assert_close(loss, torch.tensor(np.log(2.0), dtype=torch.float32))


def test_probe_and_neighbours(data, tmp_path):
    for i, task in enumerate(TASKS):
        flags = (
            "--batch_size 8 --epochs 1 --warmup_epochs 0 --lr 3",
            TASKS[task],
            ["", "--cache_features"][i % 2],
        )
        start(main_linprobe, data, *flags, output_dir=tmp_path / task)
        record = read_log(tmp_path / task)[-1]
        assert ("test_r2" in record) == (task == "numbers") != ("test_auroc" in record)
        words = [*KNN, "--data_path", data, "--labels", data / "labels.csv", *TASKS[task].split(), "--k", 3]
        stats = main_knn.main(given_args(main_knn, [*map(str, words)]))
        assert ("knn_acc1" in stats) == (task == "class")
        if task == "labels":
            assert stats["knn_auroc"] > 0.7  # brightness is in any feature
        if task == "numbers":
            assert stats["knn_r2"] is not None


def test_neighbours_against_a_plain_computation():
    generator = torch.Generator().manual_seed(0)
    train, val = torch.randn(30, 4, generator=generator), torch.randn(9, 4, generator=generator)
    numbers = torch.randn(30, 2, generator=generator)
    ((_, found),) = knn_votes(train, numbers, val, [(5, 0.1)], 0)
    for query, values in zip(val, found, strict=True):
        near = F.cosine_similarity(query[None], train).topk(5)
        shares = (near.values / 0.1).softmax(dim=0)
        torch.testing.assert_close(values, shares @ numbers[near.indices])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            f"{NUMBERS} --mixup 0.8",
            "--mixup, --cutmix: a mixed picture has no number of its own; pass --mixup 0",
        ),
        (f"{NUMBERS} --class_weight balanced", "--class_weight balanced: numbers have no classes"),
        (f"{NUMBERS} --best auroc", "--best auroc: figures of numbers are mae, rmse, r2, loss"),
        (f"{LABELS} --best acc1", "--best acc1: figures of labels are accuracy"),
        (f"{LABELS} --nb_classes 7", "--nb_classes 7: there are 3 labels; leave it out"),
        (f"{LABELS} --thresholds 0.1 0.2", "--thresholds: 2 values for 3 labels"),
        (f"{LABELS} --thresholds 1.5", "--thresholds 1.5: must lie between 0 and 1"),
        (f"{LABELS} --folds 1", "--fold 0 --folds 1: take --folds of 2 or more"),
        (f"{LABELS} --folds 3 --fold 3", "--fold 3 --folds 3: take --folds of 2 or more, and a --fold below"),
        ("--label_columns wings", "has no column wings; it has path, kind, bright"),
    ],
)
def test_refused_before_the_first_step(data, tmp_path, flags, text):
    with pytest.raises(UserError, match=text) as error:
        start(main_finetune, data, RECIPE, flags, output_dir=tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.pth"))


def test_an_evaluation_of_a_bad_table_writes_nothing(trained, data, tmp_path, capsys):
    lines = (data / "labels.csv").read_text().splitlines()
    (tmp_path / "bad.csv").write_text("\n".join(lines[:-1]) + "\n")
    words = ["--data_path", data, "--labels", tmp_path / "bad.csv", "--output_dir", tmp_path / "out"]
    resumed = ["--eval", "--resume", trained["labels"] / "checkpoint-best.pth", "--save_predictions"]
    capsys.readouterr()
    for script, more in ((main_finetune, [*resumed, *KNN[4:]]), (main_knn, [*KNN, *LABELS.split()])):
        with pytest.raises(UserError, match=r"1 of .* files have no row"):
            script.main(given_args(script, [*map(str, [*words, *more])]))
        assert not (tmp_path / "out").exists() and not capsys.readouterr().out


def test_flags_of_labels_need_a_table(data):
    for flags in ("--folds 3", "--label_columns a", "--task numbers", "--group_column g", "--thresholds 0.4"):
        with pytest.raises(UserError, match=f"{flags.split()[0]}.*: needs --labels FILE.csv"):
            run(main_finetune, flags, data_path=data)


def test_a_label_that_validation_does_not_have_is_said(data, tmp_path, capsys):
    lines = (data / "labels.csv").read_text().splitlines()
    cells = [line.split(",") for line in lines]
    for row in cells[1:]:
        row[3] = "0" if row[0].startswith("val") else row[3]
    (tmp_path / "a.csv").write_text("\n".join(map(",".join, cells)))
    paths = {"data_path": data, "labels": tmp_path / "a.csv", "output_dir": tmp_path / "out"}
    run(main_finetune, RECIPE, "--label_columns bright red", **paths)
    told = [line for line in capsys.readouterr().err.splitlines() if "not defined" in line]
    assert len(told) == 1 and "for 1 of 2: red (no evaluated image has it)" in told[0]
    assert read_log(tmp_path / "out")[-1]["test_auroc"] is not None
    with pytest.raises(UserError, match=r"not defined for 1 of 1: red .*pass another --best"):
        run(main_finetune, RECIPE, "--label_columns red --task labels", **paths)
    run(main_finetune, RECIPE, "--label_columns red --task labels --best loss", **paths)
    record = read_log(tmp_path / "out")[-1]
    assert record["test_auroc"] is None and record["test_loss"] > 0  # null, and not NaN
