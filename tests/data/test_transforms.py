"""Crops, resizing and normalisation against torchvision and Pillow: same boxes, same distribution."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from util.data.read import open_pil, read_image
from util.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalTransform,
    PretrainTransform,
    channel_stats,
    crop_ratio,
    normalize_batch,
    random_resized_crop_box,
    reference_transform,
    resize_crop,
)
from util.errors import UserError


def textured(rng, height, width):
    """A picture with detail at all scales, as photographs have: uint8 (height, width, 3)."""
    picture = np.zeros((height, width, 3), np.float32)
    for cell in (2, 4, 8, 16, 32, 64):
        noise = rng.normal(size=(height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        noise = 0.5 * noise + noise.mean(axis=2, keepdims=True)
        for c in range(3):
            layer = Image.fromarray(noise[..., c]).resize((width, height), Image.Resampling.BICUBIC)
            picture[..., c] += np.asarray(layer) * cell**0.6
    picture = 120 + 55 * (picture - picture.mean()) / picture.std()
    return np.clip(picture, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Paths of 12 textured JPEGs of various shapes, 4:2:0."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    paths = []
    for i in range(12):
        height, width = rng.integers(220, 420, 2)
        paths.append(str(folder / f"{i}.jpg"))
        Image.fromarray(textured(rng, height, width)).save(paths[-1], quality=93, subsampling="4:2:0")
    return paths


def test_default_loader_agrees_with_the_reference_chain_on_the_same_boxes(photos):
    """Mean absolute difference below 0.1 of 255, pooled PSNR above 55 dB."""
    absolute, squared, flipped = [], [], 0
    for i, path in enumerate(photos * 4):
        seed, image = i, read_image(path)
        rng = random.Random(seed)
        top, left, height, width = random_resized_crop_box(*image.shape[:2], rng)
        flip = rng.random() < 0.5
        ours = PretrainTransform(224)(image, random.Random(seed)).numpy().astype(np.float64)
        expected = TF.resized_crop(
            open_pil(path), top, left, height, width, [224, 224], T.InterpolationMode.BICUBIC
        )
        if flip:
            expected = TF.hflip(expected)
        difference = ours - np.asarray(expected, dtype=np.float64).transpose(2, 0, 1)
        absolute.append(np.abs(difference).mean())
        squared.append((difference**2).mean())
        flipped += flip
    assert 10 < flipped < 38
    psnr = 10 * np.log10(255**2 / np.mean(squared))
    assert np.mean(absolute) < 0.1, np.mean(absolute)
    assert psnr > 55, psnr


def test_the_two_loaders_agree_after_normalisation(photos, monkeypatch):
    """What the model sees differs by less than 0.1 of 255 in the mean, with the same box and no flip."""
    image = read_image(photos[0])
    box = random_resized_crop_box(*image.shape[:2], random.Random(3))
    monkeypatch.setattr(T.RandomResizedCrop, "get_params", staticmethod(lambda *_: box))
    monkeypatch.setattr(torch, "rand", lambda *_a, **_k: torch.ones(1))  # the flip's draw
    theirs = reference_transform(224, IMAGENET_MEAN, IMAGENET_STD)(open_pil(photos[0]))[None]
    ours = normalize_batch(resize_crop(image, box, (224, 224))[None], "cpu", IMAGENET_MEAN, IMAGENET_STD)
    assert theirs.dtype == ours.dtype == torch.float32
    difference = (ours - theirs) * torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255
    assert difference.abs().mean() < 0.1


def ks_distance(a, b):
    """Largest distance of the empirical distribution functions of two samples."""
    both = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (a, b)]
    return np.abs(below[0] - below[1]).max()


@pytest.mark.parametrize(
    "height, width, scale, ratio",
    [
        (375, 500, (0.2, 1.0), (3 / 4, 4 / 3)),
        (500, 333, (0.2, 1.0), (3 / 4, 4 / 3)),
        (90, 400, (0.2, 1.0), (3 / 4, 4 / 3)),  # most tries fail, often the fall-back
        (64, 256, (0.08, 1.0), crop_ratio((32, 128))),
    ],
)
def test_crops_are_distributed_as_torchvisions(height, width, scale, ratio):
    count = 4000
    rng, image = random.Random(0), torch.empty(3, height, width, device="meta")
    torch.manual_seed(0)
    ours = np.array([random_resized_crop_box(height, width, rng, scale, ratio) for _ in range(count)])
    theirs = np.array([T.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)])
    assert (ours >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()

    def features(boxes):
        top, left, h, w = boxes.T.astype(float)
        return {"top": top, "left": left, "height": h, "width": w, "area": h * w, "log ratio": np.log(w / h)}

    limit = 1.95 * np.sqrt(2 / count)  # exceeded by chance in 1 of 1,000 comparisons
    for name, values in features(ours).items():
        assert ks_distance(values, features(theirs)[name]) < limit, name


def test_ks_distance_would_notice_another_scale():
    rng = random.Random(0)
    a, b = (
        np.array([np.prod(random_resized_crop_box(375, 500, rng, s)[2:]) for _ in range(4000)])
        for s in ((0.2, 1.0), (0.25, 1.0))
    )
    assert ks_distance(a, b) > 1.95 * np.sqrt(2 / 4000)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 4000), (4000, 1), (2, 3)])
def test_crops_of_extreme_pictures(height, width):
    rng = random.Random(0)
    fallback = torch.empty(3, height, width, device="meta")
    for _ in range(50):
        top, left, h, w = random_resized_crop_box(height, width, rng)
        assert 0 <= top <= height - h and 0 <= left <= width - w and h >= 1 and w >= 1
    if min(height, width) == 1 and max(height, width) == 4000:
        assert (top, left, h, w) == T.RandomResizedCrop.get_params(fallback, (0.2, 1.0), (3 / 4, 4 / 3))
    image = np.full((height, width, 3), 77, np.uint8)
    for transform in (PretrainTransform(32), EvalTransform((32, 16))):
        result = transform(image, rng)
        assert result.shape == (3, *transform.size) and (result == 77).all()


def test_non_square_targets_do_not_distort_objects():
    """Scale factors of the two axes differ by no more than 3/4 to 4/3."""
    rng, size = random.Random(0), (32, 128)
    for _ in range(300):
        _, _, h, w = random_resized_crop_box(400, 1600, rng, ratio=crop_ratio(size))
        assert 0.73 < (size[0] / h) / (size[1] / w) < 1.37
    assert crop_ratio(224) == (3 / 4, 4 / 3)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("size", [(64, 64), (32, 128)])
def test_resize_crop_is_pillows_bicubic_in_any_number_of_channels(channels, size):
    rng = np.random.default_rng(0)
    image = np.concatenate([textured(rng, 180, 240) for _ in range(5)], axis=2)[..., :channels].copy()
    box = (11, 17, 150, 190)
    result = resize_crop(image, box, size)
    assert result.dtype == torch.uint8 and result.shape == (channels, *size)
    for c in range(channels):
        expected = Image.fromarray(image[11:161, 17:207, c]).resize(size[::-1], Image.Resampling.BICUBIC)
        difference = result[c].numpy().astype(int) - np.asarray(expected)
        assert np.abs(difference).max() <= 2 and np.abs(difference).mean() < 0.15


def test_memory_layout_does_not_change_pixels():
    """The faster layout is the channels innermost; the kernel for the other one gives the same picture."""
    image = textured(np.random.default_rng(0), 200, 300)
    ours = resize_crop(image, (3, 5, 170, 220), (96, 96))
    assert ours.permute(1, 2, 0).is_contiguous()
    planar = torch.from_numpy(image[3:173, 5:225].transpose(2, 0, 1).copy())[None]
    assert torch.equal(
        ours, torch.nn.functional.interpolate(planar, (96, 96), mode="bicubic", antialias=True)[0]
    )


def test_pretrain_transform_is_a_function_of_its_generator():
    image = textured(np.random.default_rng(0), 100, 140)
    transform = PretrainTransform(48)
    first = [transform(image, random.Random(seed)) for seed in range(20)]
    state = random.getstate(), torch.get_rng_state()
    second = [transform(image, random.Random(seed)) for seed in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert not torch.equal(first[0], first[1])


def test_flips_are_half_and_mirror_the_crop():
    image = textured(np.random.default_rng(0), 60, 60)
    transform, flips = PretrainTransform(24), 0
    for seed in range(400):
        rng = random.Random(seed)
        plain = resize_crop(image, random_resized_crop_box(60, 60, rng), (24, 24))
        flip = rng.random() < 0.5
        flips += flip
        expected = plain.flip(-1) if flip else plain
        assert torch.equal(transform(image, random.Random(seed)), expected)
    assert 160 < flips < 240


@pytest.mark.parametrize("shape", [(90, 160), (160, 90), (100, 100), (33, 200)])
@pytest.mark.parametrize("size", [64, (32, 96)])
def test_eval_transform_covers_the_target_and_cuts_the_centre(shape, size):
    """Against resizing first and cropping then, up to the half source pixel that rounding may move."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    image = np.stack([rows, columns, rows], axis=2).astype(np.uint8)  # pixel values are coordinates
    transform = EvalTransform(size)
    height, width = transform.size
    result = transform(image)
    assert result.shape == (3, height, width) and torch.equal(result, transform(image, random.Random(0)))
    zoom = max(height / shape[0], width / shape[1])
    centre_row = result[0].float().mean().item() + 0.5
    centre_column = result[1].float().mean().item() + 0.5
    assert abs(centre_row - shape[0] / 2) < 1 and abs(centre_column - shape[1] / 2) < 1
    # Distances between pixels are those of the zoomed picture, the same on both axes
    down = (result[0, -3, 0].float() - result[0, 2, 0].float()).item() / (height - 5)
    across = (result[1, 0, -3].float() - result[1, 0, 2].float()).item() / (width - 5)
    assert down == pytest.approx(1 / zoom, abs=0.06) and across == pytest.approx(1 / zoom, abs=0.06)


