"""Open a Zarr group as an undecoded xarray data set, also if it holds arrays that xarray or zarr cannot open."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import xarray as xr
import zarr

from dtrain.data.paths import single_array
from dtrain.data.read.open import any_group, unreadable_metadata
from dtrain.data.read.retry import settle
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore
from dtrain.errors import DtrainError, InvalidConfig, LengthsDiffer, NotZarr, UnsuitableVariable, did_you_mean, one_line

UNSUPPORTED = ("nknown codec", "codec not available", "No Zarr data type", "An implementation for codec")
"""How zarr says that it lacks a codec, or knows no such dtype."""


def open_dataset(store: ReadStore, group: str, names: tuple[str, ...]) -> tuple[xr.Dataset, zarr.Group]:
    """Return a group as xarray sees it, undecoded, and as zarr does.

    Parameters
    ----------
    store : ReadStore
    group : str
    names : tuple of str
        The variables that are needed; all if empty. The others may be damaged, or of any shape.

    Raises
    ------
    NotZarr
        There is no group of variables, or metadata cannot be read.
    InvalidConfig
        There is no such group in the store.
    LengthsDiffer, UnsuitableVariable
        xarray or zarr cannot open a variable that is needed.
    """
    store.members[group.strip("/")] = names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a store without consolidated metadata is as good
        try:
            return _open_dataset(store, group, names)
        except DtrainError:
            raise
        except zarr.errors.ContainsArrayError:
            raise single_array(store.path) from None
        except zarr.errors.GroupNotFoundError:
            raise NotZarr(f"{store.path} is not a Zarr group of variables.") from None
        except Exception as error:  # broken metadata make zarr raise whatever its first wrong guess leads to
            settle()
            text = one_line(error)
            if "conflicting sizes" in text:
                raise LengthsDiffer(f"{store.path}: variables differ in length: {text}.") from None
            raise NotZarr(
                f"{store.path}: its Zarr metadata cannot be read: {text}", "Restore it from a copy of the store."
            ) from None


def _open_dataset(store: ReadStore, group: str, names: tuple[str, ...]) -> tuple[xr.Dataset, zarr.Group]:
    opened = _open_group(store, group)
    arrays, strange = _arrays_of(store, opened, names)
    if strange:
        store.hidden = frozenset(strange)
        opened = zarr.open_group(store, path=group or None, mode="r", use_consolidated=False)
    consolidated = False if strange else None
    if unnamed := _without_dimensions(arrays, store.path, names):
        # xarray would refuse the whole group for them: it opens the others one by one
        backend = xr.backends.ZarrStore.open_group(store, group=group or None, mode="r", consolidated=consolidated)
        others = [name for name in arrays if name not in unnamed]
        return xr.Dataset({name: backend.open_store_variable(name) for name in others}), opened
    dataset = xr.open_dataset(
        store,  # type: ignore[arg-type]
        engine="zarr",
        group=group or None,
        chunks=None,
        decode_cf=False,
        consolidated=consolidated,
        drop_variables=[name for name in arrays if names and name not in names],  # they may have any shape
    )
    return dataset, opened


def _open_group(store: ReadStore, name: str) -> zarr.Group:
    root = any_group(store, "")
    if not name:
        return root
    if not isinstance(root.get(name.strip("/")), zarr.Group):
        known = sorted(str(key) for key, _ in root.groups())
        raise InvalidConfig(
            f'data.group = "{name}": no such group in {store.path}{did_you_mean(name, known)}',
            f"It has {', '.join(known) or 'no groups'}.",
        )
    return any_group(store, name)  # not from the root's consolidated metadata: they may be old


def _arrays_of(store: ReadStore, group: zarr.Group, names: tuple[str, ...]) -> tuple[dict[str, ArrayLike], list[str]]:
    """Return the arrays of a group, and the names of those that zarr cannot open: their dtype, a codec, or damage.

    Raises for an array of the second kind that is needed.
    """
    try:
        return dict(group.arrays()), []
    except DtrainError:
        raise
    except Exception:
        settle()
    arrays: dict[str, ArrayLike] = {}
    strange = []
    for name in store.names(group.path):
        try:
            node = zarr.open(store, path=f"{group.path}/{name}".lstrip("/"), mode="r", use_consolidated=False)
        except FileNotFoundError:
            pass  # a file of the group itself
        except DtrainError:
            raise
        except Exception as error:
            _check_needed(store.path, name, error, names)
            strange.append(name)
        else:
            if isinstance(node, zarr.Array):
                arrays[name] = node
    return arrays, strange


def _check_needed(path: str, name: str, error: Exception, names: tuple[str, ...]) -> None:
    """Raise for an array that zarr cannot open, if it is needed, or damaged where all arrays are listed."""
    is_unsupported = any(text in str(error) for text in UNSUPPORTED)
    if is_unsupported and name in names:
        raise UnsuitableVariable(
            f"{path}: {name} cannot be read here: {one_line(error)}",
            "If it is a codec: install the package that has it, here and on the workers. Else write the "
            "variable with a dtype of numbers.",
        ) from None
    if name in names or not (names or is_unsupported):
        raise unreadable_metadata(path, name, error) from None


def _without_dimensions(arrays: Mapping[str, ArrayLike], path: str, names: tuple[str, ...]) -> list[str]:
    """Return the arrays without dimension names, which xarray would refuse together with all others."""
    unnamed = [name for name, array in arrays.items() if not _has_dimensions(array)]
    if needed := [name for name in names if name in unnamed]:
        raise UnsuitableVariable(
            f"{path}: {needed[0]} has no dimension names, so its sample dimension is unknown.",
            "Write the store with xarray, or give the arrays dimension_names.",
        )
    return unnamed


def _has_dimensions(array: ArrayLike) -> bool:
    if not array.ndim and array.metadata.zarr_format == 3:
        return True
    if array.metadata.zarr_format == 3 and getattr(array.metadata, "dimension_names", None) is not None:
        return True
    return "_ARRAY_DIMENSIONS" in array.attrs or "_NCZARR_ARRAY" in array.attrs
