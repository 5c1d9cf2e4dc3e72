"""`--mask file --mask_file DIR`: counts and order, the crop, runs, and wrong inputs."""

import math
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from golden_utils import TINY_MAE, fill
from image_utils import make_folder
from PIL import Image
from test_main_pretrain import assert_same, names_in, run, weights
from test_teacher import write_teacher
from torch.nn.functional import max_pool2d

import models_mae
from util.data.dataset import build_pretrain_dataset, build_val_dataset
from util.errors import UserError
from util.recipes.mask_folder import use_folder
from util.weights.files import read_file

NANO = ["--model", "mae_vit_nano", "--save_freq", "1", "--vis_freq", "1"]

pytestmark = pytest.mark.usefixtures("nano")


def write_masks(images, folder, kind=".png", paint=None):
    """A mask for each picture below `images`; by default a bright rectangle, another one for each."""
    for number, path in enumerate(sorted(images.rglob("*.jpg"))):
        with Image.open(path) as image:
            mask = np.zeros(image.size[::-1], np.uint8)
        if paint is None:
            mask[number : number + 20, 5 : 30 + number] = 255
        else:
            mask = paint(mask)
        place = (folder / path.relative_to(images)).with_suffix(kind)
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, mask) if kind == ".npy" else Image.fromarray(mask).save(place)
    return folder


@pytest.fixture(scope="module")
def masks(images, tmp_path_factory):
    """In train/ pictures and one array; none for val/."""
    folder = tmp_path_factory.mktemp("masks")
    write_masks(images / "train", folder / "train")
    first = folder / "train" / "c0" / "000.png"
    np.save(first.with_suffix(".npy"), np.asarray(Image.open(first)) > 127)
    first.unlink()
    return folder


def prepared(images, folder, **changes):
    """(model, training set, held-out set, flags) of a run with a folder of masks."""
    args = Namespace(data_path=str(images), input_size=32, in_chans=3, mean=(0.4, 0.5, 0.6), std=(0.2,) * 3,
                     seed=3, mask="file", mask_file=str(folder), model="m", **changes)  # fmt: skip
    dataset, val_set = build_pretrain_dataset(args), build_val_dataset(args)
    model = fill(models_mae.mae_vit(TINY_MAE), seed=10, std=0.1, skip="pos_embed").float()
    use_folder(model, args, dataset, val_set)
    return model, dataset, val_set, args


def test_a_mask_is_cropped_by_crop_scale_as_its_image(images, masks):
    dataset = prepared(images, masks, crop_scale=(1.0, 1.0))[1]
    for index in range(len(dataset)):
        one, other = (dataset[epoch, index][0] for epoch in (0, 1))  # the same place, flipped or not
        assert torch.equal(one, other) or torch.equal(one, other.flip(-1))


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.3])
def test_the_count_is_exact_and_the_order_is_that_of_the_coverage(images, masks, ratio):
    """1,000 draws, of masks that cover anything from nothing to all."""
    model = prepared(images, masks)[0]
    generator = torch.Generator().manual_seed(0)
    covered = torch.randint(0, 4, (1000, 16), generator=generator) * 16  # of 64 pixels, many alike
    covered[:100], covered[100:200] = 0, 64
    inside = torch.arange(64) < covered[..., None]  # (N, L, p * p)
    patches = inside.float().repeat_interleave(3, dim=2)
    images = torch.randn(1000, 3, 32, 32, generator=generator)
    masks = model.unpatchify(patches)[:, :1]
    torch.manual_seed(5)
    _, _, mask = model(torch.cat([images, masks], dim=1), ratio)
    torch.manual_seed(5)
    noise = torch.rand(1000, 16)
    hidden = 16 - int(16 * (1 - ratio))
    assert (mask.sum(dim=1) == hidden).all()
    for row, numbers, coverage in zip(mask.tolist(), noise.tolist(), covered.tolist(), strict=True):
        order = sorted(range(16), key=lambda i: (coverage[i], numbers[i]))
        assert [i for i in range(16) if row[i]] == sorted(order[16 - hidden :])
    # Where all are alike each patch is hidden as often as others: 6 standard deviations of 200 draws
    share = hidden / 16
    bound = 6 * math.sqrt(200 * share * (1 - share))
    assert (mask[:200].sum(dim=0) - 200 * share).abs().max() < bound
    # and images without masks are as the plain model's, bit for bit
    plain = models_mae.mae_vit(TINY_MAE)
    plain.load_state_dict(model.state_dict())
    for own, wanted in zip(model(images, ratio, noise), plain(images, ratio, noise), strict=True):
        assert torch.equal(own, wanted)


