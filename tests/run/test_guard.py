"""What the guard sees and keeps: losses and gradients that are not finite, lost loader workers."""

import os
import re
import signal
import weakref
from argparse import Namespace

import pytest
import torch
from image_utils import make_folder

import engine_finetune
import main_finetune
import main_pretrain
from util.cli.parser import ArgumentParser, parse_args
from util.compute.precision import NativeScalerWithGradNormCount
from util.data.dataset import ImageDataset
from util.data.loader import Batch, build_loader, go_on_without_workers
from util.errors import TrainingError
from util.run import steps
from util.run.guard import RunGuard
from util.run.meters import MetricLogger
from util.weights.files import read_file

SIZES = "--input_size 32 --patch_size 8 --batch_size 4 --warmup_epochs 0 --device cpu --log_dir="
FINETUNE = f"--model vit_tiny_patch16 {SIZES}"
PRETRAIN = (
    f"--model mae_vit_tiny_patch16 --decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2 {SIZES}"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    make_folder(root / "train", 26, classes=2)
    make_folder(root / "val", 10, classes=2)
    return root


def run(script, flags, images, output, *more):
    parser = ArgumentParser(parents=[script.get_args_parser()])
    command = [*flags.split(), "--data_path", str(images), "--output_dir", str(output), *more]
    script.main(parse_args(parser, command))


def assert_same_runs(first, second):
    name = sorted(path.name for path in first.glob("checkpoint-?.pth"))[-1]
    a, b = (read_file(folder / name) for folder in (first, second))
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    # Each run has an id of its own
    logs = [re.sub(r', "run": "\w+"', "", (folder / "log.txt").read_text()) for folder in (first, second)]
    assert logs[0] == logs[1] and '"run"' not in logs[0]


def look_often(monkeypatch) -> None:
    """Whether workers live is asked when no batch has come for so long; 5 s is torch's own time."""
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator._try_get_data, "__defaults__", (0.3,))


def kill_worker(monkeypatch, epoch: int, split: str = "train") -> None:
    """The second worker kills itself, as the system would, when it reads a split's first image in `epoch`."""
    read = ImageDataset._samples

    def read_or_die(dataset, now, index, repeats):
        worker = torch.utils.data.get_worker_info()
        if worker and worker.id == 1 and now == epoch and f"/{split}/" in dataset.path(index):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(dataset, now, index, repeats)

    look_often(monkeypatch)
    monkeypatch.setattr(ImageDataset, "_samples", read_or_die)


@pytest.mark.parametrize(
    ("script", "split", "flags"),
    [
        (main_pretrain, "train", f"{PRETRAIN} --epochs 2 --accum_iter 2 --vis_freq 0"),
        pytest.param(
            main_pretrain, "val", f"{PRETRAIN} --epochs 2 --vis_freq 1 --save_freq 9", marks=pytest.mark.slow
        ),
        pytest.param(main_finetune, "train", f"{FINETUNE} --epochs 2", marks=pytest.mark.slow),
    ],
)
@pytest.mark.needs("forks")
def test_c5_a_killed_worker_costs_nothing(script, split, flags, images, tmp_path, monkeypatch):
    run(script, flags, images, tmp_path / "whole", "--num_workers", "0")
    said = (
        r"^loader worker \d+ was killed \(SIGKILL\), as when memory runs out; take fewer --num_workers or a "
    )
    said += "smaller --batch_size; saved; --resume auto goes on$"
    with monkeypatch.context() as patch:
        kill_worker(patch, 1 if split == "train" else 0, split)
        with pytest.raises(TrainingError, match=said):
            run(script, flags, images, tmp_path / "parts", "--num_workers", "2")
    assert list((tmp_path / "parts").glob("checkpoint-1-step*.pth"))
    run(script, flags, images, tmp_path / "parts", "--num_workers", "0", "--resume", "auto")
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def training_set(images):
    return main_pretrain.build_pretrain_dataset(Namespace(data_path=str(images), input_size=32))


@pytest.mark.needs("forks")
def test_c5_where_nothing_can_be_saved_it_is_one_line(images, monkeypatch):
    next(iter(torch.utils.data.DataLoader(range(4), num_workers=1)))  # puts torch's handler in place
    kill_worker(monkeypatch, 0)
    with pytest.raises(TrainingError, match=r"^loader worker \d+ was killed [^\n]+ --batch_size$"):
        list(build_loader(training_set(images), range(26), 4, num_workers=2))
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


