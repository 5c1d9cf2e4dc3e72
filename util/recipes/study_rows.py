"""The rows of a study: named sets of flags of main_pretrain.py, read from a text file."""

import argparse
import contextlib
import io
import re
import shlex
from dataclasses import dataclass

import torch

from util.cli.parser import ArgumentParser, parse_args
from util.cli.questions import asks
from util.data.transforms import channel_stats
from util.errors import UserError
from util.files import shown
from util.recipes.init import Init
from util.recipes.questions import ask
from util.recipes.sizes import read_phases
from util.run.resume import read_resume

OWN = {"output_dir", "log_dir", "resume", "seed"}  # which the study itself gives to every run
COMMON = "all"  # the name of the line whose flags stand before those of every row


@dataclass(frozen=True)
class Row:
    """A name, its flags in words, and what the paper found (ViT-L on ImageNet-1K: accuracy in percent,
    fine-tuned / of a linear probe), "" where it says nothing.
    """

    name: str
    flags: tuple[str, ...]
    paper: str = ""

    @property
    def folder(self) -> str:
        """The same on file systems that know no capitals."""
        return re.sub(r"[ ,]+", "_", self.name.lower()).rstrip(".")


class _RowParser(ArgumentParser):
    """Raises UserError where the script's parser would end the process."""

    def error(self, message: str):
        raise UserError(message)


def read_rows(path: str, common: str = "") -> list[Row]:
    """The rows of a study file, a line each: `NAME: FLAGS  # paper FIGURES`; # begins a comment.

    Args:
        common: flags before those of every row; a first line `all: FLAGS` adds to them.

    Raises:
        UserError: the file cannot be read, or a line is no row.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    before, rows = _split(common, "--flags"), {}
    for number, line in enumerate(lines, 1):
        place, (text, _, comment) = f"{path}, line {number}", line.partition("#")
        name, colon, flags = (part.strip() for part in text.partition(":"))
        if not text.strip():
            continue
        if not colon or not re.fullmatch(r"\w[\w .,+%=-]*", name):
            raise UserError(f"{place}: {shown(line)}: no row; write NAME: FLAGS (letters, digits and spaces)")
        words = _split(flags, place)
        if name == COMMON and not rows:
            before += words
            continue
        paper = comment.partition("paper ")[2].strip()
        row = Row(name, (*before, *words), paper)
        if name == COMMON or row.folder in rows:
            raise UserError(f"{place}: {name!r}: " + ("comes before the rows" if name == COMMON else
                            "is a second row of that name"))  # fmt: skip
        rows[row.folder] = row
    if not rows:
        raise UserError(f"{path}: holds no row; write NAME: FLAGS, a line each")
    return list(rows.values())


def _split(text: str, place: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{place}: {shown(text)}: {error}") from None


def check_row(row: Row, script, files: bool = True) -> argparse.Namespace:
    """The row's parsed flags, as `parse_args` gives them; UserError, with the row's name, where `script`,
    which is main_pretrain, would refuse them or, with `files`, what they name.
    """
    try:
        args = parse_args(_RowParser(add_help=False, parents=[script.get_args_parser()]), list(row.flags))
        if own := OWN.intersection(args.given):
            raise UserError(f"--{min(own)}: the study sets it for every run; leave it out")
        checked = argparse.Namespace(**vars(args))
        script.check_args(checked)
        model = script.build_model(checked)
        if files:
            with contextlib.redirect_stdout(io.StringIO()):  # the run itself says it
                check_files(checked, model, script)
    except UserError as error:
        raise UserError(f"row {row.name!r}: {error}") from None
    return args


def check_files(args: argparse.Namespace, model: torch.nn.Module, script) -> None:
    """Reads what `args` name beside the images, as the script does; UserError where it does not fit."""
    args.output_dir = ""  # each run has its own
    checkpoint = read_resume(args)  # of --extend_from
    if checkpoint or args.init or args.init_freeze:
        Init(args, checkpoint, args.given).load(model)
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)
    if asks(args):
        run = argparse.Namespace(device=torch.device("cpu"), given=args.given)
        val_set = script.build_val_dataset(args) if args.vis_freq else None
        ask(model, args, run, script.build_pretrain_dataset(args), val_set)
    if args.size_schedule:
        read_phases(args, model.patch_size)
