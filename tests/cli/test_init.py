"""dtrain init."""

import json
import tomllib

import numpy as np
import pytest
import zarr

from tests.cli.helpers import last, objects, tree

FILES = {
    "digits": ["digits.zarr", "dtrain.toml", "model.py"],
    "tabular": ["dtrain.toml", "model.py", "tabular.zarr"],
    "forecast": ["dtrain.toml", "model.py", "weather.zarr"],
    "image": ["cells.zarr", "dtrain.toml", "model.py"],
    "text": ["dtrain.toml", "model.py", "text.zarr"],
}
STORES = {template: next(name for name in names if name.endswith(".zarr")) for template, names in FILES.items()}
SHORT = {
    "forecast": ["model_args.width=8", "data.isel={lat={stop=12}}"],
    "image": ["model_args.width=4", "data.isel={sample={stop=24}}"],
    "text": ["model_args.width=32", "model_args.depth=1", "train.local_steps=4"],
}
"""Changes that make a template's first rounds short."""


def plan_and_train(cli, config, *more):
    planned = cli("--json", "plan", config, "--scheduler", "serial", *more)
    assert planned.code == 0, planned.err
    trained = cli("-q", "--json", "train", config, "--scheduler", "serial", "--set", "train.rounds=2", *more)
    assert trained.code == 0, trained.err
    assert last(trained)["rounds"] == 2
    return last(planned), objects(trained.out)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("template", FILES)
def test_a_template_is_written_and_trains(cli, tmp_path, template):
    outcome = cli("--json", "init", "new/here", "--template", template)
    assert outcome.code == 0
    assert sorted(p.name for p in (tmp_path / "new/here").iterdir()) == FILES[template]
    names = ("dtrain.toml", "model.py", STORES[template])
    assert objects(outcome.out) == [{"event": "init", "written": [f"new/here/{name}" for name in names]}]
    assert outcome.err == "next: dtrain plan new/here/dtrain.toml, then dtrain train new/here/dtrain.toml\n"
    changes = [text for change in SHORT.get(template, []) for text in ("--set", change)]
    planned, trained = plan_and_train(cli, "new/here/dtrain.toml", *changes, "--set", "train.eval_every=1")
    assert all(planned["checksums"].values())
    assert trained[1]["val_loss"] < trained[0]["val_loss"]


def test_help_shows_what_to_type_in_80_columns(script):
    outcome = script("init", "--help", env={"COLUMNS": "80", "TERM": "dumb"})
    assert outcome.code == 0
    for line in ("dtrain init digits --template digits", "dtrain init my --data archive.zarr"):
        assert line in outcome.out
    said = " ".join(outcome.out.replace("│", " ").split())
    assert "demo (default), digits, tabular, forecast, image or text" in said
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_json_says_what_was_recognised(cli, write_store, tmp_path, numbered):
    store(
        write_store,
        tmp_path,
        {"x": (("n", "k"), numbered(60, (3,))), "y": (("n",), numbered(60)), "z": (("k",), [1.0] * 3)},
    )
    outcome = cli("--json", "init", "job", "--data", "given.zarr")
    assert objects(outcome.out) == [
        {"event": "init", "written": ["job/dtrain.toml", "job/model.py"], "template": "tabular", "not_used": ["z"]}
    ]


def test_without_a_name_this_directory(cli, tmp_path):
    outcome = cli("init", "--template", "digits")
    assert outcome.code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES["digits"]
    assert outcome.out == "wrote dtrain.toml\nwrote model.py\nwrote digits.zarr\n"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("template", FILES)
def test_data_of_a_template_has_checksums_and_all_its_chunks(cli, tmp_path, template):
    with zarr.config.set({"array.write_empty_chunks": False}):  # as it is outside of the tests
        assert cli("init", "--template", template).code == 0
    group = zarr.open_group(tmp_path / STORES[template], mode="r")
    for name, array in group.arrays():
        assert array.metadata.zarr_format == 3
        assert array.nchunks_initialized == array.nchunks, name
        if array.metadata.dimension_names == (name,):
            continue  # a coordinate
        assert array.nchunks > 10, name
        assert [c.to_dict()["configuration"].get("checksum") for c in array.compressors] == [True], name


