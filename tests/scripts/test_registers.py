"""`--registers`: the encoder against a plain loop and timm's, and all that reads a checkpoint of it."""

import importlib.util
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from export_utils import run_export
from golden_utils import REPO, TINY, TINY_MAE, fill
from test_main_evaluate import run as run_card
from test_main_pretrain import assert_same, names_in, run, weights
from test_main_segment import make_masked
from test_teacher import flags as teacher_flags
from test_teacher import plain_block, write_teacher
from torch.nn.functional import layer_norm, linear
from transfer_utils import NORM, given_args, make_pictures, vit_test
from transfer_utils import run as run_script

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_segment
import models_mae
import models_vit
import predict
from models_cross import CrossDecoderViT
from models_seg import SegmentationTransformer
from util.errors import UserError
from util.evaluate.features import encoder_features
from util.evaluate.layers import EveryBlock
from util.evaluate.predict import pool_tokens
from util.export import hf
from util.export.checkpoint import read_again
from util.figures.attention import class_token_attention
from util.figures.features import patch_features
from util.lr_decay import param_groups_lrd
from util.recipes.teacher import attention_distance, attention_maps, make_student
from util.weights.build import build, random_encoder
from util.weights.describe import describe
from util.weights.encoder import load_into
from util.weights.files import read_file

CPU = torch.device("cpu")
NANO = ["--model", "mae_vit_nano", "--registers", "2", "--epochs", "1", "--warmup_epochs", "0"]
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
IN_ORDER = torch.arange(16).expand(3, -1)

pytestmark = pytest.mark.usefixtures("nano")


@pytest.fixture(autouse=True)
def named(monkeypatch):
    monkeypatch.setitem(models_vit.MODELS, "vit_test", lambda **sizes: models_vit.vit(TINY, **sizes))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a run of one epoch; its weights are moved, so that registers matter."""
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            models_mae.MODELS, "mae_vit_nano", lambda **sizes: models_mae.mae_vit(TINY_MAE, **sizes)
        )
        run(make_pictures(folder / "images"), folder / "out", *NANO)
    path = folder / "out" / "checkpoint-0.pth"
    content = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name, value in content["model"].items():
        if "pos_embed" not in name:
            value += 0.1 * torch.randn(value.shape, generator=generator)
    torch.save(content, path)
    return path


def full(path, part="full"):
    return build(describe(read_file(path), path, Namespace(), part))


def knn(pictures, path):
    words = ["--model", "vit_test", "--input_size", "32", "--num_workers", "0", "--device", "cpu"]
    main_knn.main(given_args(main_knn, [*words, "--data_path", str(pictures), "--finetune", str(path)]))


def plain_latent(model, images, places):
    """[(maps, tokens) of each block], registers between class token and the patches at `places` (N, K)."""
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
    tokens = linear(patches, model.patch_embed.proj.weight.flatten(1), model.patch_embed.proj.bias)
    tokens = tokens + model.pos_embed[:, 1:]
    rows = []
    for row, place in zip(tokens, places, strict=True):
        rows.append(torch.cat([model.cls_token[0] + model.pos_embed[0, :1], model.reg_token[0], row[place]]))
    x, found = torch.stack(rows), []
    for block in model.blocks:
        maps, x = plain_block(block, x)
        found.append((maps, x))
    return found


def without(x):
    """Tokens or maps without the plain order's two registers."""
    return torch.cat([x[:, :1], x[:, 3:]], dim=1)


def plain_norm(model, x):
    return layer_norm(x, (24,), model.norm.weight, model.norm.bias, model.norm.eps)


def make(kind=models_mae.MaskedAutoencoderViT, **changes):
    model = models_mae.mae_vit(TINY_MAE, make=kind, registers=2, **changes)
    return fill(model, seed=2, std=0.2, skip="pos_embed").double()


