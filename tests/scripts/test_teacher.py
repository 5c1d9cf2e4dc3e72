"""`--teacher`: the loss against a plain one, what is saved and what is not, resuming, and wrong inputs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from golden_utils import REPO, TINY, TINY_MAE, fill
from test_engine_pretrain import make_args
from test_main_pretrain import assert_same, run, weights
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import layer_norm, linear

import models_mae
import models_vit
from engine_pretrain import train_one_epoch
from util.compute import compile as compiling
from util.compute.precision import NativeScalerWithGradNormCount
from util.errors import UserError
from util.recipes.teacher import make_student
from util.rng import seed_step
from util.run.steps import EpochSteps
from util.weights.build import build
from util.weights.describe import describe
from util.weights.encoder import load_into
from util.weights.files import read_file

CPU = torch.device("cpu")
LARGER = dict(TINY, embed_dim=36, depth=4, num_heads=6)
SMALL = ["--model", "mae_vit_nano", "--save_freq", "1"]

pytestmark = pytest.mark.usefixtures("nano")


def write_teacher(path, seed=5, **sizes):
    """A larger encoder in a file, as a released one; its weights differ visibly from block to block."""
    sizes = {**LARGER, **sizes}
    model = fill(models_vit.VisionTransformer(num_classes=0, **sizes), seed=seed, std=0.2).float()
    settings = {"input_size": sizes["img_size"], "num_heads": sizes["num_heads"]}
    torch.save({"model": model.state_dict(), "args": settings}, path)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


def flags(path, **changes):
    defaults = dict(teacher=str(path), teacher_loss=None, teacher_weight=None, teacher_block=None, fsdp=False)
    return make_args(**{**defaults, "no_verify": False, "mean": None, "std": None, "model": "m", **changes})


def plain_block(block, x):
    """(attention maps, tokens) of a pre-norm transformer block, one head after the other."""
    attn, width = block.attn, x.shape[2]
    size, maps, mixed = width // attn.num_heads, [], []
    whole = linear(layer_norm(x, (width,), block.norm1.weight, block.norm1.bias, block.norm1.eps),
                   attn.qkv.weight, attn.qkv.bias)  # fmt: skip
    for head in range(attn.num_heads):
        q, k, v = (whole[..., part * width + head * size :][..., :size] for part in range(3))
        scores = torch.einsum("nid,njd->nij", q, k) / size**0.5
        maps.append(scores.exp() / scores.exp().sum(-1, keepdim=True))
        mixed.append(maps[-1] @ v)
    x = x + linear(torch.cat(mixed, dim=-1), attn.proj.weight, attn.proj.bias)
    return torch.stack(maps, dim=1), x + block.mlp(block.norm2(x))


def plain_encoder(model, images, places):
    """[(attention maps, tokens) of each block] of the patches at `places` (N, K), and the class token."""
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
    tokens = linear(patches, model.patch_embed.proj.weight.flatten(1), model.patch_embed.proj.bias)
    tokens = tokens + model.pos_embed[:, 1:]
    visible = torch.stack([row[place] for row, place in zip(tokens, places, strict=True)])
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x := visible), -1, -1), x], dim=1)
    found = []
    for block in model.blocks:
        maps, x = plain_block(block, x)
        found.append((maps, x))
    return found


@pytest.mark.parametrize(
    ("kind", "block", "theirs"), [("attention", None, 4), ("attention", 1, 2), ("features", 2, 4)]
)
def test_loss_and_step_are_those_of_a_plain_implementation(teacher, kind, block, theirs):
    """One step of the real loop, in float64, against autograd on spelled-out formulas."""
    student = fill(models_mae.mae_vit(TINY_MAE, norm_pix_loss=True), seed=10, std=0.1, skip="pos_embed")
    args = flags(teacher, teacher_loss=kind, teacher_block=block, teacher_weight=0.7, seed=3, accum_iter=1,
                 warmup_epochs=0, epochs=10**9, lr=0.1)  # fmt: skip
    make_student(student, args, CPU)
    frozen = student.double().lesson.teacher.double()
    assert (args.teacher_block, len(frozen.blocks)) == (block or 2, theirs) and not frozen.training
    plain = models_mae.mae_vit(TINY_MAE, norm_pix_loss=True).double()
    plain.load_state_dict({k: v for k, v in student.state_dict().items() if "teacher" not in k})
    names = dict(plain.named_parameters())
    if kind == "features":
        names |= {name: p.detach().clone().requires_grad_() for name, p in student.named_parameters()
                  if name.startswith("teacher_map.")}  # fmt: skip

    batch = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seed_step(3, 0, 0, 0)
    noise = torch.rand(2, 16)
    places = noise.argsort(dim=1)[:, :4]
    (maps, tokens), (target_maps, target) = (
        plain_encoder(model, batch, places)[number - 1]
        for model, number in ((plain, args.teacher_block), (frozen, theirs))
    )
    if kind == "attention":
        pairs = torch.stack(
            [(target_maps[:, 2 * i] + target_maps[:, 2 * i + 1]) / 2 for i in range(3)], dim=1
        )
        distance = ((maps - pairs) ** 2).sum() / (2 * 3 * 5)
    else:
        mapped = tokens @ names["teacher_map.weight"].T + names["teacher_map.bias"]
        own, target = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
                       for x in (mapped, target))  # fmt: skip
        distance = ((own - target) ** 2).sum() / (2 * 5 * 36)
    loss = plain(batch, 0.75, noise)[0]
    learned = {name: p for name, p in names.items() if p.requires_grad}
    total = loss + 0.7 * distance
    gradients = dict(
        zip(learned, torch.autograd.grad(total, learned.values(), allow_unused=True), strict=True)
    )

    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scaler = NativeScalerWithGradNormCount()
    stats = train_one_epoch(student, [(batch, None)], optimizer, CPU, 0, scaler, None, args)
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-10)
    assert stats["teacher_loss"] == pytest.approx(distance.item(), rel=1e-10) and distance > 1e-3
    assert learned.keys() == {name for name, p in student.named_parameters() if p.requires_grad}
    for name, p in student.named_parameters():
        step = (before[name] - p.detach()) / 0.1
        wanted = gradients[name] if gradients.get(name) is not None else torch.zeros_like(p)
        torch.testing.assert_close(step, wanted, rtol=1e-10, atol=1e-10, msg=name)


def test_compiled_it_is_one_graph_with_the_same_numbers(teacher, monkeypatch):
    """Also with blocks that are computed again in the backward pass."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    torch._dynamo.reset()
    found = []
    for compiles in (False, True):
        student = models_mae.mae_vit({**TINY_MAE, "depth": 1, "decoder_depth": 1})
        make_student(fill(student, seed=10, std=0.1, skip="pos_embed").float(), flags(teacher), CPU)
        if compiles:
            student.grad_checkpointing = True
            settings = flags(teacher, compile=True, compile_mode="default", distributed=False)
            assert compiling.compile_model(student, "forward", settings, CPU)
        torch.manual_seed(0)
        losses = student(torch.ones(2, 3, 32, 32).cumsum(dim=2), mask_ratio=0.75)
        sum(losses).backward()
        found.append([*losses, student.blocks[0].attn.qkv.weight.grad])
    torch._dynamo.reset()
    assert counter.frame_count == 1
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


