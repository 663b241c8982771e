"""Export a run's model: build the module, write it, load what was written, compare, and move it into place."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dtrain.config.compare import without_secrets
from dtrain.config.schema import DataConfig
from dtrain.config.slices import LabelRange, LabelSlice
from dtrain.data.load.gather import target_scalings
from dtrain.data.plan.anchors import count_samples
from dtrain.data.plan.splits import SplitName
from dtrain.errors import DiskFull, DtrainError, InvalidConfig, OutputExists, UnsuitableModel, UsageError, did_you_mean
from dtrain.exporting import formats
from dtrain.exporting.card import Trained, card_text
from dtrain.exporting.facts import Facts, inputs_of, outputs_of
from dtrain.exporting.module import ExportedModule, Restore, Standardise, ZeroFill, difference, tensors_in
from dtrain.exporting.trial import Trial, decoded_outputs, take_trial
from dtrain.job import Job, plain
from dtrain.packages import is_installed
from dtrain.resolved import Resolved
from dtrain.runtime.usercode import short_line, user_code

HELD: tuple[SplitName, ...] = ("val", "test")
DATA_TOLERANCE = 1e-3
"""Of outputs on decoded float32 values against those of the run's data path, relative to the largest output. Values
that are packed lose up to 6e-8 of themselves as float32, and a model may enlarge that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """A file that was exported, and what the comparison gave."""

    path: Path
    card: Path
    """The model card."""
    to: str
    """The format."""
    round: int
    samples: int
    """Real samples that outputs were compared on."""
    split: str
    """Where they are from."""
    difference: float
    """Largest difference between outputs of the file and of the module, relative to the largest output."""
    data_difference: float
    """Likewise between the module on decoded values, and the run's model on what the data path gives it."""
    nbytes: int
    """Size of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exportable:
    """A model of a run, and all that an export needs of the run."""

    job: Job
    resolved: Resolved
    build: Callable[[], nn.Module]
    """Builds the model with the run's parameters, in eval mode."""
    trained: Trained
    """Without its lines about the data."""


def format_names() -> list[str]:
    """Return the names of the formats."""
    return sorted(module.name for module in pkgutil.iter_modules(formats.__path__))


def export_model(model: Exportable, to: str, out: Path) -> ExportedFile:
    """Write a model in a format, with a model card beside it (``out`` and ``.md``).

    Parameters
    ----------
    model : Exportable
    to : str
        One of `format_names`.
    out : path
        The file; its directory must exist.

    Raises
    ------
    UsageError
        There is no such format or directory.
    InvalidConfig
        A package is missing.
    OutputExists
        There is such a file already.
    UnsuitableModel
        The model cannot be written in that format, or the file gives other outputs than the run's model.
    DiskFull
        The file cannot be written.
    """
    chosen = _format(to)
    card = out.with_name(f"{out.name}.md")
    if not out.name.endswith(chosen.SUFFIX):
        raise UsageError(
            f"--out {out}: the name of a {to} file ends with {chosen.SUFFIX}.", f"Write --out {out}{chosen.SUFFIX}"
        )
    _check_place(out, card)
    trial = take_trial(model.job, model.resolved)
    with user_code("Calling the model"), torch.no_grad():
        module, outputs, compared = _built(model, trial)
    facts = _facts(model, trial, module, outputs)
    with _temporary(out) as folder:
        file = folder / out.name
        with _format_errors(to):
            chosen.write(module, tuple(map(_several, trial.decoded)), facts, file)
            called = chosen.load(file, facts, lambda: _blank(model, trial))
            own = _compared(called, module, trial, to, chosen.TOLERANCE)
        checked = _checked(trial, own, compared)
        trained = replace(model.trained, data=_data_rows(model, trial))
        text = card_text(facts, trained, out.name, chosen.usage(facts, out.name), checked)
        (folder / card.name).write_text(text, encoding="utf-8")
        nbytes = sum(path.stat().st_size for path in folder.iterdir() if path.name != card.name)
        _move(folder, out)
    return ExportedFile(
        path=out,
        card=card,
        to=to,
        round=model.trained.round,
        samples=trial.size,
        split=trial.split,
        difference=own,
        data_difference=compared,
        nbytes=nbytes,
    )


def _format(to: str) -> ModuleType:
    names = format_names()
    if to not in names:
        raise UsageError(f'--to "{to}": allowed are {", ".join(names)}{did_you_mean(to, names)}')
    chosen = importlib.import_module(f"{formats.__name__}.{to}")
    if missing := [name for name in chosen.PACKAGES if not is_installed(name)]:
        raise InvalidConfig(
            f"--to {to} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            f'pip install "dtrain[{chosen.EXTRA}]"',
        )
    return chosen


