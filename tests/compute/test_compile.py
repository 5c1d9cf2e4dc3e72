"""The compiled training step: one graph, the same numbers, and eager mode where compiling fails."""

import argparse
import copy
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from golden_utils import REPO, TINY, TINY_MAE, fill
from image_utils import make_folder
from test_engine_pretrain import FixedNoise, check_end, make_args, make_run
from test_main_pretrain import TINY as FLAGS
from test_main_pretrain import assert_same, run, weights
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import models_mae
import models_vit
from engine_pretrain import train_one_epoch
from util.compute import compile as compiling
from util.compute.precision import NativeScalerWithGradNormCount, autocast
from util.errors import UserError
from util.processes.parallel import whole_tensor, wrap_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    trace = logging.getLogger("torch.__trace")  # pytest listens to it, which takes most of the time
    trace.disabled = True
    yield
    trace.disabled = False
    torch._dynamo.reset()


@pytest.fixture
def counter(monkeypatch):
    """A backend that counts the graphs it gets and runs them as they are."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    return counter


def flags(**changes):
    defaults = dict(compile=True, compile_mode="default", accum_iter=1, distributed=False)
    return argparse.Namespace(**{**defaults, **changes})


def tiny_vit(**kwargs):
    return models_vit.VisionTransformer(global_pool=True, num_classes=7, **{**TINY, "depth": 1, **kwargs})


def tiny_mae():
    return models_mae.mae_vit({**TINY_MAE, "depth": 1, "decoder_depth": 1}, norm_pix_loss=True)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_graph_breaks(checkpointing):
    mae, vit, imgs = tiny_mae(), tiny_vit(), torch.randn(2, 3, 32, 32)
    mae.grad_checkpointing = vit.grad_checkpointing = checkpointing
    for found in [torch._dynamo.explain(mae)(imgs), torch._dynamo.explain(vit)(imgs)]:
        assert found.graph_count == 1 and found.graph_break_count == 0, found


def test_one_graph_for_training_and_none_for_evaluation(counter):
    model, imgs = tiny_mae(), torch.randn(4, 3, 32, 32)
    names = list(model.state_dict())
    assert compiling.compile_model(model, "forward", flags(), CPU)
    for _ in range(3):
        model(imgs, mask_ratio=0.75)[0].backward()
    assert counter.frame_count == 1
    model.eval()
    with torch.no_grad():
        for n in (1, 2, 3):
            model(imgs[:n])
    model(imgs[:3])
    model.train()
    with torch.no_grad():
        model(imgs)
    assert counter.frame_count == 1 and list(model.state_dict()) == names


def run_golden_trajectory():
    """Two epochs compiled, as the recorded run; returns the model, whose weights are those at its end."""
    data, model, optimizer, loader = make_run()
    compiling.compile_model(model, "forward", flags(), CPU)
    wrapped = FixedNoise(model, data["noise"])
    for epoch in range(2):
        train_one_epoch(
            wrapped, loader, optimizer, "cpu", epoch, NativeScalerWithGradNormCount(), None, make_args()
        )
    check_end(data, model)
    return model


def test_golden_trajectory_compiled(counter):
    run_golden_trajectory()
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [False, True])
def test_compiled_draws_what_eager_draws_from_the_first_step_on(counter, distributed):
    """Drop path and masks; with several processes block by block, each with its own rate."""
    torch.manual_seed(0)
    vit = tiny_vit(depth=2, drop_path_rate=0.5)
    mae, imgs = tiny_mae(), torch.randn(4, 3, 32, 32)
    for model in (mae, vit):
        results = []
        plain = copy.deepcopy(model)
        compiling.compile_model(model, "forward", flags(distributed=distributed), CPU)
        for either in (plain, model):
            torch.manual_seed(1)
            outs = [either(imgs) if model is vit else either(imgs)[0] for _ in range(2)]
            sum(out.sum() for out in outs).backward()
            results.append([*outs, *(p.grad for p in either.parameters() if p.grad is not None)])
        # Float32 rounds by 6e-8. Fused kernels add up rows of 24 to 96 terms in another order, in two
        # blocks there and back: some 10 roundings of 1e-6 at the most
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert counter.frame_count == (4 if distributed else 2)  # encoder's and decoder's blocks; rates 0, 0.5


def first_losses(model, imgs, steps=2) -> list[float]:
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        loss = model(imgs).square().sum()
        loss.backward()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("amp", "checkpointing"), [(False, True), (True, False)])
def test_d11_blocks_that_drop_paths_at_many_rates_are_one_graph(counter, capsys, amp, checkpointing):
    """Beside the first block's, which drops none; the draws and losses are those of the plain blocks."""
    torch.manual_seed(0)
    plain, imgs = tiny_vit(depth=4, drop_path_rate=0.6), torch.randn(8, 3, 32, 32)
    model = copy.deepcopy(plain)
    plain.grad_checkpointing = model.grad_checkpointing = checkpointing
    compiling.compile_model(model, "forward", flags(distributed=True), CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        found, expected = first_losses(model, imgs), first_losses(plain, imgs)
    assert found == expected and found[0] != found[1] and counter.frame_count == 2
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-7)
    # Another rate is no other graph, and one that is set to 0 drops nothing
    for either in (plain, model):
        for block in either.blocks[1:]:
            block.drop_path1.drop_prob, block.drop_path2.drop_prob = 0.9, 0.0
    assert first_losses(model, imgs) == first_losses(plain, imgs) or amp
    assert counter.frame_count == 2 + 2 * amp  # in float32 now
    assert all(block.drop_path1.factors is None for block in model.blocks[1:])
    assert "torch.compile failed" not in capsys.readouterr().err


