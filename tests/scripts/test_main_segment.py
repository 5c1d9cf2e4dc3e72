"""main_segment.py: masks read, windows, figures counted, frozen and fine-tuned, exact resume, bad input."""

import itertools
import random
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_utils import TINY
from PIL import Image
from transfer_utils import NORM, given_args, make_mae, read_log, run, same_state, state_of

import main_segment
import models_seg
import models_vit
from util.data.segments import CropBoth, WholeImage, resize_mask
from util.errors import UserError
from util.evaluate.segments import (
    count_pixels,
    neighbours,
    pixel_table,
    probabilities,
    segment,
    summarize_pixels,
    window_starts,
)
from util.recipes import segment as recipe

FAST = "--batch_size 4 --epochs 2 --warmup_epochs 1 --lr 3e-3"


def vit_test(**kwargs):
    make = kwargs.pop("make", models_vit.VisionTransformer)
    return make(**{**TINY, "norm_layer": NORM, **kwargs})


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setitem(models_vit.MODELS, "vit_test", vit_test)


def make_masked(root: Path, count=8, size=(48, 40)) -> Path:
    """Grey noise with a bright and a red square (classes 1 and 2); a frame is ignored."""
    rs = np.random.RandomState(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind / "sub").mkdir(parents=True)
        for i in range(count):
            h, w = size if i % 2 else (size[1] + 8, size[0])
            picture, mask = rs.normal(80, 15, (h, w, 3)), np.zeros((h, w), np.uint8)
            for number, colour in ((1, (210, 210, 210)), (2, (200, 40, 40))):
                y, x = rs.randint(0, h - 16), rs.randint(0, w - 16)
                picture[y : y + 16, x : x + 16], mask[y : y + 16, x : x + 16] = colour, number
            mask[:2] = 255
            picture = np.clip(picture, 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(root / split / f"images/sub/{i}.png")
            Image.fromarray(mask).save(root / split / f"masks/sub/{i}.png")
    return root


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return make_masked(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "mae.pth"
    torch.save({"model": make_mae().state_dict()}, path)
    return path


def test_model_is_the_encoder_under_its_head():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    vit = models_vit.VisionTransformer(**TINY, norm_layer=NORM, num_classes=0).eval()
    for head, layers in (("linear", 1), ("linear", 2), ("upsample", 1)):
        model = models_seg.SegmentationTransformer(
            **TINY, norm_layer=NORM, num_classes=5, head=head, num_layers=layers
        ).eval()
        missing, unexpected = model.load_state_dict(vit.state_dict(), strict=False)
        assert not unexpected and all(name.startswith("head.") for name in missing)
        patches = model.forward_patches(images)
        width, grid = TINY["embed_dim"], model.patch_embed.grid_size
        assert patches.shape == (2, layers * width, *grid)
        tokens = vit.norm(vit.forward_tokens(images))[:, 1:]
        torch.testing.assert_close(patches[:, -width:].flatten(2).transpose(1, 2), tokens, rtol=0, atol=0)
        assert model(images).shape == (2, 5, 32, 32)
    with pytest.raises(ValueError, match="blocks"):
        models_seg.SegmentationTransformer(**TINY, num_classes=5, num_layers=99)


def test_windows_reach_every_pixel_and_are_averaged():
    for length in (32, 33, 47, 48, 64, 101):
        starts = window_starts(length, 32)
        assert starts[0] == 0 and starts[-1] == length - 32
        assert all(0 < b - a <= 16 for a, b in itertools.pairwise(starts))
    image = torch.randn(2, 40, 70)
    plain = segment(lambda cut: cut * 2, image, (32, 32), (40, 70))  # a function of the pixel: no seams
    torch.testing.assert_close(plain, image * 2)
    assert segment(lambda cut: cut, image, (32, 32), (11, 13)).shape == (2, 11, 13)


def test_masks_are_cut_as_their_images():
    rs = np.random.RandomState(0)
    mask = np.repeat(np.repeat(rs.randint(0, 4, (6, 5)), 8, 0), 8, 1)  # 48 x 40, in squares
    image = np.repeat((mask * 60).astype(np.uint8)[..., None], 3, 2)
    for seed in range(5):
        cut, classes = CropBoth(32)(image, mask, random.Random(seed))
        same = (cut[0].float() / 60).round() == classes
        assert same.float().mean() > 0.8  # all but the edges, where bicubic blends
    assert torch.equal(resize_mask(mask, (0, 0, 48, 40), (48, 40)), torch.from_numpy(mask))
    whole, kept = WholeImage(32, None)(image, mask, None)
    assert whole.shape == (3, 38, 32) and kept.shape == (48, 40)


def test_figures_equal_an_independent_count():
    rs = np.random.RandomState(0)
    truth, said = rs.randint(0, 4, 500), rs.randint(0, 3, 500)
    matrix = np.zeros((5, 5), np.int64)
    for i, j in zip(truth, said, strict=True):
        matrix[i, j] += 1
    stats = summarize_pixels(matrix)  # class 4 is nowhere, class 3 in the masks only
    ious = [np.sum((truth == k) & (said == k)) / np.sum((truth == k) | (said == k)) for k in range(4)]
    assert stats["miou"] == pytest.approx(100 * np.mean(ious), abs=1e-12)
    accuracies = [np.mean(said[truth == k] == k) for k in range(4)]
    assert stats["macc"] == pytest.approx(100 * np.mean(accuracies), abs=1e-12)
    assert stats["pixel_acc"] == pytest.approx(100 * np.mean(truth == said), abs=1e-12)
    table = pixel_table(matrix, list("abcde")).splitlines()
    assert len(table) == 6 and table[-1].split()[2:] == ["-", "-", "-"]


def test_neighbours_equal_a_plain_count():
    torch.manual_seed(0)
    model = models_seg.SegmentationTransformer(**TINY, norm_layer=NORM, num_classes=3).eval().double()
    bank = F.normalize(torch.randn(60, TINY["embed_dim"], dtype=torch.float64), dim=1)
    classes, images = torch.randint(0, 3, (60,)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        found = neighbours(model, bank.float(), classes, 3)(images)
        tokens = model.forward_patches(images).float().flatten(2).transpose(1, 2)  # (N, L, D)
    plain = torch.zeros(2, tokens.shape[1], 3)
    for n, row in enumerate(tokens):
        for i, token in enumerate(row):
            near = (bank.float() @ (token / token.norm())).sort(descending=True)
            weights = torch.exp(near.values[:20] / 0.07)
            for weight, index in zip(weights / weights.sum(), near.indices[:20], strict=True):
                plain[n, i, classes[index]] += weight
    plain = plain.transpose(1, 2).unflatten(2, model.patch_embed.grid_size)
    plain = F.interpolate(plain, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)  # float32: exp of 1 / 0.07 times 1e-7


@pytest.mark.parametrize("flags", ["--mode linear --layers 2", "--mode finetune"])
def test_learns_resumes_exactly_and_is_evaluated_alike(masked, encoder, tmp_path, flags, capsys):
    where = dict(finetune=encoder, data_path=masked)
    run(main_segment, FAST, "--epochs 6", flags, **where, output_dir=tmp_path / "whole")
    records = read_log(tmp_path / "whole")
    assert records[-1]["test_miou"] > records[0]["test_miou"] and records[-1]["test_pixel_acc"] > 60
    assert {p.name for p in (tmp_path / "whole").iterdir()} >= {"per_class.txt", "segmentation.png"}
    state, start = state_of(tmp_path / "whole/checkpoint-5.pth"), state_of(encoder)
    frozen = all(torch.equal(state[key], start[key]) for key in state if key in start)
    assert frozen == ("linear" in flags)
    for steps in ("--max_steps 3", "--resume auto"):  # stops inside an epoch
        run(main_segment, FAST, "--epochs 6", flags, steps, **where, output_dir=tmp_path / "parts")
    assert same_state(state, state_of(tmp_path / "parts/checkpoint-5.pth"))
    assert read_log(tmp_path / "parts") == records
    capsys.readouterr()
    best = tmp_path / "whole/checkpoint-best.pth"
    for more in ("", "--batch_size 1", "--num_workers 1"):
        run(main_segment, "--eval", more, resume=best, data_path=masked, output_dir=tmp_path / "eval")
    lines = re.findall(r"^\* mIoU .*$", capsys.readouterr().out, re.M)
    assert len(lines) == 3 and len(set(lines)) == 1
    assert f"mIoU {max(record['test_miou'] for record in records):.3f} " in lines[0]


def test_nearest_patches(masked, encoder, tmp_path, capsys):
    run(main_segment, "--mode knn", finetune=encoder, data_path=masked, output_dir=tmp_path)
    (record,) = read_log(tmp_path)
    assert record["test_pixel_acc"] > 60 and "bank: " in capsys.readouterr().out


def test_shares_of_processes_add_up(masked, encoder):
    """Each image is counted alone, so that any split of them into shares gives the same pixels."""
    words = f"--model vit_test --input_size 32 --num_workers 0 --data_path {masked} --mode linear".split()
    args = given_args(main_segment, words)
    main_segment.check_args(args)
    args.mean, args.std = (0.5,) * 3, (0.2,) * 3
    _, val = main_segment.masked_images(args, "train", "val")
    model = recipe.build_segmenter(args).eval()
    predict = probabilities(model, torch.device("cpu"), args)

    def count(indices):
        loader = [
            (image[None], mask[None], torch.tensor([i])) for i in indices for image, mask, _ in [val[i]]
        ]
        return count_pixels(loader, predict, args.input_size, args.nb_classes, torch.device("cpu"), args)

    whole = count(range(8))
    assert whole.sum() > 0 and (count(range(0, 8, 2)) + count(range(1, 8, 2)) == whole).all()


def spoil(folder, how):
    image, mask = folder / "train/images/sub/0.png", folder / "train/masks/sub/0.png"
    if how == "no mask":
        mask.unlink()
    elif how == "size":
        Image.new("L", (5, 5)).save(mask)
    elif how == "colour":
        Image.open(image).save(mask)
    elif how == "value":
        array = np.array(Image.open(mask))
        array[5, 5] = 77
        Image.fromarray(array).save(mask)
    elif how == "cut":
        mask.write_bytes(mask.read_bytes()[:60])
    elif how == "ignored":
        for path in folder.glob("*/masks/sub/*.png"):
            Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    elif how == "ignored in val":
        for path in folder.glob("val/masks/sub/*.png"):
            Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    elif how == "black and white":  # the commonest masks of one object
        for path in folder.glob("*/masks/sub/*.png"):
            Image.fromarray(np.where(np.array(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    elif how == "names":
        (folder / "classes.txt").write_text("a\nb\n")
    elif how == "layout":
        shutil.rmtree(folder / "val/masks")


@pytest.mark.parametrize(
    "how, flags, message",
    [
        ("no mask", "", r"1 image without a mask there: .*masks/sub/0.png"),
        ("size", "", r"0.png: a mask of 5x5 pixels for an image of "),
        ("colour", "", "a RGB picture; a mask has one channel of class numbers"),
        ("value", "--nb_classes 3", "--nb_classes 3: mask values beyond the 3 classes: 77"),
        ("cut", "", "masks cannot be used: .*0.png"),
        ("ignored", "", "--ignore_index 255: the masks hold no other value"),
        ("ignored in val", "", r"--ignore_index 255: the masks hold no other value \(.*val/masks\)"),
        (
            "black and white",
            "--nb_classes 2",
            r"train hold one class \(0\).*: 255 is none \(--ignore_index\)",
        ),
        ("names", "", "classes.txt: 2 names for 3 classes"),
        ("layout", "", "has no folder val/masks; masks are needed as"),
        ("", "--layers 9", "9 layers: the model has 2 blocks"),
        ("", "--eval", "--eval needs the checkpoint"),
        ("", "--mode knn", "--mode knn: trains nothing; pass the encoder with --finetune"),
    ],
)
def test_one_line_for_bad_input(masked, tmp_path, capsys, how, flags, message):
    folder = shutil.copytree(masked, tmp_path / "data")
    spoil(folder, how)
    with pytest.raises(UserError, match=message) as caught:
        run(main_segment, FAST, flags, data_path=folder, output_dir=tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_ignored_pixels_count_nowhere_whatever_their_number(masked, encoder, tmp_path, capsys):
    """The same pictures with the frame as 0 and classes from 1 on, so that class 0 has no pixel."""
    shifted = shutil.copytree(masked, tmp_path / "shifted")
    for path in shifted.glob("*/masks/sub/*.png"):
        Image.fromarray(np.array(Image.open(path)) + np.uint8(1)).save(path)  # 255 becomes 0
    for folder, flags in ((masked, ""), (shifted, "--ignore_index 0")):
        run(
            main_segment, "--mode knn", flags, finetune=encoder, data_path=folder, output_dir=tmp_path / "out"
        )
    first, second = read_log(tmp_path / "out")
    assert first == second
    logits, masks = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    masks[:, :2] = 3
    expected = F.cross_entropy(logits[:, :, 2:], masks[:, 2:])
    torch.testing.assert_close(recipe.PixelLoss()(logits, masks), expected)
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=logits.dtype)[: logits.shape[1]]
    weighed = F.cross_entropy(logits, masks, weights, ignore_index=logits.shape[1])  # torch's weighted mean
    torch.testing.assert_close(recipe.PixelLoss(weights)(logits, masks), weighed)


def test_balanced_classes_count_alike_whatever_their_pixels():
    args = Namespace(class_weight="balanced", nb_classes=3)
    weights = recipe.pixel_weights({0: 900, 2: 100}, args)
    assert weights.tolist() == pytest.approx([1000 / 900 / 2, 0, 1000 / 100 / 2])
    assert recipe.pixel_weights({0: 1}, Namespace(class_weight=None)) is None


def test_a_mask_that_cannot_be_read_counts_nowhere(masked, encoder, tmp_path, capsys):
    whole, part = (shutil.copytree(masked, tmp_path / name) for name in ("whole", "part"))
    mask = whole / "val/masks/sub/3.png"
    mask.write_bytes(mask.read_bytes()[:60])
    for kind in ("images", "masks"):
        (part / f"val/{kind}/sub/3.png").unlink()
    for data in (whole, part):
        flags = "--mode knn --bad_images skip"
        run(main_segment, flags, finetune=encoder, data_path=data, output_dir=tmp_path / "out")
    first, second = read_log(tmp_path / "out")
    assert first == second
    assert "1 image left out of the figures, not decodable: " in capsys.readouterr().err


def test_an_evaluation_is_that_of_the_run(masked, encoder, tmp_path, capsys):
    """--short_side and the names of the classes are the checkpoint's; other names are refused."""
    data = shutil.copytree(masked, tmp_path / "data")
    (data / "classes.txt").write_text("\ufeffground\nbright\nred\n", encoding="utf-8")
    run(main_segment, FAST, "--short_side 50", finetune=encoder, data_path=data, output_dir=tmp_path / "run")
    table = (tmp_path / "run/per_class.txt").read_text()
    assert table.splitlines()[1].startswith("ground ")
    best, last = tmp_path / "run/checkpoint-best.pth", tmp_path / "run/checkpoint-1.pth"
    (data / "classes.txt").unlink()
    run(main_segment, "--eval", resume=last, data_path=data, output_dir=tmp_path / "eval")
    assert (tmp_path / "eval/per_class.txt").read_text() == table
    (data / "classes.txt").write_text("red\nbright\nground\n")
    with pytest.raises(UserError, match=r"classes\.txt: its classes are not those of --resume: ground"):
        run(main_segment, "--eval", resume=best, data_path=data, output_dir=tmp_path / "eval")


def test_without_data_it_says_what_is_needed(capsys):
    with pytest.raises(UserError, match=r"demo/make_shapes\.py --masks DIR"):
        run(main_segment)
    with pytest.raises(UserError, match="--data_path /nowhere: does not exist"):
        run(main_segment, data_path="/nowhere")
    with pytest.raises(UserError, match=f"--data_path {__file__}: must be one folder"):
        run(main_segment, data_path=__file__)
