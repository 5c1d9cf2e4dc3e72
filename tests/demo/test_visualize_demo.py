"""demo/visualize.py and util/figures/attention.py: pictures from checkpoints of all kinds, and refusals."""

import importlib.util
import shutil

import numpy as np
import pytest
import torch
from golden_utils import REPO, TINY, TINY_MAE, fill
from image_utils import make_folder, picture
from PIL import Image

from models_mae import MODELS, MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.cli.parser import ArgumentParser, parse_args
from util.errors import UserError
from util.evaluate.features import encoder_features
from util.figures import canvas
from util.figures.attention import attention_panels, block_attention, class_token_attention, overlay
from util.weights.build import build
from util.weights.describe import describe
from util.weights.files import read_file
from util.weights.flags import add_decoder_args, add_weights_args
from util.weights.hugging_face import to_hugging_face

HEADS = ["--num_heads", "3", "--decoder_num_heads", "4"]  # of TINY_MAE, which is no named model

spec = importlib.util.spec_from_file_location("demo_visualize", REPO / "demo/visualize.py")
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


def tiny_mae(**options):
    return fill(MaskedAutoencoderViT(**{**TINY_MAE, **options}), 3, 0.2, skip="pos_embed").float().eval()


def save(path, model, **content):
    torch.save({"model": model.state_dict(), **content}, path)
    return path


def run(*words):
    parser = ArgumentParser(parents=[demo.get_args_parser()])
    demo.main(parse_args(parser, [str(word) for word in words]))


@pytest.fixture
def drawn(monkeypatch):
    """All texts that are drawn."""
    texts, text = [], canvas.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        canvas.ImageDraw.ImageDraw, "text", lambda self, *a, **k: (texts.append(a[1]), text(self, *a, **k))
    )
    return texts


# The command


