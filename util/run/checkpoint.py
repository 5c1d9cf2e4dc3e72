"""Checkpoints: written so that a kill loses nothing, and a run's way back to one.

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
from util.processes.collectives import check_agreement, get_world_size, is_main_process, log, warn
from util.processes.fsdp import is_sharded, load_state, split_optimizer_state
from util.run.writer import BackgroundWriter, save_checkpoint, snapshot
from util.weights.files import find_newest, is_inside_epoch, list_checkpoints, load_checkpoint
from util.weights.state import check_entries, check_optimizer, check_state, model_state

_writer = BackgroundWriter()


def check_output_dir(output_dir: str | None, model: torch.nn.Module) -> None:
    """Makes the folder, tidies it; UserError unless a checkpoint of `model` and AdamW's state fits in."""
    _writer.failed = False  # of an earlier run in this process
    if not output_dir or not is_main_process():
        return
    probe = Path(output_dir) / f".write-test-{os.getpid()}"
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        for left in Path(output_dir).glob(".checkpoint-*.tmp-*"):
            left.unlink()  # of a save that was killed
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink()
        raise UserError(f"--output_dir {output_dir}: cannot be written ({error.strerror})") from None
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
        "args": {name: value for name, value in vars(args).items() if name != "given"},
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


def load_model(args, model_without_ddp, optimizer, loss_scaler) -> dict | None:
    """Restores a run from `args.resume` (auto, file or URL); sets `args.start_epoch` and `args.start_step`.

    Returns the loaded content, or None when there was nothing to resume.

    Raises:
        UserError: unreadable, of another architecture, or without what resuming needs.
    """
    args.start_step = 0
    if not args.resume:
        if args.output_dir and list_checkpoints(args.output_dir):
            if is_main_process():
                _check_owner(args)
            text = f"{args.output_dir} holds checkpoints of an earlier run"
            log(f"note: {text}, which this fresh one will overwrite; --resume auto goes on from them")
        return None
    if args.resume == "auto":
        newest = find_newest(args.output_dir) if args.output_dir else None
        if newest is None:
            log(f"resume: no checkpoint in {args.output_dir}, starting from scratch")
            return None
        source, content = newest
    else:
        source, content = args.resume, load_checkpoint(args.resume, "--resume")
    check_entries(content, f"--resume {source}")
    state = model_state(content, f"--resume {source}")
    check_state(model_without_ddp, state, f"--resume {source}")
    load_state(model_without_ddp, state)
    if "optimizer" not in content or "epoch" not in content:
        log(f"resume: {source} holds weights only; optimizer and epoch start anew")
        return content
    if not getattr(args, "eval", False):
        if optimizer is not None:
            _load_optimizer(optimizer, content["optimizer"], source)
        if loss_scaler is not None:
            loss_scaler.load_state_dict(content.get("scaler") or {})
    args.start_epoch, args.start_step = content["epoch"] + 1, content.get("step", 0)
    if args.start_step:
        args.start_step = _position(args, content, source)
    check_agreement(args)  # all processes go on from the same place
    _warn_of_changes(args, content)
    where = f"epoch {args.start_epoch}" + (f", step {args.start_step}" if args.start_step else "")
    complete = args.start_epoch >= getattr(args, "epochs", args.start_epoch + 1)
    log(f"resume: {source}, {'complete: nothing left to do' if complete else 'going on'} at {where}")
    return content


def _check_owner(args) -> None:
    """Raises UserError where a fresh run would overwrite another script's checkpoints or its own start."""
    newest, given = list_checkpoints(args.output_dir)[0], getattr(args, "finetune", "")
    if given and "://" not in given and Path(given).resolve().parent == Path(args.output_dir).resolve():
        raise UserError(f"--output_dir {args.output_dir}: holds --finetune {given}, and this run would "
                        "overwrite it; pass another folder")  # fmt: skip
    try:
        stored = load_checkpoint(newest).get("args")
    except UserError:
        return
    marks = {
        "mask_ratio": "main_pretrain.py",
        "mixup": "main_finetune.py",
        "cache_features": "main_linprobe.py",
    }
    writer = next((script for flag, script in marks.items() if flag in (stored or {})), None)
    own = next((script for flag, script in marks.items() if hasattr(args, flag)), None)
    if writer and own and writer != own:
        raise UserError(f"--output_dir {args.output_dir}: holds checkpoints of {writer}, and this run would "
                        "overwrite them; pass another folder")  # fmt: skip


def _warn_of_changes(args, content: dict) -> None:
    """Says which settings of the recipe are no longer those of the checkpoint."""
    names = "norm_pix_loss mask_ratio seed lr min_lr weight_decay epochs warmup_epochs batch_size accum_iter"
    saved, own = content.get("args") or {}, vars(args)
    changed = [
        f"{name} {saved[name]} -> {own[name]}"
        for name in (*names.split(), "mean", "std", "layer_decay", "drop_path", "data_path", "repeated_aug")
        if name in saved and name in own and str(saved[name]) != str(own[name])
    ]
    if changed and is_main_process():
        warn(f"resume: settings differ from the checkpoint's: {', '.join(changed)}")


def _position(args, content: dict, source) -> int:
    """Micro-steps done of the epoch under way, counted with this run's batch size and processes."""
    if "samples" not in content:
        return content["step"]
    effective_batch = args.batch_size * args.accum_iter * get_world_size()
    if effective_batch != content["effective_batch"]:
        raise UserError(
            f"--resume {source}: was saved inside an epoch with an effective batch of "
            f"{content['effective_batch']}, now it is {effective_batch}; keep batch size x processes x "
            "--accum_iter, or resume from a whole epoch"
        )
    saved, own = ((a or {}).get("repeated_aug", 1) for a in (content.get("args"), vars(args)))
    if saved != own:
        raise UserError(
            f"--resume {source}: was saved inside an epoch with --repeated_aug {saved}, now it is {own}; "
            "keep it, or resume from a whole epoch"
        )
    return content["samples"] // (args.batch_size * get_world_size())


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict, source) -> None:
    # How a step is computed belongs to this machine, not to the checkpoint; torch places the state by it
    groups = [
        {**saved, "fused": own.get("fused")}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=False)
    ]
    try:
        check_optimizer(optimizer, state)
        entries = split_optimizer_state(optimizer, state["state"])
        optimizer.load_state_dict({**state, "state": entries, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise UserError(f"--resume {source}: its optimizer state does not fit: {error}") from None
