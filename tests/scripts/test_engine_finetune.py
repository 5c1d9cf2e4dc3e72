"""The fine-tuning loop: the reference's 12-step trajectory, partial accumulation windows, mixup, clipping."""

from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from golden_utils import TINY, fill, golden
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

import models_vit
from engine_finetune import evaluate, train_one_epoch
from util.compute.precision import NativeScalerWithGradNormCount
from util.errors import TrainingError
from util.evaluate.exact import closing_line
from util.lr_decay import param_groups_lrd


class Recorder:
    """Stands in for TensorBoard's writer."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, x):
        self.scalars.setdefault(name, []).append((x, value))


def tiny(**kwargs):
    return models_vit.VisionTransformer(
        True, **{**TINY, "num_classes": 7, "norm_layer": partial(nn.LayerNorm, eps=1e-6), **kwargs}
    )


def make_args(**changes):
    values = dict(accum_iter=3, lr=2e-3, min_lr=1e-5, warmup_epochs=1, epochs=2)
    return Namespace(**{**values, **changes})


def optimizer_of(model, lr=2e-3):
    return torch.optim.AdamW(param_groups_lrd(model, 0.05, model.no_weight_decay(), 0.65), lr=lr)


def test_golden_trajectory():
    expected = golden("finetune_trajectory")
    model = fill(tiny(), seed=11, std=0.1)
    optimizer = optimizer_of(model)
    loader = [
        (torch.from_numpy(images), torch.from_numpy(labels))
        for images, labels in zip(expected["images"], expected["labels"], strict=True)
    ]
    writer, stats = Recorder(), []
    for epoch in range(2):
        stats.append(
            train_one_epoch(
                model, LabelSmoothingCrossEntropy(0.1), loader, optimizer, "cpu", epoch,
                NativeScalerWithGradNormCount(enabled=False), 0.5, None, writer, make_args(),
            )
        )  # fmt: skip
    assert (
        [x for x, _ in writer.scalars["loss"]]
        == [x for x, _ in writer.scalars["lr"]]
        == [333, 833, 1333, 1833]
    )
    np.testing.assert_allclose([v for _, v in writer.scalars["loss"]], expected["scalars/loss"], rtol=1e-6)
    np.testing.assert_allclose([v for _, v in writer.scalars["lr"]], expected["scalars/lr"], rtol=1e-9)
    np.testing.assert_allclose([s["lr"] for s in stats], expected["epoch_stats"][:, 0], rtol=1e-9)
    np.testing.assert_allclose([s["loss"] for s in stats], expected["epoch_stats"][:, 1], rtol=1e-6)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(
            parameter.detach().norm(), expected[f"final_norm/{name}"], rtol=1e-9, err_msg=name
        )
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(model(loader[0][0]), expected["final/logits"], rtol=1e-8, atol=1e-10)


def random_loader(batches=3, size=4, classes=7):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 3, 32, 32, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


def run_epoch(model, loader, criterion=None, max_norm=0, mixup_fn=None, **changes):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = make_args(lr=0.1, warmup_epochs=0, epochs=1000000, **changes)
    scaler = NativeScalerWithGradNormCount(enabled=False)
    return train_one_epoch(
        model,
        criterion or nn.CrossEntropyLoss(),
        loader,
        optimizer,
        "cpu",
        0,
        scaler,
        max_norm,
        mixup_fn,
        None,
        args,
    )


def test_last_partial_window_is_used_and_scaled_by_its_own_size():
    loader = random_loader(batches=3)
    model, other = fill(tiny(), 3, 0.1).float(), fill(tiny(), 3, 0.1).float()
    run_epoch(model, loader, accum_iter=2)
    joined = [tuple(torch.cat(parts) for parts in zip(*loader[:2], strict=True)), loader[2]]
    run_epoch(other, joined, accum_iter=1)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        # Float32, one step of 0.1: gradients below 1 that are added up in another order, 6e-8 for each of
        # the terms
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_max_norm_clips_and_zero_does_not():
    loader = random_loader(batches=1)
    start = fill(tiny(), 3, 0.1).float().state_dict()

    def change(max_norm):
        model = tiny()
        model.load_state_dict(start)
        stats = run_epoch(model, loader, max_norm=max_norm, accum_iter=1)
        squares = [(p.detach() - start[n]).square().sum() for n, p in model.named_parameters()]
        return torch.stack(squares).sum().sqrt().item() / 0.1, stats["grad_norm"]

    clipped, norm = change(0.01)
    free, _ = change(0)
    assert clipped == pytest.approx(0.01, rel=1e-2)
    assert free == pytest.approx(norm, rel=1e-3) and norm > 0.1


def test_mixup_makes_soft_targets_and_depends_on_the_step_only():
    loader = random_loader(batches=4)
    mixup = Mixup(0.8, 1.0, prob=1.0, label_smoothing=0.1, num_classes=7)

    def run(disturb):
        model = fill(tiny(drop_path_rate=0.3), 3, 0.1).float()
        np.random.seed(disturb)
        torch.manual_seed(disturb)
        copies = [(images.clone(), labels) for images, labels in loader]
        return run_epoch(model, copies, SoftTargetCrossEntropy(), mixup_fn=mixup, accum_iter=1, seed=5)[
            "loss"
        ]

    assert run(1) == run(2)


def test_non_finite_loss_stops():
    loader = [(torch.full((2, 3, 32, 32), float("nan")), torch.tensor([0, 1]))]
    with pytest.raises(TrainingError, match="epoch 0"):
        run_epoch(tiny(), loader, accum_iter=1)


def test_evaluate_prints_the_references_line(capsys):
    loader = random_loader(batches=2)
    stats = evaluate(loader, fill(tiny(), 3, 0.1).float(), "cpu")
    assert set(stats) == {"acc1", "acc5", "loss"}
    line = f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}"
    assert capsys.readouterr().out.strip().endswith(line)
    assert (
        closing_line(dict(acc1=83.6644, acc5=96.53, loss=0.7309)) == "* Acc@1 83.664 Acc@5 96.530 loss 0.731"
    )


def test_batch_of_three_items_is_accepted():
    loader = [(*batch, torch.arange(4)) for batch in random_loader(batches=2)]
    assert np.isfinite(run_epoch(tiny(), loader, accum_iter=1)["loss"])
