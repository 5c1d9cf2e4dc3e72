"""What loaders hand to their workers can be pickled: not every system forks them."""

import os
import pickle
import subprocess
import sys
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_utils import REPO, TINY, fill
from image_utils import picture

import models_vit
from util.data import loader as loaders
from util.data.dataset import build_pretrain_dataset, build_val_dataset
from util.data.find import ImageFiles, PathList
from util.data.labelled import labelled_images
from util.data.loader import build_loader
from util.data.presets import eval_transform, probe_transform
from util.data.sampler import EpochSampler
from util.data.transforms import normalize_batch
from util.evaluate.exact import eval_loader
from util.evaluate.knn import knn_loaders
from util.evaluate.predict import predict, prediction_loader


def make_args(root, channels, **changes):
    values = dict(
        data_path=str(root), input_size=16, in_chans=channels, mean=None, std=None, seed=0,
        bad_images="error", color_jitter=0.4, aa="rand-m9-mstd0.5-inc1", reprob=0.5, remode="pixel",
        recount=1, batch_size=4, num_workers=0, loader="default",
    )  # fmt: skip
    return Namespace(**{**values, **changes})


@pytest.fixture(scope="module", params=[3, 13])
def folder(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(f"channels{request.param}")
    for split in ("train", "val"):
        for i in range(8):
            path = root / split / f"c{i % 2}"
            path.mkdir(parents=True, exist_ok=True)
            np.save(path / f"{i}.npy", picture(i, 20, 24, request.param))
    return root, request.param


def all_loaders(root, channels) -> dict:
    """As the scripts build them."""
    args = make_args(root, channels)
    kinds = {
        "pretrain": build_pretrain_dataset(args),
        "held out": build_val_dataset(args),
        "finetune": labelled_images("train", args),
        "evaluation": labelled_images("val", args),
        "probe": labelled_images("train", args, probe_transform),
        "probe, uint8": labelled_images("train", args, partial(probe_transform, uint8=True)),
        "probe's evaluation": labelled_images(
            "val", args, partial(eval_transform, always_crop=True, uint8=True)
        ),
    }
    if channels == 3:
        kinds["reference"] = build_pretrain_dataset(make_args(root, channels, loader="reference"))
    found = {name: build_loader(of, EpochSampler(len(of), batch_size=4), 4) for name, of in kinds.items()}
    found["k-NN"] = knn_loaders(args)[0]
    found["features"] = eval_loader(kinds["probe"], args, epoch=1)
    files = ImageFiles("", "", PathList([str(root / "val/c0/0.npy")] * 8))
    weights = SimpleNamespace(recipe=None, sizes={"in_chans": channels}, input_size=(16, 16))
    found["prediction"] = prediction_loader(files, weights, args)
    return found


def test_c3_everything_that_workers_get_can_be_pickled(folder):
    """And gives the same batch again."""
    for name, loader in all_loaders(*folder).items():
        dataset, collate, start = pickle.loads(
            pickle.dumps((loader.dataset, loader.collate_fn, loaders._init_worker))
        )
        keys = list(loader.sampler)[:4]
        own, other = (side(data.__getitems__(keys)) for side, data in (
            (loader.collate_fn, loader.dataset), (collate, dataset)))  # fmt: skip
        assert all(torch.equal(*pair) for pair in zip(own, other, strict=True)), name
        assert start is loaders._init_worker


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_c3_probing_and_neighbours_with_workers_that_are_not_forked(folder, tmp_path, method):
    root, channels = folder
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys, multiprocessing; sys.path.insert(0, {str(REPO)!r})\n"
        "import main_finetune, main_knn, main_linprobe\n"
        "from util.cli.parser import ArgumentParser, parse_args\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        "    for module in (main_knn, main_linprobe, main_finetune):\n"
        "        words = sys.argv[1:]\n"
        "        if module is not main_knn:\n"
        f"            words += ['--epochs', '1', '--warmup_epochs', '0', '--output_dir', {str(tmp_path)!r} + "
        "'/' + module.__name__, '--log_dir', '']\n"
        "        module.main(parse_args(ArgumentParser(parents=[module.get_args_parser()]), words))\n"
    )
    words = ["--data_path", root, "--model", "vit_tiny_patch16", "--input_size", "16", "--patch_size", "8"]
    words += ["--in_chans", channels, "--batch_size", "4", "--num_workers", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *map(str, (script, *words))],
        cwd=REPO,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "* k-NN Acc@1" in done.stdout and done.stdout.count("* Acc@1") == 2


