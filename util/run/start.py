"""What all training scripts do before their first epoch and after their last one."""

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from util.cli.parser import take_given
from util.compute.precision import prepare_device, resolve_amp_dtype, resolve_device
from util.data.loader import build_loader
from util.data.sampler import EpochSampler
from util.errors import UserError
from util.files import counted
from util.processes import signals
from util.processes.collectives import check_agreement, get_rank, get_world_size, is_main_process, log, warn
from util.processes.group import init_distributed_mode, shut_down
from util.run import owner
from util.run.checkpoint import finish_saving, prepare_output_dir, save_in_background, wait_for_saving
from util.run.guard import RunGuard
from util.run.resume import Checkpoint, restore_run
from util.run.run_log import log_run, trim_log


@dataclass
class Run:
    """device: that computes. amp_dtype: autocast's, None for full precision. precision: that in words.

    given: names of the flags on the command line. pin_memory: whether loaders pin their batches.
    """

    device: torch.device
    amp_dtype: torch.dtype | None
    precision: str
    given: set[str]
    pin_memory: bool


def gives_folder_back(main: Callable) -> Callable:
    """A script's `main(args)` after which, however it ends, `args.output_dir` is free for another run."""

    @functools.wraps(main)
    def wrapper(args: argparse.Namespace) -> None:
        try:
            return main(args)
        finally:
            wait_for_saving()
            owner.release()

    return wrapper


def open_run(args: argparse.Namespace, check_args: Callable, parser: argparse.ArgumentParser) -> Run:
    """Joins the other processes, checks the flags, and takes the device and the folder that they name.

    Args:
        args: of the script; gets distributed, rank, world_size, gpu, and loses `given`.
        check_args, parser: the script's; the former raises UserError for flags that cannot work.
    """
    from util.trackers.several import check_installed

    given, trains = take_given(args, parser), not getattr(args, "eval", False)
    args.log_dir = args.log_dir if "log_dir" in given else args.output_dir
    # From the first second: a scheduler may want its nodes back while images are listed; then it saves early
    if trains:
        signals.install()
    init_distributed_mode(args)
    check_args(args)
    if getattr(args, "report", False) and not (trains and args.output_dir):
        raise UserError("--report: is a page of a training that has an --output_dir")
    if trains:
        check_installed(args.tracker)
    if trains and is_main_process() and os.path.isdir(args.output_dir or ""):
        # Before anything in it is read; one that is not there is made later
        owner.claim(args.output_dir, waits=args.resume == "auto")
    device = resolve_device(args.device, args.gpu)
    amp_dtype = resolve_amp_dtype(args.amp_dtype, device)
    pinned = args.pin_mem and device.type == "cuda"
    return Run(device, amp_dtype, prepare_device(device, amp_dtype), given, pinned)


def train_loader(
    dataset: Dataset, args: argparse.Namespace, pin_memory: bool, kind: str = "training images"
) -> tuple[DataLoader, EpochSampler]:
    """Loader of shuffled full batches and its sampler; raises UserError when no batch would be full.

    Args:
        args: batch_size, seed, num_workers; if present repeated_aug, shuffle.
        kind: what the samples are, for that error.
    """
    world_size, batch_size = get_world_size(), args.batch_size
    repeats = getattr(args, "repeated_aug", 1)
    near = getattr(args, "shuffle", "full") == "near"
    paths = getattr(getattr(dataset, "files", None), "paths", None)
    if getattr(paths, "in_groups", False) and not near and is_main_process():
        text = "of large Parquet files, each image in random order costs reading hundreds of others"
        warn(f"{text}: pass --shuffle near, or make tars of them with tools/make_shards.py")
    sampler = EpochSampler(
        len(dataset), world_size, get_rank(), args.seed, batch_size=batch_size, repeats=repeats,
        near=near_places(dataset) if near else None,
    )  # fmt: skip
    loader = build_loader(dataset, sampler, batch_size, args.num_workers, pin_memory, drop_last=True)
    if len(loader) == 0:
        times = f" x {repeats} crops" if repeats > 1 else ""
        raise UserError(
            f"--batch_size {batch_size}: {world_size} x {batch_size} is more than the {len(dataset)} "
            f"{kind}{times}, so that no batch would be full"
        )
    return loader, sampler


