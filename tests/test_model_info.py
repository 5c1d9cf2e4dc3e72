"""What a checkpoint says about its model: stored, or read off its tensors."""

from argparse import Namespace

import pytest
import torch

import models_vit
from util.args import UserError
from util.model_info import adopt_model_info, check_class_names, make_model_info, read_model_info


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


def test_class_names():
    check_class_names({"nb_classes": 1000}, ["a", "b"], "file", "data")
    check_class_names({"nb_classes": 2, "class_names": ["a", "b"]}, ["a", "b"], "file", "data")
    with pytest.raises(UserError, match="file: has 2 classes, but data has 3"):
        check_class_names({"nb_classes": 2}, ["a", "b", "c"], "file", "data")
    with pytest.raises(UserError, match="differing: b, c"):
        check_class_names({"nb_classes": 2, "class_names": ["a", "b"]}, ["a", "c"], "file", "data")
