"""AnnData as its format says, also as version 0.7 wrote it: axes, columns, categoricals with their names."""

from __future__ import annotations

import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr

from dtrain.data.categories import check_categories
from dtrain.data.layouts import stored
from dtrain.data.plan.units import Box
from dtrain.data.read.presence import check_presence
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.data.variable import Categories
from dtrain.errors import (
    ChunkMissing,
    ChunkUndecodable,
    DataChanged,
    LengthsDiffer,
    NonFiniteData,
    NotZarr,
    UnknownVariable,
    UnsuitableVariable,
)
from tests.data.helpers import WHOLE, batches, only_partition
from tests.data.layouts.fixtures import (
    CODES,
    COUNT,
    FORMATS,
    N_COUNTS,
    NAMES,
    PCA,
    X,
    encoding,
    frame,
    strings,
    write,
    write_anndata,
    write_categorical,
)
from tests.data.servers import FileServer

pytestmark = pytest.mark.filterwarnings("ignore")  # zarr's own, of strings that version 3 does not specify
EVERY = pytest.mark.parametrize("how", FORMATS)
TYPE = "obs/cell_type"
MISSING = np.where(np.arange(COUNT) % 5 == 3, -1, CODES).astype("int8")


@pytest.fixture
def store(tmp_path: Path):
    """A function that writes cells, and returns the path."""

    def write_cells(how="v3", name="cells.zarr", **options):
        return write_anndata(tmp_path / name, how, **options)

    return write_cells


def opened(path, inputs=("X",), targets=(TYPE,), **data):
    return open_samples(path, inputs=list(inputs), targets=list(targets), **{"split": WHOLE, **data})


def rows(samples, reader="auto"):
    return {name: values for name, (_, values) in UnitReader(samples, reader).read(Box(0, samples.num_samples)).items()}


def first_batch(samples, reader="auto"):
    _, partition = only_partition(samples)
    (batch,) = batches(UnitReader(samples, reader), partition, [samples.num_samples], shuffle=False)
    return batch


def codes_path(how):
    return TYPE if how == "legacy" else f"{TYPE}/codes"


def names_path(how):
    return "obs/__categories/cell_type" if how == "legacy" else f"{TYPE}/categories"


def key(path, number, how):
    return f"{path}/{'c/' if how == 'v3' else ''}{number}"


# Dimensions and values --------------------------------------------------------------------------------------

ARRAYS = {
    "X": (("cell", "gene"), X),
    "layers/counts": (("cell", "gene"), X * 2),
    "obsm/X_pca": (("cell", "X_pca"), PCA.astype("float32")),
    "obs/n_counts": (("cell",), N_COUNTS),
    "obs/age": (("cell",), np.arange(COUNT)),
    "obs/control": (("cell",), np.arange(COUNT) % 2 == 0),
    TYPE: (("cell",), CODES),
}


@pytest.mark.sampled(8)
@EVERY
@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("group", ["", "mod/rna"])
def test_each_array_has_the_axes_that_anndata_means(store, how, consolidated, group):
    samples = opened(store(how, group=group, consolidated=consolidated), inputs=ARRAYS, group=group)
    assert {v.name: v.dims for v in samples.variables} == {name: dims for name, (dims, _) in ARRAYS.items()}
    assert (samples.sample_dim, samples.num_samples) == ("cell", COUNT)
    check_presence(samples)
    found = rows(samples)
    for name, (_, values) in ARRAYS.items():
        np.testing.assert_array_equal(found[name], values)


@EVERY
@pytest.mark.parametrize("reader", ["numcodecs", "zarrs", "zarr"])
def test_readers_give_the_same_bits(store, how, reader):
    batch = first_batch(opened(store(how, codes=MISSING), inputs=("X", "layers/counts")), reader)
    np.testing.assert_array_equal(batch.inputs[0], X)
    np.testing.assert_array_equal(batch.inputs[1], X * 2)
    assert batch.targets[0].tolist() == np.where(MISSING < 0, -100, MISSING).tolist()


