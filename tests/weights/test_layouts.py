"""Files of other code: where tensors are and how they are named, each with the numbers of such a model."""

import hashlib
import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_encoder import NORM, encoder_only, make_mae, make_vit, to_hugging_face
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from util.errors import UserError
from util.evaluate.features import encoder_features
from util.weights.describe import describe
from util.weights.encoder import encoder_state, load_into
from util.weights.files import read_file
from util.weights.layouts import own_names, take_weights

DIM, HEADS, DEPTH, GRID, PATCH = 24, 3, 2, 4, 8


class Attention(nn.Module):
    """Softmax attention, written anew; `split`: BEiT's way, with biases of query and value alone."""

    def __init__(self, dim, heads, split):
        super().__init__()
        self.heads, self.split = heads, split
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=not split), nn.Linear(dim, dim)
        if split:
            self.q_bias, self.v_bias = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))

    def forward(self, x):
        bias = (
            torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            if self.split
            else self.qkv.bias
        )
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def block(dim, heads, names, split=False):
    """A pre-norm block whose parts have the names of other code."""
    first, second, ffn = names
    parts = nn.ModuleDict({first: NORM(dim), "attn": Attention(dim, heads, split), second: NORM(dim)})
    one, two = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
    if ffn == "ffn":
        parts["ffn"] = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(one, nn.GELU()), two])})
    else:
        parts["mlp"] = nn.ModuleDict({"fc1": one, "fc2": two})
    return parts


def run_block(parts, x):
    first, second = (name for name in parts if name[:2] in ("ln", "no"))
    mlp = (
        parts["ffn"]["layers"]
        if "ffn" in parts
        else [nn.Sequential(parts["mlp"]["fc1"], nn.GELU()), parts["mlp"]["fc2"]]
    )
    x = x + parts["attn"](parts[first](x))
    return x + mlp[1](mlp[0](parts[second](x)))


class Encoder(nn.Module):
    """A ViT as mmpretrain names it (`mm`), or as timm and BEiT do."""

    def __init__(self, mm=False, split=False):
        super().__init__()
        names = ("ln1", "ln2", "ffn") if mm else ("norm1", "norm2", "mlp")
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + GRID**2, DIM))
        projection = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.patch_embed = nn.ModuleDict({"projection" if mm else "proj": projection})
        blocks = nn.ModuleList(block(DIM, HEADS, names, split) for _ in range(DEPTH))
        self.add_module("layers" if mm else "blocks", blocks)
        self.add_module("ln1" if mm else "norm", NORM(DIM))

    def forward(self, images):
        (projection,), (blocks, norm) = self.patch_embed.values(), list(self.children())[1:]
        x = projection(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for parts in blocks:
            x = run_block(parts, x)
        return norm(x)


class Neck(nn.Module):
    """mmpretrain's name for MAE's decoder."""

    def __init__(self):
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, 16))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + GRID**2, 16))
        self.decoder_embed, self.decoder_pred = nn.Linear(DIM, 16), nn.Linear(16, PATCH**2 * 3)
        self.decoder_blocks = nn.ModuleList(block(16, 4, ("ln1", "ln2", "ffn")) for _ in range(2))
        self.ln1 = NORM(16)

    def forward(self, x, ids_restore):
        x = self.decoder_embed(x)
        masked = self.mask_token.expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
        tokens = torch.cat([x[:, 1:], masked], dim=1)
        tokens = torch.stack([row[ids] for row, ids in zip(tokens, ids_restore, strict=True)])
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        for parts in self.decoder_blocks:
            x = run_block(parts, x)
        return self.decoder_pred(self.ln1(x))[:, 1:]


def randomised(model, seed=3):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def same_tokens(content, original, folder, **kwargs):
    """Loads `content` as a file into a classifier and an autoencoder; class tokens equal the original's."""
    path = folder / "other.pth"
    torch.save(content, path)
    read = read_file(path, "--init", True, kwargs.pop("key", ""))
    reports = []
    images = torch.randn(2, 3, 32, 32)
    for target in (make_vit(), make_mae(seed=5).eval()):
        reports.append(load_into(target, str(path), content=read, **kwargs))
        with torch.no_grad():
            # Float32 of about 1: sums of 24 to 192 terms in another order, two blocks and a norm
            torch.testing.assert_close(
                encoder_features(target, images, global_pool=False),
                original(images)[:, 0],
                rtol=1e-5,
                atol=2e-5,
            )
    return reports


PREFIXES = ["encoder.", "backbone.", "model.", "module.", "student.", "vit.", "teacher."]