def test_eval_transform_of_a_whole_square_picture_is_plain_resizing():
    image = textured(np.random.default_rng(0), 90, 90)
    assert torch.equal(EvalTransform(48)(image), resize_crop(image, (0, 0, 90, 90), (48, 48)))


def test_reference_transform_is_the_reference_chain(photos):
    chain = reference_transform(96, IMAGENET_MEAN, IMAGENET_STD)
    expected_chain = T.Compose(
        [
            T.RandomResizedCrop(96, scale=(0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    for seed, path in enumerate(photos[:4]):
        image = open_pil(path)
        torch.manual_seed(seed)
        result = chain(image)
        torch.manual_seed(seed)
        assert result.dtype == torch.float32 and torch.equal(result, expected_chain(image))


def test_normalize_batch_is_to_tensor_and_normalize():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)
    expected = torch.stack(
        [TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD) for image in images]
    )
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    for layout in (batch, batch.contiguous()):
        before = layout.clone()
        result = normalize_batch(layout, "cpu", IMAGENET_MEAN, IMAGENET_STD)
        assert result.dtype == torch.float32 and result.is_contiguous()
        assert torch.equal(result, expected) and torch.equal(layout, before)
    assert torch.equal(normalize_batch(batch, "cpu"), expected)
    assert torch.equal(normalize_batch(batch, "cpu", list(IMAGENET_MEAN), list(IMAGENET_STD)), expected)


def test_normalize_batch_passes_float_batches_untouched():
    for dtype in (torch.float32, torch.float64, torch.float16):
        batch = torch.randn(2, 3, 8, 8).to(dtype)
        assert normalize_batch(batch, "cpu", IMAGENET_MEAN, IMAGENET_STD) is batch


def test_normalize_batch_in_other_numbers_of_channels():
    batch = torch.randint(0, 256, (2, 13, 4, 4), dtype=torch.uint8)
    result = normalize_batch(batch, "cpu", *channel_stats(13))
    # Torch's bounds for float32: three operations on values up to 3
    torch.testing.assert_close(result, (batch / 255 - 0.449) / 0.226)


def test_normalize_batch_works_after_inference_mode():
    batch = torch.randint(0, 256, (2, 5, 4, 4), dtype=torch.uint8)
    with torch.inference_mode():
        normalize_batch(batch, "cpu", [0.3] * 5, [0.2] * 5)
    weight = torch.ones(5, 1, 1, requires_grad=True)
    (normalize_batch(batch, "cpu", [0.3] * 5, [0.2] * 5) * weight).sum().backward()
    assert weight.grad is not None


def test_channel_stats():
    assert channel_stats(3) == (IMAGENET_MEAN, IMAGENET_STD)
    assert channel_stats(1) == ((0.449,), (0.226,))
    assert channel_stats(13) == ((0.449,) * 13, (0.226,) * 13)
    assert channel_stats(3, [0.5], [0.25]) == ((0.5,) * 3, (0.25,) * 3)
    assert channel_stats(3, 0.5) == ((0.5,) * 3, IMAGENET_STD)
    assert channel_stats(2, [0.1, 0.2], [0.3, 0.4]) == ((0.1, 0.2), (0.3, 0.4))
    assert channel_stats(3, *channel_stats(3)) == channel_stats(3)


@pytest.mark.parametrize(
    "in_chans, mean, std, message",
    [
        (3, [0.5, 0.5], None, r"--mean: 2 values for --in_chans 3; give 1 or 3"),
        (13, None, [0.2] * 3, r"--std: 3 values for --in_chans 13; give 1 or 13"),
        (3, None, [0.2, 0.0, 0.2], r"--std 0.2 0.0 0.2: must be above 0"),
        (3, [float("nan")], None, r"--mean nan: must be finite"),
    ],
)
def test_statistics_that_do_not_fit(in_chans, mean, std, message):
    with pytest.raises(UserError, match=message):
        channel_stats(in_chans, mean, std)