def near_places(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(shards, starts) of a set's images, for `--shuffle near`; warns where neighbours are of one class.

    Raises UserError for images that lie in no archives.
    """
    files = dataset.files
    if (places := getattr(files.paths, "places", None)) is None:
        raise UserError("--shuffle near: is for images in archives, and not all of these are; leave it out")
    shards, starts = places
    if files.labels is not None and files.labels.ndim == 1:
        labels = files.labels[np.lexsort((starts, shards))]
        alike, chance = np.mean(labels[1:] == labels[:-1]), np.square(np.bincount(labels) / len(labels)).sum()
        if alike > (1 + chance) / 2 and is_main_process():
            warn(
                "--shuffle near: neighbours in these archives are of one class, so batches will hold few "
                "classes; mix them with tools/make_shards.py"
            )
    return shards, starts


def describe_data(train, held_out=None) -> dict:
    """What a checkpoint says of the data: {'images': number, 'files': digest of their names}, and the same of
    the `held_out` (validation) set, if any; {} of a data set that is not `util.data.dataset.ImageDataset`.
    """
    described, of_held_out = (getattr(images, "listing", dict)() for images in (train, held_out))
    return {**described, "held_out": of_held_out} if of_held_out else described


@dataclass
class RunState:
    """What a checkpoint holds: model, optimizer, loss scaler, and what else a run must know to go on."""

    args: argparse.Namespace
    model: torch.nn.Module  # bare, not its wrapper
    optimizer: torch.optim.Optimizer
    loss_scaler: object
    model_info: dict | None = None  # of a classifier: see `util.weights.describe`
    best_acc1: float | None = None  # of a classifier: percent, of the best epoch so far; -1: none
    resumed: bool = False  # whether the run goes on from an epoch
    stats: dict[str, float] | None = None  # averages of that epoch
    evaluated: bool = False  # whether it was evaluated
    meters: list[dict] | None = None  # of the epoch under way, one of each process
    data: tuple = (None, None)  # training and validation images
    run: dict | None = None  # which run it is, see `util.run.owner`, and the listing of its data
    started_from: str | None = None  # id of the run whose checkpoint it goes on from
    ema: object = None  # `util.run.ema.Ema`, from `restore` on, if `args.ema` asks for it

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Goes on from `checkpoint`, if any, and frees its tensors; makes `args.output_dir`.

        Sets `args.start_epoch` and `args.start_step`; UserErrors are those of `prepare_output_dir`,
        `restore_run` and `owner.begin`.
        """
        listing = describe_data(*self.data)
        check_agreement(self.args, listing=listing)
        prepare_output_dir(self.args.output_dir, self.model)
        restore_run(self.args, checkpoint, self.model, self.optimizer, self.loss_scaler, listing)
        source, content, flag = checkpoint or (None, {}, None)
        self.started_from = owner.id_of(content)
        saved = content.get("run") if isinstance(content.get("run"), dict) else {}
        others = listing and saved.get("files", listing["files"]) != listing["files"]  # a run has one set
        began = owner.begin(source, {} if others else content, anew=not self.args.resume)
        self.run = {"id": began, **listing}
        if getattr(self.args, "ema", None):
            from util.run.ema import Ema

            self.ema = Ema(self.model, self.optimizer, self.args.ema, f"{flag} {source}", content)
        if checkpoint is None:
            return
        self.resumed, self.evaluated = "epoch" in content, bool(content.get("evaluated"))
        self.meters, self.stats = content.get("meters"), content.get("stats")
        if self.best_acc1 is not None:
            self.best_acc1 = content.get("best_acc1", self.best_acc1)
        content.clear()

    def save(
        self, epoch: int, step: int = 0, meters: list | None = None, best: bool = False, **extra
    ) -> Path | None:
        """Writes a checkpoint after `epoch` or, with `step`, inside it; see `save_in_background`."""
        extra |= {"model_ema": self.ema.state_dict()} if self.ema else {}
        return save_in_background(
            self.args, epoch, self.model, self.optimizer, self.loss_scaler, step, best,
            run=self.run, meters=meters, model_info=self.model_info, best_acc1=self.best_acc1, **extra,
        )  # fmt: skip

    @property
    def purge_step(self) -> int | None:
        """x from which a resumed run draws its curves again; None: there are none yet."""
        return int(1000 * self.args.start_epoch) if self.resumed else None

    def unfinished_epoch(self, evaluates: bool = False) -> dict[str, float] | None:
        """Drops from log.txt what will come again; returns the averages of the epoch before where the run
        ended before that was logged or, if the script `evaluates` each epoch, evaluated.
        """
        if not self.resumed:
            return None
        unfinished = evaluates and self.stats is not None and not self.evaluated
        own = {self.run["id"], self.started_from}
        logged = trim_log(self.args.output_dir, self.args.start_epoch - unfinished, own)
        return self.stats if unfinished or not logged else None


def announce(
    run: Run,
    args: argparse.Namespace,
    log_writer,
    data: str,
    model: str,
    step: str,
    steps_per_epoch: int,
    metrics: Sequence[str],
) -> None:
    """Prints what the run is, and tells TensorBoard, which compares runs by the curves `metrics`.

    data, model, step: what there is to say of each beside the settings.
    """
    world_size = get_world_size()
    effective_batch = args.batch_size * args.accum_iter * world_size
    log_run(
        log_writer, args,
        f"data: {data}",
        f"model: {args.model}, {model}",
        f"device: {run.device}, precision: {run.precision}{step}",
        f"effective batch: {args.batch_size} x {counted(world_size, 'process')} x {args.accum_iter} "
        f"accumulated = {effective_batch}, {steps_per_epoch} micro-steps an epoch; actual lr: {args.lr:.2e}",
        metrics=metrics,
    )  # fmt: skip
    if (crops := getattr(args, "repeated_aug", 1)) > 1:
        log(f"repeated augmentation: {crops} crops of each decoded image, each a sample of the batch; "
            f"{args.epochs} epochs are {args.epochs * crops} effective epochs")  # fmt: skip


def close_run(log_writer, guard: RunGuard) -> None:
    """Ends a run when all is on disk and all processes are here; `Interrupted` if a signal ended it."""
    if guard.reached_max_steps:
        log(f"stopped by --max_steps {guard.max_steps}")
    log(f"Training time {timedelta(seconds=int(time.monotonic() - guard.start))}")
    finish_saving()
    if log_writer is not None:  # a tracker may take the last checkpoint
        log_writer.close()
    reports = getattr(guard.args, "report", False) and guard.output_dir and is_main_process()
    shut_down()
    if reports and not guard.signum:
        from util.report.page import write_at_end

        write_at_end(guard.output_dir, owner.environment(), guard.device)
    guard.leave()