@pytest.mark.parametrize("prefix", [*PREFIXES, "module.model.backbone.", "student.backbone."])
def test_prefixes(tmp_path, prefix):
    timm_model = randomised(
        VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, norm_layer=NORM
        )
    )
    state = {prefix + key: value for key, value in timm_model.state_dict().items()}
    report, _ = same_tokens({"state_dict": state, "epoch": 3}, timm_model.forward_features, tmp_path)
    assert report.dropped == ["head.weight: (5, 24)", "head.bias: (5,)"]
    # Wrapped, with a head and other things outside
    state = {key: value for key, value in state.items() if "head" not in key}
    state |= {
        "head.mlp.0.weight": torch.zeros(2, 2),
        "queue": torch.zeros(9),
        "mixer.blocks.0.w": torch.ones(1),
    }
    report, _ = same_tokens({"model": state}, timm_model.forward_features, tmp_path)
    assert report.unexpected == ["beside.queue", "beside.mixer.blocks.0.w"]
    if prefix != "module.":
        assert f"under '{prefix}'" in report.kind


def test_mmpretrains_mae_with_its_decoder(tmp_path):
    encoder, neck = randomised(Encoder(mm=True)), randomised(Neck(), 4)
    state = {f"backbone.{key}": value for key, value in encoder.state_dict().items()}
    state |= {f"neck.{key}": value for key, value in neck.state_dict().items()}
    state |= {"data_preprocessor.mean": torch.zeros(3, 1, 1), "data_preprocessor.std": torch.ones(3, 1, 1)}
    assert "backbone.layers.1.ffn.layers.0.0.weight" in state and "neck.ln1.weight" in state
    content = {"meta": {"epoch": 400}, "state_dict": state}
    report, whole = same_tokens(content, encoder, tmp_path)
    assert report.kind == "full MAE (encoder and decoder), under 'backbone.', names of mmpretrain"
    assert whole.decoder == "taken" and whole.missing == []
    assert whole.unexpected == ["beside.data_preprocessor.mean", "beside.data_preprocessor.std"]
    mae = make_mae(seed=6).eval()
    load_into(mae, str(tmp_path / "other.pth"))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        latent, _, ids_restore = mae.forward_encoder(images, 0.75, noise)
        # Float32, as above
        torch.testing.assert_close(
            mae.forward_decoder(latent, ids_restore), neck(latent, ids_restore), rtol=1e-5, atol=2e-5
        )


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_mmpretrains_encoder_and_packed_attention(tmp_path, prefix):
    encoder = randomised(Encoder(mm=True))
    state = {prefix + key: value for key, value in encoder.state_dict().items()}
    same_tokens({"state_dict": state | {"head.fc.weight": torch.zeros(5, 24)}}, encoder, tmp_path)


def test_beits_biases(tmp_path):
    encoder = randomised(Encoder(split=True))
    assert (
        "blocks.0.attn.q_bias" in encoder.state_dict()
        and "blocks.0.attn.qkv.bias" not in encoder.state_dict()
    )
    report, _ = same_tokens({"model": encoder.state_dict()}, encoder, tmp_path)
    assert report.kind == "encoder only" and report.unexpected == []


def test_hugging_faces_names_behind_a_prefix(tmp_path):
    mae = make_mae().eval()
    for prefix in ("model.", "module.", "encoder."):
        state = {prefix + key: value for key, value in to_hugging_face(encoder_only(mae)).items()}
        torch.save({"state_dict": state}, tmp_path / "a.pth")
        vit = make_vit()
        assert load_into(vit, str(tmp_path / "a.pth")).kind.startswith("Hugging Face ViTMAE, encoder only")
        assert torch.equal(vit.blocks[1].attn.qkv.weight, mae.blocks[1].attn.qkv.weight)
    full = to_hugging_face(mae.state_dict())
    torch.save(full, tmp_path / "a.pth")
    target = make_mae(seed=7)
    assert load_into(target, str(tmp_path / "a.pth")).decoder == "taken"
    assert all(torch.equal(value, mae.state_dict()[key]) for key, value in target.state_dict().items())


def test_deepspeeds_module(tmp_path):
    mae = make_mae().eval()
    content = {"module": mae.state_dict(), "optimizer": None, "ds_config": {"a": 1}, "global_steps": 7}
    _, report = same_tokens(content, lambda x: encoder_tokens(mae, x), tmp_path)
    assert report.decoder == "taken"


def test_another_codes_decoder_never_takes_the_encoders_place(tmp_path):
    timm_model = randomised(
        VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0, norm_layer=NORM
        )
    )
    state = {f"encoder.{key}": value for key, value in timm_model.state_dict().items()}
    state |= {f"decoder.{key}": torch.zeros_like(value) for key, value in timm_model.state_dict().items()}
    state |= {"decoder.mask_token": torch.zeros(1, 1, 24), "norm.weight": torch.zeros(24)}
    _, report = same_tokens({"model": state}, timm_model.forward_features, tmp_path)
    assert report.decoder.startswith("the file's does not fit")
    content = read_file(tmp_path / "other.pth")
    assert torch.equal(
        describe(content, "x", Namespace(num_heads=3), "encoder").state["blocks.0.norm1.weight"],
        timm_model.blocks[0].norm1.weight,
    )


