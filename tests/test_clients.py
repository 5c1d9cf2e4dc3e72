"""Own code that uses the modules as code for the reference does: one small client of each kind.

torchrun ... tests/test_clients.py OUTPUT      the models of MODELS in several processes; rank 0 writes losses
"""

import builtins
import copy
import json
import logging
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import Mlp
from timm.models import vision_transformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from edit_worker import BATCH, CPU, SEED, SIZES, first_loss, images, run_args, tiny
from golden_utils import GOLDEN, REPO, TINY, TINY_MAE, fill
from image_utils import make_folder

import engine_finetune
import engine_pretrain
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import models_mae
import models_vit
import predict
from util import datasets, misc, pos_embed
from util.compute import compile as compiling
from util.compute.precision import NativeScalerWithGradNormCount
from util.data.loader import Batch, build_loader
from util.data.sampler import EvalSampler
from util.errors import UserError
from util.evaluate.features import encoder_features
from util.figures.attention import class_token_attention
from util.figures.reconstruction import reconstruct
from util.processes import group
from util.rng import fixed_noise, seed_step
from util.run.meters import SmoothedValue

NORM = partial(nn.LayerNorm, eps=1e-6)

# Pre-training with own models


class TwoArguments(models_mae.MaskedAutoencoderViT):
    """Hides a block of rows, as the reference's signature allows."""

    def random_masking(self, x, mask_ratio):
        start = torch.randint(16, (len(x), 1))
        ids = (torch.arange(16) + start) % 16
        visible = int(16 * (1 - mask_ratio))
        ids_restore = ids.argsort(dim=1)
        x = torch.gather(x, 1, ids[:, :visible].unsqueeze(-1).expand(-1, -1, x.shape[2]))
        return x, (ids_restore >= visible).to(x.dtype), ids_restore


class OwnEncoder(models_mae.MaskedAutoencoderViT):
    """A further token, and keywords as the reference names them."""

    def forward_encoder(self, x, mask_ratio):
        latent, mask, ids_restore = super().forward_encoder(x=x + 1, mask_ratio=mask_ratio)
        return latent * 2, mask, ids_restore


class OwnWeightsAndLoss(models_mae.MaskedAutoencoderViT):
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.01)

    def forward_loss(self, imgs, pred, mask):
        error = (pred - self.patchify(imgs)).abs().mean(dim=-1)
        return (error * mask).sum() / mask.sum()


class TokenMean(nn.Module):
    """An attention without a class or an argument of timm's."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(x).mean(dim=1, keepdim=True).expand_as(x)


class ScaledAttention(vision_transformer.Attention):
    def forward(self, x, **how):
        return 3 * super().forward(x, **how)


class RelativeBlock(nn.Module):
    """A decoder block in which neighbours in the order of tokens see each other."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


def make(kind=models_mae.MaskedAutoencoderViT):
    return fill(kind(**SIZES, norm_layer=NORM), seed=1, std=0.1, skip="pos_embed")


def replaced_attention():
    model = make()
    model.blocks[0].attn = TokenMean(24).double()
    return fill(model, seed=1, std=0.1, skip="pos_embed")


def subclassed_attention():
    model = make()
    own = ScaledAttention(24, 3, qkv_bias=True).double()
    own.load_state_dict(model.blocks[0].attn.state_dict())
    model.blocks[0].attn = own
    return model


def hooked():
    model = make()
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def relative_positions():
    model = make()
    model.decoder_blocks[0] = RelativeBlock(16)
    return fill(model, seed=1, std=0.1, skip="pos_embed")


def assigned_forward():
    model = make()
    forward = model.patch_embed.forward
    model.patch_embed.forward = lambda x: 2 * forward(x)
    return model


MODELS = {
    "two arguments": partial(make, TwoArguments),
    "own encoder": partial(make, OwnEncoder),
    "own loss": partial(make, OwnWeightsAndLoss),
    "replaced attention": replaced_attention,
    "subclassed attention": subclassed_attention,
    "hook": hooked,
    "relative positions": relative_positions,
    "assigned forward": assigned_forward,
}


