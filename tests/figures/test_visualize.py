"""reconstruction.py: panels against direct computations, honest headings, same bytes, no side effects."""

import io
from argparse import Namespace

import numpy as np
import pytest
import torch
from golden_utils import TINY_MAE, fill
from PIL import Image, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from models_mae import MaskedAutoencoderViT
from util.errors import UserError
from util.figures import canvas, reconstruction
from util.figures.canvas import draw_grid, panel_pixels, save_png, shorten, wrap
from util.figures.reconstruction import (
    BORROWED_STATISTICS,
    column_headings,
    mask_noise,
    ratio_panels,
    read_mask,
    reconstruct,
)
from util.figures.training import write_pictures
from util.rng import fixed_noise

CHANNELS = [1, 2, 3, 4, 13]
SIZES = [(32, 32), (32, 128)]
P = TINY_MAE["patch_size"]


def make(channels=3, size=(32, 32), norm_pix_loss=False, seed=5):
    """A small model, uint8 images (2, C, H, W), the same normalised, mean, std and masking noise."""
    options = dict(TINY_MAE, img_size=size, in_chans=channels, norm_pix_loss=norm_pix_loss)
    model = fill(MaskedAutoencoderViT(**options), seed, 0.2, skip="pos_embed").float()
    generator = np.random.RandomState(seed)
    pixels = torch.from_numpy(generator.randint(0, 256, (2, channels, *size), dtype=np.uint8))
    mean, std = np.linspace(0.4, 0.5, channels).tolist(), np.linspace(0.2, 0.3, channels).tolist()
    as_channels = [torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std)]
    images = (pixels / 255 - as_channels[0]) / as_channels[1]
    noise = fixed_noise(2, size[0] * size[1] // P**2, seed)
    return model, pixels, images, mean, std, noise


def removed_pixels(noise, mask_ratio, size):
    """bool (N, H, W): True where a patch is removed, worked out from the noise alone."""
    n, length = noise.shape
    kept = int(length * (1 - mask_ratio))
    removed = np.ones((n, length), dtype=bool)
    for row, order in enumerate(np.argsort(noise.numpy(), axis=1)):
        removed[row, order[:kept]] = False
    removed = removed.reshape(n, size[0] // P, size[1] // P)
    return removed.repeat(P, axis=1).repeat(P, axis=2)


def to_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def draw(model, images, noise, mean, std, *texts):
    """The picture of one way of masking, as training writes it."""
    return ratio_panels(model, images, [("", noise, 0.75)], mean, std).draw(*texts)


# Masks


def test_fixed_noise_is_a_reproducible_mask_per_picture():
    noise = fixed_noise(3, 16, seed=4)
    assert noise.shape == (3, 16) and noise.dtype == torch.float32 and noise.device.type == "cpu"
    for row in noise:
        assert torch.equal(row.sort().values, torch.arange(16) / 16)  # no ties, within [0, 1)
    assert torch.equal(noise[:2], fixed_noise(2, 16, seed=4))  # other pictures do not change a picture's mask
    assert torch.equal(noise[[2, 0]], fixed_noise([2, 0], 16, seed=4))  # by the images' numbers
    assert len({tuple(row.tolist()) for row in torch.cat([noise, fixed_noise(3, 16, seed=5)])}) == 6
    # Pinned: these numbers decide which patches of every published picture are masked.
    assert (fixed_noise(1, 8, seed=0) * 8).tolist() == [[2, 6, 0, 4, 1, 3, 5, 7]]
    assert fixed_noise(0, 16, seed=0).shape == fixed_noise([], 16, seed=0).shape == (0, 16)
    large = fixed_noise(1, 64, seed=1 + 2**32)  # all bits of a 63-bit seed count
    assert not torch.equal(fixed_noise(1, 64, seed=1), large)


# Values


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_panels(channels, size, norm_pix_loss):
    model, pixels, images, mean, std, noise = make(channels, size, norm_pix_loss)
    panels = reconstruct(model, images, noise, 0.75, mean, std)
    assert list(panels) == ["original", "masked", "reconstruction", "reconstruction + visible"]
    for panel in panels.values():
        assert panel.shape == (2, channels, *size) and panel.dtype == torch.float32
        assert panel.min() >= 0 and panel.max() <= 1
    original, masked, prediction, pasted = (panel.numpy() for panel in panels.values())
    removed = np.broadcast_to(removed_pixels(noise, 0.75, size)[:, None], original.shape)
    assert 0.7 < removed.mean() < 0.8
    np.testing.assert_array_equal((original * 255).round().astype(np.uint8), pixels.numpy())  # to the byte
    assert (masked[removed] == 0.5).all()
    np.testing.assert_array_equal(masked[~removed], original[~removed])
    np.testing.assert_array_equal(pasted[~removed], original[~removed])
    np.testing.assert_array_equal(pasted[removed], prediction[removed])
    assert (prediction[~removed] != original[~removed]).any()  # the whole prediction, visible patches too


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_prediction_against_direct_computation(norm_pix_loss, channels):
    model, _, images, mean, std, noise = make(channels, (32, 64), norm_pix_loss)
    model, images = model.double(), images.double()
    with torch.no_grad():
        pred = model.eval()(images, 0.6, noise)[1].numpy()
    panel = reconstruct(model, images, noise, 0.6, mean, std)["reconstruction"]
    assert panel.dtype == torch.float64
    expected = np.empty(images.shape)
    for n in range(2):
        for row in range(4):
            for column in range(8):
                place = np.s_[n, :, row * P : (row + 1) * P, column * P : (column + 1) * P]
                values = pred[n, row * 8 + column].reshape(P, P, channels).transpose(2, 0, 1)
                if norm_pix_loss:
                    patch = images.numpy()[place]
                    values = values * np.sqrt(patch.var(ddof=1) + 1e-6) + patch.mean()
                expected[place] = values
    expected = expected * np.reshape(std, (1, -1, 1, 1)) + np.reshape(mean, (1, -1, 1, 1))
    assert ((expected > 0) & (expected < 1)).mean() > 0.2  # enough values that the clamp leaves alone
    np.testing.assert_allclose(panel.numpy(), expected.clip(0, 1), rtol=0, atol=1e-12)


def test_perfect_normalised_prediction_gives_the_original_back():
    """The un-normalisation inverts the target of forward_loss: where the loss is 0 stands the original."""
    model, _, images, mean, std, noise = make(3, norm_pix_loss=True)
    model, images = model.double(), images.double()
    patches = model.patchify(images)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    mask = torch.ones(target.shape[:2])
    assert model.forward_loss(images, target, mask) < 1e-20
    model.forward = lambda imgs, mask_ratio, noise: (None, target, mask)
    panels = reconstruct(model, images, noise, 0.75, mean, std)
    torch.testing.assert_close(panels["reconstruction"], panels["original"], rtol=0, atol=1e-12)


def test_diverged_prediction_is_black_not_undefined():
    model, _, images, mean, std, noise = make()
    torch.nn.init.constant_(model.decoder_pred.bias, float("nan"))
    assert (reconstruct(model, images, noise, 0.75, mean, std)["reconstruction"] == 0).all()


def test_half_precision_autocast_keeps_float32_panels():
    model, _, images, mean, std, noise = make()
    exact = reconstruct(model, images, noise, 0.75, mean, std)
    with torch.autocast("cpu", torch.bfloat16):
        half = reconstruct(model, images, noise, 0.75, mean, std)
    assert half["reconstruction"].dtype == torch.float32
    assert torch.equal(half["original"], exact["original"]) and torch.equal(half["masked"], exact["masked"])
    assert 0 < (half["reconstruction"] - exact["reconstruction"]).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.5]}, "3 channels, mean has 1"),
        ({"std": [0.5] * 4}, "std 4"),
        ({"noise": torch.rand(1, 16)}, r"\(2, 16\) \(images, patches\), not \(1, 16\)"),
        ({"noise": torch.rand(2, 15)}, r"\(2, 16\) \(images, patches\), not \(2, 15\)"),
        ({"noise": torch.rand(16)}, r"\(2, 16\) \(images, patches\), not \(16,\)"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    model, _, images, mean, std, noise = make()
    arguments = {"images": images, "noise": noise, "mask_ratio": 0.75, "mean": mean, "std": std}
    with pytest.raises(ValueError, match=message):
        reconstruct(model, **{**arguments, **change})


# Headings


def test_headings_name_borrowed_statistics():
    for channels in CHANNELS:
        plain, normalised = column_headings(False, channels), column_headings(True, channels)
        assert plain[1:] == ("masked", "reconstruction", "reconstruction + visible")
        assert normalised[:2] == plain[:2]
        assert normalised[2] == "reconstruction (original patch mean/std)"
        assert normalised[3] == "reconstruction + visible (original patch mean/std)"
    assert BORROWED_STATISTICS == "original patch mean/std"


def test_headings_name_hidden_channels():
    firsts = [column_headings(False, channels)[0] for channels in CHANNELS]
    assert firsts == [
        "original",
        "original (channel 1 of 2)",
        "original",
        "original (channels 1-3 of 4)",
        "original (channels 1-3 of 13)",
    ]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_grid_draws_the_headings_of_its_model(norm_pix_loss, monkeypatch):
    drawn = []
    text = canvas.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        canvas.ImageDraw.ImageDraw, "text", lambda self, *a, **k: (drawn.append(a[1]), text(self, *a, **k))
    )
    model, _, images, mean, std, noise = make(13, norm_pix_loss=norm_pix_loss)
    draw(model, images, noise, mean, std, "epoch 20", ["one.png", "two.png"])
    headings = ("original", "(channels 1-3 of 13)", "masked", "reconstruction", "reconstruction + visible")
    for part in ("epoch 20", "one.png", "two.png", *headings):
        assert drawn.count(part) == 1, part
    assert drawn.count("(original patch mean/std)") == (2 if norm_pix_loss else 0)


