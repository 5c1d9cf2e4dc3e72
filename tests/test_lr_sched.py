"""The learning rate of every schedule against formulas written out, and what forks hand to it."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch

import main_finetune
import main_pretrain
from util.cli.flags import check_flags
from util.errors import UserError
from util.lr_sched import adjust_learning_rate, learning_rate, stable_epochs

BASE = dict(lr=3e-3, min_lr=2e-5, warmup_epochs=4, epochs=30)


def plain(kind, cooldown, epoch):
    """Straight lines between points; the cosine by its half angle."""
    lr, low, warm, epochs = BASE["lr"], BASE["min_lr"], BASE["warmup_epochs"], BASE["epochs"]
    if kind == "cosine" and epoch >= warm:
        return low + (lr - low) * math.cos(math.pi / 2 * (epoch - warm) / (epochs - warm)) ** 2
    if kind == "wsd":
        return float(np.interp(epoch, [0, warm, epochs - cooldown, epochs], [0, lr, lr, low]))
    return float(np.interp(epoch, [0, warm], [0, lr]))


@pytest.mark.parametrize("kind, cooldown", [("cosine", None), ("constant", None), ("wsd", 7), ("wsd", 26)])
def test_a_schedule_is_the_plain_one(kind, cooldown):
    args = Namespace(**BASE, schedule=kind, cooldown=cooldown)
    for epoch in np.linspace(0, 30, 30 * 16 + 1).tolist():
        assert learning_rate(epoch, args) == pytest.approx(plain(kind, cooldown, epoch), rel=1e-10, abs=1e-18)


@pytest.mark.parametrize("epochs, cooldown", [(1, 1), (4, 1), (30, 6), (400, 80), (203, 41)])
def test_a_fifth_of_the_epochs_is_the_cooldown_that_is_not_given(epochs, cooldown):
    for given in ({}, {"cooldown": None}):
        args = Namespace(epochs=epochs, schedule="wsd", **given)
        assert stable_epochs(args) == epochs - cooldown
    assert stable_epochs(Namespace(epochs=epochs)) == epochs


def test_forks_without_the_new_names_have_the_cosine():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr_scale": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    lr = adjust_learning_rate(optimizer, 17.0, Namespace(**BASE))
    assert lr == pytest.approx(plain("cosine", None, 17.0), rel=1e-12)
    assert optimizer.param_groups[0]["lr"] == lr / 2


@pytest.mark.parametrize("script", [main_pretrain, main_finetune])
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--cooldown 3", "--cooldown 3: is the end of --schedule wsd"),
        ("--schedule constant --cooldown 3", "--cooldown 3: is the end of --schedule wsd"),
        ("--schedule wsd --cooldown 0", "--cooldown 0: must be at least 1"),
        (
            "--schedule wsd --epochs 10 --warmup_epochs 9",
            "--warmup_epochs 9 and --cooldown 2 are more than --epochs",
        ),
        ("--schedule wsd --epochs 10 --cooldown 11 --warmup_epochs 0", "--cooldown 11 are more than"),
        ("--ema 1", "--ema 1.0: must lie between 0 and 1"),
        ("--ema 0", "--ema 0.0: must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_is_one_line(script, flags, message):
    parser = script.get_args_parser()
    with pytest.raises(UserError, match=message) as error:
        check_flags(parser.parse_args(flags.split()), parser)
    assert "\n" not in str(error.value)


def test_unknown_schedules_are_refused_by_the_parser():
    with pytest.raises(SystemExit, match="2"):
        main_pretrain.get_args_parser().parse_args(["--schedule", "linear"])
