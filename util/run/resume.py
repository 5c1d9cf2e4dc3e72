"""A run's way back to a checkpoint, which is read once per start."""

from pathlib import Path
from typing import NamedTuple

import torch

from util.errors import UserError
from util.files import shown
from util.processes.collectives import check_agreement, get_world_size, is_main_process, log, warn
from util.processes.fsdp import load_state, split_optimizer_state
from util.weights.files import find_newest, list_checkpoints, read_file
from util.weights.state import check_entries, check_optimizer, check_state, model_state


class Checkpoint(NamedTuple):
    """A checkpoint that was read.

    source: file or URL. content: see `util.run.checkpoint`; entries other than 'model' may be missing.
    """

    source: str
    content: dict


def read_resume(args) -> Checkpoint | None:
    """What `args.resume` (auto, file or URL) names; None without one, or where there is none for "auto".

    Raises:
        UserError: unreadable, or with entries that no run has written.
    """
    verify = not getattr(args, "no_verify", False)
    if args.resume == "auto":
        newest = find_newest(args.output_dir, verify) if args.output_dir else None
        if newest is None:
            return None
        checkpoint = Checkpoint(str(newest[0]), newest[1])
    elif args.resume:
        checkpoint = Checkpoint(args.resume, read_file(args.resume, "--resume", verify))
    else:
        return None
    check_entries(checkpoint.content, f"--resume {checkpoint.source}")
    return checkpoint


def load_model(args, model_without_ddp, optimizer, loss_scaler) -> dict | None:
    """Restores a run from `args.resume` (auto, file or URL); sets `args.start_epoch` and `args.start_step`.

    Returns the loaded content, or None when there was nothing to resume.

    Raises:
        UserError: unreadable, of another architecture, or without what resuming needs.
    """
    checkpoint = read_resume(args)
    restore_run(args, checkpoint, model_without_ddp, optimizer, loss_scaler)
    return checkpoint and checkpoint.content


def restore_run(args, checkpoint: Checkpoint | None, model, optimizer, loss_scaler) -> None:
    """As `load_model`, from a `checkpoint` that was read; `model`: bare, not its wrapper."""
    args.start_step = 0
    if checkpoint is None:
        if args.resume:
            log(f"resume: no checkpoint in {args.output_dir}, starting from scratch")
        elif args.output_dir and list_checkpoints(args.output_dir):
            if is_main_process():
                _check_owner(args)
            text = f"{args.output_dir} holds checkpoints of an earlier run"
            log(f"note: {text}, which this fresh one will overwrite; --resume auto goes on from them")
        return
    source, content = checkpoint
    state = model_state(content, f"--resume {source}")
    check_state(model, state, f"--resume {source}")
    load_state(model, state)
    if "optimizer" not in content or "epoch" not in content:
        log(f"resume: {source} holds weights only; optimizer and epoch start anew")
        return
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


def _check_owner(args) -> None:
    """Raises UserError where a fresh run would overwrite another script's checkpoints or its own start."""
    newest, given = list_checkpoints(args.output_dir)[0], getattr(args, "finetune", "")
    if given and "://" not in given and Path(given).resolve().parent == Path(args.output_dir).resolve():
        raise UserError(f"--output_dir {args.output_dir}: holds --finetune {given}, and this run would "
                        "overwrite it; pass another folder")  # fmt: skip
    try:
        stored = read_file(newest).get("args")
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
        f"{name} {shown(saved[name])} -> {own[name]}"
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
        {**saved, **({"fused": own["fused"]} if "fused" in own else {})}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=False)
    ]
    try:
        check_optimizer(optimizer, state)
        entries = split_optimizer_state(optimizer, state["state"])
        optimizer.load_state_dict({**state, "state": entries, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise UserError(f"--resume {source}: its optimizer state does not fit: {error}") from None
