"""dtrain init --data: whatever plain Zarr group people have, `plan` and `train` accept what is written for it."""

from __future__ import annotations

import json
import tomllib
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from numcodecs import Zstd

from tests.cli.helpers import last, tree
from tests.foreign import STORES, anything, cells, climate, nuclei, table, tokens, write

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype("float32")


def whole(high: int, *shape: int, dtype: str = "int64") -> np.ndarray:
    return RNG.integers(0, high, shape).astype(dtype)


def dates(count: int) -> np.ndarray:
    return np.datetime64("2020-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D")


def with_nan(values: np.ndarray, share: float = 0.3) -> np.ndarray:
    return np.where(RNG.random(values.shape) < share, np.nan, values)


def texts(count: int) -> np.ndarray:
    return np.array([["a", "b"][i % 2] for i in range(count)], dtype=object)


@dataclass(frozen=True)
class Layout:
    """Variables of a store, and what is written for it."""

    variables: dict[str, Any]
    inputs: list[str]
    target: str
    loss: str = "mse"
    data: dict[str, Any] = field(default_factory=dict)
    """Keys of [data] beside path, inputs and targets."""
    outputs: Any = None
    """model_args.outputs, or model_args.classes where the model convolves."""
    coords: dict[str, Any] = field(default_factory=dict)
    encoding: dict[str, Any] = field(default_factory=dict)


STEP = {"input_offsets": [-1, 0], "target_offsets": 1}
WEEK = {"input_offsets": {"start": -7, "stop": 1}, "target_offsets": 1}
TIME = {"sample_dim": "time"}
IMAGE, YX = ("n", "y", "x"), (16, 16)

