"""No step waits for the GPU: the engines run with torch's alarm for synchronisations switched on, and, where
there is no GPU, on tensors that say they are on one, have no values and can be neither read nor copied in a
way that waits.
"""

import argparse
import contextlib
import gc

import pytest
import torch
from golden_utils import TINY, TINY_MAE, skip_without_fake_gpu
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import engine_finetune
import engine_pretrain
import models_mae
import models_vit
from main_linprobe import put_on_probe
from models_cross import CrossDecoderViT
from util.compute import prefetch
from util.compute.compile import compile_model
from util.compute.precision import NativeScalerWithGradNormCount
from util.compute.prefetch import side_stream
from util.data.loader import Batch
from util.data.transforms import _device_stats
from util.evaluate import features
from util.evaluate.exact import predict_samples
from util.lars import LARS
from util.run.guard import DELAY, RunGuard
from util.run.meters import SmoothedValue

STEPS, BATCH = 12, 4
RECIPES = ["pretrain", "pretrain_cross", "finetune", "linprobe"]


def make_batch() -> list[torch.Tensor]:
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    return Batch(images, torch.arange(BATCH) % 7, torch.arange(BATCH))


class AlarmedLoader:
    """Pinned batches; from step 4 to the last but two (a log line reads the meters) a sync is an error."""

    batch_size = BATCH

    def __len__(self):
        return STEPS

    def __iter__(self):
        try:
            for i in range(STEPS):
                pinned = [t.pin_memory() for t in make_batch()]
                if i == 4:
                    torch.cuda.set_sync_debug_mode("error")
                if i == STEPS - 1:
                    torch.cuda.set_sync_debug_mode("default")
                yield pinned
        finally:
            torch.cuda.set_sync_debug_mode("default")


def make_model(recipe: str) -> torch.nn.Module:
    if recipe.startswith("pretrain"):
        kind = dict(make=CrossDecoderViT, predict_ratio=0.5) if recipe == "pretrain_cross" else {}
        return models_mae.mae_vit(TINY_MAE, norm_pix_loss=True, **kind)
    probe = recipe == "linprobe"
    model = models_vit.VisionTransformer(num_classes=7, drop_path_rate=0.0 if probe else 0.2, **TINY)
    if probe:
        put_on_probe(model)
    return model


def train(recipe: str, model, loader, amp_dtype: str, compiled: bool = False) -> dict[str, float]:
    """An epoch on the GPU with all that the scripts add to the loop, of which nothing may happen."""
    device, changed = torch.device("cuda", 0), []
    args = argparse.Namespace(
        accum_iter=2, mask_ratio=0.75, lr=1e-3, min_lr=0.0, warmup_epochs=0, epochs=2, seed=0, clip_grad=1.0,
        amp_dtype=amp_dtype, print_freq=1000, save_minutes=60, max_steps=0, skip_nonfinite=1,
        compile=compiled, compile_mode="default", distributed=False,
    )  # fmt: skip
    scaler = NativeScalerWithGradNormCount(enabled=amp_dtype == "fp16")
    assert scaler.state_dict() or amp_dtype != "fp16"  # it scales
    guard = RunGuard(args, lambda *_: changed.append("saved"), None, STEPS)
    compile_model(model, "forward_features" if recipe == "linprobe" else "forward", args, device)
    if recipe == "linprobe":
        optimizer = LARS(model.head.parameters(), lr=0.1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    if recipe.startswith("pretrain"):
        stats = engine_pretrain.train_one_epoch(
            model, loader, optimizer, device, 0, scaler, None, args, guard
        )
    else:
        mixup, criterion = None, torch.nn.CrossEntropyLoss()
        if recipe == "finetune":
            mixup, criterion = Mixup(0.8, 1.0, num_classes=7), SoftTargetCrossEntropy()
        stats = engine_finetune.train_one_epoch(
            model, criterion, loader, optimizer, device, 0, scaler, 1.0, mixup, None, args, guard
        )
    assert not changed
    return stats


@pytest.mark.gpu
@pytest.mark.parametrize("amp_dtype", ["bf16", "fp16", "none"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_step_waits_for_the_device(recipe, compiled, amp_dtype):
    stats = train(recipe, make_model(recipe).cuda(), AlarmedLoader(), amp_dtype, compiled)
    assert stats["loss"] > 0 and stats["grad_norm"] > 0


@pytest.mark.gpu
def test_the_alarm_rings():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoStream:
    """A CUDA stream or event without CUDA."""

    def __init__(self, *args):
        pass

    def record_event(self):
        return self

    def record(self):
        pass

    def synchronize(self):
        pass

    def wait_event(self, event):
        assert isinstance(event, NoStream)


@pytest.fixture
def no_values(monkeypatch):
    """Tensors without values, also on "cuda", as torch's compiler uses them: an operation on tensors of
    several devices is an error, and so is reading one. autograd's engine needs a real GPU, so a backward
    pass only sets gradients.
    """

    def backward(loss, **kwargs):
        assert loss.requires_grad and loss.is_cuda
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.ones_like(p) if p.grad is None else p.grad + 1

    def read_oldest(guard):
        assert len(guard.pending) > DELAY
        guard.pending.popleft()

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **kwargs: tensor)
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *args: 0)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: True)
    # What is read, is read in the log lines and two steps late
    monkeypatch.setattr(SmoothedValue, "flush", lambda meter: meter.pending.clear())
    monkeypatch.setattr(SmoothedValue, "__str__", lambda meter: "")
    monkeypatch.setattr("util.run.guard.start_copy", lambda tensors: (tensors, None))
    monkeypatch.setattr(RunGuard, "_read_oldest", read_oldest)
    monkeypatch.setattr(RunGuard, "read_all", lambda guard: guard.pending.clear())

    def make(recipe: str) -> torch.nn.Module:
        nonlocal model
        with torch.device("cuda"):
            model = make_model(recipe)
        return model

    model = None
    cached = (side_stream, _device_stats)
    for function in cached:
        function.cache_clear()
    skip_without_fake_gpu()
    with FakeTensorMode(allow_non_fake_inputs=True), NoWaiting():
        yield make
        gc.collect()  # loops that an error has ended write their last line now
    NoWaiting.armed = False
    for function in cached:
        function.cache_clear()


