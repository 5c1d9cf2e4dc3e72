"""demo/shipped: the small model that comes with the code is what the pages say, and needs no flag."""

import sys

import torch
from golden_utils import REPO
from PIL import Image

from demo import visualize
from util.data.inputs import find_inputs
from util.data.read import read_image
from util.data.transforms import EvalTransform, normalize_batch
from util.demo_set.files import SHIPPED
from util.weights.build import build
from util.weights.describe import describe
from util.weights.files import read_file

FILE = SHIPPED / "model.safetensors"

sys.path.insert(0, str(REPO / "benchmarks"))


def test_it_is_small_and_a_full_model():
    assert FILE.stat().st_size <= 6e6
    weights = describe(read_file(FILE), FILE, visualize.get_args_parser().parse_args([]), "full")
    assert weights.part == "full" and weights.input_size == (64, 64) and not weights.norm_pix_loss


@torch.no_grad()
def test_it_knows_more_of_hidden_patches_than_their_neighbours_say():
    from bench_hidden import errors

    weights = describe(read_file(FILE), FILE, visualize.get_args_parser().parse_args([]), "full")
    transform = EvalTransform(weights.input_size)
    pixels = [transform(read_image(path, 3)) for path in find_inputs([str(SHIPPED / "samples")])[0].paths]
    images = normalize_batch(torch.stack(pixels), "cpu", weights.mean, weights.std)
    for ratio in (0.5, 0.75, 0.9):
        found = errors(build(weights).eval(), images, ratio, 0)
        assert found["model"].mean() < 0.8 * min(found["neighbours"].mean(), found["mean"].mean())


def test_pictures_without_a_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MAE_DEMO_DATA", str(tmp_path / "nowhere"))  # nothing is painted
    args = visualize.get_args_parser().parse_args(["--output", str(tmp_path / "out.png")])
    visualize.main(args)
    assert "the shipped model" in capsys.readouterr().out
    assert Image.open(tmp_path / "out.png").height > 5 * 64 and not (tmp_path / "nowhere").exists()


@torch.no_grad()
def test_neighbours_of_a_hidden_patch_by_hand():
    from bench_hidden import neighbours

    mask = torch.tensor([[0.0, 1, 1, 1, 0, 1]])  # rows: seen, -, - / -, seen, -
    colours = torch.tensor([[1.0, 9, 9, 9, 3, 9]])[..., None]
    assert neighbours(mask, colours, 3)[0, :, 0].tolist() == [1, 2, 3, 2, 3, 3]
    mask, colours = torch.tensor([[0.0, 1, 1, 1]]), torch.tensor([[5.0, 9, 9, 9]])[..., None]
    assert neighbours(mask, colours, 4)[0, :, 0].tolist() == [5, 5, 5, 5]  # the nearest, if none is beside
