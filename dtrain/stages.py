"""The stages of a round, and which of them limits it.

A stage is counted by whom others wait for, in seconds of a round:

    fetch, decode, gather    steps wait for batches, or share their core with the threads that make them
    model                    the rest of the local steps
    reduce                   beside steps and evaluation: replicas are averaged and sent, and tasks are scheduled
    evaluate                 the model is evaluated

Work that is done while nobody waits for it is not counted: the shares say what a faster stage would save at most.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

Stage: TypeAlias = Literal["fetch", "decode", "gather", "model", "reduce", "evaluate"]

TIE = 0.9
"""A stage that takes this part of the time of the largest one, or more, limits as much."""
SHOWN_SHARE = 0.1
"""Other stages are named from this share on."""

CURES: dict[Stage, str] = {
    "fetch": "Copy the store nearer to the workers, store larger chunks or shards, or raise data.memory, which keeps "
    "units for the next pass (data.cache).",
    "decode": "Store chunks with a cheaper codec, such as lz4 or zstd at a low level, or raise data.memory, which "
    'keeps decoded units for the next pass (data.cache); zarrs (pip install "dtrain[fast]") is faster on shards of '
    "many small chunks.",
    "gather": "Samples are copied and cast one by one: store float32 rather than packed or float64 values, and cut "
    "data.input_offsets and data.patch to what the model needs.",
    "model": 'The data are not the cause: a GPU, train.precision = "bfloat16", or more workers with more '
    "average.replicas make rounds faster.",
    "reduce": "Larger train.local_steps (or train.local_epochs) make rounds fewer; average.codec and train.freeze send "
    "less.",
    "evaluate": "A larger train.eval_every evaluates less often, a smaller data.split.val fewer samples.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Seconds that each stage takes, of one round or of several."""

    fetch: float = 0.0
    decode: float = 0.0
    gather: float = 0.0
    model: float = 0.0
    reduce: float = 0.0
    evaluate: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The stage that limits rounds, or those that limit them alike."""

    stages: tuple[Stage, ...]
    """The largest one first."""
    shares: dict[Stage, float]
    """Of the time, by stage."""
    cure: str

    def __str__(self) -> str:
        first, *tied = self.stages
        named = [f"{first} ({self.shares[first]:.0%} of the time)", *(f"{s} ({self.shares[s]:.0%})" for s in tied)]
        others = [
            f"{stage} {share:.0%}"
            for stage, share in sorted(self.shares.items(), key=lambda pair: -pair[1])
            if stage not in self.stages and share >= SHOWN_SHARE
        ]
        tie = ", a tie" if tied else ""
        then = f"; then {', '.join(others)}" if others else ""
        return f"{' and '.join(named)}{tie}{then}. {self.cure}"


def limiting_stage(seconds: StageSeconds) -> Limit | None:
    """Return the stage that takes most of the time; None if nothing was measured.

    Stages that take at least `TIE` of its time limit as much as the largest one.

    >>> str(limiting_stage(StageSeconds(decode=6.0, model=3.5, evaluate=0.5)))[:42]
    'decode (60% of the time); then model 35%. '
    """
    by_stage: dict[Stage, float] = asdict(seconds)  # type: ignore[assignment]  # the fields are the stages
    total = sum(by_stage.values())
    if not total > 0:
        return None
    ordered = sorted(by_stage, key=lambda stage: -by_stage[stage])  # stable: equal ones in the order of a round
    stages = tuple(stage for stage in ordered if by_stage[stage] >= TIE * by_stage[ordered[0]])
    return Limit(
        stages=stages,
        shares={stage: spent / total for stage, spent in by_stage.items()},
        cure=CURES[stages[0]] if len(stages) == 1 else " ".join(f"{stage}: {CURES[stage]}" for stage in stages),
    )
