"""The engines that scan.py compares, one a module; a new one is a module and a line here."""

from __future__ import annotations

from peers import annbatch, blocks, dtrain_batches, in_memory, insitubatch, limit, litdata, per_sample, xbatcher

MODULES = (limit, dtrain_batches, blocks, insitubatch, annbatch, xbatcher, per_sample, litdata, in_memory)
ENGINES = {name: engine for module in MODULES for name, engine in module.ENGINES.items()}
"""By name, in the order of the tables."""
