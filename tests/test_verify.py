"""Whether a store is intact: every stored object is read, decoded, and compared with a manifest."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from dtrain.config.schema import TrainConfig
from dtrain.data.read import pieces as read_pieces
from dtrain.data.read import whole
from dtrain.errors import (
    DataNotFound,
    DiskFull,
    DtrainError,
    ManifestConflict,
    ManifestDamaged,
    NotZarr,
    OutputExists,
    StoreForbidden,
    StoreUnavailable,
    UsageError,
)
from dtrain.runfiles import sealed
from dtrain.verify import manifest as manifests
from dtrain.verify.store import verify_store
from dtrain.verify.threads import in_threads
from tests.data.read.helpers import KINDS
from tests.data.read.test_icechunk import commit, create
from tests.data.read.test_kerchunk import references_to, write_json
from tests.data.read.test_zip import pack
from tests.data.servers import FileServer

ROWS = 18
SHARDED = [kind for kind in KINDS if kind.startswith(("sharded", "index"))]
CHECKED = [kind for kind in KINDS if any(word in kind for word in ("checksum", "gzip", "zlib", "crc32c"))]


def verified(path: Path | str, manifest: Path | None = None, **data: Any) -> SimpleNamespace:
    """What `verify_store` returns, with the faults as (what, key)."""
    found: list[Any] = []
    summary = verify_store(str(path), TrainConfig(data=data).data, manifest, report=found.append)
    assert sum(summary.faults.values()) == len(found)
    return SimpleNamespace(summary=summary, faults=[(f.what, f.key) for f in found], lines=[str(f) for f in found])


@pytest.fixture
def write(write_store: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that writes v0(n, k) of 18 x 4 floats, no two of whose chunks are equal, and index(n)."""

    def make(kind: str = "v3 zstd", values: Any = None, name: str = "a.zarr", **options: Any) -> Path:
        zarr_format, of = KINDS[kind]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            of = {key: value() if callable(value) else value for key, value in of.items()}
        values = np.arange(ROWS * 4, dtype="float32").reshape(ROWS, 4) if values is None else values
        v0 = {"dims": ("n", "k"), "values": values, "chunks": (3, 2), "fill_value": 0, **of, **options}
        index = {"dims": ("n",), "values": np.arange(ROWS), "chunks": (6,), "fill_value": 0}
        return write_store(tmp_path / name, {"v0": v0, "index": index}, zarr_format=zarr_format)

    return make


def keys_of(kind: str) -> list[str]:
    """The first and the last stored object of v0."""
    if kind.startswith("v2"):
        return ["v0/0.0", "v0/5.1"]
    return ["v0/c/0/0", "v0/c/2/0"] if kind in SHARDED else ["v0/c/0/0", "v0/c/5/1"]


def swap(store: Path, one: str, other: str) -> None:
    """Exchange two stored objects."""
    contents = (store / one).read_bytes(), (store / other).read_bytes()
    assert contents[0] != contents[1]
    (store / other).write_bytes(contents[0])
    (store / one).write_bytes(contents[1])


def edit_index(kind: str, shard: bytes, change: Callable[[list[tuple[int, int]]], None]) -> bytes:
    """Change the entries of a shard of 2 x 2 chunks, with a true checksum."""
    at = slice(0, 68) if kind.startswith("index first") else slice(len(shard) - 68, len(shard))
    numbers = struct.unpack("<8Q", shard[at][:64])
    entries = list(zip(numbers[::2], numbers[1::2], strict=True))
    change(entries)
    index = struct.pack("<8Q", *(number for entry in entries for number in entry))
    index += google_crc32c.value(index).to_bytes(4, "little")
    return shard[: at.start] + index + shard[at.stop :]


# Two chunks swapped -------------------------------------------------------------------------------------------------


@pytest.mark.sampled(9)
@pytest.mark.parametrize("kind", KINDS)
def test_two_swapped_objects_are_silent_and_show_against_a_manifest(write, tmp_path, kind):
    store, file = write(kind), tmp_path / "m.json"
    assert verified(store, file).summary.manifest == "written"
    swap(store, *keys_of(kind))
    silent = verified(store)
    assert (silent.faults, silent.summary.manifest) == ([], "")
    found = verified(store, file)
    assert sorted(found.faults) == [("modified", key) for key in sorted(keys_of(kind))]
    assert found.summary.manifest == "differs"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", SHARDED)
