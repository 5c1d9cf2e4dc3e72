"""A set of 12-bit images through all scripts: its range is found once, stored, and used without a flag."""

import json

import numpy as np
import pytest
import torch
from golden_utils import REPO
from PIL import Image
from transfer_utils import given_args

import export
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import predict
from util.data.depth import adopt_pixel_range, depth_of, view
from util.data.examine import settle_range
from util.errors import UserError
from util.weights.describe import describe
from util.weights.files import read_file

SMALL = "--input_size 32 --patch_size 8 --in_chans 1 --num_workers 0 --device cpu --log_dir ''"
PRETRAIN = (
    f"{SMALL} --model mae_vit_tiny_patch16 --decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2 "
    "--batch_size 4 --warmup_epochs 0 --vis_freq 1"
)


def words(text, **paths):
    return [*text.replace("''", "").replace("--log_dir ", "--log_dir= ").split()] + [
        word for name, value in paths.items() for word in (f"--{name}", str(value))
    ]


def start(script, text, **paths):
    return script.main(given_args(script, words(text, **paths)))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """12-bit pictures in 16-bit PNGs: two classes, the second one brighter."""
    root, rng = tmp_path_factory.mktemp("deep"), np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(8):
            folder = root / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(100 + 1500 * (i % 2), 2000 + 1500 * (i % 2), (40, 44)).astype(np.uint16)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("pretrained")
    start(main_pretrain, f"{PRETRAIN} --epochs 1", data_path=images, output_dir=output)
    return output / "checkpoint-0.pth"


@pytest.fixture(scope="module")
def tuned(images, pretrained, tmp_path_factory):
    output = tmp_path_factory.mktemp("tuned")
    flags = f"{SMALL} --model vit_tiny_patch16 --batch_size 4 --epochs 1 --warmup_epochs 0 --reprob 0"
    start(main_finetune, flags, data_path=images, output_dir=output, finetune=pretrained)
    return output / "checkpoint-best.pth"


def test_the_range_is_stored(images, pretrained, tuned):
    values = np.stack([np.asarray(Image.open(path)) for path in sorted((images / "train").rglob("*.png"))])
    expected = (np.percentile(values, 0.05, method="lower"), np.percentile(values, 99.95, method="higher"))
    stored = read_file(pretrained)["args"]["pixel_range"]
    assert tuple(stored) == expected and expected[1] > 3000
    content = read_file(tuned)
    assert tuple(content["args"]["pixel_range"]) == tuple(content["model_info"]["pixel_range"]) == expected


def test_the_pictures_of_a_training_show_the_range(pretrained):
    """The first panel holds the originals; they are neither black nor white."""
    pixels = np.asarray(Image.open(pretrained.with_name("reconstruction-0.png")).convert("L"))
    assert len(np.unique(pixels[100:300, 30:160])) > 100


