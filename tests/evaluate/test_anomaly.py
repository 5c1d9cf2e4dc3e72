"""predict.py --loss, --map and --layer: equal plain computations, complementary masks, refusals."""

import csv
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_utils import fill
from image_utils import make_folder
from PIL import Image

import predict as script
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.cli.parser import ArgumentParser, parse_args
from util.errors import UserError
from util.evaluate.anomaly import complementary_masks, mask_count, patch_losses

SIZES = dict(img_size=(24, 40), patch_size=8, embed_dim=24, depth=3, num_heads=3)
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
HEADS = ["--num_heads", "3", "--decoder_num_heads", "2"]  # no named model has these sizes


def with_named_norms(model):
    """Norms with the epsilon of the named models, which predict.py assumes."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    return model.float().eval()


def mae(**options):
    return with_named_norms(fill(MaskedAutoencoderViT(**SIZES, **DECODER, **options), 5, 0.2, "pos_embed"))


def save(path, model, **args):
    stats = {"input_size": SIZES["img_size"], "mean": MEAN, "std": STD, "norm_pix_loss": False, **args}
    torch.save({"model": model.float().state_dict(), "args": stats}, path)
    return path


def run(*words):
    parser = ArgumentParser(parents=[script.get_args_parser()])
    script.main(parse_args(parser, [*map(str, words), "--num_workers", "0"]))


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images", 5)


# Masks


@pytest.mark.parametrize(
    ("length", "masks", "ratio", "times"),
    [
        (16, 4, 0.75, 3),
        (15, 4, 0.75, 3),
        (196, 8, 0.75, 6),
        (15, 5, 0.6, 3),
        (49, 10, 0.9, 9),
        (7, 6, 0.5, 3),
    ],
)
def test_every_patch_is_hidden_equally_often(length, masks, ratio, times):
    found = complementary_masks(length, masks, ratio, seed=1)
    hidden = torch.zeros(length)
    model = MaskedAutoencoderViT(**SIZES, **DECODER)
    tokens, sets = torch.zeros(1, length, 4), []
    for noise, own in found:
        mask = model.random_masking(tokens, own, noise[None])[1][0]
        hidden += mask
        sets.append(frozenset(mask.nonzero().flatten().tolist()))
    assert len(found) == masks and hidden.tolist() == [times] * length
    counts = [len(one) for one in sets]
    assert max(counts) - min(counts) <= 1
    assert len(set(sets)) == masks  # twice the same mask would tell nothing new
    for other in (1, 2):
        again = complementary_masks(length, masks, ratio, seed=other)
        same = all(torch.equal(one[0], two[0]) for one, two in zip(found, again, strict=True))
        assert same == (other == 1)


def test_number_of_masks():
    assert [mask_count(ratio) for ratio in (0.75, 0.5, 0.6, 0.8, 0.9, 0.85)] == [4, 4, 5, 5, 10, 20]
    assert mask_count(0.75, 8) == 8 and mask_count(0.667, 3) == 3
    with pytest.raises(UserError, match=r"--masks 6: .* a ratio of 0.75 pass --masks 4, 8, 12, \.\.\."):
        mask_count(0.75, 6)
    with pytest.raises(UserError, match=r"--mask_ratio 0.999: .* pass --mask_ratio 0.75"):
        mask_count(0.999)
    with pytest.raises(UserError, match="--masks 20: of 4 patches a mask would hide all or none"):
        complementary_masks(4, 20, 0.9, 0)


# Losses


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize(("masks", "ratio"), [(4, 0.75), (10, 0.6)])
@torch.no_grad()
def test_losses_equal_a_plain_loop(norm_pix_loss, masks, ratio):
    """Without noise, shuffles and batches: each mask's visible patches are picked by hand."""
    model = mae(norm_pix_loss=norm_pix_loss).double()
    images = torch.randn(3, 3, *SIZES["img_size"], dtype=torch.float64, generator=torch.manual_seed(0))
    chosen = complementary_masks(15, masks, ratio, seed=3)
    result = patch_losses(model, images, chosen)
    assert result.dtype == torch.float64 and result.shape == (3, 15)
    for i, image in enumerate(images):
        seen = {place: [] for place in range(15)}
        for noise, own in chosen:
            visible = set(noise.argsort()[: int(15 * (1 - own))].tolist())
            places = sorted(visible)
            tokens = (model.patch_embed(image[None]) + model.pos_embed[:, 1:])[:, places]
            latent = torch.cat([model.cls_token + model.pos_embed[:, :1], tokens], dim=1)
            for block in model.blocks:
                latent = block(latent)
            latent = model.decoder_embed(model.norm(latent))
            patches = [
                latent[:, 1 + places.index(place)] if place in visible else model.mask_token[:, 0]
                for place in range(15)
            ]
            x = torch.stack([latent[:, 0], *patches], dim=1) + model.decoder_pos_embed
            for block in model.decoder_blocks:
                x = block(x)
            pred = model.decoder_pred(model.decoder_norm(x))[0, 1:]
            for place in set(range(15)) - visible:
                row, column = divmod(place, 5)
                patch = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                target = patch.permute(1, 2, 0).flatten()
                if norm_pix_loss:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                seen[place].append(((pred[place] - target) ** 2).mean().item())
        expected = [math.fsum(values) / len(values) for values in seen.values()]
        assert {len(values) for values in seen.values()} == {round(masks * ratio)}
        assert max(abs(a - b) for a, b in zip(result[i].tolist(), expected, strict=True)) < 1e-10


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@torch.no_grad()
def test_one_mask_gives_the_loss_of_training(norm_pix_loss):
    model = mae(norm_pix_loss=norm_pix_loss).double()
    images = torch.randn(2, 3, *SIZES["img_size"], dtype=torch.float64, generator=torch.manual_seed(0))
    noise = torch.randperm(15, generator=torch.manual_seed(1)) / 15
    loss, _, mask = model(images, 0.75, noise.expand(2, -1))
    found = patch_losses(model, images, [(noise, 0.75)])[mask > 0]
    assert not found.isnan().any() and abs(found.mean() - loss) < 1e-12


