"""`--size_schedule`: each phase is the plain model of its size, images know their epoch."""

import shutil
from argparse import Namespace

import pytest
import torch
from golden_utils import TINY_MAE, fill
from test_main_pretrain import assert_same, run, weights
from torch._dynamo.testing import CompileCounterWithBackend

import models_mae
from util.compute import compile as compiling
from util.data.dataset import build_pretrain_dataset
from util.data.loader import build_loader
from util.data.sampler import EpochSampler
from util.errors import UserError
from util.recipes.sizes import SizeSchedule, read_phases


def flags(root=None, *schedule, **changes):
    values = dict(data_path=root and str(root), input_size=32, in_chans=3, seed=0, epochs=4, batch_size=4)
    values |= dict(mask_ratio=0.75, mean=(0.5,) * 3, std=(0.2,) * 3, size_schedule=schedule)
    return Namespace(**{**values, **changes})


def make_model(size=32):
    """Weights that do not depend on the size, in float32, as the tables are."""
    model = models_mae.mae_vit({**TINY_MAE, "img_size": size}, norm_pix_loss=True)
    return fill(model, seed=1, std=0.1, skip="pos_embed").float()


def test_each_phase_is_the_plain_model_of_its_size(images, capsys):
    """Loss, prediction and gradients, bit for bit; out of training and in files it is that of the last."""
    model, args = make_model(), flags(images, "16:0", "16x24:0.25", "32:0.5")
    plain, keys = make_model(), list(make_model().state_dict())
    sizes = SizeSchedule(args, model, build_pretrain_dataset(args))
    for epoch, size in enumerate([(16, 16), (16, 24), (32, 32), (32, 32)]):
        sizes.begin(epoch)
        other = make_model(size)
        batch = torch.randn(2, 3, *size)
        noise = torch.rand(2, size[0] * size[1] // 64)
        found, expected = (m.train()(batch, 0.5, noise) for m in (model, other))
        assert model.img_size == size
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        for result in (found, expected):
            result[0].backward()
        for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), (
                name
            )
        model.zero_grad()
        wrong = torch.zeros(2, 3, 40, 40)
        with pytest.raises(ValueError, match="images have shape"):
            model(wrong)
        assert list(model.state_dict()) == keys
        assert_same(model.state_dict(), plain.state_dict())
        batch, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
        whole = (m.eval()(batch, 0.5, noise) for m in (model, plain))
        assert all(torch.equal(*pair) for pair in zip(*whole, strict=True))
    lines = [line for line in capsys.readouterr().out.splitlines() if "pixels" in line]
    text = (
        "Epoch: [{}] images of {} pixels, {} patches; tokens of a batch: {} in the encoder, {} in the decoder"
    )
    numbers = [(0, "16x16", 4, 8, 20), (1, "16x24", 6, 8, 28), (2, "32x32", 16, 20, 68)]
    assert lines == [text.format(*line) for line in numbers]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("loader", ["default", "reference"])
def test_an_image_knows_its_epoch_in_every_worker(images, loader, workers):
    """The workers live on when the size changes; a sample is that of a run with this size alone."""
    args = flags(images, "16:0", "32:0.5", loader=loader)
    dataset = build_pretrain_dataset(args)
    sampler = EpochSampler(len(dataset), batch_size=4, repeats=2)
    batches = build_loader(dataset, sampler, 4, workers, drop_last=True)
    SizeSchedule(args, make_model(), dataset)
    for epoch, size in enumerate((16, 16, 32, 32)):
        alone = build_pretrain_dataset(flags(images, input_size=size, loader=loader))
        sampler.set_epoch(epoch)
        keys = list(sampler)
        for i, batch in enumerate(batches):
            expected = [image for image, *_ in alone.__getitems__(keys[4 * i : 4 * i + 4])]
            assert torch.equal(batch.images, torch.stack(expected)) and batch.images.shape[2:] == (size, size)


def test_a_share_is_rounded_to_an_epoch():
    args = flags(None, "16:0", "24:0.5", "32:0.75", epochs=5)  # 2.5 and 3.75
    assert read_phases(args, 8) == [(0, (16, 16)), (3, (24, 24)), (4, (32, 32))]
    args = flags(None, "8x16:0", "16x16:0.4", "16x32:0.75", epochs=800, input_size=(16, 32), mask_ratio=0.5)
    assert read_phases(args, 8) == [(0, (8, 16)), (320, (16, 16)), (600, (16, 32))]