def test_what_the_mask_says_is_hidden(images, masks):
    """A mask of exactly the hidden patches is the mask."""
    model, *_ = prepared(images, masks)
    wanted = torch.zeros(2, 16)
    wanted[0, [0, 5, 6, 9]], wanted[1, [15, 3, 2, 7]] = 1, 1
    pixels = model.unpatchify(wanted[..., None].expand(-1, -1, 192))[:, :1]
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    for seed in range(5):
        torch.manual_seed(seed)
        assert torch.equal(model(torch.cat([torch.randn(2, 3, 32, 32), pixels], dim=1), 0.25)[2], wanted)
    assert seen == [13] * 5


@pytest.mark.parametrize("kind", [".png", ".npy"])
def test_mask_and_image_have_the_same_crop(tmp_path, kind):
    """Of pictures that are white where their mask is, away from edges; pictures are those of a plain set."""
    make_folder(tmp_path / "images" / "train", 4, height=90, width=70)
    make_folder(tmp_path / "images" / "val", 4, height=50, width=70)
    rs = np.random.RandomState(0)
    for path in sorted((tmp_path / "images").rglob("*.jpg")):
        with Image.open(path) as image:
            width, height = image.size
        blocks = (
            rs.randint(0, 2, (height // 10, width // 10)).repeat(10, 0).repeat(10, 1).astype(np.uint8) * 255
        )
        Image.fromarray(blocks).convert("RGB").save(path.with_suffix(".png"))
        path.unlink()
        place = (tmp_path / "masks" / path.relative_to(tmp_path / "images")).with_suffix(kind)
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, blocks) if kind == ".npy" else Image.fromarray(blocks).save(place)
    _, dataset, val_set, args = prepared(tmp_path / "images", tmp_path / "masks")
    plain = build_pretrain_dataset(args), build_val_dataset(args)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (args.mean, args.std))
    flips = set()
    for own, same in zip((dataset, val_set), plain, strict=True):
        for key in [(epoch, i, repeat) for epoch in range(6) for i in range(4) for repeat in range(2)]:
            sample, pixels = own[key][0], same[key][0]
            assert sample.shape == (4, 32, 32) and sample.dtype == torch.float32
            assert torch.equal(sample[:3], pixels.float().div_(255).sub_(mean).div_(std))
            mask, white = sample[3], pixels[0].float() / 255
            near = mask[None, None]
            inside = max_pool2d(near, 7, 1, 3) == -max_pool2d(-near, 7, 1, 3)  # nothing else is near
            agrees = (white > 0.5) == (mask > 0.5)
            assert mask.unique().tolist() in ([0, 1], [0], [1])
            assert agrees[inside[0, 0]].all() and agrees.float().mean() > 0.9
            flips.add((own is dataset, bool((white[:, :16] > 0.5).sum() > (white[:, 16:] > 0.5).sum())))
    assert len(flips) == 4


def test_black_masks_are_random_ones_bit_for_bit(images, tmp_path):
    """The draws, the pictures and the normalisation are those of a run without masks."""
    for kind in ("train", "val"):
        write_masks(images / kind, tmp_path / "masks" / kind, paint=lambda mask: mask)
    logs = [
        run(images, tmp_path / name, *NANO, *flags)
        for name, flags in (
            ("file", ["--mask", "file", "--mask_file", str(tmp_path / "masks")]),
            ("random", []),
        )
    ]
    assert logs[0] == logs[1]
    assert_same(*(weights(tmp_path / name / "checkpoint-1.pth") for name in ("file", "random")))
    pictures = [(tmp_path / name / "reconstruction-1.png").read_bytes() for name in ("file", "random")]
    assert pictures[0] == pictures[1]


