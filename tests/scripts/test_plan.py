"""plan.py: what it finds in a folder, what it proposes, and that its command runs as printed."""

import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_utils import REPO
from image_utils import make_folder, picture
from PIL import Image, ImageEnhance

import main_finetune
import main_linprobe
import main_pretrain
import plan
from util.cli.parser import ArgumentParser
from util.data.find import find_images
from util.data.survey import duplicates, pixel_statistics, survey
from util.errors import UserError
from util.recipes.choose import choose, input_size, words

PARSERS = {
    "pretrain": main_pretrain.get_args_parser,
    "finetune": main_finetune.get_args_parser,
    "linprobe": main_linprobe.get_args_parser,
}


def run(*command, code: int = 0) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=REPO, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


def parse(get_args_parser, words):
    return ArgumentParser(parents=[get_args_parser()]).parse_args(words)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan") / "d"
    make_folder(root / "train", 60, classes=3, height=100, width=120)
    make_folder(root / "val", 12, classes=3, height=104, width=110)
    for path in (root / "val").rglob("*.jpg"):  # make_folder draws the same pictures again
        Image.fromarray(picture(500 + int(path.stem), 104, 110)).save(path, quality=92)
    return root


def surveys(root):
    return [survey(find_images(root, split, "skip any"), 20_000) for split in ("train", "val")]


def test_planted_duplicates_are_found_and_none_invented(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "d")
    files = sorted((root / "train").rglob("*.jpg"))
    expected = set()
    for number, source in enumerate(files[:20]):
        copy = root / ("train", "val")[number % 2] / source.parent.name / f"copy-{number}.jpg"
        image = Image.open(source)
        if number < 8:
            shutil.copy(source, copy)
        elif number < 12:
            image.save(copy, quality=60)
        elif number < 16:
            image.resize((96, 80), Image.Resampling.BICUBIC).save(copy, quality=85)
        else:
            ImageEnhance.Brightness(image).enhance(1.15).save(copy, quality=80)
        expected.add(frozenset((str(source), str(copy))))
    parts = surveys(root)
    exact, near = duplicates(parts)
    found = {frozenset(parts[s].path(n) for s, n in pair) for pair in exact + near}
    assert found == expected
    assert len(exact) == 8
    told = "\n".join(plan.describe(dict(zip(("train", "val"), parts, strict=True))))
    assert "the same file, ACROSS train and val, so that val looks too good: 4, as\n  " in told
    assert "nearly the same picture, within a split: 6" in told


def test_pictures_of_one_kind_are_no_duplicates(tmp_path):
    """As cells of solar modules: each differs from the others by less than photographs and copies do."""
    common = picture(0, 100, 120).astype(float)
    for number in range(1, 61):
        mixed = Image.fromarray(np.uint8(0.92 * common + 0.08 * picture(number, 100, 120)))
        mixed.save(tmp_path / f"{number:02d}.png")
    mixed.save(tmp_path / "copy.jpg", quality=70)
    part = survey(find_images(tmp_path), 100)
    exact, near = duplicates([part])
    names = [{Path(part.path(n)).name for _, n in pair} for pair in near]
    assert (exact, names) == ([], [{"60.png", "copy.jpg"}])


def test_what_is_wrong_is_named(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "d")
    broken = root / "train" / "c0" / "cut.jpg"
    broken.write_bytes((root / "train" / "c0" / "000.jpg").read_bytes()[:900])
    Image.new("RGB", (100, 100), (9, 9, 9)).save(root / "train" / "c1" / "flat.png")
    told = "\n".join(plan.describe(dict(zip(("train", "val"), surveys(root), strict=True))))
    assert "unreadable: 1" in told and "cut.jpg" in told
    assert "constant images: 1" in told
    assert "duplicates: none" in told


def test_statistics_are_those_of_the_pixels(tmp_path):
    for value in (51, 102, 153):
        path = tmp_path / "d" / f"{value}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (40, 40), value).save(path)
    found = survey(find_images(tmp_path / "d"), 100)
    assert {look.channels for look in found.good()} == {1}
    mean, std = pixel_statistics(found, 1, 32)
    assert mean == [0.4]  # of 0.2, 0.4, 0.6
    assert std == [0.163]  # sqrt(0.08 / 3)


def test_grey_stored_as_colour_is_one_channel(tmp_path):
    grey = Image.fromarray(picture(1, channels=1)[:, :, 0])
    grey.convert("RGB").save(tmp_path / "a.jpg", quality=95)
    assert survey(find_images(tmp_path), 10).good()[0].channels == 1


@pytest.mark.parametrize(
    "shape, gpu, expected",
    [
        ((480, 640), True, ((224, 224), 16)),
        ((480, 640), False, ((96, 96), 8)),
        ((28, 28), True, ((28, 28), 4)),
        ((32, 128), True, ((32, 128), 4)),
        ((900, 220), True, ((896, 224), 16)),
        ((9, 9), False, ((8, 8), 4)),
        ((300, 900), False, ((96, 288), 8)),
    ],
)
def test_input_sizes(shape, gpu, expected):
    size, patch = input_size(*shape, gpu)
    assert (size, patch) == expected
    assert size[0] % patch == size[1] % patch == 0


@pytest.mark.parametrize("images", [3, 40, 2_000, 50_000, 2_000_000])
@pytest.mark.parametrize("memory", [None, 8, 80])
def test_every_choice_is_a_command_that_the_script_takes(images, memory):
    flags, reasons = choose(images, (300, 400), 3, memory)
    args = parse(main_pretrain.get_args_parser, words(flags))
    main_pretrain.check_args(args)
    main_pretrain.build_model(args) if "large" not in args.model else None
    assert args.batch_size * args.accum_iter <= images
    assert 50 <= args.epochs <= 1600 and 0 < args.warmup_epochs < args.epochs
    assert any("effective batch" in reason for reason in reasons)


