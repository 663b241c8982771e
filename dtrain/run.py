"""A run: its directory, opened to look at it, to evaluate it, or to continue it. Opening runs no code from it."""

from __future__ import annotations

import json
import platform
import re
import time
import tomllib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import xarray as xr
from distributed import Client
from torch import nn

from dtrain.algorithm.evaluate import values
from dtrain.algorithm.params import load_into
from dtrain.algorithm.stop import higher_is_better
from dtrain.checkpoint import committed_rounds, find_round, load_params, round_directory, write_text
from dtrain.config import TrainConfig, differences, may_change, to_toml, with_setting, without_secrets
from dtrain.data.plan.partition import JointPlan, plan_held_out
from dtrain.data.plan.splits import SplitName
from dtrain.data.samples import Samples
from dtrain.errors import (
    DataChanged,
    InvalidConfig,
    RunConflict,
    RunDamaged,
    RunNotFound,
    TooFewSamples,
    UsageError,
    did_you_mean,
)
from dtrain.job import (
    Functions,
    Job,
    Resolved,
    describe_held_out,
    job_from_config,
    open_runner,
    open_stores,
    plan_like,
    resolved_from,
    resolved_values,
    store_of,
)
from dtrain.report.history import Row, best_round, dataset_of, read_rows
from dtrain.report.journal import HISTORY
from dtrain.runtime.resident import build_module
from dtrain.runtime.versions import versions
from dtrain.types import TrainState

NAME = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")
CONFIG, PLAN, ENV = "config.toml", "plan.json", "env.json"


@dataclass(frozen=True)
class Run:
    """A training run. Made by `train` and `load_run`.

    Attributes
    ----------
    directory : Path
        Where it lies.
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
        return best_of(self.rows, self.config, committed_rounds(self.directory))

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
        job = self._job(samples)
        client = cluster if isinstance(cluster, Client) else None
        if client is None:
            job = replace(job, config=with_scheduler(job.config, str(cluster)))
        known = self.resolution
        if samples is not None:
            like = known.plan.plans[0]
            plan = plan_held_out(samples, like) if split == "all" else plan_like(samples, self.config)
            known = replace(known, plan=JointPlan((plan,)), contents=())
        else:
            known = replace(known, contents=())  # it is the samples that are there that count
        with open_runner(job, uuid.uuid4().hex[:8], known=known, client=client) as (runner, _):
            placed = runner.place(_state_for(params))
            handle = runner.submit_evaluation(placed.params[0], split)
            if handle is None:
                raise TooFewSamples(f'The split "{split}" holds no samples.', "Choose another --split.")
            sums = runner.collect([handle])[0]
        return values(sums, self.config.train.metrics), number, sums["loss"][1]

    @property
    def plan(self) -> JointPlan:
        """The plan of the data that was resolved at the first start."""
        return self.resolution.plan

    @property
    def resolution(self) -> Resolved:
        """All that was resolved at the first start."""
        return resolved_from(self.resolved)

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The content of plan.json."""
        return _read_json(self.directory / PLAN)

    def _job(self, samples: Samples | None) -> Job:
        if self.functions is not None and samples is not None:
            return Job(config=self.config, stores=store_of(samples), functions=self.functions, base=self.base)
        job = job_from_config(self.config, self.base) if self.functions is None else self._own_job()
        return job if samples is None else replace(job, stores=store_of(samples), held_out=None)

    def _own_job(self) -> Job:
        assert self.functions is not None
        stores, held_out = open_stores(self.config.data, self.base), describe_held_out(self.config.data, self.base)
        return Job(config=self.config, stores=stores, held_out=held_out, functions=self.functions, base=self.base)

    def __repr__(self) -> str:
        return f"<dtrain.Run {self.directory} {len(self.rows)} of {self.config.train.rounds} rounds>"

    def _repr_html_(self) -> str:
        rows = self.rows
        if not rows:
            return f"<p>{escape(repr(self))}</p>"
        names = [name for name in rows[-1] if name == "round" or (name.endswith("_loss") and name != "replica_loss")]
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join("<tr>" + "".join(f"<td>{_cell(row.get(n))}</td>" for n in names) + "</tr>" for row in rows[-10:])
        return f"<table><caption>{escape(repr(self))}</caption><tr>{head}</tr>{body}</table>"


EVALUATION_KEYS = ("storage_options", "memory", "cache", "reader", "missing", "non_finite")
"""Keys of ``[data]`` that do not make a run another one."""


def _set_again(tables: dict[str, Any], settings: tuple[str, ...]) -> TrainConfig:
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
    if not (directory / CONFIG).is_file():
        raise RunNotFound(f"{path} is not a run: it has no {CONFIG}.", "A run's directory is runs/NAME.")
    try:
        tables = tomllib.loads((directory / CONFIG).read_text(encoding="utf-8"))
        config = TrainConfig(**tables)
    except (OSError, ValueError) as error:
        raise RunDamaged(f"{directory / CONFIG} cannot be read: {' '.join(str(error).split())}") from error
    if settings:
        config = _set_again(tables, settings)
    base = Path(_read_json(directory / ENV).get("base", directory))
    return Run(directory, config, base, {"model": model} if model is not None else None)


