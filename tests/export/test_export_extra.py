"""export.py against the real transformers and onnxruntime (`make test-extra`), at tiny and at base size."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from export_utils import (
    MEAN,
    STD,
    make_mae,
    make_vit,
    refused,
    run_export,
    save_mae,
    save_segmenter,
    save_vit,
)
from golden_utils import REPO
from PIL import Image
from safetensors.torch import load_file, save_file

import models_mae
import models_vit
from util.data.presets import eval_transform
from util.data.read import read_picture
from util.evaluate.features import encoder_features
from util.export.files import write_json
from util.files import read_json

pytestmark = pytest.mark.extra
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")


SIZES = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32,
    patch_size=8,
)  # fmt: skip


def close(a, b, tolerance=1e-5):
    # Float32, values of about 1: another library adds up the same 24 to 96 terms in another order, up to 6e-7
    # for each layer of a few blocks
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def same_mae(theirs, ours, images, mask_ratio):
    """Loss, prediction, mask and reconstruction for given noise to 1e-5; returns the largest differences."""
    noise = torch.rand(len(images), ours.patch_embed.num_patches, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        out, (loss, pred, mask) = theirs.eval()(images, noise=noise), ours(images, mask_ratio, noise)
        pictures = theirs.unpatchify(out.logits), ours.unpatchify(pred)
    assert torch.equal(out.mask, mask) and 0 < mask.mean() < 1
    close(out.loss, loss)
    close(out.logits, pred)
    close(*pictures)
    return (out.loss - loss).abs().item(), (out.logits - pred).abs().max().item()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_full_mae(tmp_path, norm_pix_loss):
    import transformers

    path, mae = save_mae(tmp_path, make_mae(norm_pix_loss=norm_pix_loss))
    run_export("--resume", path, "--to", "hf", "--output", tmp_path / "out")
    files = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == files
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "out")
    same_mae(theirs, mae, IMAGES, 0.6)  # the checkpoint's ratio, from the config
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "out", mask_ratio=0.0).eval()
    assert type(encoder).__name__ == "ViTMAEModel"
    tokens = encoder(IMAGES, noise=torch.arange(16).float().expand(2, -1)).last_hidden_state
    close(tokens[:, 1:].mean(1), encoder_features(mae, IMAGES))
    close(tokens[:, 0], encoder_features(mae, IMAGES, global_pool=False))
    prepare = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = prepare(Image.fromarray(picture), return_tensors="pt").pixel_values[0]
    ours = torch.from_numpy(picture).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]
    close(pixels, ours / torch.tensor(STD)[:, None, None])
    assert prepare(Image.new("RGB", (50, 40)), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


def test_base_size_both_ways(tmp_path, capsys):
    """The numbers of the note: ViT-B with its decoder, 224 pixels, there and back."""
    import transformers

    torch.manual_seed(0)
    mae = models_mae.mae_vit_base_patch16(norm_pix_loss=True).eval()
    for parameter in mae.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    torch.save(
        {"model": mae.state_dict(), "args": {"norm_pix_loss": True, "input_size": 224}}, tmp_path / "a.pth"
    )
    run_export("--resume", tmp_path / "a.pth", "--to", "hf", "--output", tmp_path / "hf")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    differences = same_mae(theirs, mae, images, 0.75)
    del theirs
    run_export("--from", "hf", "--resume", tmp_path / "hf", "--output", tmp_path / "back")
    content = torch.load(tmp_path / "back" / "model.pth", weights_only=True)
    assert all(torch.equal(content["model"][key], value) for key, value in mae.state_dict().items())
    assert content["args"]["model"] == "mae_vit_base_patch16" and content["args"]["norm_pix_loss"] is True
    with capsys.disabled():
        print(f"\nbase size: loss differs by {differences[0]:.1e}, prediction by {differences[1]:.1e}")


def test_timm_at_base_size(tmp_path, capsys):
    import timm

    torch.manual_seed(0)
    vit = models_vit.vit_base_patch16(num_classes=0).eval()
    torch.save({"model": vit.state_dict()}, tmp_path / "mae_pretrain_vit_base.pth")
    words = ("--resume", tmp_path / "mae_pretrain_vit_base.pth", "--to", "timm", "--output", tmp_path / "out")
    run_export(*words)
    file = str(tmp_path / "out" / "model.safetensors")
    assert (
        f'timm.create_model("vit_base_patch16_224.mae", checkpoint_path="{file}")' in capsys.readouterr().out
    )
    theirs = timm.create_model("vit_base_patch16_224.mae", checkpoint_path=file).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        close(theirs(images), vit(images))


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("global_pool", [False, True])
def test_classifiers(tmp_path, capsys, global_pool, probe):
    import transformers

    path, vit = save_vit(tmp_path, global_pool, probe)
    if global_pool and not hasattr(transformers.TimmWrapperConfig(), "model_args"):
        line = refused(capsys, "--resume", path, "--to", "hf", "--output", tmp_path / "out")
        assert "global pooling needs a newer transformers" in line
        return
    run_export("--resume", path, "--to", "hf", "--output", tmp_path / "out")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    kind = "TimmWrapperForImageClassification" if global_pool else "ViTForImageClassification"
    assert type(model).__name__ == kind and model.config.id2label[2] == "big cat"
    close(model(IMAGES).logits, vit(IMAGES))
    # The pictures are prepared as in the evaluation
    rs = np.random.RandomState(1)
    picture = Image.fromarray(rs.randint(0, 256, (60, 80, 3), dtype=np.uint8)).resize((200, 150))
    picture.save(tmp_path / "a.png")
    prepare = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs = prepare(picture, return_tensors="pt").pixel_values[0]
    args = type("Args", (), dict(input_size=32, in_chans=3, mean=MEAN, std=STD))
    ours = eval_transform(args)(read_picture(str(tmp_path / "a.png"), 3))
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 0.02  # one pixel value is 1 / 255 / 0.25 = 0.016


@pytest.mark.parametrize("global_pool", [False, True])
def test_encoder_only(tmp_path, global_pool):
    import transformers

    if global_pool and not hasattr(transformers.TimmWrapperConfig(), "model_args"):
        pytest.skip("this version of transformers cannot")
    path, vit = save_vit(tmp_path, global_pool)
    run_export("--resume", path, "--to", "hf", "--encoder_only", "--output", tmp_path / "out")
    changes = {} if global_pool else {"mask_ratio": 0.0}
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", **changes).eval()
    if global_pool:
        close(model(IMAGES).pooler_output, vit.forward_features(IMAGES))
    else:
        tokens = model(IMAGES, noise=torch.arange(16).float().expand(2, -1)).last_hidden_state
        close(tokens[:, 0], vit.forward_features(IMAGES))


def test_other_channels_and_what_transformers_cannot(tmp_path, capsys):
    import transformers

    path, mae = save_mae(tmp_path, make_mae(in_chans=5, img_size=48))
    run_export("--resume", path, "--to", "hf", "--output", tmp_path / "out")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "out")
    same_mae(theirs, mae, torch.randn(2, 5, 48, 48), 0.6)
    path, _ = save_mae(tmp_path, make_mae(img_size=(16, 48)), epoch=8)
    line = refused(capsys, "--resume", path, "--to", "hf", "--output", tmp_path / "out2")
    assert "takes square images only, this model 16x48" in line and not (tmp_path / "out2").exists()
    path, vit = save_vit(tmp_path, False, img_size=(16, 48))  # its ViT can
    run_export("--resume", path, "--to", "hf", "--output", tmp_path / "out3")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out3").eval()
    images = torch.randn(2, 3, 16, 48)
    close(model(images).logits, vit(images))


def hf_mae(**changes):
    """A ViTMAE of transformers' own making, its tables too."""
    import transformers

    decoder = dict(decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=4)
    decoder["decoder_intermediate_size"] = 64
    config = transformers.ViTMAEConfig(**SIZES, **decoder, **changes)
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(config).eval()
    for (
        name,
        parameter,
    ) in model.named_parameters():  # as large as trained: eps is no matter
        parameter.data.add_(torch.randn_like(parameter) * (1.0 if "pos" in name or "token" in name else 0.1))
    return model


