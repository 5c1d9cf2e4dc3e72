"""The order of samples, independence from the number of workers, and errors that cross process borders."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from golden_utils import REPO
from PIL import Image

from util.data import loader as sampler_module
from util.data.dataset import ImageDataset, build_pretrain_dataset, find_images
from util.data.loader import build_loader, collate
from util.data.read import BadImage
from util.data.sampler import EpochSampler, EvalSampler
from util.data.transforms import EvalTransform
from util.errors import UserError
from util.processes import signals


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """29 small JPEGs in 3 classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(29):
        path = root / "abc"[i % 3] / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24 + i, 40, 3), dtype=np.uint8)).save(path)
    return root


def dataset_of(folder, loader="default", **more):
    return build_pretrain_dataset(
        argparse.Namespace(data_path=folder, input_size=16, seed=5, loader=loader, **more)
    )


def indices(sampler):
    return [index for _, index in sampler]


# Three workers on a machine of two cores are what is wanted here
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


# ---------------------------------------------------------------- EpochSampler


def test_an_epoch_is_a_permutation_of_seed_and_epoch_only():
    sampler = EpochSampler(100, seed=1)
    sampler.set_epoch(3)
    first = list(sampler)
    assert [epoch for epoch, _ in first] == [3] * 100 and sorted(indices(sampler)) == list(range(100))
    torch.manual_seed(0)
    np.random.seed(0)
    again = EpochSampler(100, seed=1)
    again.set_epoch(3)
    assert list(again) == first
    orders = set()
    for seed, epoch in ((1, 3), (1, 4), (2, 3), (3, 1)):
        other = EpochSampler(100, seed=seed)
        other.set_epoch(epoch)
        orders.add(tuple(indices(other)))
    assert len(orders) == 4
    assert all(type(index) is int for index in indices(sampler))


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [24, 25, 29, 31])
def test_ranks_share_the_permutation_in_equal_full_batches(length, replicas):
    """Global batch k is the same set of samples at any number of processes with the same effective batch."""
    batch = 12 // replicas
    whole = indices(EpochSampler(length, seed=1))
    shares = [indices(EpochSampler(length, replicas, rank, 1, batch_size=batch)) for rank in range(replicas)]
    samplers = [EpochSampler(length, replicas, rank, 1, batch_size=batch) for rank in range(replicas)]
    assert {len(share) for share in shares} == {length // 12 * batch} == {len(s) for s in samplers}
    for k in range(length // 12):
        together = {index for share in shares for index in share[k * batch : (k + 1) * batch]}
        assert together == set(whole[12 * k : 12 * (k + 1)])


def test_positions_inside_an_epoch():
    sampler = EpochSampler(50, 2, 1, seed=1, batch_size=4)
    sampler.set_epoch(2)
    whole = list(sampler)
    assert len(whole) == 24
    sampler.set_epoch(2, 3)
    assert list(sampler) == whole[12:] and len(sampler) == 24 and sampler.start_batch == 3
    sampler.set_epoch(2, 6)
    assert list(sampler) == []
    sampler.set_epoch(2)
    assert list(sampler) == whole


@pytest.mark.parametrize("replicas", [1, 2])
def test_repeats_follow_each_other_and_lengthen_the_epoch(replicas):
    plain = [EpochSampler(29, replicas, rank, 1, batch_size=2) for rank in range(replicas)]
    samplers = [EpochSampler(29, replicas, rank, 1, batch_size=6, repeats=3) for rank in range(replicas)]
    for one, three in zip(plain, samplers, strict=True):
        assert len(three) == 3 * len(one) == len(list(three)) == 3 * 2 * (29 // (2 * replicas))
        assert list(three) == [(*key, repeat) for key in one for repeat in range(3)]
        one.set_epoch(4, 2)
        three.set_epoch(4, 2)  # the same images: batches hold as many
        assert list(three) == [(*key, repeat) for key in one for repeat in range(3)]
    for options in ({"batch_size": 4}, {}):
        with pytest.raises(ValueError, match="whole images"):
            EpochSampler(29, repeats=3, **options)


def test_a_set_smaller_than_the_batch_gives_nothing():
    assert len(EpochSampler(10, 2, 0, batch_size=6)) == 0


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("kind", ["default", "reference"])
def test_same_batches_for_any_number_of_workers(folder, kind):
    """0, 1 and 3 workers, two epochs, one of them from its middle."""
    results = []
    for workers in (0, 1, 3):
        dataset = dataset_of(folder, kind)
        sampler = EpochSampler(len(dataset), seed=5, batch_size=6)
        loader = build_loader(dataset, sampler, 6, workers, drop_last=True)
        assert len(loader) == 4
        torch.manual_seed(workers)
        state = torch.get_rng_state()
        batches = list(loader)
        sampler.set_epoch(1, 2)
        batches += list(loader)
        assert torch.equal(torch.get_rng_state(), state), "the loader must not move the training's generator"
        assert len(batches) == 6
        results.append(batches)
    for other in results[1:]:
        for batch, expected in zip(other, results[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))
    images, labels, numbers = results[0][0]
    assert images.dtype == (torch.uint8 if kind == "default" else torch.float32) and images.shape == (
        6,
        3,
        16,
        16,
    )
    assert labels.dtype == numbers.dtype == torch.int64
    assert labels.tolist() == [dataset.label(index) for index in numbers.tolist()]
    for k, index in enumerate(numbers.tolist()):
        assert torch.equal(images[k], dataset[0, index][0])


@pytest.mark.parametrize("kind", ["default", "reference"])
def test_repeated_augmentation_decodes_once_and_crops_often(folder, kind):
    """Each repeat has draws of its own, the first those of a run without; the same for any workers."""
    dataset, decoded = dataset_of(folder, kind), []
    decode = dataset.decode
    dataset.decode = lambda path: (decoded.append(path), decode(path))[1]

    def batches(workers, start=0):
        sampler = EpochSampler(len(dataset), seed=5, batch_size=6, repeats=3)
        sampler.set_epoch(1, start)
        return list(build_loader(dataset, sampler, 6, workers, drop_last=True))

    plain = batches(0)
    assert len(plain) == 14 and len(decoded) == 28
    for images, labels, indices in plain:
        assert images.shape == (6, 3, 16, 16) and torch.equal(indices, indices[[0, 0, 0, 3, 3, 3]])
        assert labels.tolist() == [dataset.label(i) for i in indices.tolist()]
        for i, index in enumerate(indices.tolist()):
            assert torch.equal(dataset[1, index, i % 3][0], images[i])
            assert i % 3 or torch.equal(dataset[1, index][0], images[i])
        assert len({image.numpy().tobytes() for image in images}) == 6
    dataset.decode = decode  # workers that are not forked get no lambda
    for again in (batches(2), [*plain[:5], *batches(0, 5)]):
        assert all(
            torch.equal(a, b) for x, y in zip(plain, again, strict=True) for a, b in zip(x, y, strict=True)
        )


def test_all_repeats_of_a_bad_image_are_replaced_by_the_next(tmp_path):
    for i in range(4):
        Image.new("RGB", (30, 30), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    data = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
    dataset = dataset_of(tmp_path, bad_images="skip")
    keys = [(0, 1, 0), (0, 1, 1), (0, 3, 0), (0, 3, 0), (0, 2), (0, 2), 3, 3]
    samples = dataset.__getitems__(keys)
    assert [int(image[0, 0, 0]) // 60 for image, *_ in samples] == [2, 2, 3, 3, 2, 2, 3, 3]
    assert [index for *_, index in samples] == [1, 1, 3, 3, 2, 2, 3, 3]


def test_skipping_to_a_position_decodes_nothing(folder):
    dataset = dataset_of(folder)
    read, plain = [], dataset.decode
    dataset.decode = lambda path: read.append(list(dataset.files.paths).index(path)) or plain(path)
    sampler = EpochSampler(len(dataset), seed=5, batch_size=6)
    sampler.set_epoch(0, 3)
    batches = list(build_loader(dataset, sampler, 6, 0, drop_last=True))
    assert len(batches) == 1 and read == batches[0][2].tolist()


def test_evaluation_keeps_the_last_short_batch(folder):
    dataset = dataset_of(folder)
    loader = build_loader(dataset, EvalSampler(len(dataset)), 6, 0)
    sizes = [len(batch[0]) for batch in loader]
    assert sizes == [6, 6, 6, 6, 5] and len(loader) == 5


class Reporting(ImageDataset):
    def read(self, path, draws):
        handled = all(signal.getsignal(number) == signal.SIG_IGN for number in signals.SIGNALS)
        return [torch.tensor([os.getpid(), torch.get_num_threads(), handled])]


def test_workers_persist_and_use_one_thread(folder):
    dataset = Reporting(find_images(folder), EvalTransform(16))
    loader = build_loader(dataset, EpochSampler(len(dataset), batch_size=4), 4, 1, drop_last=True)
    rows = torch.cat([batch[0] for _ in range(2) for batch in loader])
    assert len(rows[:, 0].unique()) == 1 and rows[0, 0] != os.getpid()
    assert (rows[:, 1:] == 1).all()


def test_collate_keeps_pixels_in_either_memory_layout():
    torch.manual_seed(0)
    inner = [torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8).permute(2, 0, 1) for _ in range(4)]
    planar = [image.contiguous() for image in inner]
    for images in (inner, planar, inner[:2] + planar[2:], planar[:2] + inner[2:]):
        batch, labels, numbers = collate([(image, i, 10 + i) for i, image in enumerate(images)])
        assert batch.shape == (4, 3, 5, 7) and torch.equal(batch, torch.stack(planar))
        assert labels.tolist() == [0, 1, 2, 3] and numbers.tolist() == [10, 11, 12, 13]
    features = collate([(torch.ones(9), 0, 0), (torch.zeros(9), 1, 1)])[0]
    assert features.shape == (2, 9)


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_clear_line_in_the_main_process(tmp_path, workers):
    for i in range(8):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    dataset = ImageDataset(find_images(tmp_path), EvalTransform(16))
    path = dataset.files.paths[5]
    os.truncate(path, 45)
    with pytest.raises(UserError) as error:
        for _ in build_loader(dataset, EvalSampler(8), 4, workers):
            pass
    assert type(error.value) is BadImage
    text = str(error.value)
    assert text.startswith(path + ": ") and "--bad_images skip" in text
    assert "\n" not in text and "Traceback" not in text


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_flagged_from_workers(tmp_path, workers):
    for i in range(8):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"{i}.png")
    dataset = ImageDataset(find_images(tmp_path), EvalTransform(16), bad_images="skip")
    os.truncate(dataset.files.paths[5], 45)
    batches = list(build_loader(dataset, EvalSampler(8), 4, workers))
    assert torch.cat([batch[0][:, 0, 0, 0] for batch in batches]).tolist() == [0, 1, 2, 3, 4, 6, 6, 7]
    assert dataset.bad.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("ending", ["pass", "1 / 0", "sys.exit(3)"])
def test_a_process_ends_with_its_loader_still_in_use(folder, ending):
    """Workers ignore SIGTERM, by which multiprocessing would end them, and then wait for them for ever."""
    code = f"""
import argparse, sys
from util.data.dataset import build_pretrain_dataset
from util.data.sampler import EpochSampler
from util.data.loader import build_loader
dataset = build_pretrain_dataset(argparse.Namespace(data_path={str(folder)!r}, input_size=16))
loader = build_loader(dataset, EpochSampler(len(dataset), batch_size=2), 2, 2, drop_last=True)
batches = iter(loader)
next(batches)
{ending}
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert run.returncode == {"1 / 0": 1, "sys.exit(3)": 3}.get(ending, 0)
    assert [line for line in run.stderr.splitlines() if "Error" in line] == (
        ["ZeroDivisionError: division by zero"] if ending == "1 / 0" else []
    )


def test_shared_memory_that_is_too_small(folder, monkeypatch, capsys):
    """Fewer batches in advance, then fewer workers, in place of a bus error; the batches are the same."""
    space = namedtuple("Space", "free")
    dataset = dataset_of(folder)
    batch = 4 * 3 * 16 * 16

    def options(free_batches):
        monkeypatch.setattr(sampler_module.os.path, "isdir", lambda _: True)
        monkeypatch.setattr(sampler_module.shutil, "disk_usage", lambda _: space(int(free_batches * batch)))
        loader = build_loader(dataset, EpochSampler(29, batch_size=4), 4, 3)
        assert sum(len(labels) for _, labels, _ in loader) == 28
        return loader.num_workers, loader.prefetch_factor

    assert options(100) == options(8) == (3, 2) and options(7.9) == options(5) == (3, 1)
    assert not capsys.readouterr().err
    assert options(4.9) == (2, 1) and options(2.5) == options(0) == (0, None)
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 3 and all("--batch_size" in line for line in warned)
    assert "warning: --num_workers 3: 2 are used" in warned[0] and "3: 0 are used" in warned[2]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert options(8) == (2, 1)


def test_the_loader_starts_soon_with_many_files(tmp_path):
    """Preparing an epoch of a million samples takes well under a second."""
    start = time.perf_counter()
    sampler = EpochSampler(1_000_000, 8, 3, batch_size=64)
    sampler.set_epoch(1, 1000)
    assert next(iter(sampler))[0] == 1
    assert time.perf_counter() - start < 2
