"""A new format to export a model to is one module: nothing else changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import dtrain
from dtrain.errors import InvalidConfig
from dtrain.exporting import formats
from dtrain.exporting.export import format_names
from dtrain_cli.commands.export import _formats
from tests.training import trained

NPZ = '''
"""npz: the tensors as arrays of NumPy."""

import numpy as np
import torch

PACKAGES = ("numpy",)
EXTRA = ""
SUFFIX = ".npz"
TOLERANCE = 0.0


def write(module, inputs, facts, path):
    np.savez(path, **{name: tensor.numpy() for name, tensor in module.state_dict().items()})


def load(path, facts, fresh):
    module, arrays = fresh(), np.load(path)
    module.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays})
    return module


def usage(facts, file):
    return f'import numpy as np\\narrays = np.load("{file}")'
'''


@pytest.fixture
def more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/npz.py").write_text(NPZ)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "more")])
    yield tmp_path / "more"
    sys.modules.pop("dtrain.exporting.formats.npz", None)


def build() -> nn.Module:
    return nn.Linear(6, 3)


def test_it_is_written_loaded_compared_and_completed(more: Path, samples: dtrain.Samples, tmp_path: Path) -> None:
    run = trained(build, samples, tmp_path / "runs", {"loss": "cross_entropy", "rounds": 1, "batch_size": 40})
    file = run.export("npz", tmp_path / "m.npz")
    assert file.difference == 0.0
    assert set(np.load(file.path)) == {"model.weight", "model.bias"}
    assert 'arrays = np.load("m.npz")' in file.card.read_text()
    assert format_names() == _formats("") == ["npz", "onnx", "pt2", "safetensors"]


def test_its_package_is_looked_for(more: Path, samples: dtrain.Samples, tmp_path: Path) -> None:
    (more / "npz.py").write_text(
        NPZ.replace('("numpy",)', '("no_such_package",)').replace('EXTRA = ""', 'EXTRA = "npz"')
    )
    run = trained(build, samples, tmp_path / "runs", {"loss": "cross_entropy", "rounds": 1, "batch_size": 40})
    with pytest.raises(InvalidConfig, match="--to npz needs no_such_package, which is not installed") as caught:
        run.export("npz", tmp_path / "m.npz")
    assert caught.value.hint == 'pip install "dtrain[npz]"'
