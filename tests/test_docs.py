"""Every command of the Markdown pages is taken by the parser of its script; marked blocks run."""

import argparse
import ast
import importlib
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import weakref
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted(path.name for path in REPO.glob("*.md"))
RUNNABLE = "<!-- runnable -->"  # on the line before a block: a test runs it from top to bottom


def blocks(page: str, language: str) -> list[tuple[bool, str]]:
    """(marked as runnable, text) of the fenced blocks of a page."""
    text = (REPO / page).read_text(encoding="utf-8")
    found = re.findall(rf"^({re.escape(RUNNABLE)}\n)?```{language}\n(.*?)^```", text, re.M | re.S)
    return [(bool(mark), body) for mark, body in found]


def commands(page: str) -> list[list[str]]:
    """The commands of a page's bash blocks, in words, without comments and leading settings."""
    found = []
    for _, body in blocks(page, "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word not in ("...", "&&")]
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(script or module, its arguments) of a command that starts one of ours, behind any launcher."""
    for i, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[i + 1 :]
        if word == "-m" and words[i + 1].startswith(("util.", "tools.")):
            return words[i + 1], words[i + 2 :]
    return None


class Parsed(Exception):
    """The script's own parser took the command line."""


@pytest.fixture
def parse(monkeypatch):
    """Starts a script until its parser has taken the arguments; SystemExit if it has not."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser, *arguments):
        original(parser, *arguments)
        raise Parsed

    def start(script: str, arguments: list[str]) -> None:
        monkeypatch.syspath_prepend(str((REPO / script).parent))  # as Python does for a script
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        # plan.py writes recipe.txt
        monkeypatch.setattr(sys, "argv", [script, *(word for word in arguments if word != "@recipe.txt")])
        with pytest.raises(Parsed):
            if script.endswith(".py"):
                runpy.run_path(str(REPO / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")

    return start


CASES = [
    pytest.param(*found, id=f"{page}: {' '.join(words)[:60]}")
    for page in PAGES
    for words in commands(page)
    if (found := script_of(words)) and found[0] != "models_mae.py"  # takes no arguments
]
BENCHMARKS = sorted((REPO / "benchmarks").glob("bench_*.py"))


def test_the_pages_name_many_commands():
    assert len(CASES) > 30


@pytest.mark.parametrize(("script", "arguments"), CASES)
def test_command_is_taken_by_its_script(script, arguments, parse, capsys):
    try:
        parse(script, arguments)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)


@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.name)
def test_every_benchmark_starts(script, monkeypatch, capsys):
    """With all that it imports; they are run by hand only, and a renamed function would go unseen."""
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0 and "--help" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["end_to_end", "features", "index", "loader", "logging", "safety", "step"])
def test_benchmarks_refuse_in_one_line(name, monkeypatch, capsys):
    script = REPO / "benchmarks" / f"bench_{name}.py"
    monkeypatch.syspath_prepend(str(script.parent))
    for wrong in (["--json", "/none/x.json"], ["--batch_size", "-3"], ["--batch_size", "0"]):
        monkeypatch.setattr(sys, "argv", [script.name, *wrong])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
        captured = capsys.readouterr()
        assert stop.value.code == 2 and " ".join(wrong) + ": " in captured.err and not captured.out
        assert captured.err.count("\n") == 1


def test_benchmarks_write_figures_in_one_form(tmp_path, monkeypatch, capsys):
    """With what figures are worth nothing without: when, where, by which command and versions."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    harness, path, calls = importlib.import_module("harness"), tmp_path / "x.json", []
    words = [str(REPO / "benchmarks/bench_x.py"), "--rounds", "2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", words)

    def main(args) -> int:
        rounds = harness.take_turns(args.rounds, {n: lambda n=n: calls.append(n) or len(calls) for n in "ab"})
        return harness.finish(args, rounds, met=False)

    with pytest.raises(SystemExit) as stop:
        harness.run_benchmark(main, harness.Parser("", rounds=7))
    record = json.loads(path.read_text())
    assert stop.value.code == 1 and calls == ["a", "b", "b", "a"]
    assert record.keys() == {"date", "machine", "command", "versions", "settings", "figures"}
    assert record["settings"]["rounds"] == 2 and record["figures"] == {"a": [1, 4], "b": [2, 3]}
    assert record["command"] == f"python benchmarks/bench_x.py --rounds 2 --json {path}"
    assert record["date"][:10] in capsys.readouterr().out and "torch" in record["versions"]
    assert harness.paired_ratio([4, 9, 8], [2, 3, 2]) == 3


@pytest.mark.parametrize("fails_at", [1, 4])
def test_d14_a_variant_out_of_memory_is_freed_for_the_others(monkeypatch, fails_at):
    """In its first step, or in a timed round, when the other variants hold theirs."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    bench_step, models, freed = importlib.import_module("bench_step"), {}, []

    def make_variant(variant, task, name, args):
        model = torch.nn.Linear(1, 1)
        model.circle = model  # as models have them: only the garbage collector frees it
        models[variant], steps = weakref.ref(model), itertools.count(1)

        def step_round() -> None:
            if variant == "plain" and next(steps) == fails_at and model is not None:
                raise torch.OutOfMemoryError
            if variant == "eager":
                freed.append("plain" in models and models["plain"]() is None)

        return step_round

    monkeypatch.setattr(bench_step, "make_variant", make_variant)
    monkeypatch.setattr(bench_step, "matrix_peak", lambda *args: 1.0)
    args = argparse.Namespace(
        where=torch.device("cpu"), variants=["eager", "plain"], rounds=4, steps=1, batch=1,
        amp_dtype="none", mask_ratio=0.75, input_size=32, decoder=["self"], opt=["adamw"], patch_size=None,
        decoder_embed_dim=None, decoder_depth=None, decoder_num_heads=None,
    )  # fmt: skip
    result = bench_step.measure("pretrain", "tiny", args)
    assert freed == [False] * (2 if fails_at == 1 else 3) + [True] * (4 if fails_at == 1 else 3)
    assert result["variants"]["plain"] == {"failed": "out of memory"}
    assert len(result["variants"]["eager"]["seconds"]) == 4


@pytest.mark.parametrize("page", PAGES)
def test_everything_that_a_page_names_is_there(page):
    text = (REPO / page).read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.M)
    for words in commands(page):
        if words[0] == "make":
            assert words[1] in targets, words
        if words[:3] == ["pip", "install", "-r"]:
            assert (REPO / words[3]).is_file(), words
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert target in targets
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (REPO / link).exists(), link
    for file in re.findall(r"`((?:tests|benchmarks|demo|tools|util)/[\w./]+\.\w+)`", text):
        assert (REPO / file).exists(), file
    for _, body in blocks(page, "python"):
        ast.parse(body)


def names_in(words: str) -> list[str]:
    """The paths in `words`, with a/{b,c} taken apart."""
    found = []
    for path in re.findall(r"[\w./*]*{[^}]*}[\w.*]*|[\w./*]+", words):
        head, _, rest = path.partition("{")
        inner, _, tail = rest.partition("}")
        found += [head.rstrip("/") if not rest else head + part + tail for part in inner.split(",")]
    return found


def test_the_tree_has_every_file_and_room():
    """README's tree against the disk: top-level files, modules and rooms of util/, the other folders."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    tree = text.split("## What is where\n\n```\n")[1].split("```")[0]
    tree = re.sub(r"\n +", " ", tree)  # a room with many modules takes two lines
    named = [path for line in tree.splitlines() for path in names_in(line.split()[0])]
    there = {path for place in ("*.py", "util/*.py") for path in REPO.glob(place)}
    there |= {path.parent for place in ("[!.]*/*.py", "util/*/*.py") for path in REPO.glob(place)}
    there -= {REPO / "util", REPO / "util" / "__init__.py"}
    assert sorted(named) == sorted(str(path.relative_to(REPO)) for path in there)
    for line in tree.splitlines():
        room, names = line.split(maxsplit=1)
        if re.fullmatch(r"util/\w+/", room):
            there = sorted(path.stem for path in (REPO / room).glob("*.py"))
            assert sorted(names.split(":")[0].split(", ")) == there, line


def test_the_layers_are_those_of_the_test():
    from test_layers import LAYERS

    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = [names_in(line.split(maxsplit=1)[1]) for line in text.split("```\n")[1].splitlines()]
    places = [path for layer in told for path in layer]
    for layer, rooms in zip(told, LAYERS, strict=True):
        rooms = {room.replace(".", "/") for room in rooms.split()}
        assert {room for room in rooms if not any(Path(room).match(path) for path in layer)} == set(), layer
        assert all(any(Path(room).match(path) for room in rooms) for path in layer), layer
    assert len(places) == len(set(places))


def test_what_uv_installs_is_what_requirements_txt_says():
    """pyproject.toml, uv.lock and requirements.txt name the same packages; the lock, public places."""
    lines = (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = sorted(filter(None, (line.split("#")[0].strip() for line in lines)))
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (REPO / "uv.lock").read_text(encoding="utf-8")
    own = next(package for package in tomllib.loads(text)["package"] if package["name"] == project["name"])
    locked = sorted(entry["name"] + entry["specifier"] for entry in own["metadata"]["requires-dist"])
    assert wanted == sorted(project["dependencies"]) == locked
    assert set(re.findall(r"https?://([^/\"]+)", text)) == {"pypi.org", "files.pythonhosted.org"}
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert f"sys.version_info < ({project['requires-python'].strip('>=').replace('.', ', ')})" in makefile


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize(("target", "name"), [("record", "CELLS"), ("same-losses", "BASE")])
def test_what_a_target_needs_is_said_before_anything_is_set_up(target, name, tmp_path):
    words = ["make", "--no-print-directory", target, f"VENV={tmp_path / 'none'}", "PYTHON=false"]
    result = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 2 and f"make {target}: pass {name}=" in result.stderr and not result.stdout
    assert not (tmp_path / "none").exists()
    result = subprocess.run([*words, "-n", f"{name}=x"], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0 and "-m venv" in result.stdout


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page):
    lines = (REPO / page).read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 100]
    assert page != "README.md" or len(lines) <= 150


def test_flags_that_the_text_names_exist():
    known = set()
    for script in [
        *REPO.glob("*.py"),
        *REPO.glob("util/**/*.py"),
        *REPO.glob("tools/*.py"),
        *REPO.glob("demo/*.py"),
        *REPO.glob("benchmarks/*.py"),
    ]:
        known |= set(re.findall(r"\"(--[a-z][\w-]*)\"", script.read_text(encoding="utf-8")))
    known |= {
        "--help",
        "--nproc_per_node",
        "--logdir",
        "--nnodes",
        "--rdzv_endpoint",
        "--max_restarts",
    }  # argparse's and launchers'
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", (REPO / page).read_text(encoding="utf-8"), flags=re.M | re.S)
        for flag in set(re.findall(r"(?<![\w-])(--[a-z][a-z_]+)", text)):
            assert flag in known, f"{page}: {flag}"


@pytest.mark.slow
@pytest.mark.needs("posix")
def test_marked_blocks_run(tmp_path):
    """In a folder of links to everything here, so that what they write is not left behind."""
    for path in REPO.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    marked = [body for page in PAGES for mark, body in blocks(page, "bash") if mark]
    assert marked
    for body in marked:
        body = re.sub(r"^python ", f"{sys.executable} ", body, flags=re.M)
        result = subprocess.run(
            ["bash", "-e", "-c", body], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "MAE_DEMO_DATA": str(tmp_path / "demo_data")},
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