def _check_place(out: Path, card: Path) -> None:
    for path in (out, card):
        if path.exists() or path.is_symlink():
            raise OutputExists(f"{path} exists.", "Choose another --out, or remove it.")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no directory {out.parent}.", "Make it, or choose another --out.")


# The module ---------------------------------------------------------------------------------------------------


def _built(model: Exportable, trial: Trial) -> tuple[ExportedModule, Any, float]:
    """Return the module, its outputs, and their difference from those of the run's model.

    Raises
    ------
    UnsuitableModel
        They differ: the samples that the model sees are not the decoded ones, standardised.
    """
    inner = model.build()
    raw = inner(*trial.inputs)
    module = _module(inner, raw, model, trial)
    outputs = module(*trial.decoded)
    wanted = tensors_in(decoded_outputs(trial, raw, model.resolved))
    if (found := difference(tensors_in(outputs), wanted)) > DATA_TOLERANCE:
        raise _other_samples(model, found)
    return module, outputs, found


def _module(inner: nn.Module, raw: Any, model: Exportable, trial: Trial) -> ExportedModule:
    fills = model.job.config.data.fills_inputs
    fields = trial.samples.fields[: len(trial.samples.config.inputs)]
    inputs = []
    for one, values in zip(fields, trial.decoded, strict=True):
        steps: list[nn.Module] = []
        if (scaling := model.resolved.scalings.get(one.name)) is not None:
            standard = scaling.against(one.name, trial.samples.variable(one.name).row_shape)
            shape = ((1, 1) if one.window else (1,)) + standard.mean.shape
            mean = standard.mean if standard.rest is None else standard.mean + standard.rest
            steps.append(Standardise(mean.reshape(shape), standard.std.reshape(shape)))
        if fills and (steps or values.is_floating_point()):
            steps.append(ZeroFill())
        inputs.append(steps[0] if len(steps) == 1 else nn.Sequential(*steps) if steps else nn.Identity())
    return ExportedModule(inner, inputs, _restorers(raw, model, trial))


def _restorers(raw: Any, model: Exportable, trial: Trial) -> list[nn.Module]:
    """Return a module for each output that restores its units; none where no output has the shape of its target."""
    targets = trial.targets if isinstance(trial.targets, tuple) else (trial.targets,)
    outputs = (raw,) if isinstance(raw, torch.Tensor) else tuple(raw) if isinstance(raw, tuple | list) else ()
    scalings = target_scalings(trial.samples, model.resolved.scalings)
    is_tuple = isinstance(raw, tuple | list)
    if len(outputs) != len(targets) or is_tuple != isinstance(trial.targets, tuple):
        return []
    found: list[nn.Module] = [
        Restore(*scaling) if scaling is not None and output.shape == target.shape else nn.Identity()
        for scaling, output, target in zip(scalings, outputs, targets, strict=True)
    ]
    return found if any(isinstance(one, Restore) for one in found) else []


def _blank(model: Exportable, trial: Trial) -> ExportedModule:
    """Return a module as the run's one, all of whose tensors are zero: what it gives then comes from a file."""
    with torch.no_grad():
        inner = model.build()
        module = _module(inner, inner(*trial.inputs), model, trial)
        for tensor in module.state_dict().values():
            tensor.zero_()
    return module


def _other_samples(model: Exportable, found: float) -> UnsuitableModel:
    cure = "Its outputs may be drawn at random also in eval mode, or depend on other samples of the batch."
    if model.job.config.data.transform:
        cure = (
            f"data.transform = {plain(model.job.config.data.transform)} is not part of the model: leave samples of "
            'evaluations alone (batch.split != "train"), or do in the model what they need too.'
        )
    return UnsuitableModel(
        f"On decoded values the model gives other outputs than in the run: they differ by {found:.1e} of the largest "
        f"one; allowed are {DATA_TOLERANCE:.0e}.",
        cure,
    )


def _facts(model: Exportable, trial: Trial, module: ExportedModule, outputs: Any) -> Facts:
    config, trained = model.job.config, model.trained
    tensors = tensors_in(outputs)
    restored = [isinstance(one, Restore) for one in module.outputs] or [False] * len(tensors)
    about = {
        "run": trained.name,
        "round": trained.round,
        "ema": trained.is_average,
        "params_sha256": trained.params_sha256,
        "versions": dict(trained.versions),
        "plan": model.resolved.plan.fingerprint,
    }
    return Facts(
        model=config.model,
        model_args=config.model_args,
        inputs=inputs_of(trial.samples, trial.decoded, model.resolved),
        outputs=outputs_of(trial.samples, tensors, restored, model.resolved),
        standardised=frozenset(model.resolved.scalings),
        fills=config.data.fills_inputs,
        nbytes=sum(tensor.nbytes for tensor in module.state_dict().values()),
        about=about,
    )


