"""A run, opened to look at it, to evaluate it or to take its model. Opening runs no code from it."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from dtrain.algorithm.params import load_into, params_sha256
from dtrain.algorithm.recipe import Functions
from dtrain.algorithm.stop import higher_is_better, stop_history
from dtrain.asking import Question, needs_climatology, with_wanted
from dtrain.checkpoint import committed_rounds, find_round, load_params, load_round, round_directory
from dtrain.config.compare import without_secrets
from dtrain.config.files import with_setting
from dtrain.config.functions import METRICS, Function
from dtrain.config.schema import DataConfig, TrainConfig
from dtrain.data.coordinate import find_gaps
from dtrain.data.given import find_given
from dtrain.data.plan.evaluation import StoreOfRun, plan_evaluation
from dtrain.data.plan.labels import BY_SHARE, GivenSplits
from dtrain.data.plan.partition import JointPlan
from dtrain.data.plan.splits import SplitName
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.joined import values_counted
from dtrain.data.samples import Samples, not_samples
from dtrain.data.source import describe
from dtrain.directory import ENV, read_config_of, read_json, read_resolved
from dtrain.display import clock
from dtrain.errors import InvalidConfig, TooFewSamples, did_you_mean
from dtrain.events import Reporter
from dtrain.exporting.card import Trained
from dtrain.exporting.export import Exportable, ExportedFile, export_model
from dtrain.job import Job, absolute, as_trained, held_out_source, open_sources, source_of, with_scheduler
from dtrain.prepare import open_runner
from dtrain.project import RunCode, load_code
from dtrain.report.history import Row, best_round, read_rows
from dtrain.report.journal import HISTORY
from dtrain.report.pace import speed
from dtrain.report.page import run_html
from dtrain.resolve import own_stores
from dtrain.resolved import Resolved
from dtrain.runclimate import climatology_of
from dtrain.runtime.module import build_module
from dtrain.runtime.place import PLACE_NAMES
from dtrain.runtime.resident import Resident, Stream
from dtrain.runtime.spec import Source
from dtrain.runtime.where import Where, client_of, scheduler_text
from dtrain.scores import Scores, scores_of
from dtrain.types import History, Parameters
from dtrain.unitlosses import partitions_of

if TYPE_CHECKING:
    import xarray as xr

    from dtrain.predict.entry import Call, Data
    from dtrain.predict.request import OtherData
    from dtrain.predict.write import Written
    from dtrain.report.partitions import Partitions

LOG = logging.getLogger("dtrain")


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
    """All functions of the run, where this process has trained it."""
    code: RunCode | None = None
    """Where they come from, where the run was opened."""

    @property
    def rows(self) -> list[Row]:
        """The lines of history.jsonl."""
        return read_rows(self.directory / HISTORY)

    @property
    def history(self) -> xr.Dataset:
        """The history over ``round``: train_loss, val_loss, val_<metric>, samples, seconds and more."""
        from dtrain.report.dataset import dataset_of

        return dataset_of(self.rows)

    def stop_history(self, rows: Sequence[Row]) -> History:
        """Return ``stop.metric`` of finished rounds, as the rules of ``[stop]`` count them."""
        return stop_history(rows, self.config, self.resolved.eval_every) if rows else ()

    @property
    def best_round(self) -> int | None:
        """The committed round with the best ``stop.metric`` (``val_loss``); without validation the training loss."""
        committed = committed_rounds(self.directory)
        kept = [row for row in self.rows if row["round"] in committed]
        return best_round(kept, self.config.stop.metric, higher_is_better(self.config))

    def note_on_best(self, number: int) -> str:
        """Return a sentence about the best round, if it is not round `number`; else nothing."""
        best, metric = self.best_round, self.config.stop.metric
        if best in (None, number):
            return ""
        named = metric if any(row.get(metric) is not None for row in self.rows) else "train_loss"
        return f"{self.directory.name}: this is round {number}, the last one; round {best} has the best {named}."

    def _say_best(self) -> None:
        """Say, once, that another round than the last one is the best, if it is."""
        if "_best_said" not in vars(self):
            vars(self)["_best_said"] = True
            if note := self.note_on_best(find_round(self.directory, "last", None)):
                LOG.warning("%s", note)

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
        """The module with the parameters of the last committed round, in eval mode; `model_of` gives other rounds."""
        model = self.model_of("last")
        self._say_best()
        return model

    def model_of(self, wanted: str) -> nn.Module:
        """Return the module with the parameters of round ``best``, ``last`` or a number.

        Raises
        ------
        RoundNotFound
            The run does not keep that round.
        """
        number = find_round(self.directory, wanted, self.best_round)
        return self._module(self._params(number, ema=False))

    @cached_property
    def ema_model(self) -> nn.Module:
        """The module with the moving average of models (``average.ema``) of the last committed round, in eval mode.

        Raises
        ------
        InvalidConfig
            The run has none.
        """
        return self._module(self._params(find_round(self.directory, "last", None), ema=True))

    def _params(self, number: int, *, ema: bool) -> Parameters:
        """Return the parameters of a committed round, or its moving average of models."""
        if not ema:
            return load_params(round_directory(self.directory, number))
        averaged = load_round(round_directory(self.directory, number))[0].ema
        if averaged is None:
            raise InvalidConfig(
                f"{self.directory.name} has no moving average of models: its average.ema is 0.",
                "Use run.model, or train with average.ema, for example 0.9.",
            )
        return averaged

    def _module(self, params: Parameters) -> nn.Module:
        build = self._load_functions(("model",))["model"]
        module = build_module(build, self.config.model_args, self.config.train.seed)
        load_into(module, params)
        return module.eval()

    def _load_functions(self, keys: Sequence[str], given: Functions | None = None) -> Functions:
        """Return the functions of some keys; those that are `given` must be those that the run was trained with."""
        own = self.functions or {}
        given = {key: function for key, function in (given or {}).items() if own.get(key) is not function}
        if self.functions is not None and not given:
            return {key: function for key, function in own.items() if key.startswith(tuple(keys))}
        code = self.code or RunCode(run=self.directory, given=own, base=self.base)
        return load_code(replace(code, given={**code.given, **given}), self.config, self.resolved, keys)

    def evaluate(
        self,
        samples: Samples | None = None,
        *,
        split: SplitName = "test",
        round: str | int = "last",
        cluster: Where = "serial",
        by: str | Sequence[str] = (),
        metrics: Sequence[str | Function] | None = None,
        baselines: bool = True,
        all_times: bool = False,
    ) -> dict[str, float] | xr.Dataset:
        """Evaluate a committed round.

        Parameters
        ----------
        samples : Samples, optional
            Data to evaluate; by default the run's own. A store that the run was trained on, or one of as many rows,
            keeps the run's splits; another one is cut with the run's shares and seed. Keys of ``[data]`` that the
            samples leave out are the run's, but for ``isel`` of another store.
        split : {"val", "test", "all"}
        round : "last", "best" or a number
        cluster : str, path, distributed.Client or cluster
            Where it is computed: ``serial`` (in this process), ``local``, an address, a scheduler file, a client, or a
            cluster.
        by : str or list of str
            What to break the figures down by, in one pass over the data: ``lead`` (the steps of the target's window),
            ``variable`` (each target alone), a dimension of the target, a coordinate of one dimension, or a part of a
            date such as ``time.month``.
        metrics : list of str or callable, optional
            In place of ``train.metrics``: names of built-in metrics and of those of the run, classes of torchmetrics,
            and functions.
        baselines : bool
            Whether persistence (the newest input) and climatology (the mean of the training rows at each place, by
            month where there are dates enough) stand beside forecasts of variables that are inputs too. The first time,
            the training rows are read once; the run's directory keeps the climatology.
        all_times : bool
            Score each lead at all of its valid times. By default leads are scored at those that all of them share: the
            valid times of long leads begin and end later than those of short ones.

        Returns
        -------
        dict or xarray.Dataset
            ``loss`` and the metrics of ``train.metrics``; with `by` over what they are broken down by, beside
            ``samples``, the number of samples that have values there. Beside forecasts also ``rmse``, the same of each
            baseline as ``rmse_persistence``, and ``skill_persistence``, which is 1 - rmse / rmse_persistence.

        Raises
        ------
        RoundNotFound
            The run does not keep that round.
        TooFewSamples
            The split is empty.
        InvalidConfig
            There is no such split, or rows of it may have been trained on.
        """
        names = (by,) if isinstance(by, str) else tuple(by)
        wanted = None if metrics is None else tuple(metrics)
        question = Question(split=split, by=names, metrics=wanted, baselines=baselines, all_times=all_times)
        scores = self.scores(samples, question, round=str(round), cluster=cluster)
        if round == "last":
            self._say_best()
        return scores.dataset() if names else scores.values

    def scores(
        self,
        samples: Samples | None,
        question: Question,
        *,
        round: str,
        cluster: Where,
        report: Reporter | None = None,
    ) -> Scores:
        """Return the figures of `evaluate`; `report` gets the progress of a pass over the training rows."""
        split = question.split
        _check_split(split)
        number = find_round(self.directory, round, self.best_round)
        params = load_params(round_directory(self.directory, number))
        job, known, cut = self._own(split) if samples is None else self._given(samples, split)
        if job.sources[0].samples is None:
            question = replace(question, baselines="no baselines: the run's stores are seen by their own workers alone")
        job = with_wanted(job, question)
        job = replace(job, config=with_scheduler(job.config, scheduler_text(cluster, PLACE_NAMES)))
        if needs_climatology(job, question):
            kept = climatology_of(self.directory, self.resolved, job, lambda: self._own("test")[:2], cluster, report)
            if isinstance(kept, str):
                question = replace(question, no_climatology=kept)
            else:
                known = replace(known, climatology=kept)
        run_id = uuid.uuid4().hex[:8]
        with (
            client_of(cluster) as client,
            open_runner(
                job, run_id, known=known, client=client, without_lost=True, question=replace(question, split=cut)
            ) as (runner, _),
        ):
            sums = runner.evaluate(params, cut)
            if sums is None:
                raise TooFewSamples(f'The split "{split}" holds no samples.', "Choose another --split.")
            return scores_of(runner, sums, number, job.config.train.metrics)

    @cached_property
    def partitions(self) -> Partitions:
        """The loss of the last committed round by unit, to find bad data; computed once (`losses_by_unit`)."""
        return self.losses_by_unit()

    def losses_by_unit(self, *, round: str | int = "last", cluster: Where = "serial") -> Partitions:
        """Evaluate each unit of the run's data on its own: one pass over all splits, as long as one of evaluation.

        Parameters
        ----------
        round : "last", "best" or a number
        cluster : str, path, distributed.Client or cluster
            Where it is computed, as of `evaluate`.

        Returns
        -------
        Partitions
            An xarray.Dataset over ``unit``. ``worst()`` are the units with the largest loss, ``plot()`` plots all,
            ``to_pandas()`` is a table.

        Raises
        ------
        RoundNotFound
            The run does not keep that round.
        """
        number = find_round(self.directory, str(round), self.best_round)
        params = load_params(round_directory(self.directory, number))
        job, known, _ = self._own("val")
        job = replace(job, config=with_scheduler(job.config, scheduler_text(cluster, PLACE_NAMES)))
        with (
            client_of(cluster) as client,
            open_runner(job, uuid.uuid4().hex[:8], known=known, client=client, without_lost=True) as (runner, _),
        ):
            streams = Resident(runner.spec).by_unit
            self._say_units(streams)
            return partitions_of(streams, runner.losses_by_part(params), runner.spec.plan.replicas)

    def _say_units(self, streams: Sequence[Stream]) -> None:
        """Say how long a pass over all units takes, if it takes long."""
        units = sum(len(stream.partition.units) for stream in streams)
        samples = sum(stream.partition.num_samples for stream in streams)
        if rows := self.rows:
            seconds = samples / speed(rows)  # of training: an evaluation takes less
            level = logging.WARNING if seconds > UNITS_SECONDS else logging.INFO
            LOG.log(level, "%s: evaluating %s units, in %s at most.", self.directory.name, f"{units:,}", clock(seconds))

    def export(self, to: str, out: str | Path, *, round: str | int = "last", ema: bool = False) -> ExportedFile:
        """Write the model to a file that needs no dtrain, with a model card beside it (``out`` and ``.md``).

        It takes decoded values and gives outputs in the target's units: normalisation is inside. The file is loaded,
        and its outputs on real samples of the run's data are compared with the model's, before it is moved into place.

        Parameters
        ----------
        to : {"safetensors", "pt2", "onnx"}
            The tensors alone; a program of torch.export; a graph for ONNX Runtime (extra ``onnx``).
        out : path
            The file.
        round : "last", "best" or a number
        ema : bool
            The moving average of models (``average.ema``) instead of the model.

        Raises
        ------
        RoundNotFound
            The run does not keep that round.
        InvalidConfig
            A package is missing, or the run has no moving average.
        UsageError, OutputExists
            There is no such format or directory, or such a file already.
        UnsuitableModel
            The model cannot be exported to that format, or the file gives other outputs than the model.
        """
        number = find_round(self.directory, str(round), self.best_round)
        params = self._params(number, ema=ema)
        job, known, _ = self._own("val", ("model", "data.transform"))
        trained = Trained(
            name=self.directory.name,
            round=number,
            is_average=ema,
            config=without_secrets(self.config),
            row=next((row for row in self.rows if row["round"] == number), {}),
            data=(),
            versions={name: read_json(self.directory / ENV).get(name, "") for name in VERSIONS},
            params_sha256=params_sha256(params),
        )
        model = Exportable(job=job, resolved=known, build=lambda: self._module(params), trained=trained)
        return export_model(model, to, Path(out))

    def _own(self, split: SplitName, keys: Sequence[str] | None = None) -> tuple[Job, Resolved, SplitName]:
        """Return what evaluates a split of the run's own data; `keys` are those of the functions that are needed."""
        data, base = self.config.data, self.base
        job = self._job(open_sources(data, base), held_out_source(data, base), keys=keys)
        known = self.resolved
        if data.non_finite != self._recorded.non_finite:
            known = _uncounted(known)
        # data that were modified since the start may be evaluated: their contents are not compared
        return job, replace(known, contents=(), filled=None), split

    @property
    def _recorded(self) -> DataConfig:
        """The table ``[data]`` that the run was trained with, without the settings of an evaluation."""
        return read_config_of(self.directory).data

    def _given(self, samples: Samples, split: SplitName) -> tuple[Job, Resolved, SplitName]:
        """Return what evaluates a split of given samples."""
        if not isinstance(samples, Samples):
            raise not_samples(samples)
        known, own = self.resolved, own_stores(self.config.data, self.base)
        store, given = own.find(samples), samples.config
        is_given = store != "held_out" and "split" in given.model_fields_set
        if is_given and split != "all" and not given.split.holds_out(split):
            raise TooFewSamples(
                f'The split "{split}" holds no samples: they were opened with data.split.{split} = 0.',
                "Leave split out of open_samples: the run's is used. Or evaluate all of them (split all).",
            )
        samples = as_trained(samples, self.config.data, own=store is not None)
        plans, jumps = known.plan.plans, find_gaps(samples).jumps
        splits = BY_SHARE if split == "all" or store == "held_out" else _given_splits(samples, plans, store)
        plan, cut = plan_evaluation(samples, split, plans, known.held_out, store, jumps=jumps, given=splits)
        if not own.holds(samples) or samples.config.non_finite != self._recorded.non_finite:
            plan = replace(plan, multiplicity="")  # a copy may hold other values
        joint = JointPlan((values_counted(samples, plan),))
        known = replace(known, plan=joint, held_out=None, contents=(), filled=None, snapshots=())
        return self._job((source_of(samples),), None, samples.transform), known, cut

    def _job(
        self,
        sources: tuple[Source, ...],
        held_out: Source | None,
        transform: Function | None = None,
        keys: Sequence[str] | None = None,
    ) -> Job:
        """Return what evaluates sources; of the user's functions only those that an evaluation calls are needed."""
        own = {} if transform is None else {"data.transform": transform}
        functions = self._load_functions(EVALUATED if keys is None else keys, own)
        tables = {
            "train": self.config.train.model_copy(update=NOT_EVALUATED),
            "average": self.config.average.model_copy(update={"outer": None}),
        }
        config = self.config.model_copy(update=tables).with_functions({})
        return Job(config=config, sources=sources, held_out=held_out, functions=functions, base=self.base)

    def predict(
        self,
        samples: Data | None = None,
        *,
        round: str | int = "last",
        values: str = "auto",
        overlap: float = 0.25,
    ) -> xr.Dataset:
        """Return predictions that are computed when they are asked for: ``.sel``, ``.plot()``, ``.to_zarr(...)``.

        Every anchor whose input window is complete is predicted. Variables are dask arrays with a chunk for each unit
        of the inputs; whichever scheduler Dask uses computes them, also the current client of a notebook, to the bits
        of `predict_to`.

        Parameters
        ----------
        samples : Samples, path or list of paths, optional
            Data to predict, with or without the targets; by default the run's own. Of a path, and for keys of
            ``[data]`` that samples leave out, the run's keys are used.
        round : "last", "best" or a number
        values : {"auto", "classes", "probabilities", "raw"}
            ``auto``: targets in their own units; of classes, the class and its probability. ``raw``: what the model
            returns.
        overlap : float
            Of patches: share of a patch that the next one covers too, from 0 to 0.9. Predictions of a place are blended
            by a smooth weight.

        Returns
        -------
        xarray.Dataset
            With the coordinates of the inputs; forecasts have ``lead`` and ``valid_time``.

        Raises
        ------
        RoundNotFound
            The run does not keep that round.
        DtrainError
            The store does not fit the run.

        Examples
        --------
        >>> run.predict("2024.zarr").t2m.sel(time="2024-07").mean("time").compute()  # doctest: +SKIP
        """
        from dtrain.predict.entry import lazy
        from dtrain.predict.prepare import Options

        predictions = lazy(self._call(samples, str(round)), Options(values=values, overlap=overlap))
        if round == "last":
            self._say_best()
        return predictions

    def predict_to(
        self,
        out: str | Path,
        samples: Data | OtherData | None = None,
        *,
        round: str | int = "last",
        values: str = "auto",
        overlap: float = 0.25,
        cluster: Where = "serial",
        resume: bool = False,
        report: Reporter | None = None,
    ) -> Written:
        """Write predictions to Zarr, on a cluster; ``dtrain predict`` does the same.

        Parameters
        ----------
        out : path
            A directory, a URL, or an icechunk repository (``NAME.icechunk``, or one that is there), which gets one
            commit. Nothing that is there is overwritten.
        samples, round, values, overlap
            As of `predict`.
        cluster : str, path, distributed.Client or cluster
            As of `evaluate`.
        resume : bool
            Go on with predictions that were interrupted.
        report : callable, optional
            Called with the events of the progress.

        Returns
        -------
        Written
            What has been written.

        Raises
        ------
        OutputExists, RunConflict
            There is something at `out`, or it was begun with other settings.
        DtrainError
            As of `predict`; or a worker or the disk fails.
        """
        from dtrain.predict.entry import written
        from dtrain.predict.prepare import Options

        call = self._call(samples, str(round))
        options = Options(values=values, overlap=overlap)
        tell = report or (lambda event: None)
        done = written(call, options, str(out), cluster=cluster, goes_on=resume, tell=tell)
        if round == "last":
            self._say_best()
        return done

    def _call(self, samples: Data | OtherData | None, round: str) -> Call:
        """Return the run, at a round, with the data that are to be predicted."""
        from dtrain.predict.entry import FUNCTIONS, Call, data_paths
        from dtrain.predict.prepare import RunFacts
        from dtrain.predict.request import OtherData

        number = find_round(self.directory, round, self.best_round)
        given = samples
        if not isinstance(given, Samples | OtherData | None):
            given = self.other_data(data_paths(given))
        own = {"data.transform": given.transform} if isinstance(given, Samples) and given.transform else {}
        return Call(
            facts=RunFacts(
                directory=self.directory,
                base=self.base,
                config=self.config,
                resolved=self.resolved,
                round=number,
                params=load_params(round_directory(self.directory, number)),
            ),
            functions=self._load_functions(FUNCTIONS, own),
            given=given,
        )

    def other_data(self, data: str | tuple[str, ...] | None, settings: tuple[str, ...] = ()) -> OtherData:
        """Return data to predict: a store, or several that are one, or the run's own with other settings."""
        from dtrain.predict.request import OtherData

        selects = any(setting.startswith(("data.isel", "data.sel")) for setting in settings)
        return OtherData(self._table(data, settings), all_rows=not selects)

    def _table(self, data: str | tuple[str, ...] | None, settings: tuple[str, ...] = ()) -> DataConfig:
        """Return the run's table ``[data]`` with another path, and with keys that differ from the run's.

        Paths that are relative to the working directory, and the run's own, become absolute.
        """
        own = self.config.data
        if data is not None:
            own = own.model_copy(update={"path": absolute(data)})
        elif not own.is_federated:
            own = own.model_copy(update={"path": absolute(own.stores[0].path, self.base)})
        tables: dict[str, Any] = {"data": own.model_dump(mode="json")}
        for setting in settings:
            tables = with_setting(tables, setting)
        return TrainConfig(**tables).data

    def other_samples(self, data: str | tuple[str, ...] | None, settings: tuple[str, ...] = ()) -> Samples:
        """Describe samples with the run's table ``[data]``.

        Parameters
        ----------
        data : str or tuple of str, optional
            Path or URL of a store, or of several that are one; by default the run's own.
        settings : tuple of str
            ``"data.isel={}"``: keys that differ from the run's (`is_view`).

        Raises
        ------
        InvalidConfig
            A setting is wrong, or the run has several stores of its own.
        """
        if data is None and self.config.data.is_federated:
            raise InvalidConfig("The run has several stores.", "Name the one to evaluate with --data.")
        return describe(self._table(data, settings), self.base)

    def __repr__(self) -> str:
        return f"<dtrain.Run {self.directory} {len(self.rows)} of {self.config.train.rounds} rounds>"

    def _repr_html_(self) -> str:
        rows = self.rows
        best = best_round(rows, self.config.stop.metric, higher_is_better(self.config))
        return run_html(repr(self), rows, self.config.train.rounds, best)


UNITS_SECONDS = 5.0
"""From so many seconds on it is said how long a pass over all units takes."""
VERSIONS = ("dtrain", "torch", "numpy", "zarr", "distributed", "python")
"""Of env.json, in a model card."""
EVALUATED = ("model", "train.loss", METRICS, "data.transform")
"""Keys of the functions that an evaluation calls."""
NOT_EVALUATED = {"optimizer": "sgd", "schedule": "constant"}
"""Keys of ``[train]`` that play no part in an evaluation: their functions need not be there."""


def _uncounted(resolved: Resolved) -> Resolved:
    """Return what is resolved, with plans of which all samples count until they are counted anew."""
    plans = tuple(replace(plan, multiplicity="") for plan in resolved.plan.plans)
    held_out = resolved.held_out and replace(resolved.held_out, multiplicity="")
    return replace(resolved, plan=JointPlan(plans), held_out=held_out)


def _given_splits(samples: Samples, plans: tuple[DataPlan, ...], store: StoreOfRun) -> GivenSplits:
    """Return the splits that ``data.split`` gives in samples; of groups, where they may be a copy of the run's."""
    like = next((plan for plan in plans if plan.num_samples == samples.num_samples), None)
    if samples.config.split.by and (store is not None or like is None):
        return BY_SHARE
    return find_given(samples, plans[0].seed, like.absent if like is not None else ()).splits


def _check_split(split: str) -> None:
    allowed = [name for name in get_args(SplitName) if name != "train"]
    if split == "train":
        raise InvalidConfig(
            'split = "train": the training split is not evaluated.', "The loss of each round is history.train_loss."
        )
    if split not in allowed:
        raise InvalidConfig(
            f"split = {json.dumps(split, default=repr)}: allowed are {', '.join(allowed)}"
            f"{did_you_mean(str(split), allowed)}"
        )
