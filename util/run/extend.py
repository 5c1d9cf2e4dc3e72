"""`--extend_from`: a new run that goes on from the stable phase of another one, for longer or to cool down.

Before its cooldown a run with `--schedule wsd` or `constant` does not depend on how long it will be.
"""

import os
from argparse import Namespace

from util.errors import UserError
from util.files import counted
from util.lr_sched import stable_epochs
from util.run.owner import position_of
from util.weights.schema import whole


def starts_here(args, source: str | None) -> bool:
    """Whether a run starts from `args.extend_from`, and not from a checkpoint of its own, which `--resume
    auto` has found: `source`, or what an earlier start began with.

    Raises UserError for a --resume of another file, or a folder that is not the new run's own.
    """
    if args.resume not in ("", "auto"):
        raise UserError(f"--extend_from {args.extend_from}, --resume {args.resume}: a run starts from one of "
                        "them; leave the other out")  # fmt: skip
    if os.path.dirname(os.path.abspath(args.extend_from)) == os.path.abspath(args.output_dir or os.sep):
        raise UserError(f"--output_dir {args.output_dir}: holds --extend_from {args.extend_from}, whose run "
                        "is another; pass a folder of its own")  # fmt: skip
    return source is None or os.path.abspath(source) == os.path.abspath(args.extend_from)


def as_start(args, content: dict) -> dict:
    """A checkpoint's content as a new run begins with it: without the id of its run, and without what an
    extension changes, the run's length and end.

    Raises:
        UserError: not of a stable phase, or of none of this run's.
    """
    flag, saved = f"--extend_from {args.extend_from}", content.get("args", {})
    if "optimizer" not in content or "epoch" not in content:
        raise UserError(f"{flag}: holds weights without their optimizer; --init starts a new run from them")
    if args.schedule == "cosine":
        raise UserError(f"{flag}: needs --schedule wsd, or constant, as a cosine depends on --epochs")
    if saved.get("schedule", "cosine") not in ("wsd", "constant"):
        raise UserError(f"{flag}: is of a cosine, which falls from the warm-up on and has no stable phase to "
                        f"extend; --init {args.extend_from} trains its weights on")  # fmt: skip
    if not whole()(saved.get("epochs")) or not whole(0)(saved.get("cooldown") or 0):
        raise UserError(f"{flag}: does not say how long its run was to be")
    (done, step), stable, own = position_of(content), stable_epochs(Namespace(**saved)), stable_epochs(args)
    if (done, step) > (min(stable, own), 0) or done >= args.epochs:
        whose, advice = ("its", "take an earlier one") if (done, step) > (stable, 0) else (
            "this", "pass more --epochs")  # fmt: skip
        raise UserError(f"{flag}: holds {counted(done, 'epoch')}, and {whose} run's stable phase ends after "
                        f"{min(stable, own)}; {advice}")  # fmt: skip
    kept = {name: value for name, value in saved.items() if name not in ("epochs", "schedule", "cooldown")}
    run = content.get("run", {})
    return {**content, "args": kept, "run": {name: value for name, value in run.items() if name != "id"}}
