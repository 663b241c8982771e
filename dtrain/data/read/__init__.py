"""Bytes from Zarr: stores, shards, codecs, and the checks that Zarr does not make."""