def test_two_swapped_chunks_of_a_shard_are_silent_and_show_against_a_manifest(write, tmp_path, kind):
    store, file, key = write(kind), tmp_path / "m.json", keys_of(kind)[0]
    verified(store, file)

    def exchange(entries: list[tuple[int, int]]) -> None:
        entries[0], entries[3] = entries[3], entries[0]

    (store / key).write_bytes(edit_index(kind, (store / key).read_bytes(), exchange))
    assert verified(store).faults == []
    assert verified(store, file).faults == [("modified", key)]


# Intact -------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(9)
@pytest.mark.parametrize("kind", KINDS)
def test_an_intact_store_has_no_fault_and_every_byte_is_counted(write, tmp_path, kind):
    store, file = write(kind), tmp_path / "m.json"
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    for state in ("written", "the same"):
        summary = verified(store, file).summary
        assert (summary.faults, summary.manifest, summary.notes) == ({}, state, ())
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    objects = 3 if kind in SHARDED else 12
    assert summary.objects == objects + 3
    assert summary.nbytes == sum(map(len, before.values()))
    chunks = {one.name: (one.chunks, one.absent, one.checksums) for one in summary.arrays}
    assert chunks["v0"] == (12, 0, kind in CHECKED)
    content = json.loads(file.read_text())
    assert len(content["arrays"]["v0"]["objects"]) == objects
    assert sorted(content["documents"]) == sorted(str(p.relative_to(store)) for p in before if "z" in p.name)


ODD = {
    "big-endian": {"dtype": ">f4"},
    "bools": {"dtype": "bool"},
    "halves": {"dtype": "float16"},
    "complex": {"dtype": "complex64"},
    "dates": {"dtype": "datetime64[s]"},
    "fixed texts": {"dtype": "U4"},
    "integers": {"dtype": "uint64"},
}


@pytest.mark.parametrize(("zarr_format", "shards"), [(2, None), (3, None), (3, (6, 4))])
@pytest.mark.parametrize("name", ODD)
def test_other_dtypes_are_decoded_too(write_store, tmp_path, name, zarr_format, shards):
    values = np.arange(72).reshape(ROWS, 4).astype(ODD[name]["dtype"])
    v0 = {"dims": ("n", "k"), "values": values, "chunks": (3, 2), **({"shards": shards} if shards else {})}
    store = write_store(tmp_path / "a.zarr", {"v0": v0}, zarr_format=zarr_format)
    assert verified(store).summary.faults == {}
    key = "v0/0.0" if zarr_format == 2 else "v0/c/0/0"
    (store / key).write_bytes((store / key).read_bytes()[:-2])
    assert verified(store).faults == [("damaged", key)]


