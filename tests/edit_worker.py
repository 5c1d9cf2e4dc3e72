"""Edits of models_mae.py's text, the first loss that training with the edited file logs, and the same loss by
hand from the file as it is.

torchrun ... tests/edit_worker.py OUTPUT      all edits, in several processes; rank 0 writes {edit: losses}
"""

import contextlib
import copy
import importlib.util
import io
import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import torch
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from golden_utils import REPO, TINY_MAE, fill

import models_mae
from engine_pretrain import train_one_epoch
from util.compute import compile as compiling
from util.compute.precision import NativeScalerWithGradNormCount
from util.processes import group, parallel
from util.rng import seed_step

SEED, BATCH, CPU = 3, 4, torch.device("cpu")
SIZES = {**TINY_MAE, "depth": 1, "decoder_depth": 1}


def absolute_error(model, imgs, noise):
    _, pred, mask = model(imgs, noise=noise)
    return (pred - model.patchify(imgs)).abs()[mask.bool()].mean()


def largest_noise_visible(model, imgs, noise):
    return model(imgs, noise=-noise)[0]


def token_zeroed(model, imgs, noise):
    """The token at place 5 is zero where it would enter the encoder."""
    model.pos_embed[:, 6] = 0
    embed = model.patch_embed.forward
    model.patch_embed.forward = lambda x: embed(x) * (torch.arange(16) != 5).unsqueeze(1)
    return model(imgs, noise=noise)[0]


def channels_first(model, imgs, noise):
    _, pred, mask = model(imgs, noise=noise)
    target = F.unfold(imgs, 8, stride=8).transpose(1, 2)  # (N, L, C * p * p)
    return F.mse_loss(pred[mask.bool()], target[mask.bool()])


def mask_token_doubled(model, imgs, noise):
    model.mask_token *= 2
    return model(imgs, noise=noise)[0]


# method: (its text, the text in its place, the loss by hand)
EDITS = {
    "forward_loss": ("- target).square().mean(dim=-1)", "- target).abs().mean(dim=-1)", absolute_error),
    "random_masking": (
        "torch.argsort(noise, dim=1, stable=True)",
        "torch.argsort(noise, dim=1, descending=True)",
        largest_noise_visible,
    ),
    "forward_encoder": (
        "x = x + self.pos_embed[:, 1:]",
        "x = (x + self.pos_embed[:, 1:]) * (torch.arange(16) != 5).unsqueeze(1)",
        token_zeroed,
    ),
    "patchify": ("x.permute(0, 2, 4, 3, 5, 1)", "x.permute(0, 2, 4, 1, 3, 5)", channels_first),
    "forward_decoder": ("self.mask_token.expand(", "(2 * self.mask_token).expand(", mask_token_doubled),
}


def edited(edit: str, folder: Path) -> ModuleType:
    """A copy of models_mae.py in `folder` with its text edited, imported."""
    text, (old, new, _) = (REPO / "models_mae.py").read_text(encoding="utf-8"), EDITS[edit]
    assert text.count(old) == 1
    path = folder / f"models_mae_{edit}.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(module: ModuleType = models_mae) -> torch.nn.Module:
    return fill(module.mae_vit(SIZES), seed=1, std=0.1, skip="pos_embed")


def images(rank: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)


@torch.no_grad()
def by_hand(edit: str, rank: int = 0) -> float:
    """The first loss of a process of a run in which models_mae.py is edited."""
    seed_step(SEED, rank, 0, 0)
    noise = torch.rand(BATCH, 16)
    return EDITS[edit][2](tiny(), images(rank), noise).item()


class Losses(list):
    """A TensorBoard writer that keeps the training losses."""

    def add_scalar(self, name, value, x):
        if name == "train_loss":
            self.append(float(value))


def first_loss(model: torch.nn.Module, compiled: bool, args: Namespace) -> float:
    """What an epoch of one step through the engine logs; `model` is changed by it."""
    if compiled:
        compiling.compile_model(model, "forward", args, CPU)
    if args.distributed:
        model = parallel.wrap_model(model, CPU)
    losses, optimizer = Losses(), torch.optim.SGD(model.parameters(), lr=0.1)
    with contextlib.redirect_stdout(io.StringIO()):
        batches = [[images(args.rank), torch.zeros(BATCH)]]
        scaler = NativeScalerWithGradNormCount()
        train_one_epoch(model, batches, optimizer, CPU, 0, scaler, losses, args)
    return losses[0]


def run_args(**changes) -> Namespace:
    values = dict(
        accum_iter=1, mask_ratio=0.75, lr=0.1, min_lr=0.0, warmup_epochs=0, epochs=2, seed=SEED, device="cpu",
        compile=True, compile_mode="default", distributed=False, rank=0,
    )  # fmt: skip
    return Namespace(**{**values, **changes})


def main(output: str) -> None:
    torch.set_num_threads(1)
    compiling.BACKEND = "eager"
    args = run_args()
    group.init_distributed_mode(args)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for edit in EDITS:
            model = tiny(edited(edit, Path(folder)))
            result[edit] = [first_loss(copy.deepcopy(model), compiled, args) for compiled in (False, True)]
    if args.rank == 0:
        Path(output).write_text(json.dumps(result), encoding="utf-8")
    group.shut_down()


if __name__ == "__main__":
    main(sys.argv[1])
