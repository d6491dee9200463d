"""The notebook runs from top to bottom: in Jupyter where nbclient is installed, else cell by cell."""

import contextlib
import importlib.util
import io
import json
import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parent.parent / "examples" / "first_try.ipynb"
JUPYTER = all(importlib.util.find_spec(name) for name in ("nbclient", "nbformat", "ipykernel"))


def printed_by_jupyter(monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(FILE.parents[1]), os.environ.get("PYTHONPATH", "")])
    )
    notebook = nbformat.read(FILE, as_version=4)
    resources = {"metadata": {"path": str(FILE.parent)}}
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def printed_by_cells(monkeypatch):
    shown = ModuleType("IPython.display")
    shown.Video = lambda *_given, **named: named  # what a notebook would show
    for name, module in {"IPython": ModuleType("IPython"), "IPython.display": shown}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(FILE.parent)
    names: dict = {}
    out = io.StringIO()
    for cell in json.loads(FILE.read_text())["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(out):
                exec("".join(cell["source"]), names)
    return out.getvalue()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    begun = time.process_time()
    text = (printed_by_jupyter if JUPYTER else printed_by_cells)(monkeypatch)
    assert time.process_time() - begun < 180
    distances = [float(found) for found in re.findall(r"path is ([\d.]+) px", text)]
    transferred, without, _loose = distances
    assert transferred < without / 2
    assert "28 words: a, an, the" in text


def test_the_notebook_holds_no_outputs():
    cells = json.loads(FILE.read_text())["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