def test_half_precision_compares_in_float32(teacher):
    student = fill(models_mae.mae_vit(TINY_MAE), seed=10, std=0.1, skip="pos_embed").float()
    make_student(student, flags(teacher), CPU)
    batch = torch.ones(2, 3, 32, 32).cumsum(dim=2) / 10
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            found.append(student(batch)[1])
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0)  # 8 bits of mantissa, some 10 operations


@pytest.mark.parametrize("kind", ["attention", "features"])
def test_resumed_inside_an_epoch_is_uninterrupted_bit_for_bit(images, teacher, tmp_path, kind, capsys):
    own = [*SMALL, "--teacher_loss", kind, "--vis_freq", "1"]
    whole = run(images, tmp_path / "whole", *own, "--teacher", str(teacher))
    assert f"4 blocks; {kind} of its block 4, in block 2 of the model, weight 1" in capsys.readouterr().out
    assert all(line["train_loss"] > 0 and line["train_teacher_loss"] > 0 for line in whole)
    run(images, tmp_path / "parts", *own, "--teacher", str(teacher), "--max_steps", "4")
    other = write_teacher(tmp_path / "other.pth", seed=6)
    with pytest.raises(UserError, match=r"inside an epoch, .* differs: teacher \w{8} -> \w{8}; keep to it"):
        run(images, tmp_path / "parts", *own, "--teacher", str(other), "--resume", "auto")
    moved = tmp_path / "moved.pth"
    moved.write_bytes(teacher.read_bytes())
    assert run(images, tmp_path / "parts", *own, "--teacher", str(moved), "--resume", "auto") == whole
    last = "checkpoint-1.pth"
    assert_same(weights(tmp_path / "whole" / last), weights(tmp_path / "parts" / last))
    state, args = weights(tmp_path / "whole" / last), read_file(tmp_path / "whole" / last)["args"]
    assert args["teacher"] == str(teacher) and len(args["teacher_digest"]) == 8
    map_keys = {"teacher_map.weight", "teacher_map.bias"} if kind == "features" else set()
    assert {key for key in state if "teacher" in key} == map_keys