FORECASTS = {
    "time last": Layout(
        {"tas": (("lon", "lat", "time"), 280 + normal(12, 10, 60))},
        ["tas"],
        "tas",
        data={**TIME, **STEP, "normalize": ["tas"]},
        coords={"time": dates(60)},
    ),
    "levels": Layout(
        {
            "t": (("time", "level", "lat", "lon"), normal(40, 4, 8, 8)),
            "u": (("level", "time", "lat", "lon"), normal(4, 40, 8, 8)),
        },
        ["t", "u"],
        "t",
        data={**TIME, **STEP, "normalize": {"t": ["level"], "u": ["level"]}},
        coords={"time": dates(40)},
    ),
    "static maps and series": Layout(
        {
            "t2m": (("time", "lat", "lon"), normal(50, 8, 8)),
            "co2": (("time",), normal(50)),
            "orography": (("lat", "lon"), 1000 * normal(8, 8) ** 2),
            "lsm": (("lat", "lon"), RNG.random((8, 8)).astype("float32")),
            "quality_flag": (("time", "lat", "lon"), whole(3, 50, 8, 8, dtype="int8")),
        },
        ["t2m", "lsm", "orography"],
        "t2m",
        data={**TIME, **STEP, "normalize": ["t2m", "orography"]},
        coords={"time": dates(50)},
    ),
    "NaN over land": Layout(
        {"sst": (("time", "y", "x"), with_nan(normal(60, 9, 11)))},
        ["sst"],
        "sst",
        "model:mse",
        data={**TIME, **STEP, "normalize": ["sst"], "non_finite": "allow"},
        coords={"time": dates(60), "lat": (("y", "x"), normal(9, 11)), "lon": (("y", "x"), normal(9, 11))},
    ),
    "unstructured": Layout(
        {"t2m": (("time", "ncells"), normal(50, 200))},
        ["t2m"],
        "t2m",
        data={**TIME, **STEP, "normalize": ["t2m"]},
        coords={"time": dates(50)},
    ),
    "few steps": Layout(
        {"t": (("time", "lat", "lon"), normal(8, 8, 8))},
        ["t"],
        "t",
        data={
            **TIME,
            "input_offsets": 0,
            "target_offsets": 1,
            "normalize": ["t"],
            "split": {"val": 0.2, "test": 0.2},
        },
        coords={"time": dates(8)},
    ),
    "large maps": Layout(
        {"t": (("time", "lat", "lon"), normal(40, 70, 150))},
        ["t"],
        "t",
        data={**TIME, **STEP, "patch": {"lon": 64}, "normalize": ["t"]},
        coords={"time": dates(40)},
    ),
    "images over time": Layout(
        {"m": (("t", "c", "y", "x"), whole(255, 60, 2, 20, 20, dtype="uint8"))},
        ["m"],
        "m",
        data={"sample_dim": "t", **STEP, "normalize": {"m": ["c"]}},
    ),
    "lead times": Layout(
        {"t2m": (("time", "lead_time", "lat", "lon"), normal(40, 5, 8, 9))},
        ["t2m"],
        "t2m",
        data={**TIME, **STEP, "normalize": ["t2m"]},
        coords={"time": dates(40), "lead_time": np.arange(5)},
    ),
    "one series": Layout(
        {"flow": (("time",), normal(200))}, ["flow"], "flow", data={**TIME, **WEEK}, coords={"time": dates(200)}
    ),
    "stations": Layout(
        {"temp": (("time", "station"), 20 + normal(100, 7)), "hum": (("station", "time"), normal(7, 100))},
        ["temp", "hum"],
        "temp",
        data={**TIME, **WEEK, "normalize": {"temp": ["station"]}},
        coords={"time": dates(100)},
    ),
}
IMAGES = {
    "classes of images": Layout(
        {"image": (("n", "y", "x", "c"), whole(255, 60, *YX, 3, dtype="uint8")), "label": (("n",), whole(4, 60))},
        ["image"],
        "label",
        "cross_entropy",
        data={"normalize": {"image": ["c"]}},
        outputs=4,
    ),
    "samples last": Layout(
        {"image": (("y", "x", "n"), normal(*YX, 60)), "label": (("n",), whole(4, 60)), "age": (("n",), normal(60))},
        ["image"],
        "label",
        "cross_entropy",
        outputs=4,
    ),
    "a number of images": Layout(
        {"image": (IMAGE, normal(60, *YX)), "target": (("n",), 100 * normal(60))},
        ["image"],
        "target",
        data={"normalize": ["target"]},
        outputs=0,
    ),
    "masks of 0 and 255, channels": Layout(
        {
            "image": (("n", "c", "y", "x"), whole(6000, 40, 2, *YX, dtype="uint16")),
            "mask": (IMAGE, 255 * whole(2, 40, *YX, dtype="uint8")),
        },
        ["image"],
        "mask",
        "cross_entropy",
        data={"normalize": {"image": ["c"]}, "transform": "model:foreground"},
        outputs=2,
    ),
    "numbered objects": Layout(
        {"raw": (IMAGE, normal(40, *YX)), "instances": (IMAGE, whole(900, 40, *YX, dtype="int32"))},
        ["raw"],
        "instances",
        "cross_entropy",
        data={"transform": "model:foreground"},
        outputs=2,
    ),
    "masks with an axis of their own": Layout(
        {"image": (IMAGE, normal(40, *YX)), "mask": (("n", "y", "x", "one"), whole(3, 40, *YX, 1, dtype="uint8"))},
        ["image"],
        "mask",
        "cross_entropy",
        outputs=3,
    ),
    "as many classes as pixels": Layout(
        {"image": (IMAGE, normal(40, 8, 8)), "mask": (IMAGE, whole(8, 40, 8, 8, dtype="uint8"))},
        ["image"],
        "mask",
        "cross_entropy",
        outputs=8,
    ),
    "a fill value in the mask": Layout(
        {"image": (IMAGE, normal(40, *YX)), "mask": (IMAGE, whole(4, 40, *YX, dtype="uint8"))},
        ["image"],
        "mask",
        "cross_entropy",
        encoding={"mask": {"_FillValue": 3}},
        outputs=3,
    ),
    "no names that help": Layout(
        {
            "a": (("dim_0", "dim_1", "dim_2"), whole(60000, 40, *YX, dtype="uint16")),
            "b": (("dim_0", "dim_1", "dim_2"), whole(3, 40, *YX, dtype="int32")),
        },
        ["a"],
        "b",
        "cross_entropy",
        data={"normalize": ["a"]},
        outputs=3,
    ),
    "volumes": Layout(
        {"vol": (("n", "z", "y", "x"), normal(20, 8, *YX)), "labels": (("n", "z", "y", "x"), whole(3, 20, 8, *YX))},
        ["vol"],
        "labels",
        "cross_entropy",
        outputs=3,
    ),
    "one large image": Layout(
        {
            "rgb": (("band", "y", "x"), whole(255, 3, 64, 70, dtype="uint8")),
            "landcover": (("y", "x"), whole(5, 64, 70, dtype="uint8")),
        },
        ["rgb"],
        "landcover",
        "cross_entropy",
        data={
            "sample_dim": "y",
            "input_offsets": {"start": -3, "stop": 4},
            "target_offsets": 0,
            "normalize": {"rgb": ["band"]},
            "split": {"val": 0.2, "test": 0.2},
        },
        outputs=5,
    ),
    "maps of one time": Layout(
        {"elevation": (("time", "lat", "lon"), normal(1, 40, 50)), "rain": (("time", "lat", "lon"), normal(1, 40, 50))},
        ["elevation"],
        "rain",
        data={
            "sample_dim": "lat",
            "input_offsets": {"start": -2, "stop": 3},
            "target_offsets": 0,
            "split": {"val": 0.2, "test": 0.2},
        },
        coords={"time": dates(1)},
    ),
    "colours last, no names": Layout(
        {
            "a": (("dim_0", "dim_1", "dim_2", "dim_3"), normal(40, *YX, 3)),
            "b": (("dim_0",), whole(3, 40, dtype="int32")),
        },
        ["a"],
        "b",
        "cross_entropy",
        outputs=3,
    ),
    "images and one mask of all": Layout(
        {"image": (IMAGE, normal(40, *YX)), "mask": (("y", "x"), whole(2, *YX, dtype="uint8"))},
        ["image"],
        "image",
        outputs=[16, 16],
    ),
    "images alone": Layout(
        {"image": (IMAGE, whole(255, 40, *YX, dtype="uint8"))},
        ["image"],
        "image",
        data={"normalize": ["image"]},
        outputs=[16, 16],
    ),
}
TABLES = {
    "a class and two scales": Layout(
        {"a": (("n",), normal(200)), "b": (("n",), 1e6 * normal(200)), "y": (("n",), whole(3, 200))},
        ["a", "b"],
        "y",
        "cross_entropy",
        data={"normalize": ["b"]},
        outputs=[3],
    ),
    "hundreds of columns": Layout(
        {f"col {i}": (("row",), normal(100)) for i in range(120)},
        [f"col {i}" for i in range(119)],
        "col 119",
        outputs=[],
    ),
    "counts": Layout(
        {"x": (("n",), normal(100)), "label": (("n",), whole(3_000_000, 100))},
        ["x"],
        "label",
        data={"normalize": ["label"]},
        outputs=[],
    ),
    "cells last, codes with -1": Layout(
        {
            "X": (("gene", "cell"), 9 + normal(30, 100)),
            "cell_type": (("cell",), texts(100)),
            "cell_type_codes": (("cell",), whole(4, 100, dtype="int8") - 1),
        },
        ["X"],
        "cell_type_codes",
        "cross_entropy",
        data={"normalize": {"X": ["gene"]}, "transform": "model:classes"},
        outputs=[3],
    ),
    "a label with a fill value": Layout(
        {"x": (("n", "k"), normal(60, 3)), "label": (("n",), whole(4, 60, dtype="int16"))},
        ["x"],
        "label",
        "cross_entropy",
        encoding={"label": {"_FillValue": 3}},
        outputs=[3],
    ),
    "NaN in the target": Layout(
        {"x": (("n", "k"), normal(100, 4)), "y": (("n",), with_nan(normal(100)))},
        ["x"],
        "y",
        "model:mse",
        data={"normalize": ["y"], "non_finite": "allow"},
        outputs=[],
    ),
    "infinite values": Layout(
        {"x": (("n", "k"), np.where(RNG.random((100, 4)) < 0.1, np.inf, normal(100, 4))), "y": (("n",), normal(100))},
        ["x"],
        "y",
        data={"non_finite": "allow"},
        outputs=[],
    ),
    "complex, dates and row numbers": Layout(
        {
            "signal": (("n", "k"), normal(60, 4) + 1j),
            "when": (("n",), dates(60)),
            "id": (("n",), np.arange(60)),
            "x": (("n", "k"), normal(60, 4)),
            "y": (("n",), normal(60)),
        },
        ["x"],
        "y",
        outputs=[],
    ),
    "hashes beyond int64": Layout(
        {
            "h": (("n",), 2**63 + np.arange(60, dtype="uint64") ** 9),
            "x": (("n",), normal(60)),
            "y": (("n",), normal(60)),
        },
        ["h", "x"],
        "y",
        data={"normalize": ["h"]},
        outputs=[],
    ),
    "labels as strings alone": Layout(
        {"X": (("cell", "gene"), normal(40, 8)), "cell_type": (("cell",), texts(40))}, ["X"], "X", outputs=[8]
    ),
    "a matrix alone": Layout(
        {"X": (("cell", "gene"), normal(100, 30)), "gene_mean": (("gene",), normal(30))}, ["X"], "X", outputs=[30]
    ),
    "three rows": Layout(
        {"x": (("n", "k"), normal(3, 3)), "y": (("n",), 1 + np.arange(3) % 2)},
        ["x"],
        "y",
        "cross_entropy",
        data={"split": {"val": 0.3, "test": 0.0}},
        outputs=[3],
    ),
    "strange names": Layout(
        {"2m temp.": (("n", "k k"), 9 + normal(60, 3)), 'Größe "x"': (("n",), normal(60))},
        ["2m temp."],
        'Größe "x"',
        data={"normalize": {"2m temp.": ["k k"]}},
        outputs=[],
    ),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("layout", [*FORECASTS, *IMAGES, *TABLES])
def test_a_layout_is_recognised_and_trains(cli: Any, tmp_path: Path, layout: str) -> None:
    wanted = {**FORECASTS, **IMAGES, **TABLES}[layout]
    write(xr.Dataset(wanted.variables, wanted.coords), tmp_path / "s.zarr", wanted.encoding)
    written = written_for(cli, "s.zarr")
    assert (written["data"]["inputs"], written["data"]["targets"]) == (wanted.inputs, [wanted.target])
    assert written["train"]["loss"] == wanted.loss
    data = {key: value for key, value in written["data"].items() if key not in ("path", "inputs", "targets")}
    if wanted.encoding:  # a marked class is a float or an integer
        data = {key: value for key, value in data.items() if key not in ("transform", "non_finite")}
    assert data == wanted.data
    args = written["model_args"]
    if wanted.outputs is not None:
        assert args["outputs" if "outputs" in args else "classes"] == wanted.outputs
    accepted(cli)


def written_for(cli: Any, path: Any, *more: str) -> dict[str, Any]:
    outcome = cli("init", "job", "--data", path, *more)
    assert outcome.code == 0, outcome.err
    text = Path("job/dtrain.toml").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 100
    assert cli("config", "show", "job/dtrain.toml").code == 0
    return tomllib.loads(text)


def accepted(cli: Any, *more: str) -> None:
    for command in (["plan"], ["train", "--set", "train.rounds=1"]):
        outcome = cli("-q", command[0], "job/dtrain.toml", "--scheduler", "serial", *command[1:], *more)
        assert outcome.code == 0, outcome.err


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 120))])
def test_any_store_is_planned_or_refused(cli: Any, tmp_path: Path, seed: int) -> None:
    anything(tmp_path / "s.zarr", seed)
    outcome = cli("init", "job", "--data", "s.zarr")
    if outcome.code:
        assert outcome.code in (2, 3, 5)
        assert 2 <= outcome.err.count("\n") <= 4, outcome.err
    else:
        planned = cli("-q", "plan", "job/dtrain.toml", "--scheduler", "serial")
        # a chunk of NaN that is missing stops training, and the plan if its batch needs it
        assert planned.code in ((0, 5) if "warning: chunk" in outcome.err else (0,)), planned.err


