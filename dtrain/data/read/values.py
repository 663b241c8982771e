"""Faults of values: not finite, no weights, integers that are too large. The one place for their sentences."""

from __future__ import annotations

import numpy as np

from dtrain.data.encoding import Array, Encoding, is_missing, unpack
from dtrain.data.plan.splits import Runs
from dtrain.data.read.faults import Faults, ways
from dtrain.data.read.weights import check_not_all_zero, not_a_weight, wrong_weights
from dtrain.data.samples import Samples
from dtrain.data.variable import Select, Variable
from dtrain.errors import NonFiniteData, UnsuitableVariable


class Values:
    """Checks the values of some samples, and names the first one that is at fault. Threads may share it.

    Each check is given the variable, where its values come from, and the values as they are kept in memory:
    array[rows, *row].

    Parameters
    ----------
    samples : Samples
    faults : Faults
        Names values and their chunks.
    absent : tuple of (int, int)
        Runs of rows that nobody needs: their values are not looked at.
    """

    def __init__(self, samples: Samples, faults: Faults, absent: Runs = ()) -> None:
        self._samples, self._faults, self._absent = samples, faults, absent

    def check_finite(self, variable: Variable, select: Select, values: Array) -> None:
        """Raise if a value is missing, or not finite as the model sees it: a large float64 is infinite in float32.

        Raises
        ------
        NonFiniteData
        """
        place = self._first(variable, select, not_finite(variable, values))
        if place is None:
            return
        text, value = self._faults.stored(variable, place)
        is_mark = variable.encoding is not None and bool(is_missing(_as_marked(variable, value), variable.encoding))
        why = ", which float32 cannot hold" if np.isfinite(value) else ""
        if self._faults.is_gone(variable, place):
            raise NonFiniteData(f"{text}: the chunk is not stored.", ways(self._samples, variable))
        if is_mark:
            why = ", which marks a missing value"
        elif why and variable.encoding is not None and variable.encoding.is_packed:
            with np.errstate(over="ignore"):
                why = f", unpacked {float(unpack(value, variable.encoding)):g}{why}"
        hint = 'Leave such samples out (data.non_finite = "skip"), repair the data, or set data.non_finite = "allow".'
        if is_mark and variable.encoding is not None and variable.encoding.ignored is not None:
            is_label = variable.name in self._samples.config.targets
            sees = "your loss and metrics see class" if is_label else "the model sees"
            hint = (
                f'Repair the data. With data.non_finite = "allow" {sees} {variable.encoding.ignored} there, and must '
                "leave it out."
            )
        raise NonFiniteData(f"{text}{why}.", hint)

    def check_weight(self, variable: Variable, select: Select, values: Array) -> None:
        """Raise if a value is no weight of samples: negative, or not finite, whatever ``data.non_finite`` says.

        Raises
        ------
        NonFiniteData
            A value is missing or not finite.
        UnsuitableVariable
            A value is negative, an angle lies beyond 90 degrees, or all values of a static weight are 0.
        """
        wrong = wrong_weights(variable, values)
        if (place := self._first(variable, select, wrong)) is not None:
            text, value = self._faults.stored(variable, place)
            raise not_a_weight(text, variable, value)
        if variable.is_static:
            check_not_all_zero(self._samples.path, variable, values)

    def check_integers(self, variable: Variable, select: Select, values: Array) -> None:
        """Raise if an unsigned integer does not fit the int64 that the model sees.

        Raises
        ------
        UnsuitableVariable
        """
        if variable.model_dtype != np.int64 or variable.decoded_dtype != np.uint64:
            return
        signed = values.view(np.int64)
        if signed.size and signed.min() < 0:
            beyond = signed < 0
            if variable.encoding is not None and variable.encoding.missing:
                beyond &= ~is_missing(_as_marked(variable, values), variable.encoding)
            place = self._first(variable, select, beyond)
            if place is not None:
                text, value = self._faults.stored(variable, place)
                meant = "" if value.dtype.kind == "u" else f", which means {value.view(np.uint64)}"
                raise UnsuitableVariable(
                    f"{text}{meant}; the model sees int64, which ends at {2**63 - 1}.",
                    f"Store {variable.name} with smaller numbers or as floats, or name it in data.normalize: then the "
                    "model sees floats.",
                )

    def _first(self, variable: Variable, select: Select, bad: Array | None) -> list[int] | None:
        """Return the place in the array of the first bad value that is not in a row that nobody needs."""
        if bad is None:
            return None
        if not variable.is_static and not variable.part_of:
            start = select[variable.sample_axis][0]
            for first, after in self._absent:
                bad[max(0, first - start) : max(0, after - start)] = False
        if not bad.any():
            return None
        place = [part[0] for part in select]
        axes = list(variable.row_axes) if variable.is_static else [variable.sample_axis, *variable.row_axes]
        for axis, index in zip(axes, np.argwhere(bad)[0].tolist(), strict=True):
            place[axis] = range(*select[axis])[index]
        return place


def not_finite(variable: Variable, values: Array) -> Array | None:
    """Return where values are missing, or not finite as the model sees them; None if nowhere.

    A missing label that the loss leaves out counts as finite.

    Parameters
    ----------
    variable : Variable
    values : array[rows, *row]
        As they are kept in memory.
    """
    has_marks = variable.encoding is not None and bool(variable.encoding.missing) and not variable.encoding.passes
    bad = None
    with np.errstate(all="ignore"):
        # one pass that writes nothing: the sum is only finite if all values are
        if values.dtype.kind == "f" and not np.isfinite(np.add.reduce(values, axis=None, dtype=np.float32)):
            bad = ~np.isfinite(values.astype(np.float32, copy=False))
        if variable.encoding is not None and _overflows(values, variable.encoding):
            beyond = ~np.isfinite(unpack(values, variable.encoding).astype(np.float32, copy=False))
            bad = beyond if bad is None else bad | beyond
    if has_marks and variable.encoding is not None:
        marked = is_missing(_as_marked(variable, values), variable.encoding)
        bad = marked if bad is None else bad | marked
    return bad


def _overflows(values: Array, encoding: Encoding) -> bool:
    """Return True if unpacking may make a float32 infinite: unpacked values lie between those of two bounds."""
    if not encoding.is_packed or not values.size or values.dtype.kind == "b":
        return False
    if values.dtype.kind == "f":
        bounds = np.array([values.min(), values.max()])  # NaN if there is one
    else:
        info = np.iinfo(values.dtype)
        bounds = np.array([info.min, info.max, 2.0 * info.max])  # with other signs too
    scale, offset = encoding.scale or 1.0, encoding.offset or 0.0
    return not np.isfinite((bounds.astype(np.float64) * scale + offset).astype(np.float32)).all()


def _as_marked(variable: Variable, values: Array) -> Array:
    """Return stored values as the marks of missing values are meant: with other signs where the encoding says so."""
    if variable.encoding is not None and variable.encoding.unsigned:
        return values.view(variable.encoding.unsigned)
    return values
