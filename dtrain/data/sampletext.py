"""Samples as a person reads them: what `print(samples)` and ``dtrain plan`` show of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain.config.names import IGNORED_CLASS
from dtrain.data.encoding import Encoding
from dtrain.data.variable import Categories, Variable
from dtrain.display import shown
from dtrain.errors import shortened

if TYPE_CHECKING:
    from dtrain.data.samples import Samples

MOST_CLASSES, MOST_LETTERS = 6, 40
"""Categories whose names are printed, and letters of each."""
MOST_STORES = 3
"""Stores that are printed, of the first and of the last ones."""


def described(samples: Samples) -> list[tuple[str, str]]:
    """Return label and text of each line of the printed table."""
    config = samples.config
    lines = [("rows", f"{samples.num_rows:,} along {samples.sample_dim}")]
    lines += [("chosen", str(chosen)) for chosen in samples.chosen]
    weights = (config.weight,) if config.weight else ()
    for role, names in (("input", config.inputs), ("target", config.targets), ("weight", weights)):
        lines += [line for name in names for line in _variable(samples, role, samples.variable(name))]
    if samples.has_windows or config.stride > 1:
        low, high = samples.reach()
        lines.append(("windows", f"rows {low:+d} to {high:+d} around every multiple of {config.stride}"))
    lines += [("normalize", f"{v.name}: {_means(v)}") for v in samples.variables if v.is_standardised]
    if len(samples.tiles) > 1:
        size = " x ".join(f"{cut.dim} {cut.size}" for cut in samples.tiles.cuts)
        lines.append(("patches", f"{len(samples.tiles):,} a row, of {size}"))
    stores = ("stores", _stores(samples.members)) if samples.members else ("store", shown(samples.path))
    return [*lines, stores, *samples.store.notes]


def _variable(samples: Samples, role: str, v: Variable) -> list[tuple[str, str]]:
    lengths = zip(v.dims, v.shape, strict=True)
    shape = tuple(samples.num_rows if samples.members and dim == samples.sample_dim else n for dim, n in lengths)
    lines = [(f"{role} {v.name}", f"{v.dtype}[{', '.join(v.dims)}] {shape}, {_chunks(v)}")]
    if v.categories is not None:
        lines.append((f"classes {v.name}", _classes(v.categories)))
    if v.encoding is not None and v.encoding.ignored == IGNORED_CLASS:
        lines.append((f"labels {v.name}", _ignored(v.encoding)))
    return lines


def _chunks(v: Variable) -> str:
    """Return how a variable is stored."""
    if v.sparse is not None:
        share = v.sparse.count / max(1, v.sparse.rows * v.shape[1 - v.sample_axis])
        return f"sparse, {v.sparse.count:,} values ({share:.1%}), {_chunks(v.sparse.data)}"
    stored = "x".join(map(str, v.chunks))
    if v.has_inner_chunks:
        stored += " in shards of " + "x".join(map(str, v.objects))
    return f"chunks {stored}"


def _ignored(encoding: Encoding) -> str:
    """Return what becomes of missing labels."""
    marks = ", ".join(f"{mark:g}" if isinstance(mark, float) else str(mark) for mark in encoding.missing)
    why = "losses and metrics leave it out" if encoding.passes else 'refused unless data.non_finite = "allow"'
    return f"{marks} marks a missing label: it is class {encoding.ignored}, {why}"


def _stores(members: Sequence[Samples]) -> str:
    """Return the number of stores that are one, and the rows of the first and last of them."""
    texts = [f"{shown(one.path)} {one.num_samples - one.first_row:,}" for one in members]
    if len(texts) > 2 * MOST_STORES:
        texts[MOST_STORES:-MOST_STORES] = ["..."]
    return f"{len(members):,}, one after the other, with their rows: {', '.join(texts)}"


def _classes(categories: Categories) -> str:
    """Return how many categories there are, and the first of them."""
    shown_names = [shortened(name, MOST_LETTERS) for name in categories.names[:MOST_CLASSES]]
    more = categories.count - len(shown_names)
    return f"{categories.count:,}: {', '.join(shown_names)}" + (f" and {more:,} more" if more else "")


def _means(v: Variable) -> str:
    """Return how many means a variable is standardised by."""
    if not v.mean_axes:
        return "one mean of all values"
    return f"one mean for each of the {v.num_means:,} places of {' x '.join(v.mean_dims)}"
