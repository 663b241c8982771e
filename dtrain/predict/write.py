"""Predictions to Zarr: refused, created or continued, then written by tasks, unit by unit."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtrain.data.layouts.ome import written_image
from dtrain.data.outcoords import OutputCoordinate, coordinate_names
from dtrain.data.plan.footprint import format_bytes
from dtrain.data.plan.heads import OutputArray
from dtrain.data.plan.prediction import Unit
from dtrain.data.write.documents import ArraySpec, documents, encode, keys_of, whole
from dtrain.data.write.sink import Sink
from dtrain.errors import DiskFull, OutputExists, RunConflict
from dtrain.events import PredictionStarted, Reporter, SamplesPredicted
from dtrain.predict.prepare import Prepared, group_attributes
from dtrain.runtime.predicting import Executor, Payload, SpanDone
from dtrain.urls import redacted_in, redacted_url

SPAN_BYTES = 256 << 20
"""Inputs of a task, at most, if a unit is not larger."""
HANDED_BYTES = 8 << 20
"""Predictions of a task that hands them back."""
TASKS_A_WORKER = 4
"""At least so many tasks a worker, if there are as many units."""
COORDINATE_BYTES = 4 << 20
"""Of a chunk of a coordinate."""
COMPRESSED = {"f": 0.5, "i": 0.02, "u": 0.02, "b": 0.02}
"""Shares of its bytes that an array takes on disk at least, by kind: only what cannot fit is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What has been written."""

    out: str
    round: int
    samples: int
    """Samples that are predicted in all."""
    new: int
    """Of this call."""
    left_out: int
    """Samples of this call without a prediction (``data.non_finite``)."""
    shapes: dict[str, list[int]]
    """By array."""
    written: int
    """Bytes of this call."""
    decoded: int
    """Bytes of inputs of this call."""
    seconds: float


def array_specs(prepared: Prepared) -> dict[str, ArraySpec]:
    """Return the arrays of predictions, then their coordinates."""
    specs = {}
    for head in prepared.work.heads:
        for array in head.arrays:
            named = coordinate_names(prepared.beside, array.dims)
            specs[array.name] = ArraySpec(
                name=array.name,
                dims=array.dims,
                shape=array.shape,
                chunks=prepared.work.plan.chunks[array.name],
                dtype=array.dtype,
                attributes={**array.attributes, **_mark(array), **({"coordinates": named} if named else {})},
                fill_value=0 if array.fill is None else array.fill,
            )
    for one in prepared.beside:
        specs[one.name] = ArraySpec(
            name=one.name,
            dims=one.dims,
            shape=one.shape,
            chunks=_coordinate_chunks(one),
            dtype=one.dtype,
            attributes=one.attributes,
            fill_value=float("nan") if np.dtype("O" if one.dtype == "str" else one.dtype).kind == "f" else 0,
        )
    return specs


def _mark(array: OutputArray) -> dict[str, Any]:
    """Return the attribute that marks predictions of samples that are left out; NaN needs none."""
    return {} if array.fill is None or array.numpy_dtype.kind == "f" else {"_FillValue": array.fill}


def _coordinate_chunks(one: OutputCoordinate) -> tuple[int, ...]:
    if not one.shape:
        return ()
    row = 8 * int(np.prod(one.shape[1:], dtype=int))
    return (max(1, min(one.shape[0], COORDINATE_BYTES // max(1, row))), *(max(1, n) for n in one.shape[1:]))


# Writing ----------------------------------------------------------------------------------------------------


def write_predictions(
    prepared: Prepared,
    sink: Sink,
    executor: Executor,
    *,
    goes_on: bool,
    tell: Reporter = lambda event: None,
) -> Written:
    """Write predictions, or what is lacking of them.

    Parameters
    ----------
    prepared : Prepared
    sink : Sink
    executor : Executor
    goes_on : bool
        Continue an output that is there.
    tell : callable
        Called with the progress.

    Raises
    ------
    OutputExists, RunConflict
        There is an output, and it is not to be continued, or was begun with other settings.
    DiskFull
        It cannot be written.
    """
    began = time.monotonic()
    check_output(sink, goes_on=goes_on, settings=prepared.settings)
    specs, plan = array_specs(prepared), prepared.work.plan
    is_new = sink.attributes() is None
    arrays = [array for head in prepared.work.heads for array in head.arrays]
    if is_new:
        _check_space(sink, arrays)
    with sink.writing(prepared.spec.run_id):
        sink.create(documents(_attributes(prepared), list(specs.values()), consolidated=sink.consolidated))
        left = list(range(plan.num_units)) if is_new else _lacking_units(prepared, sink, specs, arrays)
        before = prepared.samples - sum(plan.samples_in(unit) for unit in map(plan.unit, left))
        tell(
            PredictionStarted(
                out=redacted_url(sink.path),
                samples=prepared.samples,
                done=before,
                workers=executor.num_workers,
                nbytes=sum(int(np.prod(array.shape)) * array.numpy_dtype.itemsize for array in arrays),
                budget=prepared.budget.sentence(),
                dashboard=executor.dashboard,
            )
        )
        payload = Payload(
            prepared.spec, prepared.facts.params, prepared.work, specs, sink.writer(), prepared.budget.ahead
        )
        _write_coordinates(prepared, payload, sink, specs, only_lacking=not is_new)
        total = _Totals()
        started = time.monotonic()

        def done(span: SpanDone) -> None:
            total.add(span)
            if span.objects is not None:
                writer = payload.writer.fresh()
                writer.put(span.objects)
                sink.settle(writer.receipt())
            elif span.receipt is not None:
                sink.settle(span.receipt)

        def on_samples(samples: int) -> None:
            tell(
                SamplesPredicted(
                    done=before + samples,
                    samples=prepared.samples,
                    new=samples,
                    seconds=time.monotonic() - started,
                )
            )

        if left:
            is_reached = executor.is_reached(payload.writer)
            executor.run(payload, _spans(prepared, left, executor.num_workers, is_reached), done, on_samples)
        sink.commit(_attributes(prepared)["title"])
    return Written(
        out=redacted_url(sink.path),
        round=prepared.facts.round,
        samples=prepared.samples,
        new=total.samples,
        left_out=total.left_out,
        shapes={array.name: list(array.shape) for array in arrays},
        written=total.written,
        decoded=total.decoded,
        seconds=time.monotonic() - began,
    )


@dataclass(slots=True)
class _Totals:
    samples: int = 0
    left_out: int = 0
    written: int = 0
    decoded: int = 0

    def add(self, span: SpanDone) -> None:
        self.samples += span.samples
        self.left_out += span.left_out
        self.written += span.written
        self.decoded += span.decoded


def check_output(sink: Sink, *, goes_on: bool, settings: Any = None) -> None:
    """Refuse an output that is there and is not to be continued, or was begun with other settings.

    Raises
    ------
    OutputExists, RunConflict
    """
    if not sink.exists():
        return
    if not goes_on:
        raise OutputExists(
            f"{sink.path} is there already, and nothing is overwritten.",
            "Choose another --out; or --continue, if these predictions were interrupted.",
        )
    attributes = sink.attributes() or {}
    try:
        before = redacted_in(json.loads(attributes["dtrain_settings"]))  # as they are written now
    except (LookupError, ValueError, TypeError):
        raise OutputExists(
            f"{sink.path} holds something else than predictions of dtrain: it cannot be continued.",
            "Choose another --out.",
        ) from None
    if settings is None:
        return
    changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if changed:
        shown = "; ".join(f"{key} was {_shown(before.get(key))}, is {_shown(settings.get(key))}" for key in changed[:3])
        raise RunConflict(
            f"{sink.path} was begun with other settings: {shown}.", "Choose another --out, or the same settings."
        )


def _shown(value: Any) -> str:
    text = "not given" if value is None else str(value) if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text


def _check_space(sink: Sink, arrays: Sequence[OutputArray]) -> None:
    """Refuse a disk that cannot hold the predictions, however well they are compressed."""
    free = sink.free_bytes()
    sizes = [(int(np.prod(array.shape)) * array.numpy_dtype.itemsize, array.numpy_dtype.kind) for array in arrays]
    needed = sum(int(size * COMPRESSED.get(kind, 0.02)) for size, kind in sizes)
    if free is not None and needed > free:
        raise DiskFull(
            f"{sink.path}: predictions take {format_bytes(sum(size for size, _ in sizes))} before they are compressed, "
            f"and about {format_bytes(needed)} at least; {format_bytes(free)} are free.",
            "Choose another --out, or fewer predictions (--values, --set data.isel=...).",
        )


def _attributes(prepared: Prepared) -> dict[str, Any]:
    attributes = group_attributes(prepared)
    image = _image(prepared)
    return attributes if image is None else {**attributes, "ome": image}


def _image(prepared: Prepared) -> dict[str, Any] | None:
    """Return the ``multiscales`` of predictions of an image, so that viewers open them; None for others."""
    request, anchors = prepared.request, prepared.work.plan.anchors
    samples = request.labels or request.inputs
    first = prepared.work.heads[0].arrays[0]
    variable = samples.variable(samples.config.targets[0] if request.labels else samples.config.inputs[0])
    if len(anchors.first) != 1 or samples.members:
        return None
    ranges = {dim: (part[0], part[2]) for v in samples.variables for dim, part in zip(v.dims, v.select, strict=True)}
    ranges[samples.sample_dim] = (int(anchors.first[0]), anchors.stride)
    path = "/".join(filter(None, (samples.config.group.strip("/"), variable.array_path)))
    return written_image(prepared.coordinates.hierarchy, path, first.name, first.dims, ranges)


def _write_coordinates(
    prepared: Prepared, payload: Payload, sink: Sink, specs: dict[str, ArraySpec], *, only_lacking: bool
) -> None:
    """Write the coordinates, block by block."""
    writer = payload.writer.fresh()
    for one in prepared.beside:
        spec = specs[one.name]
        regions = list(_regions(spec, one, prepared.work.plan.sample_dim))
        keys = [keys_of(spec, region) for region in regions]
        lacking = iter(list(sink.lacking([key for own in keys for key in own])) if only_lacking else ())
        for region, own in zip(regions, keys, strict=True):
            if only_lacking and not any_of(lacking, len(own)):
                continue
            low, high = (region[0].start, region[0].stop) if region else (0, 0)
            writer.put(dict(encode(spec, region, prepared.values_of(one, low, high))))
    if (receipt := writer.receipt()) is not None:
        sink.settle(receipt)


def _regions(spec: ArraySpec, one: OutputCoordinate, sample_dim: str) -> Iterator[tuple[slice, ...]]:
    """Yield the parts of a coordinate that are written at once: runs along the samples, if it has that dimension."""
    if one.values is not None or not one.dims or one.dims[0] != sample_dim:
        yield whole(spec)
        return
    for start in range(0, spec.shape[0], spec.chunks[0]):
        yield (slice(start, min(spec.shape[0], start + spec.chunks[0])), *whole(spec)[1:])


# Units ------------------------------------------------------------------------------------------------------


def _unit_keys(prepared: Prepared, specs: dict[str, ArraySpec], arrays: Sequence[OutputArray], unit: Unit) -> list[str]:
    return [key for one in arrays for key in keys_of(specs[one.name], prepared.work.plan.region(one, unit))]


def _lacking_units(
    prepared: Prepared, sink: Sink, specs: dict[str, ArraySpec], arrays: Sequence[OutputArray]
) -> list[int]:
    """Return the units of which a chunk is not there, or damaged."""
    plan = prepared.work.plan
    units = [plan.unit(number) for number in range(plan.num_units)]
    counts = [len(_unit_keys(prepared, specs, arrays, unit)) for unit in units]
    lacking = sink.lacking(key for unit in units for key in _unit_keys(prepared, specs, arrays, unit))
    return [unit.number for unit, count in zip(units, counts, strict=True) if any_of(lacking, count)]


def any_of(flags: Iterator[bool], count: int) -> bool:
    """Take some flags; return True if one of them is."""
    return sum(itertools.islice(flags, count)) > 0


def _spans(prepared: Prepared, left: Sequence[int], workers: int, is_reached: bool) -> list[list[int]]:
    """Return runs of units for tasks: long ones decode little twice, and every worker gets some."""
    budget = prepared.budget
    most = max(1, SPAN_BYTES // max(1, budget.unit))
    if not is_reached:
        most = max(1, min(most, HANDED_BYTES // max(1, budget.outputs)))
    tasks = TASKS_A_WORKER * workers if workers > 1 else 1
    together = max(1, min(most, -(-len(left) // tasks)))
    return [list(left[start : start + together]) for start in range(0, len(left), together)]