@pytest.mark.parametrize("kind", [models_mae.MaskedAutoencoderViT, CrossDecoderViT])
def test_the_encoder_is_a_plain_loop(kind):
    model, noise = make(kind), torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    places = noise.argsort(dim=1)[:, :4]
    latent, mask, _ = model.forward_encoder(IMAGES, 0.75, noise)
    wanted = plain_norm(model, without(plain_latent(model, IMAGES, places)[-1][1]))
    assert latent.shape == (3, 5, 24) and mask.sum() == 3 * 12
    torch.testing.assert_close(latent, wanted, rtol=0, atol=1e-10)
    model.zero_grad()
    model(IMAGES, noise=noise)[0].backward()
    assert model.reg_token.grad.abs().min() > 0
    assert not torch.allclose(model.reg_token.grad[0, 0], model.reg_token.grad[0, 1])
    loss = model(IMAGES, noise=noise)[0]
    model.grad_checkpointing = True
    assert torch.equal(model(IMAGES, noise=noise)[0], loss)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_classifier_is_timms(pool):
    """Positions are learned here; registers have none."""
    own = fill(vit_test(global_pool=pool, registers=2, num_classes=5), seed=4, std=0.2).double()
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, reg_tokens=2, num_classes=5,
        global_pool=pool, norm_layer=NORM,
    ).double()  # fmt: skip
    state = own.state_dict()
    table = state["pos_embed"]
    state["pos_embed"] = torch.cat([table[:, :1], table.new_zeros(1, 2, 24), table[:, 1:]], dim=1)
    theirs.load_state_dict(state)
    torch.testing.assert_close(own.eval()(IMAGES), theirs.eval()(IMAGES), rtol=0, atol=1e-10)
    assert own.forward_tokens(IMAGES).shape == (3, 17, 24)


def test_none_is_the_model_as_it_was():
    """All other weights are drawn as without registers, which have a draw of their own, each."""
    states = []
    for registers in ({}, {"registers": 0}, {"registers": 3}):
        torch.manual_seed(7)
        states.append(models_mae.mae_vit(TINY_MAE, **registers).state_dict())
    token = states[2].pop("reg_token")
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])
    assert token.shape == (1, 3, 24) and 0.01 < token.std() < 0.03 and len(token[0].unique(dim=0)) == 3
    assert "reg_token" not in vit_test().state_dict() and vit_test(registers=3).reg_token.std() > 0.01


def test_all_readers_of_an_encoder_agree():
    """Features of model and classifier, every block's, patches', attention: against the plain loop."""
    mae = make().eval()
    vit = vit_test(num_classes=0, registers=2).double().eval()
    vit.load_state_dict({k: v for k, v in mae.state_dict().items() if k in vit.state_dict()})
    found = plain_latent(mae, IMAGES, IN_ORDER)
    normed = [plain_norm(mae, without(x)) for _, x in found]

    def close(own, wanted):
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-10)

    for model in (mae, vit):
        close(encoder_features(model, IMAGES), normed[-1][:, 1:].mean(dim=1))
        close(encoder_features(model, IMAGES, global_pool=False), normed[-1][:, 0])
        close(class_token_attention(model, IMAGES).flatten(2), found[-1][0][:, :, 0, 3:])
        torch.testing.assert_close(patch_features(model, IMAGES), normed[-1][:, 1:].float())
        rows = EveryBlock(model, token_blocks=[1])(IMAGES)
        wanted = [part for x in normed for part in (x[:, 0], x[:, 1:].mean(dim=1))]
        close(rows, torch.cat([*wanted, normed[0][:, 1:].flatten(1)], dim=1))
    close(pool_tokens(vit, vit.forward_tokens(IMAGES), "patches"), normed[-1][:, 1:])
    pooled = vit_test(num_classes=0, registers=2, global_pool=True).double().eval()
    state = {"fc_norm.weight": vit.norm.weight, "fc_norm.bias": vit.norm.bias, **vit.state_dict()}
    pooled.load_state_dict({k: v for k, v in state.items() if not k.startswith("norm.")})
    mean = layer_norm(without(found[0][1])[:, 1:].mean(dim=1), (24,), vit.norm.weight, vit.norm.bias, 1e-6)
    close(EveryBlock(pooled)(IMAGES)[:, 24:48], mean)
    segmenter = SegmentationTransformer(2, "linear", 2, **TINY, registers=2, norm_layer=NORM).double().eval()
    segmenter.load_state_dict(vit.state_dict(), strict=False)
    close(segmenter.forward_patches(IMAGES), torch.cat(normed, dim=-1)[:, 1:].mT.unflatten(2, (4, 4)))


@pytest.mark.parametrize(("own", "theirs"), [(2, 0), (0, 2), (2, 2)])
def test_a_teacher_and_its_student_may_have_other_numbers(tmp_path, own, theirs):
    """Attention is compared among class token and patches; tokens without registers."""
    path = write_teacher(tmp_path / "teacher.pth", registers=theirs)
    for kind in ("attention", "features"):
        student = fill(models_mae.mae_vit(TINY_MAE, registers=own), seed=10, std=0.1, skip="pos_embed")
        make_student(student, teacher_flags(path, teacher_loss=kind), CPU)
        student.double().lesson.teacher.double()
        torch.manual_seed(0)
        loss, distance = student(IMAGES)
        torch.manual_seed(0)
        assert torch.equal(student.eval()(IMAGES)[0], loss) and distance.isfinite() and distance > 0
    if (own, theirs) == (2, 2):  # its own teacher: no distance
        model = make().eval()
        before = plain_latent(model, IMAGES, IN_ORDER)[0][1]
        maps = attention_maps(model.blocks[1], without(before))
        shared = plain_latent(model, IMAGES, IN_ORDER)[1][0]
        shared = torch.cat([shared[..., :1], shared[..., 3:]], dim=-1)
        shared = torch.cat([shared[:, :, :1], shared[:, :, 3:]], dim=2)
        torch.testing.assert_close(maps, shared / shared.sum(-1, keepdim=True), rtol=0, atol=1e-10)
        assert attention_distance(maps, maps) == 0