def test_texts_of_any_length_and_arrays_without_dimensions(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.create_group(tmp_path / "a.zarr")
        texts = group.create_array("deep/er/texts", shape=(3,), chunks=(2,), dtype=str)
        texts[:] = np.array(["a", "bb" * 100, "c"], dtype=object)
        group.create_array("one", shape=(), dtype="f8")[...] = 3.0
        group.create_array("none", shape=(0, 4), chunks=(2, 2), dtype="f8")
    summary = verified(tmp_path / "a.zarr").summary
    assert summary.faults == {}
    assert {one.name: one.chunks for one in summary.arrays} == {"deep/er/texts": 2, "one": 1, "none": 0}
    assert summary.groups == 3
    (tmp_path / "a.zarr/deep/er/texts/c/0").write_bytes(b"\xff\xff\xff\xff")
    assert verified(tmp_path / "a.zarr").faults == [("damaged", "deep/er/texts/c/0")]


# Damaged ------------------------------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "last byte lost": lambda stored: stored[:-1],
    "half lost": lambda stored: stored[: len(stored) // 2],
    "empty": lambda stored: b"",
    "first bytes only": lambda stored: stored[:3],
    "garbage": lambda stored: np.random.default_rng(3).bytes(len(stored) // 2 + 5),
}


@pytest.mark.sampled(9)
@pytest.mark.parametrize("kind", KINDS)
def test_every_damaged_object_is_named(write, kind):
    store = write(kind)
    for damage in DAMAGE.values():
        stored = {key: (store / key).read_bytes() for key in keys_of(kind)}
        for key, content in stored.items():
            (store / key).write_bytes(damage(content))
        found = verified(store)
        assert set(found.faults) == {("damaged", key) for key in keys_of(kind)}  # of a shard perhaps several chunks
        for key, content in stored.items():
            (store / key).write_bytes(content)
    assert verified(store).faults == []


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", CHECKED)
def test_a_flipped_bit_fails_the_checksum(write, kind):
    values = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
    store, key = write(kind, values), keys_of(kind)[0]
    stored = bytearray((store / key).read_bytes())
    stored[len(stored) // 2 if kind not in SHARDED else 20] ^= 1
    (store / key).write_bytes(stored)
    assert verified(store).faults == [("damaged", key)]


def test_a_flipped_bit_without_a_checksum_shows_against_a_manifest_alone(write, tmp_path):
    store, file = write("v3 none"), tmp_path / "m.json"
    verified(store, file)
    stored = bytearray((store / "v0/c/1/0").read_bytes())
    stored[5] ^= 1
    (store / "v0/c/1/0").write_bytes(stored)
    found = verified(store)
    assert found.faults == []
    assert [one.name for one in found.summary.arrays if not one.checksums] == ["index", "v0"]
    assert verified(store, file).lines == ["modified: v0/c/1/0: its bytes are not those of the manifest"]


@pytest.mark.parametrize("kind", ["sharded none", "index first zstd"])
def test_a_damaged_chunk_in_a_shard_is_named_by_its_place(write, kind, monkeypatch):
    store, key = write(kind), keys_of(kind)[1]
    intact = (store / key).read_bytes()

    def beyond(entries: list[tuple[int, int]]) -> None:
        entries[2] = (len(intact) + 100, 50)

    (store / key).write_bytes(edit_index(kind, intact, beyond))
    for limit in (whole.WHOLE_OBJECT_BYTES, 10):  # read whole, and chunk by chunk
        monkeypatch.setattr(whole, "WHOLE_OBJECT_BYTES", limit)
        found = verified(store)
        assert found.lines == [f"damaged: {key}: chunk (5, 0) in it: the file is truncated"]


# Large shards -------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", [*SHARDED, "transposed"])
def test_large_shards_are_read_chunk_by_chunk_to_the_same_digest(write, tmp_path, monkeypatch, kind):
    if kind == "transposed":
        store = write("v3 none", shards=(6, 4), filters=zarr.codecs.TransposeCodec(order=(1, 0)))
    else:
        store = write(kind)
    verified(store, tmp_path / "m.json")
    monkeypatch.setattr(whole, "WHOLE_OBJECT_BYTES", 10)
    monkeypatch.setattr(read_pieces, "BLOCK_BYTES", 7)
    assert verified(store, tmp_path / "m.json").summary.manifest == "the same"
    key = "v0/c/1/0"
    intact = (store / key).read_bytes()
    for damage in ("last byte lost", "half lost", "first bytes only"):
        (store / key).write_bytes(DAMAGE[damage](intact))
        found = verified(store, tmp_path / "m.json").faults
        assert ("damaged", key) in found
        assert ("modified", key) in found


def test_pieces_cover_a_shard_once_whatever_its_index_says():
    entries = [(0, 4, (0,)), (2, 4, (1,)), (6, 2, (2,)), (9, 5, (3,))]
    found = list(read_pieces.pieces(10, entries))
    new = sorted((start, stop) for start, stop, is_new, _ in found if is_new)
    assert [start for start, _ in new] == [0, *(stop for _, stop in new[:-1])]
    assert new[-1][1] == 10
    assert {place for *_, place in found if place} == {(0,), (1,), (2,), (3,)}


# Chunks that are not stored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "fill_value", "attributes", "said", "faults"),
    [
        ("float32", 0.0, {}, "0", True),
        ("float32", float("nan"), {}, "nan", False),
        ("int16", 0, {"scale_factor": 0.5, "add_offset": 10.0}, "10", True),
        ("int16", 0, {}, "0", False),
        ("uint8", 7, {}, "7", False),
        ("bool", False, {}, "False", False),
        ("datetime64[s]", 0, {}, "np.datetime64('1970-01-01T00:00:00')", False),
    ],
)
@pytest.mark.parametrize("shards", [None, (8, 2)])
def test_absent_chunks_are_judged_as_training_judges_them(
    tmp_path, dtype, fill_value, attributes, said, faults, shards
):
    group = zarr.create_group(tmp_path / "a.zarr")
    options = {"shape": (16, 4), "chunks": (4, 2), "dtype": dtype, "fill_value": fill_value, "shards": shards}
    array = group.create_array("v0", attributes=attributes, **options)
    array[:4, :2] = np.ones((4, 2)).astype(dtype) if dtype != "float32" else 1.5
    found = verified(tmp_path / "a.zarr")
    (one,) = found.summary.arrays
    assert (one.chunks, one.absent, one.reads_as) == (8, 7, said)
    assert {what for what, _ in found.faults} == ({"missing"} if faults else set())
    if faults:
        assert len(found.faults) == (7 if shards is None else 4)  # 3 shards, and the chunk of one that is there
        assert f"Zarr reads it as {said}" in found.lines[0]
    assert verified(tmp_path / "a.zarr", missing="fill").faults == []
    assert verified(tmp_path / "a.zarr", missing="skip").faults == []
    assert len(verified(tmp_path / "a.zarr", missing="error").faults) == (7 if shards is None else 4)


def test_a_removed_chunk_is_missing_and_one_that_never_was_there_is_not(write, tmp_path):
    store, file = write(), tmp_path / "m.json"
    (store / "v0/c/0/0").unlink()
    assert verified(store).faults == [("missing", "v0/c/0/0")]
    verified(store, file, missing="fill")
    assert verified(store, file).faults == []  # the manifest says that it was not there
    (store / "v0/c/3/1").unlink()
    (store / "index/c/1").unlink()
    found = verified(store, file)
    assert sorted(found.faults) == [("missing", "index/c/1"), ("missing", "v0/c/3/1")]


# Metadata -----------------------------------------------------------------------------------------------------------

CONTENTS = {
    "a number": b"3",
    "null": b"null",
    "nothing": b"",
    "no JSON": b"{",
    "nesting": b"[" * 10_000 + b"]" * 10_000,
    "nested objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "no text": bytes(range(256)),
    "an empty object": b"{}",
    "half": None,
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["v0/zarr.json", "sub/zarr.json"])
def test_damaged_metadata_of_one_node_are_named_and_the_others_are_verified(write, content, name):
    store = write()
    zarr.open_group(store, mode="a").create_group("sub/deep")
    document = store / name
    intact = document.read_bytes()
    document.write_bytes(intact[: len(intact) // 2] if CONTENTS[content] is None else CONTENTS[content])
    found = verified(store)
    assert [what for what, _ in found.faults] == ["damaged"]
    assert found.faults[0][1] == name
    assert "index" in [one.name for one in found.summary.arrays]


@pytest.mark.parametrize("content", CONTENTS)
def test_damaged_metadata_of_the_root_are_refused(write, content):
    store = write()
    intact = (store / "zarr.json").read_bytes()
    (store / "zarr.json").write_bytes(intact[:20] if CONTENTS[content] is None else CONTENTS[content])
    try:
        found = verified(store)
    except DtrainError as error:
        assert error.code == 5  # noqa: PT017
    else:
        assert found.faults[0] == ("damaged", "zarr.json")


def test_an_array_that_has_lost_its_document_is_named(write_store, tmp_path):
    v0 = {"dims": ("n",), "values": np.arange(4.0), "chunks": (2,)}
    for zarr_format, consolidated, document in ((3, False, "zarr.json"), (2, False, ".zarray"), (3, True, "zarr.json")):
        name = f"{zarr_format}{consolidated}.zarr"
        store = write_store(tmp_path / name, {"v0": v0, "v1": v0}, zarr_format=zarr_format, consolidated=consolidated)
        assert verified(store).faults == []
        (store / "v0" / document).unlink()
        found = verified(store)
        assert found.faults == [("damaged", "v0")]
        assert ("consolidated metadata list this array" in found.lines[0]) == consolidated
        (store / "notes").mkdir()
        (store / "notes/read me.txt").write_text("no part of the store")
        assert verified(store).faults == [("damaged", "v0")]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("shape", [10**12, 4], "at most 100,000,000 are looked at"),
        ("shape", [-3, 4], "cannot be read"),
        ("data_type", "float33", "cannot be read"),
        ("codecs", [{"name": "nothing"}], "cannot be read"),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [0, 2]}}, ""),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [10**9, 10**9]}}, "cannot be decoded"),
    ],
)
def test_metadata_that_say_what_cannot_be_end_soon(write, key, value, said):
    store = write()
    document = json.loads((store / "v0/zarr.json").read_text())
    (store / "v0/zarr.json").write_text(json.dumps({**document, key: value}))
    found = verified(store)
    assert found.faults[0][0] in ("damaged",)
    assert all(key.startswith("v0") for _, key in found.faults)
    assert said in found.lines[0] or "memory" in found.lines[0] or "holds" in found.lines[0]


