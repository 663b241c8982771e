"""Sparse rows in batches, and their moments: against dense rows, and against exact fractions."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from dtrain.data import sparse as rows
from dtrain.data.encoding import Scaling
from dtrain.data.load import moments
from dtrain.data.load.moments import sparse_moments
from dtrain.data.load.statistics import merge_moments, partition_moments, scalings_of
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.read.joined import values_counted
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.data.sparse import SparseRows, pieces
from dtrain.errors import NonFiniteData
from tests.data.helpers import WHOLE, batches, one_pass
from tests.data.layouts.fixtures import encoding, frame, write, write_sparse
from tests.sampling import examples


def of_scipy(matrix):
    return SparseRows(matrix.data, matrix.indices, matrix.indptr.astype("int64"))


def exact(columns):
    """Mean and standard deviation of each column, in fractions; None for a column without values."""
    found = []
    for column in columns:
        values = [Fraction(float(v)) for v in column if not np.isnan(v)]
        mean = sum(values) / len(values)
        found.append((float(mean), float(sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5))
    return found


@examples(60)
@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(0, 99),
    st.sampled_from(["int32", "float32", "float64", "around a million", "with NaN"]),
    st.sampled_from([1, 5, 1 << 20]),
)
def test_moments_are_those_of_dense_rows(count, width, seed, kind, most):
    rng = np.random.default_rng(seed)
    share = rng.random(width)
    dense = np.where(rng.random((count, width)) < share, rng.normal(0, 30, (count, width)), 0.0)
    dense = dense + (1e6 if kind == "around a million" else 0)
    dense = np.rint(dense).astype(kind) if kind == "int32" else dense.astype("float32" if kind == "float32" else "f8")
    matrix = sparse.csr_matrix(dense)
    if kind == "with NaN" and matrix.nnz > width:
        matrix.data[:: max(2, matrix.nnz // 3)] = np.nan
    dense = matrix.toarray().astype("float64")
    with mock.patch.multiple(moments, PIECE_VALUES=most, MIN_VALUES=0):
        for axes, columns in (((0,), dense.T), ((), dense.reshape(1, -1))):
            found = sparse_moments(of_scipy(matrix), width, axes)
            kept = [column for column in columns if not np.isnan(column).all()]
            has = [not np.isnan(column).all() for column in columns]
            np.testing.assert_array_equal(found.count, [np.isfinite(column).sum() for column in columns])
            for place, (mean, std) in zip(np.flatnonzero(has), exact(kept), strict=True):
                assert found.mean[place] == pytest.approx(mean, rel=1e-14, abs=1e-14)
                assert found.std[place] == pytest.approx(std, rel=1e-9, abs=1e-9 * abs(mean))


def test_moments_by_hand():
    # columns (1, 0, 3, 0), (0, 0, 0, 0) and (2, 2, 2, 2)
    matrix = sparse.csr_matrix(np.array([[1, 0, 2], [0, 0, 2], [3, 0, 2], [0, 0, 2]]))
    found = sparse_moments(of_scipy(matrix), 3, (0,))
    assert found.count.tolist() == [4, 4, 4]
    assert found.mean.tolist() == [1, 0, 2]
    assert found.squares.tolist() == [6, 0, 0]  # (1 - 1)^2 + 1 + 4 + 1
    whole = sparse_moments(of_scipy(matrix), 3)
    assert (whole.count.tolist(), whole.mean.tolist()) == ([12], [1])
    assert whole.squares[0] == pytest.approx(0 + 4 + 1 * 6 + 4, rel=1e-15)  # 1, 3, six zeros and four times 2


def test_integers_that_never_change_have_no_standard_deviation():
    for value in (3, 7, 2**52 + 1):
        matrix = sparse.csr_matrix(np.full((1001, 2), value))
        with mock.patch.multiple(moments, PIECE_VALUES=6, MIN_VALUES=0):
            assert sparse_moments(of_scipy(matrix), 2, (0,)).squares.tolist() == [0, 0]


@pytest.mark.parametrize(("most_values", "most_rows"), [(1, None), (4, None), (4, 2), (100, None), (100, 3)])
def test_pieces_are_runs_of_rows(most_values, most_rows):
    starts = np.array([0, 0, 3, 3, 3, 12, 13, 13], np.int64)
    found = list(pieces(starts, most_values, most_rows))
    assert [first for first, _ in found] == [0, *(after for _, after in found[:-1])]
    assert found[-1][1] == 7
    for first, after in found:
        assert after - first == 1 or starts[after] - starts[first] <= most_values
        assert after - first <= (most_rows or 7)
    assert list(pieces(np.zeros(1, np.int64))) == []


# Standardised -----------------------------------------------------------------------------------------------


@pytest.fixture
def both(tmp_path):
    """A function that opens the same values as sparse X and as dense layers/dense."""

    def write_both(dtype="float32", **data):
        rng = np.random.default_rng(5)
        dense = np.where(rng.random((300, 7)) < 0.4, rng.integers(1, 2000, (300, 7)), 0).astype(dtype)
        dense[:, 3] = 4
        dense[:, 4] = 0
        root = zarr.open_group(tmp_path / f"{dtype}.zarr", mode="w")
        root.attrs.update(encoding("anndata", "0.1.0"))
        write_sparse(root, "X", sparse.csr_matrix(dense), chunks=40)
        write(root.create_group("layers"), "dense", dense, (25, 7))
        write(frame(root, "obs", 1, ["y"]), "y", np.arange(300), (20,))
        names = ["X", "layers/dense"]
        return open_samples(
            tmp_path / f"{dtype}.zarr", inputs=names, targets=["X", "obs/y"], **{"split": WHOLE, **data}
        )

    return write_both


@pytest.mark.sampled(7)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int64"])
@pytest.mark.parametrize("dims", [[], ["gene"]])
@pytest.mark.parametrize("isel", [{}, {"gene": {"start": 1, "step": 2}}, {"gene": 2}])
def test_standardised_rows_have_the_bits_of_dense_ones(both, dtype, dims, isel):
    samples = both(dtype, normalize={"X": dims, "layers/dense": dims}, isel=isel)
    plan = values_counted(samples, plan_data(samples, replicas=3, seed=0))
    parts, reader = train_partitions(plan), UnitReader(samples)
    names = ["X", "layers/dense"]
    genes = 1 if isel == {"gene": 2} else 3 if isel else 7
    assert [v.num_means for v in samples.variables[:2]] == [genes if dims else 1] * 2
    found = scalings_of(merge_moments([partition_moments(reader, part, names) for part in parts]), samples.variables)
    np.testing.assert_allclose(found["X"].mean, found["layers/dense"].mean, rtol=1e-13)
    np.testing.assert_allclose(found["X"].std, found["layers/dense"].std, rtol=1e-12)
    for scaling in found.values():
        same = {"X": scaling, "layers/dense": scaling}
        for batch in batches(reader, parts[0], one_pass(parts[0]), scalings=same):
            sparse_x, dense_x = batch.inputs
            assert (sparse_x.dtype, sparse_x.shape) == (np.float32, dense_x.shape)
            assert sparse_x.tobytes() == dense_x.tobytes() == batch.targets[0].tobytes()
    with mock.patch.object(rows, "PIECE_VALUES", 3):
        again = batches(reader, parts[0], one_pass(parts[0]), scalings=found)
    for one, other in zip(again, batches(reader, parts[0], one_pass(parts[0]), scalings=found), strict=True):
        assert one.inputs[0].tobytes() == other.inputs[0].tobytes()


@pytest.mark.filterwarnings("ignore")
def test_what_no_gene_has_is_standardised_too(both):
    samples = both(normalize={"X": ["gene"]})
    plan = values_counted(samples, plan_data(samples, replicas=1, seed=0))
    (part,) = train_partitions(plan)
    reader = UnitReader(samples)
    scalings = scalings_of(partition_moments(reader, part, ["X"]), samples.variables)
    assert (scalings["X"].mean[3:5], scalings["X"].std[3:5]) == ((4, 0), (1, 1))
    found = batches(reader, part, [300], scalings=scalings)[0].inputs[0].astype("float64")
    np.testing.assert_allclose(found.mean(0), np.zeros(7), atol=1e-6)
    np.testing.assert_allclose(found.std(0), [1, 1, 1, 0, 0, 1, 1], atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_means_that_are_not_finite_are_refused(both):
    samples = both("float64", normalize=["X"], non_finite="allow")
    array = zarr.open_group(samples.path, path="X", mode="r+")["data"]
    array[7] = np.inf
    plan = values_counted(samples, plan_data(samples, replicas=1, seed=0))
    (part,) = train_partitions(plan)
    with pytest.raises(NonFiniteData, match=r"data\.normalize: X has no finite mean"):
        scalings_of(partition_moments(UnitReader(samples), part, ["X"]), samples.variables)
    array[7] = np.nan  # left out, as of dense rows
    scalings = scalings_of(partition_moments(UnitReader(samples), part, ["X"]), samples.variables)
    assert np.isfinite(scalings["X"].mean[0])


@pytest.mark.filterwarnings("ignore")
def test_a_run_without_means_reads_what_is_named_in_normalize_as_it_is(both):
    samples = both(normalize=["X"])
    plain = samples.standardised_by({})
    assert (plain.variable("X").is_standardised, plain.variable("X").kept_dtype) == (False, np.float32)
    again = plain.standardised_by({"X": Scaling((0.0,), (1.0,))})
    assert again.variable("X").is_standardised
    assert replace(again.variable("X"), mean_axes=None) == plain.variable("X")
