"""main_finetune.py: flags, files, exact resume, evaluation without repeated flags, bad input."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_utils import GOLDEN, REPO
from PIL import Image
from transfer_utils import (
    given_args,
    make_mae,
    make_pictures,
    read_log,
    released_files,
    run,
    same_state,
    state_of,
    vit_test,
)

import main_finetune
import main_linprobe
import models_vit
from util.errors import UserError
from util.processes import signals
from util.recipes import epoch_end
from util.run.checkpoint import finish_saving
from util.weights.describe import read_model_info

RECIPE = "--batch_size 6 --epochs 2 --warmup_epochs 1 --blr 0.05 --drop_path 0.2"
RECIPE += " --mixup 0.8 --cutmix 1.0 --clip_grad 5"
NOT_THE_REFERENCES = {"data_path", "device", "num_workers", "nb_classes", "output_dir", "log_dir"}


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setitem(models_vit.MODELS, "vit_test", vit_test)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A finished run's folder."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models_vit.MODELS, "vit_test", vit_test)
        run(main_finetune, RECIPE, data_path=pictures, output_dir=out, log_dir=out)
    return out


def test_every_flag_of_the_reference_with_its_default():
    args = main_finetune.get_args_parser().parse_args([])
    for flag in json.loads((GOLDEN / "cli.json").read_text())["main_finetune.py"]:
        assert hasattr(args, flag["dest"]), flag
        if flag["dest"] not in NOT_THE_REFERENCES:
            assert getattr(args, flag["dest"]) == flag["default"], flag
        words = flag["flags"][:1] + (["1"] if flag["takes_value"] and flag["dest"] not in ("model",) else [])
        if flag["dest"] not in ("model", "mixup_mode"):
            main_finetune.get_args_parser().parse_args(words)
    assert main_finetune.get_args_parser().parse_args(["--data", "x"]).data_path == "x"


def test_files_of_a_run(trained):
    names = {path.name for path in trained.iterdir()}
    assert {
        "checkpoint-0.pth",
        "checkpoint-1.pth",
        "checkpoint-best.pth",
        "log.txt",
        "per_class.txt",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    records = read_log(trained)
    expected = {"train_lr", "train_loss", "test_acc1", "test_acc5", "test_loss", "epoch", "n_parameters"}
    assert len(records) == 2 and all(expected <= set(record) for record in records)
    content = torch.load(trained / "checkpoint-1.pth", weights_only=True)
    assert {"model", "optimizer", "epoch", "scaler", "args"} <= set(content) and content["epoch"] == 1
    info = content["model_info"]
    assert info["class_names"] == ["bright", "dark", "red"] and info["nb_classes"] == 3
    assert info["global_pool"] is True and info["input_size"] == (32, 32) and info["patch_size"] == 8
    assert info["mean"] == (0.485, 0.456, 0.406) and info["model"] == "vit_test"
    assert Image.open(trained / "confusion.png").size[0] >= 320


def test_best_checkpoint_is_the_best_epochs(pictures, tmp_path):
    run(main_finetune, RECIPE, "--epochs 4 --keep_checkpoints 1", data_path=pictures, output_dir=tmp_path)
    accuracies = [record["test_acc1"] for record in read_log(tmp_path)]
    best = torch.load(tmp_path / "checkpoint-best.pth", weights_only=True)
    assert best["epoch"] == accuracies.index(max(accuracies)) and best["best_acc1"] == max(accuracies)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["checkpoint-3.pth", "checkpoint-best.pth"]


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_inside_an_epoch_and_resumed_is_undisturbed(pictures, trained, tmp_path, workers):
    """Mixup, RandAugment, erasing and drop path all draw from positions, not from history."""
    flags = f"{RECIPE} --num_workers {workers}"
    for max_steps in (2, 3, 6):  # inside epoch 0, inside it again, inside epoch 1 (4 steps an epoch)
        run(
            main_finetune,
            flags,
            f"--resume auto --max_steps {max_steps}",
            data_path=pictures,
            output_dir=tmp_path,
        )
    run(main_finetune, flags, "--resume auto", data_path=pictures, output_dir=tmp_path)
    ours = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)
    theirs = torch.load(trained / "checkpoint-1.pth", weights_only=True)
    assert same_state(ours["model"], theirs["model"])
    for a, b in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert ours["best_acc1"] == theirs["best_acc1"]
    keys = ("test_acc1", "test_acc5", "test_loss")
    assert [read_log(tmp_path)[-1][k] for k in keys] == [read_log(trained)[-1][k] for k in keys]
    assert same_state(state_of(tmp_path / "checkpoint-best.pth"), state_of(trained / "checkpoint-best.pth"))


@pytest.mark.parametrize("batch", [1, 3, None])
def test_signal_inside_and_at_the_end_of_an_epoch(pictures, trained, tmp_path, monkeypatch, batch):
    """The run saves and leaves; resumed, it ends as the undisturbed one, evaluations included.

    The signal comes with that batch of the first epoch, or (None) during its evaluation.
    """

    class Loader:
        def __init__(self, loader):
            self.loader, self.sampler, self.batch_size = loader, loader.sampler, loader.batch_size

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for i, item in enumerate(self.loader):
                if i == batch:
                    signal.raise_signal(signal.SIGTERM)
                yield item

    original = main_finetune.train_one_epoch

    def train_one_epoch(model, criterion, loader, *rest):
        return original(model, criterion, Loader(loader), *rest)

    evaluate = epoch_end.evaluate_and_report

    def evaluate_and_report(*rest):
        if batch is None:  # however it ends, the epoch is on disk
            finish_saving()
            assert (tmp_path / "checkpoint-0.pth").exists() and not (tmp_path / "log.txt").exists()
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*rest)

    with monkeypatch.context() as patch, pytest.raises(signals.Interrupted, match="SIGTERM"):
        patch.setattr(main_finetune, "train_one_epoch", train_one_epoch)
        patch.setattr(epoch_end, "evaluate_and_report", evaluate_and_report)
        run(main_finetune, RECIPE, data_path=pictures, output_dir=tmp_path)
    signals.clear()
    names = {path.name for path in tmp_path.glob("*.pth")}
    saved = {1: {"checkpoint-0-step2.pth"}, 3: {"checkpoint-0.pth"}}
    assert names == saved.get(batch, {"checkpoint-0.pth", "checkpoint-best.pth"})
    assert (tmp_path / "log.txt").exists() == (batch is None)
    run(main_finetune, RECIPE, "--resume auto", data_path=pictures, output_dir=tmp_path)
    signals.clear()
    assert same_state(state_of(tmp_path / "checkpoint-1.pth"), state_of(trained / "checkpoint-1.pth"))
    stored = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)["args"]
    assert os.path.basename(stored["resume"]) in names  # the file that "auto" found
    ours, theirs = read_log(tmp_path), read_log(trained)
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert a == b


@pytest.mark.parametrize("script", [main_finetune, main_linprobe])
@pytest.mark.parametrize("resume", ["auto", "FILE", "--eval"])
def test_a_checkpoint_is_read_once(pictures, tmp_path, monkeypatch, script, resume):
    flags = "--batch_size 12 --epochs 2 --max_steps 2"
    run(script, flags, data_path=pictures, output_dir=tmp_path)
    reads, load = [], torch.load

    def counting(path, *rest, **named):
        reads.append(os.path.basename(path))
        return load(path, *rest, **named)

    monkeypatch.setattr(torch, "load", counting)
    file = "auto" if resume == "auto" else tmp_path / "checkpoint-0.pth"
    eval_flag = resume if resume == "--eval" else ""
    run(script, "--batch_size 12 --epochs 2", eval_flag, resume=file, data_path=pictures, output_dir=tmp_path)
    assert reads == ["checkpoint-0.pth"]


def test_killed_before_the_best_checkpoint_was_written(pictures, trained, tmp_path):
    """The log line may be faster than the file: the epoch is evaluated and logged again."""
    shutil.copytree(trained, tmp_path / "run")
    content = torch.load(trained / "checkpoint-1.pth", weights_only=True)
    first = read_log(trained)[0]["test_acc1"]
    content["best_acc1"] = first
    del content["evaluated"]
    torch.save(content, tmp_path / "run" / "checkpoint-1.pth")
    (tmp_path / "run" / "checkpoint-best.pth").unlink()
    run(main_finetune, RECIPE, "--resume auto", data_path=pictures, output_dir=tmp_path / "run")
    assert read_log(tmp_path / "run") == read_log(trained)
    best = tmp_path / "run" / "checkpoint-best.pth"
    assert best.exists() == (read_log(trained)[1]["test_acc1"] > first)


def test_evaluation_needs_no_flags_and_gives_the_same_digits(pictures, trained, tmp_path, capsys):
    flags = ["--eval", "--resume", str(trained / "checkpoint-1.pth"), "--data_path", str(pictures)]
    flags += ["--num_workers", "0", "--batch_size", "5", "--save_predictions", "--output_dir", str(tmp_path)]
    main_finetune.main(given_args(main_finetune, flags))
    final = read_log(trained)[-1]
    line = f"* Acc@1 {final['test_acc1']:.3f} Acc@5 {final['test_acc5']:.3f} loss {final['test_loss']:.3f}"
    out = capsys.readouterr().out
    assert out.strip().endswith(line)
    assert (tmp_path / "per_class.txt").read_text() in out
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 24 and [os.path.exists(row["path"]) for row in rows] == [True] * 24
    assert 100 * np.mean([int(row["correct"]) for row in rows]) == pytest.approx(final["test_acc1"])
    # Six decimals are written: 5e-7
    assert np.mean([float(row["loss"]) for row in rows]) == pytest.approx(final["test_loss"], abs=1e-6)
    assert not (tmp_path / "log.txt").exists()


def test_logits_survive_saving_and_loading(trained):
    content = torch.load(trained / "checkpoint-1.pth", weights_only=True)
    info = read_model_info(content)
    model = vit_test(global_pool=info["global_pool"], num_classes=info["nb_classes"])
    model.load_state_dict(content["model"])
    torch.save({"model": model.state_dict()}, trained / "again.pth")
    other = vit_test(global_pool=True, num_classes=3)
    other.load_state_dict(torch.load(trained / "again.pth", weights_only=True)["model"])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), other.eval()(images))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cls_token", "the class token was given, but .* was trained with global pooling"),
        ("--input_size 64", "--input_size: 64x64 was given, but .* was trained with 32x32"),
        ("--patch_size 16", "--patch_size: 16 was given, but .* was trained with 8"),
        ("--in_chans 1", "--in_chans: 1 was given"),
        ("--nb_classes 1000", "--nb_classes: 1000 was given, but .* was trained with 3"),
        ("--mean 0.5", "--mean: .*0.5.* was given"),
        ("--model vit_base_patch16", "--model: vit_base_patch16 was given, but .* was trained with vit_test"),
    ],
)
def test_evaluation_with_a_contradicting_flag(pictures, trained, flags, message):
    resume = ["--eval", "--resume", str(trained / "checkpoint-1.pth"), "--data_path", str(pictures)]
    with pytest.raises(UserError, match=message):
        main_finetune.main(given_args(main_finetune, [*resume, *flags.split()]))


def test_agreeing_flags_are_no_contradiction(pictures, trained, tmp_path):
    flags = "--eval --global_pool --patch_size 8 --in_chans 3 --nb_classes 3 --mean 0.485 0.456 0.406"
    run(main_finetune, flags, resume=trained / "checkpoint-1.pth", data_path=pictures, output_dir=tmp_path)


@pytest.mark.parametrize("kind", ["encoder", "full", "finetuned"])
@pytest.mark.parametrize("pooling", ["--global_pool", "--cls_token"])
def test_released_layouts_start_fine_tuning(pictures, tmp_path, kind, pooling, capsys):
    path = released_files(tmp_path)[kind]
    flags = f"--batch_size 24 --epochs 1 {pooling} --lr 0"
    run(main_finetune, flags, finetune=path, data_path=pictures, output_dir=tmp_path / "out")
    assert "unexpected keys, not used" in capsys.readouterr().out
    state, source = state_of(tmp_path / "out" / "checkpoint-0.pth"), state_of(path)
    for key in source:  # nothing was trained: the encoder is the file's
        if key in state and not key.startswith("head."):
            assert torch.equal(state[key], source[key]), key
    assert state["head.weight"].shape == (3, 24) and 0 < state["head.weight"].std() < 3e-5
    assert ("fc_norm.weight" in state) == (pooling == "--global_pool")


def test_released_fine_tuned_file_evaluates_without_flags(tmp_path, capsys):
    classes = [f"class{i}" for i in range(9)]
    rs = np.random.RandomState(0)
    for name in classes:
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        Image.fromarray(rs.randint(0, 256, (40, 40, 3), dtype=np.uint8)).save(
            tmp_path / "data/val" / name / "0.png"
        )
    path = released_files(tmp_path)["finetuned"]
    flags = ["--eval", "--resume", str(path), "--data_path", str(tmp_path / "data"), "--num_workers", "0"]
    main_finetune.main(given_args(main_finetune, [*flags, "--output_dir", str(tmp_path)]))
    assert re.search(r"^\* Acc@1 \d", capsys.readouterr().out, re.M)


def test_interpolates_to_another_size(pictures, tmp_path, capsys):
    torch.save({"model": make_mae().state_dict(), "args": {"input_size": 32}}, tmp_path / "mae.pth")
    flags = "--batch_size 24 --epochs 1 --input_size 32x48"
    run(main_finetune, flags, finetune=tmp_path / "mae.pth", data_path=pictures, output_dir=tmp_path)
    assert "position table: 4x4 patches, resized to 4x6" in capsys.readouterr().out
    assert state_of(tmp_path / "checkpoint-0.pth")["pos_embed"].shape == (1, 25, 24)


@pytest.mark.parametrize(
    ("number", "frozen"),
    [
        ("0", ["blocks.1.mlp.fc2.weight", "fc_norm.weight"]),
        ("0.5", ["blocks.1.attn.qkv.weight"]),
        ("1", ["blocks.0.mlp.fc1.weight"]),
    ],
)
def test_partial_fine_tuning(pictures, tmp_path, number, frozen):
    torch.save({"model": make_mae().state_dict()}, tmp_path / "mae.pth")
    flags = f"--batch_size 8 --epochs 1 --warmup_epochs 0 --blr 1 --trainable_blocks {number}"
    run(main_finetune, flags, finetune=tmp_path / "mae.pth", data_path=pictures, output_dir=tmp_path)
    state, start = state_of(tmp_path / "checkpoint-0.pth"), state_of(tmp_path / "mae.pth")
    same = {key for key in state if key in start and torch.equal(state[key], start[key])}
    assert (
        {k for k in frozen if k in start} <= same
        and "pos_embed" in same
        and "patch_embed.proj.weight" in same
    )
    assert ("blocks.1.mlp.fc2.weight" in same) == (number == "0")


def test_learns(pictures, tmp_path):
    flags = "--batch_size 12 --epochs 8 --warmup_epochs 1 --blr 0.05 --aa= --reprob 0 --smoothing 0"
    run(main_finetune, flags, data_path=pictures, output_dir=tmp_path)
    assert read_log(tmp_path)[-1]["test_acc1"] > 80


@pytest.mark.slow  # `test_evaluation.py` has a quick one
@pytest.mark.parametrize("command", ["torchrun"])
def test_evaluation_on_two_processes(pictures, tmp_path, command):
    torch.manual_seed(0)
    model = models_vit.vit_tiny_patch16(img_size=32, num_classes=3, global_pool=True)
    torch.nn.init.normal_(model.head.weight)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")

    def evaluate(processes, batch_size, out):
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        flags = [
            "--eval",
            "--resume",
            str(tmp_path / "a.pth"),
            "--data_path",
            str(pictures),
            "--num_workers",
            "0",
        ]
        flags += [
            "--batch_size",
            str(batch_size),
            "--output_dir",
            str(out),
            "--save_predictions",
            "--device",
            "cpu",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*start, str(REPO / "main_finetune.py"), *flags], capture_output=True, text=True, env=environment,
            timeout=240, cwd=REPO,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return re.search(r"^\* Acc@1.*$", done.stdout, re.M)[0], (out / "predictions.csv").read_text()

    assert evaluate(2, 7, tmp_path / "two") == evaluate(1, 64, tmp_path / "one")


def test_exit_code_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(REPO / "main_finetune.py"), "--data_path", str(tmp_path / "nothing")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "does not exist" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "output_dir").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_size 5 --mixup 0.8", "--batch_size 5: mixup and cutmix pair images"),
        ("--batch_size 7 --cutmix_minmax 0.2 0.8", "must be even"),
        ("--cutmix_minmax 0.2", "takes two numbers"),
        ("--batch_size 500", "--batch_size 500: 1 x 500 is more than the 24 training images"),
        ("--nb_classes 2", "--nb_classes 2: .* has 3 classes, so labels up to 2 would be out of range"),
        ("--eval", "--eval needs the checkpoint"),
        ("--accum_iter 0", "--accum_iter 0: must be at least 1"),
        ("--input_size 30", "30x30 is not divisible by the patch size 8"),
        ("--trainable_blocks 7", "--trainable_blocks 7: must be"),
        ("--trainable_blocks nan", "--trainable_blocks nan: must be"),
        ("--trainable_blocks inf", "--trainable_blocks inf: must be"),
        ("--start_epoch 1", "--start_epoch 1: must be below --epochs 1"),
        ("--cutmix_minmax 0.8 0.2", "--cutmix_minmax 0.8 0.2: must rise and lie between 0 and 1"),
        ("--cutmix_minmax 0.2 1.2", "must rise and lie between 0 and 1"),
        ("--color_jitter -1", "--color_jitter -1.0: must be at least 0"),
        ("--recount 0", "--recount 0: must be at least 1"),
        ("--smoothing 1.5", "--smoothing 1.5: must lie between 0 and 1"),
        ("--layer_decay 0", "--layer_decay 0.0: must be above 0"),
        ("--aa nonsense", "--aa nonsense"),
        ("--save_predictions --output_dir=", "--save_predictions: needs"),
        ("--finetune nowhere.pth", "--finetune nowhere.pth: no such file"),
        ("--resume nowhere.pth", "--resume nowhere.pth: no such file"),
    ],
)
def test_bad_flags(pictures, tmp_path, flags, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        run(main_finetune, "--epochs 1 --batch_size 8 --log_dir=", flags, data_path=pictures)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.pth"))


def test_bad_data(pictures, trained, tmp_path):
    def fails(message, **kwargs):
        with pytest.raises(UserError, match=message):
            run(main_finetune, "--epochs 1 --batch_size 2", output_dir=tmp_path / "out", **kwargs)

    fails("has no val/ folder", data_path=make_pictures(tmp_path / "a", splits=("train",)))
    other = make_pictures(tmp_path / "b", splits=("train",))
    make_pictures(other, classes=("bright", "dark", "blue"), splits=("val",))
    fails("classes of train and val differ", data_path=other)
    empty = make_pictures(tmp_path / "c")
    (empty / "train" / "zebra").mkdir()
    fails(r"no images in 1 class folder \(zebra\)", data_path=empty)
    torch.save({"model": {"conv.weight": torch.zeros(2)}}, tmp_path / "resnet.pth")
    fails(
        "has no usable encoder keys; this file is not a vision",
        data_path=pictures,
        finetune=tmp_path / "resnet.pth",
    )
    torch.save({"model": make_mae().state_dict()}, tmp_path / "mae.pth")
    fails(
        "holds no classifier .full MAE.*pass it with --finetune",
        data_path=pictures,
        resume=tmp_path / "mae.pth",
    )


def test_resume_auto_is_checked_like_a_file(pictures, trained, tmp_path):
    def fails(message, flags, data=pictures):
        with pytest.raises(UserError, match=message):
            run(main_finetune, RECIPE, "--resume auto", flags, data_path=data, output_dir=out)

    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(trained / "checkpoint-0.pth", out)
    fails("the class token was given, but .*checkpoint-0.pth was trained with global pooling", "--cls_token")
    fails("--mean: .* was given", "--mean 0.5")
    fails("--trainable_blocks 1.0: .*checkpoint-0.pth was trained with None", "--trainable_blocks 1")
    fails("differing: red, sea", "", make_pictures(tmp_path / "b", classes=("bright", "dark", "sea")))
    torch.save({"model": make_mae().state_dict(), "epoch": 1}, out / "checkpoint-1.pth")
    fails("holds no classifier .*pass it with --finetune", "")
    torch.save({"model": {"conv.weight": torch.zeros(2)}, "epoch": 2}, out / "checkpoint-2.pth")
    fails(r"holds no classifier \(not a vision transformer\)$", "")


def test_evaluation_of_classes_without_names(pictures, tmp_path, capsys):
    path = released_files(tmp_path)["finetuned"]  # of 9 classes
    with pytest.raises(UserError, match=r"has 9 classes without names, but .* has 3"):
        run(main_finetune, "--eval", resume=path, data_path=pictures, output_dir=tmp_path)
    run(main_finetune, "--eval --nb_classes 9", resume=path, data_path=pictures, output_dir=tmp_path / "out")
    told = capsys.readouterr().out
    assert "data: evaluation: 24 images in 3 classes in" in told
    assert f"this table: {tmp_path / 'out' / 'per_class.txt'}" in told
    table = (tmp_path / "out" / "per_class.txt").read_text().splitlines()
    names = [line.split()[0] for line in table[1:]]
    assert names in (["bright", "dark", "red"], ["bright", "dark", "red", "(other"])
    assert [line.split()[1] for line in table[1:4]] == ["8", "8", "8"]


def test_folder_of_predictions_is_checked_first(pictures, trained, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(main_finetune, "evaluate_and_report", None)
    with pytest.raises(UserError, match=r"--output_dir .*file: cannot be written"):
        flags = "--eval --save_predictions"
        resume = trained / "checkpoint-1.pth"
        run(main_finetune, flags, resume=resume, data_path=pictures, output_dir=tmp_path / "file")


def test_evaluation_with_other_classes(trained, tmp_path):
    four = make_pictures(tmp_path / "four", classes=("bright", "dark", "red", "sea"))
    names = make_pictures(tmp_path / "names", classes=("bright", "dark", "sea"))
    for data, message in ((four, "has 3 classes, but .*four.* has 4"), (names, r"differing: red, sea")):
        with pytest.raises(UserError, match=message):
            run(
                main_finetune,
                "--eval",
                resume=trained / "checkpoint-1.pth",
                data_path=data,
                output_dir=tmp_path,
            )


def test_malicious_checkpoint_executes_nothing(pictures, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    for flag in ("finetune", "resume"):
        with pytest.raises(UserError, match="refused"):
            run(
                main_finetune,
                "--batch_size 2",
                data_path=pictures,
                output_dir=tmp_path,
                **{flag: tmp_path / "evil.pth"},
            )
    assert not (tmp_path / "owned").exists()
