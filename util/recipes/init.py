"""`--init`: pre-training that starts from weights, with a new optimizer at epoch 0."""

from argparse import Namespace
from pathlib import PurePath

import torch

from util.cli.questions import PIXELS
from util.data.depth import adopt_pixel_range, parse_range
from util.errors import UserError
from util.files import printable, shown
from util.processes.collectives import is_main_process, log, note, warn
from util.run.resume import Checkpoint
from util.weights.encoder import load_into
from util.weights.files import read_file
from util.weights.flags import warn_of_other_stats
from util.weights.schema import said_settings


def check_init(args: Namespace) -> None:
    """Raises UserError for flags that cannot work together, before anything is read or written."""
    if args.init and args.resume not in ("", "auto"):
        raise UserError(
            f"--init {args.init}, --resume {args.resume}: a run starts from weights (--init) or goes on from "
            "a checkpoint with its optimizer and epoch (--resume); leave one out"
        )


class Init:
    """What a run starts from: `--init FILE` or, where it goes on from a checkpoint, what that started from.

    Sets `args.pixel_range` as the file says and, in `load`, `args.init_taken`: the report, and which
    parameters were taken. Both stay in all checkpoints of the run.

    Raises:
        UserError: unreadable; or the checkpoint's run started from something else.
    """

    def __init__(self, args: Namespace, checkpoint: Checkpoint | None, given: set[str]):
        """`given`: names of the flags on the command line."""
        self.args, self.given, self.content, self.taken = args, given, None, {}
        if checkpoint is None and args.init:
            self.content = read_file(args.init, "--init", not args.no_verify, args.weights_key)
            self._take_range()
        elif checkpoint:
            self._follow(checkpoint)
        if args.init_freeze and not args.init:
            raise UserError(f"--init_freeze {args.init_freeze}: is for what --init FILE does not hold, and "
                            "this run starts without one")  # fmt: skip

    def _take_range(self) -> None:
        """Takes the file's `pixel_range` as the default of images that may be others than the file's."""
        args, own = self.args, self.args.pixel_range
        args.pixel_range, given = "auto", parse_range(own, args.in_chans)
        adopt_pixel_range(args, self.content, f"--init {args.init}", args.in_chans)
        if given or args.pixel_range is None:  # None: 8 bits, which the images will show if they have them
            args.pixel_range = own

    def _follow(self, checkpoint: Checkpoint) -> None:
        """Takes over what the run of a checkpoint started from."""
        args, saved = self.args, checkpoint.content.get("args")
        saved = saved if isinstance(saved, dict) else {}
        stored, key, taken = (saved.get(name, "") for name in ("init", "weights_key", "init_taken"))
        stored, key = (value if isinstance(value, str) else "" for value in (stored, key))
        began = "started without --init"
        if stored:
            began = f"started from {shown(stored, 300)}" + (f", --weights_key {shown(key)}" if key else "")
        if args.init and (PurePath(stored).name, key) != (PurePath(args.init).name, args.weights_key):
            own = f"--init {args.init}" + (f" --weights_key {args.weights_key}" if args.weights_key else "")
            raise UserError(f"{own}: {checkpoint.source} goes on, and its run {began}; for a new run pass "
                            "another --output_dir")  # fmt: skip
        if args.init and is_main_process():
            tell = note if stored == args.init else warn  # another folder's file of the same name
            own = f"--init {printable(args.init)}"
            tell(f"{own}: not read, as the run goes on from {printable(checkpoint.source)}, and {began}")
        args.init, args.weights_key = stored, key
        self.taken = taken if isinstance(taken, dict) else {}

    def load(self, model: torch.nn.Module) -> None:
        """Gives `model`, on the CPU, the weights of the file, and says what was taken."""
        args, content, self.content = self.args, self.content, None
        if content is not None:
            report = load_into(model, args.init, "--init", content, self.given)
            log(str(report))
            warn_of_other_stats(args, content, args.init)
            said, norm = said_settings(content), said_settings(content).get("norm_pix_loss")
            own = "norm_pixels" if norm is True else "pixels" if norm is False else args.target
            other = args.target in PIXELS and said.get("target", own) != args.target
            if report.decoder == "taken" and other and is_main_process():
                now = "normalised" if args.norm_pix_loss else "plain"
                warn(f"{args.init}: its decoder does not predict {now} patches, as it is to do now")
            names = {name for name, p in model.named_parameters() if p.requires_grad}
            self.taken = {"report": str(report).splitlines(), "parameters": sorted(names - {*report.missing})}
            if args.init_freeze and names == {*self.taken["parameters"]} and args.target in PIXELS:
                raise UserError(f"--init_freeze {args.init_freeze}: {args.init} holds all of the model, so "
                                "nothing would train; leave it out")  # fmt: skip
        args.init_taken = self.taken

    def groups(self, groups: list[dict], model: torch.nn.Module) -> list[dict]:
        """With `--init_freeze` the optimizer's parameter groups, each split in what is new and the rest."""
        if not self.args.init_freeze:
            return groups
        taken, names = self.taken.get("parameters"), {id(p): name for name, p in model.named_parameters()}
        taken = set(taken) if isinstance(taken, list) and all(isinstance(t, str) for t in taken) else set()
        parts = [
            {**group, "params": [p for p in group["params"] if (names[id(p)] in taken) == old], "taken": old}
            for group in groups
            for old in (False, True)
        ]
        return [part for part in parts if part["params"]]

    def freeze(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        """Sets the learning rate of what was taken to 0 in the first `--init_freeze` epochs.

        All gradients are exchanged and all moments kept as ever, so that nothing else changes after them.
        """
        for group in optimizer.param_groups if self.args.init_freeze else ():
            group["lr_scale"] = 0.0 if group.get("taken") and epoch < self.args.init_freeze else 1.0
