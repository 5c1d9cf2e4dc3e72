"""Checkpoints, written so that a kill loses nothing; the way back to one is `util.run.resume`.

`checkpoint-{epoch}.pth` is written when an epoch is complete: a dict of 'model', 'optimizer', 'epoch',
'scaler' and 'args' (a plain dict), as the reference's, and 'run': which run it is of ('id') and on what data
(see `util.run.start.describe_data`). A run that stops inside an epoch writes
`checkpoint-{epoch}-step{n}.pth`: the same, where 'epoch' is the last complete epoch (-1: none) and 'step' the
number of micro-steps done of the next.
"""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import torch

from util.errors import TrainingError, UserError
from util.files import put_in_place
from util.processes.collectives import get_world_size, is_main_process, warn
from util.processes.parallel import is_sharded
from util.run import owner
from util.run.writer import BackgroundWriter, save_checkpoint, snapshot
from util.weights.names import is_inside_epoch, list_checkpoints, position_in_name

_writer = BackgroundWriter()


def prepare_output_dir(output_dir: str | None, model: torch.nn.Module) -> None:
    """Makes the folder this run's, and tidies it.

    Raises:
        UserError: another run works there, or a checkpoint of `model` and AdamW's state does not fit in.
    """
    _writer.failed = False  # of an earlier run in this process
    if not output_dir or not is_main_process():
        return
    owner.claim(output_dir)
    for left in Path(output_dir).glob(".checkpoint-*.tmp-*"):
        with contextlib.suppress(OSError):
            left.unlink()  # of a save that was killed
    needed = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(f"--output_dir {output_dir}: {free / 2**20:.0f} MB are free, "
                        f"a checkpoint needs {needed / 2**20:.0f} MB")  # fmt: skip


def save_model(
    args,
    epoch,
    model,
    model_without_ddp,
    optimizer,
    loss_scaler,
    step: int = 0,
    best: bool = False,
    **entries,
) -> Path | None:
    """As `save_in_background`, but returns when the file is there; None too where it could not be written."""
    path = save_in_background(args, epoch, model_without_ddp, optimizer, loss_scaler, step, best, **entries)
    _writer.wait()
    return None if path is None or _writer.failed else path


def save_in_background(
    args,
    epoch: int,
    model,
    optimizer,
    loss_scaler,
    step: int = 0,
    best: bool = False,
    *,
    run: dict | None = None,
    stats: dict | None = None,
    evaluated: bool | None = None,
    meters: list | None = None,
    model_info: dict | None = None,
    best_acc1: float | None = None,
    model_ema: dict | None = None,
) -> Path | None:
    """Writes a checkpoint to `args.output_dir` on the first process and removes those no longer wanted.

    All processes must call it: of a sharded model each has a part. The caller waits until the state is copied
    to memory; `finish_saving` waits for the file. When it cannot be written a warning says so, older
    checkpoints are as they were, and training can go on.

    Args:
        epoch: the epoch just completed or, with `step`, the one that is under way.
        model: bare, not its wrapper.
        step: micro-steps done of that epoch when it is not complete.
        best: also make it `checkpoint-best.pth`.
        run, stats, evaluated, meters, model_info, best_acc1, model_ema: entries, see `RunState`.

    Returns the path, or None on other processes.
    """
    entries = {"run": run, "stats": stats, "evaluated": evaluated, "meters": meters, "model_info": model_info}
    entries |= {"best_acc1": best_acc1, "model_ema": model_ema}
    if not getattr(args, "output_dir", "") or not (is_main_process() or is_sharded(model)):
        return None
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch - 1 if step else epoch,
        "scaler": loss_scaler.state_dict() if loss_scaler is not None else {},
        "args": dict(vars(args)),
        **{name: value for name, value in entries.items() if value is not None},
    }
    if not is_main_process():
        snapshot(content, keep=False)  # hands over this process's part
        return None
    if step:
        world_size = get_world_size()
        position = {"step": step, "world_size": world_size, "samples": step * args.batch_size * world_size}
        content.update(position, effective_batch=args.batch_size * args.accum_iter * world_size)
    name = f"checkpoint-{epoch}-step{step}.pth" if step else f"checkpoint-{epoch}.pth"
    path = Path(args.output_dir) / name

    def write(copy: dict) -> None:
        try:
            if best:  # first, so that no kill leaves a checkpoint that knows of a best one that is not there
                save_checkpoint(path.with_name("checkpoint-best.pth"), copy)
                _same_file(path.with_name("checkpoint-best.pth"), path)
            else:
                save_checkpoint(path, copy)
            _remove_old(path, owner.id_of(copy), getattr(args, "keep_checkpoints", 0))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "space" in str(error)
            advice = ", make room" if full else ""
            warn(f"NO CHECKPOINT WAS WRITTEN: {path}: {error.strerror or error}; training goes on{advice}")
            raise

    _writer.start(write, content)
    return path


def wait_for_saving() -> None:
    """Returns when nothing is being written."""
    _writer.wait()


def finish_saving() -> None:
    """Returns when the last checkpoint is on disk.

    Raises:
        TrainingError: it could not be written, so that this state is lost when the run ends.
    """
    _writer.wait()
    if _writer.failed:
        raise TrainingError("the last checkpoint could not be written (see above); the run ends without it")


def _same_file(path: Path, other: Path) -> None:
    """Makes `other` the same file as `path`, in one step."""
    temporary = other.with_name(f".{other.name}.tmp-{os.getpid()}")
    try:
        os.link(path, temporary)  # takes no room, and outlives the removal of the other name
    except OSError:
        shutil.copyfile(path, temporary)
    put_in_place(temporary, other)


def _remove_old(newest: Path, run: str | None, keep: int) -> None:
    """Of a run's checkpoints before `newest`, removes those inside an epoch and all but `keep` - 1 others."""
    kept = not is_inside_epoch(newest)
    for path in list_checkpoints(newest.parent):
        inside_epoch = is_inside_epoch(path)
        if position_in_name(path) >= position_in_name(newest) or not (keep or inside_epoch):
            continue
        if owner.id_at(path) != run:
            continue
        kept += not inside_epoch
        if inside_epoch or kept > keep:
            with contextlib.suppress(OSError):
                path.unlink()
