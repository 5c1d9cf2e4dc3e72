"""Exact evaluation: every sample once, the same digits for any batch size and number of processes."""

import csv
import json
import os
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from golden_utils import REPO, TINY_MAE

import engine_pretrain
import models_mae
import models_vit
from util.data.loader import collate
from util.data.sampler import GROUP, EvalSampler
from util.evaluate.exact import Predictions, in_groups, predict_samples, summarize
from util.evaluate.features import FeatureLoader, extract_features
from util.evaluate.report import confusion_matrix, draw_confusion, per_class_table, write_predictions

COUNT = 83  # two whole groups and a shorter one

SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
sys.path[:0] = [{repo!r}, {tests!r}, {tests!r} + "/evaluate"]
from argparse import Namespace
from test_evaluation import held_out_loss, make_loader, make_model
from engine_finetune import evaluate
from util.processes.collectives import get_rank, get_world_size
from util.processes.group import init_distributed_mode, shut_down
args = Namespace(device="cpu")
init_distributed_mode(args)
stats = {{}}
for batch_size in (1, 7, 64):
    share = batch_size, get_world_size(), get_rank()
    stats[batch_size] = evaluate(make_loader(*share), make_model(), "cpu") | held_out_loss(*share)
if get_rank() == 0:
    digits = {{str(k): {{n: float(v).hex() for n, v in s.items()}} for k, s in stats.items()}}
    json.dump(digits, open({out!r}, "w"))
shut_down()
"""


class Images(torch.utils.data.Dataset):
    """Random images: item i is the same every time."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 32, 32, generator=generator), index % 10, index


def make_loader(batch_size, world_size=1, rank=0):
    sampler = EvalSampler(COUNT, world_size, rank)
    return torch.utils.data.DataLoader(Images(), batch_size, sampler=sampler, collate_fn=collate)


def make_model():
    torch.manual_seed(0)
    model = models_vit.VisionTransformer(
        True, img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=10
    )
    torch.nn.init.normal_(model.head.weight)
    return model


def held_out_loss(batch_size, world_size=1, rank=0):
    """Of pre-training, which in the usual way, by batches, differs in the 8th digit."""
    torch.manual_seed(0)
    model = models_mae.mae_vit(TINY_MAE)
    args = Namespace(mask_ratio=0.75, amp_dtype="none", mean=None, std=None)
    loader = make_loader(batch_size, world_size, rank)
    return {"held_out": engine_pretrain.evaluate(loader, model, torch.device("cpu"), args)}


def hexed(stats):
    return {name: float(value).hex() for name, value in stats.items()}


def test_batch_size_does_not_change_a_bit():
    model = make_model()
    results = [
        hexed(summarize(predict_samples(make_loader(size), model, "cpu"))) for size in (1, 7, 32, 64, 1000)
    ]
    assert all(result == results[0] for result in results)


def test_a11_batch_size_does_not_change_a_bit_of_the_held_out_loss():
    results = [hexed(held_out_loss(size)) for size in (1, 5, 8, 32, 1000)]
    assert all(result == results[0] for result in results)


def test_the_usual_way_would_depend_on_the_batch_size():
    """Guards the test above: without groups these sizes do give other bits, with blocked matrix products."""
    model = make_model().eval()
    images = torch.stack([Images()[i][0] for i in range(COUNT)])
    with torch.no_grad():
        single = torch.cat([model(image[None]) for image in images])
        together = model(images)
    torch.testing.assert_close(single, together, rtol=1e-3, atol=1e-3)
    if torch.equal(single, together):
        pytest.skip("this machine's matrix products do not depend on the batch size")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a11_processes_do_not_change_a_bit(tmp_path, processes):
    out = tmp_path / "stats.json"
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(repo=str(REPO), tests=str(REPO / "tests"), out=str(out)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    single = hexed(summarize(predict_samples(make_loader(7), make_model(), "cpu")) | held_out_loss(7))
    found = json.loads(out.read_text())
    assert found == {"1": single, "7": single, "64": single}
    assert done.stdout.count("* Acc@1") == 3  # the first process only


def test_sampler_deals_every_index_once():
    for length in (0, 1, GROUP, GROUP + 1, 5 * GROUP - 3):
        for world_size in (1, 2, 3, 8):
            shares = [list(EvalSampler(length, world_size, rank)) for rank in range(world_size)]
            assert sorted(index for share in shares for index in share) == list(range(length))


def test_groups_of_batches_without_indices():
    batches = [
        (torch.arange(n) + 10 * i, torch.zeros(n, dtype=torch.int64)) for i, n in enumerate((3, 40, 1))
    ]
    groups = list(in_groups(batches))
    assert [len(g[1]) for g in groups] == [GROUP, 44 - GROUP]
    assert torch.cat([g[2] for g in groups]).tolist() == list(range(44))
    assert torch.cat([g[0] for g in groups]).tolist() == torch.cat([b[0] for b in batches]).tolist()


def test_summary_against_torch():
    loader = make_loader(16)
    model = make_model().eval()
    images, labels, _ = (torch.cat(parts) for parts in zip(*loader, strict=True))
    with torch.no_grad():
        logits = model(images)
    stats = summarize(predict_samples(loader, model.train(), "cpu"))
    # 83 losses in one float32 mean and in groups: products of 192 terms, each off by sqrt(192) x 6e-8 =
    # 8e-7, in two blocks; shares of 83 images are far coarser than 1e-4
    assert stats["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert stats["acc1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=1e-4)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1)
    assert stats["acc5"] == pytest.approx(100 * top5.float().mean().item(), abs=1e-4)
    assert model.training