@EVERY
def test_from_outside_arrays_are_named_by_the_path_of_the_group(store, how):
    path = store(how, group="mod/rna")
    samples = opened(path, ["mod/rna/X"], [f"mod/rna/{TYPE}"])
    assert [v.dims for v in samples.variables] == [("cell", "gene"), ("cell",)]
    assert samples.variables[1].categories == Categories(3, tuple(NAMES))


@EVERY
def test_genes_may_be_the_samples(store, how):
    samples = opened(store(how), targets=["var/variable"])
    assert (samples.sample_dim, samples.num_samples) == ("gene", 6)
    np.testing.assert_array_equal(rows(samples)["X"], X.T)


def test_raw_has_genes_of_its_own(store):
    path = store()
    raw = zarr.open_group(path, mode="r+").create_group("raw")
    raw.attrs.update(encoding("raw", "0.1.0"))
    write(raw, "X", np.ones((COUNT, 9), "float32"), (8, 9))
    write(frame(raw, "var", 9, ["mean"]), "mean", np.arange(9.0), (9,))
    assert opened(path, ["X", "raw/X"]).variable("raw/X").dims == ("cell", "raw_gene")
    assert opened(path, ["raw/X"], ["raw/var/mean"]).sample_dim == "raw_gene"


def test_data_frames_and_arrays_of_more_axes_in_obsm(store):
    path = store()
    obsm = zarr.open_group(path, mode="r+")["obsm"]
    write(frame(obsm, "scores", COUNT, ["a"]), "a", np.arange(COUNT), (8,))
    write_categorical(obsm["scores"], "site", CODES, NAMES)
    write(obsm, "tiles", np.zeros((COUNT, 2, 3)), (8, 2, 3))
    samples = opened(path, ["obsm/tiles", "obsm/scores/a"], ["obsm/scores/site"])
    assert [v.dims for v in samples.variables] == [("cell", "tiles", "tiles axis 2"), ("cell",), ("cell",)]


@pytest.mark.parametrize("name", ["uns/weights", "obsm/graph/data", "varp/x", "obs/more/x"])
def test_what_anndata_gives_no_axes_asks_for_names(store, name):
    path = store()
    root = zarr.open_group(path, mode="r+")
    write(root, name, np.arange(COUNT * 1.0), (8,))
    with pytest.raises(UnsuitableVariable, match=f"{name} has no dimension names") as caught:
        opened(path, [name])
    assert f'data.dims = {{ "{name}" = ["sample"] }}' in caught.value.hint
    assert opened(path, [name], dims={name: ["cell"]}).num_samples == COUNT


def test_x_of_other_axes_is_refused_by_name(store):
    path = store()
    write(zarr.open_group(path, mode="r+"), "layers/flat", np.arange(COUNT), (8,))
    with pytest.raises(UnsuitableVariable, match=r'layers/flat of shape \[30\] has the dimension names \["cell", '):
        opened(path, ["layers/flat"])


# Categoricals -----------------------------------------------------------------------------------------------


@EVERY
def test_a_categorical_is_a_target_of_classes_with_names(store, how):
    samples = opened(store(how))
    variable = samples.variable(TYPE)
    assert variable.categories == Categories(3, ("B cell", "T cell", "monocyte"))
    assert (variable.model_dtype, variable.array_path) == (np.int64, codes_path(how))
    assert (f"classes {TYPE}", "3: B cell, T cell, monocyte") in samples.rows()
    assert f"classes {TYPE}" in repr(samples)
    assert first_batch(samples).targets[0].tolist() == CODES.tolist()
    again = pickle.loads(pickle.dumps(samples))
    assert again.variable(TYPE).categories == variable.categories


@EVERY
def test_a_cell_without_a_category_is_the_ignored_class(store, how):
    samples = opened(store(how, codes=MISSING))
    assert first_batch(samples).targets[0].tolist() == np.where(MISSING < 0, -100, MISSING).tolist()
    said = "-1 marks a missing label: it is class -100, losses and metrics leave it out"
    assert (f"labels {TYPE}", said) in samples.rows()
    with pytest.raises(NonFiniteData, match=rf"{TYPE}\[3\] in chunk {key(codes_path(how), 0, how)} is -1"):
        rows(samples.labelled("refused"))