@pytest.mark.needs("forks")
def test_c5_a_worker_that_dies_between_epochs_and_one_without_memory(images, monkeypatch):
    look_often(monkeypatch)
    dataset, main_process, read = training_set(images), os.getpid(), ImageDataset._samples

    def has_no_room(*args):
        if os.getpid() != main_process:
            raise MemoryError("Unable to allocate 9.31 GiB for an array")
        return read(*args)

    loader = build_loader(dataset, range(26), 4, num_workers=2)
    whole = list(loader)
    go_on_without_workers(True)
    try:
        loader._iterator._workers[1].kill()
        loader._iterator._workers[1].join()
        others = [list(loader)]
        monkeypatch.setattr(ImageDataset, "_samples", has_no_room)
        others.append(list(build_loader(dataset, range(26), 4, num_workers=1)))
    finally:
        go_on_without_workers(False)
    for batches in others:
        assert len(batches) == len(whole)
        for one, other in zip(batches, whole, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Model(torch.nn.Module):
    """BatchNorm and a layer; with `spoilt`, the gradient of a batch of zeros is NaN, and its loss is not."""

    def __init__(self, spoilt: bool = False):
        super().__init__()
        self.norm, self.head, self.spoilt = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3), spoilt
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        self.seen += x.sum(dim=0)
        bent = (x * self.head.weight[:1]).square().sum().sqrt() if self.spoilt else 0.0
        return self.head(self.norm(x)) + bent


def features(count: int = 6) -> list:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(8, 4, generator=generator), torch.arange(8) % 3] for _ in range(count)]


def train(model, batches, guard=None, **settings):
    args = Namespace(
        accum_iter=2, lr=0.1, min_lr=0.0, warmup_epochs=0, epochs=1, amp_dtype="none", **settings
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = guard or RunGuard(args, steps=len(batches))
    criterion, scaler = torch.nn.CrossEntropyLoss(), NativeScalerWithGradNormCount(enabled=False)
    engine_finetune.train_one_epoch(
        model, criterion, batches, optimizer, "cpu", 0, scaler, None, None, None, args, guard
    )
    return guard


@pytest.mark.parametrize("bad", [2, 3])
def test_d2_a_skipped_step_leaves_no_trace_in_statistics(bad):
    """They are those of a run without the window of micro-steps 2 and 3."""
    torch.manual_seed(0)
    model, clean = Model(), Model()
    batches = features()
    batches[bad][0] = batches[bad][0] * float("nan")
    assert train(model, batches, skip_nonfinite=1).bad_steps == 1
    train(clean, features()[:2] + features()[4:])
    for name, buffer in clean.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name]), name
    assert model.norm.num_batches_tracked == 4
    assert all(p.isfinite().all() for p in model.parameters())


def test_d3_a_gradient_that_is_not_finite_is_counted_and_named(tmp_path, capsys):
    torch.manual_seed(0)
    batches = features()
    batches[3][0] = torch.zeros(8, 4)
    said = (
        r"epoch 0, step 3: the gradient is not finite, though the loss is \d.*; no process made this step; "
    )
    with pytest.raises(TrainingError, match=said + r"the batch is in .*nonfinite-3.pth; nothing was saved"):
        train(Model(spoilt=True), batches, output_dir=str(tmp_path))
    content = torch.load(tmp_path / "nonfinite-3.pth", weights_only=True)
    assert content["images"].shape == (8, 4) and content["window"].keys() == {2, 3}
    assert train(Model(spoilt=True), batches, skip_nonfinite=1).bad_steps == 1
    assert "skipped (1 in a row, --skip_nonfinite 1)" in capsys.readouterr().err


def test_d3_with_a_scaler_such_gradients_are_its_affair():
    batches = features()
    batches[3][0] = torch.zeros(8, 4)
    guard = RunGuard(Namespace(accum_iter=2), steps=len(batches))
    guard.scaled = True  # as with fp16, which a CPU does not have
    assert train(Model(spoilt=True), batches, guard).bad_steps == 0


@pytest.mark.parametrize("dataset", [None, "files"])
def test_d6_no_more_images_are_held_with_more_accumulation(dataset, images):
    if dataset is not None:
        dataset = training_set(images)
    guard = RunGuard(Namespace(accum_iter=32), dataset=dataset, steps=32)
    held = []
    for step in range(32):
        batch = Batch(torch.zeros(4, 3, 32, 32), torch.zeros(4), torch.arange(4))
        held.append(weakref.ref(batch[0]))
        guard.watch(batch, torch.ones(()), 0, step)
        del batch
    assert sum(reference() is not None for reference in held) == (0 if dataset else 1)
    guard.after_update(0, 32, torch.ones(()), MetricLogger())
    assert all(reference() is None for reference in held)


@pytest.mark.parametrize("flags", ["--accum_iter 3", "--repeated_aug 2", "--loader reference"])
def test_d6_the_images_of_a_bad_loss_are_those_of_its_batch(flags, images, tmp_path, monkeypatch):
    seen, normalize = [], steps.normalize_batch

    def spoil(batch, *args):
        seen.append(batch.clone())
        return normalize(batch, *args) * (float("nan") if len(seen) == 5 else 1)

    monkeypatch.setattr(steps, "normalize_batch", spoil)
    said = "epoch 0, step 4: the loss is nan; no process made this step; images: "
    with pytest.raises(TrainingError, match=said):
        run(main_pretrain, f"{PRETRAIN} --num_workers 0 --vis_freq 0 {flags}", images, tmp_path)
    content = torch.load(tmp_path / "nonfinite-4.pth", weights_only=True)
    assert torch.equal(content["images"], seen[4]) and len(content["files"]) == 4
    assert content["indices"].shape == (4,) and content["rng"]["step"] == 4
