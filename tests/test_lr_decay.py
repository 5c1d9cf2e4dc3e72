"""Layer-wise lr decay: the reference's groups, in its order."""

import pytest
from golden_utils import TINY, facts

import models_vit
from util.lr_decay import param_groups_lrd


def tiny():
    return models_vit.VisionTransformer(True, num_classes=7, **TINY)


def named_groups(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]


def test_golden_groups():
    expected = facts()["layer_decay"]
    model = tiny()
    groups = param_groups_lrd(
        model, expected["weight_decay"], model.no_weight_decay(), layer_decay=expected["layer_decay"]
    )
    found = named_groups(model, groups)
    assert [g["params"] for g in found] == [g["params"] for g in expected["groups"]]
    assert [g["weight_decay"] for g in found] == [g["weight_decay"] for g in expected["groups"]]
    assert [g["lr_scale"] for g in found] == pytest.approx([g["lr_scale"] for g in expected["groups"]], 1e-12)


def test_frozen_parameters_are_left_out():
    model = tiny()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    groups = named_groups(model, param_groups_lrd(model, 0.05, model.no_weight_decay(), 0.5))
    assert [g["params"] for g in groups] == [["head.weight"], ["head.bias"]]
    assert {g["lr_scale"] for g in groups} == {1.0}