# Several maskings


def test_ratios_side_by_side(monkeypatch):
    drawn = []
    text = canvas.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        canvas.ImageDraw.ImageDraw, "text", lambda self, *a, **k: (drawn.append(a[1]), text(self, *a, **k))
    )
    model, _, images, mean, std, noise = make(norm_pix_loss=True)
    maskings = [("50% masked", noise, 0.5), ("75% masked", noise, 0.75)]
    image = ratio_panels(model, images, maskings, mean, std, batch_size=1).draw("caption", ["a", "b"])
    both = [list(reconstruct(model, images, noise, ratio, mean, std).values()) for ratio in (0.5, 0.75)]
    corners = find_panels(image, [*both[0], *both[1][1:]], scale=5)
    xs = [x for _, x in corners[:7]]
    gaps = np.diff(xs)
    assert gaps[0] == gaps[3] > gaps[1] == gaps[2] == gaps[4] == gaps[5]  # groups are set apart
    for title, count in {
        "original": 1,
        "masked": 2,
        "reconstruction": 2,
        "50% masked": 1,
        "75% masked": 1,
    }.items():
        assert drawn.count(title) == count, title
    assert drawn.count("(original patch mean/std)") == 4
    # Patches that 75 % leaves visible are visible at 50 % too
    seen = [(panels[1] != reconstruction.GREY).any(dim=1) for panels in both]
    assert (seen[0] | ~seen[1]).all()
    drawn.clear()
    ratio_panels(model, images, maskings[1:], mean, std).draw("caption", ["a", "b"])
    assert drawn.count("masked") == 1 and "75% masked" not in drawn  # one alone