def test_a_chunk_of_zeros_is_stored_too(tmp_path):
    import xarray as xr

    from dtrain_cli.datasets import write_store

    data = xr.Dataset({"a": (("n", "k"), np.zeros((30, 2), "float32")), "b": (("n",), np.arange(30) // 20)})
    with zarr.config.set({"array.write_empty_chunks": False}):
        write_store(data, tmp_path / "zeros.zarr", rows=10)
    group = zarr.open_group(tmp_path / "zeros.zarr", mode="r")
    assert {name: array.nchunks_initialized for name, array in group.arrays()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(("template", "there"), [(name, file) for name, files in FILES.items() for file in files])
def test_nothing_is_overwritten(cli, tmp_path, template, there):
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / there).write_text("mine")
    before = tree(tmp_path)
    outcome = cli("--json", "init", "dir", "--template", template)
    assert outcome.code == last(outcome)["code"] == 4
    assert f"dir/{there}" in outcome.err
    assert tree(tmp_path) == before
    assert (tmp_path / "dir" / there).read_text() == "mine"


def test_the_plan_of_a_forecast_says_which_years_are_held_out(cli):
    assert cli("init", "--template", "forecast").code == 0
    splits = cli("plan", "dtrain.toml", "--scheduler", "serial")
    said = " ".join(splits.out.split())
    assert "val 2017-01-" in said
    assert "test 2018-01-" in said


def test_pictures_of_cells_have_uneven_light_and_masks_of_two_values():
    from dtrain_cli.datasets import cells

    made = cells(images=6, side=64, count=6)
    mask, image = made.mask.values, made.image.values.astype(float)
    assert set(np.unique(mask)) == {0, 1}
    assert 0.05 < mask.mean() < 0.5
    assert image[mask == 1].mean() - image[mask == 0].mean() > 500
    best = max(((image > level) == mask).mean() for level in range(0, 4000, 50))
    assert best < 0.95  # no threshold finds them: there is something to learn


def test_waves_move_so_that_persistence_errs():
    from dtrain_cli.datasets import weather

    made = weather(days=400)
    values = made.temperature.values
    assert made.time.dtype.kind == "M"
    anomaly = values - values.mean(0)
    assert np.abs(np.diff(values, axis=0)).mean() > 0.1 * np.abs(anomaly).mean()


def test_init_twice(cli, tmp_path):
    assert cli("init", "--template", "digits").code == 0
    before = tree(tmp_path)
    assert cli("init", "--template", "digits").code == 4
    assert cli("init", "--template", "tabular").code == 4
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--template", "digit"], 2, ["digit", "digits, tabular", 'did you mean "digits"?']),
        (["--template", "images"], 2, ["images", "digits, tabular"]),
        (["--template", "digits", "--data", "a.zarr"], 2, ["--data", "tabular"]),
        (["--template", "imag", "--data", "a.zarr"], 2, ["imag", "forecast, image, text", 'did you mean "image"?']),
        (["--data", "nothing.zarr"], 5, ["nothing.zarr"]),
        (["--data", "text"], 5, ["text"]),
        (["text", "--template", "tabular"], 4, ["text"]),
        (["text/below", "--template", "tabular"], 8, ["text/below"]),
    ],
)
def test_what_init_refuses(cli, tmp_path, arguments, code, words):
    (tmp_path / "text").write_text("no directory, no store")
    before = tree(tmp_path)
    outcome = cli("--json", "init", *arguments)
    assert outcome.code == code
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") <= 4
    for word in words:
        assert word in last(outcome)["message"]
    assert tree(tmp_path) == before


def store(write_store, tmp_path, arrays, name="given.zarr"):
    full = {}
    for key, (dims, values) in arrays.items():
        values = np.asarray(values)
        full[key] = {"dims": dims, "values": values, "chunks": (min(10, len(values)), *values.shape[1:])}
    return write_store(tmp_path / name, full)


def test_integer_labels_become_classes(cli, write_store, tmp_path, numbered):
    labels = np.arange(60) % 6 + 1  # the largest is 6: seven classes
    store(write_store, tmp_path, {"x": (("n", "k"), numbered(60, (3,)) / 100), "label": (("n",), labels)})
    outcome = cli("init", "job", "--data", "given.zarr")
    assert outcome.code == 0, outcome.err
    assert sorted(p.name for p in (tmp_path / "job").iterdir()) == ["dtrain.toml", "model.py"]
    written = tomllib.loads((tmp_path / "job/dtrain.toml").read_text())
    assert written["train"]["loss"] == "cross_entropy"
    assert written["train"]["metrics"] == ["accuracy", "f1"]
    assert written["model_args"] == {"features": 3, "outputs": [7]}
    assert written["data"] == {"path": "../given.zarr", "inputs": ["x"], "targets": ["label"]}
    plan_and_train(cli, "job/dtrain.toml")


def test_a_float_target_becomes_a_regression(cli, write_store, tmp_path, numbered):
    arrays = {
        "temperature": (("n", "k"), numbered(60, (3,)) / 100),
        "grid": (("n", "a", "b"), numbered(60, (2, 2), "float64") / 100),
        "station": (("n",), numbered(60, dtype="int32")),
        "y": (("n", "m"), numbered(60, (2,)) / 100),
        "altitude": (("k",), np.zeros(3)),
    }
    store(write_store, tmp_path, arrays)
    outcome = cli("init", "--data", tmp_path / "given.zarr", tmp_path / "elsewhere")
    assert outcome.code == 0, outcome.err
    written = tomllib.loads((tmp_path / "elsewhere/dtrain.toml").read_text())
    assert written["train"]["loss"] == "mse"
    assert written["train"]["metrics"] == ["mae"]
    assert sorted(written["data"]["inputs"]) == ["grid", "station", "temperature"]
    assert written["data"]["targets"] == ["y"]
    assert written["model_args"] == {"features": 3 + 4 + 1, "outputs": [2]}
    plan_and_train(cli, tmp_path / "elsewhere/dtrain.toml")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("dtype", "shape", "loss", "outputs"),
    [
        ("bool", (), "cross_entropy", [2]),
        ("uint8", (), "cross_entropy", [3]),
        ("int16", (2,), "cross_entropy", [3, 2]),
        ("float32", (), "mse", []),
        ("float64", (2, 2), "mse", [2, 2]),
    ],
)
def test_dtypes_and_shapes_of_targets(cli, write_store, tmp_path, numbered, dtype, shape, loss, outputs):
    rng = np.random.default_rng(0)
    target = rng.random((60, *shape)) if dtype.startswith("float") else rng.integers(0, 3, (60, *shape))
    arrays = {"x": (("n", "k"), rng.random((60, 3))), "targets": (("n", "a", "b")[: 1 + len(shape)], target)}
    arrays["targets"] = (arrays["targets"][0], target.astype(dtype))
    store(write_store, tmp_path, arrays)
    assert cli("init", "--data", "given.zarr").code == 0
    written = tomllib.loads((tmp_path / "dtrain.toml").read_text())
    assert (written["train"]["loss"], written["model_args"]["outputs"]) == (loss, outputs)
    plan_and_train(cli, "dtrain.toml")


