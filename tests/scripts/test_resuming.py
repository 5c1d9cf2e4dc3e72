"""What a resumed run must keep: data and settings by one table, in all scripts; the default folders."""

import argparse
import json
import os
import re
import shutil

import pytest
import torch
from golden_utils import REPO
from image_utils import make_folder
from test_main_pretrain import assert_same, names_in, run, weights
from transfer_utils import COMMON, given_args, make_pictures, vit_test

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
import models_vit
from util.data.find import PathList, find_images
from util.errors import UserError
from util.run import owner, recipe

SCRIPTS = [main_pretrain, main_finetune, main_linprobe, main_segment]
FLAGS = {action.dest for script in SCRIPTS for action in script.get_args_parser()._actions}
NUMBERS = re.compile(r'"run": "\w+"')


@pytest.fixture
def images(tmp_path):
    make_folder(tmp_path / "images" / "train", 13, classes=2)
    make_folder(tmp_path / "images" / "val", 5, classes=2)
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def content_of(path):
    return torch.load(path, weights_only=True)


def state_of_folder(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("[!.]*")}


def test_the_identity_of_a_run_is_in_its_checkpoints_and_its_log(images, out):
    run(images, out, "--save_freq", "1", "--max_steps", "4")  # ends inside the second epoch
    run(images, out, "--resume", "auto")
    ids = {json.loads(line)["run"] for line in (out / "log.txt").read_text().splitlines()}
    files = [content_of(out / f"checkpoint-{epoch}.pth")["run"] for epoch in (0, 1)]
    assert ids == {files[0]["id"]} and files[0] == files[1]
    assert files[0]["images"] == 13 and files[0]["files"] == find_images(images).paths.digest()
    run(images, out, "--epochs", "1")  # from nothing: another one
    assert content_of(out / "checkpoint-0.pth")["run"]["id"] not in ids
    assert len((out / "log.txt").read_text().splitlines()) == 3