def test_d5_probes_neighbours_and_predictions_get_uint8_and_the_same_numbers(folder):
    """A quarter of the memory; normalised on the device they are what the transform makes, bit for bit."""
    root, channels = folder
    found, args = all_loaders(root, channels), make_args(root, channels)
    stats = [0.1 + 0.01 * c for c in range(channels)], [0.2 + 0.01 * c for c in range(channels)]
    args.mean, args.std = stats
    for kind, floats in [
        ("probe, uint8", labelled_images("train", args, probe_transform)),
        ("probe's evaluation", labelled_images("val", args, partial(eval_transform, always_crop=True))),
        ("k-NN", labelled_images("train", args, partial(eval_transform, always_crop=True))),
    ]:
        for key in ((0, 0), (3, 5)):
            pixels, expected = found[kind].dataset[key][0], floats[key][0]
            assert pixels.dtype == torch.uint8 and expected.dtype == torch.float32
            assert torch.equal(normalize_batch(pixels[None], "cpu", *stats)[0], expected), kind
    assert found["prediction"].dataset[0][0].dtype == torch.uint8


def test_d5_predictions_are_normalised_with_the_statistics_of_the_weights(folder):
    root, channels = folder
    loader = all_loaders(root, channels)["prediction"]
    model = models_vit.VisionTransformer(**{**TINY, "img_size": 16, "in_chans": channels}, num_classes=3)
    model = fill(model, seed=1, std=0.1).float().eval()
    weights = Namespace(mean=(0.3,) * channels, std=(0.1,) * channels)
    found = predict(model, loader, torch.device("cpu"), feature_kind="cls", stats=weights).features
    images = torch.stack([loader.dataset[i][0] for i in range(8)])
    expected = model.forward_features(normalize_batch(images, "cpu", weights.mean, weights.std))
    torch.testing.assert_close(torch.from_numpy(found), expected.detach())


POWER = 1 << 12  # bytes of a batch of 4 images of 16x16 pixels in uint8 (3,072), as torch rounds it up


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_d5_page_locked_memory_is_bounded(tmp_path, monkeypatch, capsys):
    """By half of what is free, shared among the processes of a machine: fewer batches ahead, then none."""
    for i in range(8):
        (tmp_path / "train").mkdir(exist_ok=True)
        np.save(tmp_path / "train" / f"{i}.npy", picture(i, 20, 24, 3))
    dataset = build_pretrain_dataset(make_args(tmp_path, 3))

    def options(blocks, pin=True, workers=3):
        monkeypatch.setattr("util.compute.memory.free_memory", lambda: 2 * POWER * blocks)
        loader = build_loader(dataset, EpochSampler(8, batch_size=4), 4, workers, pin)
        return loader.num_workers, loader.prefetch_factor, loader.pin_memory

    assert options(float("inf")) == options(9) == (3, 2, True)
    assert options(8.9) == options(6) == (3, 1, True)
    assert not capsys.readouterr().err
    assert options(5.9) == (3, 2, False)  # then memory that can be moved
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "warning: batches are not page-locked" in err and "--batch_size" in err
    assert options(0, pin=False) == (3, 2, False) and options(3, workers=0) == (0, None, True)
    assert not capsys.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert options(18) == (3, 2, True) and options(12) == (3, 1, True) and options(11) == (3, 2, False)


@pytest.mark.gpu
@pytest.mark.parametrize("megabytes", [3, 5])
def test_d5_torch_rounds_page_locked_blocks_up(megabytes):
    """What the bound counts with; older torch cannot tell."""
    if not hasattr(torch.cuda, "host_memory_stats"):
        pytest.skip("this torch does not count page-locked memory")
    torch.cuda.init()
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    kept = torch.empty(megabytes << 20, dtype=torch.uint8, pin_memory=True)
    grown = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
    assert kept.is_pinned() and grown <= 1 << (kept.nbytes - 1).bit_length()
