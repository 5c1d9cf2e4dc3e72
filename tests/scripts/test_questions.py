"""`--mask`, `--target`, `--visible_loss`: masks and targets against plain ones, runs, and wrong inputs."""

import argparse
import math

import numpy as np
import pytest
import torch
from golden_utils import TINY, TINY_MAE, fill, skip_without_fake_gpu
from image_utils import picture
from PIL import Image
from test_engine_pretrain import make_args
from test_main_pretrain import assert_same, names_in, run, weights
from test_teacher import plain_encoder, write_teacher
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import models_mae
import models_vit
from engine_pretrain import evaluate, train_one_epoch
from models_mae import MaskedAutoencoderViT
from util.compute import compile as compiling
from util.compute.precision import NativeScalerWithGradNormCount
from util.errors import UserError
from util.export.source import read_source
from util.figures.reconstruction import read_mask, reconstruct
from util.recipes import targets
from util.recipes.masks import BLOCKS, DRAWS, KINDS
from util.recipes.questions import ask
from util.rng import fixed_masks, fixed_noise, seed_step
from util.run.start import Run
from util.weights.build import build
from util.weights.describe import describe
from util.weights.encoder import load_into
from util.weights.files import read_file

CPU = torch.device("cpu")
NANO = ["--model", "mae_vit_nano", "--save_freq", "1", "--vis_freq", "1"]
GRIDS = [(4, 4), (14, 14), (8, 16), (16, 4), (7, 7), (3, 10)]

pytestmark = pytest.mark.usefixtures("nano")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory):
    """A mask of the grid of 4 x 4 patches, 5 of which it hides."""
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    values = np.zeros((4, 4), np.uint8)
    values[1:3, 1:3] = values[0, 3] = 255
    Image.fromarray(values).save(path)
    return path


def asked(dataset=None, given=(), **changes):
    """(a tiny model, float64, that the flags `changes` have changed; the flags)."""
    defaults = dict(mask="random", mask_file="", visible_loss=0.0, target="pixels", target_size=None,
                    teacher="", teacher_loss=None, teacher_weight=None, teacher_block=None, fsdp=False,
                    no_verify=False, mean=None, std=None, model="m")  # fmt: skip
    args = make_args(**{**defaults, **changes})
    model = fill(models_mae.mae_vit(TINY_MAE), seed=10, std=0.1, skip="pos_embed")
    torch.manual_seed(0)
    ask(model, args, Run(CPU, None, "", set(given), False), dataset)
    return model.double(), args


def some_images(count=3, seed=1):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Pictures(torch.utils.data.Dataset):
    """uint8 images of 32 pixels, as the training set gives them."""

    def __len__(self):
        return 9

    def __getitem__(self, key):
        return torch.from_numpy(picture(key[1], 32, 32)).permute(2, 0, 1), -1, key[1]


# Masks


def visible_of(noise, ratio):
    """bool (N, L): what the model's own shuffle keeps."""
    tokens = torch.zeros(*noise.shape, 1)
    kept, mask, _ = MaskedAutoencoderViT.random_masking(None, tokens, ratio, noise)
    assert kept.shape[1] == int(noise.shape[1] * (1 - ratio))
    return mask == 0


def plain_rectangle(shape, top, left, area, grid, longest):
    """(top, left, height, width) of a rectangle, in Python's floats."""
    rows, columns = grid
    ratio = 1 + (2 * shape) % 1 * (longest - 1)
    ratio = ratio if shape < 0.5 else 1 / ratio
    height = max(min(max(round(math.sqrt(area * ratio)), 1), rows), math.ceil(area / columns))
    width = min(math.ceil(area / height), columns)
    return int(top * (rows - height + 1)), int(left * (columns - width + 1)), height, width