BAD = [
    (["32:0", "16:0.5"], "16:0.5: sizes must rise"),
    (["32:0", "32:0.5"], "32:0.5: sizes must rise"),
    (["16x24:0", "24x16:0.5"], "24x16:0.5: sizes must rise"),
    (["16:0.1", "32:0.5"], "16:0.1: the first share must be 0"),
    (["16:-1", "32:0.5"], "16:-1: the first share must be 0"),
    (["16:0", "24:0.5", "32:0.5"], "32:0.5: shares must rise and stay below 1"),
    (["16:0", "32:1"], "32:1: shares must rise and stay below 1"),
    (["16:0", "32:nan"], "32:nan must be SIZE:SHARE"),
    (["16:0", "32:inf"], "32:inf must be SIZE:SHARE"),
    (["12:0", "32:0.5"], "12:0: patches of 8 pixels do not divide it"),
    (["16", "32:0.5"], "16 must be SIZE:SHARE"),
    (["16:0", "big:0.5"], "big:0.5 must be SIZE:SHARE"),
    (["16:0", "24:0.5"], "must end with --input_size; pass --input_size 24x24"),
    (["8:0", "32:0.5"], "8:0: --mask_ratio 0.75 keeps no patch of it, or all"),
    (["16:0", "24:0.1", "32:0.5"], "24:0.1: of --epochs 4 none is left for a size"),
    (["16:0", "32:0.9"], "32:0.9: of --epochs 4 none is left for a size"),
]


@pytest.mark.parametrize("schedule, message", BAD, ids=lambda value: " ".join(value)[:30])
def test_bad_schedules_are_one_line(schedule, message):
    with pytest.raises(UserError) as error:
        read_phases(flags(None, *schedule), 8)
    assert message in str(error.value) and str(error.value).startswith("--size_schedule ")
    assert "\n" not in str(error.value)


def test_what_it_does_not_go_with_and_nothing_is_written(images, tmp_path):
    for name in ("fsdp", "teacher"):
        with pytest.raises(UserError, match=f"not with --{name}"):
            read_phases(flags(None, "16:0", "32:0.5", **{name: "x"}), 8)
    with pytest.raises(UserError, match="sizes must rise"):
        run(images, tmp_path / "out", "--size_schedule", "32:0", "16:0.5")
    assert not list(tmp_path.glob("out/[!.]*"))


def test_pictures_and_figures_are_of_the_last_size(images, tmp_path):
    """Also without val/, where the pictures are training images, and with a kind of masks; figures are those
    of the plain model."""
    shutil.copytree(images / "train", tmp_path / "only" / "train")
    often = ("--vis_freq", "1", "--knn_freq", "1", "--mask_ratio", "0.5", "--epochs", "2")
    only = tmp_path / "only"
    for root, mask, first, size in (images, "random", "8x16", "16x32"), (only, "grid", "16", "32"):
        out, sizes = tmp_path / root.name, ("--size_schedule", f"{first}:0", f"{size}:0.5")
        run(root, out, *sizes, "--input_size", size, "--mask", mask, *often)
        assert (out / "reconstruction-0.png").is_file()
    assert weights(tmp_path / "only/checkpoint-1.pth")["pos_embed"].shape[1] == 17


def test_compiled_once_for_each_size(images, tmp_path, monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    small = {**TINY_MAE, "depth": 1, "decoder_depth": 1}
    monkeypatch.setitem(models_mae.MODELS, "mae_nano", lambda **sizes: models_mae.mae_vit(small, **sizes))
    schedule = ("--model", "mae_nano", "--size_schedule", "16:0", "32:0.5")
    run(images, tmp_path / "compiled", *schedule, "--compile", "--epochs", "4")
    assert counter.frame_count == 2
    run(images, tmp_path / "eager", *schedule, "--epochs", "4")
    # float32; the same kernels in the same order, but for draws that torch 2.6 makes otherwise
    for name, value in weights(tmp_path / "eager/checkpoint-3.pth").items():
        torch.testing.assert_close(weights(tmp_path / "compiled/checkpoint-3.pth")[name], value)
