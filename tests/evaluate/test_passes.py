"""What a pass over a data set costs: weights cast once, and features of which one process holds all."""

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import pytest
import torch
import torch.nn.functional as F
from golden_utils import TINY
from torch.utils._python_dispatch import TorchDispatchMode

import models_vit
from util.compute.prefetch import on_host
from util.data.loader import Batch
from util.data.sampler import GROUP, EvalSampler
from util.evaluate import features
from util.evaluate.exact import predict_samples
from util.evaluate.features import extract_features
from util.evaluate.knn import knn_accuracy
from util.processes.collectives import gather, get_rank, get_world_size
from util.processes.group import init_distributed_mode, shut_down

CPU, ARGS = torch.device("cpu"), Namespace(amp_dtype="bf16")


class Casts(TorchDispatchMode):
    """Counts how often each shape of two dimensions becomes bf16."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket == torch.ops.aten._to_copy and out.dtype == torch.bfloat16 and out.dim() == 2:
            self.count[tuple(out.shape)] = self.count.get(tuple(out.shape), 0) + 1
        return out


def make_model(frozen: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = models_vit.VisionTransformer(True, num_classes=7, **{**TINY, "depth": 1})
    model.requires_grad_(not frozen)
    model.head.requires_grad_(True)
    return model


def make_batches(count=100, size=24):
    torch.manual_seed(1)
    images, labels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 7
    parts = (images, labels, torch.arange(count))
    return [Batch(*(part[i : i + size] for part in parts)) for i in range(0, count, size)]


@pytest.mark.parametrize("frozen", [False, True])
def test_d8_a_pass_casts_each_weight_once_and_gives_the_same_bits(frozen):
    """Four groups, each of which would cast them; also weights that do not learn, which autocast forgets."""
    model, batches = make_model(frozen), make_batches()
    learns = [p.requires_grad for p in model.parameters()]
    with Casts() as casts:
        found = predict_samples(batches, model, CPU, ARGS)
    linear = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert {shape: casts.count[shape] for shape in set(linear)} == {s: linear.count(s) for s in set(linear)}
    with Casts() as casts:
        got, labels = extract_features(model.eval().forward_features, batches, CPU, ARGS)
    assert all(casts.count[shape] == 1 for shape in set(linear) - {tuple(model.head.weight.shape)})
    assert [p.requires_grad for p in model.parameters()] == learns

    images = torch.cat([images for images, *_ in batches]).float().div(255)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = images.sub(mean.view(3, 1, 1)).div(std.view(3, 1, 1))
    groups = []
    for group in images.split(GROUP):  # as one would write it down
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            pooled = model.forward_features(group.clone())
            groups.append((pooled.float(), model.head(pooled).float()))
    pooled, logits = (torch.cat(parts) for parts in zip(*groups, strict=True))
    assert torch.equal(got, pooled) and labels.tolist() == [i % 7 for i in range(100)]
    losses = F.cross_entropy(logits, labels, reduction="none")
    assert torch.equal(torch.from_numpy(found.losses), losses.double())


def test_d8_between_the_passes_of_an_evaluation_nothing_is_cast():
    """A loader's own arithmetic stays in float32, as labels and losses do."""
    seen = []

    def batches():
        for batch in make_batches():
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            yield batch

    predict_samples(batches(), make_model(False), CPU, ARGS)
    assert set(seen) == {torch.float32} and len(seen) == 5


def test_d8_results_on_a_cpu_come_at_once():
    made = []

    def results():
        for i in range(3):
            made.append(i)
            yield torch.tensor(i), torch.tensor(-i)

    for i, (one, two) in enumerate(on_host(results())):
        assert made[-1] == i == one == -two
    assert i == 2


@pytest.mark.gpu
def test_d8_results_on_a_gpu_come_late_and_whole():
    work, made = torch.ones(2048, 2048, device="cuda"), []

    def results():
        nonlocal work
        for i in range(20):
            for _ in range(10):
                work = work @ work * 1e-6
            made.append(i)
            yield torch.full((1 << 20,), float(i), device="cuda") + 0 * work.sum(), torch.tensor(i)

    for i, (values, number) in enumerate(on_host(results())):
        assert len(made) == min(i + 3, 20) and values.is_pinned() and number == i
        assert values.amin() == values.amax() == i
    assert i == 19


def check_features_and_neighbours() -> dict:
    """With the processes there are: what each of them gets; the figures of k-NN."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(230, 3, 4, 4, generator=generator)
    labels = (images.mean(dim=(1, 2, 3)) * 40).long().abs() % 5

    def loader(start, stop):
        order = list(EvalSampler(stop - start, get_world_size(), get_rank()))
        parts = [torch.tensor(order[i : i + 7]) for i in range(0, len(order), 7)]
        return [Batch(images[start + part], labels[start + part], part) for part in parts]

    def feature(images):
        return images.flatten(1)

    everywhere = extract_features(feature, loader(0, 200), "cpu")
    first = extract_features(feature, loader(0, 200), "cpu", everywhere=False)
    assert (first is None) == (get_rank() > 0)
    for found in filter(None, (everywhere, first)):
        assert torch.equal(found[0], images[:200].flatten(1)) and torch.equal(found[1], labels[:200])
    few = extract_features(feature, loader(0, 20), "cpu")  # of two processes one has none
    assert torch.equal(few[0], images[:20].flatten(1))
    stats = gather(knn_accuracy(feature, loader(0, 200), loader(200, 230), "cpu", 5))
    assert stats == stats[:1] * get_world_size()
    return stats[0]


@pytest.mark.slow
def test_d14_one_process_holds_all_features_of_knn(tmp_path, monkeypatch):
    """The others their own only, and all get the figures of a single process (quickly: `test_fsdp.py`)."""
    monkeypatch.setattr(features, "ROWS", 40)  # several rounds, the last of them shorter
    command = [sys.executable, __file__, str(tmp_path / "stats.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    alone = check_features_and_neighbours()
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "".join(outputs)
    assert json.loads((tmp_path / "stats.json").read_text()) == alone and 0 < alone["acc1"] < 100


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_distributed_mode(Namespace(device="cpu"))
    features.ROWS = 40
    found = check_features_and_neighbours()
    if get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    shut_down()
