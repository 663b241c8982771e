"""In a real kernel: the notebook of the examples, and Interrupt Kernel."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import _write_store

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parents[2]
CELL_SECONDS = 200


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that executes a cell in a kernel whose working directory is new; it returns the outputs."""
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of the kernel's own packages
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path), startup_timeout=120)
    yield _Kernel(manager, client)
    client.stop_channels()
    manager.shutdown_kernel(now=True)


class _Kernel:
    def __init__(self, manager: Any, client: Any) -> None:
        self.manager, self.client = manager, client

    def run(self, code: str, watch: Callable[[dict[str, Any]], None] = lambda message: None) -> list[dict[str, Any]]:
        """Execute a cell; return the contents of its messages but those of its state."""
        wanted, outputs = self.client.execute(code), []
        end = time.monotonic() + CELL_SECONDS
        while time.monotonic() < end:
            message = self.client.get_iopub_msg(timeout=CELL_SECONDS)
            if message["parent_header"].get("msg_id") != wanted:
                continue
            watch(message)
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return outputs
            if message["msg_type"] not in ("status", "execute_input"):
                outputs.append({"type": message["msg_type"], **message["content"]})
        raise AssertionError(f"the cell has not ended within {CELL_SECONDS} s")


def test_the_notebook_of_the_examples_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # it is kept without them
    dtrain = Path(sys.executable).parent / "dtrain"
    subprocess.run(
        [dtrain, "init", "digits", "--template", "digits"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL
    )
    options = {"timeout": CELL_SECONDS, "kernel_name": "python3", "resources": {"metadata": {"path": str(tmp_path)}}}
    nbclient.NotebookClient(notebook, **options).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    html = " ".join(output["data"].get("text/html", "") for output in outputs if "data" in output)
    for shown in ("dtrain.Samples", "dtrain.Plan", "done (rounds): 12 rounds", "xarray.History", "dtrain.Partitions"):
        assert shown in html
    assert "xarray.Dataset" in html  # the predictions
    assert "<script" not in html.replace("<script>", "", html.count("xarray.History") + html.count("xarray.Dataset"))
    text = "".join(output.get("text", "") for output in outputs)
    assert "image/c/7/0/0" in text.splitlines()[0]  # the chunk whose labels are wrong
    figures = [line for line in text.splitlines() if line.startswith(("damaged", "repaired"))]
    damaged, repaired = (float(line.partition("'accuracy': ")[2].rstrip("}")) for line in figures)
    assert 0.85 < damaged < repaired
    assert "least certain: rows [" in text


CELL = """
import dtrain
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

samples = dtrain.open_samples("blobs.zarr", inputs=["x"], targets=["y"])
table = dict(loss="cross_entropy", rounds=100000, batch_size=8, eval_every=1)
"""


@pytest.mark.parametrize("cluster", ["local", pytest.param("serial", marks=pytest.mark.slow)])
def test_an_interrupt_says_two_lines_and_the_kernel_goes_on(kernel: _Kernel, tmp_path: Path, cluster: str) -> None:
    import numpy as np

    rng = np.random.default_rng(3)
    arrays = {"x": {"dims": ("n", "f"), "values": rng.normal(size=(600, 6)), "chunks": (40, 6)}}
    arrays["y"] = {"dims": ("n",), "values": rng.integers(0, 3, 600).astype("int32"), "chunks": (40,)}
    _write_store(tmp_path / "blobs.zarr", arrays)
    assert kernel.run(CELL) == []
    shown: list[str] = []
    interrupted: list[bool] = []

    def watch(message: dict[str, Any]) -> None:
        if message["msg_type"] in ("display_data", "update_display_data"):
            shown.append(message["content"]["data"]["text/plain"])
            if not interrupted and "train_loss" in shown[-1]:
                interrupted.append(True)
                time.sleep(1.0)
                kernel.manager.interrupt_kernel()

    train = f"dtrain.train(build, samples, train=table, average=dict(replicas=2), cluster={cluster!r})"
    outputs = kernel.run(train, watch)
    (display,) = [output for output in outputs if output["type"] == "display_data"]  # one output, which is updated
    assert display["transient"]["display_id"]
    assert set(display["data"]) == {"text/html", "text/plain"}
    (error,) = [output for output in outputs if output["type"] == "error"]
    assert len(error["traceback"]) == 2
    assert error["traceback"][0].startswith("Interrupted: runs/run-1 keeps round ")
    assert "dtrain.train(..., run='run-1'). Look at it: dtrain.last_run()" in error["traceback"][1]
    assert "stopped" in shown[-1]
    assert [output for output in outputs if output["type"] == "stream"] == []
    after = kernel.run("run = dtrain.last_run(); print(len(run.rows) > 0, run.model is not None)")
    assert "True True\n" in [output["text"] for output in after]  # perhaps beside a sentence: another round is the best
    open_clusters = (
        "from distributed.deploy.spec import SpecCluster; "
        "print([c.name for c in SpecCluster._instances if c.status.name != 'closed'])"
    )
    assert kernel.run(open_clusters)[-1]["text"] == "[]\n"
    again = kernel.run(
        "more = dict(table, rounds=len(run.rows) + 2); " + train.replace("table", "more")[:-1] + ", run='run-1')"
    )
    assert [output for output in again if output["type"] == "error"] == []
