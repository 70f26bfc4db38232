"""Each example notebook runs from its first to its last cell in the kernel that it names."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from dspex_kernels.kernel.notebook.display import JSON_TYPE

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
RICH = {"text/plain", "text/html", JSON_TYPE}


def test_there_are_three_notebooks():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_first_steps",
        "02_two_users_one_program_id",
        "03_from_notebook_to_program",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "dspex"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_its_predictions_as_tables(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=90, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    results = [output.data for output in outputs if output.output_type == "execute_result"]
    predictions = [data for data in results if data["text/plain"].startswith("Prediction(")]
    assert predictions
    for data in predictions:
        assert data.keys() >= RICH
        assert data[JSON_TYPE]
        assert all(name in data["text/html"] for name in data[JSON_TYPE])
