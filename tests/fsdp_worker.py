"""What the processes of `test_fsdp.py` run: the same training sharded and not, and from each other's files.

torchrun ... tests/fsdp_worker.py train FOLDER DEVICE
torchrun ... tests/fsdp_worker.py reload FILE FOLDER
"""

import functools
import json
import sys
from argparse import Namespace
from pathlib import Path

import torch
from timm.optim import muon as timms
from timm.optim import param_groups_weight_decay

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from golden_utils import TINY_MAE, fill

import models_mae
from engine_pretrain import train_one_epoch
from models_cross import CrossDecoderViT
from util.compute.optimizer import build_optimizer
from util.compute.precision import NativeScalerWithGradNormCount
from util.processes import collectives, group, parallel
from util.run import checkpoint
from util.run.ema import Ema
from util.run.guard import RunGuard
from util.run.resume import load_model

SETTINGS = dict(batch_size=4, accum_iter=2, clip_grad=0.5, mask_ratio=0.75, lr=1e-2, min_lr=0.0, seed=0)
CROSS = dict(make=CrossDecoderViT, predict_ratio=0.5)
SETTINGS |= dict(warmup_epochs=0, epochs=3, start_epoch=0, skip_nonfinite=1, amp_dtype="none")


def make_batches(device: torch.device, dtype: torch.dtype) -> list:
    """5 batches, so that the last window is shorter; the third has NaN, in the last process's share alone."""
    rank, world_size = collectives.get_rank(), collectives.get_world_size()
    images = torch.randn(5, 4 * world_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[2, world_size - 1] = float("nan")
    return [(batch[rank::world_size].to(device, dtype), torch.zeros(4)) for batch in images]


class Run:
    """A tiny model's training, with the real loop, loss scaling and files, to `epochs` epochs in all."""

    def __init__(self, folder, sharded, device="cpu", dtype=torch.float64, scaled=False, resume="", **sizes):
        self.args = Namespace(**SETTINGS, output_dir=str(folder), resume=str(resume))
        self.device, self.stats = torch.device(device), []
        model = models_mae.mae_vit(TINY_MAE, norm_pix_loss=True, **sizes)
        self.bare = fill(model, seed=1, std=0.1, skip="pos_embed")
        self.bare.to(device, dtype)
        several = collectives.get_world_size() > 1 or sharded
        self.model = parallel.wrap_model(self.bare, self.device, sharded) if several else self.bare
        groups = param_groups_weight_decay(self.bare, 0.05)
        fused = scaled or self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=fused)
        self.scaler = NativeScalerWithGradNormCount(enabled=scaled, device=self.device.type)
        load_model(self.args, self.bare, self.optimizer, self.scaler)
        folder.mkdir(exist_ok=True)

    def train(self, epochs: int):
        batches = make_batches(self.device, next(self.bare.parameters()).dtype)
        for epoch in range(self.args.start_epoch, epochs):
            guard = RunGuard(self.args, steps=len(batches))
            stats = train_one_epoch(
                self.model, batches, self.optimizer, self.device, epoch, self.scaler, None, self.args, guard
            )
            assert guard.bad_steps == 1
            self.stats.append(stats)
            self.save(epoch)
        return self

    def save(self, epoch: int) -> None:
        checkpoint.save_model(self.args, epoch, self.model, self.bare, self.optimizer, self.scaler)
        checkpoint.finish_saving()
        collectives.barrier()


def check_full_copy(sharded: torch.nn.Module, plain: torch.nn.Module) -> None:
    """Every process may use its copy as it likes; it is the plain model."""
    whole = parallel.full_copy(sharded.eval())
    assert type(whole) is models_mae.MaskedAutoencoderViT and not whole.training
    assert whole.state_dict().keys() == plain.state_dict().keys() == sharded.state_dict().keys()
    assert [p.requires_grad for p in whole.parameters()] == [p.requires_grad for p in plain.parameters()]
    table = whole.pos_embed
    images = torch.randn(4, 3, 32, 32, device=table.device, dtype=table.dtype)
    noise = torch.rand(4, 16, device=table.device)
    for _ in range(1 + collectives.get_rank()):  # more often on one process than on another
        first, second = (model.eval()(images, noise=noise)[0] for model in (whole, plain))
        torch.testing.assert_close(first, second)
    assert parallel.full_copy(plain) is plain