# Zarr formats and writers -----------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("options", [{"zarr_format": 2}, {"consolidated": False}], ids=["v2", "unconsolidated"])
def test_both_formats_say_the_same(cli: Any, tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    STORES[kind](tmp_path / "usual.zarr")
    usual = written_for(cli, "usual.zarr")
    Path("job").rename("usual")
    STORES[kind](tmp_path / "s.zarr", **options)
    written = written_for(cli, "s.zarr")
    usual["data"]["path"] = written["data"]["path"]
    assert written == usual
    accepted(cli)


def test_variables_kept_as_coordinates_are_targets_and_no_inputs(cli: Any, tmp_path: Path) -> None:
    cells(tmp_path / "s.zarr", as_coords=True)
    written = written_for(cli, "s.zarr")
    assert (written["data"]["inputs"], written["data"]["targets"]) == (["X"], ["cell_type_code"])
    accepted(cli)


def test_bounds_and_coordinates_of_climate_are_left_out(cli: Any, tmp_path: Path) -> None:
    climate(tmp_path / "s.zarr")
    outcome = cli("init", "job", "--data", "s.zarr")
    assert "left out: crs (no dimensions), expver (strings), time_bnds (bounds)" in outcome.err
    written = tomllib.loads(Path("job/dtrain.toml").read_text())["data"]
    assert written["inputs"] == ["t2m", "lsm", "z"]
    assert written["normalize"] == {"t2m": [], "z": ["level"]}  # the packed field is a number


def test_a_group_below_the_root(cli: Any, tmp_path: Path) -> None:
    write(xr.Dataset({"x": (("n", "k"), normal(60, 3)), "y": (("n",), normal(60))}), tmp_path / "s.zarr", group="a/b")
    assert written_for(cli, "s.zarr")["data"]["group"] == "a/b"
    accepted(cli)


def test_an_array_named_as_its_dimension(cli: Any, tmp_path: Path) -> None:
    write(xr.Dataset({"tokens": (("tokens",), np.repeat(whole(50, 500), 4))}), tmp_path / "s.zarr")
    assert written_for(cli, "s.zarr")["data"]["sample_dim"] == "tokens"
    accepted(cli)


# Text -------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("dtype", "length", "context", "vocabulary"),
    [("uint8", 6000, 128, 256), ("uint16", 6000, 128, 300), ("int32", 1000, 16, 300), ("int64", 400, 8, 300)],
)
def test_tokens(cli: Any, tmp_path: Path, dtype: str, length: int, context: int, vocabulary: int) -> None:
    numbers = np.arange(length) % (300 if dtype != "uint8" else 200)
    write(xr.Dataset({"tokens": (("position",), numbers.astype(dtype))}), tmp_path / "s.zarr")
    written = written_for(cli, "s.zarr")
    assert written["model_args"] == {"vocabulary": vocabulary, "context": context}
    assert written["data"]["stride"] == context
    accepted(cli)