# What lies where a file should --------------------------------------------------------------------------------------


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(4 * 10**12)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a link to a device": link("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a directory": Path.mkdir,
    "a huge file": large,
}


@pytest.mark.parametrize("name", ["v0/zarr.json", "v0/c/0/0", "zarr.json", ".zmetadata", "index/.zattrs"])
@pytest.mark.parametrize("odd", HOSTILE)
def test_pipes_devices_and_huge_files_are_named_and_nothing_waits(write, name, odd):
    store = write()
    (store / name).unlink(missing_ok=True)
    HOSTILE[odd](store / name)
    try:
        found = verified(store)
    except DtrainError as error:
        assert (error.code, "/" in name) == (5, False)  # noqa: PT017
    else:
        assert found.faults == [("damaged", name)]


def test_a_link_to_a_file_is_a_file(write, tmp_path):
    store = write()
    (store / "v0/c/0/0").rename(tmp_path / "elsewhere")
    (store / "v0/c/0/0").symlink_to(tmp_path / "elsewhere")
    assert verified(store).faults == []


def test_groups_that_lead_back_to_themselves_end(write):
    store = write()
    zarr.open_group(store, mode="a").create_group("sub")
    (store / "sub/again").symlink_to("..")
    (store / "sub/other").symlink_to("../sub")
    found = verified(store)
    assert found.faults == [("damaged", "sub/again"), ("damaged", "sub/other")]
    assert [one.name for one in found.summary.arrays] == ["index", "v0"]