def test_what_others_take_of_a_student_is_without_map_and_teacher(images, teacher, tmp_path):
    own = [*SMALL, "--epochs", "1", "--vis_freq", "1"]
    log = run(images, tmp_path, *own, "--teacher", str(teacher), "--teacher_loss", "features")
    path = tmp_path / "checkpoint-0.pth"
    classifier = models_vit.VisionTransformer(num_classes=3, **TINY)
    report = load_into(classifier, str(path))
    assert "teacher_map.weight" in report.unexpected and set(report.missing) == {"head.weight", "head.bias"}
    assert torch.equal(classifier.blocks[1].mlp.fc1.weight, weights(path)["blocks.1.mlp.fc1.weight"])
    model = build(describe(read_file(path), path, make_args(), "full"))
    assert "teacher_map" not in dict(model.named_children())
    assert log[0]["val_loss"] != pytest.approx(log[0]["train_loss"])
    before = path.read_bytes()
    with pytest.raises(
        UserError, match=r"holds --teacher .*checkpoint-0\.pth, and this run would overwrite it"
    ):
        run(images, tmp_path, *SMALL, "--teacher", str(path))
    assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"2 unexpected keys \(teacher_map"):
        run(images, tmp_path, *SMALL, "--epochs", "2", "--resume", str(path))


def test_what_a_new_run_freezes_is_not_the_map(images, teacher, tmp_path):
    """--init_freeze trains what --init does not hold: a new decoder, and the map to the teacher."""
    encoder = write_teacher(tmp_path / "encoder.pth", **TINY)
    own = [*SMALL, "--epochs", "1", "--init", str(encoder), "--init_freeze", "1", "--teacher", str(teacher)]
    ends = []
    for lr in ("0.01", "0.02"):
        run(images, tmp_path / lr, *own, "--teacher_loss", "features", "--lr", lr)
        ends.append(weights(tmp_path / lr / "checkpoint-0.pth"))
    for name, value in weights(encoder).items():
        assert torch.equal(value, ends[0][name]) and torch.equal(value, ends[1][name])
    for name in ("teacher_map.weight", "teacher_map.bias", "decoder_embed.weight"):
        assert not torch.equal(ends[0][name], ends[1][name])


def test_without_a_teacher_nothing_knows_of_one(images, tmp_path):
    log = run(images, tmp_path, *SMALL, "--epochs", "1")
    assert "train_teacher_loss" not in log[0]
    assert "teacher_digest" not in read_file(tmp_path / "checkpoint-0.pth")["args"]
    loss = torch.ones(())
    assert EpochSteps([], make_args(), CPU).losses((loss, None, None)) == (loss, None)


