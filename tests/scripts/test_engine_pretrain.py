"""The training loop against the golden trajectory, and what it does that the reference does not."""

import argparse
import json

import numpy as np
import pytest
import torch
from golden_utils import GOLDEN, TINY_MAE, facts, fill, golden
from timm.optim import param_groups_weight_decay

import models_mae
from engine_pretrain import train_one_epoch
from util.compute.precision import NativeScalerWithGradNormCount
from util.errors import TrainingError
from util.lr_sched import adjust_learning_rate
from util.run.resume import load_model
from util.weights.files import read_file


class FixedNoise(torch.nn.Module):
    """Gives the inner model the recorded masking noise, one entry a call."""

    def __init__(self, model, noise):
        super().__init__()
        self.inner, self.noise = model, iter(torch.from_numpy(noise))

    def forward(self, imgs, mask_ratio):
        return self.inner(imgs, mask_ratio, noise=next(self.noise))


class Recorder:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, x):
        self.scalars.setdefault(name, []).append((x, value))


def make_args(**changes):
    """What forks pass: no more than the documented attributes."""
    values = dict(accum_iter=2, mask_ratio=0.75, lr=1e-3, min_lr=1e-5, warmup_epochs=1, epochs=2)
    return argparse.Namespace(**{**values, **changes})


def make_run():
    data = golden("pretrain_trajectory")
    model = fill(models_mae.mae_vit(TINY_MAE, norm_pix_loss=True), seed=10, std=0.1, skip="pos_embed")
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=1e-3, betas=(0.9, 0.95))
    loader = [(torch.from_numpy(batch), torch.zeros(2)) for batch in data["data"]]
    return data, model, optimizer, loader


def check_end(data, model):
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value.norm().item(), data[f"final_norm/{name}"], rtol=1e-9, err_msg=name)
    for name in ("cls_token", "decoder_pred.bias"):
        np.testing.assert_allclose(
            model.state_dict()[name].numpy(), data[f"final/{name}"], rtol=1e-9, atol=1e-13
        )


def test_golden_trajectory():
    data, model, optimizer, loader = make_run()
    wrapped, recorder, scaler = FixedNoise(model, data["noise"]), Recorder(), NativeScalerWithGradNormCount()
    for epoch in range(2):
        stats = train_one_epoch(wrapped, loader, optimizer, "cpu", epoch, scaler, recorder, make_args())
        np.testing.assert_allclose([stats["lr"], stats["loss"]], data["epoch_stats"][epoch], rtol=1e-6)
    x, losses = zip(*recorder.scalars["train_loss"], strict=True)
    assert list(x) == data["scalars/x"].tolist()
    np.testing.assert_allclose(losses, data["scalars/train_loss"], rtol=1e-6)
    np.testing.assert_allclose([v for _, v in recorder.scalars["lr"]], data["scalars/lr"], rtol=1e-9)
    check_end(data, model)


def test_the_references_checkpoint_resumes_and_follows_the_rest_of_the_trajectory(capsys):
    data, model, optimizer, loader = make_run()
    torch.nn.init.zeros_(model.cls_token)
    args = make_args(resume=str(GOLDEN / "checkpoint-0.pth"), output_dir="")
    scaler = NativeScalerWithGradNormCount()
    load_model(args, model, optimizer, scaler)
    assert args.start_epoch == 1 and args.start_step == 0
    wrapped = FixedNoise(model, data["noise"][6:])
    stats = train_one_epoch(wrapped, loader, optimizer, "cpu", 1, scaler, None, args)
    np.testing.assert_allclose([stats["lr"], stats["loss"]], data["epoch_stats"][1], rtol=1e-6)
    check_end(data, model)
    assert read_file(GOLDEN / "checkpoint-0.pth")["args"]["mask_ratio"] == 0.75  # a Namespace made a dict


def test_learning_rates():
    expected = facts()["lr_sched"]
    args = argparse.Namespace(**expected["args"])
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": parameters[:1]}, {"params": parameters[1:], "lr_scale": 0.5}], lr=1.0
    )
    for epoch, lrs in zip(expected["epochs"], expected["lr"], strict=True):
        lr = adjust_learning_rate(optimizer, epoch, args)
        got = [group["lr"] for group in optimizer.param_groups]
        np.testing.assert_allclose([lr, got[1], got[0]], [lrs[0], lrs[1], lrs[2]], rtol=1e-12)


def test_weight_decay_groups():
    model = models_mae.mae_vit(TINY_MAE)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        {"weight_decay": g["weight_decay"], "params": [names[id(p)] for p in g["params"]]}
        for g in param_groups_weight_decay(model, 0.05)
    ]
    assert groups == facts()["pretrain_weight_decay_groups"]


def test_last_partial_window_is_used_with_its_own_mean():
    """5 micro-steps, windows of 3: the second update is one of the mean loss of the last two batches."""

    def run(batches, accum_iter):
        data, model, _, _ = make_run()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        noise = np.concatenate([data["noise"][i].reshape(-1, 16) for i in range(5)])
        groups = np.split(noise, np.cumsum([len(b[0]) for b in batches])[:-1])
        wrapped = FixedNoise(model, np.empty((0,)))
        wrapped.noise = iter(torch.from_numpy(group) for group in groups)
        args = make_args(accum_iter=accum_iter, warmup_epochs=0, epochs=10**9, lr=0.1)
        train_one_epoch(wrapped, batches, optimizer, "cpu", 0, NativeScalerWithGradNormCount(), None, args)
        return model.cls_token.detach()

    images = [torch.from_numpy(batch) for batch in golden("pretrain_trajectory")["data"][:5]]
    small = run([(x, None) for x in images], accum_iter=3)
    large = run([(torch.cat(images[:3]), None), (torch.cat(images[3:]), None)], accum_iter=1)
    # The learning rate differs by the fractional epoch at which it is set, 1e-9 of its value here
    torch.testing.assert_close(small, large, rtol=1e-9, atol=1e-12)


def test_uint8_batches_are_normalised_with_the_given_statistics():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, imgs, mask_ratio):
            seen.append(imgs)
            return imgs.mean() * self.p, None, None

    model = Spy()
    model.p = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    for batch in (images, images.float()):
        args = make_args(accum_iter=1, mean=(0.5,), std=(0.25,))
        train_one_epoch(
            model, [(batch, None)], optimizer, "cpu", 0, NativeScalerWithGradNormCount(), None, args
        )
    # Torch's bounds for float32: three operations on values up to 2
    torch.testing.assert_close(seen[0], (images / 255 - 0.5) / 0.25)
    assert torch.equal(seen[1], images.float())


def test_non_finite_loss_stops_with_a_clear_error():
    _, model, optimizer, loader = make_run()
    loader[3] = (loader[3][0] * float("nan"), None)
    with pytest.raises(TrainingError, match="epoch 0, step 3: the loss is nan"):
        train_one_epoch(
            model, loader, optimizer, "cpu", 0, NativeScalerWithGradNormCount(), None, make_args()
        )


def test_same_seed_same_masks_whatever_was_drawn_before():
    results = []
    for draws in (0, 5):
        _, model, optimizer, loader = make_run()
        torch.rand(draws)
        args = make_args(seed=3)
        stats = train_one_epoch(
            model, loader, optimizer, "cpu", 0, NativeScalerWithGradNormCount(), None, args
        )
        results.append(json.dumps([stats, model.cls_token.tolist()]))
    assert results[0] == results[1]