def test_same_bytes_twice_with_labels(tmp_path, drawn, capsys):
    checkpoint = save(
        tmp_path / "checkpoint-3.pth", tiny_mae(norm_pix_loss=True), args={"norm_pix_loss": True}
    )
    make_folder(tmp_path / "images", 3)
    pictures = []
    for seed in (2, 2, 4):
        output = tmp_path / f"{len(pictures)}.png"
        run("--resume", checkpoint, *HEADS, tmp_path / "images", "--seed", seed, "--output", output)
        pictures.append(output.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert "checkpoint-3.pth, 75% masked, seed 2" in drawn and "001.jpg" in drawn
    assert drawn.count("(original patch mean/std)") == 6
    assert "does not say" not in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["0.png", "1.png", "2.png"]


def test_ratios_rows_and_mask_file(tmp_path, drawn, capsys):
    checkpoint = save(tmp_path / "c.pth", tiny_mae(), args={"mask_ratio": 0.6})  # another than is drawn
    folder, output = make_folder(tmp_path / "images", 9), tmp_path / "out.png"
    common = ["--resume", checkpoint, *HEADS, "--output", output]
    run(*common, folder, "--rows", 2, "--mask_ratio", 0.5, 0.75, 0.875)
    assert {"50% masked", "75% masked", "87.5% masked", "000.jpg", "008.jpg"} <= set(drawn)
    assert "004.jpg" not in drawn and drawn.count("reconstruction + visible") == 3
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run(*common, folder / "001.jpg", "--mask_file", tmp_path / "mask.png")
    assert "c.pth, 8 of 16 patches masked" in drawn
    pixels = np.asarray(Image.open(output))
    assert ((pixels == 128).all(axis=-1)).sum() == 160 * 80  # half a panel is grey
    assert "c.pth does not say whether it predicts normalised pixels" in capsys.readouterr().out


def test_pages(tmp_path, drawn, capsys):
    checkpoint = save(tmp_path / "c.pth", tiny_mae(), args={"mask_ratio": 0.6})
    pages = [Image.new("RGB", (32, 32), (60 * i, 90, 90)) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    words = ["--resume", checkpoint, *HEADS, tmp_path / "a.tif", "--output", tmp_path / "out.png"]
    run(*words)
    assert "a.tif" in drawn and "a.tif#2" not in drawn and "--pages all" in capsys.readouterr().err
    run(*words, "--pages", "all", "--rows", 2)
    assert {"a.tif#1", "a.tif#3"} <= set(drawn) and "a.tif#2" not in drawn


@pytest.mark.parametrize(("channels", "size"), [(1, (32, 32)), (3, (32, 64)), (5, (32, 32))])
def test_grey_rectangular_and_many_channels(tmp_path, drawn, channels, size):
    model = tiny_mae(in_chans=channels, img_size=size)
    args = {"input_size": size, "mean": (0.4,) * channels, "std": (0.3,) * channels, "in_chans": channels}
    checkpoint = save(tmp_path / "c.pth", model, args={**args, "norm_pix_loss": False})
    if channels == 5:
        image = tmp_path / "image.npy"
        np.save(image, picture(0, 40, 50, 5))
    else:
        image = tmp_path / "image.png"
        Image.fromarray(picture(0, 40, 50)).save(image)
    run("--resume", checkpoint, *HEADS, image, "--output", tmp_path / "out.png", "--attention")
    assert ("(channels 1-3 of 5)" in drawn) == (channels == 5)
    out, attention = Image.open(tmp_path / "out.png"), Image.open(tmp_path / "out-attention.png")
    scale = 5 if size[1] == 32 else 3
    assert out.width > 4 * size[1] * scale and attention.width > 5 * size[1] * scale


def test_demo_set_when_no_image_is_named(tmp_path, monkeypatch, capsys, drawn):
    from util.demo_set.files import ensure_demo_data

    monkeypatch.setenv("MAE_DEMO_DATA", str(tmp_path / "demo"))
    root = ensure_demo_data(tmp_path / "demo", train=1, val=1, workers=1)
    monkeypatch.setattr(demo, "ensure_demo_data", lambda log: root)
    checkpoint = save(tmp_path / "c.pth", tiny_mae(), args={"norm_pix_loss": False})
    run("--resume", checkpoint, *HEADS, "--output", tmp_path / "out.png")
    out = capsys.readouterr().out
    assert "showing 5 of the demo set" in out and "wrote" in out
    assert sum(text.endswith(".jpg") for text in drawn) == 5


def test_encoder_only_is_refused_but_has_attention(tmp_path, capsys):
    state = tiny_mae().state_dict()
    encoder = {k: v for k, v in state.items() if not k.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, tmp_path / "mae_pretrain_vit_tiny.pth")
    image = make_folder(tmp_path / "images", 1)
    words = [
        "--resume",
        tmp_path / "mae_pretrain_vit_tiny.pth",
        *HEADS[:2],
        image,
        "--output",
        tmp_path / "o.png",
    ]
    with pytest.raises(UserError, match=r"no decoder \(encoder only\).*mae_visualize_vit_\*\.pth"):
        run(*words)
    assert not (tmp_path / "o.png").exists()
    run(*words, "--attention")
    assert "features only" in capsys.readouterr().out
    assert not (tmp_path / "o.png").exists() and (tmp_path / "o-attention.png").exists()


def test_features_and_each_panel_as_a_file(tmp_path, drawn, capsys):
    """Same bytes twice; the neighbour of a picture is its copy; panels have names that any system takes."""
    folder = make_folder(tmp_path / "images", 6)
    shutil.copy(folder / "000.jpg", folder / "a: b?.jpg")
    (folder / "005.jpg").write_bytes((folder / "005.jpg").read_bytes()[:300])  # cut short
    checkpoint = save(tmp_path / "c.pth", tiny_mae(), args={"norm_pix_loss": True})
    words = [
        "--resume",
        checkpoint,
        *HEADS,
        folder,
        "--rows",
        2,
        "--pca",
        "--neighbours",
        2,
        "--bad_images",
        "skip",
    ]
    for name in ("x", "y"):
        run(*words, "--output", tmp_path / f"{name}.png", "--save_images", tmp_path / name)
    for kind in ("", "-pca", "-neighbours"):
        assert (tmp_path / f"x{kind}.png").read_bytes() == (tmp_path / f"y{kind}.png").read_bytes()
    names = sorted(path.name for path in (tmp_path / "x").iterdir())
    kinds = [
        "image",
        "masked",
        "neighbour-1",
        "neighbour-2",
        "original",
        "pca-of-all",
        "pca-of-all-foreground",
    ]
    kinds += ["pca-of-each-image", "reconstruction", "reconstruction-visible"]
    stems = ["000-000.jpg", "001-a_b_.jpg"]
    assert names == sorted(f"{stem}-{kind}.png" for stem in stems for kind in kinds)
    one, other = ((tmp_path / f"x/{stems[0]}-{kind}.png").read_bytes() for kind in ("image", "neighbour-1"))
    assert one == other and "left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="--neighbours: needs several images; name a folder"):
        run(
            "--resume", checkpoint, *HEADS, folder / "000.jpg", "--neighbours", "--output", tmp_path / "z.png"
        )
    assert not (tmp_path / "z.png").exists()
    words = ["--resume", checkpoint, *HEADS, folder / "000.jpg", folder / "001.jpg"]
    run(*words, "--neighbours", 10**6, "--output", tmp_path / "all.png")  # of two there is one
    run(*words, "--neighbours", 1, "--output", tmp_path / "one.png")
    one, other = ((tmp_path / f"{name}-neighbours.png").read_bytes() for name in ("all", "one"))
    assert one == other


@pytest.mark.parametrize("way", ["tiles", "positions"])
def test_full_size(tmp_path, drawn, capsys, way):
    checkpoint = save(tmp_path / "c.pth", tiny_mae(), args={"norm_pix_loss": False})
    folder = make_folder(tmp_path / "images", 2, height=50, width=75)
    words = ["--resume", checkpoint, *HEADS, "--output", tmp_path / "o.png", "--full_size", way]
    run(*words, folder, "--save_images", tmp_path / "panels")
    assert {path.name for path in tmp_path.glob("o*.png")} == {"o-0.png", "o-1.png"}
    panel = Image.open(tmp_path / "panels/001-001.jpg-original.png")
    assert np.array_equal(np.asarray(panel), np.asarray(Image.open(folder / "001.jpg")))
    assert ("was trained at 32x32 pixels, now it is 56x80" in capsys.readouterr().err) == (way == "positions")
    run(*words, folder / "000.jpg", "--mask_ratio", 0.5, 0.75)
    assert {"50% masked", "75% masked", f"c.pth, full size by {way}, seed 2"} <= set(drawn)
    assert (tmp_path / "o.png").is_file()
    make_folder(
        tmp_path / "images", 3, height=400, width=560
    )  # the larger letters of a larger panel have room
    run(*words, folder / "002.jpg")
    assert "002.jpg" in drawn
    with pytest.raises(UserError, match="--full_size and --mask_file: give one"):
        run(*words, folder, "--mask_file", "x.png")


def test_unreadable_images(tmp_path, drawn, capsys):
    checkpoint = save(tmp_path / "c.pth", tiny_mae(), args={"norm_pix_loss": False})
    make_folder(tmp_path / "images", 2)
    whole = (tmp_path / "images/000.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:200])
    (tmp_path / "text.jpg").write_text("this is no picture")
    words = ["--resume", checkpoint, *HEADS, "--output", tmp_path / "o.png", tmp_path / "images/001.jpg"]
    for bad, reason in [
        ("cut.jpg", "Truncated|truncated"),
        ("text.jpg", "no image format"),
    ]:
        with pytest.raises(UserError, match=f"{bad}: .*({reason}).*--bad_images skip"):
            run(*words, tmp_path / bad)
    run(
        *words,
        tmp_path / "cut.jpg",
        tmp_path / "text.jpg",
        tmp_path / "images/000.jpg",
        "--bad_images",
        "skip",
    )
    err = capsys.readouterr().err
    assert "text.jpg (no image format" in err and "left out" in err and "cut.jpg" in err
    assert [text for text in drawn if text.endswith("jpg")] == ["001.jpg", "000.jpg"]
    with pytest.raises(UserError, match=r"none: no such file or folder$"):
        run(*words, tmp_path / "none", "--bad_images", "skip")
    with pytest.raises(UserError, match="no images"):
        run(*words[:-1], tmp_path / "cut.jpg", "--bad_images", "skip")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask_ratio", "1"], "--mask_ratio 1.0: must lie between"),
        (["--pca", "--foreground", "nan"], "--foreground nan: must be finite"),
        (["--mask_ratio", "0.5", "0.99"], "--mask_ratio 0.99: keeps none of 16 patches"),
        (["--mask_ratio", "0.5", "--mask_file", "m.png"], "give one of them"),
        (["--mask_file", "m.png"], "--mask_file m.png: No such file"),
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--output", "a.jpg"], "must end in .png"),
        (["--output", "missing/a.png"], "cannot be written"),
        (["--input_size", "60"], "--input_size 60x60: must be a multiple of 8, the patch size of c.pth"),
        (["--norm_pix_loss"], "--norm_pix_loss True: .* was trained with False"),
        (["--mean", "0.5"], "--mean 0.5: .* was trained with 0.4"),
        (["--mean", "0.5", "0.5"], "--mean"),
        (["--device", "cuda:99"], "--device cuda:99: not usable"),
        (["--num_heads", "5"], "--num_heads 5: must divide the width of 24"),
        (["--decoder_num_heads", "0"], "--decoder_num_heads 0: must divide"),
    ],
)
def test_flags_that_cannot_work(tmp_path, flags, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = {"norm_pix_loss": False, "mean": [0.4] * 3, "std": [0.2] * 3, "input_size": 32}
    save(tmp_path / "c.pth", tiny_mae(), args=args)
    make_folder(tmp_path / "images", 1)
    with pytest.raises(UserError, match=message):
        run("--resume", "c.pth", *HEADS, "images", *flags)
    assert not (tmp_path / "reconstruction.png").exists()


def test_images_after_a_list_of_ratios(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--resume", "c.pth", "--mask_ratio", 0.5, 0.9, "photo.jpg")
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "'photo.jpg' is no number (name images before it)" in err and len(err.splitlines()) == 1


def test_of_a_large_folder_some_images_are_drawn(tmp_path, drawn, capsys):
    checkpoint = save(tmp_path / "c.pth", tiny_mae(), args={"norm_pix_loss": False})
    make_folder(tmp_path / "images", 22)
    run("--resume", checkpoint, *HEADS, tmp_path / "images", "--output", tmp_path / "x.png")
    assert "drawing 20 of 22 images, evenly spread; --rows N draws more" in capsys.readouterr().out
    assert sum(text.endswith(".jpg") for text in drawn) == 20 and "021.jpg" in drawn
    run("--resume", checkpoint, *HEADS, tmp_path / "images", "--output", tmp_path / "x.png", "--rows", "22")
    assert "drawing" not in capsys.readouterr().out
    one = tmp_path / "one.png"
    Image.new("RGB", (32, 32)).save(one)
    before = one.read_bytes()
    with pytest.raises(UserError, match=r"--output .*one\.png: is what this command reads"):
        run("--resume", checkpoint, *HEADS, one, "--output", one)
    assert one.read_bytes() == before


def test_too_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MAX_PIXELS", 400_000)
    checkpoint = save(tmp_path / "c.pth", tiny_mae(), args={"norm_pix_loss": False})
    words = [
        "--resume",
        checkpoint,
        *HEADS,
        make_folder(tmp_path / "images", 8),
        "--output",
        tmp_path / "o.png",
    ]
    with pytest.raises(UserError, match=r"8 rows: .*pass --rows N, at most 3"):
        run(*words)
    run(*words, "--rows", 3)
    assert np.prod(Image.open(tmp_path / "o.png").size) < 550_000


# What a file says about its model


def weights_of(path, *flags, part="full"):
    parser = ArgumentParser()
    add_weights_args(parser)
    add_decoder_args(parser)
    args = parse_args(parser, ["--resume", str(path), *map(str, flags)])
    return describe(read_file(args.resume, "--resume"), args.resume, args, part)


def test_sizes_come_from_the_checkpoint(tmp_path):
    model = MODELS["mae_vit_tiny_patch16"](
        img_size=(16, 32), patch_size=8, in_chans=1, norm_pix_loss=True,
        decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2,
    )  # fmt: skip
    args = {
        "model": "mae_vit_tiny_patch16",
        "input_size": (16, 32),
        "norm_pix_loss": True,
        "decoder_num_heads": 2,
    }
    path = save(tmp_path / "c.pth", model, args={**args, "mean": (0.3,), "std": (0.2,)})
    weights = weights_of(path)
    again = build(weights)
    assert (
        again.img_size == (16, 32)
        and again.norm_pix_loss
        and weights.mean == (0.3,)
        and weights.std == (0.2,)
    )
    assert again.blocks[0].attn.num_heads == 3 and again.decoder_blocks[0].attn.num_heads == 2
    images, noise = torch.randn(2, 1, 16, 32), torch.rand(2, 8)
    for one, two in zip(model.eval()(images, 0.5, noise), again(images, 0.5, noise), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(UserError, match=r"--num_heads 6: .* was trained with 3"):
        weights_of(path, "--num_heads", 6)
    with pytest.raises(UserError, match=r"--decoder_num_heads 4: .* was trained with 2"):
        weights_of(path, "--decoder_num_heads", 4)
    # A run without --decoder_num_heads stores None: the named model's 8
    model = MODELS["mae_vit_tiny_patch16"](
        img_size=(16, 32), patch_size=8, decoder_depth=1, decoder_embed_dim=32
    )
    weights = weights_of(
        save(path, model, args={**args, "decoder_num_heads": None, "mean": None, "std": None})
    )
    assert build(weights).decoder_blocks[0].attn.num_heads == 8


def test_released_files_hold_tensors_only(tmp_path):
    """As mae_visualize_vit_*.pth: the named model of these sizes; the flag says what no tensor shows."""
    model = MODELS["mae_vit_tiny_patch16"](img_size=32)
    path = save(tmp_path / "c.pth", model)
    weights = weights_of(path)
    again = build(weights)
    assert again.decoder_blocks[0].attn.num_heads == 8 and not again.norm_pix_loss
    assert "does not say whether it predicts normalised pixels" in weights.notes[0]
    assert build(weights_of(path, "--norm_pix_loss")).norm_pix_loss
    assert weights.mean == (0.485, 0.456, 0.406) and weights.input_size == (32, 32)

    path = save(tmp_path / "d.pth", tiny_mae(img_size=(16, 32)))
    with pytest.raises(UserError, match=r"does not say the grid of its 8 patches of 8x8 .*pass --input_size"):
        weights_of(path, "--num_heads", 3)
    with pytest.raises(
        UserError, match=r"--input_size 32x32: does not give the 8 patches of 8x8 pixels that .* has"
    ):
        weights_of(path, "--num_heads", 3, "--input_size", 32)
    with pytest.raises(UserError, match=r"attention heads \(width 24, 2 blocks.*pass --num_heads"):
        weights_of(path, "--input_size", "16x32")
    flags = ["--input_size", "16x32", "--num_heads", 3]
    with pytest.raises(UserError, match=r"decoder's number of attention heads \(width 16, 2 blocks\)"):
        weights_of(path, *flags)
    assert build(weights_of(path, *flags, "--decoder_num_heads", 4)).img_size == (16, 32)


def test_hugging_face_file_with_decoder(tmp_path):
    model = tiny_mae()
    torch.save(to_hugging_face(model.state_dict()), tmp_path / "pytorch_model.bin")
    weights = weights_of(tmp_path / "pytorch_model.bin", *HEADS)
    assert weights.kind == "Hugging Face ViTMAE with decoder"
    again = build(weights).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(again[key], value), key


def test_reference_checkpoint(tmp_path):
    """Its Namespace names another model than the tensors are of; the tensors are believed."""
    path = shutil.copy(REPO / "tests/golden/checkpoint-0.pth", tmp_path)
    assert build(weights_of(path, *HEADS)).blocks[0].attn.qkv.in_features == 24


def test_files_that_hold_no_model(tmp_path):
    for content, kind in [
        ({"model": {"a": torch.zeros(2)}}, "not a vision transformer"),
        (
            {"model": {k: v for k, v in tiny_mae().state_dict().items() if "decoder" in k}},
            "without its encoder",
        ),
    ]:
        torch.save(content, tmp_path / "c.pth")
        with pytest.raises(UserError, match=f"no usable encoder keys .*{kind}"):
            weights_of(tmp_path / "c.pth")


# Attention


def test_attention_is_what_the_block_mixes_with():
    model = tiny_mae().double()
    block, x = model.blocks[-1], torch.randn(2, 17, 24, dtype=torch.float64)
    weights = block_attention(block, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 17, dtype=torch.float64))
    values = block.attn.qkv(block.norm1(x)).view(2, 17, 3, 3, 8)[:, :, 2].transpose(1, 2)
    mixed = block.attn.proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, block.attn(block.norm1(x)), rtol=1e-10, atol=1e-12)


def test_class_token_attention_of_whole_images():
    model = tiny_mae(img_size=(32, 64))
    images = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    seen = []
    hook = model.blocks[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        encoder_features(model, images)
    hook.remove()
    maps = class_token_attention(model.train(), images)
    assert model.training and maps.shape == (2, 3, 4, 8) and not maps.requires_grad
    expected = block_attention(model.blocks[-1], seen[0])[:, :, 0, 1:].reshape(2, 3, 4, 8)
    # Float32: softmax of sums of 8 terms each, 6e-8 for each operation, some twenty of them
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-7)
    # A classifier with the same encoder looks at the same places
    vit = VisionTransformer(global_pool=True, num_classes=0, **{**TINY, "img_size": (32, 64)})
    state = {k: v for k, v in model.state_dict().items() if k in vit.state_dict()}
    vit.load_state_dict(state, strict=False)
    vit.blocks[0].norm1.eps = vit.blocks[1].norm1.eps = vit.blocks[0].norm2.eps = model.blocks[0].norm1.eps
    # Float32: two blocks' sums of 24 to 96 terms in another order, 6e-7 each, before the same softmax
    torch.testing.assert_close(class_token_attention(vit, images), maps, rtol=1e-4, atol=1e-6)


def test_overlay_is_brightest_where_attention_is_largest():
    maps = torch.zeros(1, 2, 2)
    maps[0, 1, 0], maps[0, 0, 0] = 0.02, 0.01
    shown = overlay(torch.full((1, 1, 16, 16), 0.5), maps)
    assert shown.shape == (1, 3, 16, 16) and shown.min() >= 0 and shown.max() <= 1
    light = shown.mean(dim=1)[0]
    assert light[12, 4] > light[4, 4] > light[4, 12] == light[12, 12]
    assert torch.equal(overlay(torch.full((1, 3, 16, 16), 0.5), maps), shown)
    assert torch.isfinite(overlay(torch.zeros(1, 13, 16, 16), torch.zeros(1, 2, 2))).all()


def test_attention_grid_has_a_panel_per_head(drawn):
    model, images = tiny_mae(), torch.randn(3, 3, 32, 32)
    one = attention_panels(model, images, [0.5] * 3, [0.2] * 3, batch_size=2).draw("caption", ["a", "b", "c"])
    assert [t for t in drawn if "head" in t] == ["mean of heads", "head 1", "head 2", "head 3"]
    assert (
        one.tobytes()
        == attention_panels(model, images, [0.5] * 3, [0.2] * 3).draw("caption", ["a", "b", "c"]).tobytes()
    )


def test_build_encoder_equals_the_mae(tmp_path):
    model = tiny_mae()
    encoder = build(weights_of(save(tmp_path / "c.pth", model), "--num_heads", 3, part="encoder"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for block in (*model.blocks, *encoder.blocks):
            block.norm1.eps = block.norm2.eps = 1e-6
        model.norm.eps = encoder.norm.eps
        # Float32, values of about 1: sums of 24 to 96 terms in another order, 6e-7 each, in two blocks
        torch.testing.assert_close(
            encoder.forward_features(images),
            encoder_features(model, images, global_pool=False),
            rtol=1e-5,
            atol=1e-6,
        )
