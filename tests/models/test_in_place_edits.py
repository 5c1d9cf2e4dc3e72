"""What a researcher changes reaches training: a line of models_mae.py, a subclass, a module, a hook."""

import json
import logging
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from edit_worker import EDITS, SIZES, by_hand, edited, first_loss, images, run_args, tiny
from golden_utils import REPO, fill
from image_utils import make_folder
from test_main_pretrain import TINY as FLAGS
from timm.models import vision_transformer
from torch import nn

from models_mae import MaskedAutoencoderViT
from util.compute import compile as compiling

CPU = torch.device("cpu")
WAYS = ["eager", "compiled", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def cheap_compiler(request, monkeypatch):
    torch._dynamo.reset()
    trace = logging.getLogger("torch.__trace")  # pytest listens to it, which takes most of the time
    trace.disabled = True
    if "inductor" not in request.node.name:
        monkeypatch.setattr(compiling, "BACKEND", "eager")
    yield
    trace.disabled = False
    torch._dynamo.reset()


def run(processes: int, script, *flags) -> str:
    """What a script prints; it must not fail."""
    command = [sys.executable, script, *flags]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=REPO,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0 and "torch.compile failed" not in done.stdout, done.stdout
    return done.stdout


def loss_of(model: nn.Module, way: str) -> float:
    return first_loss(model, way != "eager", run_args())


def test_the_losses_by_hand_are_six_different_ones():
    losses = [by_hand(edit) for edit in EDITS] + [loss_of(tiny(), "eager")]
    assert len({round(loss, 4) for loss in losses}) == 6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_file_reaches_training(tmp_path, capsys, edit, way):
    assert loss_of(tiny(edited(edit, tmp_path)), way) == pytest.approx(by_hand(edit), rel=1e-12)
    assert "torch.compile failed" not in capsys.readouterr().err


def test_an_edit_of_the_file_reaches_training_in_two_processes(tmp_path):
    run(2, "tests/edit_worker.py", tmp_path / "losses.json")
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert list(losses) == list(EDITS)
    for edit, (eager, compiled) in losses.items():
        mean = (by_hand(edit, rank=0) + by_hand(edit, rank=1)) / 2
        assert eager == pytest.approx(mean, rel=1e-12) and compiled == pytest.approx(mean, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_edit_of_the_file_reaches_the_script(tmp_path, processes):
    """In a copy of the project: what log.txt holds after the only step, compiled and not."""
    for source in REPO.glob("*.py"):
        shutil.copy(source, tmp_path)
    (tmp_path / "util").symlink_to(REPO / "util")
    make_folder(tmp_path / "images", 16)
    model, losses = tmp_path / "models_mae.py", []
    text = model.read_text(encoding="utf-8")
    for name, flag, changed in [
        ("as it is", "--no_compile", text),
        ("eager", "--no_compile", text.replace("return (loss * mask)", "return 3 * (loss * mask)")),
        ("compiled", "--compile", text.replace("return (loss * mask)", "return 3 * (loss * mask)")),
    ]:
        model.write_text(changed, encoding="utf-8")
        flags = [*FLAGS, flag, "--epochs", "1", "--warmup_epochs", "0", "--batch_size", 16 // processes]
        flags += ["--log_dir", "", "--output_dir", tmp_path / name]
        run(processes, tmp_path / "main_pretrain.py", "--data_path", tmp_path / "images", *flags)
        losses.append(json.loads((tmp_path / name / "log.txt").read_text())["train_loss"])
    # Float32 means of some steps' losses; compiled and by two processes, they round each to 1e-6 otherwise
    assert losses == pytest.approx([losses[0], 3 * losses[0], 3 * losses[0]], rel=1e-5)


class OtherMasking(MaskedAutoencoderViT):
    """As forks write it, without our `noise`."""

    def random_masking(self, x, mask_ratio):
        noise = torch.rand(len(x), x.shape[1])
        return super().random_masking(x, mask_ratio, -noise)


class OtherEncoder(MaskedAutoencoderViT):
    def forward_encoder(self, x, mask_ratio):
        noise = torch.rand(len(x), 16)
        return super().forward_encoder(x, mask_ratio, -noise)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [OtherMasking, OtherEncoder])
def test_methods_of_subclasses_with_the_references_arguments(kind, way):
    model = kind(**SIZES, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    model = fill(model, seed=1, std=0.1, skip="pos_embed")
    assert loss_of(model, way) == pytest.approx(by_hand("random_masking"), rel=1e-12)


def test_a_method_of_one_model_and_weights_drawn_by_a_subclass():
    class Constant(MaskedAutoencoderViT):
        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.weight, 0.5)

    assert Constant(**SIZES).decoder_pred.weight.eq(0.5).all()
    model = tiny()
    loss = model.forward_loss
    model.forward_loss = lambda *inputs: 3 * loss(*inputs)
    assert loss_of(model, "compiled") == pytest.approx(3 * loss_of(tiny(), "eager"), rel=1e-12)


class Average(nn.Module):
    """An attention of a fork's: every token gets the mean of all."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, x, attn_mask=None, **how):
        return self.proj(x).mean(dim=1, keepdim=True).expand_as(x)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("way", WAYS[:2])
def test_replaced_and_hooked_modules_are_trained_and_called(way, distributed):
    """In blocks that are compiled one by one as well, which is what several processes do."""
    model, calls, plain = tiny(), [], loss_of(tiny(), "eager")
    model.decoder_blocks[0].attn = Average()
    weight = model.decoder_blocks[0].attn.proj.weight
    before = weight.clone()
    for module in (model.patch_embed, model.blocks[0], model.blocks[0].attn, model.decoder_blocks[0].attn):
        module.register_forward_hook(lambda *_: calls.append(1))
    if way == "compiled":
        compiling.compile_model(model, "forward", run_args(distributed=distributed), CPU)
    loss = loss_of(model, "eager")
    assert abs(loss - plain) > 1e-3 and len(calls) >= 4
    assert (weight - before).abs().max() > 1e-6


def doubled(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *inputs, **named: 2 * forward(*inputs, **named)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_forward_that_was_assigned_is_kept(distributed):
    args, imgs, noise, losses = run_args(distributed=distributed), images(), torch.rand(4, 16), []
    for compiled in (False, True):
        model = tiny()
        doubled(model.blocks[0].attn)
        doubled(model.decoder_blocks[0])
        if compiled:
            assert compiling.compile_model(model, "forward", args, CPU)
        losses.append(model(imgs, noise=noise)[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    assert not torch.isclose(losses[0], tiny()(imgs, noise=noise)[0], rtol=1e-6)
    model = tiny()
    model.forward = own = lambda imgs, mask_ratio: model.forward_encoder(imgs, mask_ratio)
    assert compiling.compile_model(model, "forward", args, CPU) == distributed and model.forward is own


def test_tokens_reach_the_decoder_in_image_order_on_timm_s_block():
    model, seen = tiny(), []
    model.decoder_blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    _, _, mask = model(images())
    tokens = (seen[0] - model.decoder_pos_embed)[:, 1:]
    assert torch.isclose(tokens, model.mask_token, rtol=0, atol=1e-12).all(dim=-1).equal(mask.bool())
    block, tokens = model.decoder_blocks[0], seen[0].detach()
    assert torch.equal(vision_transformer.Block.forward(block, tokens), block(tokens))