def save_mask(path, values, size=None):
    image = Image.fromarray(np.asarray(values, dtype=np.uint8))
    (image.resize(size, Image.Resampling.NEAREST) if size else image).save(path)
    return path


def test_mask_file_of_any_size(tmp_path):
    values = np.random.RandomState(0).choice([0, 255], (2, 3))
    expected = torch.from_numpy(values > 0).flatten()
    for size in (None, (3, 2), (300, 200), (7, 5), (2, 1)):
        mask = read_mask(save_mask(tmp_path / "mask.png", values, size), (2, 3))
        assert mask.shape == (6,) and mask.dtype == torch.bool
        if size != (2, 1):
            assert torch.equal(mask, expected), size
    # Like a photograph that is wider than the model's images: the centre counts
    wide = np.zeros((20, 60), dtype=np.uint8)
    wide[:, :20], wide[:10, 20:30] = 255, 255  # the left third is cut away
    assert read_mask(save_mask(tmp_path / "wide.png", wide), (2, 2)).tolist() == [True, False, False, False]
    # A patch goes by its mean
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:4, :3], half[4:, 4:5], half[0, 3] = 255, 255, 255
    assert read_mask(save_mask(tmp_path / "half.png", half), (2, 2)).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("value", "share"), [(0, "none"), (255, "all")])
def test_mask_file_that_hides_nothing_or_all(tmp_path, value, share):
    path = save_mask(tmp_path / "mask.png", np.full((4, 4), value))
    with pytest.raises(UserError, match=f"removes {share} of the 2x2 patches; white is removed"):
        read_mask(path, (2, 2))


