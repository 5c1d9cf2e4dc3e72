"""Command-line parts that the main scripts share, and how a user's mistake is reported."""

import argparse
import contextlib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

from util import console
from util.errors import TrainingError, UserError, out_of_memory
from util.processes.signals import Interrupted


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with one line on errors instead of the whole usage text; --help keeps a description's
    lines. `@FILE` on a command line stands for the flags in FILE: as a shell splits them, # begins a comment.
    """

    def __init__(self, *args, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs):
        super().__init__(*args, formatter_class=formatter_class, fromfile_prefix_chars="@", **kwargs)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            self.error(f"{arg_line!r} in an @FILE: {error}")

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {console.one_line(message)} (--help lists all flags)\n")

    def _print_message(self, message: str, file=None):
        if message:  # of --help and of errors
            console.write(message, file or sys.stderr)


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The parsed command line; its `given` lists the names that were on it, the rest has defaults."""
    args = parser.parse_args(argv)
    absent = object()
    probe = argparse.Namespace(**dict.fromkeys(vars(args), absent))
    parser.parse_args(argv, probe)
    args.given = [name for name, value in vars(probe).items() if value is not absent]
    return args


def take_given(args: argparse.Namespace, parser: argparse.ArgumentParser) -> set[str]:
    """Names of the flags on the command line: `args.given`, which is gone then, so that all is settings.

    In a Namespace that a fork made: of those that are not the default of `parser`. Flags that it has not get
    that default, and paths become text.
    """
    given, own = vars(args).pop("given", None), vars(args)
    own.update({name: os.fspath(value) for name, value in own.items() if isinstance(value, os.PathLike)})
    if given is None:
        given = [name for name, value in own.items() if value != parser.get_default(name)]
    own.update({**vars(parser.parse_args([])), **own})
    return set(given)


def run_script(main: Callable, parser: argparse.ArgumentParser) -> None:
    """Calls `main(args)` with the command line; what ends it early becomes one line and an exit status.

    2: a mistake of the user's; 1: training cannot go on; 75: a signal, after saving; 130: Ctrl-C twice. With
    several processes, the one that failed first has the last word, and takes the others down.
    """
    console.guard()
    args = parse_args(parser)
    with errors_in_one_line(parser.prog, vars(args)):
        try:
            main(args)
        except Interrupted as stop:
            console.say(f"{parser.prog}: {stop}", sys.stderr)
            sys.exit(stop.status)


@contextlib.contextmanager
def errors_in_one_line(name: str, flags: Iterable[str] = ()) -> Iterator[None]:
    """Turns errors that end script `name` into its last line and an exit status, on all processes.

    flags: names of those it has; some of them help where there is no memory left.
    """
    try:
        yield
    except (UserError, TrainingError) as error:
        _fail(f"{name}: error: {error}", 2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        _fail(f"{name}: interrupted", 130)
    except Exception as error:
        _fail(f"{name}: error: {_memory_advice(error, flags)}" if out_of_memory(error) else None, 1)


def _memory_advice(error: Exception, flags: Iterable[str]) -> str:
    """One line on an error that `out_of_memory` knows: where, how much was asked for, what to do."""
    text = " ".join(str(error).split())
    asked = re.search(r"(tr(?:ied|y) to allocate|unable to allocate) [\d.]+ \w+", text, re.I)
    on_gpu = re.search("CUDA|CUBLAS|MPS|HIP", text)
    larger = " with a larger --accum_iter" if "accum_iter" in flags else ""
    helpful = {"batch_size": f"a smaller --batch_size{larger}", "grad_checkpointing": "--grad_checkpointing"}
    if on_gpu:
        helpful["fsdp"] = "--fsdp with several GPUs"
    else:
        helpful["num_workers"] = "fewer --num_workers"
    advice = " or ".join(words for flag, words in helpful.items() if flag in flags)
    where = "the GPU" if on_gpu else "this machine"
    return f"{where} is out of memory{f' ({asked[0]})' if asked else ''}{advice and f'; take {advice}'}"


def _fail(message: str | None, status: int) -> None:
    """Ends the script with `message`, or with the traceback of an error of ours, on all processes."""
    if "torch" in sys.modules:  # else there are no other processes; small scripts start without it
        from util.processes import collectives, group

        if collectives.get_world_size() > 1:
            lost = None if message else group.lost_contact(sys.exc_info()[1])
            text = message or lost or traceback.format_exc().rstrip()
            group.fail(text, status, own_fault=not lost)
    if message is None:
        raise
    console.say(message, sys.stderr)
    sys.exit(status)