def test_resuming_measures_nothing(images, pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("util.data.examine.examine", lambda *_: pytest.fail("measured anew"))
    start(main_pretrain, f"{PRETRAIN} --epochs 2", data_path=images, output_dir=tmp_path, resume=pretrained)
    resumed = read_file(tmp_path / "checkpoint-1.pth")["args"]["pixel_range"]
    assert tuple(resumed) == tuple(read_file(pretrained)["args"]["pixel_range"])
    flags = f"{PRETRAIN} --epochs 2 --pixel_range 0 4095"
    with pytest.raises(UserError, match=r"--pixel_range 0 4095: .* was trained with .*leave the flag out"):
        start(main_pretrain, flags, data_path=images, output_dir=tmp_path, resume=pretrained)


def test_probe_knn_and_evaluation_take_it(images, pretrained, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr("util.data.examine.examine", lambda *_: pytest.fail("measured anew"))
    model = f"{SMALL} --model vit_tiny_patch16 --batch_size 4"
    probe = f"{model} --epochs 1 --warmup_epochs 0 --cache_features"
    start(main_linprobe, probe, data_path=images, output_dir=tmp_path, finetune=pretrained)
    assert read_file(tmp_path / "checkpoint-best.pth")["model_info"]["pixel_range"] is not None
    knn = model.replace("--log_dir ''", "")
    assert start(main_knn, knn, data_path=images, finetune=pretrained)["knn_acc1"] > 80
    evaluation = "--eval --num_workers 0 --device cpu --output_dir= --log_dir="
    start(main_finetune, evaluation, data_path=images, resume=tuned)
    for script, file in ((main_finetune, pretrained), (main_linprobe, pretrained), (main_knn, pretrained)):
        with pytest.raises(UserError, match="was trained with"):
            flags = f"{knn if script is main_knn else model} --pixel_range 0 4095"
            start(script, flags, data_path=images, finetune=file)
    with pytest.raises(UserError, match="was trained with"):
        start(main_finetune, f"{evaluation} --pixel_range 0 4095", data_path=images, resume=tuned)


def test_predict_and_pictures_take_it(images, pretrained, tuned, tmp_path, capsys):
    path = str(images / "val" / "b" / "1.png")

    def run(*flags):
        predict.main(predict.get_args_parser().parse_args([*flags, "--num_workers", "0", "--device", "cpu"]))

    run("--resume", str(tuned), path)
    run("--resume", str(pretrained), path, "--features", str(tmp_path / "f.npz"))
    assert np.isfinite(np.load(tmp_path / "f.npz")["features"]).all()
    weights = describe(read_file(pretrained), pretrained, predict.argparse.Namespace(), "full")
    sample = view(path, weights.input_size, 1, depth_of(weights))
    low, high = weights.pixel_range
    mean = (np.asarray(Image.open(path))[:, 2:42].clip(low, high).mean() - low) / (high - low)
    assert (sample * weights.std[0] + weights.mean[0]).mean() == pytest.approx(mean, abs=0.02)
    with pytest.raises(UserError, match="was trained with"):
        run("--resume", str(tuned), path, "--pixel_range", "0", "4095")

    import runpy

    visualize = runpy.run_path(str(REPO / "demo" / "visualize.py"))
    output = str(tmp_path / "r.png")
    visualize["main"](
        visualize["get_args_parser"]().parse_args(
            [path, "--resume", str(pretrained), "--output", output, "--attention"]
        )
    )
    assert len(np.unique(np.asarray(Image.open(output).convert("L")))) > 100


def test_exports_say_it(pretrained, tuned, tmp_path):
    args = export.get_args_parser().parse_args(
        ["--resume", str(tuned), "--to", "safetensors", "--output", str(tmp_path / "s")]
    )
    export.main(args)
    card = (tmp_path / "s" / "README.md").read_text()
    low, high = read_file(tuned)["args"]["pixel_range"]
    assert f"| pixel range | {low:g} {high:g}: " in card
    weights = describe(
        read_file(tmp_path / "s" / "model.safetensors"), "x", export.argparse.Namespace(), "classifier"
    )
    assert weights.pixel_range == (low, high)


def test_timm_has_it_and_an_import_takes_it_again(tuned, tmp_path):
    import timm

    def run(*words, output):
        words = [*map(str, words), "--output", str(tmp_path / output)]
        export.main(export.get_args_parser().parse_args(words))

    run("--to", "timm", "--resume", tuned, output="timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}")
    stored = read_file(tuned)["args"]["pixel_range"]
    assert "pixel range {:g} {:g} (low".format(*stored) in model.pretrained_cfg["notes"][0]
    run("--from", "timm", "--resume", tmp_path / "timm", output="back")
    assert read_file(tmp_path / "back" / "model.pth")["model_info"]["pixel_range"] == list(stored)


def test_hugging_faces_preprocessor_has_it(tuned):
    from util.export.hf import _preprocessor_config
    from util.export.source import read_source
    from util.weights.hugging_face import settings_of_folder

    names = ("input_size", "num_heads", "decoder_num_heads", "mean", "std", "mask_ratio", "norm_pix_loss")
    args = export.argparse.Namespace(encoder_only=False, **dict.fromkeys(names))
    source = read_source(str(tuned), args)
    config = _preprocessor_config(source)
    values = torch.tensor([200.0, 1234.0, 3000.0])
    low, high = source.pixel_range
    expected = ((values - low) / (high - low) - source.mean[0]) / source.std[0]
    assert config["do_rescale"] is False
    torch.testing.assert_close((values - config["image_mean"][0]) / config["image_std"][0], expected)
    back = settings_of_folder({}, json.loads(json.dumps(config)))  # as an import reads them
    assert back["pixel_range"] == list(source.pixel_range)
    assert (back["mean"], back["std"]) == (pytest.approx(source.mean), pytest.approx(source.std))
    for damaged in ("x", [1], [1, "2"], 5, [1, 2, 3, 4]):
        with pytest.raises((ValueError, TypeError)):
            settings_of_folder({}, {**config, "pixel_range": damaged})


def test_what_a_checkpoint_says_of_8_bits_and_what_is_damaged():
    def adopt(own, **content):
        args = predict.argparse.Namespace(pixel_range=own, in_chans=1)
        adopt_pixel_range(args, content, "file")
        return args.pixel_range

    assert adopt("auto", args={"seed": 0}) is None  # trained on 8 bits
    assert adopt("auto", model={}) == "auto"  # a released file says nothing
    assert adopt([0.0, 9.0], args={"seed": 0}) == [0.0, 9.0]
    assert adopt("auto", model_info={"pixel_range": [1, 2]}) == (1.0, 2.0)
    assert adopt([1.0, 2.0], model_info={"pixel_range": [1, 2]}) == (1.0, 2.0)
    bands = {"pixel_range": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "in_chans": 5}  # --in_chans comes later
    assert adopt("auto", model_info=bands) == tuple(map(float, bands["pixel_range"]))
    args = predict.argparse.Namespace(pixel_range="auto", in_chans=3)
    adopt_pixel_range(args, {"args": bands}, "file", args.in_chans)
    assert args.pixel_range == "auto"  # adapted weights start a run on images of other channels
    args.pixel_range = adopt("auto", args=bands)
    with pytest.raises(UserError, match=r"--in_chans 3: the checkpoint's --pixel_range is of 5"):
        settle_range(args, None)
    for damaged in ("x", [3, 1], [1, 2, 3], {"a": 1}, 5):
        with pytest.raises(UserError, match="file: is damaged"):
            adopt("auto", args={"pixel_range": damaged})
    assert depth_of(predict.argparse.Namespace(pixel_range="auto")) is None
    json.dumps(adopt("auto", model_info={"pixel_range": [1, 2]}))
