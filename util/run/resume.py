"""A run's way back to a checkpoint, which is read once per start."""

import os
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch

from util.errors import UserError
from util.files import some
from util.processes.collectives import check_agreement, gather, get_world_size, is_main_process, log, warn
from util.processes.parallel import load_state, split_optimizer_state
from util.run import owner
from util.weights.names import list_checkpoints, position_in_name


class Checkpoint(NamedTuple):
    """A checkpoint that was read.

    source: file or URL that `flag` names. content: see `util.run.checkpoint`; but 'model' all may be missing.
    """

    source: str
    content: dict
    flag: str = "--resume"


def _read(source: str | Path, flag: str = "", verify: bool = True, weights_key: str | None = None) -> dict:
    from util.weights.files import read_file  # here and below: only runs that go on need it

    return read_file(source, flag, verify, weights_key)


def read_resume(args) -> Checkpoint | None:
    """What `args.resume` (auto, file or URL) names; None without one, or where there is none for "auto".

    "auto" is the furthest checkpoint, by epoch and step, of the run that `args.output_dir` belongs to or,
    before it has saved one, the file that it started from. The range of deep images comes with it.

    Raises:
        UserError: unreadable, with entries that no run has written, or of another --pixel_range; of "auto":
            there are checkpoints, but none can be read.
    """
    resume, output_dir = getattr(args, "resume", ""), getattr(args, "output_dir", "")
    verify = not getattr(args, "no_verify", False)
    key = getattr(args, "weights_key", "") if getattr(args, "eval", False) else None  # else all of a run
    source, extended = None, False
    if resume == "auto":
        chosen = _choose(output_dir, verify) if output_dir and is_main_process() else None
        source = gather(chosen and chosen.source)[0]  # the first process chooses, and verifies, for all
    if getattr(args, "extend_from", ""):
        from util.run.extend import as_start, starts_here

        extended = starts_here(args, source)
    if extended:
        checkpoint = Checkpoint(args.extend_from, _read(args.extend_from, "--extend_from", verify))
    elif source is not None:
        checkpoint = chosen or Checkpoint(source, _read(source, "--resume", verify=False))
    elif resume not in ("", "auto"):
        checkpoint = Checkpoint(resume, _read(resume, "--resume", verify, key))
    else:
        return None
    from util.weights.state import check_entries

    place = f"{'--extend_from' if extended else '--resume'} {checkpoint.source}"
    check_entries(checkpoint.content, place)
    if extended:
        checkpoint = Checkpoint(args.extend_from, as_start(args, checkpoint.content), "--extend_from")
        _say_what_is_there(Namespace(**{**vars(args), "resume": ""}))
    from util.data.depth import adopt_pixel_range

    adopt_pixel_range(args, checkpoint.content, place)
    return checkpoint


def _choose(output_dir: str, verify: bool) -> Checkpoint | None:
    """What "auto" is; what cannot be read is passed over with a warning."""
    record, paths = owner.read_record(output_dir), list_checkpoints(output_dir)
    own, best, passed, unread = record.get("id"), None, [], []
    for path in _all_there(output_dir):
        named = position_in_name(path) if path in paths else (0, 0)
        if best and named <= owner.position_of(best.content):
            break
        if passed and owner.id_at(path) not in (own, ""):
            continue  # where many files are in the way, a look at each is enough
        try:
            content = _read(path, verify=verify)
            if "model" not in content:
                raise UserError(f"{path}: holds no model")
        except UserError as error:
            warn(f"{error}; passed over for the one before")
            unread.append(path.name)
            continue
        if path in paths and owner.position_of(content) != named:
            warn(f"{path}: its name says another epoch than its entries, which count")
        if own and owner.id_of(content) != own:
            passed.append(path)
        elif not best or owner.position_of(content) > owner.position_of(best.content):
            best = Checkpoint(str(path), content)
    start = record.get("from", "") if best is None else ""
    if start and (os.path.basename(start) != start or os.path.exists(os.path.join(output_dir, start))):
        source = start if "://" in start else os.path.join(output_dir, start)
        return Checkpoint(source, _read(source, "--resume", verify))
    if best is None and unread:
        raise UserError(
            f"--resume auto: no checkpoint of this run in {output_dir} can be read ({some(unread)}), and "
            "nothing is overwritten; pass --resume FILE or another --output_dir, or move what is damaged away"
        )
    if best and paths and not own:
        _warn_of_later(best, paths)
    if best and passed:
        warn(f"{passed[0]} is another run's, and this one will overwrite what is in its way; if it is to go "
             f"on from there, pass --resume {passed[0]}")  # fmt: skip
    return best


def _all_there(output_dir: str) -> list[Path]:
    """Checkpoints of a folder, the furthest first, and the best one, which may be all that is left."""
    best = Path(output_dir, "checkpoint-best.pth")
    return list_checkpoints(output_dir) + ([best] if best.is_file() else [])


def _warn_of_later(best: Checkpoint, paths: list[Path]) -> None:
    """Says where, in a folder that does not say whose it is, a file of perhaps another run is the newest."""
    newest, run = max(paths, key=os.path.getmtime), owner.id_of(best.content)
    later = os.path.getmtime(newest) > os.path.getmtime(best.source)
    if later and (run is None or owner.id_at(newest) != run):
        warn(
            f"{best.source} is taken, being the furthest; {newest} was written after it: if that is of a "
            f"later run, pass --resume {newest}"
        )