def encoder_tokens(mae, images):
    return encoder_features(mae, images, global_pool=False)[:, None]


def test_several_models_in_a_file(tmp_path, capsys):
    models = {name: make_mae(seed=i).eval() for i, name in enumerate(("model", "model_ema", "other"))}
    content = {name: model.state_dict() for name, model in models.items()} | {"optimizer": {"state": {}}}
    for key, wanted in (("", "model"), ("model_ema", "model_ema"), ("other", "other")):
        capsys.readouterr()
        same_tokens(content, lambda x, m=models[wanted]: encoder_tokens(m, x), tmp_path, key=key)
        text = capsys.readouterr().err
        assert text.count("note") == 0 and ("'model' is taken (--weights_key NAME" in text) == (not key)
    with pytest.raises(
        UserError, match=r"--weights_key ema: --init \S+ holds no .* but 'model', 'model_ema', 'other'"
    ):
        read_file(tmp_path / "other.pth", "--init", True, "ema")
    wrapped = {"state_dict": {f"module.base_encoder.{k}": v for k, v in content["other"].items()}}
    for key in ("base_encoder", "module.base_encoder"):  # messages may name either
        same_tokens(wrapped, lambda x: encoder_tokens(models["other"], x), tmp_path, key=key)
    content = {"student": content["model"], "teacher": content["other"], "epoch": 1}
    same_tokens(content, lambda x: encoder_tokens(models["other"], x), tmp_path)  # as those use it
    same_tokens(content, lambda x: encoder_tokens(models["model"], x), tmp_path, key="student")


def test_several_prefixes_in_a_state_dict(tmp_path):
    models = {name: make_mae(seed=i).eval() for i, name in enumerate(("student", "teacher", "visual"))}
    state = {f"{n}.{k}": v for n, m in models.items() for k, v in encoder_only(m).items()}
    report, _ = same_tokens(state, lambda x: encoder_tokens(models["teacher"], x), tmp_path)
    assert "under 'teacher.', not 'visual', 'student' (--weights_key)" in report.kind
    for key in models:
        same_tokens({"model": state}, lambda x, m=models[key]: encoder_tokens(m, x), tmp_path, key=key)
    torch.save({k: v for k, v in state.items() if k.startswith("visual")}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a vision transformer stands under 'visual' \(--weights_key\)"):
        load_into(make_vit(), str(tmp_path / "a.pth"))


def test_what_needs_no_renaming_keeps_its_names():
    state = make_mae().state_dict()
    assert own_names(state) == (state, "")
    content = {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3}
    assert take_weights(content)["model"] is state and take_weights(content).keys() == content.keys()
    assert take_weights(state) is state
    odd = {3: torch.ones(1), "x": {1: torch.ones(1)}, "y": None}
    assert take_weights(odd) is odd and take_weights({}) == {}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of Hugging Face's hub, and no network; returns what puts a model into it."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "hub"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(cache), raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repository: str, files: dict[str, bytes], revision="main") -> Path:
        """As the library's documentation describes its cache: blobs, snapshots of links to them, refs."""
        root, commit = cache / f"models--{repository.replace('/', '--')}", "0123456789abcdef" * 2 + "01234567"
        for part in ("blobs", "refs", f"snapshots/{commit}"):
            (root / part).mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        for name, data in files.items():
            blob = root / "blobs" / hashlib.sha256(data).hexdigest()
            blob.write_bytes(data)
            (root / "snapshots" / commit / name).symlink_to(
                os.path.relpath(blob, root / "snapshots" / commit)
            )
        return root

    return put


def as_safetensors(folder, state) -> bytes:
    save_file(state, folder / "m.safetensors")
    return (folder / "m.safetensors").read_bytes()


@pytest.mark.needs("posix")
def test_models_of_the_hub_from_the_cache(tmp_path, hub):
    mae = make_mae()
    config = {"model_type": "vit_mae", "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    config |= {"decoder_num_attention_heads": 4, "hidden_size": 24}
    files = {"config.json": json.dumps(config).encode()}
    files["model.safetensors"] = as_safetensors(tmp_path, to_hugging_face(mae.state_dict()))
    files["preprocessor_config.json"] = json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}).encode()
    hub("somebody/vit-mae", files)
    content = read_file("hf://somebody/vit-mae", "--init")
    assert content["settings"]["mean"] == [0.1] * 3 and content["settings"]["num_heads"] == 3
    target = make_mae(seed=4)
    report = load_into(target, "hf://somebody/vit-mae", "--init", content)
    assert report.decoder == "taken" and torch.equal(target.decoder_pred.bias, mae.decoder_pred.bias)
    assert report.source == "hf://somebody/vit-mae"
    hub("somebody/old", {"pytorch_model.bin": files_of_torch(tmp_path, encoder_only(mae))}, "v1")
    assert load_into(make_vit(), "hf://somebody/old@v1").kind == "encoder only"