@torch.no_grad()
def by_forward(model, rank=0):
    """The first loss of training, from `forward` alone."""
    seed_step(SEED, rank, 0, 0)
    return model(images(rank), 0.75)[0].item()


def losses_in_several_processes(output):
    torch.set_num_threads(1)
    compiling.BACKEND = "eager"
    args = run_args()
    group.init_distributed_mode(args)
    losses = {
        name: [first_loss(new(), compiled, args) for compiled in (False, True)]
        for name, new in MODELS.items()
    }
    if args.rank == 0:
        Path(output).write_text(json.dumps(losses), encoding="utf-8")
    group.shut_down()


@pytest.fixture
def cheap_compiler(request, monkeypatch):
    torch._dynamo.reset()
    trace = logging.getLogger("torch.__trace")  # pytest listens to it, which takes most of the time
    trace.disabled = True
    if "inductor" not in request.node.name:
        monkeypatch.setattr(compiling, "BACKEND", "eager")
    yield
    trace.disabled = False
    torch._dynamo.reset()


def ways():
    """Every model eagerly, some compiled as one graph and block by block, all of it in the slow tests."""
    for way, quick in [("eager", MODELS), ("compiled", ["two arguments", "relative positions"]),
                       ("blocks", ["replaced attention", "hook"]), ("inductor", [])]:  # fmt: skip
        for name in MODELS:
            yield pytest.param(name, way, marks=[] if name in quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "way"), list(ways()))
def test_b3_b4_b5_a_model_trains_as_its_forward_says(name, way, cheap_compiler, capsys):
    expected = by_forward(MODELS[name]())
    model = MODELS[name]()
    if way == "blocks":  # as several processes do it
        compiling.compile_model(model, "forward", run_args(distributed=True), CPU)
    found = first_loss(model, way in ("compiled", "inductor"), run_args())
    assert found == pytest.approx(expected, rel=1e-12)
    assert abs(expected - by_forward(tiny())) > 1e-6  # the client's code was called
    assert "torch.compile failed" not in capsys.readouterr().err


@pytest.mark.parametrize("distributed", [False, True])
def test_b4_hooks_of_one_block_and_of_later_on_are_called(distributed, cheap_compiler):
    """Blocks share a graph, which knows of the hooks that were there when it was made."""
    model, noise = models_mae.mae_vit(TINY_MAE if distributed else SIZES).double(), torch.rand(BATCH, 16)
    compiling.compile_model(model, "forward", run_args(distributed=distributed), CPU)
    losses = [model(images(), noise=noise)[0].item()]
    for number in (1, 0) if distributed else (0,):
        model.blocks[number].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
        losses.append(model(images(), noise=noise)[0].item())
    model.eval()  # eager then
    assert losses[-1] == pytest.approx(model(images(), noise=noise)[0].item(), rel=1e-12)
    assert len({round(loss, 8) for loss in losses}) == len(losses)