def test_a_recipe_file_stands_for_its_flags(tmp_path):
    recipe = tmp_path / "r.txt"
    recipe.write_text("# a comment\n--model mae_vit_tiny_patch16\n--mean 0.1 0.2 0.3\n--output_dir 'a b'\n\n")
    args = parse(main_pretrain.get_args_parser, [f"@{recipe}", "--epochs", "3"])
    assert (args.model, args.mean, args.output_dir, args.epochs) == (
        "mae_vit_tiny_patch16", [0.1, 0.2, 0.3], "a b", 3,
    )  # fmt: skip


def test_hours_of_a_run_and_epochs_that_fit():
    cost = {"start": 10.0, "step": 0.5, "turn": 1.0, "look": 4.0}
    flags = {"batch_size": 8, "epochs": 100, "warmup_epochs": 5, "vis_freq": 10, "save_freq": 10}
    expected = 10 + 100 * (6 * 0.5 + 1) + 11 * 4  # 50 images: 6 steps; looks after epochs 0, 10, ..., 90, 99
    assert plan.hours_of(flags, 50, cost) == pytest.approx(expected / 3600)
    assert plan.fit_hours(flags, 50, cost, 1) is None and flags["epochs"] == 100
    assert "100 were better" in plan.fit_hours(flags, 50, cost, 0.06)
    assert 0.05 < plan.hours_of(flags, 50, cost) <= 0.06
    assert flags["warmup_epochs"] == math.ceil(flags["epochs"] / 20)
    assert "--epochs 1:" in plan.fit_hours(flags, 50, cost, 0.001)
    assert flags["warmup_epochs"] == 0  # one epoch is no longer than its warm-up otherwise


@pytest.mark.parametrize("path", sorted((REPO / "recipes").glob("*_vit_*.txt")), ids=lambda path: path.stem)
def test_published_recipes(path):
    """Effective batches as published, on 8 processes; every flag is the script's."""
    kind = path.stem.split("_")[0]
    args = parse(PARSERS[kind], [f"@{path}"])
    effective = {"pretrain": 4096, "finetune": 1024, "linprobe": 16384}[kind]
    assert args.batch_size * args.accum_iter * 8 == effective
    assert path.stem.split("_")[-1] in args.model
    assert re.search(r"effective batch (\d+)", path.read_text())[1] == str(effective)


def test_the_page_without_a_trial(data, tmp_path, capsys):
    recipe = tmp_path / "recipe.txt"
    plan.main(
        parse(plan.get_args_parser, [str(data), "--no_trial", "--device", "cpu", "--write", str(recipe)])
    )
    told = capsys.readouterr().out
    printed = shlex.split(re.search(r"^python (main_pretrain.py .*)$", told, re.M)[1])
    taken = parse(main_pretrain.get_args_parser, printed[1:])
    assert vars(parse(main_pretrain.get_args_parser, [f"@{recipe}"])) == vars(taken)
    assert taken.input_size == 96 and taken.data_path == str(data)
    assert "train: 60 images in 3 classes" in told and "height x width: median 100 x 120" in told


@pytest.mark.parametrize(
    ("times", "window", "step"),
    [
        ([9.0, 9.0, 9.0, 1.0, 5.0, 1.0], 1, 1.0),  # later half, without what once took long
        ([9.0, 9.0, 9.0, 9.0, 1.0, 3.0, 1.0, 3.0, 1.0], 2, 2.0),  # every second micro-step has an update
        ([9.0, 1.0, 2.0], 4, 1.5),  # less than a window
    ],
)
def test_updates_are_part_of_the_time_of_a_micro_step(times, window, step):
    assert plan.step_time(times, window) == step


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], "DIR nowhere: does not exist"),
        (["nowhere", "--hours", "0"], "--hours 0.0: must be above 0"),
    ],
)
def test_bad_input_is_one_line(words, message):
    with pytest.raises(UserError) as error:
        plan.main(parse(plan.get_args_parser, words))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_more_bad_images_than_training_leaves_out_are_told_instead_of_a_command(tmp_path, capsys):
    make_folder(tmp_path / "d", 4)
    for name in "ab":
        (tmp_path / "d" / f"{name}.jpg").write_bytes(b"<html>")
    words = [tmp_path / "d", "--no_trial", "--device", "cpu"]
    with pytest.raises(
        UserError, match="2 files of train cannot be read, and --bad_images skip leaves out 1"
    ):
        plan.main(parse(plan.get_args_parser, [str(word) for word in words]))
    told = capsys.readouterr().out
    assert "unreadable: 2" in told and "Command" not in told
    (tmp_path / "d" / "a.jpg").unlink()  # one is left out
    plan.main(parse(plan.get_args_parser, [str(word) for word in words]))
    assert "--bad_images skip" in capsys.readouterr().out.partition("Command")[2]


@pytest.mark.slow
def test_the_printed_command_runs_and_costs_what_was_said(data, tmp_path):
    told = run("plan.py", data, "--device", "cpu", "--hours", "0.01").stdout
    command = shlex.split(re.search(r"^python (main_pretrain.py .*)$", told, re.M)[1])
    command = command[: command.index("--output_dir")]
    result = run(*command, "--output_dir", tmp_path / "out", "--log_dir", "")
    memory = float(re.findall(r"max mem: ([\d.]+) MB", result.stdout)[-1])
    said = float(re.search(r"([\d.]+) MB of memory", told)[1])
    assert said == pytest.approx(memory, rel=0.15)
    assert sorted((tmp_path / "out").glob("checkpoint-*.pth"))