def test_the_target_is_found_by_its_name_or_is_the_last(cli, write_store, tmp_path, numbered):
    values = (("n", "k"), numbered(60, (2,)))
    for number, (arrays, target) in enumerate([({"y": values, "z": values}, "y"), ({"a": values, "b": values}, "b")]):
        store(write_store, tmp_path, arrays, f"{number}.zarr")
        assert cli("init", f"job{number}", "--data", f"{number}.zarr").code == 0
        written = tomllib.loads((tmp_path / f"job{number}/dtrain.toml").read_text())
        assert written["data"]["targets"] == [target]


def test_a_path_with_quotes_and_letters_of_all_kinds(cli, write_store, tmp_path, numbered):
    name = 'my "best" dätä 🙂 \\ $x.zarr'
    store(write_store, tmp_path, {"x": (("n", "k"), numbered(60, (3,)) / 100), "y": (("n",), numbered(60) / 60)}, name)
    assert cli("init", "job", "--data", name).code == 0
    plan_and_train(cli, "job/dtrain.toml")


@pytest.mark.parametrize(
    ("arrays", "code", "words"),
    [
        ({"y": (("n",), np.zeros(20))}, 2, ["two variables", "y"]),
        ({"x": (("a",), np.zeros(20)), "y": (("b",), np.zeros(20))}, 2, ["share a dimension", "x(a), y(b)"]),
        ({"x": (("n",), np.zeros(20, "datetime64[s]")), "y": (("n",), np.zeros(20))}, 2, ["y(n)", "x (dates)"]),
        ({"x": (("n",), np.ones(20) * 1j), "y": (("n",), np.zeros(20))}, 2, ["y(n)", "x (complex)"]),
    ],
)
def test_stores_that_fill_no_config_file(cli, write_store, tmp_path, arrays, code, words):
    store(write_store, tmp_path, arrays)
    before = tree(tmp_path)
    outcome = cli("--json", "init", "job", "--data", "given.zarr")
    assert outcome.code == code, outcome.err
    for word in words:
        assert word in last(outcome)["message"]
    assert tree(tmp_path) == before


