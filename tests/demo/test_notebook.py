"""demo/mae_visualize.ipynb: stored without outputs, parses, and (marked extra) runs from top to bottom."""

import ast
import json

import pytest
from golden_utils import REPO

NOTEBOOK = REPO / "demo/mae_visualize.ipynb"


def code_cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_outputs_are_stripped():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4 and set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"  # every Jupyter has it
    for cell in code_cells():
        assert cell["outputs"] == [] and cell["execution_count"] is None
    for cell in notebook["cells"]:
        assert cell["metadata"] == {} and "attachments" not in cell
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


def test_code_parses_and_uses_only_what_it_defines():
    """Names are read after they are assigned or imported, from top to bottom; imports of ours exist."""
    known = set(dir(__builtins__) if not isinstance(__builtins__, dict) else __builtins__)
    for cell in code_cells():
        for statement in ast.parse("".join(cell["source"])).body:
            names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
            known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
            known |= {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
            known |= {node.name for node in ast.walk(statement) if isinstance(node, ast.FunctionDef)}
            for node in ast.walk(statement):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    known |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
                if isinstance(node, ast.ImportFrom) and node.module.startswith("util"):
                    module = __import__(node.module, fromlist=["x"])
                    assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            unknown = {node.id for node in names if isinstance(node.ctx, ast.Load)} - known
            assert not unknown, f"{ast.unparse(statement)}: {unknown}"


@pytest.mark.extra
def test_runs_from_top_to_bottom(monkeypatch):
    """Trains its own small checkpoint; every picture cell shows a picture."""
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    for name in ("MAE_CHECKPOINT", "MAE_IMAGES"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where).execute()
    shown = {
        cell["id"]: output["data"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "execute_result"
    }
    assert set(shown) == {"ratio", "ratios", "own", "attention"}
    assert all("image/png" in data for data in shown.values())
