"""Fixtures that write single arrays, without a group."""

from __future__ import annotations

import warnings

import pytest
import zarr

from tests.data.read.helpers import KINDS


@pytest.fixture
def create(tmp_path):
    """A function that writes an array into a folder of its own, and opens it."""

    def write(values, chunks, kind="v3 zstd", **changes):
        zarr_format, options = KINDS[kind]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with warnings.catch_warnings(), zarr.config.set({"array.write_empty_chunks": True}):
            if "old" in kind:
                warnings.simplefilter("ignore")
                options = {"compressors": options["compressors"]()}
            array = zarr.create_array(
                folder,
                shape=values.shape,
                dtype=values.dtype,
                chunks=chunks,
                zarr_format=zarr_format,
                **{"fill_value": 0, **options, **changes},
            )
            array[...] = values
        return array

    return write
