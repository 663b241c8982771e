"""Predictions -> Zarr: documents and encoded chunks as bytes, and the places that they are written to.

documents.py  groups and arrays described; a part of an array encoded by zarr
place.py      where objects are written: a protocol, and which place a path means
local.py      a directory: each object written beside, synced and renamed
remote.py     behind a URL, through fsspec
icechunk.py   a repository: one transaction
coordinates.py  the coordinates of predictions, block by block
"""