@EVERY
def test_an_input_stays_codes_and_one_without_a_category_is_refused_by_name(store, how):
    complete = opened(store(how), inputs=("X", TYPE), targets=("obs/n_counts",))
    batch = first_batch(complete)
    assert (batch.inputs[1].dtype, batch.inputs[1].tolist()) == (np.int64, CODES.tolist())
    path = store(how, name="m.zarr", codes=MISSING)
    with pytest.raises(NonFiniteData, match="is -1, which marks a missing value") as caught:
        rows(opened(path, inputs=("X", TYPE), targets=("obs/n_counts",)))
    assert "the model sees -1 there" in caught.value.hint
    allowed = opened(path, inputs=("X", TYPE), targets=("obs/n_counts",), non_finite="allow")
    assert first_batch(allowed).inputs[1].tolist() == MISSING.tolist()


@EVERY
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_codes_may_have_any_dtype(store, how, dtype):
    samples = opened(store(how, codes=MISSING.astype(dtype)))
    assert first_batch(samples).targets[0].tolist() == np.where(MISSING < 0, -100, MISSING).tolist()


@EVERY
@pytest.mark.parametrize(
    ("names", "texts"),
    [([3, 1, 2], ("3", "1", "2")), ([0.5, 1.0, 2.0], ("0.5", "1.0", "2.0")), ([False, True], ("False", "True"))],
)
def test_categories_may_be_numbers(store, how, names, texts):
    assert opened(store(how, names=names)).variable(TYPE).categories == Categories(len(names), texts)


def test_categories_may_be_strings_beside_a_mask(store):
    path = store()
    root = zarr.open_group(path, mode="r+")
    del root[f"{TYPE}/categories"]
    masked = root.create_group(f"{TYPE}/categories")
    masked.attrs.update(encoding("nullable-string-array", "0.1.0"))
    write(masked, "values", strings(NAMES), (3,))
    write(masked, "mask", np.zeros(3, bool), (3,))
    assert opened(path).variable(TYPE).categories == Categories(3, tuple(NAMES))


def test_of_very_many_categories_some_names_are_kept(store, monkeypatch):
    monkeypatch.setattr(stored, "MOST_NAMES", 5)
    samples = opened(store(names=[f"{'long ' * 20}{i}" for i in range(1200)]))
    categories = samples.variable(TYPE).categories
    assert (categories.count, len(categories.names)) == (1200, 5)
    (text,) = [text for label, text in samples.rows() if label == f"classes {TYPE}"]
    assert text.startswith("1,200: long long ")
    assert text.endswith("... and 1,195 more")


@pytest.mark.parametrize("how", ["v2", "v3"])  # of version 0.7 the codes are the column
def test_the_codes_may_be_named_too(store, how):
    samples = opened(store(how, codes=MISSING), targets=[f"{TYPE}/codes"])
    assert samples.variable(f"{TYPE}/codes").categories == Categories(3, tuple(NAMES))
    assert first_batch(samples).targets[0].tolist() == np.where(MISSING < 0, -100, MISSING).tolist()


def test_names_change_no_fingerprint(store):
    one, other = opened(store()), opened(store(name="o.zarr", names=["a", "b", "c"]))
    assert one.fingerprint == other.fingerprint


def test_an_attribute_named_categories_means_nothing_elsewhere(write_store, tmp_path):
    arrays = {
        "x": {"dims": ("n",), "values": np.arange(9.0), "chunks": (3,)},
        "y": {"dims": ("n",), "values": np.arange(9), "chunks": (3,), "attributes": {"categories": "a b"}},
    }
    samples = open_samples(write_store(tmp_path / "s", arrays), inputs=["x"], targets=["y"])
    assert samples.variable("y").categories is None


