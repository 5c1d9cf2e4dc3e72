"""What a checkpoint says about its model: stored, or read off its tensors."""

from argparse import Namespace

import pytest
import torch

import models_vit
from util.errors import UserError
from util.weights.describe import make_model_info, read_model_info
from util.weights.flags import adopt_model_info, check_class_names, warn_of_other_stats


def test_read_off_the_tensors_of_a_file_without_info():
    model = models_vit.vit_tiny_patch16(
        img_size=(32, 32), patch_size=8, in_chans=4, num_classes=9, global_pool=True
    )
    info = read_model_info({"model": {f"module.{k}": v for k, v in model.state_dict().items()}})
    assert info == dict(
        model="vit_tiny_patch16",
        in_chans=4,
        patch_size=8,
        input_size=(32, 32),
        global_pool=True,
        nb_classes=9,
        recipe="finetune",
    )
    model = models_vit.vit_tiny_patch16(img_size=(16, 48), num_classes=2)
    content = {"model": model.state_dict(), "args": {"input_size": [16, 48]}}
    info = read_model_info(content)
    assert info["input_size"] == (16, 48) and info["global_pool"] is False
    del content["args"]
    assert "input_size" not in read_model_info(content)
    assert read_model_info({"model": {"conv.weight": torch.zeros(1)}}) == {}


def test_written_and_read():
    args = Namespace(
        model="vit_base_patch16",
        global_pool=False,
        input_size=64,
        patch_size=16,
        in_chans=1,
        nb_classes=2,
        mean=(0.4,),
        std=(0.2,),
    )
    info = read_model_info({"model": {}, "model_info": make_model_info(args, ["a", "b"], "finetune")})
    other = Namespace(
        model="vit_large_patch16",
        global_pool=True,
        input_size=224,
        patch_size=None,
        in_chans=3,
        nb_classes=None,
        mean=None,
        std=None,
    )
    adopt_model_info(other, info, "file", given=set())
    assert vars(other) == {**vars(args), "input_size": (64, 64)}
    with pytest.raises(
        UserError, match="--model: vit_large_patch16 was given, but file was trained with vit_base"
    ):
        adopt_model_info(Namespace(**{**vars(other), "model": "vit_large_patch16"}), info, "file", {"model"})


def test_one_mean_for_all_channels_is_no_contradiction():
    args = Namespace(model="vit_base_patch16", in_chans=3, mean=[0.5], std=[0.25, 0.25, 0.2])
    adopt_model_info(args, {"mean": (0.5, 0.5, 0.5)}, "file", {"mean"})
    assert args.mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="--std"):
        adopt_model_info(args, {"std": (0.25, 0.25, 0.25)}, "file", {"std"})


def test_unknown_model():
    with pytest.raises(UserError, match="file: is of a model 'vit_giant', which is not known here"):
        adopt_model_info(Namespace(model="vit_base_patch16"), {"model": "vit_giant"}, "file", set())


def test_other_means_are_warned_of(capsys):
    args = Namespace(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    warn_of_other_stats(args, {"args": {"mean": (0.5, 0.5, 0.5), "std": [0.2]}}, "a.pth")
    warn_of_other_stats(args, {"args": {"mean": None}}, "a.pth")
    warn_of_other_stats(args, {"args": "none", "model": {}}, "a.pth")
    assert capsys.readouterr().err == ""
    warn_of_other_stats(args, {"args": {"mean": (0.4, 0.5, 0.5)}}, "a.pth")
    expected = "a.pth was trained with --mean 0.4 0.5 0.5, now it is 0.5 0.5 0.5"
    assert expected in capsys.readouterr().err
    warn_of_other_stats(args, {"args": {"mean": ["grey"]}}, "a.pth")  # not this code's: no crash
    assert "a.pth was trained with --mean grey, now" in capsys.readouterr().err


def test_class_names():
    check_class_names({"nb_classes": 1000}, ["a", "b"], "file", "data", nb_classes_given=True)
    check_class_names({"nb_classes": 2}, ["a", "b"], "file", "data")
    with pytest.raises(
        UserError, match=r"file: has 1000 classes without names, but data has 2.*--nb_classes 1000"
    ):
        check_class_names({"nb_classes": 1000}, ["a", "b"], "file", "data")
    check_class_names({"nb_classes": 2, "class_names": ["a", "b"]}, ["a", "b"], "file", "data")
    with pytest.raises(UserError, match="file: has 2 classes, but data has 3"):
        check_class_names({"nb_classes": 2}, ["a", "b", "c"], "file", "data")
    with pytest.raises(UserError, match="differing: b, c"):
        check_class_names({"nb_classes": 2, "class_names": ["a", "b"]}, ["a", "c"], "file", "data")
