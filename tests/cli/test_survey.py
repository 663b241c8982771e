"""The parts of ``dtrain init --data``: what a sample reads, the text of the config file, the models' own functions."""

from __future__ import annotations

import importlib
import importlib.util
import math
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain_cli.survey.document import WIDTH, document, toml
from dtrain_cli.survey.draft import Draft
from dtrain_cli.survey.roles import ArrayFacts, Contents, space_of
from dtrain_cli.survey.settings import Settings
from dtrain_cli.survey.tables import batch_size
from dtrain_cli.survey.target import classes_of
from dtrain_cli.survey.text import CONTEXTS, context_of
from dtrain_cli.survey.values import SAMPLE_BYTES, Values, describe, sample_places

TEMPLATES = Path(importlib.import_module("dtrain_cli").__path__[0]) / "templates"


# The sample -------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 3_000)), min_size=1, max_size=4),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 300),
)
def test_a_sample_is_bounded_and_spread(sizes: list[tuple[int, int]], itemsize: int, most: int) -> None:
    shape, chunks = (tuple(axis) for axis in zip(*sizes, strict=True))
    places = sample_places(shape, chunks, itemsize, most)
    grid = [math.ceil(n / size) for n, size in sizes]
    chunk_bytes = math.prod(chunks) * itemsize
    assert len(places) <= min(most, math.prod(grid))
    assert len(places) <= 1 or len(places) * chunk_bytes <= SAMPLE_BYTES
    assert len(set(map(str, places))) == len(places)
    for place in places:
        for part, n, size in zip(place, shape, chunks, strict=True):
            assert part.start % size == 0
            assert part.start < part.stop == min(n, part.start + size)
    if len(places) > 1:
        assert all(part.start == 0 for part in places[0])
        assert all(part.stop == n for part, n in zip(places[-1], shape, strict=True))


def facts(stored: str = "f", **changes: Any) -> ArrayFacts:
    given = {"name": "a", "dims": ("n",), "shape": (9,), "itemsize": 4, "encoding": None, "attributes": {}}
    return ArrayFacts(**{**given, "stored": stored, "kind": stored, **changes})


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_missing_and_infinite_values_are_counted_and_left_out(values: list[float]) -> None:
    array = np.array(values, "float32")
    seen = describe(facts(), [array], is_whole=True)
    finite = array[np.isfinite(array)]
    assert (seen.count, seen.missing) == (len(finite), int(np.isnan(array).sum()))
    assert seen.infinite == int(np.isinf(array).sum())
    if len(finite):
        assert (seen.minimum, seen.maximum) == (finite.min(), finite.max())


# What values and names say ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "is_named", "classes"),
    [
        (range(10), False, 10),
        ([1, 2, 3], False, 4),
        ([0, 3_000_000], True, 0),
        ([-1, 0, 1], True, 0),
        ([0, 500], False, 0),
        ([0, 500], True, 501),
        ([7], False, 8),
    ],
)
def test_what_integers_are_classes(values: Any, is_named: bool, classes: int) -> None:
    array = np.tile(np.array(list(values)), 30)
    seen = describe(facts("i"), [array], is_whole=True)
    assert classes_of(facts("i"), seen, is_named=is_named) == classes


def test_numbers_of_rows_are_no_classes_and_attributes_state_them() -> None:
    rows = describe(facts("i"), [np.arange(60)], is_whole=True)
    assert classes_of(facts("i"), rows, is_named=False) == 0
    few = describe(facts("i"), [np.zeros(60, int)], is_whole=True)
    assert classes_of(facts("i", attributes={"flag_values": [0, 1, 2, 7]}), few, is_named=False) == 8
    assert classes_of(facts("i", attributes={"num_classes": 1000}), few, is_named=False) == 1000
    assert classes_of(facts("b"), Values(), is_named=False) == 2


@pytest.mark.parametrize(
    ("dims", "shape", "space"),
    [
        (("time", "lat", "lon"), (9, 9, 9), ("lat", "lon")),
        (("lon", "lat", "time"), (9, 9, 9), ("lon", "lat")),
        (("time", "y_geostationary", "x_geostationary"), (9, 9, 9), ("y_geostationary", "x_geostationary")),
        (("n", "c", "y", "x"), (9, 3, 9, 9), ("y", "x")),
        (("n", "y", "x", "channel"), (9, 9, 9, 3), ("y", "x")),
        (("n", "z", "y", "x"), (9, 9, 9, 9), ("z", "y", "x")),
        (("n", "z", "y", "x"), (9, 2, 9, 9), ("y", "x")),
        (("time", "depth", "lat", "lon"), (9, 20, 9, 9), ("lat", "lon")),
        (("dim_0", "dim_1", "dim_2"), (9, 9, 9), ("dim_1", "dim_2")),
        (("n", "a", "b"), (9, 2, 2), ()),
        (("cell", "gene"), (90, 90), ()),
        (("n", "length", "sample"), (9, 9, 9), ()),
    ],
)
def test_which_dimensions_are_places(dims: tuple[str, ...], shape: tuple[int, ...], space: tuple[str, ...]) -> None:
    empty: dict[str, Any] = {"axes": {}, "time_dims": frozenset(), "strings": frozenset(), "left_out": {}}
    contents = Contents(path="", group="", arrays={}, attributes={}, **empty)
    assert space_of(facts(dims=dims, shape=shape), contents) == space