def test_fewer_than_five_classes():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    loader = [(torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 0, 1, 0, 1]))]
    assert summarize(predict_samples(loader, model, "cpu"))["acc5"] == 100.0


def example():
    labels, best = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    return Predictions(
        np.arange(5), labels, np.linspace(0.1, 0.5, 5), np.stack([best, 1 - best], 1), np.full(5, 0.7)
    )


def test_confusion_and_table():
    matrix = confusion_matrix(example(), 3)
    assert matrix.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    lines = per_class_table(matrix, ["cat", "dog", "nothing"]).splitlines()
    assert lines[1].split() == ["cat", "2", "1", "50.00", "dog", "(1)"]
    assert lines[2].split() == ["dog", "3", "2", "66.67", "cat", "(1)"]
    assert lines[3].split() == ["nothing", "0", "0", "-", "-"]


class WithBadFiles(Images):
    """As a data set with --bad_images skip: samples 3 and 40 were replaced by their neighbours."""

    def __init__(self):
        self.bad = torch.zeros(COUNT, dtype=torch.uint8)
        self.files = Namespace(paths=[f"{i}.png" for i in range(COUNT)])

    def __getitem__(self, index):
        if index in (3, 40):
            self.bad[index] = 1
            return (*super().__getitem__(index + 1)[:2], index)
        return super().__getitem__(index)


def test_samples_that_cannot_be_read_are_not_counted(capsys):
    loader = torch.utils.data.DataLoader(WithBadFiles(), 7, sampler=EvalSampler(COUNT), collate_fn=collate)
    found, whole = (predict_samples(x, make_model(), "cpu") for x in (loader, make_loader(7)))
    keep = ~np.isin(whole.indices, (3, 40))
    assert np.array_equal(found.indices, whole.indices[keep]) and len(found.labels) == COUNT - 2
    assert np.array_equal(found.losses, whole.losses[keep])
    assert "2 images left out of the figures, not decodable: 3.png, 40.png" in capsys.readouterr().err


def test_features_of_samples_that_cannot_be_read():
    def loader():
        return torch.utils.data.DataLoader(WithBadFiles(), 7, sampler=EvalSampler(COUNT), collate_fn=collate)

    model = make_model().eval()
    whole, labels = extract_features(model.forward_features, make_loader(7), "cpu")
    keep = ~torch.isin(torch.arange(COUNT), torch.tensor([3, 40]))
    features, found = extract_features(model.forward_features, loader(), "cpu")
    assert torch.equal(features, whole[keep]) and torch.equal(found, labels[keep])
    features, found = extract_features(model.forward_features, images := loader(), "cpu", keep_all=True)
    assert torch.equal(features[keep], whole[keep]) and len(found) == COUNT
    # An evaluation on features in memory leaves them out too
    cached = FeatureLoader(features[None], found, EvalSampler(COUNT), 7, dataset=images.dataset)
    assert len(predict_samples(cached, model.head, "cpu").labels) == COUNT - 2


def test_predictions_beyond_the_classes_of_the_data():
    matrix = confusion_matrix(
        Predictions(np.arange(3), np.array([0, 0, 1]), np.zeros(3), np.array([[0], [700], [2]]), np.ones(3)),
        3,
    )
    assert matrix.tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_predictions_csv(tmp_path):
    path = tmp_path / "predictions.csv"
    write_predictions(path, example(), [f"folder, x/{i}.jpg" for i in range(5)], ["cat", "dög"])
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [row["path"] for row in rows] == [f"folder, x/{i}.jpg" for i in range(5)]
    assert [row["label"] for row in rows] == ["cat", "cat", "dög", "dög", "dög"]
    assert [row["prediction"] for row in rows] == ["cat", "dög", "dög", "dög", "cat"]
    assert [row["correct"] for row in rows] == list("10110")
    assert rows[0]["loss"] == "0.100000" and rows[0]["confidence"] == "0.700000"


@pytest.mark.parametrize("classes", [2, 25, 100])
def test_confusion_picture(classes):
    matrix = np.eye(classes, dtype=np.int64) * 9
    matrix[0, 1] = 9
    picture = draw_confusion(matrix, [f"class number {i}" for i in range(classes)])
    pixels = np.asarray(picture)
    cell = 48 if classes <= 12 else 26 if classes <= 30 else 14
    corner = picture.height - 12 - cell * classes
    centre = [corner + i * cell + cell // 2 for i in range(classes)]
    near = 3 - cell // 2  # inside a cell, off its number
    dark = pixels[centre[1] + near, centre[1] + near].sum()
    half = pixels[centre[0] + near, centre[0] + near].sum()
    empty = pixels[centre[1] + near, centre[0] + near].sum()
    assert dark < half < empty == 3 * 255
