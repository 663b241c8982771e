"""What is to be predicted: the inputs of a store, and what the run's own or the same store says about the targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.config.schema import DataConfig, TrainConfig
from dtrain.config.split import SplitConfig
from dtrain.data.categories import check_categories
from dtrain.data.genes import check_digests, genes_of
from dtrain.data.samples import Samples, not_samples
from dtrain.data.source import describe, describe_inputs
from dtrain.errors import DtrainError, InvalidConfig, UnknownVariable, one_line
from dtrain.job import as_trained
from dtrain.predict.targets import Target, targets_of
from dtrain.resolve import own_stores
from dtrain.resolved import Resolved


@dataclass(frozen=True, slots=True)
class OtherData:
    """A store that is predicted, described by the run's table ``[data]``."""

    table: DataConfig
    """With absolute paths."""
    all_rows: bool
    """Of another store than the run's all rows are predicted: a selection of rows is the run's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The samples that are predicted."""

    inputs: Samples
    """Of the inputs alone, as the run's model takes them."""
    targets: tuple[Target, ...]
    """None are known if neither store has them."""
    unknown: str
    """Why targets are not known."""
    labels: Samples | None
    """The samples with the targets, of the store that is predicted; None if it lacks them."""


def request_of(
    config: TrainConfig,
    resolved: Resolved,
    base: Path,
    given: Samples | OtherData | None,
) -> Request:
    """Describe what is to be predicted.

    Parameters
    ----------
    config : TrainConfig
        Of the run.
    resolved : Resolved
        Of the run.
    base : Path
        Relative paths of the run are relative to it.
    given : Samples or OtherData, optional
        Other data than the run's own.

    Raises
    ------
    InvalidConfig
        The run has several stores, and none is named.
    UnknownVariable, LengthsDiffer, DataChanged
        The store lacks an input, or has other genes or categories than the run's.
    """
    table, place, snapshot = _table(config, resolved, base, given)
    if isinstance(given, OtherData) and given.all_rows and (table.isel or table.sel):
        table = _of_all_rows(config, base, table, place)
    own = describe_inputs(table, place, snapshot)
    try:
        labels = describe(_plain(table), place, snapshot)
    except UnknownVariable:
        labels = None
    known, unknown = labels, ""
    if known is None:
        known, unknown = _of_the_run(config, base, resolved)
    if known is not None and own.sample_dim != known.sample_dim:
        own = describe_inputs(table.model_copy(update={"sample_dim": known.sample_dim}), place, snapshot)
    if not own.moving:
        raise InvalidConfig(
            f"{own.path}: no input has the dimension of the samples, {own.sample_dim}: nothing tells them apart.",
            "Name an input that has it in data.inputs.",
        )
    own = own.standardised_by(resolved.scalings).labelled(resolved.labels)
    for samples in (own, labels):
        if samples is not None:
            check_categories(samples, resolved.categories)
    if resolved.genes:
        check_digests(own.path, genes_of(own), resolved.genes)
    if isinstance(given, Samples) and given.transform is not None:
        own = replace(own, transform=given.transform)
    targets = () if known is None else targets_of(known, own, resolved)
    return Request(inputs=own, targets=targets, unknown=unknown, labels=labels)


def _table(
    config: TrainConfig, resolved: Resolved, base: Path, given: Samples | OtherData | None
) -> tuple[DataConfig, Path, str]:
    """Return the table ``[data]`` of what is predicted, where its paths lead from, and its snapshot."""
    if given is None:
        if config.data.is_federated:
            raise _several_stores()
        return config.data, base, resolved.snapshots[0] if resolved.snapshots else ""
    if isinstance(given, OtherData):
        if given.table.is_federated:
            raise _several_stores()
        return given.table, base, ""
    if not isinstance(given, Samples):
        raise not_samples(given)
    is_own = own_stores(config.data, base).find(given) is not None
    samples = as_trained(given, config.data, own=is_own)
    location = samples.location
    return samples.config.model_copy(update={"path": location}), Path.cwd(), samples.store.snapshot


def _of_all_rows(config: TrainConfig, base: Path, table: DataConfig, place: Path) -> DataConfig:
    """Return a table without the rows that the run selects of its own store, if it names another one."""
    whole = describe_inputs(table.model_copy(update={"isel": {}, "sel": {}}), place)
    if own_stores(config.data, base).find(whole) is not None:
        return table
    kept = {
        key: {dim: part for dim, part in getattr(table, key).items() if dim != whole.sample_dim}
        for key in ("isel", "sel")
    }
    return table.model_copy(update=kept)


def _several_stores() -> InvalidConfig:
    return InvalidConfig("The run has several stores.", "Name the one to predict: --data PATH.")


def _plain(table: DataConfig) -> DataConfig:
    """Return a table without what is only for training: weights, splits and balanced classes."""
    return table.model_copy(
        update={"weight": "", "balance": "", "val_path": "", "split": SplitConfig(val=0.0, test=0.0)}
    )


def _of_the_run(config: TrainConfig, base: Path, resolved: Resolved) -> tuple[Samples | None, str]:
    """Return the run's own samples, for what they say about targets; or why they cannot be described."""
    table = config.data.model_copy(update={"path": config.data.stores[0].path})
    try:
        return describe(_plain(table), base, resolved.snapshots[0] if resolved.snapshots else ""), ""
    except DtrainError as error:
        return None, one_line(error).rstrip(".")
