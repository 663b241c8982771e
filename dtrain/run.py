"""A run, opened to look at it, to evaluate it or to take its model. Opening runs no code from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from dtrain.algorithm.params import load_into, params_sha256
from dtrain.algorithm.recipe import Functions
from dtrain.algorithm.stop import higher_is_better, stop_history
from dtrain.asking import Question
from dtrain.checkpoint import load_ema, load_params
from dtrain.committed import committed_rounds, find_round
from dtrain.config.compare import without_secrets
from dtrain.config.functions import Function
from dtrain.config.schema import TrainConfig
from dtrain.data.plan.evaluation import StoreOfRun
from dtrain.data.plan.partition import JointPlan
from dtrain.data.plan.splits import SplitName
from dtrain.data.samples import Samples
from dtrain.data.source import describe
from dtrain.description import read_env, read_resolved
from dtrain.display import clock
from dtrain.errors import InvalidConfig
from dtrain.evaluation import Committed, losses_by_unit, scores
from dtrain.events import Reporter
from dtrain.exporting.card import Trained
from dtrain.exporting.export import Exportable, ExportedFile, export_model
from dtrain.project import RunCode, load_code
from dtrain.report.history import Row, best_round, read_rows, read_rows_of
from dtrain.report.pace import speed
from dtrain.report.page import run_html
from dtrain.resolved import Resolved
from dtrain.rundata import RunData, data_table
from dtrain.runfiles import round_directory
from dtrain.runtime.module import build_module
from dtrain.runtime.resident import Stream
from dtrain.runtime.where import Where
from dtrain.scores import Scores
from dtrain.types import History, Parameters

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
        return read_rows(self.directory)

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
        kept = read_rows_of(self.directory, committed_rounds(self.directory))
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

    @property
    def _data(self) -> RunData:
        return RunData(
            directory=self.directory,
            config=self.config,
            base=self.base,
            resolved=self.resolved,
            load_functions=self._load_functions,
        )

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

    def _committed(self, wanted: str) -> Committed:
        """Return round ``best``, ``last`` or a number, to evaluate it."""
        number = find_round(self.directory, wanted, self.best_round)
        return Committed(number, self._params(number, ema=False))

    def _params(self, number: int, *, ema: bool) -> Parameters:
        """Return the parameters of a committed round, or its moving average of models."""
        if not ema:
            return load_params(round_directory(self.directory, number))
        averaged = load_ema(round_directory(self.directory, number))
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

    def find_store(self, samples: Samples) -> StoreOfRun:
        """Return which of the run's stores the samples' is, or None."""
        return self._data.find_store(samples)

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
        return scores(self._data, self._committed(round), samples, question, cluster, report)

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
        return losses_by_unit(self._data, self._committed(str(round)), cluster, self._say_units)

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
        job, known, _ = self._data.own("val", ("model", "data.transform"))
        trained = Trained(
            name=self.directory.name,
            round=number,
            is_average=ema,
            config=without_secrets(self.config),
            row=next((row for row in self.rows if row["round"] == number), {}),
            data=(),
            versions={name: read_env(self.directory).get(name, "") for name in VERSIONS},
            params_sha256=params_sha256(params),
        )
        model = Exportable(job=job, resolved=known, build=lambda: self._module(params), trained=trained)
        return export_model(model, to, Path(out))

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
        return OtherData(data_table(self.config, self.base, data, settings), all_rows=not selects)

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
        return describe(data_table(self.config, self.base, data, settings), self.base)

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