@pytest.mark.parametrize("name", ["a pipe", "a link to a device", "a huge file"])
@pytest.mark.parametrize("suffix", ["", ".json", ".zip", ".parq"])
def test_a_path_that_is_no_store(tmp_path, name, suffix):
    place = tmp_path / f"odd{suffix}"
    HOSTILE[name](place)
    with pytest.raises(NotZarr):
        verified(place)
    with pytest.raises(DataNotFound):
        verified(tmp_path / f"nowhere{suffix}")


@pytest.mark.parametrize("content", CONTENTS)
def test_a_reference_file_that_is_none(tmp_path, content):
    (tmp_path / "refs.json").write_bytes(CONTENTS[content] or b"{")
    with pytest.raises(NotZarr):
        verified(tmp_path / "refs.json")


def test_a_file_that_may_not_be_read_is_named(write, monkeypatch):
    store = write()

    def refused(*given: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dtrain.data.read.store.read_part", refused)
    found = verified(store)
    assert len(found.faults) == 15
    assert found.lines[0] == "damaged: index/c/0: it cannot be read: Permission denied"


# Kinds of stores ----------------------------------------------------------------------------------------------------


@pytest.fixture
def copies(write, tmp_path):
    """A function that gives the same store in all kinds, by name."""

    def make(kind: str = "v3 zstd") -> dict[str, Path]:
        store = write(kind)
        pack(store, tmp_path / "a.zip")
        write_json(tmp_path / "refs.json", references_to(store, tmp_path / "data.bin"))
        return {"directory": store, "zip": tmp_path / "a.zip", "kerchunk": tmp_path / "refs.json"}

    return make


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", ["v2 zstd", "v3 zstd", "v3 none", "sharded none", "sharded zstd crc32c"])
def test_one_manifest_is_of_the_directory_of_an_archive_of_it_and_of_references_to_it(copies, tmp_path, kind):
    stores, file = copies(kind), tmp_path / "m.json"
    verified(stores["directory"], file)
    for name, store in stores.items():
        found = verified(store, file)
        assert (found.faults, found.summary.manifest) == ([], "the same"), name
        assert bool(found.summary.notes) == (name != "directory")


def test_swapped_members_of_an_archive_are_silent_and_show_against_a_manifest(write, tmp_path):
    store, file = write(), tmp_path / "m.json"
    archive = pack(store, tmp_path / "a.zip")
    assert all(one.checksums for one in verified(archive, file).summary.arrays)
    swap(store, *keys_of("v3 zstd"))
    pack(store, archive)
    assert verified(archive).faults == []
    assert sorted(verified(archive, file).faults) == [("modified", key) for key in keys_of("v3 zstd")]


def test_a_flipped_bit_in_an_archive_fails_its_crc(write, tmp_path):
    store = write("v3 none")
    archive = pack(store, tmp_path / "a.zip")
    content = (store / "v0/c/2/0").read_bytes()
    stored = bytearray(archive.read_bytes())
    at = stored.find(content)
    stored[at + 3] ^= 1
    archive.write_bytes(stored)
    assert verified(archive).lines == ["damaged: v0/c/2/0: its CRC-32 in the archive is wrong"]


def test_swapped_references_and_files_that_are_gone(copies, tmp_path):
    refs, file = copies()["kerchunk"], tmp_path / "m.json"
    verified(refs, file)
    table = json.loads(refs.read_text())
    one, other = keys_of("v3 zstd")
    table["refs"][one], table["refs"][other] = table["refs"][other], table["refs"][one]
    refs.write_text(json.dumps(table))
    assert verified(refs).faults == []
    assert sorted(verified(refs, file).faults) == [("modified", one), ("modified", other)]
    os.truncate(tmp_path / "data.bin", 500)
    assert {what for what, _ in verified(refs).faults} == {"damaged"}
    (tmp_path / "data.bin").unlink()
    found = verified(refs, file)
    assert len(found.faults) == 15
    assert "which is not there" in found.lines[0]
    os.mkfifo(tmp_path / "data.bin")
    assert len(verified(refs).faults) == 15


def test_a_snapshot_of_a_repository(tmp_path):
    import icechunk

    path, file = tmp_path / "a.icechunk", tmp_path / "m.json"
    repository = create(icechunk.local_filesystem_storage(str(path)))

    def arrays(*order: int) -> dict[str, Any]:
        values = np.arange(16.0).reshape(4, 4)[list(order)].repeat(300, axis=1)
        return {"v0": {"dims": ("n", "k"), "values": values, "chunks": (1, 1200), "compressors": None}}

    first = commit(repository, arrays(0, 1, 2, 3))
    summary = verified(path, file).summary
    assert (summary.snapshot, summary.objects, summary.manifest) == (first, 4, "written")
    second = commit(repository, arrays(0, 2, 1, 3))
    assert verified(path).summary.snapshot == second
    assert verified(path).faults == []
    found = verified(path, file)
    assert sorted(found.faults) == [("modified", "v0/c/1/0"), ("modified", "v0/c/2/0")]
    assert found.summary.notes == (f"The manifest was written for snapshot {first}.",)
    assert verified(path, file, storage_options={"snapshot": first}).faults == []
    for chunk in (path / "chunks").iterdir():
        chunk.unlink()
    found = verified(path)
    assert found.faults == [("damaged", f"v0/c/{n}/0") for n in range(4)]
    assert "not in the repository" in found.lines[0]


@pytest.fixture
def server(tmp_path):
    serving = FileServer(tmp_path, pages=True)
    yield serving
    serving.stop()


@pytest.mark.parametrize("consolidated", [False, True])
def test_a_store_on_a_server(write, tmp_path, server, consolidated):
    store, file = write(), tmp_path / "m.json"
    if consolidated:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(store)
        server.pages = False
    url = f"{server.url}/a.zarr"
    assert verified(url, file).summary.manifest == "written"
    assert "127.0.0.1" in file.read_text()
    swap(store, *keys_of("v3 zstd"))
    (store / "index/c/1").write_bytes(b"short")
    (store / "v0/c/3/0").unlink()
    found = verified(url, file)
    assert sorted(found.faults) == [
        ("damaged", "index/c/1"),
        ("missing", "v0/c/3/0"),
        ("modified", "index/c/1"),
        ("modified", "v0/c/0/0"),
        ("modified", "v0/c/5/1"),
    ]
    assert sorted(verified(store, file).faults) == sorted(found.faults)  # a manifest of the copy on the disk too


def test_a_server_that_lists_nothing_and_one_that_refuses(write, tmp_path, server, monkeypatch):
    write()
    server.pages = False
    with pytest.raises(NotZarr, match="lists no directories"):
        verified(f"{server.url}/a.zarr")
    server.pages = True
    server.fail("v0/c/2/1", 403)
    with pytest.raises(StoreForbidden):
        verified(f"{server.url}/a.zarr")
    server.mend()
    monkeypatch.setattr("dtrain.data.read.retry.ATTEMPTS", 2)
    monkeypatch.setattr("dtrain.data.read.retry.BACKOFF_SECONDS", 0.01)
    server.fail("v0/c/2/1", 503)
    with pytest.raises(StoreUnavailable):
        verified(f"{server.url}/a.zarr")


def test_a_store_in_memory_is_listed_once(write, tmp_path):
    import fsspec

    store, files = write(), fsspec.filesystem("memory")
    files.put(str(store), "/verified/a.zarr", recursive=True)
    try:
        files.rm("/verified/a.zarr/v0/c/2/1")
        found = verified("memory://verified/a.zarr")
        assert found.faults == [("missing", "v0/c/2/1")]
        assert found.summary.objects == 14
    finally:
        files.rm("/verified", recursive=True)


# Manifests ----------------------------------------------------------------------------------------------------------


def test_a_store_that_was_appended_to(write, tmp_path):
    store, file = write("v2 zstd"), tmp_path / "m.json"
    verified(store, file)
    group = zarr.open_group(store, mode="a")
    group["v0"].resize((21, 4))
    group["v0"][18:] = 5.0
    found = verified(store, file)
    assert sorted(found.faults) == [("modified", "v0/.zarray"), ("new", "v0/6.0"), ("new", "v0/6.1")]
    assert found.summary.notes == ("v0 has grown since the manifest was written: 18 x 4 to 21 x 4.",)
    group["v0"].resize((12, 4))
    found = verified(store, file)
    assert {what for what, _ in found.faults} == {"modified", "missing"}
    assert found.summary.notes == ()


def test_an_array_that_has_gone_or_come(write, tmp_path):
    store, file = write(), tmp_path / "m.json"
    verified(store, file)
    shutil.move(store / "index", store / "number")
    found = verified(store, file)
    assert sorted(what for what, _ in found.faults) == 4 * ["missing"] + 4 * ["new"]
    assert ("missing", "index/zarr.json") in found.faults


def test_a_manifest_in_the_store_does_not_count(write):
    store = write()
    for _ in range(3):
        found = verified(store, store / "contents.json")
        assert found.faults == []
    assert found.summary.manifest == "the same"
    assert "contents" not in json.dumps(json.loads((store / "contents.json").read_text())["documents"])
    for name in ("v0/contents.json", "v0/c/0/0.json"):
        with pytest.raises(UsageError, match="lies in an array"):
            verified(store, store / name)
        assert not (store / name).exists()
    with pytest.raises(UsageError, match="Zarr takes"):
        verified(store, store / ".zattrs")


def test_no_manifest_of_what_is_at_fault(write, tmp_path):
    store, file = write(), tmp_path / "m.json"
    (store / "v0/c/0/0").write_bytes(b"x")
    found = verified(store, file)
    assert (found.faults, found.summary.manifest) == ([("damaged", "v0/c/0/0")], "not written")
    assert not file.exists()


def test_nothing_is_overwritten(write, tmp_path):
    store, file = write(), tmp_path / "m.json"
    verified(store, file)
    before = file.read_bytes()
    (store / "v0/c/0/0").write_bytes(b"x")
    verified(store, file)
    assert file.read_bytes() == before
    with pytest.raises(OutputExists):
        manifests.write_manifest(file, manifests.Manifest("a"))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["m.json"]


def test_where_no_manifest_can_be(write, tmp_path, monkeypatch):
    store = write()
    with pytest.raises(UsageError, match="there is no directory"):
        verified(store, tmp_path / "nowhere/m.json")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(DiskFull, match="may not write"):
        verified(store, tmp_path / "m.json")


def content_of(file: Path, **changes: Any) -> str:
    content = json.loads(file.read_text())
    return json.dumps({**{key: value for key, value in content.items() if key != "sha256"}, **changes})


@pytest.mark.parametrize("spoil", [*CONTENTS, *HOSTILE, "one digit", "another kind"])
def test_a_manifest_that_is_damaged(write, tmp_path, spoil):
    store, file = write(), tmp_path / "m.json"
    verified(store, file)
    text = file.read_text()
    file.unlink()
    if spoil in HOSTILE:
        HOSTILE[spoil](file)
    elif spoil == "one digit":
        at = text.index('"v0/c/0/0"') + 20
        file.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])
    elif spoil == "another kind":
        file.write_text(json.dumps(sealed({"kind": "else"})))
    else:
        file.write_bytes(text[:300].encode() if CONTENTS[spoil] is None else CONTENTS[spoil])
    with pytest.raises(ManifestDamaged) as caught:
        verified(store, file)
    assert caught.value.code == 5
    assert "--run" not in caught.value.hint


