"""``[data]``: the samples, their split and their partitions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, Strict, field_validator, model_validator

from dtrain.config.slices import LabelSelector, Offsets, Selector, Slice
from dtrain.config.split import SplitConfig
from dtrain.config.table import Bool, Positive, Size, Table
from dtrain.errors import InvalidConfig, did_you_mean


def _one_path(given: Any) -> Any:
    """Return the path of a list that holds one; refuse an empty list, and paths beside tables."""
    if not isinstance(given, list | tuple):
        return given
    if not given:
        raise ValueError("is an empty list; give at least one store")
    if len({isinstance(store, str) for store in given}) > 1:
        raise ValueError(
            "holds paths and tables; give paths, of stores that are one, or tables, of stores with own replicas"
        )
    return given[0] if len(given) == 1 and isinstance(given[0], str) else given


Paths: TypeAlias = Annotated[str | tuple[str, ...], BeforeValidator(_one_path)]
"""A store, or several that are one: the rows of each follow those of the one before."""


class Store(Table):
    """One of several stores (federated data)."""

    path: Paths
    """The store, or several that are one, as ``data.path``."""
    workers: tuple[str, ...] = ()
    """Addresses of the only workers that may read it; empty: all may."""
    replicas: Positive = 1
    """Replicas that are trained on it."""


class MinValid(Table):
    """``data.non_finite = { min_valid = 0.5 }``: samples are kept from that share of finite values on."""

    min_valid: Annotated[float, Strict(), Field(gt=0, le=1)]
    """Share of finite values from which on a sample is kept. Its other inputs become 0 after normalising; built-in
    losses and metrics count finite targets only."""


class DataConfig(Table):
    """``[data]``: the samples, their split and their partitions."""

    @field_validator("input_offsets", "target_offsets")
    @classmethod
    def _not_empty(cls, offsets: Offsets) -> Offsets:
        if isinstance(offsets, Slice) and offsets.stop <= offsets.start:
            raise ValueError(f"start = {offsets.start} and stop = {offsets.stop} hold no offset")
        if offsets == ():
            raise ValueError("is an empty list; give at least one offset")
        return offsets

    @model_validator(mode="after")
    def _has_patches(self) -> Self:
        if self.split.patches and not self.patch:
            raise ValueError("split.patches = true cuts splits by patch, and data.patch names no dimension to cut")
        return self

    @model_validator(mode="after")
    def _says_once(self) -> Self:
        if twice := [dim for dim in self.sel if dim in self.isel]:
            raise ValueError(f"{twice[0]} is in sel, by coordinate, and in isel, by index; give one of them")
        if self.val_path and "val" in self.split.ranges:
            raise ValueError("split.val is a range, and val_path a store for validation; give one of them")
        return self

    path: Annotated[str | tuple[Store | str, ...], BeforeValidator(_one_path)] = ""
    """Required. A local path, fsspec URL, .zip, icechunk repository or kerchunk reference, relative to this file. A
    list of paths is one dataset; a list of tables { path, workers, replicas } is federated data."""
    inputs: tuple[str, ...] = ()
    """Required. Variables: the model is called model(*inputs) in this order. A path below the group names nested
    arrays: "labels/nuclei/0", "obs/cell_type", "X"."""
    targets: tuple[str, ...] = ()
    """Required. Variables that the loss compares outputs with: one tensor, or a tuple of several."""
    storage_options: dict[str, Any] = Field(default={}, repr=False)
    """Options of fsspec for the store, such as { anon = true }; of an icechunk repository also branch, tag or snapshot.
    A run keeps no secrets of it."""
    group: str = ""
    """Path of the Zarr group within the store."""
    isel: dict[str, Selector] = {}
    """Selection by index: { level = 3, lat = { start = 0, stop = 64 } }."""
    sel: dict[str, LabelSelector] = {}
    """Selection by coordinate, both ends included: { time = { start = "2000", stop = "2017-12-31" }, level = 850 }."""
    dims: dict[str, tuple[str, ...]] = {}
    """Names of dimensions where the store names none: { X = ["cell", "gene"] }."""
    sample_dim: str = "auto"
    """The dimension along which samples lie; "auto": the first that all variables share."""
    input_offsets: Offsets = 0
    """Rows of the inputs, counted from a sample's row. A number: no window axis; a list or { start, stop, step }: a
    window axis after the sample axis."""
    target_offsets: Offsets = 0
    """Rows of the targets, as input_offsets. A forecast: inputs [-1, 0], targets 1."""
    stride: Positive = 1
    """Samples are named after the rows that are multiples of it."""
    patch: dict[str, Positive] = {}
    """Lengths of patches: samples are also cut along these dimensions, such as { lat = 64, lon = 64 }."""
    split: SplitConfig = SplitConfig()
    """What is held out for validation and test: shares, ranges of a coordinate, or groups."""
    gaps: Literal["auto", "drop", "error", "allow"] = "auto"
    """Windows across jumps of the sample dimension's coordinate: left out (drop), refused (error) or kept (allow).
    "auto": up to 5 % jumps are left out and counted, more are refused."""
    split_order: Literal["auto", "random", "sequential"] = "auto"
    """How shares are held out: units at random, or the last ones. "auto": sequential where windows exist."""
    val_path: Paths = ""
    """Another store for validation; then split.val is 0."""
    partition: Literal["stratified", "contiguous"] = "stratified"
    """How units are dealt to replicas: alike in each part of the store (stratified), or neighbours together."""
    normalize: tuple[str, ...] | dict[str, tuple[str, ...]] = ()
    """Variables that are standardised with mean and standard deviation of the training split, kept in the run; or {
    image = ["band"] }: one mean for each index of these dimensions."""
    transform: str = ""
    """A function of yours, "module:function", that all batches pass: called with (batch, torch.Generator), returns the
    batch."""
    missing: Literal["auto", "error", "fill", "skip"] = "auto"
    """Chunks that are not stored: an error, filled with the fill value, or their samples left out (skip). "auto": masks
    and integer labels are filled, NaN is left to non_finite, all else is an error."""
    non_finite: Literal["error", "allow", "skip"] | MinValid = "error"
    """Values that are not finite: an error, passed on (allow), or their samples left out (skip); { min_valid = 0.5 }
    keeps samples from that share of finite values on."""
    weight: str = ""
    """Weight of samples: a variable, or "cos(lat)". Built-in losses and metrics use it; a loss of yours gets it as
    third argument."""
    balance: str = ""
    """A variable of classes: each sample comes round(n_max / n_class) times a pass."""
    shuffle: Bool = True
    """Whether samples are shuffled, by a seeded order; false: as they are stored."""
    memory: Size = "auto"
    """Bytes of a worker for the data path, such as "512MB"; "auto": half of its memory. Changes the speed only."""
    cache: Size = "auto"
    """Bytes of data.memory that keep decoded units for the next pass; "auto": what is left. Changes the speed only."""
    reader: Literal["auto", "numcodecs", "zarrs", "zarr"] = "auto"
    """What decodes chunks; all give the same bits. "auto": the fastest that reads the variable."""

    @property
    def stores(self) -> tuple[Store, ...]:
        """The stores of `path`: several where they are tables, each with its own replicas (federated data)."""
        if isinstance(self.path, tuple):
            tables = tuple(store for store in self.path if isinstance(store, Store))
            return tables or (Store(path=tuple(path for path in self.path if isinstance(path, str))),)
        return (Store(path=self.path),)

    @property
    def is_federated(self) -> bool:
        """Whether `path` lists tables."""
        return isinstance(self.path, tuple) and isinstance(self.path[0], Store)

    @property
    def mean_dims(self) -> dict[str, tuple[str, ...]]:
        """By variable of `normalize`: the dimensions of which each index has its own mean; none: one mean."""
        if isinstance(self.normalize, dict):
            return self.normalize
        return dict.fromkeys(self.normalize, ())

    @property
    def min_valid(self) -> float | None:
        """The share of finite values that a sample needs to be kept; None: all are kept, or are a fault."""
        if isinstance(self.non_finite, MinValid):
            return self.non_finite.min_valid
        return 1.0 if self.non_finite == "skip" else None

    @property
    def fills_inputs(self) -> bool:
        """Whether samples that are kept may hold non-finite values: inputs become 0, and targets do not count."""
        return isinstance(self.non_finite, MinValid)


def check_data(data: DataConfig) -> None:
    """Refuse names of variables that contradict each other.

    Raises
    ------
    InvalidConfig
    """
    for name, dims in data.dims.items():
        _check_known("dims", name, data)
        if not all(dims):
            raise InvalidConfig(f"data.dims.{name} = {list(dims)}: a name is empty.", "Name each dimension.")
        if twice := [dim for dim in dims if dims.count(dim) > 1]:
            raise InvalidConfig(f'data.dims.{name} names "{twice[0]}" twice.', "Give each dimension its own name.")
    if data.weight in data.mean_dims:
        raise InvalidConfig(
            f'data.normalize names "{data.weight}", which is data.weight: weights are used as they are.',
            f"Leave {data.weight} out of data.normalize.",
        )
    for name, dims in data.mean_dims.items():
        _check_known("normalize", name, data)
        if twice := [dim for dim in dims if dims.count(dim) > 1]:
            raise InvalidConfig(f'data.normalize.{name} names the dimension "{twice[0]}" twice.', "Name it once.")


def _check_known(key: str, name: str, data: DataConfig) -> None:
    known = (*data.inputs, *data.targets)
    if key == "dims" and name == data.weight:
        return
    if known and name not in known:  # Python may name them later
        raise InvalidConfig(
            f'data.{key} names "{name}", which is neither an input nor a target{did_you_mean(name, known)}'
        )
