"""Command lines: every flag of the reference with its default, and one clear line on mistakes."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from golden_utils import GOLDEN

import export
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import predict
from util.cli import flags
from util.cli.flags import above, at_least, fraction
from util.cli.parser import ArgumentParser, run_script
from util.errors import TrainingError, UserError
from util.sizes import default_workers, image_size

CHANGED = {"data_path", "device", "num_workers"}  # differ on purpose (DIFFERENCES.md)


def check_flags(script, parser, changed=CHANGED):
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    defaults = parser.parse_args([])
    for entry in json.loads((GOLDEN / "cli.json").read_text())[script]:
        for flag in entry["flags"]:
            assert flag in actions, f"{script} has no {flag}"
            assert actions[flag].dest == entry["dest"], flag
            assert (actions[flag].nargs != 0) == entry["takes_value"], flag
        if entry["dest"] not in changed:
            assert getattr(defaults, entry["dest"]) == entry["default"], entry["dest"]
        if entry["takes_value"] and entry["nargs"] is None:
            sample = {"int": "7", "float": "0.25"}.get(entry["type"], entry["default"] or "x")
            value = getattr(parser.parse_args([entry["flags"][0], sample]), entry["dest"])
            assert value == {"int": int, "float": float}.get(entry["type"], str)(sample), entry


def test_every_flag_of_the_reference():
    check_flags("main_pretrain.py", main_pretrain.get_args_parser())


def test_parser_can_be_a_parent_and_data_abbreviates_data_path():
    parser = argparse.ArgumentParser(parents=[main_pretrain.get_args_parser()])
    args = parser.parse_args(["--data", "somewhere", "--local-rank", "3"])
    assert args.data_path == "somewhere" and args.local_rank == 3


def test_wrong_model_lists_the_right_ones(capsys):
    parser = ArgumentParser(prog="main_pretrain.py", parents=[main_pretrain.get_args_parser()])
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--model", "resnet50"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "mae_vit_tiny_patch16" in error and "mae_vit_huge_patch14_dec512d8b" in error


def test_image_sizes():
    assert image_size("224") == 224 and image_size("32x128") == (32, 128)
    for text in ("", "0", "3x4x5", "big"):
        with pytest.raises(ValueError):
            image_size(text)


@pytest.mark.parametrize("error, code", [(UserError("x is wrong"), 2), (TrainingError("stopped"), 1)])
def test_run_script_prints_one_line(error, code, capsys, monkeypatch):
    def main(args):
        raise error

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main, ArgumentParser(prog="script.py"))
    assert stop.value.code == code and capsys.readouterr().err == f"script.py: error: {error}\n"


OUT_OF_MEMORY = [
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nSee ..."),
        "the GPU is out of memory (Tried to allocate 2.00 GiB); take a smaller --batch_size with a larger "
        "--accum_iter or --grad_checkpointing or --fsdp with several GPUs",
    ),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 4000000000000 bytes. Error code 12"
        ),
        "this machine is out of memory (tried to allocate 4000000000000 bytes); take a smaller --batch_size "
        "with a larger --accum_iter or --grad_checkpointing or fewer --num_workers",
    ),
    (
        OSError(12, "Cannot allocate memory"),
        "this machine is out of memory; take a smaller --batch_size with a larger --accum_iter or "
        "--grad_checkpointing or fewer --num_workers",
    ),
]


@pytest.mark.parametrize(("error", "said"), OUT_OF_MEMORY)
def test_d12_out_of_memory_is_one_line_that_says_what_helps(error, said, capsys, monkeypatch):
    def main(args):
        raise error

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main, ArgumentParser(prog="script.py", parents=[main_pretrain.get_args_parser()]))
    assert stop.value.code == 1 and capsys.readouterr().err == f"script.py: error: {said}\n"


@pytest.mark.parametrize(
    ("script", "helpful"),
    [
        (main_knn, "; take a smaller --batch_size or fewer --num_workers"),
        (predict, "; take a smaller --batch_size or fewer --num_workers"),
        (export, ""),
    ],
)
def test_d12_scripts_name_only_flags_that_they_have(script, helpful, capsys, monkeypatch):
    words = ["--resume", "x", *(["--output", "y"] if script is export else ["z"])]

    def main(args):
        return np.empty(2**57)  # numpy's own MemoryError

    monkeypatch.setattr("sys.argv", ["script.py", *([] if script is main_knn else words)])
    with pytest.raises(SystemExit) as stop:
        run_script(main, ArgumentParser(prog="script.py", parents=[script.get_args_parser()]))
    said = "this machine is out of memory (Unable to allocate 1.00 EiB)"
    assert stop.value.code == 1 and capsys.readouterr().err == f"script.py: error: {said}{helpful}\n"


def test_help_keeps_the_lines_of_the_description():
    text = ArgumentParser(description="one\n    two\nthree").format_help()
    assert "one\n    two\nthree" in text


@pytest.mark.parametrize(
    "change",
    [
        dict(accum_iter=0),
        dict(batch_size=0),
        dict(clip_grad=-1.0),
        dict(num_workers=-1),
        dict(recount=0),
        dict(patch_size=0),
        dict(print_freq=0),
        dict(max_steps=-1),
        *({name: math.nan} for name in ("lr", "blr", "min_lr", "weight_decay", "layer_decay", "clip_grad")),
        *({name: math.inf} for name in ("mixup", "cutmix", "temperature", "color_jitter", "save_minutes")),
        *({name: -0.1} for name in ("lr", "weight_decay", "mixup", "cutmix", "color_jitter")),
        *({name: 0.0} for name in ("layer_decay", "temperature", "clip_grad", "dist_timeout")),
        *({name: math.nan} for name in ("smoothing", "mask_ratio")),
        *({name: 1.5} for name in ("reprob", "drop_path", "mixup_prob", "mixup_switch_prob")),
        dict(start_epoch=500),
    ],
)
def test_values_that_cannot_work(change):
    flag, value = next(iter(change.items()))
    parsers = [script.get_args_parser() for script in (main_pretrain, main_finetune, main_linprobe, main_knn)]
    parsers = [parser for parser in parsers if hasattr(parser.parse_args([]), flag)]
    assert parsers
    for parser in parsers:
        flags.check_flags(parser.parse_args([]), parser)
        given, forks = parser.parse_args([f"--{flag}={value}"]), parser.parse_args([])
        setattr(forks, flag, value)  # in a Namespace that no parser has seen
        for args in (given, forks):
            with pytest.raises(UserError, match=f"--{flag} {value}: must ") as error:
                flags.check_flags(args, parser)
            finite = math.isfinite(value) or "lie between" in str(error.value)
            assert str(error.value).endswith(" and finite") or finite or flag == "clip_grad"


def test_types_with_bounds(capsys):
    assert (at_least(1)("7"), at_least(0, float)("0.5"), above(0)("2"), fraction("1")) == (7, 0.5, 2.0, 1.0)
    with pytest.raises(SystemExit):
        main_pretrain.get_args_parser().parse_args(["--batch_size", "many"])
    assert "--batch_size: invalid int value: 'many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cores", "torchrun", "workers"), [(2, None, 2), (64, None, 16), (64, "8", 8), (4, "8", 1)]
)
def test_workers_share_the_cores(monkeypatch, cores, torchrun, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if torchrun:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", torchrun)
    assert default_workers() == workers and default_workers(processes=1) == min(cores, 16)