@pytest.mark.slow
def test_b3_b4_b5_models_in_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(REPO / "tests/test_clients.py"), str(tmp_path / "losses.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "torch.compile failed" not in done.stderr, done.stderr
    losses = json.loads((tmp_path / "losses.json").read_text())
    for name, new in MODELS.items():
        mean = (by_forward(new(), 0) + by_forward(new(), 1)) / 2
        assert losses[name] == pytest.approx([mean, mean], rel=1e-12), name


@pytest.mark.parametrize("name", ["two arguments", "own encoder"])
def test_b3_held_out_loss_and_pictures_of_a_model_that_takes_no_noise(name):
    model, args = MODELS[name](), run_args(amp_dtype="none", mean=None, std=None)
    batch = [Batch(images(), torch.zeros(BATCH), torch.arange(BATCH))]
    state = torch.get_rng_state()
    losses = [engine_pretrain.evaluate(batch, model, CPU, args) for _ in range(2)]
    assert losses[0] == losses[1] and np.isfinite(losses[0])
    panels = [
        reconstruct(model, images(), fixed_noise(BATCH, 16, seed), 0.75, [0] * 3, [1] * 3)
        for seed in (0, 0, 1)
    ]
    hidden = [(panel["masked"] != panel["original"]).any(dim=1) for panel in panels]
    assert torch.equal(hidden[0], hidden[1]) and not torch.equal(hidden[0], hidden[2])
    assert torch.equal(state, torch.get_rng_state())


def test_b3_a_client_s_forward_without_noise_and_features_of_its_encoder():
    class Client(models_mae.MaskedAutoencoderViT):
        def forward(self, imgs, mask_ratio=0.75):
            return super().forward(imgs=imgs, mask_ratio=mask_ratio)

    model = make(Client)
    assert engine_pretrain.evaluate([[images()]], model, CPU, run_args()) > 0
    features = [encoder_features(make(kind).eval(), images()) for kind in (Client, OwnEncoder)]
    plain = encoder_features(make().eval(), images() + 1)
    assert torch.equal(features[0], encoder_features(make().eval(), images()))
    torch.testing.assert_close(features[1], 2 * plain, rtol=1e-10, atol=1e-12)


def test_b3_weights_drawn_by_a_subclass_of_the_classifier():
    class Client(models_vit.VisionTransformer):
        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.weight, 0.5)

    assert Client(num_classes=3, **TINY).blocks[1].mlp.fc1.weight.eq(0.5).all()
    assert OwnWeightsAndLoss(**SIZES).decoder_embed.weight.eq(0.01).all()


@pytest.mark.parametrize("batch", ["pair", "images", "tensor"])
def test_b2_pre_training_on_any_batch(batch):
    data = images()
    loader = {"pair": [(data, torch.zeros(BATCH))], "images": [[data]], "tensor": [data]}[batch]
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = Namespace(accum_iter=1, mask_ratio=0.75, lr=0.1, min_lr=0.0, warmup_epochs=0, epochs=2)
    torch.manual_seed(0)
    expected = model(data)[0].item()
    torch.manual_seed(0)
    stats = engine_pretrain.train_one_epoch(
        model, loader, optimizer, CPU, 0, NativeScalerWithGradNormCount(), args=args
    )
    assert stats["loss"] == pytest.approx(expected, rel=1e-12)


# Data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 12), ("val", 6)):
        make_folder(root / split, count, classes=3)
    return root


def test_b1_build_dataset_is_an_image_folder(folder):
    args = Namespace(data_path=folder, input_size=32)
    for is_train, split in ((True, "train"), (False, "val")):
        ours, reference = datasets.build_dataset(is_train, args), ImageFolder(folder / split)
        assert isinstance(ours, ImageFolder) and len(ours) == len(reference)
        for name in ("classes", "class_to_idx", "samples", "targets", "imgs"):
            assert [str(x) for x in getattr(ours, name)] == [str(x) for x in getattr(reference, name)], name
        assert ours.class_to_idx == {"c0": 0, "c1": 1, "c2": 2} and Path(ours.root) == folder / split
        assert ours.loader(ours.samples[0][0]).tobytes() == reference[0][0].tobytes()
        image, label = ours[5]
        assert (
            image.shape == (3, 32, 32)
            and image.dtype == torch.float32
            and label == ours.targets[5] == 2 - is_train
        )
    path = ours.samples[4][0]
    expected = datasets.build_transform(False, args)(reference.loader(path))
    assert torch.equal(ours[4][0], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_b1_a_loader_of_pairs_with_another_transform(folder, workers):
    dataset = datasets.build_dataset(
        True, Namespace(data_path=str(folder), input_size=32, aa="rand-m9-mstd0.5-inc1")
    )
    loader = DataLoader(dataset, 5, num_workers=workers)
    epochs = [list(loader) for _ in range(2)]
    assert [batch[-1].tolist() for batch in epochs[0]] == [[0, 0, 0, 0, 1], [1, 1, 1, 2, 2], [2, 2]]
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])  # augmented anew in each epoch
    dataset.transform = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
    dataset.target_transform = lambda label: label + 10
    loader = DataLoader(dataset, 12)
    for samples, targets in loader:
        assert samples.shape == (12, 3, 16, 16) and samples.min() >= 0 and targets.tolist()[-1] == 12


