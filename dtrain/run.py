"""A run, opened to look at it, to evaluate it or to take its model. Opening runs no code from it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xarray as xr
from distributed import Client
from torch import nn

from dtrain.algorithm.evaluate import values
from dtrain.algorithm.params import load_into
from dtrain.algorithm.recipe import Functions
from dtrain.algorithm.stop import higher_is_better
from dtrain.checkpoint import committed_rounds, find_round, load_params, round_directory
from dtrain.config.files import with_setting
from dtrain.config.schema import TrainConfig
from dtrain.data.plan.partition import JointPlan, plan_held_out
from dtrain.data.plan.splits import SplitName
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.presence import absent_rows
from dtrain.data.samples import Samples
from dtrain.directory import ENV, read_config_of, read_json, read_resolved, read_tables_of
from dtrain.display import html_table
from dtrain.errors import InvalidConfig, TooFewSamples
from dtrain.job import Job, held_out_source, job_from_config, open_sources, source_of
from dtrain.prepare import open_runner
from dtrain.report.history import Row, best_round, dataset_of, read_rows
from dtrain.report.journal import HISTORY
from dtrain.resolve import Resolved, plan_other
from dtrain.runtime.module import build_module


@dataclass(frozen=True)
class Run:
    """A training run. Made by `train` and `load_run`.

    Attributes
    ----------
    directory : Path
        The directory that holds it.
    config : TrainConfig
        The resolved configuration.
    """

    directory: Path
    config: TrainConfig
    base: Path
    functions: Functions | None = None

    @property
    def rows(self) -> list[Row]:
        """The lines of history.jsonl."""
        return read_rows(self.directory / HISTORY)

    @property
    def history(self) -> xr.Dataset:
        """The history over ``round``: train_loss, val_loss, val_<metric>, samples, seconds and more."""
        return dataset_of(self.rows)

    @property
    def best_round(self) -> int | None:
        """The committed round with the best ``stop.metric`` (``val_loss``); without validation the training loss."""
        committed = committed_rounds(self.directory)
        kept = [row for row in self.rows if row["round"] in committed]
        return best_round(kept, self.config.stop.metric, higher_is_better(self.config))

    @property
    def plan(self) -> JointPlan:
        """The plan of the data that was resolved at the first start."""
        return self.resolved.plan

    @cached_property
    def resolved(self) -> Resolved:
        """All that was resolved at the first start: plan.json."""
        return read_resolved(self.directory)

    @cached_property
    def model(self) -> nn.Module:
        """The module with the parameters of the last committed round, in eval mode."""
        return self.model_of("last")

    def model_of(self, wanted: str) -> nn.Module:
        """Return the module with the parameters of round ``best``, ``last`` or a number.

        Raises
        ------
        RoundNotFound
            The run does not keep that round.
        """
        number = find_round(self.directory, wanted, self.best_round)
        build = self._job(None).functions["model"]
        module = build_module(build, self.config.model_args, self.config.train.seed)
        load_into(module, load_params(round_directory(self.directory, number)))
        return module.eval()

    def evaluate(
        self,
        samples: Samples | None = None,
        *,
        split: SplitName = "test",
        round: str | int = "best",
        cluster: str | Client = "serial",
    ) -> dict[str, float]:
        """Evaluate a committed round.

        Parameters
        ----------
        samples : Samples, optional
            Other data than the run's own; its split is cut with the run's shares and seed.
        split : {"val", "test", "all"}
        round : "best", "last" or a number
        cluster : str or distributed.Client
            Where it is computed: ``serial``, ``local``, an address, or a client.

        Returns
        -------
        dict
            ``loss`` and the metrics of ``train.metrics``.

        Raises
        ------
        RoundNotFound
            The run does not keep that round.
        TooFewSamples
            The split is empty.
        """
        return self.evaluation(samples, split=split, round=str(round), cluster=cluster)[0]

    def evaluation(
        self, samples: Samples | None, *, split: SplitName, round: str, cluster: str | Client
    ) -> tuple[dict[str, float], int, int]:
        """Return the values of `evaluate`, the round's number, and the number of samples."""
        number = find_round(self.directory, round, self.best_round)
        params = load_params(round_directory(self.directory, number))
        job, client = self._job(samples), None
        if isinstance(cluster, str):
            job = replace(job, config=with_scheduler(job.config, cluster))
        else:
            client = cluster
        # data that were modified since the start may be evaluated: their contents are not compared
        known = replace(self.resolved, contents=(), filled=None)
        if samples is not None:
            known = replace(known, plan=JointPlan((self._plan_of(samples, split),)), held_out=None)
        else:
            known = _without_lost_rows(known, job)
        with open_runner(job, uuid.uuid4().hex[:8], known=known, client=client) as (runner, _):
            sums = runner.evaluate(params, split)
        if sums is None:
            raise TooFewSamples(f'The split "{split}" holds no samples.', "Choose another --split.")
        return values(sums, self.config.train.metrics), number, sums.samples

    def _plan_of(self, samples: Samples, split: SplitName) -> DataPlan:
        absent = absent_rows(samples) if samples.config.missing == "skip" else ()
        if split == "all":
            return plan_held_out(samples, self.plan.plans[0], absent=absent)
        return plan_other(samples, self.config.train.seed, absent)

    def _job(self, samples: Samples | None) -> Job:
        """Return the job of the run's own data, or of other data."""
        if self.functions is None:
            job = job_from_config(self.config, self.base)
        else:
            sources = open_sources(self.config.data, self.base) if samples is None else ()
            held_out = held_out_source(self.config.data, self.base) if samples is None else None
            job = Job(config=self.config, sources=sources, held_out=held_out, functions=self.functions, base=self.base)
        return job if samples is None else replace(job, sources=(source_of(samples),), held_out=None)

    def __repr__(self) -> str:
        return f"<dtrain.Run {self.directory} {len(self.rows)} of {self.config.train.rounds} rounds>"

    def _repr_html_(self) -> str:
        rows = self.rows
        if not rows:
            return html_table(repr(self), [])
        names = [name for name in rows[-1] if name == "round" or (name.endswith("_loss") and name != "replica_loss")]
        return html_table(repr(self), ([_cell(row.get(name)) for name in names] for row in rows[-10:]), names)


