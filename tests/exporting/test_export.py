"""Exported files give the outputs of the run's model, on decoded values and without dtrain."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import dtrain
from dtrain.errors import DataNotFound, InvalidConfig, OutputExists, RoundNotFound, UnsuitableModel, UsageError
from dtrain.exporting import export as exporting
from dtrain.exporting.export import ExportedFile, format_names
from tests.exporting import nets
from tests.exporting.cases import CASES

ROOT = Path(__file__).parents[2]
FORMATS = ("safetensors", "pt2", "onnx")
FAST = ("forecast", "several")
"""Cases that are tried in each format; others, outside of the slow tests, in one."""
EVERY = [
    pytest.param(case, to, marks=[] if to == "safetensors" or case in FAST else [pytest.mark.slow])
    for case in CASES
    for to in FORMATS
]
Runs = Callable[[str], dtrain.Run]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A function that gives the run of a case, trained once."""
    known: dict[str, dtrain.Run] = {}

    def run(name: str) -> dtrain.Run:
        if name not in known:
            more = {"average": {"ema": 0.5}} if name == "gaps" else {}
            known[name] = CASES[name].train(tmp_path_factory.mktemp(name), **more)
        return known[name]

    return run


def card(file: ExportedFile) -> str:
    return file.card.read_text(encoding="utf-8")


