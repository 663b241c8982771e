"""Everything that is resolved before the first unit: anchors, arrays, units, coordinates, and what they came from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.algorithm.outputs import OutputFacts
from dtrain.algorithm.params import params_sha256
from dtrain.algorithm.plan import micro_size
from dtrain.config.schema import TrainConfig
from dtrain.config.values import parse_bytes
from dtrain.data.coordinate import find_gaps
from dtrain.data.lead import LEAD, Lead, find_lead
from dtrain.data.outcoords import OutputCoordinate, OutputCoordinates
from dtrain.data.plan.blend import tile_axis
from dtrain.data.plan.heads import Head
from dtrain.data.plan.predicted import Anchors, predicted_anchors
from dtrain.data.plan.prediction import plan_prediction, row_lengths
from dtrain.data.plan.prediction_budget import PredictionBudget, plan_budget
from dtrain.data.read.inventory import rows_absent, take_inventory
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig
from dtrain.predict.heads import CLASS, Asked, checked_values, heads_of
from dtrain.predict.request import Request
from dtrain.predict.targets import Target
from dtrain.resolved import Resolved
from dtrain.runtime.place import Device
from dtrain.runtime.predictor import PredictionSpec, TargetShape, Work
from dtrain.runtime.versions import versions
from dtrain.types import Parameters
from dtrain.urls import redacted_in

LOG = logging.getLogger("dtrain")

MOST_OVERLAP = 0.9
Try = Callable[[PredictionSpec, Parameters], tuple[OutputFacts, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What predictions need of a run."""

    directory: Path
    base: Path
    config: TrainConfig
    resolved: Resolved
    round: int
    params: Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How predictions are asked for."""

    values: str = "auto"
    overlap: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Predictions, resolved."""

    facts: RunFacts
    request: Request
    spec: PredictionSpec
    work: Work
    budget: PredictionBudget
    coordinates: OutputCoordinates
    lead: Lead | None
    beside: tuple[OutputCoordinate, ...]
    """All coordinates; those with the dimension of the samples have no values yet."""
    settings: Mapping[str, Any]
    """What an output that is continued must have been begun with."""

    @property
    def samples(self) -> int:
        """Samples that are predicted: anchors times patches."""
        plan = self.work.plan
        return plan.anchors.total * int(np.prod([axis.count for axis in plan.axes], dtype=int))

    def values_of(self, coordinate: OutputCoordinate, start: int, stop: int) -> Any:
        """Return the values of a coordinate at some places along the samples, or all of them if it lacks these."""
        if coordinate.values is not None:
            return coordinate.values
        if self.lead is not None and coordinate.name == "valid_time":
            return self.lead.valid_times(self.coordinates, self.work.plan.anchors, start, stop)
        return self.coordinates.blocks(coordinate, start, stop)


def prepare(
    facts: RunFacts,
    request: Request,
    options: Options,
    *,
    code: bytes,
    run_id: str,
    device: Device,
    memory: int,
    memory_name: str,
    try_outputs: Try,
    look: bool,
) -> Prepared:
    """Resolve predictions.

    Parameters
    ----------
    facts : RunFacts
    request : Request
    options : Options
    code : bytes
        The user's functions.
    run_id : str
        Names the execution.
    device : str
        ``cuda`` if every worker has it.
    memory, memory_name : int, str
        What the data path of a worker may use at most.
    try_outputs : callable
        Calls the model with zeros.
    look : bool
        Look for missing chunks of the inputs first.

    Raises
    ------
    DtrainError
        The store, the model and the options do not fit together.
    """
    config, samples = facts.config, request.inputs
    values, overlap = checked_values(options.values), _checked_overlap(options.overlap)
    jumps = np.fromstring(text, np.int64, sep=" ") if (text := find_gaps(samples).jumps) else np.zeros(0, np.int64)
    absent = rows_absent(samples) if samples.config.missing == "skip" else ()
    anchors = predicted_anchors(samples, jumps, absent)
    contents = _contents(samples) if look else ""
    spec = PredictionSpec(
        run_id=run_id,
        samples=samples,
        scalings={name: one for name, one in facts.resolved.scalings.items() if name in samples.config.inputs},
        config=config.model_copy(update={"data": samples.config}).with_functions({}),
        code=code,
        device=_device(facts.resolved.device, device),
        targets=tuple(_target_shape(target, samples) for target in request.targets),
        absent=absent,
    )
    lengths = row_lengths(samples)
    tiles = [tile_axis(dim, lengths[dim], size, overlap) for dim, size in samples.config.patch.items()]
    asked = Asked(
        values=values,
        loss=config.train.loss,
        class_axis=config.train.class_axis,
        sample_dim=samples.sample_dim,
        patch=samples.config.patch,
        blended=any(axis.count > 1 for axis in tiles),
        leaves_out=samples.config.min_valid is not None,
    )
    heads = heads_of(try_outputs(spec, facts.params), request.targets, request.unknown, asked, anchors.total)
    plan = plan_prediction(samples, anchors, heads, samples.config.patch, overlap)
    given = parse_bytes(config.data.memory, "data.memory") if config.data.memory != "auto" else memory
    limit, name = (given, "data.memory") if given < memory else (memory, memory_name)
    budget = plan_budget(samples, plan, heads, micro_size(config.train), limit, name)
    known = request.labels or samples
    coordinates = OutputCoordinates(
        known, anchors, [dim for head in heads for array in head.arrays for dim in array.dims]
    )
    lead = _lead(request, coordinates, anchors, jumps, heads)
    return Prepared(
        facts=facts,
        request=request,
        spec=spec,
        work=Work(plan, heads),
        budget=budget,
        coordinates=coordinates,
        lead=lead,
        beside=_beside(coordinates, lead, heads, request.targets),
        settings=_settings(facts, samples, values, overlap, spec.device, contents),
    )