WRONG_MASKS = {
    "nan": np.array([[0, np.nan]]),
    "inf": np.array([[0, np.inf]]),
    "negative": np.array([[0, -1]], np.int8),
    "deep": np.array([[0, 1000]], np.uint16),
    "complex": np.array([[0, 1j]]),
    "text": np.array([["a"]]),
    "rows": np.zeros(3),
}
HEADER = b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999, 999999), }"
DAMAGED_MASKS = {
    "empty": b"",
    "zip": b"PK\x03\x04" + bytes(60),
    "token": b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': (((".ljust(118),
    "huge": b"\x93NUMPY\x01\x00\x76\x00" + HEADER.ljust(117) + b"\n",
}


@pytest.mark.parametrize("how", [*WRONG_MASKS, *DAMAGED_MASKS])
def test_an_array_that_is_no_mask(tmp_path, how):
    path = tmp_path / "mask.npy"
    if how in WRONG_MASKS:
        np.save(path, WRONG_MASKS[how])
    else:
        path.write_bytes(DAMAGED_MASKS[how])
    with pytest.raises(
        UserError, match=r"^--mask_file \S+mask\.npy: is no mask of rows and columns: "
    ) as error:
        read_mask(path, (2, 2))
    assert "\n" not in str(error.value)


def test_the_ratio_of_a_mask_is_its_share_where_rounding_allows_it():
    exact = 0
    for length in range(2, 200):
        for hidden in range(1, length):
            ratio = mask_noise(torch.arange(length) < hidden, 1)[1]
            assert int(length * (1 - ratio)) == length - hidden
            exact += ratio == hidden / length
            assert ratio in (hidden / length, (hidden - 0.5) / length)
    assert mask_noise(torch.arange(16) < 4, 1)[1] == 0.25 and exact > 15_000


def test_mask_noise_removes_exactly_the_mask():
    model, _, images, mean, std, _ = make()
    for count in (1, 5, 15):
        removed = torch.zeros(16, dtype=torch.bool)
        removed[torch.randperm(16, generator=torch.Generator().manual_seed(count))[:count]] = True
        noise, ratio = mask_noise(removed, 2)
        assert torch.equal(model(images, ratio, noise)[2], removed.float().expand(2, -1))
        panels = reconstruct(model, images, noise, ratio, mean, std)
        grey = (panels["masked"] == reconstruction.GREY).all(dim=1)
        shown = removed.view(4, 4).repeat_interleave(P, 0).repeat_interleave(P, 1)
        assert torch.equal(grey, shown.expand(2, -1, -1))


# Drawing


def find_panels(image, panels, scale):
    """Asserts that every enlarged panel stands in `image` once; returns their corners (y, x), row by row."""
    canvas, corners = np.asarray(image), []
    for row in range(len(panels[0])):
        for column in panels:
            pixels = panel_pixels(column[row])
            rgb = pixels.repeat(scale, 0).repeat(scale, 1)
            h, w = rgb.shape[:2]
            windows = np.lib.stride_tricks.sliding_window_view(canvas[..., 0], (1, w))[:, :, 0]
            hits = np.argwhere((windows == rgb[0, :, 0]).all(-1))
            places = [(y, x) for y, x in hits if np.array_equal(canvas[y : y + h, x : x + w], rgb)]
            assert len(places) == 1
            corners += places
    return corners


