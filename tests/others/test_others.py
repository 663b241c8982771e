"""Stores that `anndata` and `ome-zarr` write, in an environment of their own, are trained on as they are."""

from __future__ import annotations

import subprocess
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import dtrain
from dtrain.data.plan.units import Box
from dtrain.data.read.presence import check_presence
from dtrain.data.read.units import UnitReader
from dtrain.errors import UnsuitableVariable
from dtrain_cli.main import run
from tests.training import trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore")]
HERE = Path(__file__).parent
TYPES = ("B cell", "T cell", "monocyte")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the two packages."""
    folder = tmp_path_factory.mktemp("others") / "venv"
    venv.create(folder, with_pip=True)
    own = folder / "bin" / "python"
    install = [own, "-m", "pip", "install", "-q", "-r", HERE / "requirements.txt"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the packages cannot be installed here: {done.stderr.strip()[-300:]}")
    return own


@pytest.fixture(scope="module")
def written(python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """The folder of the stores, and the values that they hold."""
    folder = tmp_path_factory.mktemp("written")
    subprocess.run([python, "-W", "ignore", HERE / "write.py", folder], check=True, capture_output=True, text=True)
    return folder, dict(np.load(folder / "truth.npz"))


def rows(samples: dtrain.Samples) -> dict[str, np.ndarray]:
    check_presence(samples)
    found = UnitReader(samples).read(Box(0, samples.num_samples))
    return {name: values for name, (_, values) in found.items()}


# AnnData ----------------------------------------------------------------------------------------------------


def linear() -> nn.Module:
    return nn.Linear(12, 3)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_cells(written: Any, tmp_path: Path, zarr_format: int) -> None:
    folder, truth = written
    path = folder / f"cells-v{zarr_format}.zarr"
    names = ["X", "layers/counts", "obsm/X_pca", "obs/n_counts", "obs/age", "obs/control"]
    samples = dtrain.open_samples(path, inputs=names, targets=["obs/cell_type"])
    found = rows(samples)
    for name, values in (("X", truth["x"]), ("layers/counts", truth["x"] * 2), ("obsm/X_pca", truth["x"][:, :3])):
        np.testing.assert_array_equal(found[name], values)
    np.testing.assert_array_equal(found["obs/cell_type"], truth["codes"])
    np.testing.assert_array_equal(found["obs/n_counts"], truth["n_counts"])
    assert found["obs/age"].tolist() == list(range(240))
    assert samples.variable("X").dims == ("cell", "gene")
    categories = samples.variable("obs/cell_type").categories
    assert categories is not None
    assert categories.names == TYPES
    samples = dtrain.open_samples(path, inputs=["X"], targets=["obs/cell_type"])
    table = {"loss": "cross_entropy", "metrics": ["accuracy"], "rounds": 4, "batch_size": 16}
    done = trained(linear, samples, tmp_path / "runs", table)
    assert done.rows[-1]["val_accuracy"] > 0.8


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_sparse_cells(written: Any, tmp_path: Path, zarr_format: int) -> None:
    folder, truth = written
    path = folder / f"sparse-v{zarr_format}.zarr"
    names = ["X", "layers/counts", "raw/X", "obsm/regions"]
    samples = dtrain.open_samples(path, inputs=names, targets=["obs/cell_type"])
    found = rows(samples)
    for name, values in (("X", truth["thin"]), ("layers/counts", truth["x"] * 2), ("raw/X", truth["thin"])):
        np.testing.assert_array_equal(found[name], values)
    np.testing.assert_array_equal(found["obsm/regions"], truth["thin"][:, :4])
    samples = dtrain.open_samples(path, inputs=["X"], targets=["obs/cell_type"], normalize={"X": ["gene"]})
    table = {"loss": "cross_entropy", "metrics": ["accuracy"], "rounds": 4, "batch_size": 16}
    assert trained(linear, samples, tmp_path / "runs", table).rows[-1]["val_accuracy"] > 0.8


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_what_is_refused_by_name(written: Any, zarr_format: int) -> None:
    path = written[0] / f"sparse-v{zarr_format}.zarr"
    with pytest.raises(UnsuitableVariable, match=r"layers/columns is stored gene by gene \(CSC\)"):
        dtrain.open_samples(path, inputs=["layers/columns"], targets=["obs/cell_type"])
    with pytest.raises(UnsuitableVariable, match="obs/visits is a column of nullable-integer values"):
        dtrain.open_samples(path, inputs=["obs/visits"], targets=["obs/cell_type"])


def test_archives_of_old_versions(python: Path, tmp_path: Path) -> None:
    """The source package of anndata holds stores that its version 0.7 wrote."""
    (pin,) = [line for line in (HERE / "requirements.txt").read_text().splitlines() if line.startswith("anndata")]
    download = [python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "anndata", pin, "-d", tmp_path]
    done = subprocess.run(download, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the source package cannot be downloaded here: {done.stderr.strip()[-300:]}")
    (package,) = tmp_path.glob("anndata-*.tar.gz")
    with tarfile.open(package) as archive:
        archive.extractall(tmp_path, [m for m in archive if m.name.endswith(".zarr.zip")], filter="data")
    archives = sorted(tmp_path.rglob("v0.7*/*.zarr.zip"))
    assert len(archives) == 2
    for file in archives:
        check_archive(python, file)


def check_archive(python: Path, file: Path) -> None:
    """Compare what dtrain reads of an archive with what `anndata` reads."""
    folder = file.with_suffix("")
    zipfile.ZipFile(file).extractall(folder)
    subprocess.run([python, "-W", "ignore", HERE / "read.py", folder, file.with_suffix(".npz")], check=True)
    truth = np.load(file.with_suffix(".npz"))
    names = {"X": "x", "layers/array": "layer", "obsm/array": "obsm", "obs/int64": "int64", "obsm/df/cat": "nested"}
    for path in (folder, file):
        samples = dtrain.open_samples(path, inputs=list(names), targets=["obs/obs_cat"])
        found = rows(samples)
        for name, key in {**names, "obs/obs_cat": "codes"}.items():
            np.testing.assert_array_equal(found[name], truth[key].astype(found[name].dtype))
    categories = samples.variable("obs/obs_cat").categories
    assert categories is not None
    assert list(categories.names) == truth["names"].tolist()


@pytest.mark.parametrize("name", ["cells-v2", "cells-v3", "sparse-v2", "sparse-v3", "image-0.4", "image-0.5"])
def test_init_writes_a_configuration_that_is_planned_and_trained(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["init", "job", "--data", str(written[0] / f"{name}.zarr")]) == 0
    tables = tomllib.loads(Path("job/dtrain.toml").read_text())
    target = "labels/nuclei/s0" if name.startswith("image") else "obs/cell_type"
    assert tables["data"]["targets"] == [target]
    assert run(["plan", "job/dtrain.toml", "--scheduler", "serial"]) == 0
    assert run(["train", "job/dtrain.toml", "--scheduler", "serial", "--set", "train.rounds=1"]) == 0


# OME-Zarr ---------------------------------------------------------------------------------------------------


def segment() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("label", ["labels/nuclei/s0", "labels/channel/s0"])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_nuclei(written: Any, tmp_path: Path, version: str, label: str) -> None:
    folder, truth = written
    path = folder / f"image-{version}.zarr"
    samples = dtrain.open_samples(path, inputs=["s0"], targets=[label], normalize={"s0": ["c"]})
    found = rows(samples)
    np.testing.assert_array_equal(found["s0"], truth["image"])
    np.testing.assert_array_equal(found[label], truth["mask"])
    half = dtrain.open_samples(path, inputs=["s1"], targets=[label[:-1] + "1"], normalize={"s1": ["c"]})
    assert [v.row_shape for v in half.variables] == [(2, 16, 16), (16, 16)]
    table = {"loss": "cross_entropy", "metrics": ["accuracy"], "rounds": 4, "batch_size": 4}
    table["optimizer_args"] = {"lr": 0.2, "momentum": 0.9}
    done = trained(segment, samples, tmp_path / "runs", table)
    assert done.rows[-1]["val_accuracy"] > 0.9