def find_run(text: str) -> Path:
    """Return the directory that a path or name means: ``PATH``, ``runs/NAME`` or ``*/runs/NAME``; '' the newest.

    Raises
    ------
    RunNotFound
        There is none.
    """
    here = Path.cwd()
    known = [p.parent for pattern in (f"runs/*/{CONFIG}", f"*/runs/*/{CONFIG}") for p in sorted(here.glob(pattern))]
    if not text:
        if not known:
            raise RunNotFound("There is no run in runs/ or */runs/.", "Name its directory.")
        return max(known, key=_touched).relative_to(here)
    if (Path(text) / CONFIG).is_file():
        return Path(text)
    named = [p for p in known if p.name == text]
    if len(named) == 1:
        return named[0].relative_to(here)
    if named:
        raise RunNotFound(f"{text} names several runs: {', '.join(str(p.relative_to(here)) for p in named)}.")
    names = [p.name for p in known]
    raise RunNotFound(
        f"{text}: no such run{did_you_mean(text, names)}",
        f"Known here: {', '.join(names) or 'none'}. Name a run, or its directory.",
    )


def _touched(run: Path) -> float:
    files = [run / CONFIG, run / HISTORY]
    return max(file.stat().st_mtime for file in files if file.exists())


def best_of(rows: list[Row], config: TrainConfig, committed: list[int]) -> int | None:
    """Return the best of the committed rounds by ``stop.metric``."""
    kept = [row for row in rows if row["round"] in committed]
    return best_round(kept, config.stop.metric, higher_is_better(config))


# Starting and continuing -----------------------------------------------------------------------------------


def run_directory(job: Job, name: str | None) -> Path:
    """Return the directory of a named run below ``run.dir``.

    Raises
    ------
    UsageError
        The name cannot be that of a directory.
    """
    if name is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.base.resolve().name).strip(".-") or "run"
    if not NAME.match(name):
        raise UsageError(f'--run "{name}": a run\'s name has letters, digits, ".", "_" and "-", at most 64.')
    return Path(job.base, job.config.run.dir).expanduser() / name


def next_run_directory(job: Job, root: Path) -> Path:
    """Return the first ``run-N`` below ``run.dir`` that does not exist."""
    parent = Path(root, job.config.run.dir)
    number = 1
    while (parent / f"run-{number}").exists():
        number += 1
    return parent / f"run-{number}"


def read_plan(run: Path, job: Job) -> Resolved | None:
    """Return the plan of a run that was started before, or None; refuse to continue what has changed.

    Raises
    ------
    RunConflict
        The configuration or the user's code differs.
    DataChanged
        The store is another one.
    """
    if not (run / PLAN).is_file():
        return None
    old = load_run(run)
    blocked = [d for d in differences(old.config, without_secrets(job.config)) if not may_change(d[0], job.config)]
    if blocked:
        said = "; ".join(f"{key} was {_said(before)}, is {_said(after)}" for key, before, after in blocked[:4])
        raise RunConflict(
            f"{run} was started with another configuration: {said}.",
            "Train under another --run NAME, or undo the change.",
        )
    before: dict[str, str] = old.resolved["code"]
    changed = [key for key, digest in job.code.items() if before.get(key) != digest]
    if changed:
        raise RunConflict(
            f"{run} was started with other code of {', '.join(changed)}.",
            "Train under another --run NAME, or undo the change.",
        )
    held_out = old.resolved.get("held_out")
    plans = old.plan.plans
    differs = [
        store.samples is not None and plan.source != store.samples.fingerprint
        for plan, store in zip(plans, job.stores, strict=True)
    ]
    if any(differs) or (
        held_out is not None and job.held_out is not None and held_out["source"] != job.held_out.fingerprint
    ):
        path = job.stores[differs.index(True)].config.path if any(differs) else job.config.data.val_path
        raise DataChanged(
            f"{path} has other shapes, dtypes or chunks than when {run} was started.",
            "Train under another --run NAME.",
        )
    return old.resolution


def write_run(run: Path, job: Job, resolved: Resolved) -> None:
    """Write what describes a run: config.toml, env.json and, at the first start, plan.json.

    Raises
    ------
    DiskFull
        It cannot be written.
    """
    write_text(run / CONFIG, to_toml(without_secrets(job.config)))
    environment = {
        **versions(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "base": str(job.base.resolve()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_text(run / ENV, json.dumps(environment, indent=1) + "\n")
    if not (run / PLAN).exists():
        write_text(run / PLAN, json.dumps(resolved_values(job, resolved), indent=1) + "\n")


def with_scheduler(config: TrainConfig, scheduler: str) -> TrainConfig:
    """Return the configuration with another ``cluster.scheduler``."""
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"scheduler": scheduler})})


def _state_for(params: Any) -> Any:
    return TrainState(round=0, params=(params,), inner=(), outer=(), cursors=(), steps=())


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDamaged(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return found


def _said(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