class Brightness(nn.Module):
    """Logits that say class 0, 1, 2 for images of value 0, 1, 2."""

    def forward(self, x):
        return -(x.mean(dim=(1, 2, 3))[:, None] - torch.arange(3.0)).square()


def test_b2_the_last_entry_of_a_client_s_batch_is_the_label():
    targets = torch.tensor([0, 1, 2, 2, 1, 0])
    samples = targets.float()[:, None, None, None].expand(-1, 3, 4, 4)
    wrong = torch.zeros(6, dtype=torch.int64)
    for middle in (wrong, torch.rand(6, 2)):
        loader = DataLoader(TensorDataset(samples, middle, targets), 4)
        assert engine_finetune.evaluate(loader, Brightness(), CPU)["acc1"] == 100.0
    ours = [Batch(samples, targets, wrong)]
    assert engine_finetune.evaluate(ours, Brightness(), CPU)["acc1"] == 100.0
    assert engine_finetune.evaluate([[samples, targets]], Brightness(), CPU)["acc1"] == 100.0


def test_b2_our_loaders_are_told_apart_with_workers_and_training_takes_the_same_labels(folder):
    from util.data.labelled import labelled_images

    args = Namespace(
        data_path=str(folder), input_size=32, accum_iter=1, lr=0.0, min_lr=0.0, warmup_epochs=0, epochs=1
    )
    ours = labelled_images("val", args)
    pairs = datasets.build_dataset(False, args)
    torch.manual_seed(0)
    model = models_vit.VisionTransformer(True, num_classes=3, **TINY)
    loaders = [
        build_loader(ours, EvalSampler(6), 4, 1),
        DataLoader(pairs, 4),
        build_loader(ours, EvalSampler(6), 4),
    ]
    assert type(next(iter(loaders[0]))) is Batch
    stats = [engine_finetune.evaluate(loader, model, CPU) for loader in loaders]
    assert stats[0] == stats[1] == stats[2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for loader in (loaders[1], loaders[2], [(pairs[0][0][None], "name", torch.tensor([0]))]):
        means = engine_finetune.train_one_epoch(
            model,
            nn.CrossEntropyLoss(),
            loader,
            optimizer,
            CPU,
            0,
            NativeScalerWithGradNormCount(),
            args=args,
        )
        if len(loader) > 1:
            batches = [(x, y) for x, y, *_ in loader]
            expected = np.mean([nn.functional.cross_entropy(model(x), y).item() for x, y in batches])
            assert means["loss"] == pytest.approx(expected, rel=1e-5)


# Names


def test_b6_names_of_misc(tmp_path, monkeypatch, capsys):
    assert misc.is_dist_avail_and_initialized() is False
    misc.save_on_master({"x": torch.arange(3)}, tmp_path / "x.pth")
    assert torch.load(tmp_path / "x.pth", weights_only=True)["x"].tolist() == [0, 1, 2]
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([-4.0])
    assert misc.get_grad_norm_(parameters).item() == 5.0
    assert misc.get_grad_norm_(iter(parameters), norm_type=1).item() == 7.0
    assert misc.get_grad_norm_(parameters, float("inf")).item() == 4.0
    assert (
        misc.get_grad_norm_(parameters[1]).item() == 4.0 and misc.get_grad_norm_(parameters[2]).item() == 0.0
    )

    monkeypatch.setattr(builtins, "print", print)  # put back afterwards
    for is_master in (False, True, False):
        misc.setup_for_distributed(is_master)
        print("plain", is_master)
        print("forced", is_master, force=True)
    print("to stderr", file=sys.stderr)
    out, err = capsys.readouterr()
    assert out.splitlines() == ["forced False", "plain True", "forced True", "forced False"]
    assert err == "to stderr\n"


def test_b6_position_tables():
    table = pos_embed.get_1d_sincos_pos_embed_from_grid(4, np.array([[0.0, 2.0]]))
    expected = [[0, 0, 1, 1], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)]]
    np.testing.assert_allclose(table, expected, rtol=1e-12)
    x, y = np.meshgrid(np.arange(3.0), np.arange(2.0))
    grid = pos_embed.get_2d_sincos_pos_embed_from_grid(8, np.stack([x, y])[:, None])
    np.testing.assert_array_equal(grid, pos_embed.get_2d_sincos_pos_embed(8, (2, 3)))
    halves = [pos_embed.get_1d_sincos_pos_embed_from_grid(4, part) for part in (x, y)]
    np.testing.assert_array_equal(grid, np.concatenate(halves, axis=1))
    with pytest.raises(ValueError, match="even width"):
        pos_embed.get_1d_sincos_pos_embed_from_grid(3, x)