def test_a5_main_gives_the_folder_back_however_it_ends(images, out, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(main_pretrain, "train_one_epoch", fail)
        run(images, out)
    for _ in range(2):
        assert "pid" not in owner.read_record(out)
        assert owner.filelock.FileLock(out / ".run.lock").acquire(timeout=0)  # released as it is forgotten
        run(images, out, "--epochs", "1")


def test_a8_a_fresh_run_killed_before_its_first_save_begins_anew(images, out, monkeypatch, capsys):
    run(images, out, "--epochs", "1")
    shutil.move(out / "checkpoint-0.pth", out / "checkpoint-99.pth")
    torch.save({**content_of(out / "checkpoint-99.pth"), "epoch": 99}, out / "checkpoint-99.pth")

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(main_pretrain, "train_one_epoch", kill)
        run(images, out, "--seed", "1")
    capsys.readouterr()
    run(images, out, "--seed", "1", "--resume", "auto", "--keep_checkpoints", "1")
    text = capsys.readouterr().out
    assert "no checkpoint of this run" in text and "starting from scratch" in text
    assert names_in(out) == ["checkpoint-1.pth", "checkpoint-99.pth", "log.txt"]
    run(images, out.with_name("whole"), "--seed", "1")
    assert_same(weights(out / "checkpoint-1.pth"), weights(out.with_name("whole") / "checkpoint-1.pth"))


def test_a9_other_images_are_an_error_inside_an_epoch_and_a_warning_at_its_end(images, out, capsys):
    flags = ("--epochs", "3", "--save_freq", "1", "--vis_freq", "1")
    run(images, out, *flags, "--max_steps", "4")
    shutil.copytree(images, images.with_name("moved"))
    for path in list((images / "train" / "c0").iterdir())[:4]:
        path.unlink()
    before = state_of_folder(out)
    with pytest.raises(UserError, match=r"inside an epoch, .*: images 13 -> 9; .*checkpoint-0\.pth\)"):
        run(images, out, *flags, "--resume", "auto")
    assert state_of_folder(out) == before
    capsys.readouterr()
    (out / "checkpoint-1-step1.pth").unlink()
    run(images, out.with_name("b"), *flags, "--resume", str(out / "checkpoint-0.pth"))
    assert "settings differ from the checkpoint's: images 13 -> 9" in capsys.readouterr().err
    moved = images.with_name("moved")  # as a whole: no change, whatever its name
    run(moved, out, *flags, "--resume", "auto", "--max_steps", "6")
    assert not capsys.readouterr().err
    (moved / "val" / "c0" / "000.jpg").rename(moved / "val" / "c0" / "renamed.jpg")
    run(moved, out, *flags, "--resume", "auto")
    assert "held-out images: 5 as before, but of other names" in capsys.readouterr().err


def test_a9_a_digest_knows_names_and_order_but_not_where_they_lie(tmp_path):
    one = PathList(["a/1.jpg", "b/2.jpg"], "/x").digest()
    assert PathList(["a/1.jpg", "b/2.jpg"], "/y/z").digest() == one
    for names in (["b/2.jpg", "a/1.jpg"], ["a/1.jpg"], ["a/1.jpg", "b/3.jpg"], ["a/1.jpgb/2.jpg"]):
        assert PathList(names).digest() != one
    lists = [[f"{root}/a/1.jpg", f"{root}/b/2.jpg"] for root in ("/x", "/longer/way", "")]
    assert {PathList(names).digest() for names in lists[:2]} == {one} != {PathList(lists[2]).digest()}
    assert PathList(["/x/a/1.jpg", "/x/a/2.jpg"]).digest() == PathList(["1.jpg", "2.jpg"]).digest()
    assert PathList(["/x/1.jpg", "y/2.jpg"]).digest() != PathList(["1.jpg", "y/2.jpg"]).digest()


def test_a10_every_flag_is_in_one_group():
    names = [name for group in recipe.GROUPS.values() for name in group.split()]
    assert len(names) == len(set(names)) and set(names) == FLAGS


def test_a10_the_page_has_the_table_word_for_word():
    page = (REPO / "PRETRAIN.md").read_text(encoding="utf-8")
    section = page.split("## Resuming\n")[1].split("\n## ")[0].replace("\n  ", " ")
    found = re.findall(r"^- (\w+) \((.*?)\): (.*)$", section, re.M)
    assert {group: rule for group, rule, _ in found} == recipe.RULES
    for group, _, flags in found:
        own = set(recipe.GROUPS[group].split())
        assert set(re.findall(r"`--(\w+)`", flags)) == (own if group != "machine" else set()), group
    assert "PRETRAIN.md#resuming" in (REPO / "FINETUNE.md").read_text(encoding="utf-8")


def other(value):
    """A value that is not `value`."""
    changes = {bool: lambda v: not v, str: lambda v: v + "x", list: lambda v: [*v, "x=1"]}
    return changes.get(type(value), lambda v: (v or 0) + 1)(value)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a10_one_rule_for_every_flag_of_every_script(script, capsys):
    saved = vars(script.get_args_parser().parse_args([])) | {"lr": 0.1, "decoder_embed_dim": 8}
    saved |= {"patch_size": 16, "decoder_depth": 1, "nb_classes": 2, "mean": (0.1, 0.2), "std": (0.1, 0.2)}
    group_of = {name: group for group, names in recipe.GROUPS.items() for name in names.split()}
    for name in saved.keys() - {"blr", "world_size"}:
        value = (0.3, 0.4) if name in ("mean", "std", "cutmix_minmax") else other(saved[name])
        value = 32 if name == "input_size" else value
        args = argparse.Namespace(**{**saved, name: value})
        for position in ({"epoch": 3}, {"epoch": 3, "step": 2}):
            content = {"optimizer": {}, "args": saved, **position}
            group = group_of[name]
            text = "effective batch" if name in ("batch_size", "accum_iter") else name
            if group == "model" or (group in ("data", "recipe") and "step" in position):
                with pytest.raises(UserError, match=f"{text} "):
                    recipe.check_changes(args, content, "x.pth", {})
            else:
                recipe.check_changes(args, content, "x.pth", {})
                err, warned = capsys.readouterr().err, group != "machine"
                assert (f"checkpoint's: {text} " in err) == warned and err.count("\n") == warned


def test_a10_what_is_the_same_in_other_words_is_no_change(capsys):
    saved = {"mean": [0.5, 0.5, 0.5], "input_size": (32, 32), "patch_size": None, "mixup": 0, "blr": 1e-3}
    saved |= {"batch_size": 8, "accum_iter": 2, "world_size": 1, "lr": 0.1, "model": "m", "data_path": "a"}
    own = {"mean": (0.5,), "input_size": 32, "patch_size": 8, "mixup": 0.0, "blr": None, "fork": 1}
    own |= {"batch_size": 4, "accum_iter": 2, "world_size": 2, "lr": 0.1, "model": "m", "data_path": "b"}
    listing = {"images": 3, "files": "x"}
    content = {"optimizer": {}, "args": saved, "epoch": 1, "step": 1, "run": {"id": "i", **listing}}
    recipe.check_changes(argparse.Namespace(**own), content, "x.pth", listing)
    assert not capsys.readouterr().err
    hostile = {"optimizer": {}, "epoch": 1, "args": {"lr": "x" * 10**6, "seed": torch.ones(3)}, "run": 5}
    recipe.check_changes(argparse.Namespace(lr=0.1, seed=0), hostile, "x.pth", listing)
    assert len(capsys.readouterr().err) < 400


def test_a16_a_finished_run_with_other_data_or_recipe_says_how_to_go_on(images, out, capsys):
    run(images, out, "--epochs", "1", "--vis_freq", "1")
    before = state_of_folder(out)
    for flags in (("--lr", "0.5"), ("--clip_grad", "1")):
        with pytest.raises(UserError, match=r"is complete, .* differs: .*; to train on, pass more --epochs"):
            run(images, out, "--epochs", "1", "--resume", "auto", "--vis_freq", "1", *flags)
    picture = images / "val" / "c0" / "000.jpg"
    picture.rename(images / "000.jpg")
    with pytest.raises(UserError, match="held-out images 5 -> 4"):
        run(images, out, "--epochs", "1", "--vis_freq", "1", "--resume", "auto", "--log_dir", str(out / "tb"))
    assert state_of_folder(out) == before and not (out / "tb").exists()
    (images / "000.jpg").rename(picture)
    capsys.readouterr()
    run(images, out, "--epochs", "1", "--vis_freq", "1", "--resume", "auto")
    assert "complete: nothing left to do" in capsys.readouterr().out
    assert state_of_folder(out).keys() == before.keys()
    assert [line["epoch"] for line in run(images, out, "--epochs", "2", "--resume", "auto")] == [0, 1]
    with pytest.raises(UserError, match="start_epoch 2 -> 1"):
        run(images, out, "--epochs", "2", "--resume", "auto", "--start_epoch", "1")


def test_a16_a_finished_run_may_end_its_measurements_on_other_processes(capsys):
    saved = {"batch_size": 4, "accum_iter": 1, "world_size": 2, "lr": 1e-3 * 8 / 256, "blr": 1e-3}
    content = {"optimizer": {}, "args": saved, "epoch": 1}
    for lr in (1e-3 * 4 / 256, saved["lr"]):
        own = argparse.Namespace(**saved | {"world_size": 1, "lr": lr})
        recipe.check_changes(own, content, "x", {}, True)
    assert not capsys.readouterr().err
    for change in ({"lr": 1e-3}, {"batch_size": 8}):
        with pytest.raises(UserError, match="is complete"):
            recipe.check_changes(argparse.Namespace(**saved | change), content, "x", {}, True)


def test_b11_the_references_chain_of_commands_with_default_folders(tmp_path, monkeypatch):
    monkeypatch.setitem(models_vit.MODELS, "vit_test", vit_test)
    monkeypatch.chdir(tmp_path)
    data = make_pictures(tmp_path / "data", per_class=4)
    pretrain = "--model mae_vit_tiny_patch16 --input_size 32 --patch_size 8 --decoder_depth 1 --epochs 1"
    last = "--batch_size 4 --warmup_epochs 0 --num_workers 0 --device cpu --data_path"
    main_pretrain.main(given_args(main_pretrain, [*pretrain.split(), *last.split(), str(data)]))
    start, before = "output_dir/checkpoint-0.pth", state_of_folder(tmp_path / "output_dir")
    words = f"{COMMON} --model vit_tiny_patch16 --patch_size 8 --epochs 1 --finetune {start} {last}"
    for script, folder in ((main_finetune, "output_finetune"), (main_linprobe, "output_linprobe")):
        for resume in ([], ["--resume", "auto"]):
            script.main(given_args(script, [*words.split(), str(data), *resume]))
        there = os.listdir(folder)
        assert {"checkpoint-0.pth", "checkpoint-best.pth", "log.txt"} <= set(there)
        assert any(name.startswith("events.") for name in there)
    assert state_of_folder(tmp_path / "output_dir") == before
    args = main_finetune.get_args_parser().parse_args([])
    assert args.output_dir == args.log_dir == "./output_finetune"
    assert main_pretrain.get_args_parser().get_default("output_dir") == "./output_dir"
