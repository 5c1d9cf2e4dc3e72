"""What ends an epoch of fine-tuning and of probing: evaluation, checkpoint, log.

The loops themselves stand in the scripts.
"""

import argparse
from dataclasses import dataclass

import torch
import torch.distributed as dist

from util.data.labelled import LabelledImages
from util.processes.collectives import get_world_size, log
from util.processes.fsdp import full_copy
from util.recipes.classifier import evaluate_and_report, record_epoch
from util.run.checkpoint import save_model
from util.run.run_log import trim_log


def share_buffers(module: torch.nn.Module) -> None:
    """Gives every process the first one's buffers.

    Each has updated BatchNorm's running statistics with its own last batch, and the first one's are saved.
    """
    if get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def trim_transfer_log(args: argparse.Namespace, resumed: dict) -> bool:
    """Drops what a resumed run will log again; returns whether the last epoch must still be evaluated: it was
    saved before that, or is not in the log.
    """
    if "epoch" not in resumed:
        return False
    unfinished = "stats" in resumed and not resumed.get("evaluated")
    logged = trim_log(args.output_dir, args.start_epoch - unfinished)
    return "stats" in resumed and (unfinished or not logged)


@dataclass
class EpochEnd:
    """Evaluates, saves and logs, and knows the best accuracy so far.

    model: bare, what is saved. trained: bare, what is trained and evaluated: the model, or its head where
    `val_loader` gives features. info: the checkpoint's `model_info`. best: top-1 accuracy in percent.
    """

    args: argparse.Namespace
    model: torch.nn.Module
    trained: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss_scaler: object
    val_loader: object
    val_set: LabelledImages
    device: torch.device
    log_writer: object
    info: dict
    best: float = -1.0

    def save(self, epoch: int, step: int = 0, meters: list | None = None, **extra) -> None:
        """Writes a checkpoint after `epoch` or, with `step`, inside it; see `save_model`."""
        save_model(
            self.args, epoch, self.trained, self.model, self.optimizer, self.loss_scaler, step,
            meters=meters, model_info=self.info, best_acc1=self.best, **extra,
        )  # fmt: skip

    def finish(self, epoch: int, stats: dict[str, float]) -> None:
        """All processes call this when `epoch` is trained; `stats`: its averages, for the log."""
        share_buffers(self.trained)
        self.save(epoch, stats=stats)  # an evaluation may take longer than a scheduler waits
        report = epoch + 1 == self.args.epochs
        test = evaluate_and_report(
            self.val_loader, full_copy(self.trained), self.device, self.args, self.val_set, report
        )
        is_best, self.best = test["acc1"] > self.best, max(self.best, test["acc1"])
        self.save(epoch, best=is_best, stats=stats, evaluated=True)
        log(f"best accuracy so far: {self.best:.3f} %")
        n_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        record_epoch(self.args, epoch, stats, test, n_parameters, self.log_writer)
