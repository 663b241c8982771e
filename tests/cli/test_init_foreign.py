"""dtrain init --data on files as other packages write them: `plan` and `train` accept what is written for them."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pytest
import zarr
from scipy import sparse

from dtrain_cli.inspect_store import read_contents
from dtrain_cli.survey.microscopy import _side
from tests.cli.helpers import last, tree
from tests.data.layouts.fixtures import (
    CODES,
    COUNT,
    FORMATS,
    NAMES,
    encoding,
    frame,
    strings,
    write,
    write_anndata,
    write_categorical,
    write_ome,
    write_sparse,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # zarr's own, of strings that version 3 does not specify
RNG = np.random.default_rng(0)
STORE = Path("s.zarr")


def picture(*shape: int) -> np.ndarray:
    return RNG.integers(0, 900, shape).astype("uint16")


def objects(*shape: int, count: int = 8) -> np.ndarray:
    return RNG.integers(0, count + 1, shape).astype("uint8")


def written_for(cli: Any, *more: str, path: Any = STORE) -> dict[str, Any]:
    shutil.rmtree("job", ignore_errors=True)
    outcome = cli("init", "job", "--data", path, *more)
    assert outcome.code == 0, outcome.err
    return tomllib.loads(Path("job/dtrain.toml").read_text(encoding="utf-8"))


def accepted(cli: Any) -> None:
    for command in (["plan"], ["train", "--set", "train.rounds=1"]):
        outcome = cli("-q", command[0], "job/dtrain.toml", "--scheduler", "serial", *command[1:])
        assert outcome.code == 0, outcome.err


def refused(cli: Any, *words: str, more: tuple[str, ...] = ()) -> None:
    before = tree(Path.cwd())
    outcome = cli("--json", "init", "job", "--data", STORE, *more)
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") <= 4
    for word in words:
        assert word in last(outcome)["message"] + last(outcome)["hint"]
    assert tree(Path.cwd()) == before


# OME-Zarr ---------------------------------------------------------------------------------------------------

LABELS = {
    "time points": ("tcyx", (6, 2, 64, 64), "tyx", (6, 64, 64), "t", {"y": 16, "x": 16}),
    "thin volume": ("tczyx", (1, 2, 4, 64, 64), "tczyx", (1, 1, 4, 64, 64), "t", {"z": 1, "y": 16, "x": 16}),
    "planes": ("czyx", (2, 10, 96, 96), "zyx", (10, 96, 96), "z", {"y": 24, "x": 24}),
    "one plane": ("cyx", (2, 128, 128), "yx", (128, 128), "y", {"x": 16}),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("kind", LABELS)
def test_a_label_image_is_foreground_and_background(cli: Any, kind: str, version: str) -> None:
    axes, shape, own_axes, own_shape, along, patch = LABELS[kind]
    write_ome(STORE, picture(*shape), axes, version=version, labels={"nuclei": (objects(*own_shape), own_axes)})
    written = written_for(cli)
    data = written["data"]
    assert (data["inputs"], data["targets"]) == (["0"], ["labels/nuclei/0"])
    assert data["transform"] == "model:foreground"
    assert data["patch"] == patch
    assert data.get("sample_dim", along) == along
    assert data["normalize"] == {"0": ["c"]}
    assert data.get("split", {}).get("patches", False) == (kind != "one plane")
    assert written["model_args"]["classes"] == 2
    text = Path("job/dtrain.toml").read_text()
    assert "number objects, and are no classes" in " ".join(text.replace("# ", "").split())
    assert "\n# classes = 9\n" in text
    accepted(cli)


def test_a_volume_of_whole_chunks_is_cut_into_volumes(cli: Any) -> None:
    root = zarr.open_group(STORE, mode="w")
    axes = [{"name": name, "type": "space" if name in "zyx" else "other"} for name in "tczyx"]
    root.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
    options = {"chunks": (1, 1, 16, 32, 32), "dimension_names": list("tczyx")}
    root.create_array("0", data=picture(1, 1, 32, 64, 64), **options)
    written = written_for(cli)
    assert written["data"]["patch"] == {"z": 16, "y": 16, "x": 16}
    assert written["data"]["split"] == {"patches": True, "val": 0.1, "test": 0.1}
    assert written["model_args"]["space"] == ["z", "y", "x"]
    assert written["data"]["transform"] == "model:noisy"
    accepted(cli)


def test_labels_whose_name_says_so_are_classes(cli: Any) -> None:
    labels = {"tissue": (objects(6, 64, 64, count=3), "tyx"), "nuclei": (objects(6, 64, 64), "tyx")}
    write_ome(STORE, picture(6, 2, 64, 64), "tcyx", labels=labels)
    written = written_for(cli)
    assert written["model_args"]["classes"] == 4
    assert "transform" not in written["data"]
    assert "others: labels/nuclei/0" in Path("job/dtrain.toml").read_text()
    accepted(cli)


@pytest.mark.parametrize(
    ("axes", "shape", "target_offsets", "transform"),
    [("tcyx", (40, 1, 32, 32), 1, None), ("cyx", (3, 128, 96), {"start": 0, "stop": 16}, "model:noisy")],
)
def test_without_labels_the_next_time_point_or_noise(
    cli: Any, axes: str, shape: tuple[int, ...], target_offsets: Any, transform: str | None
) -> None:
    write_ome(STORE, picture(*shape), axes)
    written = written_for(cli)
    assert written["data"]["targets"] == ["0"]
    assert written["data"]["target_offsets"] == target_offsets
    assert written["data"].get("transform") == transform
    assert "No label image was found" in Path("job/dtrain.toml").read_text()
    accepted(cli)


def test_of_a_plate_the_first_image_is_read_and_named(cli: Any) -> None:
    labels = {"nuclei": (objects(6, 64, 64), "tyx")}
    write_ome(STORE, picture(6, 2, 64, 64), "tcyx", group="B/2/0", labels=labels)
    root = zarr.open_group(STORE, mode="r+")
    plate = {"wells": [{"path": "B/2"}, {"path": "B/3"}]}
    root.attrs["ome"] = {"version": "0.5", "plate": plate}
    root["B/2"].attrs["ome"] = {"version": "0.5", "well": {"images": [{"path": "0"}, {"path": "1"}]}}
    outcome = cli("init", "job", "--data", STORE)
    assert outcome.code == 0, outcome.err
    assert "Of 3 images, B/2/0 is read." in " ".join(outcome.err.split())
    text = Path("job/dtrain.toml").read_text()
    assert tomllib.loads(text)["data"]["group"] == "B/2/0"
    assert "B/2/1, B/3" in text
    accepted(cli)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("marked", [False, True])
def test_of_several_images_the_first_is_read_and_the_others_are_listed(cli: Any, version: str, marked: bool) -> None:
    for name in ("1", "0"):
        write_ome(Path(f"{name}.zarr"), picture(6, 1, 32, 32), "tcyx", version=version)
    zarr.open_group(STORE, mode="w", zarr_format=2 if version == "0.4" else 3)
    for name in ("1", "0"):
        shutil.copytree(f"{name}.zarr", STORE / name)
    if marked:
        layout = {"bioformats2raw.layout": 3}
        zarr.open_group(STORE, mode="r+").attrs.update({"ome": {"version": "0.5", **layout}} if marked else layout)
    written = written_for(cli)
    assert written["data"]["group"] == "0"
    assert "the others: 1" in Path("job/dtrain.toml").read_text()
    accepted(cli)


def test_labels_of_another_resolution_are_left_out(cli: Any) -> None:
    write_ome(STORE, picture(6, 2, 64, 64), "tcyx", labels={"small": (objects(6, 32, 32), "tyx")})
    outcome = cli("init", "job", "--data", STORE)
    assert "labels/small (another resolution than the image)" in " ".join(outcome.err.split())


def test_an_image_that_names_no_array_is_refused(cli: Any) -> None:
    zarr.open_group(STORE, mode="w").attrs["multiscales"] = [{}]
    refused(cli, "OME-Zarr whose attributes name no image", 'inputs = ["0"]')


def test_templates_that_an_image_or_cells_do_not_have(cli: Any) -> None:
    write_ome(STORE, picture(6, 2, 64, 64), "tcyx")
    refused(cli, "--template text needs", more=("--template", "text"))
    assert written_for(cli, "--template", "image")["data"]["inputs"] == ["0"]
    shutil.rmtree("job")
    write_anndata(STORE)
    refused(cli, "--template image needs", more=("--template", "image"))
    assert written_for(cli, "--template", "tabular")["data"]["inputs"] == ["X"]


def test_sides_of_patches_divide_chunks() -> None:
    assert [_side(1000, 256, 64), _side(1000, 100, 64), _side(275, 275, 64), _side(40, 40, 64)] == [64, 50, 55, 40]
    assert _side(999, 97, 64) == 64  # a prime: no part of a chunk fits


# AnnData ----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("group", ["", "rna"])
def test_cells_have_types(cli: Any, how: str, group: str) -> None:
    write_anndata(STORE, how, group=group, codes=np.where(np.arange(COUNT) % 9 == 0, -1, CODES).astype("int8"))
    written = written_for(cli)
    data = {key: value for key, value in written["data"].items() if key in ("inputs", "targets", "group", "transform")}
    assert data == {"inputs": ["X"], "targets": ["obs/cell_type"]} | ({"group": group} if group else {})
    assert written["model_args"] == {"features": 6, "outputs": [3], "counts": False}
    assert written["train"]["loss"] == "cross_entropy"
    accepted(cli)


def counted(path: Path, zarr_format: int = 3, kind: str = "csr_matrix") -> Path:
    """Write 200 cells of 40 genes as sparse counts, with a type and a donor."""
    counts = sparse.random(200, 40, 0.3, random_state=1, data_rvs=lambda n: np.arange(n) % 50 + 1.0)
    root = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    root.attrs.update(encoding("anndata", "0.1.0"))
    write_sparse(root, "X", counts.asformat(kind[:3]).astype("float32"), kind)
    obs = frame(root, "obs", 200, ["donor_id", "phase", "leiden", "n_counts"])
    write_categorical(obs, "donor_id", (np.arange(200) // 20).astype("int8"), [f"d{i}" for i in range(10)])
    write_categorical(obs, "phase", (np.arange(200) % 3).astype("int8"), NAMES)
    write_categorical(obs, "leiden", (np.arange(200) % 5).astype("int8"), list("abcde"))
    write(obs, "n_counts", np.asarray(counts.sum(1)).ravel(), (100,))
    return path


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_sparse_counts(cli: Any, zarr_format: int) -> None:
    counted(STORE, zarr_format)
    written = written_for(cli)
    assert written["data"]["targets"] == ["obs/leiden"]  # donors are no types, and clusters are likelier than phases
    assert written["model_args"] == {"features": 40, "outputs": [5], "counts": True}
    assert "normalize" not in written["data"]
    text = Path("job/dtrain.toml").read_text()
    assert "obs/donor_id (10), obs/phase (3)" in " ".join(text.replace("# ", "").split())
    assert '\n# balance = "obs/leiden"\n' in text
    line = '# split = { by = "obs/donor_id", val = 0.1, test = 0.1 }'
    assert f"\n{line}\n" in text
    accepted(cli)
    shutil.rmtree("job/runs")
    Path("job/dtrain.toml").write_text(text.replace(line, line.removeprefix("# ")))
    accepted(cli)


@pytest.mark.parametrize("part", ["data", "indices"])
def test_a_lost_chunk_of_a_sparse_matrix_is_named_and_never_filled(cli: Any, part: str) -> None:
    (counted(STORE) / f"X/{part}/c/2").unlink()
    outcome = cli("init", "job", "--data", STORE)
    assert outcome.code == 0, outcome.err
    assert f"warning: chunk X/{part}/c/2 of X/{part} is missing" in " ".join(outcome.err.split())
    assert "missing" not in tomllib.loads(Path("job/dtrain.toml").read_text())["data"]
    assert cli("train", "job/dtrain.toml", "--scheduler", "serial", "--set", "train.rounds=1").code == 5


def test_without_a_categorical_a_number_and_counts_of_layers_if_x_is_csc(cli: Any) -> None:
    root = zarr.open_group(counted(STORE, kind="csc_matrix"), mode="r+")
    refused(cli, "X (CSC, gene by gene)", "tocsr()")
    write(root, "layers/counts", RNG.poisson(2, (200, 40)).astype("float32"), (50, 40))
    for name in ("donor_id", "phase", "leiden"):
        del root[f"obs/{name}"]
    write(root["obs"], "age", np.arange(200.0), (100,))
    root["obs"].attrs["column-order"] = ["n_counts", "age"]
    written = written_for(cli)
    assert (written["data"]["inputs"], written["data"]["targets"]) == (["layers/counts"], ["obs/age"])
    assert written["model_args"] == {"features": 40, "outputs": [], "counts": True}
    accepted(cli)


def test_cells_without_a_column_to_predict_are_refused_with_what_to_write(cli: Any) -> None:
    root = zarr.open_group(STORE, mode="w")
    root.attrs.update(encoding("anndata", "0.1.0"))
    write(root, "X", RNG.normal(size=(30, 4)), (8, 4))
    obs = frame(root, "obs", 30, ["cell_type"])
    refused(cli, "without a column of obs to predict")
    write(obs, "cell_type", strings(["a", "b"] * 15), (30,))
    refused(cli, "obs/cell_type (strings)", 'astype("category")')


def test_several_objects_are_named(cli: Any) -> None:
    zarr.open_group(STORE, mode="w")
    for name in ("rna", "atac"):
        write_anndata(Path(f"{name}.zarr"))
        shutil.copytree(f"{name}.zarr", STORE / name)
    refused(cli, "several AnnData objects: atac, rna", "--data s.zarr/atac")


# Kinds of stores --------------------------------------------------------------------------------------------


def as_zip(store: Path) -> Path:
    shutil.make_archive(str(store), "zip", store)
    return Path(f"{store}.zip")


def as_references(store: Path) -> Path:
    files = sorted(path for path in store.rglob("*") if path.is_file())
    keys = {str(path.relative_to(store)): path for path in files}
    metadata = ("zarr.json", ".zgroup", ".zarray", ".zattrs", ".zmetadata")
    refs = {k: path.read_text() if path.name in metadata else [str(path.absolute())] for k, path in keys.items()}
    Path("refs.json").write_text(json.dumps({"version": 1, "refs": refs}))
    return Path("refs.json")


def as_repository(store: Path) -> Path:
    path = Path("s.icechunk").absolute()
    options = {"spec_version": 1} if not icechunk.__version__.startswith("1.") else {}
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(path)), **options)
    session = repository.writable_session("main")
    source, target = zarr.open_group(store, mode="r"), zarr.open_group(session.store, mode="a")
    target.attrs.update(source.attrs.asdict())
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, node in source.members(max_depth=None):
            if isinstance(node, zarr.Array):
                names = {"dimension_names": node.metadata.dimension_names}
                array = target.create_array(name, shape=node.shape, dtype=node.dtype, chunks=node.chunks, **names)
                array[...] = node[...]
                array.attrs.update(node.attrs.asdict())
            else:
                target.require_group(name).attrs.update(node.attrs.asdict())
    session.commit("all")
    return path


def an_image(path: Path) -> None:
    write_ome(path, picture(6, 2, 64, 64), "tcyx", labels={"nuclei": (objects(6, 64, 64), "tyx")})


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [as_zip, as_references, as_repository])
@pytest.mark.parametrize("make", [an_image, write_anndata, counted])
def test_archives_references_and_repositories(cli: Any, make: Callable[..., Any], kind: Callable[..., Path]) -> None:
    make(STORE)
    usual = written_for(cli)
    written = written_for(cli, path=kind(STORE))
    usual["data"]["path"] = written["data"]["path"]
    assert written == usual
    accepted(cli)


def test_contents_say_where_values_lie() -> None:
    contents = read_contents(str(counted(STORE)))
    assert contents.layout == "AnnData"
    matrix, column = contents.arrays["X"], contents.arrays["obs/leiden"]
    assert (matrix.at, matrix.shape, matrix.dims) == ("X/data", (200, 40), ("cell", "gene"))
    assert (column.at, column.categories) == ("obs/leiden/codes", 5)