def _data_rows(model: Exportable, trial: Trial) -> list[tuple[str, str]]:
    """Return what the model was trained on: stores, variables, and the samples of each split."""
    data = without_secrets(model.job.config).data
    plan, held_out = model.resolved.plan, model.resolved.held_out
    counts = {split: sum(count_samples(one, split).samples for one in plan.plans) for split in HELD}
    if held_out is not None:
        counts["val"] = count_samples(held_out, "all").samples
    held = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    rows = [*trial.samples.rows(), ("samples", f"train {sum(plan.sizes):,}, {held}")]
    rows += [("split", _split_words(data)), ("partition", f"{plan.replicas} replicas, {data.partition}")]
    for key in ("isel", "sel", "non_finite", "missing", "weight", "balance", "transform", "val_path"):
        if (value := getattr(data, key)) and value != getattr(type(data)(), key):
            rows.append((key, plain(value)))
    return rows


def _split_words(data: DataConfig) -> str:
    """Return what is held out, as ``data.split`` says."""
    split, words = data.split, []
    for name in HELD:
        if (held := split.ranges.get(name)) is not None:
            words.append(f"{name}: {held[0]} {_range_words(held[1])}")
        elif name == "val" and data.val_path:
            words.append("val: all of data.val_path")
        else:
            by = f", whole groups of {split.by}" if split.by else ", places in all rows" if split.patches else ""
            words.append(f"{name}: a share of {split.shares[name]:g}{by}")
    return "; ".join([*words, *([f"gap of {split.gap} rows"] if split.gap else [])])


def _range_words(held: LabelRange) -> str:
    if not isinstance(held, LabelSlice):
        return str(held)
    ends = [f"{word} {end}" for word, end in (("from", held.start), ("to", held.stop)) if end is not None]
    return " ".join(ends)


# The file -----------------------------------------------------------------------------------------------------


def _several(values: torch.Tensor) -> torch.Tensor:
    """Return at least two samples: torch.export takes an axis of length 1 for a constant."""
    return values if len(values) > 1 else values.repeat(2, *(1 for _ in values.shape[1:]))


def _compared(called: Callable[..., Any], module: ExportedModule, trial: Trial, to: str, tolerance: float) -> float:
    """Return the largest difference between the file and the module, for all samples and for one.

    Raises
    ------
    UnsuitableModel
        It is larger than it may be.
    """
    worst = 0.0
    with torch.no_grad():
        for count in (trial.size, 1):
            inputs = tuple(values[:count] for values in trial.decoded)
            found = difference(tensors_in(called(*inputs)), tensors_in(module(*inputs)))
            worst = max(worst, found)
    if worst > tolerance:
        raise UnsuitableModel(
            f"The {to} file gives other outputs than the run's model: they differ by {worst:.1e} of the largest one; "
            f"allowed are {tolerance:.0e}. Nothing was kept.",
            "Its outputs may be drawn at random also in eval mode, or branches of its code depend on values.",
        )
    return worst


def _checked(trial: Trial, own: float, compared: float) -> str:
    return (
        f"The file was loaded and called with {trial.size:,} real samples ({trial.split}). Its outputs differ from the "
        f"module's by {own:.1e} of the largest one; the module's on decoded values from the run's model on its data "
        f"path by {compared:.1e}."
    )


@contextmanager
def _format_errors(to: str) -> Iterator[None]:
    """Turn what a format's library raises into `UnsuitableModel`."""
    try:
        yield
    except (DtrainError, OSError):
        raise
    except Exception as error:  # of whatever kind
        raise UnsuitableModel(
            f"The model cannot be exported to {to}: {type(error).__name__}: {short_line(error)}",
            "The forward pass must not branch on values, nor fix the number of samples. --to safetensors keeps the "
            "parameters of every model.",
        ) from error


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """Give a directory beside the file, which is gone afterwards."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise DiskFull(
            f"{out} could not be written: {error.strerror or error}.", "Free some space, or choose another --out."
        ) from error


def _move(folder: Path, out: Path) -> None:
    """Move all files of a directory beside it, synced; the file itself comes last: where it is, all are."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == out.name):
        with path.open("rb") as written:
            os.fsync(written.fileno())
        path.rename(out.with_name(path.name))