def plain_mask(kind, row, grid, kept):
    """Set of the visible patches (row, column), one patch after the other."""
    (rows, columns), total = grid, grid[0] * grid[1]
    patches = [(y, x) for y in range(rows) for x in range(columns)]
    if kind == "grid":
        corner = int(4 * row[0])
        wanted = [p for p in patches if (p[0] % 2, p[1] % 2) == divmod(corner, 2)]
        anywhere = {p: row[DRAWS + i] for i, p in enumerate(patches)}
        order = sorted(wanted, key=anywhere.get)
        return {*(order + sorted(set(patches) - set(wanted), key=anywhere.get))[:kept]}
    way = int(4 * row[DRAWS - 1])
    order = sorted(patches) if way % 2 == 0 else sorted(patches, key=lambda p: (p[1], p[0]))
    order = order if way < 2 else order[::-1]
    if kind == "inverse_block":
        top, left, height, width = plain_rectangle(*row[:3], kept, grid, 2.0)
        inside = [p for p in order if top <= p[0] < top + height and left <= p[1] < left + width]
        assert len(inside) >= kept
        return {*inside[:kept]}
    hidden = []
    for block in range(BLOCKS):
        size, *draws = row[4 * block : 4 * block + 4]
        least = min(16 / 196 * total, total - kept)
        top, left, height, width = plain_rectangle(
            *draws, least + size * (total - kept - least), grid, 1 / 0.3
        )
        hidden += [p for p in order[::-1] if top <= p[0] < top + height and left <= p[1] < left + width
                   and p not in hidden]  # fmt: skip
    hidden += [p for p in order[::-1] if p not in hidden]
    return {*patches} - {*hidden[: total - kept]}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_keep_the_exact_number_and_are_those_of_a_plain_implementation(kind, grid):
    """1,000 draws; ten of them patch by patch in Python."""
    length = grid[0] * grid[1]
    for ratio in (0.75, 0.5, 0.6, 0.9):
        kept = int(length * (1 - ratio))
        numbers = torch.rand(
            1000, DRAWS + length, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        visible = visible_of(KINDS[kind](numbers, grid, kept), ratio)
        assert (visible.sum(dim=1) == kept).all()
        assert len(visible.unique(dim=0)) > 3  # draws differ, a corner of the grid by four
        for row, found in zip(numbers[:10].tolist(), visible, strict=False):
            found = {divmod(place, grid[1]) for place in found.nonzero().flatten().tolist()}
            assert found == plain_mask(kind, row, grid, kept)
        assert torch.equal(
            visible_of(KINDS[kind](numbers[5:7], grid, kept), ratio), visible[5:7]
        )  # whoever else is in the batch


def test_kinds_look_as_their_names_say():
    """At the paper's ratio and grid: figures that are seen in pictures, for random masks far from these."""
    grid, kept = (14, 14), 49
    numbers = torch.rand(1000, DRAWS + 196, generator=torch.Generator().manual_seed(0))
    images = {
        name: visible_of(kind(numbers, grid, kept), 0.75).view(-1, *grid) for name, kind in KINDS.items()
    }

    def edges(visible):  # neighbours of which one is hidden; of random masks some 136
        across, down = (visible[:, :, 1:] != visible[:, :, :-1]), (visible[:, 1:] != visible[:, :-1])
        return across.sum(dim=(1, 2)) + down.sum(dim=(1, 2))

    tiles = images["grid"].unflatten(2, (7, 2)).unflatten(1, (7, 2)).sum(dim=(2, 4))
    assert (tiles == 1).all()  # one of every four
    assert edges(images["inverse_block"]).max() <= 40  # a rectangle of 7 x 7 has 28
    assert edges(images["block"]).float().mean() < 40
    assert edges(visible_of(numbers[:, :196], 0.75).view(-1, *grid)).min() > 90


def test_training_draws_from_the_steps_generator_and_evaluation_by_image():
    model, _ = asked(mask="block")
    seed_step(3, 1, 4, 7)
    numbers = torch.rand(2, DRAWS + 16)
    seed_step(3, 1, 4, 7)
    mask = model(some_images(2))[2]
    assert torch.equal(mask == 0, visible_of(KINDS["block"](numbers, (4, 4), 4), 0.75))
    fixed = fixed_masks(model, [4, 0, 2], 0.75)
    assert torch.equal(fixed[1:2], fixed_masks(model, 1, 0.75)) and fixed.shape == (3, 16)
    assert torch.equal(fixed, KINDS["block"](fixed_noise([4, 0, 2], DRAWS + 16, 0), (4, 4), 4))
    assert torch.equal(model(some_images(3), 0.75, fixed)[2] == 0, visible_of(fixed, 0.75))
    plain = models_mae.mae_vit(TINY_MAE)
    assert torch.equal(fixed_masks(plain, [4, 0], 0.75), fixed_noise([4, 0], 16, 0))


def test_on_a_gpu_nothing_waits_for_it():
    """Tensors without values, as torch's compiler uses them: reading one, or mixing devices, is an error."""
    skip_without_fake_gpu()
    with FakeTensorMode():
        images = torch.rand(2, 3, 32, 32, device="cuda")
        numbers = torch.rand(2, DRAWS + 16, device="cuda")
        found = [kind(numbers, (4, 4), 4) for kind in KINDS.values()]
        found += [targets.hog(images, 8, 8), targets.lowpass(images, 8, 2)]
    assert all(tensor.is_cuda for tensor in found)


def test_the_held_out_loss_has_masks_and_target_of_the_training():
    model, args = asked(mask="inverse_block", target="lowpass", visible_loss=0.5)
    batch = some_images(5)
    found = [evaluate([(part, None) for part in batch.split(size)], model, CPU, args) for size in (2, 5)]
    assert found[0] == found[1]
    mask = ~visible_of(fixed_masks(model, 5, 0.75), 0.75)
    pred = model(batch, 0.75, fixed_masks(model, 5, 0.75))[1]
    distance = (pred - plain_lowpass(batch, 2)).square().mean(dim=-1)
    weight = torch.where(mask, 1.0, 0.5).double()
    assert found[0] == pytest.approx(((distance * weight).sum() / weight.sum()).item(), rel=1e-10)


# Targets


def plain_lowpass(batch, size):
    """(N, L, size * size * 3) of patches of 8 pixels."""
    step, rows = 8 // size, []
    for image in batch.numpy():
        rows.append(
            [
                [
                    image[c, y + i * step : y + (i + 1) * step, x + j * step : x + (j + 1) * step].mean()
                    for i in range(size)
                    for j in range(size)
                    for c in range(3)
                ]
                for y in range(0, image.shape[1], 8)
                for x in range(0, image.shape[2], 8)
            ]
        )
    return torch.from_numpy(np.array(rows))


def plain_hog(batch, side, cell):
    """Pixel by pixel."""
    batch = batch.numpy()
    _, channels, height, width = batch.shape
    rows = []
    for image in batch:
        votes = np.zeros((height // cell, width // cell, channels, 9))
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    dx = image[c, y, min(x + 1, width - 1)] - image[c, y, max(x - 1, 0)]
                    dy = image[c, min(y + 1, height - 1), x] - image[c, max(y - 1, 0), x]
                    degrees = math.degrees(math.atan2(dy, dx)) % 180
                    votes[y // cell, x // cell, c, int(degrees // 20) % 9] += math.hypot(dx, dy)
        lengths = np.sqrt((votes**2).sum(axis=-1, keepdims=True))
        votes = np.divide(votes, lengths, where=lengths > 0, out=np.zeros_like(votes))
        k = side // cell
        rows.append([votes[y : y + k, x : x + k].flatten() for y in range(0, height // cell, k)
                     for x in range(0, width // cell, k)])  # fmt: skip
    return torch.from_numpy(np.array(rows))


@pytest.mark.parametrize(("side", "cell"), [(8, 8), (16, 8), (4, 4), (12, 12), (14, 7)])
def test_hog_is_that_of_a_plain_implementation(side, cell):
    batch = some_images(1)[:, :2, :, :28].repeat(1, 1, 3, 2)[:, :, : 4 * side, : 2 * side].contiguous()
    batch[:, 0, :cell, :cell] = 0.5  # no gradient inside
    wanted = plain_hog(batch, side, cell)
    torch.testing.assert_close(targets.hog(batch, side, cell), wanted, rtol=1e-10, atol=1e-10)
    of_float32 = targets.hog(batch.bfloat16().float(), side, cell)
    assert of_float32.dtype == torch.float32


def test_hog_has_maskfeats_numbers():
    """108 of a patch of 16 x 16 pixels (quoted, arXiv 2112.09133), each cell and channel of length 1."""
    image = torch.from_numpy(picture(0, 32, 32)).permute(2, 0, 1)[None].double()
    found = targets.hog(image, 16, 8)
    assert found.shape == (1, 4, 108)
    torch.testing.assert_close(found.unflatten(2, (12, 9)).norm(dim=-1), torch.ones(1, 4, 12).double())


def test_pca_is_that_of_a_plain_implementation(monkeypatch):
    model, args = asked(Pictures(), target="pca", target_size=5)
    patches = []
    for i in range(9):
        image = picture(i, 32, 32) / 255
        image = (image - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        patches += [image[y : y + 8, x : x + 8].flatten() for y in range(0, 32, 8) for x in range(0, 32, 8)]
    patches = np.array(patches)
    _, lengths, vectors = np.linalg.svd(patches - patches.mean(axis=0), full_matrices=False)
    mean, components, share = targets.fit(model, Pictures(), args, 5)
    np.testing.assert_allclose(mean.numpy(), patches.mean(axis=0), atol=1e-6)  # pixels are float32
    signs = np.sign((components.numpy() * vectors[:5]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(components.numpy(), signs * vectors[:5], atol=1e-5)
    assert share == pytest.approx((lengths[:5] ** 2).sum() / (lengths**2).sum(), abs=1e-6)
    torch.testing.assert_close(model.decoder_target_components, components, rtol=0, atol=1e-7)
    assert model.decoder_pred.out_features == 5

    batch = some_images()
    wanted = np.array(
        [
            [
                (
                    image[:, y : y + 8, x : x + 8].transpose(1, 2, 0).flatten()
                    - model.decoder_target_mean.numpy()
                )
                @ model.decoder_target_components.numpy().T
                for y in range(0, 32, 8)
                for x in range(0, 32, 8)
            ]
            for image in batch.numpy()
        ]
    )
    found = model.target.of(model, batch)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(targets, "FITTED_ON", (4, 20))
    assert targets.fit(model, Pictures(), args, 5)[0].shape == (192,)


def test_pca_is_exact_in_mixed_precision():
    model = asked(Pictures(), target="pca")[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.target.of(model, some_images().float())
    assert torch.equal(found, model.target.of(model, some_images().float())) and found.shape[2] == 24


def test_lowpass_is_that_of_a_plain_implementation():
    batch = some_images()
    for size in (1, 2, 4, 8):
        model, _ = asked(target="lowpass", target_size=size)
        found = model.target.of(model, batch)
        torch.testing.assert_close(found, plain_lowpass(batch, size), rtol=1e-10, atol=1e-10)
    assert asked(target="lowpass")[0].decoder_pred.out_features == 12  # 2 x 2 of 8 x 8, 3 channels


def test_teacher_features_are_those_of_a_plain_implementation(teacher):
    model, args = asked(target="teacher", teacher=str(teacher))
    assert len(args.teacher_digest) == 8 and model.decoder_pred.out_features == 36
    frozen = model.target.of.__closure__[0].cell_contents.teacher.double()
    batch = some_images(2)
    tokens = plain_encoder(frozen, batch, torch.arange(16).expand(2, -1))[-1][1][:, 1:]
    mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, keepdim=True, correction=0)
    wanted = (tokens - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(model.target.of(model, batch), wanted, rtol=1e-10, atol=1e-10)
    assert not any("teacher" in name for name in model.state_dict()) and not frozen.training


@pytest.mark.parametrize("target", ["pixels", "norm_pixels", "hog", "pca", "lowpass", "teacher"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_a_plain_implementation(target, weight, teacher):
    of_teacher = {"teacher": str(teacher)} if target == "teacher" else {}
    model, _ = asked(Pictures(), target=target, visible_loss=weight, **of_teacher)
    model.norm_pix_loss = target == "norm_pixels"
    if target == "teacher":
        model.target.of.__closure__[0].cell_contents.teacher.double()
    batch = some_images(2)
    loss, pred, mask = model(batch, 0.75, fixed_noise(2, 16, 0))
    assert loss.requires_grad
    pred = pred.detach()
    wanted = (
        model.patchify(batch) if getattr(model, "target", None) is None else model.target.of(model, batch)
    )
    if target == "norm_pixels":
        wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + 1e-6).sqrt()
    total = below = 0.0
    for n in range(2):
        for place in range(16):
            factor = 1.0 if mask[n, place] else weight
            total += factor * float(((pred[n, place] - wanted[n, place]) ** 2).sum()) / wanted.shape[2]
            below += factor
    assert loss.item() == pytest.approx(total / below, rel=1e-10)
    assert mask.sum() == 24


def test_a_step_learns_the_target():
    """One step of the real loop: the loss falls, and the new last layer is what the optimizer moves."""
    model, args = asked(target="hog", mask="grid", visible_loss=0.2)
    args = argparse.Namespace(**{**vars(args), "accum_iter": 1, "warmup_epochs": 0, "lr": 0.05, "seed": 1})
    args.epochs = 10**9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = [
        train_one_epoch(model, [(some_images(2), None)], optimizer, CPU, 0, NativeScalerWithGradNormCount(),
                        None, args)["loss"]
        for _ in range(4)
    ]  # fmt: skip
    assert losses[3] < losses[2] < losses[1] < losses[0]
    assert model.decoder_pred.weight.grad is None or not model.decoder_pred.weight.grad.any()


@pytest.mark.parametrize("flags", [{"mask": "block", "target": "hog"}, {"mask": "grid", "target": "pca"},
                                   {"mask": "inverse_block", "visible_loss": 0.5}])  # fmt: skip
def test_compiled_it_is_one_graph_with_the_same_numbers(flags, monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    torch._dynamo.reset()
    found = []
    for compiles in (False, True):
        model, args = asked(Pictures(), **flags)
        if compiles:
            args.compile, args.compile_mode, args.distributed = True, "default", False
            assert compiling.compile_model(model, "forward", args, CPU)
        torch.manual_seed(0)
        loss, _, mask = model(some_images(2), mask_ratio=0.75)
        loss.backward()
        found.append([loss, mask, model.blocks[0].attn.qkv.weight.grad])
    torch._dynamo.reset()
    assert counter.frame_count == 1
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


def test_with_a_teacher_beside_it_both_losses_are_there(teacher):
    """`--teacher` without `--target teacher` imitates, whatever the masks and the target are."""
    model, args = asked(target="lowpass", mask="grid", teacher=str(teacher), teacher_loss="features")
    model = model.float().train()
    assert [kind.__name__ for kind in type(model).__mro__[:5]] == [
        "Student",
        "Student",
        "Asked",
        "Masked",
        "Targeted",
    ]
    torch.manual_seed(0)
    loss, distance = model(some_images(2).float())
    assert args.teacher_weight == 1 and distance > 0
    torch.manual_seed(0)
    assert model.eval()(some_images(2).float())[0].item() == pytest.approx(loss.item(), rel=1e-5)


# Runs

RUNS = {
    "hog": ["--mask", "block", "--target", "hog"],
    "pca": ["--mask", "grid", "--target", "pca", "--target_size", "7"],
    "lowpass": ["--mask", "inverse_block", "--target", "lowpass", "--visible_loss", "0.5"],
    "teacher": ["--mask", "file", "--mask_file", "MASK", "--target", "teacher", "--teacher", "TEACHER"],
    "pixels": ["--mask", "block", "--target", "norm_pixels", "--visible_loss", "0.1"],
}


def flags_of(name, teacher, mask_file):
    places = {"MASK": str(mask_file), "TEACHER": str(teacher)}
    return [*NANO, *(places.get(word, word) for word in RUNS[name])]


@pytest.mark.parametrize("name", RUNS)
def test_resumed_inside_an_epoch_is_uninterrupted_bit_for_bit(
    images, teacher, mask_file, tmp_path, name, capsys
):
    own = flags_of(name, teacher, mask_file)
    whole = run(images, tmp_path / "whole", *own)
    out = capsys.readouterr().out
    assert len(whole) == 2 and all(line["train_loss"] > 0 and line["val_loss"] > 0 for line in whole)
    assert whole[0]["val_loss"] != whole[1]["val_loss"]
    drawn = name == "pixels"
    assert drawn == ("; no reconstructions are drawn" not in out)
    assert drawn == ("reconstruction-1.png" in names_in(tmp_path / "whole"))
    run(images, tmp_path / "parts", *own, "--max_steps", "4")
    assert run(images, tmp_path / "parts", *own, "--resume", "auto") == whole
    last = "checkpoint-1.pth"
    assert_same(weights(tmp_path / "whole" / last), weights(tmp_path / "parts" / last))
    if name == "pixels":
        assert read_file(tmp_path / "whole" / last)["args"]["norm_pix_loss"] is True
    if name == "teacher":
        saved = read_file(tmp_path / "whole" / last)["args"]
        assert int(16 * (1 - saved["mask_ratio"])) == 11 and len(saved["mask_digest"]) == 8
        run(images, tmp_path / "cut", *own, "--max_steps", "4")
        other = tmp_path / "other.npy"
        np.save(other, np.eye(4))
        own[own.index("--mask_file") + 1] = str(other)
        with pytest.raises(UserError, match=r"inside an epoch, .*mask_file \w{8} -> \w{8}.*keep to it"):
            run(images, tmp_path / "cut", *own, "--resume", "auto")


def test_pca_of_a_resumed_run_is_that_of_its_checkpoint(images, tmp_path, monkeypatch):
    own = [*NANO, "--target", "pca"]
    run(images, tmp_path, *own, "--epochs", "1")
    before = weights(tmp_path / "checkpoint-0.pth")["decoder_target_components"]
    monkeypatch.setattr(targets, "FITTED_ON", (3, 30))  # another set would give others
    run(images, tmp_path, *own, "--resume", "auto")
    assert torch.equal(weights(tmp_path / "checkpoint-1.pth")["decoder_target_components"], before)


def test_draws_are_the_same_at_any_number_of_workers(images, tmp_path):
    own = [*NANO, "--mask", "block", "--epochs", "1"]
    logs = [run(images, tmp_path / n, *own, "--num_workers", n) for n in ("0", "2")]
    assert logs[0] == logs[1]
    assert logs[0] != run(images, tmp_path / "random", *NANO, "--epochs", "1")


def test_of_such_checkpoints_the_encoder_is_taken(images, teacher, mask_file, tmp_path, capsys):
    for name in ("hog", "pca", "teacher"):
        own = flags_of(name, teacher, mask_file)
        run(images, tmp_path / name, *own, "--epochs", "1")
        path = tmp_path / name / "checkpoint-0.pth"
        classifier = models_vit.VisionTransformer(num_classes=3, **TINY)
        report = load_into(classifier, str(path))
        assert set(report.missing) == {"head.weight", "head.bias"}
        assert torch.equal(classifier.blocks[1].mlp.fc1.weight, weights(path)["blocks.1.mlp.fc1.weight"])
        content = read_file(path)
        with pytest.raises(
            UserError, match=rf"{path}: its decoder predicts {name}, not pixels; pass a model of"
        ):
            describe(content, path, make_args(), "full")
        encoder = build(describe(content, path, make_args(), "full", "encoder"))
        assert torch.equal(encoder.norm.weight, weights(path)["norm.weight"])
        source = read_source(str(path), make_args(encoder_only=False, mask_ratio=None, mean=None, std=None))
        assert source.part == "encoder" and source.mae is None
        capsys.readouterr()
        own = [*NANO, "--epochs", "1", "--init", str(path)]
        run(images, tmp_path / f"{name}-pixels", *own)
        assert "the file's does not fit (decoder_pred" in capsys.readouterr().out
    run(images, tmp_path / "plain", *NANO, "--epochs", "1")
    own = [
        *NANO,
        "--epochs",
        "1",
        "--init",
        str(tmp_path / "plain" / "checkpoint-0.pth"),
        "--init_freeze",
        "1",
    ]
    run(images, tmp_path / "frozen", *own, "--target", "hog")
    before, after = (weights(tmp_path / name / "checkpoint-0.pth") for name in ("plain", "frozen"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder_pred.weight", "decoder_pred.bias"}
    with pytest.raises(UserError, match="nothing would train"):
        run(images, tmp_path / "frozen2", *own)


def test_an_init_of_another_target_is_warned_of(images, tmp_path, capsys):
    run(images, tmp_path / "a", *NANO, "--epochs", "1", "--target", "lowpass", "--target_size", "8")
    own = [*NANO, "--epochs", "1", "--init", str(tmp_path / "a" / "checkpoint-0.pth")]
    run(images, tmp_path / "b", *own)
    assert "its decoder does not predict plain patches, as it is to do now" in capsys.readouterr().err


def test_pictures_show_the_kind_of_mask():
    model = asked(mask="inverse_block", visible_loss=0.5)[0].float()
    panels = reconstruct(
        model, some_images(2).float(), fixed_masks(model, 2, 0.75), 0.75, [0.5] * 3, [0.2] * 3
    )
    grey = (panels["masked"] == 0.5).all(dim=1).unflatten(2, (4, 8)).unflatten(1, (4, 8)).all(4).all(2)
    assert torch.equal(~grey.flatten(1), visible_of(fixed_masks(model, 2, 0.75), 0.75))


# Wrong inputs


def save_mask(path, values):
    np.save(path, values)
    return str(path)


@pytest.mark.parametrize(
    ("own", "text"),
    [
        (["--mask", "file"], "--mask file and --mask_file need each other"),
        (["--mask_file", "ONES"], "--mask file and --mask_file need each other"),
        (["--mask", "block", "--mask_file", "GOOD"], "--mask file and --mask_file need each other"),
        (["--mask", "file", "--mask_file", "GOOD", "--mask_ratio", "0.5"], "goes without --mask_ratio"),
        (["--mask", "file", "--mask_file", "ONES"], "removes all of the 4x4 patches"),
        (["--mask", "file", "--mask_file", "ZEROS"], "removes none of the 4x4 patches"),
        (["--mask", "file", "--mask_file", "OTHER"], "is 5x4, and must be 4x4 or 32x32 (patches, or pixels)"),
        (["--mask", "file", "--mask_file", "CUBE"], "is no mask of rows and columns"),
        (["--mask", "file", "--mask_file", "TEXT"], "is no mask of rows and columns"),
        (["--mask", "file", "--mask_file", "none.png"], "--mask_file none.png"),
        (["--mask", "file", "--mask_file", "none.npy"], "--mask_file none.npy: is no mask"),
        (["--mask", "block", "--mask_ratio", "0.99"], "--mask_ratio 0.99: keeps none of 16 patches"),
        (["--crop_scale", "0.5", "0.2"], "--crop_scale 0.5 0.2: must rise, above 0 and up to 1"),
        (["--crop_scale", "0", "1"], "--crop_scale 0 1: must rise"),
        (["--crop_scale", "0.2", "nan"], "--crop_scale 0.2 nan: must rise"),
        (["--visible_loss", "-1"], "--visible_loss -1.0: must be at least 0"),
        (["--visible_loss", "inf"], "--visible_loss inf: must be at least 0 and finite"),
        (["--norm_pix_loss", "--target", "hog"], "--norm_pix_loss, --target hog: two targets"),
        (["--norm_pix_loss", "--target", "pixels"], "--norm_pix_loss, --target pixels: two targets"),
        (
            ["--target", "lowpass", "--target_size", "3"],
            "--target_size 3: does not divide the patch's side of 8",
        ),
        (["--target", "pca", "--target_size", "193"], "--target_size 193: a patch has 192 numbers"),
        (["--target_size", "3"], "--target_size 3: is for --target pca and lowpass"),
        (["--target", "hog", "--target_size", "3"], "--target_size 3: is for --target pca and lowpass"),
        (["--target", "teacher"], "--target teacher: needs a --teacher FILE"),
        (
            ["--target", "teacher", "--teacher", "x.pth", "--teacher_weight", "2"],
            "goes without --teacher_loss",
        ),
        (["--target", "teacher", "--teacher", "none.pth"], "--teacher none.pth: no such file"),
    ],
)
def test_wrong_flags(images, tmp_path, own, text):
    masks = {"GOOD": np.eye(4), "ONES": np.ones((4, 4)), "ZEROS": np.zeros((32, 32), bool),
             "OTHER": np.eye(5)[:, :4], "CUBE": np.ones((4, 4, 4)), "TEXT": np.array([["a"]])}  # fmt: skip
    own = [save_mask(tmp_path / f"{w}.npy", masks[w]) if w in masks else w for w in own]
    with pytest.raises(UserError) as error:
        run(images, tmp_path / "out", *NANO, *own)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.pth"))


def test_models_that_compute_their_own_way_are_told_so():
    class OwnMasks(MaskedAutoencoderViT):
        def random_masking(self, x, mask_ratio):
            return super().random_masking(x, mask_ratio)

    class OwnLoss(MaskedAutoencoderViT):
        def forward_loss(self, imgs, pred, mask):
            return super().forward_loss(imgs, pred, mask)

    flags = vars(asked()[1])
    of_loss = "m has a forward_loss of its own"
    for own, changes, text in ((OwnMasks, {"mask": "grid"}, "--mask grid: m draws its own masks"),
                               (OwnLoss, {"target": "hog"}, of_loss),
                               (OwnLoss, {"visible_loss": 1}, of_loss)):  # fmt: skip
        with pytest.raises(UserError, match=text):
            ask(own(**TINY_MAE), make_args(**{**flags, **changes}), Run(CPU, None, "", set(), False), None)


def test_a_file_of_the_images_size_is_the_same_mask(tmp_path):
    values = np.zeros((4, 4))
    values[0, :3] = 1
    for name, array in (("a", values), ("b", np.kron(values, np.ones((8, 8), np.uint8)) * 255)):
        path = save_mask(tmp_path / f"{name}.npy", array)
        model, args = asked(mask="file", mask_file=path)
        mask = model(some_images(2), args.mask_ratio)[2]
        assert torch.equal(mask.view(2, 4, 4), torch.from_numpy(values).float().expand(2, -1, -1))


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_a_mask_picture_of_16_bits_hides_what_is_white(tmp_path, white):
    values = np.zeros((4, 4), np.uint16)
    values[0, :3] = white
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == "I;16"
    hidden = read_mask(tmp_path / "mask.png", (4, 4))
    assert torch.equal(hidden, torch.from_numpy(values > 0).flatten())