def test_a_teacher_of_another_size_or_format_is_fitted(images, tmp_path, capsys):
    """Its position table is resized; a checkpoint of pre-training is taken without its decoder."""
    path = write_teacher(tmp_path / "large.pth", img_size=64)
    run(images, tmp_path / "a", *SMALL, "--epochs", "1", "--teacher", str(path))
    assert (
        "trained at 64x64 pixels, now it is 32x32: its position table is resized" in capsys.readouterr().err
    )
    run(
        images, tmp_path / "b", *SMALL, "--epochs", "1", "--teacher", str(tmp_path / "a" / "checkpoint-0.pth")
    )
    out = capsys.readouterr()
    assert (
        "(full MAE (encoder and decoder)), width 24, 2 blocks" in out.out and "position table" not in out.err
    )


@pytest.mark.parametrize(
    ("sizes", "own", "text"),
    [
        ({}, ["--teacher_block", "3"], "--teacher_block 3: the model has 2 blocks"),
        ({}, ["--teacher_weight", "0"], "--teacher_weight 0.0: must be above 0"),
        ({"num_heads": 4}, [], "3 heads of the model cannot share 4 of the teacher evenly; pass --"),
        ({"patch_size": 16}, [], "has --patch_size 16, the model 8; both see the same patches"),
        ({"in_chans": 1}, [], "has --in_chans 1, the model 3; both see the same patches"),
        (None, ["--teacher", "none.pth"], "--teacher none.pth: no such file"),
        (None, ["--teacher_loss", "features"], "need a --teacher FILE"),
        (None, ["--teacher_block", "1"], "need a --teacher FILE"),
    ],
)  # fmt: skip
def test_wrong_flags(images, tmp_path, sizes, own, text):
    if sizes is not None:
        own = ["--teacher", str(write_teacher(tmp_path / "teacher.pth", **sizes)), *own]
    with pytest.raises(UserError) as error:
        run(images, tmp_path / "out", *SMALL, *own)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.pth"))


@pytest.mark.parametrize(
    "content", [{"x": torch.ones(2)}, {}, {"model": {"blocks.0.norm1.weight": torch.ones(2)}}]
)
def test_a_file_without_an_encoder_is_named(images, tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"^--teacher .*odd\.pth: has no usable encoder keys"):
        run(images, tmp_path / "out", *SMALL, "--teacher", str(tmp_path / "odd.pth"))


def test_models_and_modes_that_cannot_learn_of_one(teacher):
    class OwnEncoder(models_mae.MaskedAutoencoderViT):
        def forward_encoder(self, x, mask_ratio):
            return super().forward_encoder(x, mask_ratio)

    with pytest.raises(UserError, match="m has a forward_encoder of its own"):
        make_student(OwnEncoder(**TINY_MAE), flags(teacher), CPU)
    with pytest.raises(UserError, match="--fsdp: not with --teacher"):
        make_student(models_mae.mae_vit(TINY_MAE), flags(teacher, fsdp=True), CPU)
    student = models_mae.mae_vit(TINY_MAE)
    student.blocks[1].attn = torch.nn.Linear(24, 24)
    with pytest.raises(
        UserError, match="needs --teacher_loss features, as a block has an attention of its own"
    ):
        make_student(student, flags(teacher), CPU)


@pytest.mark.slow
def test_two_processes_learn_as_one(images, teacher, tmp_path):
    """Features with their map: DistributedDataParallel would stop at a parameter without gradient."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29617",
    ]
    own = ["--data_path", str(images), "--output_dir", str(tmp_path), "--log_dir", "", "--device", "cpu"]
    own += ["--model", "mae_vit_tiny_patch16", "--input_size", "32", "--patch_size", "8", "--epochs", "2"]
    own += ["--warmup_epochs", "0", "--batch_size", "2", "--num_workers", "0", "--vis_freq", "0"]
    own += ["--teacher", str(teacher), "--teacher_loss", "features"]
    result = subprocess.run([*command, "main_pretrain.py", *own], cwd=REPO, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert len(lines) == 2 and all(line["train_teacher_loss"] > 0 for line in lines)