def test_the_number_of_tokens_of_a_large_store_is_rounded_up_or_stated(cli: Any, tmp_path: Path) -> None:
    numbers = (np.arange(600 * 100) % 300).astype("uint16")
    arrays = xr.Dataset({"tokens": (("position",), numbers)})
    write(arrays, tmp_path / "s.zarr", {"tokens": {"chunks": (100,)}})
    assert written_for(cli, "s.zarr")["model_args"]["vocabulary"] == 1024
    arrays.tokens.attrs["vocab_size"] = 512
    write(arrays, tmp_path / "t.zarr", {"tokens": {"chunks": (100,)}})
    Path("job").rename("first")
    assert written_for(cli, "t.zarr")["model_args"]["vocabulary"] == 512


def test_texts_of_one_length_and_as_many_tokens_as_positions(cli: Any, tmp_path: Path) -> None:
    ids = {"input_ids": (("n", "pos"), whole(90, 60, 32)), "attention_mask": (("n", "pos"), whole(2, 60, 32))}
    write(xr.Dataset(ids), tmp_path / "s.zarr")
    assert written_for(cli, "s.zarr")["train"]["loss"] == "model:next_token"
    accepted(cli)
    write(xr.Dataset({"tokens": (("i",), np.arange(20_000) % 128)}), tmp_path / "t.zarr")
    Path("job").rename("first")
    assert written_for(cli, "t.zarr")["train"]["class_axis"] == -1
    accepted(cli)


