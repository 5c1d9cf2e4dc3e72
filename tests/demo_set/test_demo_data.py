"""The built-in demo set: complete, the same each time, safe against kills and races, worth learning from."""

import errno
import io
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from util.demo_set import files
from util.demo_set.files import CLASSES, announce_demo_data, ensure_demo_data
from util.demo_set.scene import encode, render
from util.demo_set.shapes import FAMILIES
from util.errors import UserError

REPOSITORY = Path(files.__file__).resolve().parents[2]


def pictures(root) -> dict[str, bytes]:
    """Bytes of every JPEG below `root`, by relative path."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}


def command(root, train, val) -> list[str]:
    return [sys.executable, "-m", "util.demo_set.files", str(root), "--counts", str(train), str(val)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A set of 3 + 2 pictures a class, drawn by two processes, and the lines logged."""
    lines = []
    root = ensure_demo_data(tmp_path_factory.mktemp("demo") / "set", lines.append, train=3, val=2, workers=2)
    return root, lines


def test_is_an_image_folder_of_varied_jpegs(small):
    root, lines = small
    assert sorted(path.name for path in root.iterdir()) == [".mae_demo_set.json", "train", "val"]
    assert not list(root.parent.glob("set.*"))
    sizes = set()
    for split, count in (("train", 3), ("val", 2)):
        assert sorted(path.name for path in (root / split).iterdir()) == list(CLASSES)
        for name in CLASSES:
            files = sorted((root / split / name).iterdir())
            assert [f.name for f in files] == [f"{name}_{n:04d}.jpg" for n in range(count)]
            for file in files:
                with Image.open(file) as image:
                    assert image.format == "JPEG" and image.mode == "RGB"
                    image.load()
                    sizes.add(image.size)
    assert tuple(sorted(FAMILIES)) == CLASSES and len(CLASSES) == 10 and len(sizes) > 20
    assert all(96 <= side <= 160 for size in sizes for side in size)
    assert sum(width != height for width, height in sizes) > len(sizes) / 2
    assert len(lines) == 1 and "50 pictures" in lines[0] and str(root) in lines[0]


def test_default_set_is_large_enough():
    assert len(CLASSES) * files.TRAIN >= 2000 and len(CLASSES) * files.VAL >= 500


def test_same_bytes_for_any_number_of_processes_and_pictures(small, tmp_path):
    root, _ = small
    again = ensure_demo_data(tmp_path / "again", train=2, val=2, workers=1)
    expected = {path: data for path, data in pictures(root).items() if not path.endswith("_0002.jpg")}
    assert pictures(again) == expected
    assert len(set(pictures(root).values())) == 50  # no two alike, in train and val together


