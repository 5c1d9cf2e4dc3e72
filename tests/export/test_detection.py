"""EXPORT.md's names for ViTDet and UPerNet: modules that have them compute what the encoder computes."""

import re

import pytest
import torch
import torch.nn.functional as F
from export_utils import make_mae, run_export, save_mae
from golden_utils import REPO
from torch import nn

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
WIDTH, DEPTH, HEADS, PATCH = 24, 2, 3, 8


def norm():
    return nn.LayerNorm(WIDTH, eps=1e-6)


def parts(**modules):
    """A module of parts, which the caller computes with."""
    whole = nn.Module()
    for name, module in modules.items():
        whole.add_module(name, module)
    return whole


class ViTDet(nn.Module):
    """The backbone as detectron2 names it: maps of patches (N, H, W, D), no class token, no final norm."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 16, WIDTH))
        self.patch_embed = parts(proj=nn.Conv2d(3, WIDTH, PATCH, PATCH))
        self.blocks = nn.ModuleList(
            parts(
                norm1=norm(),
                attn=parts(qkv=nn.Linear(WIDTH, 3 * WIDTH), proj=nn.Linear(WIDTH, WIDTH)),
                norm2=norm(),
                mlp=parts(fc1=nn.Linear(WIDTH, 4 * WIDTH), fc2=nn.Linear(4 * WIDTH, WIDTH)),
            )
            for _ in range(DEPTH)
        )

    def forward(self, images):
        x = self.patch_embed.proj(images).permute(0, 2, 3, 1)
        x = x + self.pos_embed[:, 1:].unflatten(1, x.shape[1:3])
        n, height, width, dim = x.shape
        for block in self.blocks:
            qkv = block.attn.qkv(block.norm1(x)).reshape(n, height * width, 3, HEADS, dim // HEADS)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            weights = (q @ k.mT / (dim // HEADS) ** 0.5).softmax(dim=-1)
            mixed = (weights @ v).transpose(1, 2).reshape(n, height, width, dim)
            x = x + block.attn.proj(mixed)
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        return x.permute(0, 3, 1, 2)


class UPerNetEncoder(nn.Module):
    """The backbone as mmsegmentation names it: maps of patches (N, D, H, W) after every block."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 16, WIDTH))
        self.patch_embed = parts(projection=nn.Conv2d(3, WIDTH, PATCH, PATCH))
        self.layers = nn.ModuleList(
            parts(
                ln1=norm(),
                attn=parts(attn=nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)),
                ln2=norm(),
                ffn=parts(
                    layers=nn.Sequential(
                        nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU()), nn.Linear(4 * WIDTH, WIDTH)
                    )
                ),
            )
            for _ in range(DEPTH)
        )

    def forward(self, images):
        x = self.patch_embed.projection(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        maps = []
        for layer in self.layers:
            y = layer.ln1(x)
            x = x + layer.attn.attn(y, y, y, need_weights=False)[0]
            x = x + layer.ffn.layers(layer.ln2(x))
            maps.append(x[:, 1:].mT.unflatten(2, (4, 4)))
        return maps


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """(the names that EXPORT.md's code makes, the encoder), with the files that it writes in the folder."""
    path, mae = save_mae(tmp_path, make_mae())
    run_export("--resume", path, "--to", "timm", "--encoder_only", "--output", tmp_path / "exported/timm")
    text = (REPO / "EXPORT.md").read_text(encoding="utf-8").split("## Detection and segmentation\n")[1]
    scope = {}
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], scope)
    return scope, mae


def expected_maps(mae, class_token):
    x = mae.patch_embed(IMAGES) + mae.pos_embed[:, 1:]
    first = (mae.cls_token + mae.pos_embed[:, :1]).expand(len(x), -1, -1)
    x, maps = torch.cat([first, x], dim=1) if class_token else x, []
    for block in mae.blocks:
        x = block(x)
        maps.append(x[:, int(class_token) :].mT.unflatten(2, (4, 4)))
    return maps


def close(a, b):
    # Float32, values of about 1: another way adds up the same 24 to 96 terms in another order, up to 6e-7
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@torch.no_grad()
def test_vitdet(exported, tmp_path):
    _, mae = exported
    model = ViTDet()
    model.load_state_dict(torch.load(tmp_path / "vitdet.pth")["model"])  # strict: no name more, none less
    close(model(IMAGES), expected_maps(mae, class_token=False)[-1])


@torch.no_grad()
def test_upernet(exported, tmp_path):
    _, mae = exported
    model = UPerNetEncoder()
    model.load_state_dict(torch.load(tmp_path / "upernet.pth"))
    for found, expected in zip(model(IMAGES), expected_maps(mae, class_token=True), strict=True):
        close(found, expected)


@pytest.mark.extra
@torch.no_grad()
def test_vitdet_of_transformers(exported, tmp_path):
    from transformers import VitDetConfig, VitDetModel

    scope, mae = exported
    config = VitDetConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, image_size=32,
        pretrain_image_size=32, patch_size=PATCH, mlp_ratio=4,
    )  # fmt: skip
    model = VitDetModel(config).eval()
    model.load_state_dict(scope["renamed"]("transformers", str(tmp_path / "exported/timm/model.safetensors")))
    close(model(IMAGES).last_hidden_state, expected_maps(mae, class_token=False)[-1])