def test_b6_interpolation_for_a_patch_embedding_without_grid_size():
    class Client(nn.Module):
        patch_embed = Namespace(num_patches=49)
        pos_embed = torch.zeros(1, 50, 8)

    with np.load(GOLDEN / "pos_embed.npz") as arrays:
        source, expected = arrays["interp/src4x4"], arrays["interp/dst7x7"]
    state = {"pos_embed": torch.from_numpy(source)}
    pos_embed.interpolate_pos_embed(Client(), state)
    np.testing.assert_allclose(state["pos_embed"].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_b6_meters(capsys):
    meter = SmoothedValue(window_size=2, fmt=None)
    for value in (1.0, torch.tensor(2.0), 3.0):
        meter.update(value)
    assert list(meter.deque) == [2.0, 3.0] and meter.global_avg == 2.0 and str(meter) == "2.0000 (2.0000)"
    logger = misc.MetricLogger(delimiter="  ")
    assert list(logger.log_every([7, 8], 1, header=None)) == [7, 8]
    assert "None" not in capsys.readouterr().out


# Scripts and models by name


def mae_vit_mine(**kwargs):
    """As the reference writes them: the sizes are fixed."""
    return TwoArguments(
        patch_size=8, embed_dim=24, depth=1, num_heads=3, decoder_embed_dim=16, decoder_depth=1,
        decoder_num_heads=4, mlp_ratio=4, norm_layer=NORM, **kwargs,
    )  # fmt: skip


class Louder(models_vit.VisionTransformer):
    def forward_features(self, x):
        return 100 * super().forward_features(x)


def vit_mine(**kwargs):
    return Louder(
        patch_size=8,
        embed_dim=24,
        depth=1,
        num_heads=3,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=NORM,
        **kwargs,
    )


def reference_args(script, **changes):
    """A Namespace of the reference's flags only."""
    flags = json.loads((GOLDEN / "cli.json").read_text())[f"{script.__name__}.py"]
    common = dict(device="cpu", num_workers=0, batch_size=6, epochs=1, warmup_epochs=0, log_dir=None)
    return Namespace(**{**{flag["dest"]: flag["default"] for flag in flags}, **common, **changes})


def test_b8_constructors_are_found_where_they_are_added(monkeypatch, tmp_path):
    assert "mae_vit_mine" not in models_mae.MODELS and "gather_tokens" not in models_mae.MODELS
    assert not {"mae_vit", "partial", "Block", "MaskedAutoencoderViT", "__name__"} & set(models_mae.MODELS)
    monkeypatch.setattr(models_mae, "mae_vit_mine", mae_vit_mine, raising=False)
    assert models_mae.MODELS["mae_vit_mine"] is mae_vit_mine
    args = ArgumentParser(parents=[main_pretrain.get_args_parser()]).parse_args(["--model", "mae_vit_mine"])
    assert args.model == "mae_vit_mine"
    for name in ("models_mae", "models_vit"):  # at the end of the file, below the table
        text = (REPO / f"{name}.py").read_text(encoding="utf-8")
        make_one = "mae_vit" if name == "models_mae" else "vit"
        added = f"\n\ndef added(**kwargs):\n    return {make_one}(dict(depth=1), **kwargs)\n"
        namespace = {"__name__": name}
        exec(compile(text + added, name, "exec"), namespace)
        assert "added" in namespace["MODELS"] and len(namespace["MODELS"]["added"]().blocks) == 1


def test_b8_main_of_a_half_namespace_and_own_constructors(monkeypatch, tmp_path, folder, capsys):
    """The three scripts with the reference's flags and a client's models, and what reads their files."""
    monkeypatch.setattr(models_mae, "mae_vit_mine", mae_vit_mine, raising=False)
    monkeypatch.setattr(models_vit, "vit_mine", vit_mine, raising=False)
    pre, ft, probe = (tmp_path / name for name in ("pre", "ft", "probe"))
    args = reference_args(main_pretrain, model="mae_vit_mine", data_path=folder, output_dir=pre)
    args.input_size, args.norm_pix_loss = 32, True
    main_pretrain.main(args)
    record = json.loads((pre / "log.txt").read_text())
    assert np.isfinite([record["train_loss"], record["val_loss"]]).all()
    assert (pre / "reconstruction-0.png").exists()
    start = dict(data_path=folder, finetune=pre / "checkpoint-0.pth")
    main_finetune.main(reference_args(main_finetune, model="vit_mine", input_size=32, output_dir=ft, **start))
    main_linprobe.main(reference_args(main_linprobe, model="vit_mine", output_dir=probe, **start))
    resumed = reference_args(main_finetune, model="vit_mine", input_size=32, data_path=folder, output_dir=ft,
                             resume=ft / "checkpoint-0.pth", epochs=2)  # fmt: skip
    main_finetune.main(resumed)
    records = [json.loads(line) for line in (ft / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1] and resumed.clip_grad is None
    half = Namespace(
        model="vit_mine", input_size=32, data_path=folder, finetune=ft / "checkpoint-1.pth", device="cpu"
    )
    assert 0 <= main_knn.main(half)["knn_acc1"] <= 100 and half.k == 20
    capsys.readouterr()

    # predict.py computes with the client's class, not with a plain one of the same tensors
    from util.weights.build import build
    from util.weights.describe import describe
    from util.weights.files import read_file

    file = str(ft / "checkpoint-1.pth")
    model = build(describe(read_file(file), file, Namespace(), "classifier"))
    assert type(model) is Louder
    full = build(describe(read_file(pre / "checkpoint-0.pth"), pre, Namespace(), "full"))
    assert type(full) is TwoArguments and full.norm_pix_loss
    picture = str(next((folder / "val" / "c0").iterdir()))
    words = [
        "--resume",
        file,
        "--csv",
        str(tmp_path / "out.csv"),
        "--device",
        "cpu",
        "--num_workers",
        "0",
        picture,
    ]
    predict.main(ArgumentParser(parents=[predict.get_args_parser()]).parse_args(words))
    shown = (tmp_path / "out.csv").read_text().splitlines()[1]
    image = datasets.build_dataset(False, Namespace(data_path=folder, input_size=32))[0][0]
    with torch.no_grad():
        confidence = model(image[None]).softmax(dim=1).max().item()
    assert str(confidence)[:4] in shown, (shown, confidence)


def test_b8_what_a_constructor_has_fixed_cannot_be_a_flag(monkeypatch, folder):
    monkeypatch.setattr(models_mae, "mae_vit_mine", mae_vit_mine, raising=False)
    monkeypatch.setattr(models_vit, "vit_mine", vit_mine, raising=False)
    args = reference_args(main_pretrain, model="mae_vit_mine", input_size=32, data_path=folder, output_dir="")
    args.patch_size = 4
    with pytest.raises(UserError, match=r"--model mae_vit_mine: .*patch_size"):
        main_pretrain.main(args)
    args = reference_args(main_finetune, model="vit_mine", input_size=32, data_path=folder, output_dir="")
    args.patch_size = 4
    with pytest.raises(UserError, match="--patch_size 4: vit_mine always has 8"):
        main_finetune.main(args)


def test_b8_load_model_without_output_dir(tmp_path):
    model = tiny()
    optimizer, scaler = torch.optim.AdamW(model.parameters()), NativeScalerWithGradNormCount()
    args = Namespace(output_dir=str(tmp_path), resume="", batch_size=1, accum_iter=1)
    misc.save_model(args, 3, model, model, optimizer, scaler)
    from util.run.checkpoint import finish_saving

    finish_saving()
    other = models_mae.mae_vit(SIZES).double()
    args = Namespace(resume=str(tmp_path / "checkpoint-3.pth"))
    misc.load_model(args=args, model_without_ddp=other, optimizer=None, loss_scaler=None)
    assert args.start_epoch == 4 and torch.equal(other.cls_token, model.cls_token)
    assert misc.load_model(Namespace(resume=""), other, None, None) is None


# Models


def test_b9_a_classifier_has_what_timm_s_offers():
    class Client(models_vit.VisionTransformer):
        """Written for timm's class."""

        def forward_features(self, x):
            x = self.patch_embed(x)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
            x = self.norm_pre(self.patch_drop(self.pos_drop(x + self.pos_embed)))
            return self.norm(self.blocks(x))[:, : self.num_prefix_tokens].mean(dim=1)

    torch.manual_seed(0)
    model, x = Client(num_classes=3, norm_layer=NORM, **TINY).eval(), torch.randn(2, 3, 32, 32)
    plain = models_vit.VisionTransformer(num_classes=3, norm_layer=NORM, **TINY).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), plain(x))
    assert plain.forward_head(plain.forward_features(x), pre_logits=True).shape == (2, 24)
    assert plain.get_classifier() is plain.head
    plain.reset_classifier(5)
    assert plain(x).shape == (2, 5) and plain.num_classes == 5
    plain.reset_classifier(0, global_pool="token")
    torch.testing.assert_close(plain(x), plain.forward_features(x))
    with pytest.raises(ValueError, match="global_pool='avg': the model was made with False"):
        plain.reset_classifier(5, global_pool="avg")
    plain.set_grad_checkpointing()
    assert plain.grad_checkpointing