@pytest.mark.parametrize("names", [NAMES[:2], [*NAMES, "NK cell"]])
def test_categories_that_are_missing_at_the_end_do_no_harm(store, names):
    known = {TYPE: Categories(3, tuple(NAMES))}
    check_categories(opened(store(names=names)), known)


def test_codes_that_stand_for_other_categories_are_refused(store):
    path = store(names=["B cell", "monocyte", "T cell"])
    with pytest.raises(
        DataChanged, match=f"code 1 of {TYPE} stands for monocyte, in the run for T cell: its "
    ) as caught:
        check_categories(opened(path), {TYPE: Categories(3, tuple(NAMES))})
    assert (caught.value.code, str(path) in caught.value.message) == (5, True)
    assert "set_categories" in caught.value.hint
    check_categories(opened(path), {"obs/other": Categories(3, tuple(NAMES))})


# What cannot be trained on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nullable-integer", "nullable-boolean", "nullable-string-array"])
def test_columns_with_a_mask_are_refused_by_name(store, kind):
    path = store()
    column = zarr.open_group(path, mode="r+")["obs"].create_group("visits")
    column.attrs.update(encoding(kind, "0.1.0"))
    write(column, "values", np.arange(COUNT), (8,))
    write(column, "mask", np.zeros(COUNT, bool), (8,))
    with pytest.raises(UnsuitableVariable, match=f"obs/visits is a column of {kind} values") as caught:
        opened(path, targets=["obs/visits"])
    assert 'astype("float64")' in caught.value.hint


@EVERY
def test_strings_are_refused_by_name(store, how):
    with pytest.raises(UnsuitableVariable, match="obs/_index has dtype"):
        opened(store(how), targets=["obs/_index"])


@EVERY
def test_a_group_says_which_arrays_it_holds(store, how):
    with pytest.raises(UnknownVariable, match='"obs" is a group, not a variable') as caught:
        opened(store(how), targets=["obs"])
    names = "obs/_index, obs/age, obs/cell_type, obs/control, obs/n_counts"
    assert caught.value.hint == f"It holds {names}."


@pytest.mark.sampled(6)
@EVERY
@pytest.mark.parametrize("wrong", ["obs/celltype", "obs/cell_typ", "cell_type"])
def test_a_misspelt_path_is_named_with_the_closest_one(store, how, wrong):
    with pytest.raises(UnknownVariable, match=f'"{wrong}" not found; did you mean "{TYPE}"') as caught:
        opened(store(how), targets=[wrong])
    assert "codes" not in caught.value.hint
    assert "categories" not in caught.value.hint


def test_rows_of_another_number_of_cells_are_refused(store):
    path = store()
    write(zarr.open_group(path, mode="r+"), "layers/short", X[:7], (7, 4))
    with pytest.raises(LengthsDiffer, match="along cell: X has 30, layers/short has 7"):
        opened(path, ["X", "layers/short"])


# Faults -----------------------------------------------------------------------------------------------------


@EVERY
def test_a_missing_chunk_is_named_by_its_whole_path(store, how):
    path = store(how)
    gone = key(codes_path(how), 1, how)
    (path / gone).unlink()
    with pytest.raises(ChunkMissing, match=rf"chunk {gone} of {TYPE} is missing \(1 of 3\)"):
        check_presence(opened(path, missing="error"))
    assert check_presence(opened(path))[TYPE].chunks == 1  # zarr leaves out chunks of the first class
    gone = f"X/{'c/1/0' if how == 'v3' else '1.0'}"
    (path / gone).unlink()
    with pytest.raises(ChunkMissing, match=f"chunk {gone} of X is missing"):
        check_presence(opened(path))


@EVERY
def test_a_damaged_chunk_of_codes_is_named_by_its_whole_path(store, how):
    path = store(how)
    damaged = key(codes_path(how), 2, how)
    (path / damaged).write_bytes(b"no chunk")
    with pytest.raises(ChunkUndecodable, match=f"chunk {damaged} of {TYPE} cannot be decoded"):
        rows(opened(path))


