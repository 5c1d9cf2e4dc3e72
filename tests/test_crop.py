"""The probe's crop: the reference's boxes by seed."""

import pytest
import torch
from golden_utils import facts
from PIL import Image

from util.crop import RandomResizedCrop


@pytest.mark.parametrize(
    "case", facts()["linprobe_crop"], ids=lambda c: f"{c['width']}x{c['height']}-{c['seed']}"
)
def test_golden_boxes(case):
    image = Image.new("RGB", (case["width"], case["height"]))
    torch.manual_seed(case["seed"])
    assert list(RandomResizedCrop.get_params(image, case["scale"], case["ratio"])) == case["ijhw"]


def test_crop_is_clipped_to_the_image_and_never_empty():
    crop = RandomResizedCrop(8, scale=(0.0001, 1.0))
    torch.manual_seed(0)
    for width, height in ((1, 1), (3, 40), (40, 3)):
        for _ in range(200):
            top, left, h, w = crop.get_params(Image.new("L", (width, height)), crop.scale, crop.ratio)
            assert 1 <= h <= height - top and 1 <= w <= width - left


def test_resizes_to_the_wanted_size():
    image = Image.new("RGB", (50, 40))
    assert RandomResizedCrop((16, 32), interpolation=3)(image).size == (32, 16)