def test_a_token_beyond_the_vocabulary_is_named(cli: Any, tmp_path: Path) -> None:
    tokens(tmp_path / "s.zarr")
    written_for(cli, "s.zarr")
    outcome = cli("plan", "job/dtrain.toml", "--scheduler", "serial", "--set", "model_args.vocabulary=200")
    assert outcome.code == 3
    assert "raise model_args.vocabulary, now 200" in outcome.err


# A change of what was guessed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "inputs", "said", "cure"),
    [
        (table, '["age", "height"]', "write features = 2 in [model_args]", ["model_args.features=2"]),
        (climate, '["t2m", "lsm"]', "samples have the shapes [2, 12, 16], [12, 16]: name their axes", []),
        (climate, '["t2m", "z", "lsm"]', "name their axes in inputs", []),
        (nuclei, '["image", "image"]', "name their axes in inputs", []),
    ],
)
def test_other_inputs_need_another_model_and_plan_says_which(
    cli: Any, tmp_path: Path, kind: Any, inputs: str, said: str, cure: list[str]
) -> None:
    kind(tmp_path / "s.zarr")
    written_for(cli, "s.zarr")
    plan = ("plan", "job/dtrain.toml", "--scheduler", "serial", "--set", f"data.inputs={inputs}")
    plan = (*plan, "--set", "data.normalize=[]")
    outcome = cli(*plan)
    assert outcome.code == 3
    assert said in outcome.err
    if cure:
        assert cli(*plan, "--set", *cure).code == 0


