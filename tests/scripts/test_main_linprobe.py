"""main_linprobe.py: frozen encoder, recipe's head, cached features, exact resume, evaluation, bad input."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_utils import GOLDEN, REPO
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
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
from util.compute import compile as compiling
from util.errors import TrainingError, UserError

NOT_THE_REFERENCES = {"data_path", "device", "num_workers", "nb_classes", "output_dir", "log_dir"}
RECIPE = "--batch_size 6 --epochs 3 --warmup_epochs 1 --blr 0.5"


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setitem(models_vit.MODELS, "vit_test", vit_test)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "mae.pth"
    torch.save({"model": make_mae().state_dict()}, path)
    return path


def test_every_flag_of_the_reference_with_its_default():
    args = main_linprobe.get_args_parser().parse_args([])
    for flag in json.loads((GOLDEN / "cli.json").read_text())["main_linprobe.py"]:
        assert hasattr(args, flag["dest"]), flag
        if flag["dest"] not in NOT_THE_REFERENCES:
            assert getattr(args, flag["dest"]) == flag["default"], flag
        words = flag["flags"][:1] + (["1"] if flag["takes_value"] else [])
        if flag["dest"] != "model":
            main_linprobe.get_args_parser().parse_args(words)


def test_head_of_the_recipe():
    torch.manual_seed(0)
    model = vit_test(num_classes=500)
    main_linprobe.put_on_probe(model)
    norm, linear = model.head
    assert isinstance(norm, nn.BatchNorm1d) and not norm.affine and norm.eps == 1e-6
    assert abs(linear.weight.std().item() - 0.01) < 2e-4 and not linear.bias.any()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.1.weight", "head.1.bias"}


@pytest.mark.parametrize(
    "flags", ["", "--cache_features", "--cache_features --cache_views 2", "--global_pool"]
)
def test_frozen_encoder_is_bit_identical(pictures, encoder, tmp_path, flags):
    run(main_linprobe, RECIPE, flags, finetune=encoder, data_path=pictures, output_dir=tmp_path)
    state, start = state_of(tmp_path / "checkpoint-2.pth"), state_of(encoder)
    shared = [key for key in state if key in start]
    assert len(shared) > 25 and all(torch.equal(state[key], start[key]) for key in shared)
    trained = {key for key in state if key.startswith("head.")}
    assert {"head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias"} <= trained
    assert set(state) - set(start) - trained == (
        {"fc_norm.weight", "fc_norm.bias"} if "pool" in flags else set()
    )
    records = read_log(tmp_path)
    assert len(records) == 3
    assert records[0]["n_parameters"] == 24 * 3 + 3


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pooled", ["", "--global_pool"])
def test_compiled_encoder(pictures, encoder, tmp_path, monkeypatch, capsys, backend, pooled):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(compiling, "BACKEND", counter)
    for name, flags in [("plain", ""), ("compiled", "--compile")]:
        run(
            main_linprobe,
            RECIPE,
            flags,
            pooled,
            finetune=encoder,
            data_path=pictures,
            output_dir=tmp_path / name,
        )
    torch._dynamo.reset()
    assert counter.frame_count == 1  # one graph, of training only
    captured = capsys.readouterr()
    assert captured.out.count(", compiled\n") == 1 and "torch.compile failed" not in captured.err
    plain, compiled = (state_of(tmp_path / name / "checkpoint-2.pth") for name in ("plain", "compiled"))
    assert list(plain) == list(compiled)
    assert compiled["head.0.num_batches_tracked"] == plain["head.0.num_batches_tracked"] == 12
    for key, value in plain.items():
        # Float32: compiled blocks round features to 1e-6 otherwise; BatchNorm divides by their spread, some
        # 0.1, and 12 steps of training with LARS add that up
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-5)


def test_learns(pictures, encoder, tmp_path):
    flags = "--cache_features --batch_size 12 --epochs 40 --blr 20 --warmup_epochs 2"
    run(main_linprobe, flags, finetune=encoder, data_path=pictures, output_dir=tmp_path)
    assert read_log(tmp_path)[-1]["test_acc1"] > 90


def test_an_encoder_that_changes_is_noticed(pictures, encoder, tmp_path, monkeypatch):
    train_one_epoch = main_linprobe.train_one_epoch

    def spoil(model, *args):
        with torch.no_grad():
            model.blocks[0].norm1.bias[0] += 1e-6
        return train_one_epoch(model, *args)

    monkeypatch.setattr(main_linprobe, "train_one_epoch", spoil)
    with pytest.raises(TrainingError, match="the frozen encoder changed"):
        run(main_linprobe, RECIPE, finetune=encoder, data_path=pictures, output_dir=tmp_path)


def test_cached_features_give_the_ordinary_curves(pictures, encoder, tmp_path):
    """One view, augmentation off: same order of samples, same features up to the rounding of another batch
    size.
    """
    for name, flags in (("plain", "--no_aug"), ("cached", "--no_aug --cache_features")):
        run(main_linprobe, RECIPE, flags, finetune=encoder, data_path=pictures, output_dir=tmp_path / name)
    plain, cached = read_log(tmp_path / "plain"), read_log(tmp_path / "cached")
    for key in plain[0]:
        # Float32: features agree to 1e-6, see above for what training makes of that
        np.testing.assert_allclose(
            [record[key] for record in plain], [record[key] for record in cached], rtol=1e-4, err_msg=key
        )
    a, b = (
        state_of(tmp_path / "plain" / "checkpoint-2.pth"),
        state_of(tmp_path / "cached" / "checkpoint-2.pth"),
    )
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_one_cached_view_is_the_centre_crop_and_more_are_random(pictures, encoder, tmp_path):
    losses = {}
    for name, flags in (("one", ""), ("no_aug", "--no_aug"), ("two", "--cache_views 2")):
        run(
            main_linprobe,
            RECIPE,
            "--cache_features",
            flags,
            finetune=encoder,
            data_path=pictures,
            output_dir=tmp_path / name,
        )
        losses[name] = [record["train_loss"] for record in read_log(tmp_path / name)]
    assert losses["one"] == losses["no_aug"] != losses["two"]


@pytest.mark.parametrize("flags", ["", "--cache_features --cache_views 2"])
def test_stopped_inside_an_epoch_and_resumed_is_undisturbed(pictures, encoder, tmp_path, flags):
    paths = dict(finetune=encoder, data_path=pictures)
    run(main_linprobe, RECIPE, flags, **paths, output_dir=tmp_path / "whole")
    for max_steps in (3, 9, 0):
        run(
            main_linprobe,
            RECIPE,
            flags,
            f"--resume auto --max_steps {max_steps}",
            **paths,
            output_dir=tmp_path / "cut",
        )
    ours = torch.load(tmp_path / "cut" / "checkpoint-2.pth", weights_only=True)
    theirs = torch.load(tmp_path / "whole" / "checkpoint-2.pth", weights_only=True)
    assert same_state(ours["model"], theirs["model"])
    for a, b in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True):
        assert torch.equal(a["mu"], b["mu"])
    assert read_log(tmp_path / "cut")[-1]["test_loss"] == read_log(tmp_path / "whole")[-1]["test_loss"]


def test_evaluates_a_probe_to_the_same_digits_without_flags(pictures, encoder, tmp_path, capsys):
    run(main_linprobe, RECIPE, finetune=encoder, data_path=pictures, output_dir=tmp_path)
    final = read_log(tmp_path)[-1]
    capsys.readouterr()
    flags = ["--eval", "--resume", str(tmp_path / "checkpoint-2.pth"), "--data_path", str(pictures)]
    flags += ["--num_workers", "0", "--output_dir", str(tmp_path / "eval")]
    main_linprobe.main(given_args(main_linprobe, flags))
    line = f"* Acc@1 {final['test_acc1']:.3f} Acc@5 {final['test_acc5']:.3f} loss {final['test_loss']:.3f}"
    assert capsys.readouterr().out.strip().endswith(line)
    with pytest.raises(UserError, match=r"written by main_linprobe.py; use that script"):
        run(
            main_finetune,
            "--eval",
            resume=tmp_path / "checkpoint-2.pth",
            data_path=pictures,
            output_dir=tmp_path,
        )


@pytest.mark.parametrize("kind", ["encoder", "full", "finetuned"])
def test_released_layouts(pictures, tmp_path, kind, capsys):
    path = released_files(tmp_path)[kind]
    flags = (
        "--epochs 1 --batch_size 12 --global_pool" if kind == "finetuned" else "--epochs 1 --batch_size 12"
    )
    run(main_linprobe, flags, finetune=path, data_path=pictures, output_dir=tmp_path / "out")
    assert f"encoder: {path}" in capsys.readouterr().out
    state, source = state_of(tmp_path / "out" / "checkpoint-0.pth"), state_of(path)
    assert all(torch.equal(state[key], source[key]) for key in source if key in state)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cache_views 0", "--cache_views 0: must be at least 1"),
        ("--cache_views 2", "--cache_views: needs --cache_features"),
        ("--cache_features --cache_views 2 --no_aug", "--no_aug would make all views the same"),
        ("--cache_features --compile", "--compile, --compile_mode: not with --cache_features"),
        ("--cache_features --compile_mode reduce-overhead", "--compile_mode: not with --cache_features"),
        ("--batch_size 1", "--batch_size 1: BatchNorm needs at least 2 images"),
        ("--start_epoch 3", "--start_epoch 3: must be below --epochs 1"),
        ("--batch_size 100", "more than the 24 training images"),
        ("--eval", "--eval needs the checkpoint"),
        ("--nb_classes 1", "out of range"),
        ("--finetune nowhere.pth", "--finetune nowhere.pth: no such file"),
    ],
)
def test_bad_flags(pictures, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as error:
        run(
            main_linprobe, "--epochs 1 --batch_size 8", flags, data_path=pictures, output_dir=tmp_path / "out"
        )
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.pth"))


def test_missing_val(tmp_path):
    with pytest.raises(UserError, match="has no val/ folder"):
        run(main_linprobe, data_path=make_pictures(tmp_path / "a", splits=("train",)), output_dir=tmp_path)


def test_global_pool_classifier_has_no_class_token_to_probe(pictures, tmp_path):
    path = released_files(tmp_path)["finetuned"]
    with pytest.raises(
        UserError, match=r"--cls_token: .*has no norm for the class token; pass --global_pool"
    ):
        run(
            main_linprobe, "--epochs 1 --batch_size 8", finetune=path, data_path=pictures, output_dir=tmp_path
        )


def test_an_undecodable_validation_image_is_left_out_with_and_without_cache(
    pictures, encoder, tmp_path, capsys
):
    data = make_pictures(tmp_path / "data")
    path = data / "val" / "dark" / "3.png"
    path.write_bytes(path.read_bytes()[:200])  # looks like a picture until it is decoded
    flags = [RECIPE, "--no_aug --bad_images skip"]
    for name, more in (("plain", ""), ("cached", "--cache_features")):
        run(main_linprobe, *flags, more, finetune=encoder, data_path=data, output_dir=tmp_path / name)
        assert "1 image left out of the figures, not decodable" in capsys.readouterr().err
    lines = (tmp_path / "plain" / "per_class.txt").read_text().splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["8", "7", "8"]
    plain, cached = (read_log(tmp_path / name)[-1]["test_loss"] for name in ("plain", "cached"))
    # As for the curves above
    np.testing.assert_allclose(plain, cached, rtol=1e-4)


PROCESS = """
import json, sys
sys.path[:0] = [{repo!r}, {tests!r}]
import main_linprobe, models_vit, torch
from transfer_utils import run, vit_test
torch.set_num_threads(1)
models_vit.MODELS["vit_test"] = vit_test
run(main_linprobe, sys.argv[1], data_path={data!r}, output_dir={out!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--cache_features"])
def test_figures_of_two_processes_are_those_of_the_checkpoint(tmp_path, flags, monkeypatch):
    """Each process sees other batches, so BatchNorm's statistics would differ; all evaluate, one saves."""
    data = make_pictures(tmp_path / "data", per_class=24)  # 72 validation images: three groups
    out, script = tmp_path / "out", tmp_path / "run.py"
    script.write_text(PROCESS.format(repo=str(REPO), tests=str(REPO / "tests"), data=str(data), out=str(out)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    recipe = f"--batch_size 8 --epochs 2 --warmup_epochs 0 --blr 5 {flags}"
    done = subprocess.run(
        [*command, str(script), recipe], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = []
    original = main_linprobe.evaluate_and_report
    monkeypatch.setattr(
        main_linprobe, "evaluate_and_report", lambda *a, **k: figures.append(original(*a, **k))
    )
    for epoch in (0, 1):
        resume = out / f"checkpoint-{epoch}.pth"
        run(main_linprobe, "--eval", resume=resume, data_path=data, output_dir=tmp_path / "eval")
    for record, stats in zip(read_log(out), figures, strict=True):
        assert record["test_acc1"] == stats["acc1"]
        np.testing.assert_allclose(record["test_loss"], stats["loss"], rtol=1e-7 if flags else 0)
