"""``data.split``: which samples are held out for validation and test, as shares, by coordinate or by group."""

from __future__ import annotations

from typing import Self, TypeAlias

from pydantic import model_validator

from dtrain.config.slices import LabelRange, LabelSlice
from dtrain.config.table import Bool, Natural, Share, Table

HeldRange: TypeAlias = dict[str, LabelRange]
"""By one dimension: the values of its coordinate that are held out, both ends included."""


class SplitConfig(Table):
    """What is held out for validation and test."""

    val: Share | HeldRange = 0.1
    """A share of the samples for validation, or a range of a coordinate: { time = "2017" }."""
    test: Share | HeldRange = 0.1
    """A share of the samples for the test, or a range of a coordinate: { time = { start = "2018" } }."""
    gap: Natural = 0
    """Rows that are left out on each side of a range."""
    by: str = ""
    """A variable of groups, such as "donor": all rows of a group lie in one split."""
    patches: Bool = False
    """Hold out places, in all rows, instead of rows."""

    @property
    def shares(self) -> dict[str, float]:
        """The splits that are shares: 0 where there is none."""
        return {name: held for name, held in (("val", self.val), ("test", self.test)) if not isinstance(held, dict)}

    @property
    def ranges(self) -> dict[str, tuple[str, LabelRange]]:
        """Dimension and values of the splits that are ranges of a coordinate."""
        held = ((name, held) for name, held in (("val", self.val), ("test", self.test)) if isinstance(held, dict))
        return {name: next(iter(table.items())) for name, table in held}

    def holds_out(self, name: str) -> bool:
        """Return True if samples are held out for validation (``val``) or test (``test``)."""
        return name in self.ranges or self.shares[name] > 0

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if (total := sum(self.shares.values())) >= 1:
            raise ValueError(f"val + test = {total:g} leaves nothing to train on; they must sum to < 1")
        return self

    @model_validator(mode="after")
    def _ranges_are_single(self) -> Self:
        for name, held in (("val", self.val), ("test", self.test)):
            if isinstance(held, dict) and len(held) != 1:
                raise ValueError(f"{name} names {len(held)} dimensions; one is needed, such as {{ time = ... }}")
        for name, (dim, wanted) in self.ranges.items():
            if isinstance(wanted, LabelSlice) and wanted.start is None and wanted.stop is None:
                raise ValueError(f"{name}.{dim} has neither start nor stop, and leaves nothing to train on")
            if isinstance(wanted, LabelSlice) and wanted.step != 1:
                raise ValueError(f"{name}.{dim} has a step; all from start to stop is held out")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        dims = {dim for dim, _ in self.ranges.values()}
        if len(dims) > 1:
            raise ValueError(f"val and test are ranges of {' and '.join(sorted(dims))}; both must be of one dimension")
        if self.by and self.ranges:
            raise ValueError(
                f'by = "{self.by}" divides groups by shares; write val and test as shares, or leave by out'
            )
        if self.by and self.patches:
            raise ValueError(f'by = "{self.by}" holds out rows, and patches = true holds out places; give one of them')
        if self.patches and not self.shares:
            raise ValueError("patches = true is for shares, and val and test are both ranges; leave patches out")
        self._check_gap()
        return self

    def _check_gap(self) -> None:
        if self.gap and not self.ranges:
            raise ValueError(f"gap = {self.gap} leaves out rows beside a range, and neither val nor test is one")
        beside = [f"{name} = {share:g}" for name, share in self.shares.items() if share]
        if self.gap and beside:
            raise ValueError(
                f"gap = {self.gap} leaves out rows beside a range, but none beside a share, and {beside[0]} is one; "
                f"write it as a range too, or {beside[0].partition(' ')[0]} = 0"
            )
