"""No step waits for the GPU: the engines run with torch's alarm for synchronisations switched on."""

import argparse

import pytest
import torch
from golden_utils import TINY, TINY_MAE
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy

import engine_finetune
import engine_pretrain
import models_mae
import models_vit
from main_linprobe import put_on_probe
from util.compile import compile_model
from util.guard import RunGuard
from util.lars import LARS
from util.precision import NativeScalerWithGradNormCount

STEPS, BATCH = 12, 4


class AlarmedLoader:
    """Pinned batches; from step 4 to the last but two (a log line reads the meters) a sync is an error."""

    batch_size = BATCH

    def __len__(self):
        return STEPS

    def __iter__(self):
        try:
            for i in range(STEPS):
                images = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8)
                batch = [images, torch.arange(BATCH) % 7, torch.arange(BATCH)]
                pinned = [t.pin_memory() for t in batch]
                if i == 4:
                    torch.cuda.set_sync_debug_mode("error")
                if i == STEPS - 1:
                    torch.cuda.set_sync_debug_mode("default")
                yield pinned
        finally:
            torch.cuda.set_sync_debug_mode("default")


def classifier(probe):
    model = models_vit.VisionTransformer(num_classes=7, drop_path_rate=0.0 if probe else 0.2, **TINY)
    if probe:
        put_on_probe(model)
    return model.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("amp_dtype", ["bf16", "fp16", "none"])
@pytest.mark.parametrize(
    "recipe, compiled",
    [(recipe, compiled) for compiled in (False, True) for recipe in ("pretrain", "finetune", "linprobe")],
)
def test_no_step_waits_for_the_device(recipe, compiled, amp_dtype):
    device, changed = torch.device("cuda", 0), []
    args = argparse.Namespace(
        accum_iter=2, mask_ratio=0.75, lr=1e-3, min_lr=0.0, warmup_epochs=0, epochs=2, seed=0, clip_grad=1.0,
        amp_dtype=amp_dtype, print_freq=1000, save_minutes=60, max_steps=0, skip_nonfinite=1,
        compile=compiled, compile_mode="default", distributed=False,
    )  # fmt: skip
    scaler = NativeScalerWithGradNormCount(enabled=amp_dtype == "fp16")
    guard = RunGuard(args, lambda *_: changed.append("saved"), None, STEPS)
    if recipe == "pretrain":
        model = models_mae.mae_vit(TINY_MAE, norm_pix_loss=True).cuda()
        compile_model(model, "loss_of_removed", args, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        stats = engine_pretrain.train_one_epoch(
            model, AlarmedLoader(), optimizer, device, 0, scaler, None, args, guard
        )
    else:
        model, mixup, criterion = classifier(recipe == "linprobe"), None, torch.nn.CrossEntropyLoss()
        if recipe == "finetune":
            compile_model(model, "forward", args, device)
            mixup, criterion = Mixup(0.8, 1.0, num_classes=7), SoftTargetCrossEntropy()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        else:
            compile_model(model, "forward_features", args, device)
            optimizer = LARS(model.head.parameters(), lr=0.1)
        stats = engine_finetune.train_one_epoch(
            model, criterion, AlarmedLoader(), optimizer, device, 0, scaler, 1.0, mixup, None, args, guard
        )
    assert stats["loss"] > 0 and stats["grad_norm"] > 0 and not changed


@pytest.mark.gpu
def test_the_alarm_rings():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
