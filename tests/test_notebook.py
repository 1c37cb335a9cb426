"""The notebook runs from top to bottom, and is kept without its outputs."""

import json

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "examples" / "look.ipynb"


def test_the_notebook_is_kept_without_outputs():
    """They would tell of a demo model that is replaced now and then."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs_and_its_results_show_themselves(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [dict(output.get("data", {})) for output in outputs]
    assert sum("Granularity" in data.get("text/html", "") for data in shown) == 3  # an answer, a view, an explanation
    assert sum("image/png" in data for data in shown) == 3  # the picture, its explanation, accuracy against tokens
    assert sum("|" in data.get("text/markdown", "") for data in shown) == 2