def test_d11_where_the_order_of_draws_could_change_they_stay_in_the_graph(counter):
    """Dropout between them, a block of another kind, a drop path of a fork's."""
    imgs = torch.randn(8, 3, 32, 32)

    class Parallel(models_vit.Block):
        def forward(self, x):
            normed = self.norm1(x)
            return x + self.drop_path2(self.mlp(normed)) + self.drop_path1(self.attn(normed))

    class Everything(torch.nn.Module):
        def forward(self, x):
            return x * torch.rand(len(x), 1, 1)

    def change(model, kind):
        for block in model.blocks:
            if kind == "parallel":
                block.__class__ = Parallel
            elif kind == "own":
                block.drop_path1 = Everything()

    for kind in ("dropout", "parallel", "own"):
        torch.manual_seed(0)
        plain = tiny_vit(depth=2, drop_path_rate=0.5, proj_drop_rate=0.1 * (kind == "dropout"))
        change(plain, kind)
        model = copy.deepcopy(plain)
        compiling.compile_model(model, "forward", flags(distributed=True), CPU)
        assert first_losses(model, imgs) == first_losses(plain, imgs), kind


def test_d11_where_compiling_fails_the_draws_are_those_of_the_plain_blocks(monkeypatch, capsys):
    def fail(graph, inputs):
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(compiling, "BACKEND", fail)
    plain, imgs = tiny_vit(depth=3, drop_path_rate=0.5), torch.randn(8, 3, 32, 32)
    model = copy.deepcopy(plain)
    model.grad_checkpointing = True
    compiling.compile_model(model, "forward", flags(distributed=True), CPU)
    assert first_losses(model, imgs) == first_losses(plain, imgs)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert "torch.compile failed" in capsys.readouterr().err


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fsdp", [False, True])
def test_compiled_blocks_that_are_computed_again(group, counter, capsys, fsdp):
    """Gradient checkpointing in compiled blocks, as with several processes, which torch would cut up."""
    if fsdp and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch shards on GPUs only")
    plain, imgs, noise = tiny_mae(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    model = copy.deepcopy(plain)
    model.grad_checkpointing = True
    compiling.compile_model(model, "forward", flags(distributed=True), CPU)
    several = wrap_model(model, CPU, fsdp)
    for _ in range(2):
        for either in (plain, several):
            either(imgs, 0.75, noise)[0].backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        # Torch's bounds for float32 (1.3e-6 of the value, 1e-5): sums of 34 tokens' terms in another order
        # are off by sqrt(34) x 6e-8, and gradients here are below 1
        torch.testing.assert_close(one.grad if one.grad is None else whole_tensor(one.grad), other.grad)
    assert counter.frame_count and "torch.compile failed" not in capsys.readouterr().err


class Halves(TorchDispatchMode):
    """The 16-bit copies of matrices that the blocks of a model have made and that are still there."""

    def __init__(self, model):
        super().__init__()
        blocks = [*model.blocks, *model.decoder_blocks]
        self.shapes = {
            tuple(m.weight.shape) for b in blocks for m in b.modules() if hasattr(m, "in_features")
        }
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copy = func.overloadpacket == torch.ops.aten._to_copy and out.dtype == torch.bfloat16
        if copy and tuple(out.shape) in self.shapes:
            self.made.append(StorageWeakRef(out.untyped_storage()))
        return out

    def alive(self) -> int:
        return sum(not copy.expired() for copy in self.made)


@pytest.mark.parametrize(("fsdp", "checkpointing"), [(True, False), (True, True), (False, True)])
def test_d9_sixteen_bit_copies_of_the_weights(group, fsdp, checkpointing):
    """autograd keeps those of all blocks up to the backward pass; none are left where blocks are computed
    again, so that --fsdp then holds the weights of a block or two.
    """
    if fsdp and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch shards on GPUs only")
    bare = models_mae.mae_vit({**TINY_MAE, "depth": 3, "decoder_depth": 2}, norm_pix_loss=True)
    bare.grad_checkpointing = checkpointing
    model = wrap_model(bare, CPU, fsdp)
    with Halves(bare) as copies:
        with autocast(CPU, torch.bfloat16):
            loss = model(torch.randn(2, 3, 32, 32))[0]
            inside = copies.alive()
        after = copies.alive()
        loss.backward()
    assert len(copies.made) == (2 if checkpointing else 1) * 5 * 4  # qkv, proj, fc1, fc2 of each block
    assert inside == after == (0 if checkpointing else 5 * 4) and copies.alive() == 0
    assert all(p.grad is not None for p in bare.parameters() if p.requires_grad)


@pytest.mark.slow
def test_copies_and_pickles_belong_to_themselves(counter):
    model, imgs, noise = tiny_mae(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    compiling.compile_model(model, "forward", flags(), CPU)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.nn.init.zeros_(other.decoder_pred.weight)
        assert not torch.equal(other(imgs, 0.75, noise)[0], model(imgs, 0.75, noise)[0])


@pytest.mark.parametrize("half", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_where_compiling_fails_there_is_one_warning_and_eager_mode(monkeypatch, capsys, half):
    def fail(*args):
        raise RuntimeError("no such compiler\nand a long story")

    def keep(graph, inputs):
        return graph

    backend = aot_autograd(fw_compiler=fail if half == "forward" else keep, bw_compiler=fail)
    monkeypatch.setattr(compiling, "BACKEND", backend)
    model, imgs = tiny_mae(), torch.randn(2, 3, 32, 32)
    plain, noise = copy.deepcopy(model), torch.rand(2, 16)
    compiling.compile_model(model, "forward", flags(), CPU)
    for _ in range(2):
        results = model(imgs, 0.75, noise)
        results[0].backward()
        torch.testing.assert_close(results, plain(imgs, 0.75, noise), rtol=0, atol=0)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "warning: torch.compile failed" in err and "no such compiler" in err


@pytest.mark.parametrize("broken", [True, False])
def test_blocks_of_which_some_are_frozen(monkeypatch, capsys, broken):
    """The backward pass is tried before it is needed where the first blocks have none of their own."""

    def keep(graph, inputs):
        return make_boxed_func(graph)

    def fail(*args):
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(
        compiling, "BACKEND", aot_autograd(fw_compiler=keep, bw_compiler=fail if broken else keep)
    )
    plain, imgs = tiny_vit(depth=3), torch.randn(2, 3, 32, 32)
    plain.requires_grad_(False)
    plain.blocks[1].requires_grad_(True)  # the third has a backward pass for its input's sake
    model = copy.deepcopy(plain)
    compiling.compile_model(model, "forward", flags(distributed=True), CPU)
    for either in (plain, model):
        either(imgs).sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        # Torch's bounds for float32, as above
        torch.testing.assert_close(one.grad, other.grad)
    assert capsys.readouterr().err.count("torch.compile failed") == broken


def test_an_error_of_the_model_stays_that_error(counter, capsys):
    model = tiny_mae()
    compiling.compile_model(model, "forward", flags(), CPU)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model.decoder_embed = torch.nn.Linear(7, 16)
        model(torch.randn(2, 3, 32, 32))
    assert "torch.compile" not in capsys.readouterr().err


def test_where_it_is_on_and_what_is_refused():
    model = tiny_vit()
    assert not compiling.compile_model(model, "forward", flags(compile=None), CPU)
    assert not compiling.compile_model(model, "forward", flags(compile=False), torch.device("cuda"))
    assert "forward" not in vars(model)
    assert compiling.compile_model(model, "forward", flags(compile=None), torch.device("cuda"))
    for change in (dict(accum_iter=2), dict(distributed=True)):
        with pytest.raises(UserError, match="--compile_mode reduce-overhead: only in a single process"):
            compiling.compile_model(model, "forward", flags(compile_mode="reduce-overhead", **change), CPU)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    make_folder(tmp_path_factory.getbasetemp() / "compile" / "train", 13, classes=2)
    return tmp_path_factory.getbasetemp() / "compile"


@pytest.mark.slow
def test_golden_trajectory_with_the_real_compiler():
    model = run_golden_trajectory()
    assert not model.forward.__func__.failed


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_compiled_and_resumed_is_undisturbed_bit_for_bit(images, tmp_path, capsys, workers):
    """Also the same with any number of workers: both are compared with the run without."""
    more = ("--compile", "--accum_iter", "2", "--num_workers")
    run(images, tmp_path / "whole", *more, "0")
    run(images, tmp_path / "parts", *more, workers, "--max_steps", "3")
    run(images, tmp_path / "parts", *more, workers, "--resume", "auto")
    captured = capsys.readouterr()
    assert captured.out.count(", compiled\n") == 3 and "torch.compile failed" not in captured.err
    assert_same(weights(tmp_path / "whole/checkpoint-1.pth"), weights(tmp_path / "parts/checkpoint-1.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--amp_dtype", "bf16", "--grad_checkpointing"], ["no compiler"]])
def test_the_script_from_the_shell(images, tmp_path, more):
    command = [sys.executable, "main_pretrain.py", "--data_path", images, "--output_dir", tmp_path / "out"]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    broken = more == ["no compiler"]
    if broken:
        env["CXX"], more = "/bin/false", []
    command += ["--log_dir", "", "--compile", *FLAGS, *more]
    done = subprocess.run(list(map(str, command)), cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "torch.compile failed" in line]
    assert len(warnings) == broken, done.stderr
    assert (tmp_path / "out" / "checkpoint-1.pth").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_cuda_agrees_with_eager(mode):
    device, imgs = torch.device("cuda", 0), torch.randn(4, 3, 32, 32, device="cuda")
    plain = fill(models_mae.mae_vit(TINY_MAE, norm_pix_loss=True), seed=7, std=0.2, skip="pos_embed")
    plain = plain.float().to(device)
    model = copy.deepcopy(plain)
    compiling.compile_model(model, "forward", flags(compile_mode=mode), device)
    results = []
    for either in (plain, model):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(either.parameters(), lr=1e-3, fused=True)
        results.append([])
        for _ in range(6):
            loss, pred, mask = either(imgs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            results[-1] += loss.detach(), pred.detach(), mask  # read at the end, as the meters do
    assert not model.forward.__func__.failed
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_on_cuda_drops_the_paths_that_eager_drops(checkpointing, distributed, capsys):
    """Anew in each step, and again in the backward pass."""
    device, imgs = torch.device("cuda", 0), torch.randn(8, 3, 32, 32, device="cuda")
    plain = tiny_vit(depth=3, drop_path_rate=0.5).to(device)
    model = copy.deepcopy(plain)
    model.grad_checkpointing = checkpointing
    compiling.compile_model(model, "forward", flags(distributed=distributed), device)
    for step in range(4):
        for either in (plain, model):
            either.zero_grad()
            torch.manual_seed(step)
            either(imgs).square().sum().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    assert "torch.compile failed" not in capsys.readouterr().err