def test_another_number_of_channels_is_said(cli: Any, tmp_path: Path) -> None:
    climate(tmp_path / "s.zarr")
    written_for(cli, "s.zarr")
    outcome = cli("plan", "job/dtrain.toml", "--scheduler", "serial", "--set", "data.isel={level={stop=2}}")
    assert outcome.code == 3
    assert "a place has 7 values: write channels = 7 in [model_args]" in outcome.err


# Chunks that are not stored ---------------------------------------------------------------------------------


def test_masks_whose_empty_chunks_are_left_out(cli: Any, tmp_path: Path) -> None:
    nuclei(tmp_path / "s.zarr")
    assert written_for(cli, "s.zarr")["data"]["missing"] == "auto"
    assert "10 of 40 of mask" in Path("job/dtrain.toml").read_text()
    accepted(cli)


def test_images_whose_empty_chunks_are_left_out_are_filled_with_zeros(cli: Any, tmp_path: Path) -> None:
    nuclei(tmp_path / "s.zarr")
    chunks = sorted((tmp_path / "s.zarr" / "image" / "c").rglob("*"))
    next(chunk for chunk in chunks if chunk.is_file()).unlink()
    assert written_for(cli, "s.zarr")["data"]["missing"] == "fill"
    assert "1 of" in Path("job/dtrain.toml").read_text()
    accepted(cli)


@pytest.mark.parametrize(("kind", "chunk"), [("climate", "t2m/c/2/0/0"), ("cells", "X/c/1/0")])
def test_a_lost_chunk_is_named_and_refused_by_training(cli: Any, tmp_path: Path, kind: str, chunk: str) -> None:
    (STORES[kind](tmp_path / "s.zarr") / chunk).unlink()
    outcome = cli("init", "job", "--data", "s.zarr")
    assert outcome.code == 0
    assert f"warning: chunk {chunk} of {chunk.partition('/')[0]} is missing: dtrain refuses that" in outcome.err
    assert "missing" not in tomllib.loads(Path("job/dtrain.toml").read_text())["data"]
    trained = cli("train", "job/dtrain.toml", "--scheduler", "serial", "--set", "train.rounds=1")
    assert trained.code == 5
    assert chunk in trained.err
    text = Path("job/dtrain.toml").read_text()
    assert '\n# missing = "skip"\n' in text
    Path("job/dtrain.toml").write_text(text.replace('\n# missing = "skip"\n', '\nmissing = "skip"\n'))
    assert cli("plan", "job/dtrain.toml", "--scheduler", "serial").code == 0


def test_chunks_of_nan_that_are_left_out_where_others_hold_nan(cli: Any, tmp_path: Path) -> None:
    sst = with_nan(normal(60, 16, 16))
    sst[:, :8, :8] = np.nan
    arrays = xr.Dataset({"sst": (("time", "lat", "lon"), sst)}, {"time": dates(60)})
    write(arrays, tmp_path / "s.zarr", {"sst": {"chunks": (10, 8, 8)}})
    written = written_for(cli, "s.zarr")
    assert (written["data"]["missing"], written["data"]["non_finite"]) == ("auto", "allow")
    assert "6 of 24 of sst" in Path("job/dtrain.toml").read_text()
    accepted(cli)


