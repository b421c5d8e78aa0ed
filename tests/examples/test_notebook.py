"""The notebook runs from its first cell to its last, in its short form."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from safegene_trl import SafetyVector
from safegene_trl.checkpoints.contents import MARKER


ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_the_notebook_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEGENE_SHORT", "1")
    monkeypatch.setenv("SAFEGENE_OUT", str(tmp_path / "out"))
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources=folder).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )
    names = [line.split()[0] for line in printed.splitlines() if "%–" in line]
    assert names == ["aligned", "fine-tuned", "safeguarded"]
    vector = SafetyVector.from_pretrained(ROOT / "recipes" / "smollm2-135m" / "safety-vector")
    assert f"{len(vector.deltas) * 3} coefficients" in printed
    assert (tmp_path / "out" / "safeguarded" / MARKER).is_file()


def test_the_notebook_is_committed_without_outputs(notebook):
    """What a run printed belongs to that run; nobody could check it here."""
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


def test_the_first_cell_says_where_it_has_to_be(notebook, tmp_path, monkeypatch):
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="clone it here"):
        exec(first.source, {})
    monkeypatch.chdir(ROOT / "examples")
    found = {}
    exec(first.source, found)
    assert found["root"] == ROOT
