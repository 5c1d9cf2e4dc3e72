"""One epoch of supervised training (fine-tuning, probing), and exact evaluation."""

from argparse import Namespace
from collections.abc import Callable, Iterable

import torch

from util import lr_sched
from util.compute.precision import autocast
from util.compute.prefetch import DevicePrefetcher
from util.data.loader import open_batch
from util.evaluate.exact import closing_line, predict_samples, summarize
from util.processes.collectives import log
from util.processes.parallel import without_gradient_traffic
from util.run.guard import RunGuard
from util.run.meters import epoch_metrics
from util.run.run_log import StepCurves
from util.run.steps import EpochSteps


def train_one_epoch(
    model: torch.nn.Module,
    criterion: torch.nn.Module,
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    loss_scaler,
    max_norm: float | None = 0,
    mixup_fn: Callable | None = None,
    log_writer=None,
    args: Namespace | None = None,
    guard: RunGuard | None = None,
) -> dict[str, float]:
    """Trains for one epoch; no step waits for the device.

    Args:
        criterion: loss of logits (N, K) and targets, int64 (N,) or, after `mixup_fn`, float (N, K).
        data_loader: batches that begin with images (N, C, H, W) and end with labels int64 (N,), or our
            loaders'. uint8 images are normalised here with `args.mean` and `args.std`; float ones (or cached
            features (N, D)) are taken as they are. Has a length. Begins at its sampler's `start_batch`.
        loss_scaler: `util.compute.precision.NativeScalerWithGradNormCount`.
        max_norm: largest gradient norm; 0 or None: no clipping.
        mixup_fn: (images, labels) -> (images, soft targets) on the device, as timm's Mixup; or None.
        log_writer: TensorBoard writer, or None.
        args: accum_iter, lr, min_lr, warmup_epochs, epochs; if present what `EpochSteps` reads.
        guard: saves by the clock, ends the loop on signals, and handles losses that are not finite.

    Returns:
        Averages over the epoch and all processes: lr (of the head, the largest), loss, grad_norm.

    Raises:
        TrainingError: the loss is not finite.
    """
    model.train()
    guard = guard or RunGuard(args)
    steps = EpochSteps(data_loader, args, device, model)
    metrics, curves = epoch_metrics(data_loader, guard.take_meters()), StepCurves(log_writer)
    optimizer.zero_grad()
    batches = DevicePrefetcher(data_loader, steps.device, lambda batch: steps.move(open_batch(batch)[:2]))
    batches = metrics.log_every(batches, steps.print_freq, f"Epoch: [{epoch}]", steps.start)
    for step, (batch, (images, targets)) in enumerate(batches, steps.start):
        if step % steps.accum_iter == 0:
            lr_sched.adjust_learning_rate(optimizer, epoch + step / steps.count, args)
        steps.begin(epoch, step)
        update = steps.updates(step)

        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)
        with without_gradient_traffic(model, not update):
            with autocast(steps.device, steps.amp_dtype):
                loss = criterion(model(images), targets)
            part = loss / steps.window_size(step)
            grad_norm = loss_scaler(part, optimizer, max_norm or None, model.parameters(), update_grad=update)

        loss = loss.detach()
        lr = max(group["lr"] for group in optimizer.param_groups)
        metrics.update(lr=lr, loss=loss, grad_norm=grad_norm)
        guard.watch(batch, loss, epoch, step)
        if update:
            steps.finish(optimizer, grad_norm)
            curves.add(epoch + step / steps.count, loss=loss, lr=lr)
            if guard.after_update(epoch, step + 1, grad_norm, metrics):
                break
        if step % steps.print_freq == 0:
            curves.write()

    guard.read_all()
    curves.write()
    return metrics.averages()


def evaluate(
    data_loader: Iterable, model: torch.nn.Module, device: torch.device, args=None
) -> dict[str, float]:
    """Accuracy and loss over all samples of all processes, each counted once; prints the closing line.

    The result does not depend on the loader's batch size or on the number of processes, to the last digit,
    when the loader's sampler is a `util.data.sampler.EvalSampler` (how: see there).

    Args:
        data_loader: batches that begin with images and end with labels int64 (N,), or our loaders'.
        args: if given: amp_dtype, mean, std.

    Returns:
        acc1, acc5 (percent; acc5 counts the best min(5, K) classes), loss (cross entropy, mean over samples).
    """
    stats = summarize(predict_samples(data_loader, model, device, args))
    log(closing_line(stats))
    return stats
