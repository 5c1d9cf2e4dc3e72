"""One epoch of masked-autoencoder pre-training, and the validation loss."""

import math
from argparse import Namespace
from collections.abc import Iterable

import torch

from util import lr_sched
from util.compute.precision import autocast
from util.compute.prefetch import DevicePrefetcher
from util.data.loader import open_batch
from util.processes.collectives import gather
from util.processes.parallel import without_gradient_traffic
from util.rng import fixed_masks, masked_by
from util.run.guard import RunGuard
from util.run.meters import epoch_metrics
from util.run.run_log import StepCurves
from util.run.steps import EpochSteps


def train_one_epoch(
    model: torch.nn.Module,
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    loss_scaler,
    log_writer=None,
    args: Namespace | None = None,
    guard: RunGuard | None = None,
) -> dict[str, float]:
    """Trains for one epoch; no step waits for the device.

    Args:
        data_loader: batches of images (N, C, H, W), alone or first of several: uint8, normalised here with
            `args.mean` and `args.std`, or float, taken as they are. Has a length, begins at `start_batch`.
        loss_scaler: `util.compute.precision.NativeScalerWithGradNormCount`.
        log_writer: TensorBoard writer, or None.
        args: accum_iter, mask_ratio, lr, min_lr, warmup_epochs, epochs; if present what `EpochSteps` reads.
        guard: saves by the clock, ends the loop on signals, and handles losses that are not finite.

    Returns:
        Averages over the epoch and all processes: lr, loss, grad_norm, with a teacher teacher_loss.

    Raises:
        TrainingError: the loss is not finite.
    """
    model.train()
    guard = guard or RunGuard(args)
    steps = EpochSteps(data_loader, args, device, model)
    metrics, curves = epoch_metrics(data_loader, guard.take_meters()), StepCurves(log_writer)
    optimizer.zero_grad()

    batches = DevicePrefetcher(data_loader, steps.device, lambda batch: steps.move(open_batch(batch)[:1]))
    batches = metrics.log_every(batches, steps.print_freq, f"Epoch: [{epoch}]", steps.start)
    for step, (batch, (images,)) in enumerate(batches, steps.start):
        if step % steps.accum_iter == 0:
            lr = lr_sched.adjust_learning_rate(optimizer, epoch + step / steps.count, args)
        steps.begin(epoch, step)
        update = steps.updates(step)

        with without_gradient_traffic(model, not update):
            with autocast(steps.device, steps.amp_dtype):
                loss, distance = steps.losses(model(images, mask_ratio=args.mask_ratio))
                total = loss if distance is None else loss + steps.teacher_weight * distance
            part = total / steps.window_size(step)
            grad_norm = loss_scaler(part, optimizer, steps.clip_grad, model.parameters(), update_grad=update)

        metrics.update(lr=lr, loss=loss, teacher_loss=distance, grad_norm=grad_norm)
        guard.watch(batch, total.detach(), epoch, step)
        if update:
            steps.finish(optimizer, grad_norm)
            curves.add(epoch + step / steps.count, train_loss=loss, train_teacher_loss=distance, lr=lr)
            if guard.after_update(epoch, step + 1, grad_norm, metrics):
                break
        if step % steps.print_freq == 0:
            curves.write()

    guard.read_all()
    curves.write()
    return metrics.averages()


@torch.no_grad()
def evaluate(data_loader: Iterable, model: torch.nn.Module, device: torch.device, args: Namespace) -> float:
    """Mean reconstruction loss of all processes' validation images, each masked the same way every time; the
    same to the last digit at any batch size and number of processes (how: `util.evaluate.exact`).

    Args:
        data_loader: batches as in training, dealt by `util.data.sampler.EvalSampler`.
        model: the bare model, not its wrapper; left in training mode as it was.
        args: those of training.
    """
    from util.evaluate.exact import in_groups  # with the labelled sets, which training does without

    was_training, steps = model.training, EpochSteps(data_loader, args, device)
    model.eval()
    losses, counts = [], []  # of groups that are the same at any batch size and number of processes
    for images, _, indices in in_groups(data_loader):
        noise = fixed_masks(model, indices.tolist(), args.mask_ratio).to(device)
        with autocast(steps.device, steps.amp_dtype):
            losses.append(masked_by(noise, model, *steps.move([images]), args.mask_ratio)[0])
        counts.append(len(images))
    model.train(was_training)
    own = torch.stack(losses).tolist() if losses else []
    shares = gather([(loss * count, count) for loss, count in zip(own, counts, strict=True)])
    sums, counts = zip(*(part for share in shares for part in share), strict=True)
    return math.fsum(sums) / sum(counts)