@pytest.mark.parametrize("eps", [1e-6, 1e-12])  # this code's; that of the public repositories
def test_from_transformers_own_folder(tmp_path, eps, capsys):
    theirs = hf_mae(layer_norm_eps=eps, norm_pix_loss=True, mask_ratio=0.5)
    theirs.save_pretrained(tmp_path / "hf")
    run_export("--from", "hf", "--resume", tmp_path / "hf", "--output", tmp_path / "out")
    content = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    mae = make_mae(norm_pix_loss=True)
    mae.load_state_dict(content["model"])
    same_mae(theirs, mae, IMAGES, 0.5)
    assert content["args"]["mask_ratio"] == 0.5 and content["args"]["decoder_num_heads"] == 4
    assert "main_pretrain.py takes it with --resume" in capsys.readouterr().out


def test_from_a_file_alone(tmp_path):
    theirs = hf_mae()
    theirs.save_pretrained(tmp_path / "hf")
    words = ("--num_heads", 3, "--decoder_num_heads", 4)
    file = tmp_path / "hf" / "model.safetensors"
    run_export("--from", "hf", "--resume", file, *words, "--output", tmp_path / "a")
    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    run_export("--from", "hf", "--resume", tmp_path / "pytorch_model.bin", *words, "--output", tmp_path / "b")
    a, b = (torch.load(tmp_path / x / "model.pth", weights_only=True)["model"] for x in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    (tmp_path / "hf" / "config.json").unlink()  # a folder without it is as a file alone
    run_export("--from", "hf", "--resume", tmp_path / "hf", *words, "--output", tmp_path / "d")
    d = torch.load(tmp_path / "d" / "model.pth", weights_only=True)["model"]
    assert all(torch.equal(a[key], d[key]) for key in a)
    half = {key: value.half() for key, value in load_file(file).items()}
    save_file(half, tmp_path / "half.safetensors", {"format": "pt"})
    words = (*words, "--resume", tmp_path / "half.safetensors", "--output", tmp_path / "c")
    run_export("--from", "hf", *words)
    assert (
        torch.load(tmp_path / "c" / "model.pth", weights_only=True)["model"]["cls_token"].dtype
        == torch.float32
    )


def test_from_a_classifier_and_encoders(tmp_path):
    import transformers

    config = transformers.ViTConfig(**SIZES, num_labels=5, layer_norm_eps=1e-6)
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    run_export("--from", "hf", "--resume", tmp_path / "hf", "--output", tmp_path / "out")
    vit = make_vit(False)
    vit.load_state_dict(torch.load(tmp_path / "out" / "model.pth", weights_only=True)["model"])
    close(vit(IMAGES), theirs(IMAGES).logits)
    words = ("--from", "hf", "--resume", tmp_path / "hf", "--encoder_only", "--output", tmp_path / "part")
    run_export(*words)
    assert "head.weight" not in torch.load(tmp_path / "part" / "model.pth", weights_only=True)["model"]
    for model in (transformers.ViTModel(config), hf_mae().vit):
        name = type(model).__name__
        model.save_pretrained(tmp_path / name)
        run_export("--from", "hf", "--resume", tmp_path / name, "--output", tmp_path / f"{name}_out")
        state = torch.load(tmp_path / f"{name}_out" / "model.pth", weights_only=True)["model"]
        assert torch.equal(state["cls_token"], model.embeddings.cls_token)


def test_a_folder_that_is_damaged_or_different(tmp_path, capsys):
    hf_mae().save_pretrained(tmp_path / "hf")
    words = ("--from", "hf", "--resume", tmp_path / "hf", "--output", tmp_path / "out")
    config = read_json(tmp_path / "hf" / "config.json")
    write_json(tmp_path / "hf" / "config.json", {**config, "hidden_act": "relu"})
    assert "uses the activation 'relu'" in refused(capsys, *words)
    write_json(tmp_path / "hf" / "config.json", {**config, "layer_norm_eps": 0.1})  # computes something else
    assert "nothing was written" in refused(capsys, *words, status=1)
    write_json(tmp_path / "hf" / "config.json", config)
    state = load_file(tmp_path / "hf" / "model.safetensors")
    state.pop("vit.layernorm.weight")
    save_file(state, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    assert "1 tensor missing" in refused(capsys, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["encoder", "pooled classifier", "pooled encoder", "segmenter"])
def test_onnx(tmp_path, kind):
    import onnxruntime

    if kind == "encoder":
        path, model = save_mae(tmp_path, make_mae(img_size=(16, 48), in_chans=2))
        name, shape = "tokens", (2, 16, 48)
    elif kind == "segmenter":
        path, model = save_segmenter(tmp_path, "upsample", 2)
        name, shape = "pixel_logits", (3, 32, 32)
    else:
        path, model = save_vit(tmp_path, True)
        name, shape = ("logits" if kind == "pooled classifier" else "features"), (3, 32, 32)
    flags = {"pooled encoder": ["--encoder_only"], "segmenter": ["--num_heads", 3]}.get(kind, [])
    run_export("--resume", path, "--to", "onnx", *flags, "--output", tmp_path / "out")
    session = onnxruntime.InferenceSession(
        tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    assert [x.name for x in session.get_outputs()] == [name] and session.get_inputs()[0].name == "images"
    for number in (1, 4):
        images = torch.randn(number, *shape)
        output = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        if kind == "encoder":
            close(output[:, 0], encoder_features(model, images, global_pool=False))
        else:
            close(output, model.forward_features(images) if name == "features" else model(images))


def test_commands_and_code_of_the_page(tmp_path, monkeypatch):
    """EXPORT.md from top to bottom, on base-size checkpoints and a small classifier."""
    text = (REPO / "EXPORT.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", text, flags=re.DOTALL)
    assert [kind for kind, _ in blocks].count("python") == 5
    torch.manual_seed(0)
    (tmp_path / "out").mkdir()
    (tmp_path / "tuned").mkdir()
    state = models_mae.mae_vit_base_patch16().state_dict()
    args = dict(model="mae_vit_base_patch16", input_size=224, norm_pix_loss=False)
    torch.save({"model": state, "args": args, "epoch": 399}, tmp_path / "out" / "checkpoint-399.pth")
    torch.save({"model": state}, tmp_path / "mae_visualize_vit_base.pth")
    encoder = {key: value for key, value in state.items() if not key.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, tmp_path / "mae_pretrain_vit_base.pth")
    tuned = models_vit.vit_base_patch16(global_pool=True).state_dict()
    torch.save({"model": tuned}, tmp_path / "mae_finetuned_vit_base.pth")
    save_vit(tmp_path / "tuned", True)
    monkeypatch.chdir(tmp_path)
    exports = 0
    for kind, block in blocks:
        if kind == "bash":
            for line in block.splitlines():
                words = line.split("#")[0].split()
                if words[:2] == ["python", "export.py"] and "--yes" not in words:  # which needs a login
                    run_export(*words[2:])
                    exports += 1
        else:
            environment = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": ""}
            subprocess.run([sys.executable, "-c", block], check=True, env=environment)
    assert exports == 11