def test_complete_set_is_not_made_again(small):
    root, _ = small
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert ensure_demo_data(root, pytest.fail, train=3, val=2) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_is_made_again_when_the_generator_changed_or_pictures_are_missing(tmp_path, monkeypatch):
    root = ensure_demo_data(tmp_path / "set", train=1, val=1, workers=1)
    first = pictures(root)
    (root / "val" / "star" / "star_0000.jpg").unlink()
    assert pictures(ensure_demo_data(root, train=1, val=1, workers=1)) == first
    (root / "train" / "tree" / "tree_0000.jpg").write_bytes(b"")
    assert pictures(ensure_demo_data(root, train=1, val=1, workers=1)) == first
    monkeypatch.setattr(files, "VERSION", files.VERSION + 1)
    changed = pictures(ensure_demo_data(root, train=1, val=1, workers=1))
    assert changed.keys() == first.keys() and all(changed[path] != first[path] for path in first)
    assert json.loads((root / ".mae_demo_set.json").read_text())["version"] == files.VERSION
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_half_way_is_made_again(tmp_path):
    root = tmp_path / "set"
    process = subprocess.Popen(command(root, 500, 500), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("*.jpg")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert not root.exists() and list(tmp_path.glob("set.*.tmp"))
    ensure_demo_data(root, train=1, val=1, workers=1)
    assert len(pictures(root)) == 20
    deadline = time.monotonic() + 20  # orphaned drawing processes end by themselves
    while list(tmp_path.glob("set.*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_processes_at_once_share_one_set(tmp_path):
    root = tmp_path / "set"
    running = [
        subprocess.Popen(command(root, 2, 1), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    if os.name != "nt":
        assert sum("making" in output for output in outputs) == 1  # the others waited for it
    assert len(pictures(root)) == 30 and [path.name for path in tmp_path.iterdir()] == ["set"]


def test_makers_without_locks_all_end_with_a_good_set(small, tmp_path):
    root, errors = tmp_path / "set", []
    stamp = {"version": files.VERSION, "train": 1, "val": 1, "classes": list(CLASSES)}

    def make():
        try:
            files.make(root, stamp, workers=1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and files.is_complete(root, stamp)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    reference = pictures(small[0])
    assert all(reference[path] == data for path, data in pictures(root).items())


def test_only_old_work_folders_are_removed_without_the_lock(tmp_path):
    fresh, old = tmp_path / "set.1-aaaaaaaa.tmp", tmp_path / "set.2-bbbbbbbb.tmp"
    for path in (fresh, old, tmp_path / "set.mine.tmp", tmp_path / "sets.3-cccccccc.tmp"):
        path.mkdir()
    os.utime(old, (0, time.time() - files.OLD_AFTER_S - 60))
    files.remove_leftovers(tmp_path / "set", locked=False)
    assert fresh.exists() and not old.exists()
    files.remove_leftovers(tmp_path / "set", locked=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.mine.tmp", "sets.3-cccccccc.tmp"]


@pytest.mark.parametrize("executable", ["", "/nonexistent/python", "/bin/false"])
def test_works_where_processes_fail(executable, small, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", executable)
    root = ensure_demo_data(tmp_path / "set", train=1, val=1, workers=2)
    reference = pictures(small[0])
    assert len(pictures(root)) == 20
    assert all(reference[path] == data for path, data in pictures(root).items())


def test_works_in_a_daemonic_process(tmp_path):
    arguments = (tmp_path / "set", None, 1, 1, 2)
    process = multiprocessing.get_context("spawn").Process(
        target=ensure_demo_data, args=arguments, daemon=True
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0 and len(pictures(tmp_path / "set")) == 20


def test_foreign_folder_is_left_alone(tmp_path):
    mine = tmp_path / "holiday"
    mine.mkdir()
    (mine / "me.jpg").write_bytes(b"precious")
    with pytest.raises(UserError, match="holds something else") as caught:
        ensure_demo_data(mine, train=1, val=1)
    assert str(mine) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["holiday", "me.jpg"]
    with pytest.raises(UserError, match="holds something else"):
        ensure_demo_data(mine / "me.jpg", train=1, val=1)
    (tmp_path / "empty").mkdir()
    assert len(pictures(ensure_demo_data(tmp_path / "empty", train=1, val=1, workers=1))) == 20


def test_unwritable_place_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "set"
    result = subprocess.run(command(root, 1, 1), cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert str(root) in result.stderr and "--data_path" in result.stderr and "MAE_DEMO_DATA" in result.stderr


def test_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "draw", full)
    with pytest.raises(UserError, match=r"cannot make the demo set.*No space left"):
        ensure_demo_data(tmp_path / "set", train=1, val=1, workers=1)
    assert not list(tmp_path.iterdir())


def test_place_is_the_repository_or_the_environment_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("MAE_DEMO_DATA", raising=False)
    assert files.demo_root() == REPOSITORY / "demo_data"
    monkeypatch.setenv("MAE_DEMO_DATA", str(tmp_path / "elsewhere"))
    root = ensure_demo_data(train=1, val=1, workers=1)
    assert root == (tmp_path / "elsewhere").resolve() and len(pictures(root)) == 20


def test_announcement_is_one_line(tmp_path):
    lines = []
    announce_demo_data(tmp_path, lines.append)
    assert len(lines) == 1 and "\n" not in lines[0]
    assert str(tmp_path) in lines[0] and "--data_path DIR" in lines[0]


def test_pictures_have_structure_at_several_scales():
    near, far, spread = [], [], []
    for n in range(30):
        rng = np.random.default_rng([9, n])
        picture = render(CLASSES[n % 10], rng)
        decoded = np.asarray(Image.open(io.BytesIO(encode(picture, rng))))
        assert decoded.shape == picture.shape and picture.dtype == np.uint8
        grey = decoded.mean(2)
        near.append(np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())[0, 1])
        far.append(np.corrcoef(grey[:, 12:].ravel(), grey[:, :-12].ravel())[0, 1])
        spread.append(grey.std())
    assert np.mean(near) > 0.85  # as in photographs: neighbours agree,
    assert 0.05 < np.mean(far) < 0.7  # a patch further there is less in common,
    assert min(spread) > 5 and np.std(spread) > 5  # and contrast varies


def load(root, split, size) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (N, 3, size, size) float32 in [0, 1] and labels (N,)."""
    files = sorted((root / split).rglob("*.jpg"))
    images = [np.asarray(Image.open(f).resize((size, size), Image.Resampling.BICUBIC)) for f in files]
    labels = torch.tensor([CLASSES.index(f.parent.name) for f in files])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255, labels


def edge_histograms(images, cell=8, bins=9) -> torch.Tensor:
    """Histograms of oriented gradients (N, bins * cells), normalised per cell."""
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    dx, dy = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    bin_of = ((torch.atan2(dy, dx) % torch.pi) / torch.pi * bins).long().clamp(max=bins - 1)
    empty = torch.zeros(len(images), bins, *images.shape[2:])
    histogram = F.avg_pool2d(empty.scatter_(1, bin_of, torch.hypot(dx, dy)), cell)
    return (histogram / (histogram.norm(dim=1, keepdim=True) + 0.01)).flatten(1)


def linear_probe(train, train_labels, val, val_labels) -> float:
    """Best accuracy on val, over ridge strengths, of a linear classifier fitted to one-hot targets."""
    mean, std = train.mean(0), train.std(0) + 1e-3
    train, val = ((features - mean).div(std).double() for features in (train, val))
    gram, targets = train @ train.T, F.one_hot(train_labels, 10).double() - 0.1
    accuracies = []
    for strength in (1e-3, 1e-2, 0.1, 1.0, 10.0):
        weights = torch.linalg.solve(gram + strength * train.shape[1] * torch.eye(len(train)), targets)
        predictions = (val @ train.T @ weights).argmax(1)
        accuracies.append((predictions == val_labels).double().mean().item())
    return max(accuracies)


def test_raw_pixels_are_a_poor_feature_and_edges_a_better_one(tmp_path):
    root = ensure_demo_data(tmp_path / "set", train=20, val=12)
    (train, train_labels), (val, val_labels) = load(root, "train", 64), load(root, "val", 64)
    raw = linear_probe(train.flatten(1), train_labels, val.flatten(1), val_labels)
    small = [F.interpolate(images, 32, mode="area").flatten(1) for images in (train, val)]
    raw_small = linear_probe(small[0], train_labels, small[1], val_labels)
    edges = linear_probe(edge_histograms(train), train_labels, edge_histograms(val), val_labels)
    print(f"raw 64 px {raw:.3f}, raw 32 px {raw_small:.3f}, edges {edges:.3f}")
    assert max(raw, raw_small) < 0.3  # chance is 0.1
    assert edges > max(raw, raw_small) + 0.2


@pytest.mark.slow
def test_full_set_defeats_raw_pixels_but_a_small_network_learns_it(tmp_path):
    start = time.monotonic()
    root = ensure_demo_data(tmp_path / "set")
    print(f"made in {time.monotonic() - start:.1f} s")
    (train, train_labels), (val, val_labels) = load(root, "train", 48), load(root, "val", 48)
    raw = linear_probe(train.flatten(1), train_labels, val.flatten(1), val_labels)
    assert raw < 0.3
    torch.manual_seed(0)
    blocks, width = [], 3
    for out in (24, 48, 96, 128):
        blocks += [torch.nn.Conv2d(width, out, 3, padding=1, bias=False), torch.nn.BatchNorm2d(out)]
        blocks += [torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        width = out
    net = torch.nn.Sequential(
        *blocks, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 10)
    )
    steps, batch = 20 * (len(train) // 64), 64
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(train), (batch,))
        images = train[chosen].flip(3) if torch.rand(()) < 0.5 else train[chosen]
        shift = torch.randint(-6, 7, (2,)).tolist()
        loss = F.cross_entropy(net(torch.roll(images, shift, (2, 3)) * 4 - 2), train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        accuracy = (net.eval()(val * 4 - 2).argmax(1) == val_labels).float().mean().item()
    print(f"raw pixels {raw:.3f}, small network {accuracy:.3f}")
    assert accuracy > 0.7