# Large stores -----------------------------------------------------------------------------------------------


def empty_store(path: Path, arrays: dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...], str]]) -> Path:
    """Write metadata alone."""
    group = zarr.open_group(path, mode="w")
    for name, (dims, shape, chunks, dtype) in arrays.items():
        group.create_array(name, shape=shape, chunks=chunks, dtype=dtype, dimension_names=dims, fill_value=0)
    attributes = {"units": "hours since 1900-01-01"}
    times = {"shape": (60_000,), "chunks": (60_000,), "dtype": "int64", "dimension_names": ("time",)}
    group.create_array("time", attributes=attributes, **times)
    return path


def test_a_large_archive_is_not_read(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain_cli.survey import values

    reads: list[int] = []
    read = values._read

    def count(path: str, array: Any, place: tuple[slice, ...]) -> Any:
        reads.append(int(np.prod([part.stop - part.start for part in place])) * array.dtype.itemsize)
        return read(path, array, place)

    monkeypatch.setattr(values, "_read", count)
    map_dims = ("time", "lat", "lon")
    fields = {f"v{i}": (map_dims, (60_000, 721, 1440), (1000, 721, 1440), "float32") for i in range(40)}
    fields["t"] = (("time", "level", *map_dims[1:]), (60_000, 37, 721, 1440), (1, 37, 721, 1440), "float32")
    fields["t2m"] = (map_dims, (60_000, 721, 1440), (24, 721, 1440), "float32")
    written = written_for(cli, empty_store(tmp_path / "s.zarr", fields))
    assert written["data"]["targets"] == ["t2m"]
    assert len(written["data"]["inputs"]) == 8
    assert written["data"]["patch"] == {"lat": 64, "lon": 64}
    assert written["train"]["local_steps"] == 50
    assert len(reads) <= 8 * 3
    assert sum(reads) < 1 << 30


def test_one_level_where_all_levels_are_large_and_a_part_of_huge_images(cli: Any, tmp_path: Path) -> None:
    levels = {"t": (("time", "level", "lat", "lon"), (60_000, 37, 721, 1440), (1, 37, 721, 1440), "float32")}
    assert written_for(cli, empty_store(tmp_path / "s.zarr", levels))["data"]["isel"] == {"level": 18}
    slides = {
        "image": (("slide", "y", "x", "c"), (30, 20_000, 30_000, 3), (1, 512, 512, 3), "uint8"),
        "mask": (("slide", "y", "x"), (30, 20_000, 30_000), (1, 512, 512), "uint8"),
    }
    Path("job").rename("first")
    data = written_for(cli, empty_store(tmp_path / "t.zarr", slides))["data"]
    assert data["patch"] == {"y": 64, "x": 64}
    rows = data["isel"]["y"]["stop"] * data["isel"]["x"]["stop"] * 4 * 4
    assert 1 << 24 < rows <= 64 << 20


# What is refused, and forced --------------------------------------------------------------------------------


def refused(cli: Any, code: int, *words: str, more: tuple[str, ...] = ()) -> None:
    before = tree(Path.cwd())
    outcome = cli("--json", "init", "job", "--data", "s.zarr", *more)
    assert outcome.code == code, outcome.err
    assert outcome.err.count("\n") <= 4
    assert last(outcome)["hint"]
    for word in words:
        assert word in last(outcome)["message"] + last(outcome)["hint"]
    assert tree(Path.cwd()) == before


def test_stores_of_other_kinds_are_refused_with_the_cure(cli: Any, tmp_path: Path) -> None:
    root = zarr.open_group("s.zarr", mode="w")
    refused(cli, 5, "without arrays", "xr.Dataset")
    root.create_array("X", data=normal(5, 3))
    refused(cli, 5, "no named dimensions", "xr.Dataset")
    root.attrs["encoding-type"] = "anndata"
    refused(cli, 2, "AnnData without a column of obs")


def test_several_groups_are_named(cli: Any, tmp_path: Path) -> None:
    for group in ("a", "b"):
        arrays = {"x": (("n", "k"), normal(60, 3)), "y": (("n",), normal(60))}
        write(xr.Dataset(arrays), tmp_path / "s.zarr", group=group)
    refused(cli, 2, "a, b", "--data s.zarr/a")
    written_for(cli, "s.zarr/a")
    accepted(cli)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("template", "kind", "code", "target"),
    [
        ("tabular", climate, 0, "z"),
        ("image", nuclei, 0, "mask"),
        ("tabular", nuclei, 0, "mask"),
        ("forecast", tokens, 2, ""),
        ("text", climate, 2, ""),
        ("image", table, 2, ""),
        ("text", tokens, 0, "tokens"),
    ],
)
def test_a_template_that_is_asked_for(
    cli: Any, tmp_path: Path, template: str, kind: Any, code: int, target: str
) -> None:
    kind(tmp_path / "s.zarr")
    if code:
        refused(cli, code, f"--template {template}", more=("--template", template))
    else:
        assert written_for(cli, "s.zarr", "--template", template)["data"]["targets"] == [target]
        accepted(cli)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fault", ["codec", "dtype", "broken", "length", "no dimensions"])