def load_model(args, model_without_ddp, optimizer, loss_scaler) -> dict | None:
    """Restores a run from `args.resume` (auto, file or URL); sets `args.start_epoch` and `args.start_step`.

    Args:
        args: what is missing of it is not looked at.

    Returns the loaded content, or None when there was nothing to resume.

    Raises:
        UserError: unreadable, of another architecture, or without what resuming needs.
    """
    args.resume, args.output_dir = getattr(args, "resume", ""), getattr(args, "output_dir", "")
    checkpoint = read_resume(args)
    restore_run(args, checkpoint, model_without_ddp, optimizer, loss_scaler)
    return checkpoint and checkpoint.content


def restore_run(
    args, checkpoint: Checkpoint | None, model, optimizer, loss_scaler, listing: dict | None = None
) -> None:
    """As `load_model`, from a `checkpoint` that was read.

    Args:
        model: bare, not its wrapper.
        listing: of the data (`util.run.start.describe_data`); None: of another loop than our scripts', which
            knows itself what is left to do of a complete run.
    """
    given = 0 if hasattr(args, "start_step") else getattr(args, "start_epoch", 0)  # else an earlier run's
    args.start_step = 0
    if checkpoint is None:
        _say_what_is_there(args)
        return
    source, content, flag = checkpoint
    place = f"{flag} {source}"
    from util.weights.state import check_state, model_state

    state = model_state(content, place)
    check_state(model, state, place)
    trains, epochs = "optimizer" in content and "epoch" in content, getattr(args, "epochs", None)
    start_epoch = content["epoch"] + 1 if trains else 0
    complete = trains and epochs is not None and start_epoch >= epochs
    if not getattr(args, "eval", False):
        from util.run.recipe import check_changes

        check_changes(args, content, source, listing, complete and listing is not None, given, flag)
    load_state(model, state)
    if not trains:
        log(f"resume: {source} holds weights only; optimizer and epoch start anew")
        return
    if not getattr(args, "eval", False):
        if optimizer is not None:
            _load_optimizer(optimizer, content["optimizer"], place)
        if loss_scaler is not None:
            loss_scaler.load_state_dict(content.get("scaler") or {})
    args.start_epoch, args.start_step = start_epoch, content.get("step", 0)
    if args.start_step:
        args.start_step = _position(args, content, place)
    check_agreement(args)  # all processes go on from the same place
    where = f"epoch {args.start_epoch}" + (f", step {args.start_step}" if args.start_step else "")
    log(f"resume: {source}, {'complete: nothing left to do' if complete else 'going on'} at {where}")


def _say_what_is_there(args) -> None:
    """Before a start from nothing: what will be overwritten; raises UserError where that may not be."""
    resume, output_dir = getattr(args, "resume", ""), getattr(args, "output_dir", "")
    there = _all_there(output_dir) if output_dir else []
    if there and is_main_process():
        _check_owner(args)
    if resume:
        which = "checkpoint of this run" if there else "checkpoint"
        log(f"resume: no {which} in {output_dir}, starting from scratch")
    if there:
        log(f"note: {output_dir} holds checkpoints of an earlier run, which this fresh one will overwrite; "
            f"--resume {there[0]} goes on from them")  # fmt: skip


def _check_owner(args) -> None:
    """Raises UserError where a fresh run would overwrite another script's checkpoints or its own start."""
    newest = _all_there(args.output_dir)[0]
    for flag in ("finetune", "init", "teacher"):
        given = Path(getattr(args, flag, "") or ".")
        if given.is_file() and given.resolve().parent == Path(args.output_dir).resolve():
            raise UserError(f"--output_dir {args.output_dir}: holds --{flag} {given}, and this run would "
                            "overwrite it; pass another folder")  # fmt: skip
    try:
        stored = _read(newest, verify=False).get("args")
    except UserError:
        return
    marks = {
        "mask_ratio": "main_pretrain.py",
        "mixup": "main_finetune.py",
        "cache_features": "main_linprobe.py",
        "ignore_index": "main_segment.py",
    }
    writer = next((script for flag, script in marks.items() if flag in (stored or {})), None)
    own = next((script for flag, script in marks.items() if hasattr(args, flag)), None)
    if writer and own and writer != own:
        raise UserError(f"--output_dir {args.output_dir}: holds checkpoints of {writer}, and this run would "
                        "overwrite them; pass another folder")  # fmt: skip


def _position(args, content: dict, place: str) -> int:
    """Micro-steps done of the epoch under way, counted with this run's batch size and processes."""
    if "samples" not in content or not {"batch_size", "accum_iter"} <= vars(args).keys():
        return content["step"]
    world_size = get_world_size()
    effective_batch = args.batch_size * args.accum_iter * world_size
    if effective_batch != content["effective_batch"]:
        raise UserError(
            f"{place}: was saved inside an epoch with an effective batch of "
            f"{content['effective_batch']}, now it is {effective_batch}; keep batch size x processes x "
            "--accum_iter, or resume from a whole epoch"
        )
    return content["samples"] // (args.batch_size * world_size)


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict, place: str) -> None:
    # How a step is computed belongs to this machine, not to the checkpoint; torch places the state by it
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=False)
    groups = [{**saved, **({"fused": own["fused"]} if "fused" in own else {})} for saved, own in pairs]
    from util.weights.state import check_optimizer

    try:
        check_optimizer(optimizer, state)
        entries = split_optimizer_state(optimizer, state["state"])
        optimizer.load_state_dict({**state, "state": entries, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise UserError(f"{place}: its optimizer state does not fit: {error}") from None
