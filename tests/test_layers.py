"""The rooms of the house (CONTRIBUTING.md): a module imports its own room and lower layers only."""

import ast
import sys
from pathlib import Path

import pytest
from golden_utils import REPO

LAYERS = [
    "util.console",
    "util.errors util.sizes util.rng util.lr_sched util.lr_decay util.pos_embed util.crop",
    "util.files util.processes",
    "util.cli util.compute",
    "models_mae models_vit util.demo_set util.lars",
    "models_cross models_seg util.data",
    "util.datasets util.weights util.figures tools",
    "util.report util.trackers",
    "util.run util.evaluate util.slurm",
    "engine_pretrain engine_finetune util.recipes util.export util.misc predict demo",
    "main_pretrain main_finetune main_linprobe main_segment main_knn main_evaluate export plan report",
    "submitit_pretrain submitit_finetune submitit_linprobe benchmarks study records",
]
RANKS = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms.split()}
FILES = [
    path.relative_to(REPO)
    for place in ("*.py", "util/**/*.py", "tools/*.py", "demo/*.py", "benchmarks/*.py", "records/*.py")
    for path in sorted(REPO.glob(place))
    if path.name != "__init__.py"
]
STANDARD_LIBRARY_ONLY = [
    "util/errors.py",
    "util/sizes.py",
    "util/files.py",
    "util/console.py",
    "util/processes/signals.py",
]
DOORS = ["util/misc.py", "util/datasets.py"]


def room_of(module: str) -> str | None:
    """The entry of LAYERS that a dotted module belongs to; None for other people's."""
    parts = module.split(".")
    return next((room for n in (2, 1) if (room := ".".join(parts[:n])) in RANKS), None)


def imports(path: Path) -> list[tuple[str, list[str]]]:
    """(module, names) of every import in a file, those inside functions as well."""
    found = []
    for node in ast.walk(ast.parse((REPO / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            deeper = [f"{node.module}.{name}" for name in names]
            found += [(name, []) for name in deeper if node.module == "util"]
            found += [(node.module, names)] if node.module != "util" else []
        elif isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
    return found


def defined(path: Path) -> set[str]:
    """The names that a module makes itself at its top level."""
    found = set()
    for node in ast.walk(ast.parse((REPO / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_import_climbs(path):
    own = room_of(".".join(path.with_suffix("").parts))
    assert own is not None, f"{path} stands in no room of LAYERS"
    for module, names in imports(path):
        room = room_of(module)
        if room is None or room == own:
            continue
        assert RANKS[room] < RANKS[own], f"{path} ({own}) imports {module}"
        private = [name for name in [*names, *module.split(".")] if name.startswith("_")]
        assert not private or module == "__future__", f"{path} imports {private} of another room"


@pytest.mark.parametrize("path", STANDARD_LIBRARY_ONLY)
def test_a_launcher_starts_without_torch(path):
    for module, _ in imports(Path(path)):
        assert module.split(".")[0] in sys.stdlib_module_names or module in ("util.errors", "util.console"), (
            module
        )


def test_only_the_doors_hand_names_on():
    """What a module imports from ours is imported from its home, and only the doors list names."""
    homes = {path: defined(path) for path in FILES}
    for path in FILES:
        assert str(path) in DOORS or "__all__" not in homes[path], path
        for module, names in imports(path):
            home = Path(*module.split(".")).with_suffix(".py")
            if home in homes and str(home) not in DOORS:
                assert not (away := [name for name in names if name not in homes[home]]), f"{path}: {away}"


def test_no_circle_inside_a_room():
    graph = {}
    for path in FILES:
        name = ".".join(path.with_suffix("").parts)
        targets = set()
        for module, names in imports(path):
            targets |= {module, *(f"{module}.{n}" for n in names)}
        graph[name] = targets
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name in done or name not in graph:
            return
        for target in graph[name]:
            visit(target, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_sizes():
    beside = [path for path in FILES if path.parent == Path("util")]
    assert len(beside) <= 12, beside
    for path in FILES:
        if path.parts[0] == "benchmarks":
            continue
        lines = len((REPO / path).read_text(encoding="utf-8").splitlines())
        name = str(path)
        most = 230 if name.startswith("main_") else 110 if name.startswith("engine_") else 265
        assert lines <= most or name == "models_mae.py", f"{path}: {lines} lines"


def test_the_core_stays_small():
    """What `import main_pretrain` loads of ours: imports inside functions are of optional things."""
    found, left = {Path("util/__init__.py")}, [Path("main_pretrain.py")]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        nodes = ast.parse((REPO / path).read_text(encoding="utf-8")).body
        for node in (node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            modules = (
                [node.module, *(f"{node.module}.{n}" for n in names)] if hasattr(node, "module") else names
            )
            paths = (Path(*module.split(".")).with_suffix(".py") for module in modules)
            left += [path for path in paths if (REPO / path).is_file()]
    lines = sum(len((REPO / path).read_text(encoding="utf-8").splitlines()) for path in found)
    assert len(found) <= 44 and lines <= 6500, f"{len(found)} files, {lines} lines"
    assert len(found) > 30  # they were followed


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_text_file_says_its_encoding(path):
    """Else Windows reads and writes cp1252; ruff's rule does not know what `something.read_text()` is of."""
    for node in ast.walk(ast.parse((REPO / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
            assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