@pytest.mark.parametrize(
    ("size", "scale"), [((32, 32), 5), ((32, 128), 2), ((128, 32), 5), ((32, 160), 1), ((400, 40), 1)]
)
def test_panels_are_enlarged_without_smoothing_and_in_order(size, scale):
    generator = torch.Generator().manual_seed(0)
    columns = [torch.rand(2, 3, *size, generator=generator) for _ in range(4)]
    image = draw_grid(column_headings(True, 3), columns, "caption", ["a", "b"])
    assert image.mode == "RGB"
    corners = find_panels(image, columns, scale)
    ys, xs = [y for y, _ in corners], [x for _, x in corners]
    assert ys[:4] == [ys[0]] * 4 and ys[4:] == [ys[4]] * 4 and ys[4] >= ys[0] + size[0] * scale
    assert xs[:4] == xs[4:] and min(np.diff(xs[:4])) >= max(160, size[1] * scale)
    above = np.asarray(image)[: ys[0]]
    for x in xs[:4]:  # the text stands above its column, clear of the panel
        assert (above[ys[0] // 2 : -2, x : x + size[1] * scale] < 128).any() and (above[-2:] == 255).all()
    assert max(ys) + size[0] * scale < image.height and max(xs) + size[1] * scale < image.width


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_whole_grid_shows_the_panels(channels, size):
    model, _, images, mean, std, noise = make(channels, size, norm_pix_loss=True)
    panels = reconstruct(model, images, noise, 0.75, mean, std)
    image = draw(model, images, noise, mean, std)
    find_panels(image, list(panels.values()), scale=5 if size[1] == 32 else 2)


def test_channels_to_rgb():
    values = torch.arange(13, dtype=torch.float32)[:, None, None].expand(13, 2, 3) / 255
    assert panel_pixels(values[:1]).shape == (2, 3, 3) and panel_pixels(values[:1]).dtype == np.uint8
    shown = {channels: panel_pixels(values[4 : 4 + channels])[0, 0].tolist() for channels in (1, 2, 3, 4, 9)}
    assert shown == {1: [4, 4, 4], 2: [4, 4, 4], 3: [4, 5, 6], 4: [4, 5, 6], 9: [4, 5, 6]}
    assert panel_pixels(torch.full((1, 1, 1), reconstruction.GREY)).flatten().tolist() == [128, 128, 128]


def test_text_stays_within_its_width():
    font = ImageFont.load_default(14)
    text = "reconstruction + visible (original patch mean/std)"
    lines = wrap(text, font, 160)
    assert len(lines) > 1 and " ".join(lines) == text and all(font.getlength(line) <= 160 for line in lines)
    path = "a/very/long/folder/with/many/parts/" * 3 + "picture.jpg"
    short = shorten(path, font, 160)
    assert font.getlength(short) <= 160
    assert short.startswith("a/") and short.endswith(".jpg") and "..." in short
    assert shorten("short.jpg", font, 160) == "short.jpg" and wrap("", font, 160) == []
    # A long caption takes more lines, it does not leave the picture.
    columns = [torch.zeros(1, 1, 32, 32)] * 4
    once, often = (draw_grid(column_headings(False, 1), columns, "a caption " * n) for n in (1, 40))
    assert once.width == often.width and once.height < often.height
    margins = np.asarray(often)
    assert (margins[:, :4] == 255).all() and (margins[:, -4:] == 255).all()


# Determinism and side effects


def test_same_bytes_twice_and_another_seed_another_picture():
    pictures = []
    for seed in (5, 5, 6):
        model, _, images, mean, std, _ = make()
        noise = fixed_noise(2, 16, seed)
        image = draw(model, images, noise, mean, std, "epoch 1", ["a", "b"])
        pictures.append(to_bytes(image))
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_leaves_modes_and_random_state_alone(training, grad, fails):
    model, _, images, mean, std, noise = make()
    model.blocks[0].attn.proj_drop = torch.nn.Dropout(0.5)  # draws numbers in training mode
    model.train(training)
    model.blocks[1].train(not training)  # a part with a mode of its own
    modes = [module.training for module in model.modules()]
    state, np_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    expected = reconstruct(model, images, noise, 0.75, mean, std)
    with torch.set_grad_enabled(grad):
        if fails:
            with pytest.raises(ValueError, match="the model takes"):
                reconstruct(model, images[:, :1], noise, 0.75, mean[:1], std[:1])
        else:
            panels = reconstruct(model, images, noise, 0.75, mean, std)
            assert not panels["reconstruction"].requires_grad
            assert torch.equal(panels["reconstruction"], expected["reconstruction"])
        assert torch.is_grad_enabled() == grad
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == np_state).all()
    assert all(parameter.grad is None for parameter in model.parameters())


# Files


def test_tensorboard_gets_the_picture_that_is_written(tmp_path):
    model, pixels, _, mean, std, _ = make()
    args = Namespace(mask_ratio=0.75, mean=mean, std=std, output_dir=str(tmp_path))
    with SummaryWriter(tmp_path) as writer:
        path = write_pictures(model, pixels, args, 1, 0.5, writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Images("reconstruction")
    assert event.step == 2000
    shown = Image.open(io.BytesIO(event.encoded_image_string))
    assert (np.asarray(shown) == np.asarray(Image.open(path))).all()


def test_save_png(tmp_path):
    image = Image.new("RGB", (8, 6), (1, 2, 3))
    path = tmp_path / "picture.png"
    path.write_bytes(b"older")
    assert save_png(image, path) == path
    assert path.read_bytes() == to_bytes(image)
    assert save_png(image, str(path)) == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_save_png_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"older")

    def disk_full(self, file, **options):
        with open(file, "wb") as stream:
            stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_png(Image.new("RGB", (8, 6)), path)
    assert path.read_bytes() == b"older" and [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_save_png_into_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_png(Image.new("RGB", (8, 6)), tmp_path / "missing" / "picture.png")
