"""Inspect a store for ``dtrain init --data``, and write a config file that ``dtrain plan`` accepts.

The steps: `contents` lists the arrays of a store with what their metadata say, and `values` reads a few chunks of them;
`roles` says which dimensions are time, places or channels. A `draft` says what is learned from what: `text`, `forecast`
and `supervised` make one, the last with `target`; so do `microscopy`, for the images that `pyramids` finds in OME-Zarr,
and `cells`, for AnnData. `tables` and `settings` turn it into a configuration, with `gaps` for chunks that are not
stored; `document` writes it with its comments.
"""
