"""The notebooks run from beginning to end, as they lie there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.mark.parametrize("name", sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")))
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("matplotlib")
    pytest.importorskip("ipykernel")
    # As in Jupyter, whatever tests before this one asked of matplotlib.
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    for recipe in NOTEBOOKS.glob("*.toml"):
        shutil.copy(recipe, tmp_path)
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    # How a cell's text is cut into outputs depends on timing; which cells say something does not.
    kept = [bool(cell.get("outputs")) for cell in notebook.cells]
    # On a busy machine outputs arrive late; those that came after four seconds would be lost without a word.
    client.NotebookClient(
        notebook, timeout=600, iopub_timeout=120, raise_on_iopub_timeout=True,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()  # fmt: skip
    assert [bool(cell.get("outputs")) for cell in notebook.cells] == kept


@pytest.mark.parametrize("name", sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")))
def test_a_notebook_can_be_read_where_it_is_not_run(name: str) -> None:
    import json

    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    figures = [o for c in notebook["cells"] for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert figures
    assert 10 <= len(notebook["cells"]) <= 15
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 200_000
