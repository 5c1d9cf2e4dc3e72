"""Images of more than 8 bits: the model sees the file's values, and nothing goes lost without a word."""

import argparse
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from util.data.depth import Depth, depth_of, parse_range, read_deep, same_range, unit
from util.data.labelled import build_dataset, labelled_images
from util.data.read import BadImage, Place, read_image
from util.data.transforms import EvalTransform
from util.datasets import build_pretrain_dataset, build_val_dataset
from util.errors import UserError

RNG = np.random.default_rng(0)
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # every value of 12 bits


def write_png(path, array):
    """16-bit PNG of any colour type, by hand: Pillow writes grey ones only. `array`: (H, W[, C])."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = array.shape[:2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[array.reshape(height, width, -1).shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return str(path)


def write_npy(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return str(path)


def namespace(path, **more):
    return argparse.Namespace(**{"data_path": path, "input_size": 64, "in_chans": 1, "seed": 3, **more})


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits_keeps_every_value(tmp_path, channels):
    array = RNG.integers(0, 65536, (9, 14, channels)).astype(np.uint16)
    path = write_png(tmp_path / "a.png", array)
    found = read_deep(path, channels)
    assert found.dtype == np.uint16 and np.array_equal(found, array)
    Image.fromarray(array[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_deep(str(tmp_path / "grey.png"), 1)[..., 0], array[..., 0])


@pytest.mark.parametrize(
    "dtype", ["int16", "uint16", ">u2", "int32", "uint32", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("shape", [(9, 14), (9, 14, 13)])
def test_arrays_keep_every_value(tmp_path, dtype, shape):
    array = (RNG.normal(size=shape) * 1000).astype(dtype)
    path = write_npy(tmp_path / "a.npy", np.asfortranarray(array))
    found = read_deep(path, 1 if len(shape) == 2 else 13)
    assert found.dtype.kind == array.dtype.kind and found.dtype.isnative
    np.testing.assert_array_equal(found.reshape(shape), array)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_scaling_is_exact_to_a_millionth_of_the_range(dtype):
    """Also where the values are far from zero and the range is small."""
    offset = 0 if dtype == np.uint16 else 10_000_000
    values = (RNG.integers(0, 4096, (20, 30, 2)) + offset).astype(dtype)
    depth = Depth((offset, offset + 4095, offset - 100, offset + 5000), 2)
    expected = (values.astype(np.float64) - [offset, offset - 100]) / [4095, 5100]
    result = depth.scale(values)
    assert result.dtype == np.float32 and np.abs(result - expected).max() < 1e-6


def test_a_12_bit_ramp_arrives(tmp_path):
    """16 levels arrived before, of 4096."""
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    args = namespace(tmp_path, pixel_range=[0.0, 4095.0], mean=[0.25], std=[0.5])
    dataset = build_pretrain_dataset(args)
    transform = EvalTransform(64, depth_of(args))
    sample = transform(dataset.decode(str(tmp_path / "a.png")))
    assert sample.dtype == torch.float32 and sample.shape == (1, 64, 64)
    torch.testing.assert_close(
        sample[0], torch.from_numpy((RAMP / 4095 - 0.25) / 0.5).float(), rtol=0, atol=2e-6
    )
    crop = dataset[0, 0][0]
    assert crop.dtype == torch.float32 and len(crop.unique()) > 2000 and crop.is_contiguous()
    picture = unit(sample, depth_of(args))
    assert torch.allclose(picture[0], torch.from_numpy(RAMP / 4095).float(), atol=1e-6)


def test_crop_and_flip_are_those_of_8_bits(tmp_path):
    """The same picture in 8 bits and as floating-point numbers: the same crops, to rounding."""
    array = RNG.integers(60, 190, (50, 60, 3)).astype(np.uint8)  # nothing is clipped on the way
    write_npy(tmp_path / "eight" / "a.npy", array)
    write_npy(tmp_path / "deep" / "a.npy", array.astype(np.float32))
    flags = {"in_chans": 3, "input_size": 32, "pixel_range": [0.0, 255.0], "mean": [0.0], "std": [1.0]}
    for epoch in range(4):
        eight, deep = (
            build_pretrain_dataset(namespace(tmp_path / name, **flags))[epoch, 0][0]
            for name in ("eight", "deep")
        )
        assert eight.dtype == torch.uint8 and deep.dtype == torch.float32
        # 8 bits are rounded after each of two passes; a bicubic one makes 0.5 at most 0.5 * 1.5
        assert (eight.float() / 255 - deep).abs().max() < 1.25 / 255


def test_values_outside_the_range_are_clipped(tmp_path):
    write_npy(tmp_path / "a.npy", np.array([[-5.0, 0.5], [1.0, 900.0]], np.float32).repeat(8, 0).repeat(8, 1))
    args = namespace(tmp_path, input_size=16, pixel_range=[0.0, 1.0], mean=[0.0], std=[1.0])
    build_pretrain_dataset(args)
    values = EvalTransform(16, depth_of(args))(read_deep(str(tmp_path / "a.npy"), 1))
    assert values.min() == 0 and values.max() == 1 and values[0, 4, 12] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("found, wanted", [(1, 3), (3, 1), (2, 1), (4, 3)])
def test_grey_rgb_and_alpha_go_as_with_8_bits(tmp_path, found, wanted):
    array = RNG.integers(0, 65536, (5, 6, found)).astype(np.uint16)
    result = read_deep(write_png(tmp_path / "a.png", array), wanted)
    assert result.shape == (5, 6, wanted)
    if wanted == 3:
        np.testing.assert_array_equal(result, array[..., :3] if found == 4 else array.repeat(3, 2))
    elif found == 3:
        np.testing.assert_allclose(result[..., 0], array @ [0.299, 0.587, 0.114], rtol=1e-6)
    else:
        np.testing.assert_array_equal(result, array[..., :1])
    with pytest.raises(BadImage, match=rf"{found} channels where the model has 13 \(--in_chans\)"):
        read_deep(str(tmp_path / "a.png"), 13)


def test_deep_pnm(tmp_path):
    array = RNG.integers(0, 1024, (5, 7, 3)).astype(np.uint16)
    (tmp_path / "a.ppm").write_bytes(b"P6 # a remark\n7 5\n1023\n" + array.astype(">u2").tobytes())
    np.testing.assert_array_equal(read_deep(str(tmp_path / "a.ppm"), 3), array)
    (tmp_path / "a.pgm").write_bytes(b"P5\n7 5 1023\n" + array[..., 0].astype(">u2").tobytes())
    np.testing.assert_array_equal(read_deep(str(tmp_path / "a.pgm"), 1)[..., 0], array[..., 0])
    (tmp_path / "b.pgm").write_bytes(b"P2\n1 1 1023\n512\n")
    with pytest.raises(BadImage, match="numbers as text"):
        read_deep(str(tmp_path / "b.pgm"), 1)


# ---------------------------------------------------------------- the range


def test_the_range_is_measured_told_and_kept(tmp_path):
    arrays = [RNG.normal(1000 * i, 50, (40, 50)).astype(np.float32) for i in range(5)]
    for i, array in enumerate(arrays):
        write_npy(tmp_path / f"{i}.npy", array)
    args = namespace(tmp_path)
    dataset = build_pretrain_dataset(args)
    values = np.stack(arrays)
    assert args.pixel_range == (
        np.percentile(values, 0.05, method="lower"),
        np.percentile(values, 99.95, method="higher"),
    )
    assert f"--pixel_range {args.pixel_range[0]:g} {args.pixel_range[1]:g}" in dataset.describe()
    assert "measured on 5 images" in dataset.describe()
    again = namespace(tmp_path)
    build_pretrain_dataset(again)
    assert again.pixel_range == args.pixel_range
    kept = namespace(tmp_path, pixel_range=(0.0, 1.0))  # settled: of a checkpoint
    assert "measured on" not in build_pretrain_dataset(kept).describe() and kept.pixel_range == (0.0, 1.0)


def test_bands_are_measured_one_by_one_and_few_of_many_files_are_decoded(tmp_path, monkeypatch):
    for i in range(70):
        write_npy(
            tmp_path / f"{i:02d}.npy", np.full((8, 8, 5), i, np.int16) + np.arange(5, dtype=np.int16) * 1000
        )
    args = namespace(tmp_path, in_chans=5)
    assert "measured on 64 images" in build_pretrain_dataset(args).describe()
    assert len(args.pixel_range) == 10 and args.pixel_range[8] == args.pixel_range[0] + 4000
    monkeypatch.setattr("util.data.examine.HEADERS", 20)
    seeds = []
    for seed in (0, 0, 1):
        args = namespace(tmp_path, in_chans=5, seed=seed)
        assert "measured on 20 images" in build_pretrain_dataset(args).describe()
        seeds.append(args.pixel_range)
    assert seeds[0] == seeds[1]


def test_an_8_bit_set_stays_one(tmp_path):
    Image.fromarray(RNG.integers(0, 256, (30, 30, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    for given in ("auto", ["auto"], [0.0, 255.0], None):
        args = namespace(tmp_path, in_chans=3, pixel_range=given)
        dataset = build_pretrain_dataset(args)
        assert args.pixel_range is None and dataset[0, 0][0].dtype == torch.uint8
        assert "pixel_range" not in dataset.describe()
    del args.pixel_range  # a client's arguments
    assert build_pretrain_dataset(args)[0, 0][0].dtype == torch.uint8


@pytest.mark.parametrize("values, channels, message", [
    ([5.0, 5.0], 1, "LOW must be below HIGH"), ([0.0, 1.0, 3.0, 2.0], 2, "LOW must be below HIGH"),
    ([0.0, 1.0] * 3, 4, "6 numbers for --in_chans 4"), ([1.0], 1, "1 numbers"),
    ([0.0, float("nan")], 1, "numbers LOW HIGH"), (["auto", 3.0], 1, "numbers LOW HIGH"),
])  # fmt: skip
def test_ranges_that_are_none(tmp_path, values, channels, message):
    with pytest.raises(UserError, match="--pixel_range .*" + message):
        parse_range(values, channels)


def test_ranges_are_compared_once_or_per_channel():
    assert same_range((0.0, 1.0), [0, 1, 0, 1, 0, 1]) and same_range(None, None)
    assert same_range((0.0, 1e-9), (0.0, 1e-9)) and not same_range((0.0, 1e-9), (0.0, 2e-9))
    assert not same_range((0.0, 1.0), None) and not same_range((0.0, 1.0, 0.0, 2.0), (0.0, 1.0))


# ---------------------------------------------------------------- never silent


def test_a_set_that_mixes_depths(tmp_path, capsys):
    Image.fromarray(RNG.integers(0, 256, (64, 64)).astype(np.uint8)).save(tmp_path / "eight.png")
    Image.fromarray(RAMP).save(tmp_path / "deep.png")
    with pytest.raises(
        UserError, match=r"8 bits \(.*eight.png\).* deeper ones \(.*deep.png\).*--pixel_range"
    ):
        build_pretrain_dataset(namespace(tmp_path))
    args = namespace(tmp_path, pixel_range=[0.0, 255.0])  # one scale for all
    dataset = build_pretrain_dataset(args)
    assert {dataset[0, i][0].dtype for i in range(2)} == {torch.float32}
    dataset = build_pretrain_dataset(namespace(tmp_path, pixel_range=[0.0, 4095.0]))
    with pytest.raises(BadImage, match=r"eight.png: values of 8 bits.*--pixel_range"):
        [dataset[0, i] for i in range(2)]
    with pytest.raises(BadImage, match=r"deep.png: values of more than 8 bits.*--pixel_range LOW HIGH"):
        read_image(str(tmp_path / "deep.png"), 1)
    Image.fromarray(RAMP).save(tmp_path / "more.png")
    args = namespace(tmp_path, bad_images="skip")
    dataset = build_pretrain_dataset(args)
    assert [dataset[0, i][0].dtype for i in range(3)] == [torch.float32] * 3 and len(dataset.bad_paths()) == 1


def test_the_held_out_images_are_read_as_the_others(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "deep.png")
    write_npy(tmp_path / "train" / "a.npy", RAMP)
    write_npy(tmp_path / "val" / "a.npy", RAMP // 2)
    args = namespace(tmp_path)
    build_pretrain_dataset(args)
    sample = build_val_dataset(args)[0][0]
    low, high = args.pixel_range
    expected = ((RAMP // 2 - low) / (high - low)).clip(0, 1)
    torch.testing.assert_close(
        sample[0], torch.from_numpy((expected - 0.449) / 0.226).float(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite(tmp_path, value):
    array = RNG.normal(size=(20, 20)).astype(np.float32)
    for i in range(3):
        write_npy(tmp_path / f"{i}.npy", array)
    array[3, 3] = value
    path = write_npy(tmp_path / "bad.npy", array)
    with pytest.raises(BadImage, match=r"bad\.npy: pixels that are not finite"):
        read_deep(path, 1)
    dataset = build_pretrain_dataset(namespace(tmp_path, bad_images="skip"))
    assert [dataset[0, i][0].isfinite().all() for i in range(4)] == [True] * 4
    assert dataset.bad_paths() == [path]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_constant_set_is_warned_of_once(tmp_path, dtype, capsys):
    for i in range(3):
        write_npy(tmp_path / f"{i}.npy", np.full((20, 20), 7, dtype))
    build_pretrain_dataset(namespace(tmp_path))
    assert capsys.readouterr().err.count("nothing to learn") == 1
    write_npy(tmp_path / "3.npy", np.arange(400).reshape(20, 20).astype(dtype))
    build_pretrain_dataset(namespace(tmp_path))
    assert "nothing to learn" not in capsys.readouterr().err


def test_a_range_that_makes_all_images_black_is_warned_of(tmp_path, capsys):
    for i in range(3):
        write_npy(tmp_path / f"{i}.npy", RNG.random((20, 20)).astype(np.float32))
    for given, count in (((100.0, 4095.0), 1), ([100.0, 4095.0], 1), ((0.0, 4095.0), 0), ("auto", 0)):
        build_pretrain_dataset(namespace(tmp_path, pixel_range=given))
        assert capsys.readouterr().err.count("have one value only") == count


def test_a_dropped_alpha_is_told_and_a_missing_one_refused(tmp_path, capsys):
    pixels = RNG.integers(0, 256, (20, 20, 4)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "b.png")
    build_pretrain_dataset(namespace(tmp_path, in_chans=3))[0, 0]
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "1 image with an alpha" in err and "a.png (--in_chans 4 keeps" in err
    dataset = build_pretrain_dataset(namespace(tmp_path, in_chans=4, bad_images="error"))
    assert dataset[0, 0][0].shape[0] == 4 and not capsys.readouterr().err
    with pytest.raises(
        BadImage, match=r"b.png: no alpha channel, where the model has 4 channels \(--in_chans\)"
    ):
        dataset[0, 1]


def test_reference_loader_refuses(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="--loader reference: reads images of 8 bits only"):
        build_pretrain_dataset(namespace(tmp_path, loader="reference"))


# ---------------------------------------------------------------- bad files


def test_files_that_are_none(tmp_path):
    def bad(name, data, message, channels=1):
        (tmp_path / name).write_bytes(data)
        for reader in (read_image, read_deep):
            with pytest.raises(BadImage) as error:
                reader(str(tmp_path / name), channels)
            assert message in str(error.value) and "\n" not in str(error.value)

    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    bad("pickle.npy", (tmp_path / "pickle.npy").read_bytes(), "objects (a pickle)")
    np.save(tmp_path / "huge.npy", np.zeros((2, 2), np.float32))
    data = (tmp_path / "huge.npy").read_bytes().replace(b"(2, 2), }" + b" " * 12, b"(1000000, 1000000), }")
    bad("huge.npy", data, "1000000x1000000, the file ends before")
    body = b"IHDR" + struct.pack(">IIBBBBB", 10**6, 10**6, 16, 0, 0, 0, 0)
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\r" + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "huge.png").write_bytes(huge + b"\0\0\0\x09IDAT" + bytes(60))
    with pytest.raises(BadImage, match="decompression bomb"):
        read_deep(str(tmp_path / "huge.png"), 1)
    good = write_png(tmp_path / "good.png", RAMP)
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadImage, match=r"cut\.png: "):
        read_deep(str(tmp_path / "cut.png"), 1)
    write_npy(tmp_path / "complex.npy", np.zeros((3, 3), np.complex64))
    with pytest.raises(BadImage, match="type complex64; integers and floating-point"):
        read_deep(str(tmp_path / "complex.npy"), 1)
    assert read_deep(good, 1).shape == (64, 64, 1)


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_mutated_deep_files_are_read_or_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write_png(path, RAMP) if kind == "png" else write_npy(path, RAMP)
    data, rng, outcomes = path.read_bytes(), np.random.default_rng(1), set()
    for _ in range(80):
        changed = np.frombuffer(data, np.uint8).copy()
        spots = rng.integers(0, 200 if rng.random() < 0.7 else len(data), rng.integers(1, 6))
        changed[spots] = rng.integers(0, 256, len(spots))
        path.write_bytes(changed.tobytes())
        try:
            assert read_deep(str(path), 1, with_8bit=True).ndim == 3
            outcomes.add("read")
        except BadImage as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


# ---------------------------------------------------------------- classification


@pytest.mark.parametrize("channels", [1, 3])
def test_fine_tuning_takes_deep_images(tmp_path, channels):
    for split in ("train", "val"):
        for i in range(4):
            array = RNG.integers(0, 4096, (40, 50, channels)).astype(np.uint16)
            write_png(tmp_path / split / f"c{i % 2}" / f"{i}.png", array)
    args = namespace(tmp_path, in_chans=channels, input_size=32, reprob=0.5, aa="rand-m9-mstd0.5-inc1")
    train, val = labelled_images("train", args), labelled_images("val", args)
    image, label = build_dataset(True, args)[3]  # as a client asks
    assert image.shape == (channels, 32, 32) and image.dtype == torch.float32 and label == 1
    assert "crop, flip and erasing only" in train.describe() and "erasing" not in val.describe()
    assert args.pixel_range[1] > 4000 and "--pixel_range" in train.describe()
    for dataset in (train, val):
        for i in range(4):
            image, label, _ = dataset[0, i]
            assert image.shape == (channels, 32, 32) and image.dtype == torch.float32 and label == i // 2
            assert len(image.unique()) > 300
    assert torch.equal(train[1, 2][0], train[1, 2][0]) and not torch.equal(train[1, 2][0], train[2, 2][0])


def test_a_place_is_a_name_that_opens_its_file(tmp_path):
    path = write_npy(tmp_path / "a.npy", RAMP)
    place = Place("under another name", path)
    assert place == "under another name" and place.page == 0 and isinstance(place, str)
    np.testing.assert_array_equal(read_deep(place, 1)[..., 0], RAMP)

    copy = pickle.loads(pickle.dumps(place))
    assert (copy, copy.file, copy.page) == (place, path, 0)
    with pytest.raises(BadImage) as error:
        read_image(place, 1)
    assert str(error.value).startswith("under another name: ")