@given(st.integers(0, 10**10))
def test_a_text_has_enough_samples(length: int) -> None:
    context = context_of(length)
    assert context in (0, 4, 8, 16, 32, 64, 128)
    assert context * CONTEXTS <= length or not context


@given(st.integers(1, 200), st.integers(1, 10**9), st.integers(0, 10**9))
def test_a_batch_fits_and_has_a_sample(most: int, sample_bytes: int, count: int) -> None:
    size = batch_size(most, sample_bytes, count)
    assert 1 <= size <= most
    assert size == 1 or size * sample_bytes <= 16 << 20


# The text ---------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
VALUES = st.recursive(
    st.integers(-(2**63), 2**63 - 1) | st.booleans() | TEXTS | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)


@given(VALUES)
def test_toml_means_what_was_given(value: Any) -> None:
    assert tomllib.loads(f"value = {toml(value)}")["value"] == value


@given(st.lists(TEXTS, max_size=60, unique=True), TEXTS)
def test_the_config_file_means_what_was_settled(names: list[str], why: str) -> None:
    draft = Draft(template="tabular", title=why, inputs=tuple(names), target="y", sample_dim="n", others=tuple(names))
    data = {"path": "", "inputs": names, "normalize": {name: ["k"] for name in names}, "split": {"val": 0.1}}
    settings = Settings(
        draft=draft,
        model="",
        tables={"model_args": {"inputs": [names]}, "data": data, "train": {"loss": "mse"}},
        why={"data.inputs": why, "train.loss": why, "data.normalize": why},
        off={"data.missing": ("skip", why)},
        left_out="",
        filled="",
        lost="",
    )
    text = document(settings, "a path")
    assert tomllib.loads(text) == {
        "model": "model:build",
        "model_args": {"inputs": [names]},
        "data": {**data, "path": "a path"},
        "train": {"loss": "mse"},
    }
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert all(len(line) <= WIDTH or " " not in line[2:] for line in comments)


# The models' own functions ----------------------------------------------------------------------------------


def model(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TEMPLATES / f"{name}_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["tabular", "grid"])
def test_missing_targets_count_in_neither_sum_nor_number(name: str) -> None:
    targets = torch.tensor([1.0, math.nan, 3.0])
    outputs = torch.tensor([0.0, 5.0, 1.0], requires_grad=True)
    total, count = model(name).mse(outputs, targets)
    total.backward()
    assert (total.item(), count) == (5.0, 2)
    assert outputs.grad is not None
    assert outputs.grad.tolist() == [-2.0, 0.0, -4.0]
    total, count = model(name).mae(outputs.detach(), targets)
    assert (total.item(), count) == (3.0, 2)


@pytest.mark.parametrize("name", ["tabular", "grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_missing_classes_are_ignored(name: str, dtype: torch.dtype) -> None:
    from dtrain.algorithm.batch import TensorBatch

    last = math.nan if dtype.is_floating_point else -100
    batch = TensorBatch(inputs=(), targets=(torch.tensor([0, 2, -1, last]).to(dtype),), size=4)
    (targets,) = model(name).classes(batch, None).targets
    assert targets.tolist() == [0, 2, -100, -100]
    assert targets.dtype == torch.int64
    if name == "grid":
        (targets,) = model(name).foreground(batch, None).targets
        assert targets.tolist() == [0, 1, -100, -100]


def test_a_grid_model_gives_the_axes_of_the_target() -> None:
    inputs = [["window", "level", "lat", "lon"], ["lon", "lat"], []]
    built = model("grid").build(inputs, ["lat", "lon"], 2 * 3 + 1 + 1, ["lon", "level", "lat"], [3], classes=5)
    given = (torch.randn(4, 2, 3, 6, 7), torch.ones(4, 7, 6, dtype=torch.int64), torch.randn(4))
    assert built(*given).shape == (4, 5, 7, 3, 6)
    given[0][0, 0, 0, 0, 0] = math.nan
    assert torch.isfinite(built(*given)).all()
    pooled = model("grid").build([["y", "x"]], ["y", "x"], 1, [], [], classes=3)
    assert pooled(torch.randn(4, 9, 9)).shape == (4, 3)


def test_the_short_cut_sees_each_place_alone() -> None:
    built = model("grid").build([["lat", "lon"]], ["lat", "lon"], 1, ["lat", "lon"], [])
    with torch.no_grad():
        built.last.weight.zero_()
        built.last.bias.zero_()
        built.short.weight.fill_(1.0)
        built.short.bias.zero_()
    x = torch.randn(2, 5, 6)
    assert torch.equal(built(x), x)