def without_dtrain(file: ExportedFile, more: str) -> dict[str, Any]:
    """What the lines of the model card give in a process that cannot import dtrain; `more` prints JSON."""
    (block,) = re.findall(r"```python\n(.*?)```", card(file), re.DOTALL)
    blocked = "import sys; sys.modules['dtrain'] = None"
    done = subprocess.run(
        [sys.executable, "-c", f"{blocked}\n{block}\n{more}"],
        cwd=file.path.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


SHAPES = """
import json
all_outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
values = [one.sum().item() for one in all_outputs]
print(json.dumps({"shapes": [list(one.shape) for one in all_outputs], "values": values}))
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("case", "to"), EVERY)
def test_round_trip_and_the_lines_of_the_card(runs: Runs, tmp_path: Path, case: str, to: str) -> None:
    run = runs(case)
    file = run.export(to, tmp_path / f"model.{to}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"model.{to}", f"model.{to}.md"]
    assert file.difference <= {"safetensors": 0.0, "pt2": 1e-6, "onnx": 1e-5}[to]
    assert file.data_difference < 1e-5
    found = without_dtrain(file, SHAPES)
    expected = run.model(*zeros_as_the_model_sees_them(run))
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert found["shapes"] == [[1, *one.shape[1:]] for one in expected]


def zeros_as_the_model_sees_them(run: dtrain.Run) -> list[torch.Tensor]:
    folder = run.directory.parents[1]
    samples = dtrain.open_samples(folder / "data.zarr", **CASES[folder.name[:-1]].samples)
    batch = next(iter(dtrain.batches(samples, split="val", batch_size=1, replicas=2)))
    return [torch.zeros_like(values) for values in batch.inputs]


def test_a_forecast_in_kelvin(runs: Runs, tmp_path: Path) -> None:
    """By hand: what xarray decodes, the numbers of plan.json, the run's model."""
    run = runs("forecast")
    plan = json.loads((run.directory / "plan.json").read_text())["normalize"]["t"]
    mean, std = (np.array(plan[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    assert std.max() / std.min() > 3
    with xr.open_zarr(run.directory.parents[1] / "data.zarr", consolidated=False) as ds:
        t = ds.t.values  # decoded
    windows = np.stack([[t[i - 1], t[i]] for i in (5, 60, 90)]).astype("float32")
    with torch.no_grad():
        outputs = run.model(torch.from_numpy(((windows - mean) / std).astype("float32"))).double().numpy() * std + mean
    file = run.export("pt2", tmp_path / "f.pt2")
    got = torch.export.load(file.path).module()(torch.from_numpy(windows))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.detach().numpy(), outputs, rtol=2e-6)
    assert abs(got.detach().numpy()[0, 0].mean() - 290) < 30
    text = card(file)
    assert "| `t` | sample, window 2, level 3, y 4, x 5 | float32 | rows -1, +0 from the sample's; standardised" in text
    assert "| `t` | sample, level 3, y 4, x 5 | float32 | in the units of the data |" in text


def test_several_inputs_and_outputs(runs: Runs, tmp_path: Path) -> None:
    run = runs("several")
    plan = json.loads((run.directory / "plan.json").read_text())["normalize"]
    file = run.export("safetensors", tmp_path / "s.safetensors")
    x, mask, code = torch.full((1, 6), 103.0), torch.tensor([[1.0, 0, 1, 1, 0, 1]]), torch.tensor([3])
    with torch.no_grad():
        field, scalar = run.model((x - plan["x"]["mean"][0]) / plan["x"]["std"][0], mask, code)
    wanted = [
        (field.double() * plan["x"]["std"][0] + plan["x"]["mean"][0]).sum().item(),
        (scalar.double() * plan["sum"]["std"][0] + plan["sum"]["mean"][0]).sum().item(),
    ]
    text = card(file)
    given = (("x = torch.zeros((1, 6)", "x = torch.full((1, 6), 103.0"), ("mask = torch.zeros((1, 6)", MASK), CODE)
    for old, new in given:
        assert old in text
        text = text.replace(old, new)
    file.card.write_text(text)
    assert without_dtrain(file, SHAPES)["values"] == pytest.approx(wanted, rel=1e-5)


MASK = "mask = torch.tensor([[1.0, 0, 1, 1, 0, 1]]) + 0 * torch.zeros((1, 6)"
CODE = ("code = torch.zeros((1,)", "code = 3 + torch.zeros((1,)")


def test_missing_values_become_zero_after_normalising(runs: Runs, tmp_path: Path) -> None:
    run = runs("gaps")
    file = run.export("pt2", tmp_path / "g.pt2")
    plan = json.loads((run.directory / "plan.json").read_text())["normalize"]
    x = torch.tensor([[1.0, float("nan"), 3, 4, float("inf"), 6]])
    seen = (x.double() - torch.tensor(plan["x"]["mean"])) / torch.tensor(plan["x"]["std"])
    seen[~torch.isfinite(seen)] = 0.0
    with torch.no_grad():
        wanted = run.model(seen.float()).double() * plan["y"]["std"][0] + plan["y"]["mean"][0]
        got = torch.export.load(file.path).module()(x)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert "values that are not finite become 0" in card(file)


def test_the_moving_average_and_other_rounds(runs: Runs, tmp_path: Path) -> None:
    run = runs("gaps")
    x = torch.ones(2, 6)
    outputs = {}
    for name, more in {"last": {}, "first": {"round": 1}, "best": {"round": "best"}, "ema": {"ema": True}}.items():
        file = run.export("pt2", tmp_path / f"{name}.pt2", **more)
        outputs[name] = torch.export.load(file.path).module()(x)[0].item()
    assert len({outputs[name] for name in ("last", "first", "ema")}) == 3
    assert outputs["best"] in (outputs["last"], outputs["first"])
    assert "round 2, the moving average of models" in (tmp_path / "ema.pt2.md").read_text()
    with pytest.raises(RoundNotFound):
        run.export("pt2", tmp_path / "x.pt2", round=7)
    with pytest.raises(InvalidConfig, match=r"has no moving average of models: its average\.ema is 0"):
        runs("cells").export("pt2", tmp_path / "x.pt2", ema=True)
    assert not (tmp_path / "x.pt2").exists()


def test_metadata_and_names(runs: Runs, tmp_path: Path) -> None:
    from safetensors import safe_open

    run = runs("cells")
    file = run.export("safetensors", tmp_path / "c.safetensors")
    with safe_open(file.path, "pt") as opened:
        stored = json.loads(opened.metadata()["dtrain.json"])
        names = set(opened.keys())
    assert {"model.layers.0.weight", "model.layers.1.running_mean", "inputs.0.mean", "inputs.0.std"} <= names
    assert stored["params_sha256"] == run.rows[-1]["params_sha256"]
    assert (stored["run"], stored["round"], stored["model"]) == ("run-1", 2, "tests.exporting.nets:Classes")
    assert stored["model_args"] == {"genes": 12}
    (x,), (kind,) = stored["inputs"], stored["outputs"]
    assert (x["name"], x["dims"], x["shape"], x["dtype"]) == ("X", ["sample", "gene"], [12], "float32")
    assert x["genes"] == run.resolved.genes["X"]
    assert kind["classes"] == ["B cell", "T cell", "other"]
    assert stored["versions"]["torch"] == torch.__version__
    assert "classes: 0 B cell, 1 T cell, 2 other" in card(file)
    program = run.export("pt2", tmp_path / "c.pt2")
    extra = {"dtrain.json": ""}
    torch.export.load(program.path, extra_files=extra)
    assert json.loads(extra["dtrain.json"]) == stored
    import onnx

    graph = onnx.load(run.export("onnx", tmp_path / "c.onnx").path)
    assert json.loads({one.key: one.value for one in graph.metadata_props}["dtrain.json"]) == stored
    assert [one.name for one in graph.graph.input] == ["X"]
    assert [one.name for one in graph.graph.output] == ["obs_kind_output"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("to", FORMATS)
def test_any_number_of_samples_at_once(runs: Runs, tmp_path: Path, to: str) -> None:
    run = runs("cells")
    file = run.export(to, tmp_path / f"m.{to}")
    call = "model(torch.ones((n, 12)))"
    if to == "onnx":
        call = "session.run(None, {'X': np.ones((n, 12), np.float32)})[0]"
    found = without_dtrain(file, f"import json; print(json.dumps([{call}[-1].tolist() for n in (1, 5, 33)]))")
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)


def test_what_a_card_says(runs: Runs, tmp_path: Path) -> None:
    run = runs("cells")
    text = card(run.export("pt2", tmp_path / "m.pt2"))
    row = run.rows[-1]
    for words in (
        f"`params_sha256` of its parameters: `{row['params_sha256']}`",
        "It needs no dtrain.",
        "names of the columns have the digest",
        "| split | val: a share of 0.1; test: a share of 0.1 |",
        "| partition | 2 replicas, stratified |",
        '| `train.loss` | `"cross_entropy"` |',
        f"| torch | {torch.__version__} |",
        "## Metrics of round 2",
        "| val_loss | ",
    ):
        assert words in text
    assert re.search(r"called with \d+ real samples \(val\)", text)


def test_several_stores_that_are_one_and_federated_stores(table: Path, tmp_path: Path) -> None:
    import shutil

    one, two = str(table / "data.zarr"), str(shutil.copytree(table / "data.zarr", tmp_path / "two.zarr"))
    joined = {"path": [one, two], "inputs": ["x"], "targets": ["y"], "normalize": ["x"]}
    federated = {**joined, "path": [{"path": one}, {"path": two, "replicas": 2}]}
    for name, data in {"joined": joined, "federated": federated}.items():
        config = dtrain.TrainConfig(data=data, train={"loss": "mse", "rounds": 1}, run={"dir": str(tmp_path / "runs")})
        run = dtrain.train(nets.linear, config=config, cluster="serial", run=name, progress=False)
        file = run.export("pt2", tmp_path / f"{name}.pt2")
        assert file.data_difference < 1e-6
        assert "| samples | train 1" in card(file)


# What is refused ---------------------------------------------------------------------------------------------------


def test_what_is_there_is_kept(runs: Runs, tmp_path: Path) -> None:
    for name in ("model.pt2", "other.pt2.md"):
        (tmp_path / name).write_text("mine")
    for name, there in (("model.pt2", "model.pt2"), ("other.pt2", "other.pt2.md")):
        with pytest.raises(OutputExists) as caught:
            runs("gaps").export("pt2", tmp_path / name)
        assert caught.value.message == f"{tmp_path / there} exists."
        assert caught.value.code == 4
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.pt2": "mine",
        "other.pt2.md": "mine",
    }


def test_no_such_format_or_directory(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        runs("gaps").export("onxx", tmp_path / "m")
    assert caught.value.message == '--to "onxx": allowed are onnx, pt2, safetensors; did you mean "onnx"?'
    with pytest.raises(UsageError, match="there is no directory"):
        runs("gaps").export("pt2", tmp_path / "no/such/m.pt2")
    assert sorted(format_names()) == sorted(FORMATS)
    with pytest.raises(UsageError) as caught:
        runs("gaps").export("pt2", tmp_path / "m.pt")
    assert caught.value.message == f"--out {tmp_path / 'm.pt'}: the name of a pt2 file ends with .pt2."


def test_a_package_that_is_missing_names_the_extra(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs("gaps")
    monkeypatch.setattr(exporting, "is_installed", lambda name: name != "onnxruntime")
    with pytest.raises(InvalidConfig) as caught:
        run.export("onnx", tmp_path / "m.onnx")
    assert caught.value.message == "--to onnx needs onnxruntime, which is not installed."
    assert caught.value.hint == 'pip install "dtrain[onnx]"'


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the store of the case "gaps", without its missing values."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(3)
    x = rng.normal(size=(100, 6)).astype("float32")
    ds = xr.Dataset({"x": (("n", "f"), x), "y": (("n", "one"), np.ones((100, 1)))})
    ds.to_zarr(folder / "data.zarr", zarr_format=3, consolidated=False)
    return folder


def small(table: Path, model: Any, **samples: Any) -> dtrain.Run:
    opened = dtrain.open_samples(table / "data.zarr", inputs=["x"], targets=["y"], **samples)
    return dtrain.train(
        model,
        opened,
        train={"loss": "mse", "rounds": 1},
        average={"replicas": 1},
        cluster="serial",
        run_dir=table / "runs",
        progress=False,
    )


def test_a_model_that_draws_at_random(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsuitableModel, match="gives other outputs than in the run") as caught:
        small(table, nets.Random).export("pt2", tmp_path / "m.pt2")
    assert caught.value.code == 3
    assert "drawn at random also in eval mode" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_a_model_that_cannot_be_traced(table: Path, tmp_path: Path, to: str) -> None:
    run = small(table, nets.Branches)
    with pytest.raises(UnsuitableModel, match=f"The model cannot be exported to {to}: ") as caught:
        run.export(to, tmp_path / f"m.{to}")
    assert "must not branch on values" in caught.value.hint
    assert len(caught.value.message) < 500
    assert list(tmp_path.iterdir()) == []
    assert run.export("safetensors", tmp_path / "m").difference == 0.0


def test_a_file_that_gives_other_outputs_is_not_kept(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrain.exporting.formats import safetensors

    run, write = runs("gaps"), safetensors.write
    monkeypatch.setattr(safetensors, "write", lambda module, *rest: write(_doubled(module), *rest))
    with pytest.raises(
        UnsuitableModel, match="The safetensors file gives other outputs than the run's model"
    ) as caught:
        run.export("safetensors", tmp_path / "m")
    assert "Nothing was kept" in caught.value.message
    assert list(tmp_path.iterdir()) == []


def _doubled(module: Any) -> Any:
    import copy

    other = copy.deepcopy(module)
    with torch.no_grad():
        next(iter(other.model.parameters())).mul_(2.0)
    return other


def training_only(batch: Any, generator: torch.Generator) -> Any:
    from dataclasses import replace

    return replace(batch, inputs=(batch.inputs[0] * 2,)) if batch.split == "train" else batch


def always(batch: Any, generator: torch.Generator) -> Any:
    from dataclasses import replace

    return replace(batch, inputs=(batch.inputs[0] * 2,))


def test_a_transform_that_leaves_evaluations_alone(table: Path, tmp_path: Path) -> None:
    file = small(table, nets.linear, transform=training_only).export("safetensors", tmp_path / "m")
    assert file.data_difference == 0.0
    with pytest.raises(UnsuitableModel, match="On decoded values the model gives other outputs") as caught:
        small(table, nets.linear, transform=always).export("safetensors", tmp_path / "n")
    assert 'data.transform = "tests.exporting.test_export:always" is not part of the model' in caught.value.hint


def test_data_that_are_gone(table: Path, tmp_path: Path) -> None:
    run = small(table, nets.linear)
    (table / "data.zarr").rename(table / "moved.zarr")
    try:
        with pytest.raises(DataNotFound):
            run.export("safetensors", tmp_path / "m")
    finally:
        (table / "moved.zarr").rename(table / "data.zarr")


def test_a_disk_that_is_full_leaves_nothing(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain.errors import DiskFull

    def rename(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    run = runs("gaps")
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(DiskFull, match="No space left on device"):
        run.export("safetensors", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_files_are_readable_as_the_umask_says(runs: Runs, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for to in ("safetensors", "pt2"):
            file = runs("gaps").export(to, tmp_path / f"m.{to}")
            for path in (file.path, file.card):
                assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_large_parameters_of_onnx_lie_in_a_second_file(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrain.exporting.formats import onnx

    monkeypatch.setattr(onnx, "MOST_BYTES", 10)
    file = runs("cells").export("onnx", tmp_path / "m.onnx")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["m.onnx", "m.onnx.data", "m.onnx.md"]
    assert file.nbytes == sum((tmp_path / name).stat().st_size for name in names[:2])
    assert without_dtrain(file, SHAPES)["shapes"] == [[1, 3]]
