"""Sparse matrices in AnnData: every row once and as scipy has it, the same bits by all readers, faults by name."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import fsspec
import icechunk
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from dtrain.data import sparse as rows
from dtrain.data.given import find_given
from dtrain.data.plan.units import Box
from dtrain.data.read.joined import values_counted
from dtrain.data.read.presence import absent_rows, check_presence, content_digest
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import (
    ChunkMissing,
    ChunkUndecodable,
    DataChanged,
    DtrainError,
    InvalidConfig,
    NonFiniteData,
    NotZarr,
    UnknownVariable,
    UnsuitableVariable,
)
from tests.data.helpers import WHOLE, batches, one_pass, only_partition
from tests.data.layouts.fixtures import encoding, frame, write, write_anndata, write_cells, write_sparse
from tests.sampling import examples

pytestmark = pytest.mark.filterwarnings("ignore")  # zarr's own, of strings that version 3 does not specify
READERS = ["numcodecs", "zarrs", "zarr"]
PARTS = ("X/indptr", "X/indices", "X/data")


def random(rows=40, columns=9, density=0.3, dtype="float32", seed=0):
    """A matrix of scipy with values other than 0."""
    rng = np.random.default_rng(seed)
    matrix = sparse.random(rows, columns, density, "csr", rng=rng, data_rvs=lambda n: rng.integers(1, 100, n))
    return matrix.astype(dtype)


@pytest.fixture
def store(tmp_path):
    """A function that writes a matrix, and returns the path."""

    def write_matrix(matrix=None, name="cells.zarr", **options):
        return write_cells(tmp_path / name, random() if matrix is None else matrix, **options)

    return write_matrix


def opened(path, inputs=("X",), targets=("obs/y",), **data):
    return open_samples(path, inputs=list(inputs), targets=list(targets), **{"split": WHOLE, **data})


def rows_of(samples, reader="auto", name="X"):
    return UnitReader(samples, reader).read(Box(samples.first_row, samples.num_samples))[name][1]


def planned(samples, **changes):
    plan, partition = only_partition(samples, **changes)
    plan = values_counted(samples, plan)
    return plan, replace(partition, plan=plan)


def one_epoch(samples, reader="auto", shuffle=True, scalings=None, **changes):
    """The first input, and the numbers of its cells, of one pass."""
    _, partition = planned(samples, **changes)
    found = batches(
        UnitReader(samples, reader), partition, one_pass(partition), shuffle=shuffle, scalings=scalings or {}
    )
    return np.concatenate([batch.inputs[0] for batch in found]), np.concatenate([b.targets[0] for b in found])


def key(part, number, path):
    return f"X/{part}/{number}" if (path / "X" / ".zgroup").exists() else f"X/{part}/c/{number}"


# Rows -------------------------------------------------------------------------------------------------------


@st.composite
def matrices(draw):
    """A matrix with rows of very different numbers of values, in any order within a row."""
    rows, columns = draw(st.integers(1, 60)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 100)))
    share = rng.random(rows) * draw(st.sampled_from([0.0, 0.1, 1.0]))
    share[rng.random(rows) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0  # rows without values
    if draw(st.booleans()):
        share[rng.integers(rows)] = 1
    dense = np.where(rng.random((rows, columns)) <= share[:, None], rng.integers(1, 99, (rows, columns)), 0)
    dense[share == 0] = 0
    dtype = draw(st.sampled_from(["float32", "float64", "float16", "uint8", "int16", "uint32", "int64", "uint64"]))
    matrix = sparse.csr_matrix(dense.astype(dtype if dtype != "float16" else "float32"))
    if draw(st.booleans()):
        for start, stop in itertools.pairwise(matrix.indptr.tolist()):
            order = start + rng.permutation(stop - start)
            matrix.indices[start:stop], matrix.data[start:stop] = matrix.indices[order], matrix.data[order]
    index = draw(st.sampled_from(["int32", "int64", "uint16"]))
    return matrix, {"data": matrix.data.astype(dtype), "indices": matrix.indices.astype(index)}


@examples(80)
@given(
    matrices(),
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70)),
    st.integers(1, 20),
    st.sampled_from([(2, False), (3, False), (3, True)]),
    st.sampled_from(READERS),
    st.booleans(),
    st.sampled_from([{}, {"gene": {"start": 1}}, {"gene": {"start": 0, "step": 2}}, {"gene": -1}]),
    st.sampled_from([None, (3, -2)]),
    st.integers(1, 25),
    st.sampled_from([1, 7, 1 << 15]),
)
def test_every_row_once_and_as_scipy_has_it(
    drawn, chunks, y_chunk, stored, reader, shuffle, isel, cells, unit_rows, piece
):
    matrix, arrays = drawn
    zarr_format, sharded = stored
    expected = matrix.toarray().astype("float32")
    if isel == {"gene": {"start": 1}} and matrix.shape[1] == 1:
        isel = {}
    if cells is not None and matrix.shape[0] > 6:
        isel = {**isel, "cell": {"start": cells[0], "stop": cells[1]}}
        expected = expected[slice(*cells)]
    if "gene" in isel:
        expected = expected[:, isel["gene"] if isel["gene"] == -1 else slice(*map(isel["gene"].get, SLICE))]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(rows, "PIECE_VALUES", piece):
        path = write_cells(
            Path(folder, "s.zarr"),
            matrix,
            zarr_format,
            y_chunk,
            chunks=dict(zip(("data", "indices", "indptr"), chunks, strict=True)),
            shards={"data": 2, "indices": 3, "indptr": 2} if sharded else None,
            **arrays,
        )
        samples = opened(path, isel=isel)
        check_presence(samples)
        np.testing.assert_array_equal(rows_of(samples, reader), expected)
        for changes in ({}, {"unit_rows": unit_rows, "cell_rows": unit_rows, "window": 3, "group": 1}):
            x, y = one_epoch(samples, reader, shuffle, **changes)
            assert x.dtype == np.float32
            first = samples.first_row
            assert sorted(y.tolist()) == list(range(first, samples.num_samples))
            np.testing.assert_array_equal(x, expected[y - first])


SLICE = ("start", "stop", "step")


@pytest.mark.sampled(8)
@pytest.mark.parametrize("how", ["v2", "v3", "legacy"])
@pytest.mark.parametrize("name", ["X", "layers/thin", "raw/X", "obsm/regions", "mod/rna/X"])
def test_wherever_anndata_keeps_a_matrix(tmp_path, how, name):
    matrix = random(30, 6)
    path = write_anndata(tmp_path / "s.zarr", how)
    root = zarr.open_group(path, mode="r+")
    if name == "X":
        del root["X"]
    if name.startswith("mod"):
        mod = root.create_group("mod/rna")
        mod.attrs.update(encoding("anndata", "0.1.0"))
    group, _, last = name.rpartition("/")
    write_sparse(root.require_group(group) if group else root, last, matrix)
    samples = opened(path, [name], [name])
    assert (samples.sample_dim, samples.num_samples) == ("cell", 30)
    dims = {"raw/X": "raw_gene", "obsm/regions": "regions"}
    assert samples.variables[0].dims == ("cell", dims.get(name, "gene"))
    np.testing.assert_array_equal(rows_of(samples, name=name), matrix.toarray())
    assert f"float32[cell, {dims.get(name, 'gene')}] (30, 6), sparse, {matrix.nnz} values" in repr(samples)


def test_a_matrix_that_is_no_part_of_anndata_has_the_names_that_it_is_given(tmp_path):
    root = zarr.open_group(tmp_path / "s.zarr", mode="w")
    write_sparse(root, "counts", random())
    with pytest.raises(UnsuitableVariable, match="counts has no dimension names") as caught:
        opened(tmp_path / "s.zarr", ["counts"], ["counts"])
    assert 'data.dims = { counts = ["sample", "dim1"] }' in caught.value.hint
    assert opened(tmp_path / "s.zarr", ["counts"], ["counts"], dims={"counts": ["n", "k"]}).sample_dim == "n"
    root["counts"].attrs["_ARRAY_DIMENSIONS"] = ["spot", "gene"]
    assert opened(tmp_path / "s.zarr", ["counts"], ["counts"]).sample_dim == "spot"


def test_dense_and_sparse_variables_have_one_run_of_units(tmp_path):
    path = write_anndata(tmp_path / "s.zarr")
    write_sparse(zarr.open_group(path, mode="r+")["layers"], "thin", random(30, 6), chunks=5)
    samples = opened(path, ["layers/thin", "X", "obsm/X_pca"], ["obs/cell_type", "obs/age"])
    _, partition = planned(samples)
    found = batches(UnitReader(samples), partition, one_pass(partition))
    cells = np.concatenate([batch.targets[1] for batch in found])
    dense = opened(path, ["X", "obsm/X_pca"], ["obs/cell_type", "obs/age"])
    expected = {**{n: rows_of(dense, name=n) for n in ("X", "obsm/X_pca")}, "layers/thin": random(30, 6).toarray()}
    for place, name in enumerate(("layers/thin", "X", "obsm/X_pca")):
        np.testing.assert_array_equal(np.concatenate([b.inputs[place] for b in found]), expected[name][cells])


def test_genes_are_samples_where_a_matrix_is_stored_gene_by_gene(store):
    matrix = random(12, 7)
    path = store(matrix.tocsc(), kind="csc_matrix")
    write(frame(zarr.open_group(path, mode="r+"), "var", 7, ["mean"]), "mean", np.arange(7), (3,))
    samples = opened(path, targets=["var/mean"])
    assert (samples.sample_dim, samples.num_samples) == ("gene", 7)
    np.testing.assert_array_equal(rows_of(samples), matrix.toarray().T)
    x, y = one_epoch(samples)
    np.testing.assert_array_equal(x, matrix.toarray().T[y])


@pytest.mark.parametrize("offsets", [[-2, 0, 3], {"start": 0, "stop": 4}])
def test_windows_of_sparse_rows(store, offsets):
    matrix = random(60)
    samples = opened(store(matrix, chunks=16), input_offsets=offsets, split_order="sequential")
    listed = offsets if isinstance(offsets, list) else range(offsets["stop"])
    x, y = one_epoch(samples, unit_rows=9, cell_rows=9, window=2)
    assert sorted(y.tolist()) == list(range(-min(listed), 60 - max(listed)))
    np.testing.assert_array_equal(x, np.stack([matrix.toarray()[y + offset] for offset in listed], axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (300_000, 2)])
def test_a_matrix_without_values(store, shape):
    path = store(sparse.csr_matrix(shape, dtype="float32"), y_chunk=100_000)
    samples = opened(path)
    check_presence(samples)
    assert not rows_of(samples).any()
    x, y = one_epoch(samples) if shape[0] < 10 else (rows_of(samples), range(shape[0]))
    assert x.shape == shape
    assert len(y) == shape[0]


def test_of_a_matrix_without_values_no_chunk_need_be_stored(store):
    path = store(sparse.csr_matrix((5, 3), dtype="float32"))
    (path / key("indptr", 0, path)).unlink()  # as zarr leaves out what is the fill value
    check_presence(opened(path))
    assert not rows_of(opened(path)).any()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_in_an_archive_the_same(store, tmp_path, zarr_format):
    path = store(chunks=20, zarr_format=zarr_format)
    samples = opened(shutil.make_archive(str(tmp_path / "packed.zarr"), "zip", path))
    check_presence(samples)
    np.testing.assert_array_equal(rows_of(samples), random().toarray())
    (path / key("indices", 2, path)).unlink()
    samples = opened(shutil.make_archive(str(tmp_path / "without.zarr"), "zip", path))
    with pytest.raises(ChunkMissing, match=f"chunk {key('indices', 2, path)} of X/indices is missing"):
        check_presence(samples)


def test_by_references_and_out_of_a_repository_the_same(store, tmp_path):
    path = store(chunks=20)
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    whole = {name: [str(file), 0, file.stat().st_size] for name, file in files.items()}
    refs = {name: files[name].read_text() if name.endswith(".json") else at for name, at in whole.items()}
    (tmp_path / "cells.json").write_text(json.dumps({"version": 1, "refs": refs}))
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "cells.icechunk")))
    session = repository.writable_session("main")
    root = zarr.open_group(session.store, mode="a")
    root.attrs.update(encoding("anndata", "0.1.0"))
    write_sparse(root, "X", random(), chunks=20)
    write(frame(root, "obs", 1, ["y"]), "y", np.arange(40), (8,))
    session.commit("cells")
    for name in ("cells.json", "cells.icechunk"):
        samples = opened(tmp_path / name)
        check_presence(samples)
        np.testing.assert_array_equal(rows_of(samples), random().toarray())


def test_true_is_1_and_a_stored_zero_is_0(store):
    matrix = random()
    flags = matrix.data % 3 > 0
    matrix.data = flags.astype("float32")
    np.testing.assert_array_equal(rows_of(opened(store(matrix, data=flags))), matrix.toarray())


def test_the_model_sees_float32_whatever_is_stored(store):
    matrix = random(dtype="int64")
    matrix.data[0] = 2**24 + 1
    samples = opened(store(matrix), targets=["X", "obs/y"])
    assert samples.variable("X").model_dtype == np.float32
    x, _ = one_epoch(samples)
    assert (x.dtype, x.max()) == (np.float32, 2**24)  # counts beyond 2**24 are rounded


def test_samples_travel(store):
    samples = opened(store())
    again = pickle.loads(pickle.dumps(samples))
    assert again == samples
    np.testing.assert_array_equal(rows_of(again), random().toarray())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("reader", READERS)
def test_a_small_matrix_beside_large_arrays_is_read_once(tmp_path, reader):
    path = write_anndata(tmp_path / "s.zarr", x=np.ones((30, 600), "float32"))
    matrix = random(30, 4, 0.2)
    write_sparse(zarr.open_group(path, mode="r+")["obsm"], "thin", matrix)
    samples = opened(path, ["obsm/thin", "X"], ["obs/age"])
    assert "obsm/thin" in [v.name for v in samples.preloaded]
    x, y = one_epoch(samples, reader)
    np.testing.assert_array_equal(x, matrix.toarray()[y])


def test_through_fsspec_the_same(store):
    path = store(chunks=16)
    memory = fsspec.filesystem("memory")
    memory.put(str(path), "/sparse/cells.zarr", recursive=True)
    try:
        samples = opened("memory://sparse/cells.zarr")
        assert {name: reader for name, (reader, _) in UnitReader(samples).readers.items()}["X/data"] == "zarr"
        check_presence(samples)
        np.testing.assert_array_equal(rows_of(samples), random().toarray())
        x, y = one_epoch(samples)
        np.testing.assert_array_equal(x, random().toarray()[y])
    finally:
        memory.rm("/sparse", recursive=True)


def test_the_fingerprint_knows_how_the_arrays_are_stored(store):
    first = opened(store())
    assert opened(store(name="same.zarr")).fingerprint == first.fingerprint
    other = opened(store(name="other.zarr", chunks=65))
    assert other.fingerprint != first.fingerprint
    variable = replace(first.variable("X"), chunks=(7, 9), objects=(7, 9))  # what is read at once is no fact
    assert replace(first, variables=(variable, *first.variables[1:])).fingerprint == first.fingerprint


# Refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("X", "adata.X = adata.X.tocsr()"),
        ("layers/thin", 'adata.layers["thin"] = adata.layers["thin"].tocsr()'),
    ],
)
def test_columns_by_columns_are_refused_with_the_cure(tmp_path, name, cure):
    path = write_anndata(tmp_path / "s.zarr")
    root = zarr.open_group(path, mode="r+")
    if name == "X":
        del root["X"]
    write_sparse(root, name, random(30, 6).tocsc(), "csc_matrix")
    said = rf"{name} is stored gene by gene \(CSC\), and the samples lie along cell: for a single one all of it"
    with pytest.raises(UnsuitableVariable, match=said) as caught:
        opened(path, [name], ["obs/age"])
    assert (caught.value.code, cure in caught.value.hint) == (3, True)


def test_rows_by_rows_are_refused_where_columns_are_samples(store):
    path = store()
    write(frame(zarr.open_group(path, mode="r+"), "var", 9, ["mean"]), "mean", np.arange(9), (9,))
    with pytest.raises(
        UnsuitableVariable, match=r"stored cell by cell \(CSR\), and the samples lie along gene"
    ) as caught:
        opened(path, targets=["var/mean"])
    assert "adata.X = adata.X.tocsc()" in caught.value.hint


def test_a_matrix_without_the_sample_dimension_is_refused(tmp_path):
    path = write_anndata(tmp_path / "s.zarr")
    write_sparse(zarr.open_group(path, mode="r+").create_group("varm"), "loadings", random(6, 4))
    with pytest.raises(UnsuitableVariable, match="varm/loadings is a sparse matrix without cell"):
        opened(path, ["X", "varm/loadings"], ["obs/age"], sample_dim="cell")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"patch": {"gene": 3}}, r"data.patch = { gene = 3 }: .* holds X as a sparse matrix"),
        ({"missing": "skip"}, 'data.missing = "skip": .* holds X as a sparse matrix'),
        ({"non_finite": "skip"}, "data.non_finite: .* holds X as a sparse matrix"),
        ({"isel": {"gene": 9}}, "gene has 9 places"),
        ({"normalize": {"X": ["cell"]}}, "is the dimension of the samples"),
    ],
)
def test_keys_that_a_sparse_matrix_cannot_follow(store, data, said):
    with pytest.raises(InvalidConfig, match=said):
        opened(store(), **data)


def test_an_array_of_a_matrix_is_no_variable_beside_it(store):
    with pytest.raises(InvalidConfig, match="X/data is a part of X, a sparse matrix"):
        opened(store(), ["X", "X/data"], dims={"X/data": ["value"]}, sample_dim="cell")


def test_a_wrong_name_lists_the_matrix_by_its_group(store):
    with pytest.raises(UnknownVariable) as caught:
        opened(store(), ["Y"])
    assert "It has X, obs/_index, obs/y" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda x: x.attrs.update(shape=[41, 9]),
            r"X is a sparse matrix of shape \[41, 9\], and its arrays do not fit",
        ),
        (lambda x: x.attrs.update(shape="40x9"), "of shape 40x9"),
        (lambda x: x.attrs.update(shape=[40, 10**30]), "of shape .*, and its arrays do not fit"),
        (lambda x: x["data"].resize((3,)), "indptr 41, indices 108, data 3 values"),
        (lambda x: x.__delitem__("indptr"), "X/indptr, a part of a sparse matrix, .* there is none"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(store, change, said):
    path = store()
    change(zarr.open_group(path, path="X", mode="r+"))
    with pytest.raises(NotZarr, match=said) as caught:
        opened(path)
    assert caught.value.code == 5


@pytest.mark.parametrize(("encoding_type", "said"), [(None, "is absent"), ("csr", "is 'csr'")])
def test_a_matrix_that_does_not_say_of_which_kind_it_is(store, encoding_type, said):
    path = store()
    attributes = zarr.open_group(path, path="X", mode="r+").attrs
    attributes["encoding-type"] = encoding_type
    if encoding_type is None:
        del attributes["encoding-type"]
    with pytest.raises(
        UnsuitableVariable, match=f"X holds indptr, indices, data, .* {said}: csr_matrix or csc_"
    ) as got:
        opened(path)
    assert "set the attributes encoding-type and shape" in got.value.hint


@pytest.mark.parametrize(("part", "dtype"), [("data", "complex64"), ("indices", "float32"), ("indptr", "float64")])
def test_arrays_of_other_dtypes_are_refused(store, part, dtype):
    with pytest.raises(NotZarr, match=f"X/{part}, a part of a sparse matrix, should be an array of numbers"):
        opened(store(**{part: getattr(random(), part).astype(dtype)}))


# Faults -----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(9)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("part", ["indptr", "indices", "data"])
def test_chunks_that_are_missing_or_truncated_are_named(store, part, reader, zarr_format):
    path = store(zarr_format=zarr_format, chunks=20)
    gone = key(part, 1, path)
    stored = (path / gone).read_bytes()
    (path / gone).write_bytes(stored[: len(stored) // 2])
    with pytest.raises(ChunkUndecodable, match=f"chunk {gone} of X/{part} cannot be decoded"):
        one_epoch(opened(path), reader)
    (path / gone).unlink()
    with pytest.raises(ChunkMissing, match=f"chunk {gone} of X/{part} is missing") as caught:
        check_presence(opened(path))
    assert "skip" not in caught.value.hint
    with pytest.raises(ChunkMissing, match=f"chunk {gone} of X/{part} is missing"):
        one_epoch(opened(path), reader)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("part", ["indptr", "indices", "data"])
def test_inner_chunks_that_are_missing_are_named(store, part, reader):
    path = store(chunks=10, shards={"data": 3, "indices": 3, "indptr": 3})
    array = zarr.open_group(path, path="X", mode="r+")[part]
    with zarr.config.set({"array.write_empty_chunks": False}):
        array[10:20] = 0
    for read in (check_presence, lambda samples: one_epoch(samples, reader)):
        with pytest.raises(ChunkMissing, match=rf"chunk \(1,\) of X/{part}, in shard {key(part, 0, path)}, is missing"):
            read(opened(path))


@pytest.mark.parametrize("reader", READERS)
def test_flipped_bits_are_named_where_there_is_a_checksum(tmp_path, reader):
    path = write_cells(tmp_path / "s.zarr", random())
    x = zarr.open_group(path, path="X", mode="r+")
    values = x["data"][...]
    array = x.create_array("data", data=values, chunks=(20,), compressors=[zarr.codecs.Crc32cCodec()], overwrite=True)
    assert array.shape == values.shape
    file = path / "X/data/c/2"
    flipped = bytearray(file.read_bytes())
    flipped[5] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(ChunkUndecodable, match="chunk X/data/c/2 of X/data cannot be decoded"):
        one_epoch(opened(path), reader)
    assert not opened(path).variable("X").checksums  # not all of its arrays have some
    assert opened(path).variable("X/data").checksums


def test_missing_chunks_are_filled_if_that_is_asked_for(store):
    path = store(chunks=20)
    (path / key("data", 1, path)).unlink()
    expected = random()
    expected.data[20:40] = 0
    x, y = one_epoch(opened(path, missing="fill"))
    np.testing.assert_array_equal(x, expected.toarray()[y])
    assert check_presence(opened(path, missing="fill"))["X/data"].chunks == 1
    assert absent_rows(opened(path, missing="fill")) == ()


def test_chunks_of_cells_that_are_not_selected_may_be_missing(store):
    matrix = random(40)
    path = store(matrix, chunks={"data": 20, "indices": 20, "indptr": 100})
    (path / key("data", 0, path)).unlink()
    start = int(np.searchsorted(matrix.indptr, 20))
    samples = opened(path, isel={"cell": {"start": start}})
    check_presence(samples)
    x, y = one_epoch(samples)
    np.testing.assert_array_equal(x, matrix.toarray()[y])
    with pytest.raises(ChunkMissing, match="X/data/c/0"):
        check_presence(opened(path, isel={"cell": {"start": start - 1}}))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_named(store, value, reader):
    matrix = random(dtype="float64")
    matrix.data[33] = value
    path = store(matrix, chunks=20)
    with pytest.raises(NonFiniteData, match=rf"X/data\[33\] in chunk X/data/c/1 is {re.escape(str(value))}"):
        one_epoch(opened(path), reader)
    x, y = one_epoch(opened(path, non_finite="allow"), reader)
    np.testing.assert_array_equal(x, matrix.toarray()[y].astype("float32"))


def test_values_of_columns_that_are_not_selected_need_not_be_finite(store):
    matrix = random(dtype="float64")
    matrix.data[33] = np.nan
    column = int(matrix.indices[33])
    samples = opened(store(matrix), isel={"gene": {"start": column + 1}} if column < 8 else {"gene": {"stop": column}})
    assert np.isfinite(one_epoch(samples)[0]).all()
    with pytest.raises(NonFiniteData):
        one_epoch(opened(samples.path, isel={"gene": column}))


def changed(values, place, value):
    values = values.astype("int64")
    values[place] = value
    return values


@pytest.mark.sampled(13)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("part", "place", "value", "said"),
    [
        ("indices", 25, 9, r"X/indices\[25\] in chunk X/indices/c/1 is 9; X has 9 columns"),
        ("indices", 25, -1, r"X/indices\[25\] in chunk X/indices/c/1 is -1; X has 9 columns"),
        ("indices", 25, 2**32, rf"X/indices\[25\] in chunk X/indices/c/1 is {2**32}; X has 9 columns"),
        ("indptr", 0, 1, r"X/indptr\[0\] in chunk X/indptr/c/0 is 1; the first row begins at 0"),
        ("indptr", 22, 1, r"X/indptr\[22\] in chunk X/indptr/c/1 is 1; row 21 begins at \d+ and has 9 columns"),
        ("indptr", 22, 10**6, r"X/indptr\[22\] in chunk X/indptr/c/1 is 1000000; row 21 begins at"),
        ("indptr", 40, 107, r"X/indptr\[40\] in chunk X/indptr/c/2 is 107, where X ends; X/data holds 108 values"),
    ],
)
def test_numbers_that_cannot_be_true_are_named(store, part, place, value, said, reader):
    path = store(chunks=20, **{part: changed(getattr(random(), part), place, value)})
    with pytest.raises(ChunkUndecodable, match=said) as caught:
        one_epoch(opened(path), reader)
    assert caught.value.code == 5


def test_a_column_that_stands_twice_is_refused(store):
    matrix = random()
    start, stop = next(pair for pair in itertools.pairwise(matrix.indptr.tolist()) if pair[1] - pair[0] > 2)
    row = int(np.searchsorted(matrix.indptr, start, side="right")) - 1
    matrix.indices[stop - 1] = column = int(matrix.indices[start])
    with pytest.raises(UnsuitableVariable, match=f"X holds several values for row {row}, column {column}") as caught:
        one_epoch(opened(store(matrix)))
    assert "X.sum_duplicates()" in caught.value.hint


def test_a_store_that_changes_between_reads_is_noticed(store):
    path = store(chunks=20)
    samples = opened(path)
    reader = UnitReader(samples)
    reader.read(Box(0, 40))
    file = path / key("data", 1, path)
    file.write_bytes(file.read_bytes())
    with pytest.raises(DataChanged, match="chunk X/data/c/1 of X/data has been modified"):
        reader.read(Box(0, 40))


def test_rows_that_have_grown_since_the_plan_are_refused(store):
    samples = opened(store())
    plan, partition = planned(samples)
    small = replace(partition, plan=replace(plan, values=(plan.values[0] - 1,)))
    with pytest.raises(DataChanged, match="values, more than when the run was planned"):
        batches(UnitReader(samples), small, one_pass(small))


def test_the_digest_covers_all_three_arrays(store):
    path = store(chunks=20)
    before = content_digest(opened(path))
    assert before.keys() == {*PARTS, "obs/y"}
    for part in PARTS:
        (path / part / "c/1").unlink()
        now = content_digest(opened(path))
        assert now[part] != before[part]
        before = now


# Beside other keys -------------------------------------------------------------------------------------------------


def test_rows_are_chosen_by_coordinate_as_by_index(store):
    path = store()
    write(zarr.open_group(path, mode="a")["obs"], "cell", np.arange(100, 100 + random().shape[0]), (8,))
    by_coordinate = opened(path, sel={"cell": {"start": 104, "stop": 113}})
    by_index = opened(path, isel={"cell": {"start": 4, "stop": 14}})
    assert (by_coordinate.first_row, by_coordinate.num_samples) == (4, 14)
    assert np.array_equal(rows_of(by_coordinate), rows_of(by_index))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"sel": {"gene": {"start": 2}}}, "data.sel.gene: .*: gene has no coordinate"),
        ({"weight": "cos(lat)"}, r'data.weight = "cos\(lat\)": .* has no coordinate lat'),
        ({"weight": "cos(X)"}, r'"cos\(X\)" has the dimension gene that the target obs/y lacks'),
        ({"split": {"by": "X"}}, r'data.split.by = "X": .*: it has the dimensions cell, gene of lengths \[\d+, \d+\]'),
    ],
)
def test_other_keys_know_the_shape_of_a_matrix(store, data, said):
    with pytest.raises(DtrainError, match=said):
        find_given(opened(store(), **data), 0)