def check_overflow(run: Run) -> None:
    """An overflow in one process's share alone: no process makes the step, all lower the scale."""
    before = [p.to_local().clone() for p in run.bare.parameters()]
    for p in run.bare.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    if collectives.get_rank() == collectives.get_world_size() - 1:
        run.bare.decoder_pred.weight.grad.to_local()[-1, -1] = float("inf")
    scaler = run.scaler._scaler
    scale = scaler.get_scale()
    scaler.unscale_(run.optimizer)
    scaler.step(run.optimizer)
    scaler.update()
    assert scaler.get_scale() == scale / 2
    after = [p.to_local() for p in run.bare.parameters()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def train(root: str, device: str) -> None:
    root, args = Path(root), Namespace(device=device)
    group.init_distributed_mode(args)
    place = torch.device(device, args.gpu) if device == "cuda" else torch.device(device)
    dtype = torch.float32 if device == "cuda" else torch.float64
    runs = {}
    for name, sharded, epochs, more in [
        ("ddp", False, 2, {}),
        ("fsdp", True, 2, {}),
        ("ddp_scaled", False, 1, {"scaled": True}),
        ("fsdp_scaled", True, 1, {"scaled": True}),
        ("ddp_cross", False, 2, CROSS),
        ("fsdp_cross", True, 2, CROSS),
        ("ddp_then_fsdp", True, 2, {"resume": root / "ddp/checkpoint-0.pth"}),
        ("fsdp_then_ddp", False, 2, {"resume": root / "fsdp/checkpoint-0.pth"}),
        ("fsdp_then_fsdp", True, 2, {"resume": root / "fsdp/checkpoint-0.pth"}),
    ]:
        runs[name] = Run(root / name, sharded, place, dtype, **more).train(epochs)
    check_full_copy(runs["fsdp"].bare, runs["ddp"].bare)
    check_overflow(runs["fsdp_scaled"])
    if device == "cpu":
        check_muon(root)
    if args.rank == 0:
        (root / "stats.json").write_text(json.dumps({name: run.stats for name, run in runs.items()}))
    group.shut_down()


def reload(file: str, folder: str) -> None:
    """Loads a checkpoint of any number of processes into the shares of this one's, and saves it again."""
    group.init_distributed_mode(Namespace(device="cpu"))
    Run(Path(folder), sharded=True, resume=file).save(0)
    group.shut_down()


def muon_steps(folder: Path, sharded: bool) -> None:
    """Three steps of Muon, each of 8 images with fixed masks that the processes share, and the average of the
    weights; then a checkpoint. Newton-Schulz in float64.
    """
    exact = functools.partial(timms.zeropower_via_newtonschulz, dtype=torch.float64)
    rank, world_size = collectives.get_rank(), collectives.get_world_size()
    device = torch.device("cpu")
    bare = fill(models_mae.mae_vit(TINY_MAE, norm_pix_loss=True), seed=1, std=0.1, skip="pos_embed")
    model = parallel.wrap_model(bare, device, sharded) if world_size > 1 else bare
    args = Namespace(opt="muon", opt_args=[], lr=1e-2, output_dir=str(folder), batch_size=8, accum_iter=1)
    optimizer = build_optimizer(param_groups_weight_decay(bare, 0.05), args, device)
    scaler, ema = NativeScalerWithGradNormCount(enabled=False, device="cpu"), Ema(bare, optimizer, 0.6)
    draws = torch.Generator().manual_seed(0)
    original, timms.zeropower_via_newtonschulz = timms.zeropower_via_newtonschulz, exact
    for _ in range(3):
        images = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=draws)
        noise = torch.rand(8, 16, generator=draws)
        loss = model(images[rank::world_size], 0.75, noise[rank::world_size])[0]
        scaler(loss, optimizer, 0.5, bare.parameters())
        optimizer.zero_grad()
    timms.zeropower_via_newtonschulz = original
    folder.mkdir(exist_ok=True)
    with ema.in_place():  # and back
        whole = parallel.full_copy(bare)
        average = ema.state_dict()["mask_token"]  # of the weights meanwhile
        assert not torch.equal(whole.mask_token, parallel.whole_tensor(average))
    checkpoint.save_model(args, 0, model, bare, optimizer, scaler, model_ema=ema.state_dict())
    collectives.barrier()


def check_muon(root: Path) -> None:
    for name, sharded in (("muon_ddp", False), ("muon_fsdp", True)):
        muon_steps(root / name, sharded)
    # What one kind of run saved, the other goes on from
    bare = models_mae.mae_vit(TINY_MAE, norm_pix_loss=True).double()
    parallel.wrap_model(bare, torch.device("cpu"), True)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.0)
    content = torch.load(root / "muon_ddp/checkpoint-0.pth")
    ema, saved = Ema(bare, optimizer, 0.6, "x", content), content["model_ema"]
    for name, value in ema.average.items():
        assert torch.equal(parallel.whole_tensor(value), saved[name])


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"train": train, "reload": reload}[sys.argv[1]](*sys.argv[2:])