@pytest.mark.parametrize(
    "change", [{"arrays": 3}, {"arrays": {"v0": {}}}, {"documents": {"a": 1}}, {"store": []}, {"written": None}]
)
def test_a_manifest_with_a_digest_and_odd_content(write, tmp_path, change):
    store, file = write(), tmp_path / "m.json"
    verified(store, file)
    file.write_text(json.dumps(sealed(json.loads(content_of(file, **change)))))
    if change == {"written": None}:
        assert verified(store, file).faults == []
        return
    with pytest.raises(ManifestDamaged, match="cannot be read"):
        verified(store, file)


def test_a_manifest_of_another_version_and_of_another_store(write, write_store, tmp_path):
    store, file = write(), tmp_path / "m.json"
    verified(store, file)
    y = {"y": {"dims": ("n",), "values": np.arange(5.0), "chunks": (2,)}}
    with pytest.raises(UsageError, match="the manifest of another store") as caught:
        verified(write_store(tmp_path / "b.zarr", y), file)
    assert caught.value.code == 2
    moved = shutil.copytree(store, tmp_path / "c.zarr")
    found = verified(moved, file)
    assert found.faults == []
    assert found.summary.notes == (f"The manifest was written for {store}.",)
    file.write_text(json.dumps(sealed(json.loads(content_of(file, format=7)))))
    with pytest.raises(ManifestConflict, match="format 7") as caught:
        verified(store, file)
    assert caught.value.code == 4


# Threads ------------------------------------------------------------------------------------------------------------


def test_results_come_in_order_and_the_first_exception_ends():
    taken = []

    def numbers():
        for number in range(1000):
            taken.append(number)
            yield number

    assert list(in_threads(lambda n: n * n, range(100), 3)) == [n * n for n in range(100)]
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda n: 1 // (n - 5), numbers(), 2))
    assert len(taken) < 30


def test_progress_is_told(write):
    told: list[tuple[int, int, int]] = []
    data = TrainConfig().data
    verify_store(str(write()), data, report=lambda fault: None, tell=lambda *given: told.append(given))
    assert told[0] == (0, 15, 0)
    assert [done for done, *_ in told] == list(range(16))
