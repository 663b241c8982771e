r"""The tasks that average replicas on a cluster: one a mean, or one a slice of it.

    update of replica 0 --.
    update of replica 1 ---+--> combine --> broadcast --> next round, evaluation
    start, outer state  --'         |-----> outer state -> next round
                                    `-----> facts -------> summary

A slice that is clipped takes two tasks: `average`, and `step` once the norm of all slices is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from distributed import Future

from dtrain.algorithm.mix import Average
from dtrain.algorithm.pattern import round_averages, starts_of
from dtrain.algorithm.slices import Slices, num_slices, slices_of
from dtrain.config.average import AverageConfig
from dtrain.config.schema import TrainConfig
from dtrain.runtime import remote
from dtrain.runtime.client import TaskClient
from dtrain.types import Layout, RoundPlan

PRIORITY_REDUCE = 10
Sliced: TypeAlias = tuple[Future, ...]
"""By slice: the future of a value."""


def reducer_slices(config: TrainConfig, layout: Layout, workers: int, replicas: int) -> Slices:
    """Return the slices of the reducer; the means of a sparse topology are spread over the workers as they are."""
    wanted = config.cluster.slices
    if wanted == "auto" and config.average.mix.topology != "full":
        wanted = 1
    return slices_of(layout, num_slices(wanted, layout, workers, replicas))


@dataclass(frozen=True, slots=True)
class Before:
    """What a round starts from, as futures; replicas that share a value hold the same tuple."""

    broadcast: tuple[Sliced, ...]
    outer: tuple[Sliced, ...]
    """Empty tuples without an outer optimizer."""
    slices: Slices
    small: bool
    """Whether results are sent whole."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """Futures of what replicas become, by mean."""

    means: tuple[Average, ...]
    broadcast: tuple[Sliced, ...]
    outer: tuple[Sliced, ...]
    facts: tuple[Sliced, ...]
    model: Sliced
    """The mean of all means."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """Submits the tasks that average the replicas of one round."""

    client: TaskClient
    config: AverageConfig
    before: Before
    places: Sequence[str]
    """By replica: its worker."""
    factor: float
    """On the learning rate of the outer optimizer."""

    def submit(self, plan: RoundPlan, updates: Sequence[Sliced]) -> Reduced:
        """Submit the means of a round; `updates` are by replica."""
        means = round_averages(plan, self.before.broadcast, self.config)
        names = [f"r{plan.round:05d}" + (f"-g{number}" if len(means) > 1 else "") for number in range(len(means))]
        whole = [self._combine(mean, name, updates) for mean, name in zip(means, names, strict=True)]
        broadcast, outer, facts = tuple(whole), ((),) * len(means), tuple(whole)
        if self.config.outer is not None:  # without its state, a result is not much more than what is broadcast
            broadcast = self._parts(remote.broadcast_of, "mixed", names, whole)
            outer = self._parts(remote.outer_of, "outer", names, whole)
            facts = self._parts(remote.facts_of, "facts", names, whole)
        model = broadcast[0] if len(means) == 1 else self._mean_model(plan, means, broadcast)
        return Reduced(means, broadcast, outer, facts, model)

    def _combine(self, mean: Average, name: str, updates: Sequence[Sliced]) -> Sliced:
        """Submit the tasks of one mean."""
        first = mean.receivers[0]
        starts = starts_of(mean, self.before.broadcast, self.config)
        clips = self.config.outer is not None and self.config.outer.clip_norm > 0
        in_halves = clips and len(self.before.slices) > 1
        results = []
        for at in self.before.slices:
            own = self.before.broadcast[first][at.number]
            others = None if starts is None else [start[at.number] for start in starts]
            sent = [updates[k][at.number] for k in mean.members]
            task: Callable[..., Any] = remote.average_slice if in_halves else remote.combine_replicas
            rest = () if in_halves else (self._outer(first, at.number), self.factor)
            results.append(self._task(task, f"reduce-{name}", at.number, first, self.config, own, others, sent, *rest))
        return self._stepped(name, first, tuple(results)) if in_halves else tuple(results)

    def _stepped(self, name: str, first: int, halves: Sliced) -> Sliced:
        """Submit the outer steps of slices, each after the means of all."""
        facts = [self._task(remote.facts_of, f"norms-{name}", n, first, half) for n, half in enumerate(halves)]
        return tuple(
            self._task(
                remote.step_slice,
                f"step-{name}",
                n,
                first,
                self.config,
                self.before.broadcast[first][n],
                half,
                self._outer(first, n),
                self.factor,
                facts,
            )
            for n, half in enumerate(halves)
        )

    def _outer(self, first: int, number: int) -> Any:
        return self.before.outer[first][number] if self.config.outer is not None else ()

    def _parts(
        self, part: Callable[[Any], Any], label: str, names: Sequence[str], whole: Sequence[Sliced]
    ) -> tuple[Sliced, ...]:
        """Submit tasks that take a part out of each result; a small result is its own part."""
        if self.before.small:
            return tuple(whole)
        return tuple(
            tuple(self._task(part, f"{label}-{name}", number, None, one) for number, one in enumerate(slices))
            for name, slices in zip(names, whole, strict=True)
        )

    def _mean_model(self, plan: RoundPlan, means: Sequence[Average], broadcast: Sequence[Sliced]) -> Sliced:
        return tuple(
            self._task(remote.mean_model, f"model-r{plan.round:05d}", at.number, 0, tuple(means), [*own])
            for at, own in zip(self.before.slices, zip(*broadcast, strict=True), strict=True)
        )

    def _task(self, function: Callable[..., Any], name: str, number: int, replica: int | None, *given: Any) -> Future:
        """Submit a task of a slice; slices are spread over the workers, beginning with that of a replica.

        Without a place, Dask would compare all workers that hold an update by all updates: a second for 1,000 of them.
        """
        if len(self.before.slices) > 1:
            name = f"{name}-s{number}"
        at = None
        if replica is not None:
            workers = list(dict.fromkeys([*self.places[replica:], *self.places[:replica]]))
            at = workers[number % len(workers)]
        return self.client.submit(function, name, *given, at=at, priority=PRIORITY_REDUCE)
