"""The notebooks: no outputs are stored, and figures are shown as pictures when they run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_stored(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_figures_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`make notebooks` installs what this needs."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS[0].parents[1]), prepend=os.pathsep)
    text = next(path for path in NOTEBOOKS if path.stem == "quickstart").read_text(encoding="utf-8")
    notebook = nbformat.reads(text.replace("max_epochs=8", "max_epochs=1"), as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [(cell.source, output) for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [source.split("\n")[-1] for source, output in outputs if "image/png" in output.get("data", {})]
    assert shown == ["monitor.figure()", "report.plot()"]
