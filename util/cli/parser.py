"""Command-line parts that the main scripts share, and how a user's mistake is reported."""

import argparse
import contextlib
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator

from util.errors import TrainingError, UserError
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
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


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

    In a Namespace that a fork made: of those that are not the default of `parser`.
    """
    given = vars(args).pop("given", None)
    if given is None:
        given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    return set(given)


def run_script(main: Callable, parser: argparse.ArgumentParser) -> None:
    """Calls `main(args)` with the command line; what ends it early becomes one line and an exit status.

    2: a mistake of the user's; 1: training cannot go on; 75: a signal, after saving; 130: Ctrl-C twice. With
    several processes, the one that failed first has the last word, and takes the others down.
    """
    args = parse_args(parser)
    with errors_in_one_line(parser.prog):
        try:
            main(args)
        except Interrupted as stop:
            print(f"{parser.prog}: {stop}", file=sys.stderr, flush=True)
            sys.exit(stop.status)


@contextlib.contextmanager
def errors_in_one_line(name: str) -> Iterator[None]:
    """Turns errors that end script `name` into its last line and an exit status, on all processes."""
    try:
        yield
    except (UserError, TrainingError) as error:
        _fail(f"{name}: error: {error}", 2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        _fail(f"{name}: interrupted", 130)
    except Exception:
        _fail(None, 1)


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
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)