def _checked_overlap(overlap: float) -> float:
    if isinstance(overlap, bool) or not isinstance(overlap, int | float) or not 0 <= overlap <= MOST_OVERLAP:
        raise InvalidConfig(
            f"overlap = {overlap!r}: a number from 0 to {MOST_OVERLAP} is needed, the share of a patch that the next "
            "one covers too."
        )
    return float(overlap)


def _device(of_run: str, here: Device) -> str:
    """Return the device of the run; where it is not there, the CPU, loudly."""
    if of_run == "cuda" and here != "cuda":
        LOG.warning("The run was trained on a GPU, and there is none here: predictions are computed on the CPU.")
        return "cpu"
    return of_run


def _target_shape(target: Target, samples: Samples) -> TargetShape:
    return TargetShape(target.patch_shape(samples.config.patch), "float32" if target.is_number else "int64")


def _contents(samples: Samples) -> str:
    """Look for what is stored of the inputs; return a digest of it, by which a store that has changed is noticed."""
    presence = samples.config.missing in ("auto", "error")
    inventory = take_inventory(samples, full=False, digests=True, presence=presence)
    return hashlib.sha256(json.dumps(dict(inventory.digests), sort_keys=True).encode()).hexdigest()


def _lead(
    request: Request, coordinates: OutputCoordinates, anchors: Anchors, jumps: Any, heads: Sequence[Head]
) -> Lead | None:
    """Return how far ahead predictions of the targets are; None where there are none of them."""
    config = request.inputs.config
    offsets = config.target_offsets
    if not request.targets:
        return None
    is_axis = not isinstance(offsets, int)
    if is_axis and not any(LEAD in array.dims for head in heads for array in head.arrays):
        return None
    listed = (offsets,) if isinstance(offsets, int) else _listed(offsets)
    return find_lead(coordinates, anchors, listed, is_axis, jumps, request.inputs.sample_dim)


def _listed(offsets: Any) -> tuple[int, ...]:
    if isinstance(offsets, tuple | list):
        return tuple(offsets)
    return tuple(range(offsets.start, offsets.stop, offsets.step))


def _beside(
    coordinates: OutputCoordinates, lead: Lead | None, heads: Sequence[Head], targets: Sequence[Target]
) -> tuple[OutputCoordinate, ...]:
    """Return all coordinates that fit predictions; names of predictions take precedence."""
    arrays = [array for head in heads for array in head.arrays]
    taken = {array.name for array in arrays}
    found = {one.name: one for one in [*coordinates.found, *(lead.coordinates if lead is not None else [])]}
    for head in heads:
        for array in head.arrays:
            for dim, length in array.lengths.items():
                if dim == CLASS or dim.endswith(f"_{CLASS}"):
                    found[dim] = _classes(dim, length, targets[head.tensor] if head.tensor < len(targets) else None)
    fitting = (one for one in found.values() if any(set(one.dims) <= set(array.dims) for array in arrays))
    return tuple(one for one in fitting if one.name not in taken)


def _classes(dim: str, count: int, target: Target | None) -> OutputCoordinate:
    """Return the coordinate of an axis of classes: their names, or their numbers."""
    if target is not None and len(target.classes) == count:
        names = np.array(target.classes, object)
        return OutputCoordinate(name=dim, dims=(dim,), shape=(count,), dtype="str", attributes={}, values=names)
    return OutputCoordinate(
        name=dim, dims=(dim,), shape=(count,), dtype="i8", attributes={}, values=np.arange(count, dtype=np.int64)
    )


# What predictions come from ---------------------------------------------------------------------------------


def _settings(
    facts: RunFacts, samples: Samples, values: str, overlap: float, device: str, contents: str
) -> dict[str, Any]:
    """Return what decides the bits of predictions, as plain values."""
    location, here = samples.location, versions()
    return {
        "run": facts.directory.resolve().name,
        "round": facts.round,
        "params_sha256": params_sha256(facts.params),
        "data": redacted_in(location if isinstance(location, str) else list(location)),
        "group": samples.config.group,
        "snapshot": samples.store.snapshot,
        "data_fingerprint": samples.fingerprint,
        "data_contents": contents,
        "values": values,
        **({"overlap": overlap} if samples.config.patch else {}),
        "device": device,
        **{name: here[name] for name in ("dtrain", "torch")},
    }


def group_attributes(prepared: Prepared) -> dict[str, Any]:
    """Return the attributes of the group that say what made the predictions; all are texts and numbers."""
    settings = prepared.settings
    data = settings["data"]
    return {
        "title": f"Predictions of {settings['run']}, round {settings['round']}",
        "dtrain_version": settings["dtrain"],
        "dtrain_run": settings["run"],
        "dtrain_round": settings["round"],
        "dtrain_params_sha256": settings["params_sha256"],
        "dtrain_data": data if isinstance(data, str) else " ".join(data),
        "dtrain_data_fingerprint": settings["data_fingerprint"],
        "dtrain_settings": json.dumps(dict(settings), sort_keys=True),
    }
