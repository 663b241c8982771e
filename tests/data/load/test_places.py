"""Where samples lie: the rows and patches that the loader gives, sample by sample, whatever a plan looks like."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from dtrain.data.load.loader import read_batches
from dtrain.data.load.places import places_of_batches, places_of_tiles, valid_times
from dtrain.data.plan.multiplicity import multiplicities, multiplicity_text
from dtrain.data.plan.partition import cell_anchors, eval_partitions, plan_data
from dtrain.data.read.joined import open_reader
from dtrain.data.source import open_samples
from dtrain.types import Cursor

ROWS, LATS, LONS = 40, 7, 5


@pytest.fixture
def path(tmp_path, write_store):
    """A field whose values say row, latitude and longitude."""
    values = np.arange(ROWS * LATS * LONS, dtype="float32").reshape(ROWS, LATS, LONS)
    return write_store(
        tmp_path / "s.zarr", {"x": {"dims": ("time", "lat", "lon"), "values": values, "chunks": (4, 3, 5)}}
    )


def read(samples, plan, split, sizes):
    """Row and place of the first value of each sample, as the loader gives them."""
    reader = open_reader(samples, "auto")
    for piece in eval_partitions(plan, split):
        cut = list(itertools.islice(itertools.cycle(sizes), piece.num_samples))
        ends = np.minimum(np.cumsum(cut), piece.num_samples)
        cut = [int(n) for n in np.diff(ends, prepend=0) if n]
        batches = read_batches(reader, piece, Cursor(0, 0), cut, replica=0, shuffle=False)
        yield from zip(batches, places_of_batches(piece, cut), strict=True)


CASES = {
    "plain": {},
    "windows": {"target_offsets": [1, 3], "input_offsets": [-1, 0]},
    "stride": {"target_offsets": [1, 2], "stride": 3},
    "patches": {"patch": {"lat": 3, "lon": 2}},
    "held-out patches": {"patch": {"lat": 2}, "split": {"patches": True, "test": 0.3, "val": 0.0}},
    "a part": {"isel": {"time": {"start": 5, "stop": 33}, "lat": {"start": 1, "stop": 7, "step": 2}}},
}


@pytest.mark.sampled(18)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("is_counted", [False, True])
@pytest.mark.parametrize("split", ["test", "all"])
def test_places_are_those_of_the_loader(path, case, pieces, is_counted, split):
    given = {"split": {"test": 0.3, "val": 0.0}, **CASES[case]}
    samples = open_samples(path, inputs=["x"], targets=["x"], **given)
    plan = plan_data(samples, replicas=pieces, seed=1)
    if is_counted:  # some samples are left out
        values = multiplicities(plan)
        values[::3] = 0
        values[1::3] = 2  # only training repeats
        plan = replace(plan, multiplicity=multiplicity_text(values))
    lats = np.arange(LATS)[slice(*samples.variable("x").select[1])]
    seen = 0
    for batch, (anchors, tiles) in read(samples, plan, split, [1, 5, 2]):
        targets = batch.targets[0].reshape(batch.size, -1)
        first = samples.fields[1].offsets[0]
        row, place = np.divmod(targets[:, 0].astype(int), LATS * LONS)
        assert (row == anchors + first).all()
        starts = [{dim: start for dim, start, _ in samples.tiles[tile].ranges} for tile in tiles.tolist()]
        expected = [lats[one.get("lat", 0)] * LONS + one.get("lon", 0) for one in starts]
        assert place.tolist() == expected
        covered = places_of_tiles(samples, "lat", tiles)
        if covered is not None:
            wanted = [one["lat"] + np.arange(samples.config.patch["lat"]) for one in starts]
            assert (np.broadcast_to(covered, (batch.size, covered.shape[1])) == wanted).all()
        seen += batch.size
    assert seen == cell_anchors(plan, split).num_samples > 0
    assert places_of_tiles(samples, "time", np.zeros(1, int)) is None


def test_valid_times_by_hand(path):
    samples = open_samples(path, inputs=["x"], targets=["x"], target_offsets=[1, 2, 5], split={"val": 0.0, "test": 0.0})
    plan = plan_data(samples, replicas=1, seed=0)
    whole = cell_anchors(plan, "all")
    times = valid_times(whole, (1, 2, 5))
    anchors = set(range(ROWS - 5))
    rows = [{anchor + lead for anchor in anchors} for lead in (1, 2, 5)]
    assert set(np.flatnonzero(times.shared)) == set.intersection(*rows)
    assert set(np.flatnonzero(times.any_lead)) == set.union(*rows)
    back = valid_times(whole, (-2, 0))
    assert set(np.flatnonzero(back.shared)) == {a - 2 for a in anchors} & anchors


def test_a_stride_that_no_leads_share(path):
    samples = open_samples(
        path, inputs=["x"], targets=["x"], target_offsets=[1, 2], stride=4, split={"val": 0.0, "test": 0.0}
    )
    times = valid_times(cell_anchors(plan_data(samples, replicas=1, seed=0), "all"), (1, 2))
    assert not times.shared.any()
    assert times.any_lead.sum() == 2 * 10