def test_a_store_without_samples(cli, write_store, tmp_path):
    empty = {"x": {"dims": ("n", "k"), "values": np.zeros((0, 2)), "chunks": (5, 2)}}
    empty["y"] = {"dims": ("n",), "values": np.zeros(0, "int64"), "chunks": (5,)}
    write_store(tmp_path / "given.zarr", empty)
    outcome = cli("--json", "init", "job", "--data", "given.zarr")
    assert outcome.code == 3
    assert "no samples" in last(outcome)["message"]
    assert not (tmp_path / "job").exists()


def test_negative_integers_are_no_classes(cli, write_store, tmp_path, numbered):
    store(write_store, tmp_path, {"x": (("n", "k"), numbered(60, (3,)) / 100), "y": (("n",), np.arange(60) % 3 - 1)})
    assert cli("init", "--data", "given.zarr").code == 0
    assert tomllib.loads((tmp_path / "dtrain.toml").read_text())["train"]["loss"] == "mse"
    plan_and_train(cli, "dtrain.toml")


def test_labels_that_cannot_be_decoded(cli, write_store, tmp_path, numbered):
    path = store(write_store, tmp_path, {"x": (("n", "k"), numbered(60, (3,))), "y": (("n",), np.arange(60) % 3)})
    (path / "y" / "c" / "2").write_bytes(b"nonsense")
    outcome = cli("--json", "init", "job", "--data", "given.zarr")
    assert outcome.code == 5, outcome.err
    assert "given.zarr: y[20:30]" in last(outcome)["message"]
    assert not (tmp_path / "job").exists()


def test_a_missing_chunk_of_labels_is_filled_and_counted(cli, write_store, tmp_path, numbered):
    path = store(write_store, tmp_path, {"x": (("n", "k"), numbered(60, (3,))), "y": (("n",), np.arange(60) % 3)})
    (path / "y" / "c" / "2").unlink()
    outcome = cli("init", "job", "--data", "given.zarr")
    assert outcome.code == 0
    assert "chunks that the store leaves out are read as the fill value: 1 of 6 of y" in " ".join(outcome.err.split())
    assert tomllib.loads((tmp_path / "job/dtrain.toml").read_text())["model_args"]["outputs"] == [3]
    assert cli("plan", "job/dtrain.toml", "--scheduler", "serial", "--set", "data.missing=error").code == 5
    plan_and_train(cli, "job/dtrain.toml")


def test_the_config_file_of_a_template_means_the_same_as_json(cli, tmp_path):
    assert cli("init", "--template", "tabular").code == 0
    tables = tomllib.loads((tmp_path / "dtrain.toml").read_text())
    (tmp_path / "dtrain.json").write_text(json.dumps(tables))
    shown = [last(cli("--json", "config", "show", f"dtrain.{suffix}")) for suffix in ("toml", "json")]
    assert shown[0] == shown[1]