def test_resumed_inside_an_epoch_and_at_any_number_of_workers(images, masks, tmp_path, capsys):
    own = [*NANO, "--mask", "file", "--mask_file", str(masks), "--mask_ratio", "0.5", "--repeated_aug", "2"]
    whole = run(images, tmp_path / "whole", *own, "--num_workers", "2")
    out = capsys.readouterr().out
    assert f"masks: of each image in {masks / 'train'}; held-out images are masked at random" in out
    run(images, tmp_path / "parts", *own, "--max_steps", "4")
    moved = tmp_path / "moved"  # the same masks elsewhere
    shutil.copytree(masks, moved)
    again = [*own, "--mask_file", str(moved), "--resume", "auto"]
    other = moved / "train" / "c1" / "001.png"
    before = other.read_bytes()
    other.write_bytes(before + b"\0")
    with pytest.raises(
        UserError, match=r"inside an epoch, and this command differs: mask_file \w{8} -> \w{8}"
    ):
        run(images, tmp_path / "parts", *again)
    other.write_bytes(before)
    assert run(images, tmp_path / "parts", *again) == whole
    last = "checkpoint-1.pth"
    assert_same(weights(tmp_path / "whole" / last), weights(tmp_path / "parts" / last))
    assert len(read_file(tmp_path / "parts" / last)["args"]["mask_digest"]) == 8
    random = run(images, tmp_path / "random", *NANO, "--mask_ratio", "0.5", "--repeated_aug", "2")
    assert random[0]["train_loss"] != whole[0]["train_loss"]