def test_b9_arguments_and_places_of_timm_s_class():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    options = dict(TINY, num_classes=3, norm_layer=NORM)
    model = models_vit.VisionTransformer(act_layer=nn.ReLU, mlp_layer=Mlp, qk_norm=None, **options).eval()
    assert isinstance(model.blocks[0].mlp.act, nn.ReLU)
    plain = models_vit.VisionTransformer(act_layer=None, **options).eval()
    assert plain.state_dict().keys() == model.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(x), model(x))
    before = plain(x)
    plain.pos_drop = nn.Dropout(1.0).train()  # nothing is left of the tokens
    assert not torch.allclose(plain(x), before)
    assert models_vit.VisionTransformer(pos_drop_rate=0.5, **options).pos_drop.p == 0.5
    for words, mean in (("avg", True), ("token", False)):
        assert models_vit.VisionTransformer(global_pool=words, **options).global_pool is mean
    with pytest.raises(ValueError, match="global_pool='map'"):
        models_vit.VisionTransformer(global_pool="map", **options)
    with pytest.raises(TypeError, match="no_such_word"):
        models_vit.VisionTransformer(no_such_word=1, **options)


def test_b9_patches_of_images_of_another_size():
    model = models_mae.mae_vit(TINY_MAE)
    for shape in ((2, 3, 48, 48), (1, 1, 8, 8), (2, 3, 32, 32)):
        imgs = torch.randn(shape)
        patches = model.patchify(imgs)
        side = shape[2] // 8
        assert patches.shape == (shape[0], side * side, 64 * shape[1])
        first = imgs[:, :, :8, -8:].permute(0, 2, 3, 1).flatten(1)  # the last of the first row
        assert torch.equal(patches[:, side - 1], first) and torch.equal(model.unpatchify(patches), imgs)
    wide = model.patchify(torch.randn(1, 3, 16, 48))
    assert wide.shape == (1, 12, 192)
    with pytest.raises(ValueError, match="12 patches are neither"):
        model.unpatchify(wide)
    with pytest.raises(ValueError, match="30x32 are not divisible by the patch size 8"):
        model.patchify(torch.randn(1, 3, 30, 32))


def test_b4_attention_maps_of_a_client_s_attention():
    model = replaced_attention().eval()
    with pytest.raises(UserError, match="TokenMean does not show where it looks"):
        class_token_attention(model, images())
    subclassed = copy.deepcopy(subclassed_attention()).eval()
    assert class_token_attention(subclassed, images()).shape == (BATCH, 3, 4, 4)


if __name__ == "__main__":
    losses_in_several_processes(sys.argv[1])
