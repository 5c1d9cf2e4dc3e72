"""predict.py: classes and features equal direct computations, the same at any batch size, and refusals."""

import csv
import os
import sys

import numpy as np
import pytest
import torch
from golden_utils import fill
from image_utils import make_folder, picture
from PIL import Image

import predict as script
from models_mae import MODELS as MAE_MODELS
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.cli.parser import ArgumentParser, parse_args, run_script
from util.data.presets import eval_transform
from util.data.read import read_image, read_picture
from util.errors import UserError
from util.evaluate.features import encoder_features

SIZES = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
HEADS = ["--num_heads", "3"]  # no named model has these sizes
NAMES = ["cat", "dog", "a very long name", "owl"]
INFO = {"input_size": (32, 32), "patch_size": 8, "in_chans": 3, "nb_classes": 4, "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.3, 0.25), "class_names": NAMES, "global_pool": True, "recipe": "finetune"}  # fmt: skip


def with_named_norms(model):
    """Norms with the epsilon of the named models, which the prediction assumes."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    return model.float().eval()


def classifier(global_pool=True, **options):
    return with_named_norms(fill(VisionTransformer(global_pool, num_classes=4, **SIZES, **options), 5, 0.2))


def save(path, model, info=INFO, **content):
    content |= {"model_info": info} if info else {}
    torch.save({"model": model.state_dict(), **content}, path)
    return path


def save_mae(path, **options):
    sizes = {**SIZES, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, **options}
    model = with_named_norms(fill(MaskedAutoencoderViT(**sizes), 5, 0.2, skip="pos_embed"))
    args = {"input_size": sizes["img_size"], "mean": INFO["mean"], "std": INFO["std"]}
    torch.save({"model": model.state_dict(), "args": args}, path)
    return model


def run(*words):
    parser = ArgumentParser(parents=[script.get_args_parser()])
    script.main(parse_args(parser, [*map(str, words), "--num_workers", "0"]))


def images_of(paths, always_crop=False, **change):
    """The pictures as the recipe's evaluation prepares them, float32 (n, C, H, W)."""
    from argparse import Namespace

    options = {**{name: INFO[name] for name in ("input_size", "in_chans", "mean", "std")}, **change}
    transform = eval_transform(Namespace(**options), always_crop=always_crop)
    channels = options["in_chans"]
    read = read_picture if channels in (1, 3) else read_image
    return torch.stack([transform(read(str(path), channels)) for path in paths])


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def load(path):
    with np.load(path) as arrays:  # no pickle
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images", 5)


# Classes


def test_table(tmp_path, folder, capsys):
    model = classifier()
    run("--resume", save(tmp_path / "c.pth", model), *HEADS, folder, "--top_k", 2)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 6 and lines[0].split() == ["image", "1.", "2."]
    with torch.no_grad():
        expected = model(images_of(sorted(folder.iterdir()))).softmax(dim=1).sort(descending=True)
    for line, path, values, classes in zip(lines[1:], sorted(folder.iterdir()), *expected, strict=True):
        texts = [f"{NAMES[c]} {100 * v:.2f} %" for v, c in zip(values[:2], classes[:2], strict=True)]
        assert " ".join(line.split()) == f"{path} {' '.join(texts)}"
    assert len({line.index(" % ") for line in lines[1:]}) == 1 and len({len(line) for line in lines[1:]}) == 1
    assert "32x32 pixels; 5 images; cpu" in err and "5 of 5 images" in err


def test_csv(tmp_path, folder, capsys):
    model, out = classifier(), tmp_path / "out.csv"
    out.write_text("older")
    run("--resume", save(tmp_path / "c.pth", model), *HEADS, folder / "003.jpg", folder, "--csv", out)
    assert capsys.readouterr().out == ""
    rows = read_csv(out)
    assert rows[0] == ["path"] + [f"{name}_{i}" for i in range(1, 5) for name in ("class", "probability")]
    paths = [folder / "003.jpg", *sorted(folder.iterdir())]
    assert [row[0] for row in rows[1:]] == [str(path) for path in paths]
    with torch.no_grad():
        shares = model(images_of(paths)).softmax(dim=1)
    for row, values in zip(rows[1:], shares, strict=True):
        assert sorted(row[1::2]) == sorted(NAMES)
        assert [float(v) for v in row[2::2]] == sorted((float(v) for v in row[2::2]), reverse=True)
        for name, value in zip(row[1::2], row[2::2], strict=True):
            # Six decimals are written (5e-7), and float32 rounds products of 24 terms by 3e-7
            assert abs(float(value) - values[NAMES.index(name)]) < 2e-6
    assert not list(tmp_path.glob(".*"))


def test_probe_and_class_token_models(tmp_path, folder):
    """A probe's head is BatchNorm and linear; its evaluation crops at any size."""
    model = classifier(global_pool=False)
    norm = torch.nn.BatchNorm1d(24, affine=False, eps=1e-6)
    norm.running_mean, norm.running_var = torch.randn(24), torch.rand(24) + 0.5
    model.head = torch.nn.Sequential(norm, model.head).eval()
    info = {**INFO, "global_pool": False, "recipe": "linprobe"}
    out = tmp_path / "out.csv"
    run("--resume", save(tmp_path / "c.pth", model, info), *HEADS, folder, "--csv", out, "--top_k", 1)
    with torch.no_grad():
        logits = model(images_of(sorted(folder.iterdir()), always_crop=True))
    rows = read_csv(out)[1:]
    assert [row[1] for row in rows] == [NAMES[i] for i in logits.argmax(dim=1)]


def test_classes_without_names(tmp_path, folder, capsys):
    """As in released fine-tuned files: nothing is stored but the tensors."""
    checkpoint = save(tmp_path / "c.pth", classifier(), info=None)
    run("--resume", checkpoint, *HEADS, folder, "--top_k", 1)
    assert "class " in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("\n".join(f"my name {i}" for i in range(4)) + "\n")
    run("--resume", checkpoint, *HEADS, folder, "--top_k", 1, "--class_names", tmp_path / "names.txt")
    assert "my name " in capsys.readouterr().out


# Features


def test_features_of_pre_training_equal_the_unmasked_encoder(tmp_path, folder):
    model = save_mae(tmp_path / "c.pth")
    images = images_of(sorted(folder.iterdir()), always_crop=True)
    for kind in ("mean", "cls"):
        run(
            "--resume",
            tmp_path / "c.pth",
            *HEADS,
            folder,
            "--features",
            tmp_path / "f.npz",
            "--feature_kind",
            kind,
        )
        arrays = load(tmp_path / "f.npz")
        assert sorted(arrays) == ["feature_kind", "features", "files", "grid"]
        assert arrays["feature_kind"] == kind and arrays["grid"].tolist() == [4, 4]
        assert arrays["files"].tolist() == [str(path) for path in sorted(folder.iterdir())]
        with torch.no_grad():
            expected = encoder_features(model, images, global_pool=kind == "mean").numpy()
        # Float32: groups of another size add up 24 to 192 terms in another order, up to 8e-7 of a value of
        # 1, in each of the blocks; the final norm divides by the spread
        np.testing.assert_allclose(arrays["features"], expected, rtol=2e-5, atol=1e-6)
    run(
        "--resume",
        tmp_path / "c.pth",
        *HEADS,
        folder,
        "--features",
        tmp_path / "p.npz",
        "--feature_kind",
        "patches",
    )
    patches = load(tmp_path / "p.npz")["features"]
    assert patches.shape == (5, 16, 24) and patches.dtype == np.float32
    run(
        "--resume", tmp_path / "c.pth", *HEADS, folder, "--features", tmp_path / "f.npz"
    )  # the mean by default
    # As above
    np.testing.assert_allclose(
        patches.mean(axis=1), load(tmp_path / "f.npz")["features"], rtol=2e-5, atol=1e-6
    )


def test_features_of_encoder_only_and_fine_tuned(tmp_path, folder, capsys):
    mae = save_mae(tmp_path / "full.pth")
    names = VisionTransformer(num_classes=0, **SIZES).state_dict()
    torch.save({"model": {k: v for k, v in mae.state_dict().items() if k in names}}, tmp_path / "encoder.pth")
    stats = ["--mean", *INFO["mean"], "--std", *INFO["std"]]
    for name, flags in (("full", []), ("encoder", stats)):
        words = ["--resume", tmp_path / f"{name}.pth", *HEADS, folder, *flags]
        run(*words, "--features", tmp_path / f"{name}.npz", "--feature_kind", "patches")
    assert (tmp_path / "full.npz").read_bytes() == (tmp_path / "encoder.npz").read_bytes()

    for pooled in (True, False):
        model = classifier(pooled)
        save(tmp_path / "c.pth", model, {**INFO, "global_pool": pooled})
        images = images_of(sorted(folder.iterdir()))
        with torch.no_grad():
            tokens, own = model.forward_tokens(images), model.forward_features(images)
            tokens = tokens if pooled else model.norm(tokens)
        expected = {
            "mean": own if pooled else tokens[:, 1:].mean(1), "cls": tokens[:, 0], "patches": tokens[:, 1:]
        }  # fmt: skip
        for kind, values in expected.items():
            out = tmp_path / "f.npz"
            run("--resume", tmp_path / "c.pth", *HEADS, folder, "--features", out, "--feature_kind", kind)
            # As above; without the norm values are up to 10
            np.testing.assert_allclose(load(out)["features"], values.numpy(), rtol=2e-5, atol=1e-5)
        assert ("come without a norm" in capsys.readouterr().err) == pooled


def test_classes_and_features_together(tmp_path, folder, capsys):
    words = ["--resume", save(tmp_path / "c.pth", classifier()), *HEADS, folder]
    run(*words, "--csv", tmp_path / "a.csv")
    run(*words, "--features", tmp_path / "a.npz", "--feature_kind", "patches")
    assert capsys.readouterr().out == ""
    run(*words, "--csv", tmp_path / "b.csv", "--features", tmp_path / "b.npz", "--feature_kind", "patches")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_same_bytes_at_any_batch_size_and_workers(tmp_path):
    folder = make_folder(tmp_path / "images", 70)
    save_mae(tmp_path / "c.pth")
    contents = []
    for batch_size, workers in ((64, 0), (64, 0), (1, 0), (7, 2)):
        parser = ArgumentParser(parents=[script.get_args_parser()])
        words = ["--resume", tmp_path / "c.pth", *HEADS, folder, "--features", tmp_path / "f.npz"]
        words += ["--batch_size", batch_size, "--num_workers", workers]
        script.main(parse_args(parser, list(map(str, words))))
        contents.append((tmp_path / "f.npz").read_bytes())
    assert len(set(contents)) == 1
    # Among other pictures: float32 rounding
    few = tmp_path / "few.npz"
    run("--resume", tmp_path / "c.pth", *HEADS, folder / "003.jpg", folder / "069.jpg", "--features", few)
    together, alone = load(tmp_path / "f.npz")["features"], load(few)["features"]
    np.testing.assert_allclose(alone, together[[3, 69]], rtol=0, atol=1e-6 * abs(together).max())


def test_grey_channels_and_rectangles(tmp_path):
    np.save(tmp_path / "five.npy", picture(0, 40, 50, 5))
    Image.fromarray(picture(0, 40, 50)).save(tmp_path / "rgb.png")
    for channels, file in ((1, "rgb.png"), (5, "five.npy")):
        size, stats = (16, 32), {"mean": [0.4] * channels, "std": [0.2] * channels}
        sizes = {**SIZES, "img_size": size, "in_chans": channels}
        model = MaskedAutoencoderViT(**sizes, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
        model = with_named_norms(fill(model, 5, 0.2, skip="pos_embed"))
        torch.save({"model": model.state_dict(), "args": {"input_size": size, **stats}}, tmp_path / "c.pth")
        run("--resume", tmp_path / "c.pth", *HEADS, tmp_path / file, "--features", tmp_path / "f.npz")
        images = images_of([tmp_path / file], True, input_size=size, in_chans=channels, **stats)
        with torch.no_grad():
            expected = encoder_features(model, images).numpy()
        # As above
        np.testing.assert_allclose(load(tmp_path / "f.npz")["features"], expected, rtol=2e-5, atol=1e-6)


def test_named_model_needs_no_flags(tmp_path, folder):
    model = MAE_MODELS["mae_vit_tiny_patch16"](img_size=32)
    torch.save({"model": model.state_dict()}, tmp_path / "mae_visualize_vit_tiny.pth")
    run("--resume", tmp_path / "mae_visualize_vit_tiny.pth", folder, "--features", tmp_path / "f.npz")
    assert load(tmp_path / "f.npz")["features"].shape == (5, 192)


# Inputs


def test_files_folders_lists_and_bad_images(tmp_path, folder, capsys):
    save_mae(tmp_path / "c.pth")
    (folder / "deep/val").mkdir(parents=True)
    os.rename(folder / "004.jpg", folder / "deep/val/004.jpg")
    (tmp_path / "list.txt").write_text("images/002.jpg\n# comment\nimages/deep/val/004.jpg\n")
    out = tmp_path / "f.npz"
    words = ["--resume", tmp_path / "c.pth", *HEADS, "--features", out]
    run(*words, tmp_path / "list.txt", folder, folder / "001.jpg")
    names = [os.path.relpath(path, folder) for path in load(out)["files"]]
    whole_folder = ["000.jpg", "001.jpg", "002.jpg", "003.jpg", "deep/val/004.jpg"]
    assert names == ["002.jpg", "deep/val/004.jpg", *whole_folder, "001.jpg"]
    whole = load(out)["features"]

    (folder / "scan.xyz").touch()
    run(*words, folder)
    assert "1 other file ignored: 1 .xyz" in capsys.readouterr().err

    # A file that looks like a picture and turns out to be none: found while reading, its row is left out
    (folder / "001.jpg").write_bytes((folder / "001.jpg").read_bytes()[:300])
    with pytest.raises(UserError, match=r"001\.jpg: .*--bad_images skip"):
        run(*words, folder)
    (folder / "readme.jpg").write_text("no picture")
    capsys.readouterr()
    with pytest.raises(UserError, match=r"images.*: 1 of 6 files are no readable images.*readme\.jpg"):
        run(*words, folder)
    (folder / "readme.jpg").unlink()
    run(*words, folder, "--bad_images", "skip")
    arrays = load(out)
    assert [os.path.basename(path) for path in arrays["files"]] == [
        "000.jpg",
        "002.jpg",
        "003.jpg",
        "004.jpg",
    ]
    # As above: another group
    np.testing.assert_allclose(arrays["features"], whole[[2, 4, 5, 6]], rtol=1e-5, atol=1e-5)
    assert "could not decode 1" in capsys.readouterr().err


def test_pages(tmp_path, capsys):
    save_mae(tmp_path / "c.pth")
    pictures = [Image.new("RGB", (40, 32), (60 * i, 200 - 60 * i, 90)) for i in range(3)]
    (tmp_path / "images").mkdir()
    pictures[0].save(tmp_path / "images" / "a.tif", save_all=True, append_images=pictures[1:])
    for i, one in enumerate(pictures):
        one.save(tmp_path / "images" / f"b{i}.png")
    out = tmp_path / "f.npz"
    words = ["--resume", tmp_path / "c.pth", *HEADS, "--features", out, tmp_path / "images"]
    run(*words)
    assert len(load(out)["files"]) == 4
    assert "1 file with several pages, 6 in all: --pages all reads them all" in capsys.readouterr().err
    run(*words, "--pages", "all")
    assert "several pages" not in capsys.readouterr().err
    names = [os.path.basename(path) for path in load(out)["files"]]
    assert names == ["a.tif#1", "a.tif#2", "a.tif#3", "b0.png", "b1.png", "b2.png"]
    features = load(out)["features"]
    assert np.array_equal(features[:3], features[3:]) and not np.allclose(features[0], features[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top_k", "5"], "--top_k 5: .* has 4 classes"),
        (["--top_k", "0"], "--top_k 0: must be at least 1"),
        (["--csv", "missing/out.csv"], "--csv missing/out.csv: cannot be written"),
        (["--csv", "images"], "--csv images: is a folder"),
        (["--csv", "c.pth"], "--csv c.pth: is what this command reads"),
        (["short.txt", "--csv", "short.txt"], "--csv short.txt: is what this command reads"),
        (["--csv", "other.pth"], "--csv other.pth: is there, and weights or images by its name"),
        (["--features", "a.PNG"], "--features a.PNG: is there, and weights or images by its name"),
        pytest.param(["--csv", "pipe"], "--csv pipe: is no regular file", marks=pytest.mark.needs("posix")),
        (["--features", "missing/out.npz"], "--features missing/out.npz: cannot be written"),
        (["--feature_kind", "cls"], "--feature_kind cls: needs --features"),
        (["--class_names", "missing.txt"], "--class_names missing.txt: cannot be read"),
        (["--class_names", "short.txt"], "--class_names short.txt: has 2 lines, the checkpoint 4 classes"),
        (["nothing.jpg"], "nothing.jpg: no such file"),
        (["empty"], "empty.*: no images in it"),
        (["short.txt"], "short.txt: 2 of 2 files are no readable images"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--amp_dtype", "fp16"], "--amp_dtype fp16: not on CPU"),
        (["--input_size", "60"], "--input_size 60x60: must be a multiple of 8, the patch size of c.pth"),
    ],
)
def test_flags_that_cannot_work(tmp_path, folder, flags, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("one\ntwo\n")
    save(tmp_path / "c.pth", classifier())
    (tmp_path / "other.pth").touch()
    (tmp_path / "a.PNG").touch()
    if "pipe" in flags:
        os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=message):
        run("--resume", "c.pth", *HEADS, "images", *flags)
    assert not list(tmp_path.glob("*.csv")) and not list(tmp_path.glob("*.npz"))


def test_pre_training_checkpoint_without_features(tmp_path, folder):
    save_mae(tmp_path / "c.pth")
    for flags in ([], ["--features", tmp_path / "f.npz", "--top_k", 2]):
        with pytest.raises(UserError, match=r"holds no classifier \(full MAE.*--features FILE\.npz"):
            run("--resume", tmp_path / "c.pth", *HEADS, folder, *flags)


def test_output_that_fails_keeps_the_old_file(tmp_path, folder, monkeypatch):
    save_mae(tmp_path / "c.pth")
    (tmp_path / "f.npz").write_bytes(b"older")

    def disk_full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", disk_full)
    with pytest.raises(UserError, match=r"f\.npz: cannot be written \(No space"):
        run("--resume", tmp_path / "c.pth", *HEADS, folder, "--features", tmp_path / "f.npz")
    assert (tmp_path / "f.npz").read_bytes() == b"older" and not list(tmp_path.glob(".*"))


def test_mistake_is_one_line_and_code_2(tmp_path, folder, monkeypatch, capsys):
    save_mae(tmp_path / "c.pth")
    monkeypatch.setattr(sys, "argv", ["predict.py", "--resume", str(tmp_path / "c.pth"), *HEADS, str(folder)])
    with pytest.raises(SystemExit) as ended:
        run_script(script.main, ArgumentParser("predict.py", parents=[script.get_args_parser()]))
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("predict.py: error: --resume")


def test_many_bad_images_are_left_out_when_asked(tmp_path, folder, capsys):
    for i in range(4):
        (folder / f"bad{i}.png").write_bytes(b"no picture")
    path = save(tmp_path / "c.pth", classifier())
    with pytest.raises(UserError, match="--bad_images skip"):
        run("--resume", path, *HEADS, folder)
    run("--resume", path, *HEADS, folder, "--bad_images", "skip", "--csv", tmp_path / "out.csv")
    assert not any(os.path.basename(row[0]).startswith("bad") for row in read_csv(tmp_path / "out.csv"))
    assert "left out" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused(tmp_path, folder):
    model = classifier()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    path = save(tmp_path / "c.pth", model)
    with pytest.raises(UserError, match=r"not finite \(blocks.1.mlp.fc1.weight\)"):
        run("--resume", path, *HEADS, folder, "--csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