def files_of_torch(folder, state) -> bytes:
    torch.save(state, folder / "m.bin")
    return (folder / "m.bin").read_bytes()


@pytest.mark.needs("posix")
def test_parts_of_a_large_model_of_the_hub(tmp_path, hub):
    state = encoder_only(make_mae())
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
    files = {"model.safetensors.index.json": json.dumps({"weight_map": names}).encode()}
    for part in sorted(set(names.values())):
        files[part] = as_safetensors(tmp_path, {key: state[key] for key in state if names[key] == part})
    root = hub("somebody/large", files)
    assert read_file("hf://somebody/large")["model"].keys() == state.keys()
    next(root.rglob("model-00002*")).unlink()
    with pytest.raises(UserError, match="are not in the cache"):
        read_file("hf://somebody/large")


@pytest.mark.needs("posix")
def test_timms_names(tmp_path, hub):
    config = {
        "architecture": "vit_base_patch16_224",
        "pretrained_cfg": {"mean": [0.3] * 3, "input_size": [3, 32, 32]},
    }
    data = as_safetensors(tmp_path, encoder_only(make_mae()))
    hub(
        "timm/vit_base_patch16_224.mae",
        {"model.safetensors": data, "config.json": json.dumps(config).encode()},
    )
    assert read_file("timm:vit_base_patch16_224.mae")["settings"]["mean"] == [0.3] * 3
    assert load_into(make_vit(), "timm:vit_base_patch16_224.mae").kind == "encoder only"
    for name, near in (
        ("vit_base_patch16_224.may", "vit_base_patch16_224.mae"),
        ("vit_bse_patch16_224", "vit_"),
    ):
        with pytest.raises(UserError, match=rf"--init timm:{name}: timm has no weights .*it has .*{near}"):
            read_file(f"timm:{name}", "--init")


def test_a_name_that_is_not_in_the_cache_without_network(hub):
    for name in ("hf://somebody/nothing", "timm:vit_large_patch16_224.mae", "hf://somebody/vit@v7"):
        with pytest.raises(UserError) as error:
            read_file(name, "--init")
        text = str(error.value)
        assert (
            text.startswith(
                f"--init {name}: its weights (model.safetensors or pytorch_model.bin) are not in the "
            )
            and "\n" not in text
        )
        assert "hf download" in text and "pass a file or folder" in text
    for name in ("hf://", "hf://a/b/c", "hf://../x", "hf://a b/c"):
        with pytest.raises(UserError, match="is no model that can be had from the hub") as error:
            read_file(name, "--init")
        assert "\n" not in str(error.value)


@pytest.mark.needs("posix")
def test_a_changed_file_of_the_cache_is_noticed(tmp_path, hub):
    data = as_safetensors(tmp_path, encoder_only(make_mae()))
    root = hub("somebody/vit", {"model.safetensors": data})
    blob = next((root / "blobs").iterdir())
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match="the file was changed after it was written"):
        read_file("hf://somebody/vit")
    assert "model" in read_file("hf://somebody/vit", verify=False)


def test_what_stands_beside_tensors_is_named(tmp_path):
    """Numpy's numbers are plain ones; what needs code to be read is refused, and where it stands is said."""
    state, path = encoder_only(make_mae()), tmp_path / "a.pth"
    beside = {
        "best": np.float64(0.5),
        "steps": np.arange(3),
        "flag": np.bool_(True),
        "when": {"lr": np.float32(1)},
    }
    torch.save({"model": state, **beside}, path)
    assert load_into(make_vit(), str(path)).kind == "encoder only"
    for name, value in (
        ("rng", np.random.default_rng(0)),
        ("date", np.datetime64("2026-01-01")),
        ("cfg", Path),
    ):
        torch.save({"model": state, "extra": {name: value}}, path)
        with pytest.raises(UserError, match=rf"a\.pth: cannot be read .*in '{name}'") as error:
            read_file(path, "--init")
        assert "\n" not in str(error.value)


def test_encoder_state_reads_the_usual_entry():
    state = make_mae().state_dict()
    for content in (
        {"model": state},
        {"state_dict": state},
        {"module": state},
        {"ema": state},
        {"net": state},
        state,
    ):
        assert encoder_state(content)[0].keys() == state.keys()