def test_held_out_images_have_masks_where_there_are_some(images, masks, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(masks, both)
    write_masks(images / "val", both / "val")
    flags = [
        *NANO,
        "--lr",
        "0",
        "--epochs",
        "1",
        "--warmup_epochs",
        "0",
        "--mask",
        "file",
        "--mask_ratio",
        "0.5",
    ]
    found = {}
    for name, folder, size in (("train", masks, "4"), ("both", both, "4"), ("two", both, "2")):
        [line] = run(images, tmp_path / name, *flags, "--mask_file", str(folder), "--batch_size", size)
        found[name] = line["val_loss"]
    [line] = run(images, tmp_path / "random", *NANO, *flags, "--mask", "random")
    assert found["train"] == line["val_loss"] and found["both"] == found["two"] != found["train"]
    assert "reconstruction-0.png" in names_in(tmp_path / "both")
    flat = tmp_path / "flat"  # without train/: beside the folder of the training images
    shutil.copytree(masks / "train", flat)
    run(images, tmp_path / "flat_run", *flags, "--mask_file", str(flat))
    assert_same(*(weights(tmp_path / name / "checkpoint-0.pth") for name in ("train", "flat_run")))


@pytest.mark.parametrize("name", ["{}", "{}/", "{}/.", "."])
def test_the_folder_of_the_images_may_be_named_in_any_way(images, masks, monkeypatch, name):
    monkeypatch.chdir(images / "train")
    dataset = build_pretrain_dataset(Namespace(data_path=name.format(images / "train"), input_size=32))
    args = Namespace(mask="file", mask_file=str(masks), model="m", mean=(0.5,) * 3, std=(0.5,) * 3)
    use_folder(models_mae.mae_vit(TINY_MAE), args, dataset)
    assert dataset.masks == str(masks / "train") and dataset[0][0].shape == (4, 32, 32)


@pytest.mark.parametrize(
    "flags",
    [
        ["--target", "pca", "--target_size", "4", "--ema", "0.9"],
        ["--decoder", "cross", "--predict_ratio", "0.5", "--knn_freq", "1", "--grad_checkpointing"],
        ["--visible_loss", "0.1", "--target", "norm_pixels", "--teacher", "TEACHER", "--compile"],
    ],
)
def test_with_other_flags(images, masks, tmp_path, flags):
    path = str(write_teacher(tmp_path / "teacher.pth"))
    own = [path if flag == "TEACHER" else flag for flag in flags]
    [line] = run(
        images, tmp_path / "out", *NANO, "--epochs", "1", "--mask", "file", "--mask_file", str(masks), *own
    )
    assert math.isfinite(line["train_loss"]) and math.isfinite(line["val_loss"])


def break_masks(folder, how):
    if how == "absent":
        for name in ("c0/002.png", "c1/003.png", "c0/004.png", "c1/005.png"):
            (folder / "train" / name).unlink()
    if how == "size":
        Image.fromarray(np.zeros((4, 6), np.uint8)).save(folder / "train" / "c0" / "002.png")
    if how == "damaged":
        (folder / "train" / "c0" / "002.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    if how == "colours":
        np.save(folder / "train" / "c0" / "002.npy", np.zeros((40, 48, 3)))
    if how == "empty":
        (folder / "train" / "c0" / "002.npy").write_bytes(b"")


@pytest.mark.parametrize(
    ("how", "flags", "text"),
    [
        (
            "absent",
            [],
            r"--mask_file \S+: holds no mask of 4 of 13 images, a \.png or .*/c0/002\.jpg",
        ),
        ("size", [], r"002\.png: a mask of 6x4 pixels for an image of 48x40 \(\S+c0/002\.jpg\)"),
        ("damaged", [], r"002\.png: "),
        ("colours", [], r"002\.npy: is no mask of rows and columns: its shape is \(40, 48, 3\)"),
        ("empty", [], r"002\.npy: is no mask of rows and columns: No data left in file"),
        (
            "",
            ["--pages", "all", "--data_path", "PAGES"],
            r"one folder or list, not for archives or --pages all",
        ),
        ("", ["--mask", "block"], r"--mask_file \S+: a folder needs --mask file"),
        ("", ["--size_schedule", "16:0", "32:0.5"], r"goes without --size_schedule and --loader reference"),
        ("", ["--loader", "reference"], r"goes without --size_schedule and --loader reference"),
        ("", ["--data_path", "TRAIN", "VAL"], r"is for the images of one folder or list"),
        ("", ["--model", "mae_vit_own"], r"mae_vit_own draws its own masks; leave the flag out"),
    ],
)
def test_wrong_inputs(images, masks, tmp_path, monkeypatch, how, flags, text):
    class Own(models_mae.MaskedAutoencoderViT):
        def random_masking(self, x, mask_ratio):
            return super().random_masking(x, mask_ratio)

    sizes = {**TINY_MAE}
    monkeypatch.setitem(models_mae.MODELS, "mae_vit_own", lambda **changes: Own(**{**sizes, **changes}))
    folder = tmp_path / "masks"
    shutil.copytree(masks, folder)
    break_masks(folder, how)
    pages = tmp_path / "pages"
    pages.mkdir()
    page = Image.new("L", (48, 40))
    page.save(pages / "a.tif", save_all=True, append_images=[page])
    named = {"TRAIN": str(images / "train"), "VAL": str(images / "val"), "PAGES": str(pages)}
    flags = [named.get(flag, flag) for flag in flags]
    with pytest.raises(UserError, match=text) as error:
        run(images, tmp_path / "out", *NANO, "--mask", "file", "--mask_file", str(folder), *flags)
    assert "\n" not in str(error.value) and not list((tmp_path / "out").glob("*.pth"))


def test_an_unreadable_mask_is_passed_over_if_asked(images, masks, tmp_path, capsys):
    folder = tmp_path / "masks"
    shutil.copytree(masks, folder)
    break_masks(folder, "damaged")
    run(images, tmp_path / "out", *NANO, "--mask", "file", "--mask_file", str(folder), "--bad_images", "skip")
    captured = capsys.readouterr()
    assert "could not decode 1 of the images so far" in captured.out + captured.err
