"""Real samples of a run, twice: decoded, as an exported module takes them, and as the run's model sees them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from dtrain.algorithm.plan import micro_size
from dtrain.data.load.gather import target_scalings
from dtrain.data.plan.splits import SplitName
from dtrain.data.samples import Samples
from dtrain.errors import TooFewSamples
from dtrain.job import Job, with_scheduler
from dtrain.prepare import open_runner
from dtrain.resolved import Resolved
from dtrain.runtime.resident import Resident
from dtrain.runtime.spec import Source
from dtrain.runtime.tasks import prepared
from dtrain.runtime.tensors import as_tensors, decoder
from dtrain.types import Cursor

MOST_SAMPLES = 8
SPLITS: tuple[SplitName, ...] = ("val", "test", "all")
"""Where samples are looked for, in this order."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Some samples of a run."""

    split: str
    samples: Samples
    """What they are, as the run reads them."""
    decoded: tuple[torch.Tensor, ...]
    """The inputs before normalisation: floats as float32, integers as int64."""
    inputs: tuple[torch.Tensor, ...]
    """The inputs as the run's model sees them: standardised and transformed."""
    targets: Any

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.inputs[0])


def take_trial(job: Job, resolved: Resolved) -> Trial:
    """Read some samples through the data path of the run, in this process.

    Raises
    ------
    TooFewSamples
        It has none.
    DtrainError
        The data are missing or damaged.
    """
    job, resolved = replace(job, config=with_scheduler(job.config, "serial")), replace(resolved, device="cpu")
    with _resident(job, resolved) as resident:
        split = next((split for split in SPLITS if resident.pieces(split)), None)
        if split is None:
            raise TooFewSamples("The run's data hold no samples to compare outputs on.")
        size = min(MOST_SAMPLES, micro_size(job.config.train), resident.pieces(split)[0].partition.num_samples)
        samples = resident.pieces(split)[0].source.samples
        seen = _first_batch(resident, split, size, as_seen=True)
    with _resident(_undone(job), replace(resolved, scalings={})) as resident:
        decoded = _first_batch(resident, split, size, as_seen=False)
    return Trial(split, samples, decoded.inputs, seen.inputs, seen.targets)


@contextmanager
def _resident(job: Job, resolved: Resolved) -> Iterator[Resident]:
    run_id = f"{uuid.uuid4().hex[:8]}-export"
    with open_runner(job, run_id, known=resolved, without_lost=True, leave_out=False) as (runner, _):
        resident = Resident(runner.spec)
        try:
            yield resident
        finally:
            resident.close()


def _first_batch(resident: Resident, split: SplitName, size: int, *, as_seen: bool) -> Any:
    """Return the first samples of a split, with memory of their own."""
    batches = resident.eval_loader(split, 0, [size]).batches([size])
    if as_seen:
        total = resident.pieces(split)[0].partition.num_samples
        batch = next(prepared(resident, batches, split, 0, Cursor(0, 0), total))
    else:
        batch = next(as_tensors(batches, split))
    targets = batch.targets if isinstance(batch.targets, tuple) else (batch.targets,)
    inputs, copied = (tuple(tensor.cpu().clone() for tensor in each) for each in (batch.inputs, targets))
    return replace(batch, inputs=inputs, targets=copied if isinstance(batch.targets, tuple) else copied[0])


def _undone(job: Job) -> Job:
    """Return a job whose samples are neither standardised nor filled with zeros."""
    changes: dict[str, Any] = {"normalize": ()}
    if job.config.data.fills_inputs:
        changes["non_finite"] = "allow"
    data = job.config.data.model_copy(update=changes)
    return replace(
        job,
        config=job.config.model_copy(update={"data": data}),
        sources=tuple(_source_with(source, changes) for source in job.sources),
        held_out=None if job.held_out is None else _source_with(job.held_out, changes),
    )


def _source_with(source: Source, changes: Mapping[str, Any]) -> Source:
    samples = None if source.samples is None else _samples_with(source.samples, changes)
    return replace(source, config=source.config.model_copy(update=changes), samples=samples)


def _samples_with(samples: Samples, changes: Mapping[str, Any]) -> Samples:
    members = tuple(_samples_with(member, changes) for member in samples.members)
    return replace(samples, config=samples.config.model_copy(update=changes), members=members)


def decoded_outputs(trial: Trial, outputs: Any, resolved: Resolved) -> Any:
    """Return outputs of the run's model in the target's units, as evaluations decode them, in float64."""
    return decoder(target_scalings(trial.samples, resolved.scalings))(outputs, trial.targets)[0]