class Waited(Exception):
    pass


class NoWaiting(TorchDispatchMode):
    """While `armed`, copies between devices are an error: all that go to the CPU, and those that block."""

    armed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if func.overloadpacket == torch.ops.aten.copy_ else args[0]
            ways = args[2:3] or [kwargs.get("non_blocking", False)]
            if (
                self.armed
                and source.device.type != out.device.type
                and (out.device.type == "cpu" or not ways[0])
            ):
                raise Waited(f"a copy from {source.device} to {out.device}")
        return out


class Loader(AlarmedLoader):
    """As for the alarm: what is made once, in the first steps, may wait."""

    def __iter__(self):
        for i in range(STEPS):
            NoWaiting.armed = 4 <= i < STEPS - 1
            yield make_batch()


@pytest.mark.parametrize("amp_dtype", ["bf16", "fp16", "none"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings("error:.*Disabling autocast")
def test_no_step_reads_from_the_device(no_values, recipe, amp_dtype):
    model = no_values(recipe)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    train(recipe, model, Loader(), amp_dtype)


FAULTS = {
    "reads": (lambda loss: loss.item(), DataDependentOutputException),
    "decides": (lambda loss: 1 if loss > 0 else 2, DataDependentOutputException),
    "mixes devices": (lambda loss: loss + torch.ones(2), RuntimeError),
    "copies to the host": (lambda loss: loss.cpu(), Waited),
    "copies from the host": (lambda loss: loss + torch.tensor(1.0).to(loss.device), Waited),
    "copies into": (lambda loss: torch.empty(2, device=loss.device).copy_(torch.ones(2)), Waited),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_it_finds(no_values, monkeypatch, fault):
    act, error = FAULTS[fault]
    watch = RunGuard.watch

    def act_and_watch(guard, batch, loss, *place):
        act(loss)
        watch(guard, batch, loss, *place)

    monkeypatch.setattr(RunGuard, "watch", act_and_watch)
    with pytest.raises(error):
        train("pretrain", no_values("pretrain"), Loader(), "none")


def test_flags_are_read_late(no_values, monkeypatch):
    monkeypatch.setattr("util.run.guard.DELAY", 0)
    with pytest.raises(AssertionError):
        train("pretrain", no_values("pretrain"), Loader(), "none")


class EvalLoader:
    """Batches of two groups and a half, float or uint8; between the first and the last nothing may wait."""

    def __init__(self, arm):
        self.arm = arm

    def __len__(self):
        return 6

    def __iter__(self):
        for i in range(6):
            self.arm(1 <= i < 5)
            images = torch.randint(0, 256, (80, 3, 32, 32), dtype=torch.uint8)
            batch = Batch(images, torch.arange(80) % 7, torch.arange(80 * i, 80 * i + 80))
            yield Batch(*(t.pin_memory() for t in batch)) if torch.cuda.is_available() else batch


def test_d8_no_group_of_an_evaluation_waits(no_values, monkeypatch):
    """Labels and pixels come with the prefetcher, features are read when later groups are at work."""
    args, started, read = argparse.Namespace(amp_dtype="bf16"), [], []

    def start_copy(tensors):
        assert all(t.is_cuda for t in tensors)
        started.append(len(tensors[0]))
        return [torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in tensors], NoStream()

    def finish_copy(host, copied):
        read.append(len(started) - len(read))  # results that are under way
        return host

    model = no_values("finetune")
    monkeypatch.setattr(prefetch, "start_copy", start_copy)
    monkeypatch.setattr(prefetch, "finish_copy", finish_copy)
    monkeypatch.setattr(features, "_gather", lambda blocks, labels, indices, everywhere: (blocks, labels))
    monkeypatch.setattr("util.evaluate.exact._gather", lambda columns: columns)
    loader = EvalLoader(lambda on: setattr(NoWaiting, "armed", on))
    columns = predict_samples(loader, model, "cuda", args)
    assert [len(column) for column in columns] == [480] * 5 and model.training
    blocks, labels = features.extract_features(model.eval().forward_features, loader, "cuda", args)
    assert started == [32] * 15 and read == [3] * 13 + [2, 1]
    assert len(blocks) == 15 and len(labels) == 480


@pytest.mark.gpu
@pytest.mark.parametrize("amp_dtype", ["bf16", "none"])
def test_d8_no_group_of_an_evaluation_waits_on_a_gpu(amp_dtype):
    def arm(on):
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    model, args = make_model("finetune").cuda(), argparse.Namespace(amp_dtype=amp_dtype)
    try:
        for _ in range(2):  # the first pass makes streams, events and page-locked blocks
            stats = predict_samples(EvalLoader(arm if _ else bool), model, "cuda", args)
            found, labels = features.extract_features(
                model.eval().forward_features, EvalLoader(arm if _ else bool), "cuda", args
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(stats.labels) == len(found) == 480 and labels.tolist() == [i % 80 % 7 for i in range(480)]
    assert found.isfinite().all() and not found.is_pinned()