def _without_lost_rows(known: Resolved, job: Job) -> Resolved:
    """Leave out the rows of a run's own data that are not stored any more, if ``data.missing`` is "skip"."""
    if job.config.data.missing != "skip":
        return known
    described = (source.samples for source in job.all_sources)  # None: only its own workers can read it
    return replace(known, lost=tuple(() if samples is None else absent_rows(samples) for samples in described))


EVALUATION_KEYS = ("storage_options", "memory", "cache", "reader", "missing", "non_finite")
"""Keys of ``[data]`` that do not make a run another one."""


def _with_settings(tables: dict[str, Any], settings: tuple[str, ...]) -> TrainConfig:
    allowed = (*(f"data.{key}" for key in EVALUATION_KEYS), "cluster")
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if not any(key == one or key.startswith(f"{one}.") for one in allowed):
            raise InvalidConfig(
                f"--set {key}: of a run that is evaluated it cannot be set.",
                f"Allowed are {', '.join(allowed[:-1])} and cluster.*.",
            )
        tables = with_setting(tables, setting)
    return TrainConfig(**tables)


def load_run(path: str | Path, *, model: Callable[..., Any] | None = None, settings: tuple[str, ...] = ()) -> Run:
    """Open a run.

    Parameters
    ----------
    path : path
        The run's directory.
    model : callable, optional
        The function that builds the module, if it was defined in a notebook or script.
    settings : tuple of str
        ``"data.memory=1GB"``: keys of ``[data]`` and ``[cluster]`` that change where and how fast it is evaluated,
        or how faults of the data are met; and ``data.storage_options``, whose secrets a run does not keep.

    Raises
    ------
    RunNotFound
        There is no run at the path.
    InvalidConfig
        A setting would make it another run.
    """
    directory = Path(path)
    config = read_config_of(directory)
    if settings:
        config = _with_settings(read_tables_of(directory), settings)
    base = Path(read_json(directory / ENV).get("base", directory))
    return Run(directory, config, base, {"model": model} if model is not None else None)


def with_scheduler(config: TrainConfig, scheduler: str) -> TrainConfig:
    """Return the configuration with another ``cluster.scheduler``."""
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"scheduler": scheduler})})


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
