"""What is said: on any console, on a full disk, into a closed pipe; and that nothing is said elsewhere."""

import ast
import io
import os
import signal
import subprocess
import sys

import pytest
from golden_utils import REPO
from test_layers import FILES

from util import console
from util.cli.progress import progress_bar
from util.processes import signals
from util.processes.collectives import log, note, warn

PARSER = (
    "from util.cli.parser import ArgumentParser, run_script; p = ArgumentParser('x', description='D' * 99)"
)


class FullDisk(io.StringIO):
    """A stream that takes `room` texts more."""

    def __init__(self, room=0):
        super().__init__()
        self.room = room

    def write(self, text):
        if self.room <= 0:
            raise OSError(28, "No space left on device")
        self.room -= 1
        return super().write(text)


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(console, "_told", set())


def stream(encoding, errors="strict"):
    return io.TextIOWrapper(io.BytesIO(), encoding, errors)


def content(text_stream):
    return text_stream.buffer.getvalue().decode(text_stream.encoding)


@pytest.mark.parametrize(
    "encoding, shown",
    [("cp1252", r"é \u732b"), ("ascii", r"\xe9 \u732b"), ("utf-8", "é 猫"), ("utf-16", "é 猫")],
)
def test_a3_any_text_on_any_console(monkeypatch, encoding, shown):
    out, err = stream(encoding), stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    log("é 猫 caf\udce9")
    warn("é 猫 \ud800")
    assert content(out) == rf"{shown} caf\xe9" + "\n"
    assert content(err) == rf"warning: {shown} \ud800" + "\n"


def test_c7_nothing_steers_the_terminal(capsys):
    console.say("a\tb\n\x1b[2J\r\x9b\u202ec\x07")
    note("one\nline")
    warn("one\nline")
    out, err = capsys.readouterr()
    assert out == "a\tb\n" + r"\x1b[2J\r\x9b\u202ec\x07" + "\n"
    assert err == "one\nline\n" + r"warning: one\nline" + "\n"
    assert console.one_line("caf\udce9/\n\u56fe \x7f") == "caf\\xe9/\\n\u56fe \\x7f"


def test_a2_what_cannot_be_written_is_told_once_on_the_other_stream(monkeypatch, capsys):
    full = FullDisk(room=1)
    monkeypatch.setattr(sys, "stdout", full)
    for i in range(4):
        log(f"line {i}")
    assert not console.say("lost") and full.getvalue() == "line 0\n"
    assert capsys.readouterr().err == (
        "warning: stdout: cannot be written (No space left on device); what it says is lost\n"
    )
    full.room = 1  # there is room again
    assert console.say("line 5") and full.getvalue() == "line 0\nline 5\n"
    monkeypatch.setattr(sys, "stderr", FullDisk())
    note("both are full")


def test_a2_streams_that_are_closed_or_missing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for out in (closed, None):
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        log("a")
        note("b")
        assert not console.say("c")


def test_a2_a_bar_on_a_full_disk_and_a_poor_console(monkeypatch, capsys):
    class Terminal(FullDisk):
        encoding = "ascii"

        def isatty(self):
            return True

    terminal = Terminal(room=2)
    bar = progress_bar(2, "it", terminal, desc="caf\udce9", mininterval=0)
    bar.update()
    bar.update()
    bar.close()
    assert "0/2" in terminal.getvalue() and "2/2" not in terminal.getvalue()


def python(code, **streams):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPO, env=env, text=True, **streams)


@pytest.mark.parametrize(
    "end",
    [
        "p.print_help()",
        "run_script(print, p)",
        "p.error('e')",
        "from util import console; console.guard(); print(1)",
    ],
)
def test_a2_a_reader_that_has_gone_is_silence(end):
    reader, writer = os.pipe()
    os.close(reader)
    code = f"import sys; sys.argv = ['x', '--help']; {PARSER}; {end}"
    process = python(code, stdout=writer, stderr=writer if "error" in end else subprocess.PIPE)
    os.close(writer)
    assert process.communicate()[1] in (None, "")
    assert process.returncode == (2 if "error" in end else 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a2_a_full_disk_is_no_exit_status():
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = python(
            f"{PARSER}; p.print_help(); print('by another')", stdout=full, stderr=subprocess.PIPE
        )
    lines = process.communicate()[1].splitlines()
    assert (
        process.returncode == 0 and len(lines) == 1 and "stdout: cannot be written (No space left" in lines[0]
    )


def test_a2_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    code = (
        "from util import console; f = open(sys.argv[1], 'w', encoding='utf-8'); "
        "f.write(f'{f.fileno()} {sys.stdout.isatty()}')"
    )
    command = ["bash", "-c", 'exec "$0" -c "import sys; $1" "$2" <&- >&- 2>&-', sys.executable, code]
    assert subprocess.run([*command, tmp_path / "x"], cwd=REPO).returncode == 0
    number, is_terminal = (tmp_path / "x").read_text().split()
    assert int(number) > 2 and is_terminal == "False"


def test_a2_a_signal_on_a_full_disk_lets_the_step_end(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    signals.install()
    signal.raise_signal(signal.SIGTERM)
    assert signals.requested() == signal.SIGTERM


def printing(path):
    """(line, what) of everything in a file that writes to a stream on its own."""
    for node in ast.walk(ast.parse((REPO / path).read_text(encoding="utf-8"))):
        stream = getattr(getattr(node, "value", None), "attr", "")
        if isinstance(node, ast.Name) and node.id in ("print", "tqdm"):
            yield node.lineno, node.id
        elif stream in ("stdout", "stderr") and getattr(node, "attr", "") in ("write", "flush", "buffer"):
            yield node.lineno, f"{stream}.{node.attr}"


def test_one_place_writes():
    allowed = {"util/cli/progress.py": "tqdm"}
    for path in FILES:
        found = [(line, what) for line, what in printing(path) if what != allowed.get(str(path))]
        assert not found, f"{path}: {found}; console.say, or log, note and warn of util.processes.collectives"
