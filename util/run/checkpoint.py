"""Checkpoints, written so that a kill loses nothing; the way back to one is `util.run.resume`.

`checkpoint-{epoch}.pth` is written when an epoch is complete: a dict of 'model', 'optimizer', 'epoch',
'scaler' and 'args' (a plain dict), as the reference's. A run that stops inside an epoch writes
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
from util.files import check_writable
from util.processes.collectives import get_world_size, is_main_process, warn
from util.processes.fsdp import is_sharded
from util.run.writer import BackgroundWriter, save_checkpoint, snapshot
from util.weights.files import is_inside_epoch, list_checkpoints

_writer = BackgroundWriter()


def prepare_output_dir(output_dir: str | None, model: torch.nn.Module) -> None:
    """Makes the folder, tidies it; UserError unless a checkpoint of `model` and AdamW's state fits in."""
    _writer.failed = False  # of an earlier run in this process
    if not output_dir or not is_main_process():
        return
    check_writable("--output_dir", output_dir)
    for left in Path(output_dir).glob(".checkpoint-*.tmp-*"):
        with contextlib.suppress(OSError):
            left.unlink()  # of a save that was killed
    needed = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(f"--output_dir {output_dir}: {free / 2**20:.0f} MB are free, "
                        f"a checkpoint needs {needed / 2**20:.0f} MB")  # fmt: skip


def save_model(
    args, epoch, model, model_without_ddp, optimizer, loss_scaler, step: int = 0, best: bool = False, **extra
) -> Path | None:
    """Writes a checkpoint to `args.output_dir` on the first process and removes those no longer wanted.

    All processes must call it: of a sharded model each has a part. The caller waits until the state is copied
    to memory; `finish_saving` waits for the file. When it cannot be written a warning says so, older
    checkpoints are as they were, and training can go on.

    Args:
        epoch: the epoch just completed or, with `step`, the one that is under way.
        step: micro-steps done of that epoch when it is not complete.
        best: also make it `checkpoint-best.pth`.
        extra: further entries, those that are not None.

    Returns the path, or None on other processes.
    """
    if not args.output_dir or not (is_main_process() or is_sharded(model_without_ddp)):
        return None
    content = {
        "model": model_without_ddp.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch - 1 if step else epoch,
        "scaler": loss_scaler.state_dict() if loss_scaler is not None else {},
        "args": dict(vars(args)),
        **{name: value for name, value in extra.items() if value is not None},
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
            _remove_old(path, getattr(args, "keep_checkpoints", 0))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "space" in str(error)
            advice = ", make room" if full else ""
            warn(f"NO CHECKPOINT WAS WRITTEN: {path}: {error.strerror or error}; training goes on{advice}")
            raise

    _writer.start(write, content)
    return path


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
    os.replace(temporary, other)


def _remove_old(newest: Path, keep: int) -> None:
    """Removes mid-epoch checkpoints other than `newest`, and all but the newest `keep` others."""
    complete = 0
    for path in list_checkpoints(newest.parent):
        inside_epoch = is_inside_epoch(path)
        complete += not inside_epoch
        if path != newest and (inside_epoch or (keep and complete > keep)):
            with contextlib.suppress(OSError):
                path.unlink()