def test_one_odd_array_does_not_spoil_the_store(cli: Any, tmp_path: Path, fault: str) -> None:
    arrays = {"x": (("n", "k"), normal(60, 3)), "y": (("n",), normal(60)), "odd": (("n",), normal(60))}
    write(xr.Dataset(arrays), tmp_path / "s.zarr", consolidated=False)
    document = tmp_path / "s.zarr/odd/zarr.json"
    metadata = json.loads(document.read_text())
    changes: dict[str, dict[str, Any]] = {
        "codec": {"codecs": [{"name": "unheard of", "configuration": {}}]},
        "dtype": {"data_type": "float7"},
        "broken": {"zarr_format": "x"},
        "length": {"shape": [7]},
        "no dimensions": {"dimension_names": None},
    }
    document.write_text(json.dumps({**metadata, **changes[fault]}))
    written = written_for(cli, "s.zarr")
    assert written["data"]["inputs"] == ["x"]
    accepted(cli)


def test_remote_stores(cli: Any, tmp_path: Path) -> None:
    import fsspec

    from tests.data.servers import FileServer

    climate(tmp_path / "s.zarr")
    tokens(tmp_path / "t.zarr")
    fsspec.filesystem("memory").put(str(tmp_path / "t.zarr"), "/init-tokens.zarr", recursive=True)
    server = FileServer(tmp_path)
    try:
        written = written_for(cli, f"{server.url}/s.zarr")
        assert written["data"]["path"] == f"{server.url}/s.zarr"
        accepted(cli)
    finally:
        server.stop()
    Path("job").rename("first")
    written_for(cli, "memory://init-tokens.zarr")
    accepted(cli)


# Stores that claim too much ---------------------------------------------------------------------------------


def test_a_chunk_that_decodes_to_far_more_than_a_chunk_is_named(cli: Any, tmp_path: Path, write_store: Any) -> None:
    arrays = {
        "x": {"dims": ("n", "k"), "values": normal(40, 3).astype("float32"), "chunks": (10, 3)},
        "y": {"dims": ("n",), "values": whole(3, 40), "chunks": (10,)},
    }
    path = write_store(tmp_path / "s.zarr", arrays)
    (path / "x" / "c" / "0" / "0").write_bytes(Zstd().encode(bytes(1 << 26)))
    tracemalloc.start()
    made = cli("init", tmp_path / "job", "--data", path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()
    assert (made.code, made.out) == (5, "")
    assert "x[0:10, 0:3]" in made.err
    assert "it holds 67,108,864 bytes; a chunk has at most 120" in made.err


def test_an_array_of_more_chunks_than_there_can_be_is_refused(cli: Any, tmp_path: Path, write_store: Any) -> None:
    arrays = {"x": {"dims": ("n", "k"), "values": normal(40, 3).astype("float32"), "chunks": (10, 3)}}
    path = write_store(tmp_path / "s.zarr", arrays)
    document = path / "x" / "zarr.json"
    text = document.read_text()
    for rows in (10**14, 10**30):
        document.write_text(text.replace(" 40,", f" {rows},"))
        made = cli("init", tmp_path / "job", "--data", path)
        assert made.code == 3, made.err
        assert "x" in made.err