def test_runs_resume_bit_for_bit_and_keep_their_number(images, tmp_path):
    own = [
        "--model",
        "mae_vit_nano",
        "--registers",
        "2",
        "--ema",
        "0.9",
        "--save_freq",
        "1",
        "--vis_freq",
        "1",
    ]
    own += ["--decoder", "cross", "--mask", "block", "--size_schedule", "16:0", "32:0.5", "--knn_freq", "1"]
    whole = run(images, tmp_path / "whole", *own)
    run(images, tmp_path / "parts", *own, "--max_steps", "4")
    for number in ("0", "3"):
        with pytest.raises(UserError, match=r"reg_token.*\); pass the flags it was trained with"):
            run(images, tmp_path / "parts", *own, "--registers", number, "--resume", "auto")
    assert run(images, tmp_path / "parts", *own, "--resume", "auto") == whole
    state = weights(tmp_path / "whole" / "checkpoint-1.pth")
    assert_same(state, weights(tmp_path / "parts" / "checkpoint-1.pth"))
    assert state["reg_token"].shape == (1, 2, 24)
    with pytest.raises(UserError, match="--registers -1: must be at least 0"):
        run(images, tmp_path / "new", "--registers", "-1")


def test_a_start_from_weights(images, checkpoint, tmp_path, capsys):
    own = ["--model", "mae_vit_nano", "--epochs", "1", "--lr", "0", "--warmup_epochs", "0"]
    own += ["--init", str(checkpoint), "--patch_size", "8"]
    own += ["--decoder_embed_dim", "32", "--decoder_depth", "1", "--decoder_num_heads", "2"]
    run(images, tmp_path / "same", *own, "--registers", "2")
    assert ", 2 registers)" in capsys.readouterr().out
    assert_same(weights(checkpoint), weights(tmp_path / "same" / "checkpoint-0.pth"))
    for number in ("0", "1"):
        text = rf"2 registers\) does not fit the model \(.*, {number} registers\): reg_token.*--registers 2$"
        with pytest.raises(UserError, match=text):
            run(images, tmp_path / "other", *own, "--registers", number)
    plain = tmp_path / "plain.pth"  # one without takes new ones
    torch.save({"model": {k: v for k, v in weights(checkpoint).items() if k != "reg_token"}}, plain)
    run(images, tmp_path / "added", *own, "--init", str(plain), "--registers", "3")
    assert "missing keys, initialised here (1): reg_token" in capsys.readouterr().out
    assert weights(tmp_path / "added" / "checkpoint-0.pth")["reg_token"].shape == (1, 3, 24)
    vit = vit_test()
    with pytest.raises(UserError, match=r"2 registers\) does not fit the model .*--registers 2"):
        load_into(vit, str(checkpoint))
    state = {**weights(checkpoint), "reg_token": torch.zeros(24)}
    torch.save({"model": state}, plain)
    with pytest.raises(UserError, match=r"of odd shapes: reg_token \(24,\)"):
        load_into(vit, str(plain))


@pytest.mark.parametrize("script", [main_finetune, main_linprobe])
def test_classifiers_take_the_number_from_the_file(pictures, checkpoint, tmp_path, script):
    common = "--batch_size 4 --epochs 1 --warmup_epochs 0"
    run_script(script, common, data_path=pictures, finetune=checkpoint, output_dir=tmp_path / "out")
    tuned = tmp_path / "out" / "checkpoint-0.pth"
    state = weights(tuned)
    assert state["reg_token"].shape == (1, 2, 24)
    frozen = torch.equal(state["reg_token"], weights(checkpoint)["reg_token"])
    assert frozen == (script is main_linprobe)
    run_script(script, common.replace("epochs 1", "epochs 2"), data_path=pictures, resume=tuned,
               output_dir=tmp_path / "out")  # fmt: skip
    last = tmp_path / "out" / "checkpoint-1.pth"
    run_script(script, "--eval", data_path=pictures, resume=last, output_dir=tmp_path / "eval")
    words = ["--resume", str(last), str(pictures / "val" / "red"), "--csv", str(tmp_path / "p.csv")]
    predict.main(given_args(predict, [*words, "--num_workers", "0", "--device", "cpu"]))
    assert len((tmp_path / "p.csv").read_text().splitlines()) > 8
    vit = vit_test(registers=2)
    groups = param_groups_lrd(vit, 0.05, vit.no_weight_decay(), 0.5)
    [group] = [g for g in groups if any(p is vit.reg_token for p in g["params"])]
    assert group["lr_scale"] == 0.5**3 and group["weight_decay"] == 0