def test_files(tmp_path, folder, capsys):
    """A column for each figure; maps have the model's grid, and a patch unlike the others is where it is."""
    model = mae()
    checkpoint = save(tmp_path / "c.pth", model)
    for i in range(3):  # flat grey but for one patch, in another place each
        pixels = np.full((24, 40, 3), 128, np.uint8)
        pixels[8 * i : 8 * i + 8, 8 * i + 16 : 8 * i + 24] = [255, 0, 255]
        Image.fromarray(pixels).save(folder / f"spot{i}.png")
    out, maps = tmp_path / "l.csv", tmp_path / "maps"
    out.write_text("older")
    run("--resume", checkpoint, *HEADS, folder, "--loss", out, "--map", maps)
    rows, err = read_csv(out), capsys.readouterr().err
    assert "4 masks of 75 % of the patches: each is hidden 3 times" in err and "8 maps of 3x5" in err
    assert list(rows[0]) == ["path", "loss", "largest", "map"]
    assert [Path(row["path"]).name for row in rows] == sorted(path.name for path in folder.iterdir())
    assert sorted(row["map"] for row in rows) == sorted(path.name for path in maps.iterdir())
    for row in rows:
        losses = np.load(maps / row["map"])
        assert losses.shape == (3, 5) and losses.dtype == np.float32
        # Seven digits are written
        assert float(row["loss"]) == pytest.approx(losses.mean(dtype=np.float64), rel=1e-6)
        assert float(row["largest"]) == pytest.approx(losses.max(), rel=1e-6)
        assert Path(row["path"]).stem in row["map"]
        if "spot" in row["map"]:
            i = int(Path(row["path"]).stem[-1])
            assert np.unravel_index(losses.argmax(), losses.shape) == (i, i + 2)
            image = torch.from_numpy(np.array(Image.open(row["path"]))).permute(2, 0, 1) / 255
            image = (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            with torch.no_grad():
                expected = patch_losses(model, image[None], complementary_masks(15, 4, 0.75, 0))
            # Float32, groups of 1 and of 8: the sums of 24 to 192 terms are added up in another order
            np.testing.assert_allclose(losses.flatten(), expected[0], rtol=1e-4)
    run("--resume", checkpoint, *HEADS, folder, "--loss", tmp_path / "n.csv", "--seed", 1)
    again = read_csv(tmp_path / "n.csv")
    assert list(again[0]) == ["path", "loss", "largest"] and again[0]["loss"] != rows[0]["loss"]
    assert not list(tmp_path.glob(".*"))


def test_same_bytes_at_any_batch_size_and_workers(tmp_path):
    folder = make_folder(tmp_path / "images", 40)
    checkpoint = save(tmp_path / "c.pth", mae(), mask_ratio=0.6)
    contents = Counter()
    for number, (batch_size, workers) in enumerate(((64, 0), (1, 0), (7, 2))):
        maps = tmp_path / f"maps{number}"
        words = ["--resume", checkpoint, *HEADS, folder, "--loss", tmp_path / "l.csv", "--map", maps]
        words += ["--batch_size", batch_size, "--num_workers", workers]
        script.main(parse_args(ArgumentParser(parents=[script.get_args_parser()]), list(map(str, words))))
        found = [(tmp_path / "l.csv").read_bytes(), *(path.read_bytes() for path in sorted(maps.iterdir()))]
        assert len(found) == 41
        contents[b"".join(found)] += 1
    assert len(contents) == 1
    # Another number of images, and other ones: to float32's rounding
    run("--resume", checkpoint, *HEADS, folder / "007.jpg", "--loss", tmp_path / "one.csv")
    alone, among = read_csv(tmp_path / "one.csv")[0], read_csv(tmp_path / "l.csv")[7]
    assert float(alone["loss"]) == pytest.approx(float(among["loss"]), rel=1e-5)


def test_bad_images_are_left_out(tmp_path, folder, capsys):
    checkpoint = save(tmp_path / "c.pth", mae())
    run("--resume", checkpoint, *HEADS, folder, "--loss", tmp_path / "all.csv")
    (folder / "001.jpg").write_bytes((folder / "001.jpg").read_bytes()[:300])
    words = ["--resume", checkpoint, *HEADS, folder, "--loss", tmp_path / "l.csv", "--map", tmp_path / "maps"]
    with pytest.raises(UserError, match=r"001\.jpg: .*--bad_images skip"):
        run(*words)
    assert not (tmp_path / "l.csv").exists() and not (tmp_path / "maps").exists()
    run(*words, "--bad_images", "skip")
    assert "could not decode 1" in capsys.readouterr().err
    rows, before = read_csv(tmp_path / "l.csv"), read_csv(tmp_path / "all.csv")
    del before[1]
    assert [row["path"] for row in rows] == [row["path"] for row in before]
    for row, old in zip(rows, before, strict=True):  # float32's rounding: another picture in the group
        assert float(row["loss"]) == pytest.approx(float(old["loss"]), rel=1e-5)
        assert (tmp_path / "maps" / row["map"]).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--masks", "4"], "--masks: only goes with --loss FILE.csv"),
        (["--map", "new"], "--map: only goes with --loss FILE.csv"),
        (["--loss", "l.csv", "--top_k", "2"], "--loss: writes nothing else; run once more for --top_k"),
        (["--loss", "l.csv", "--features", "f.npz"], "--loss: .* run once more for --features"),
        (["--loss", "l.csv", "--masks", "1"], "--masks 1: must be at least 2"),
        (["--loss", "l.csv", "--masks", "5"], "--masks 5: .* pass --masks 4, 8, 12"),
        (["--loss", "l.csv", "--mask_ratio", "1"], "--mask_ratio 1.0: must lie between 0 and 1"),
        (["--loss", "images"], "--loss images: is a folder"),
        (["--loss", "missing/l.csv"], "--loss missing/l.csv: cannot be written"),
        (["--loss", "l.csv", "--map", "images"], "--map images: is there already; name a new or an empty"),
        (["--loss", "l.csv", "--map", "c.pth"], "--map c.pth: is there already"),
        (["--loss", "l.csv", "--map", "missing/maps"], "--map missing/maps: cannot be written"),
        (["--loss", "l.csv", "--norm_pix_loss"], "--norm_pix_loss True: c.pth was trained with False"),
        (["--layer", "2"], "--layer 2: needs --features"),
        (["--layer", "2", "--features", "f.npz", "--top_k", "1"], "--layer 2: needs .* without"),
        (["--layer", "0", "--features", "f.npz"], "--layer 0: must be at least 1"),
        (["--layer", "4", "--features", "f.npz"], "--layer 4: c.pth has 3 blocks"),
    ],
)
def test_flags_that_cannot_work(tmp_path, folder, flags, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "c.pth", mae())
    heads = HEADS if "--loss" in flags else HEADS[:2]
    with pytest.raises(UserError, match=message):
        run("--resume", "c.pth", *heads, "images", *flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pth", "images"]


def test_files_without_a_decoder(tmp_path, folder):
    model = VisionTransformer(num_classes=4, **SIZES)
    torch.save({"model": model.state_dict()}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c\.pth: holds no decoder .* pass a checkpoint-"):
        run("--resume", tmp_path / "c.pth", *HEADS, folder, "--loss", tmp_path / "l.csv")


# Layers


@pytest.mark.parametrize("pooled", [False, True])
def test_features_of_an_inner_block(tmp_path, folder, pooled):
    """Through the norm that features of the last block go through."""
    model = with_named_norms(fill(VisionTransformer(pooled, num_classes=0, **SIZES), 5, 0.2))
    info = {"input_size": SIZES["img_size"], "patch_size": 8, "in_chans": 3, "mean": MEAN, "std": STD,
            "global_pool": pooled}  # fmt: skip
    torch.save({"model": model.state_dict(), "model_info": info}, tmp_path / "c.pth")
    inner, inputs = {}, []
    words = ["--resume", tmp_path / "c.pth", *HEADS[:2], folder, "--features", tmp_path / "f.npz"]

    def features(*flags):
        run(*words, *flags)
        with np.load(tmp_path / "f.npz") as arrays:
            return {name: arrays[name] for name in arrays.files}

    original = VisionTransformer.forward_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionTransformer, "forward_tokens",
                      lambda self, x: inputs.append(x) or original(self, x))  # fmt: skip
        last = {kind: features("--feature_kind", kind) for kind in ("mean", "cls", "patches")}
    assert "layer" not in last["mean"]
    hooks = [
        block.register_forward_hook(lambda _, __, out, i=i: inner.setdefault(i, out))
        for i, block in enumerate(model.blocks, 1)
    ]
    with torch.no_grad():
        model.forward_tokens(inputs[0])
        for hook in hooks:
            hook.remove()
        for layer in (1, 2, 3):
            tokens = inner[layer]
            normed = tokens if pooled else model.norm(tokens)
            mean = model.fc_norm(tokens[:, 1:].mean(1)) if pooled else normed[:, 1:].mean(1)
            for kind, values in (("mean", mean), ("cls", normed[:, 0]), ("patches", normed[:, 1:])):
                found = features("--feature_kind", kind, "--layer", layer)
                assert found["layer"] == layer
                # The same images in the same group, float32
                np.testing.assert_allclose(found["features"], values.numpy(), rtol=1e-5, atol=1e-5)
                assert np.array_equal(found["features"], last[kind]["features"]) == (layer == 3)