@EVERY
def test_names_that_cannot_be_read_are_refused(store, how):
    path = store(how)
    (path / key(names_path(how), 0, how)).write_bytes(b"no chunk")
    with pytest.raises(ChunkUndecodable, match=f"{names_path(how)}, the names of categories, cannot be decoded"):
        opened(path)
    (path / key(names_path(how), 0, how)).unlink()
    with pytest.raises(ChunkMissing, match=f"chunk {key(names_path(how), 0, how)} of {names_path(how)}, the names of"):
        opened(path)


@pytest.mark.parametrize("name", ["", "obs/cell_type/codes"])
def test_a_single_name_may_be_the_fill_value_that_zarr_leaves_out(store, name):
    path = store(names=[""], codes=np.zeros(COUNT, "int8"))
    (path / key(names_path("v3"), 0, "v3")).unlink()
    assert opened(path, targets=[name or TYPE]).variables[1].categories == Categories(1, ("",))


@pytest.mark.parametrize("part", ["codes", "categories"])
def test_a_categorical_that_lacks_a_part_is_damaged(store, part):
    path = store()
    del zarr.open_group(path, mode="r+")[f"{TYPE}/{part}"]
    with pytest.raises(NotZarr, match=f"{TYPE}/{part}") as caught:
        opened(path)
    assert caught.value.code == 5


def test_damaged_attributes_of_a_group_are_named_where_they_matter(store):
    path = store("v2")
    (path / "obs" / ".zattrs").write_text("{")
    with pytest.raises(NotZarr, match="the metadata of obs cannot be read"):
        opened(path, targets=["obs/n_counts"])


# Servers ----------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("consolidated", [False, True])
def test_over_http_nothing_is_listed(store, how, consolidated):
    path = store(how, codes=MISSING, consolidated=consolidated)
    server = FileServer(path)
    try:
        samples = opened(server.url, inputs=("X", "obsm/X_pca"))
        assert samples.fingerprint == opened(path, inputs=("X", "obsm/X_pca")).fingerprint
        assert samples.variable(TYPE).categories == Categories(3, tuple(NAMES))
        assert not [request for request in server.log if request.key.endswith("/") or not request.key]
        check_presence(samples)
        assert first_batch(samples).targets[0].tolist() == np.where(MISSING < 0, -100, MISSING).tolist()
        with pytest.raises(UnknownVariable, match='"obs/celltype" not found') as caught:
            opened(server.url, targets=["obs/celltype"])
        assert (f'did you mean "{TYPE}"' in caught.value.message) == consolidated
        server.fail(codes_path(how) + ".*[0-9]$", 404)
        with pytest.raises(ChunkMissing, match=f"chunk {key(codes_path(how), 0, how)} of {TYPE} is missing"):
            check_presence(opened(server.url, missing="error"))
    finally:
        server.stop()


def test_a_bucket_that_forbids_what_is_not_there_does_no_harm(store):
    path = store("legacy")
    server = FileServer(path)
    server.fail("(obs|var)/(obs|var)/", 403)
    try:
        assert opened(server.url, targets=["obs/n_counts"]).num_samples == COUNT
    finally:
        server.stop()


def test_documents_that_were_read_are_used_again(store):
    path = store()
    samples = opened(path)
    (path / "obs/cell_type/zarr.json").write_text("{")  # the group is no part of the data
    assert rows(samples)[TYPE].tolist() == CODES.tolist()


@EVERY
def test_through_fsspec(store, how):
    path, files = store(how, codes=MISSING), fsspec.filesystem("memory")
    files.put(f"{path}/", f"/anndata-{how}.zarr", recursive=True)
    samples = opened(f"memory://anndata-{how}.zarr", inputs=("X", "obsm/X_pca"))
    assert samples.fingerprint == opened(path, inputs=("X", "obsm/X_pca")).fingerprint
    check_presence(samples)
    assert first_batch(samples).targets[0].tolist() == np.where(MISSING < 0, -100, MISSING).tolist()
    with pytest.raises(UnknownVariable, match=f'did you mean "{TYPE}"'):
        opened(samples.path, targets=["obs/celltype"])