def test_neighbours_card_pixels_and_features(pictures, checkpoint, tmp_path, capsys):
    knn(pictures, checkpoint)
    run_card("--baselines", data_path=pictures, finetune=checkpoint, output_dir=tmp_path / "card")
    assert "random encoder" in (tmp_path / "card" / "card.md").read_text()
    assert (
        random_encoder(describe(read_file(checkpoint), checkpoint, Namespace(), "full")).reg_token.std() > 0
    )
    mae = full(checkpoint)
    for layer in ([], ["--layer", "2"]):
        words = ["--resume", str(checkpoint), str(pictures / "val"), "--features", str(tmp_path / "f.npz")]
        predict.main(given_args(predict, [*words, *layer, "--num_workers", "0", "--device", "cpu"]))
    features = np.load(tmp_path / "f.npz")["features"]
    assert features.shape[1] == 24 and np.isfinite(features).all()
    masked = make_masked(tmp_path / "masked")
    for mode in ("finetune", "linear"):
        run_script(main_segment, f"--mode {mode} --batch_size 4 --epochs 1 --warmup_epochs 0 --layers 2",
                   data_path=masked, finetune=checkpoint, output_dir=tmp_path / mode)  # fmt: skip
        tuned = tmp_path / mode / "checkpoint-0.pth"
        assert weights(tuned)["reg_token"].shape == (1, 2, 24)
        run_script(main_segment, f"--eval --mode {mode} --layers 2", data_path=masked, resume=tuned)
    words = ["--resume", tuned, "--to", "torch_export", "--output", tmp_path / "graph", "--num_heads", "3"]
    run_export(*words)
    spec = importlib.util.spec_from_file_location("demo_visualize", REPO / "demo/visualize.py")
    spec.loader.exec_module(demo := importlib.util.module_from_spec(spec))
    words = ["--resume", checkpoint, pictures / "val", "--rows", "2", "--attention", "--pca", "--neighbours",
             "2", "--output", tmp_path / "picture.png"]  # fmt: skip
    demo.main(given_args(demo, [str(word) for word in words]))
    assert {"picture.png", "picture-attention.png", "picture-pca.png"} <= set(names_in(tmp_path))
    assert mae.reg_token.shape == (1, 2, 24)


def test_exports(checkpoint, pictures, tmp_path, capsys):
    heads = ["--num_heads", "3", "--decoder_num_heads", "2"]
    for target in ("timm", "safetensors", "torch_export"):
        run_export("--resume", checkpoint, "--to", target, "--output", tmp_path / target, *heads)
        assert "largest difference" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--to hf: .* have no register tokens; --to timm"):
        hf.write(source := read_again(tmp_path / "safetensors" / "model.safetensors"), tmp_path)
    assert source.info["registers"] == 2
    path, images = tmp_path / "timm" / "model.safetensors", IMAGES.float()
    theirs = timm.create_model(
        "vit_tiny_patch16_224", checkpoint_path=str(path), img_size=32, patch_size=8, embed_dim=24, depth=2,
        num_heads=3, num_classes=0, reg_tokens=2,
    ).eval()  # fmt: skip
    own = full(checkpoint, "encoder")
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), encoder_features(own, images, False), rtol=0, atol=1e-5)
        # and its folder is read again, for fine-tuning too
        again = vit_test(num_classes=0, registers=2)
        assert ", 2 registers" in load_into(again, str(tmp_path / "timm")).kind
        assert torch.equal(again.pos_embed, own.pos_embed)
        assert torch.equal(again.eval()(images), own(images))
    run_export("--from", "timm", "--resume", tmp_path / "timm", "--output", tmp_path / "back")
    knn(pictures, tmp_path / "back" / "model.pth")
    read = full(tmp_path / "safetensors" / "model.safetensors")
    torch.testing.assert_close(read(images, noise=torch.zeros(3, 16))[0],
                               full(checkpoint)(images, noise=torch.zeros(3, 16))[0])  # fmt: skip
    assert main_pretrain.get_args_parser().get_default("registers") == 0


def test_a_training_pass_is_one_graph():
    model = make().train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(compiled(IMAGES, noise=noise)[0], model(IMAGES, noise=noise)[0])
