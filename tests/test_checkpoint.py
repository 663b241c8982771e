from __future__ import annotations

import ast
import errno
import hashlib
import json
import math
import os
import shutil
import stat
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import dtrain
from dtrain import runfiles
from dtrain.algorithm.params import flatten, layout_of, load_into, params_sha256
from dtrain.algorithm.plan import first_position
from dtrain.algorithm.replica import carried, empty_inner_state, fresh_replica, pack_inner_state, unpack_inner_state
from dtrain.checkpoint import commit_round, load_params, load_round
from dtrain.committed import check_history, committed_rounds, find_round, newest_round, prune, sweep
from dtrain.errors import DiskFull, RoundNotFound, RunDamaged
from dtrain.report.history import read_rows_of
from dtrain.runfiles import round_directory
from dtrain.statefiles import held_state
from dtrain.types import Broadcast, Cursor, InnerState, Position, ReplicaState, Slot, TrainState
from tests.disks import CALLS, Disk, Killed


def network(seed):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[3].weight = module[2].weight
    module.register_buffer("wide", torch.randn(3, dtype=torch.float64))
    module.register_buffer("narrow", torch.randn(3).to(torch.bfloat16))
    module.register_buffer("flag", torch.tensor(True))
    module.register_buffer("mask", torch.tensor([-math.inf, 0.0]))
    return module


def adam_state(module, steps):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    fresh = carried(optimizer)
    optimizer.param_groups[0].update(k=steps, d=math.inf, betas=(0.8, 0.999), mode="on", seen=[1, (2.0, "x")])
    optimizer.scale = torch.full((2,), float(steps))
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    return pack_inner_state(optimizer, list(module.parameters()), fresh)


PLAIN = (True, None, 3, 0.1, -0.0, math.inf, -math.inf, 1e-300, 2**70)
"""Plain values that an optimizer may keep."""


def state_of(number, replicas=2):
    """A state as it is after a round, with all that can be in one."""
    module = network(number)
    inner = [adam_state(network(number + k), steps=2) for k in range(replicas - 1)]
    slots = tuple(Slot(0, f"value{i}", "", (), 0, 0, value) for i, value in enumerate(PLAIN))
    last = inner[0] if inner else empty_inner_state()
    params = flatten(module, layout_of(module))
    return TrainState(
        position=Position(
            round=number,
            cursors=tuple(Cursor(number, 7 * k) for k in range(replicas)),
            steps=tuple(10 * number + k for k in range(replicas)),
        ),
        model=params,
        broadcast=(Broadcast(params),) * replicas,
        replicas=tuple(map(ReplicaState, (*inner, InnerState((*last.slots, *slots), last.data)))),
        outer=((),) * replicas,
    )


def bits(state):
    """All of a state in values that can be compared."""
    vectors = [state.model, *(own.params for own in state.broadcast)]
    beside = [(own.residual, own.control) for own in state.replicas]
    beside += [(own.control, None if state.ema is None else state.ema.flat) for own in state.broadcast]
    return (
        state.position,
        [(p.layout, p.flat.tobytes(), p.extra.tobytes(), p.frozen.tobytes()) for p in vectors],
        [inner_bits(own.inner) for own in state.replicas],
        [[None if array is None else (array.dtype, array.tobytes()) for array in pair] for pair in beside],
        [[inner_bits(piece) for piece in outer] for outer in state.outer],
    )


def inner_bits(inner):
    return [(slot, type(slot.value), str(slot.value)) for slot in inner.slots], inner.data.tobytes()


STATES = {number: state_of(number) for number in (1, 2, 3)}


def newest_state(run):
    state, fingerprint, damaged = newest_round(run)
    return None if state is None else held_state(state), fingerprint, damaged


PLAN_FILE = b"{}\n"


def described(run):
    """Write the files of a run that its rounds stand on."""
    run.mkdir(exist_ok=True)
    (run / "plan.json").write_bytes(PLAN_FILE)
    (run / "history.jsonl").write_text("{}\n" * 9)
    return run


def commit(run, state, fingerprint="plan"):
    return commit_round(run, state, fingerprint, hashlib.sha256(PLAN_FILE).hexdigest())


@pytest.fixture(autouse=True)
def _described(tmp_path):
    described(tmp_path)


@pytest.fixture
def run(tmp_path):
    """A run with rounds 1 and 2."""
    commit(tmp_path, STATES[1], "plan")
    commit(tmp_path, STATES[2], "plan")
    return tmp_path


def test_a_commit_does_not_hold_the_history(run):
    (run / "history.jsonl").write_bytes((b"{" + b" " * 999_998 + b"}\n") * 40)
    tracemalloc.start()
    commit(run, STATES[3])
    read_rows_of(run, (2, 3))
    check_history(run)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8e6  # of 40 MB


def left_over(run):
    return [path.name for path in (run / "rounds").glob(".*")]


# There and back -------------------------------------------------------------------------------------------------


def test_a_committed_round_comes_back_bit_for_bit(tmp_path):
    state = STATES[2]
    commit(tmp_path, state, "plan")
    back, fingerprint = load_round(round_directory(tmp_path, 2))
    assert fingerprint == "plan"
    assert bits(back) == bits(state)
    assert params_sha256(load_params(round_directory(tmp_path, 2))) == params_sha256(state.model)
    assert left_over(tmp_path) == []


def test_a_state_without_steps_comes_back(tmp_path):
    module = nn.Linear(2, 1)
    params = flatten(module, layout_of(module))
    start = TrainState(
        position=first_position(3),
        model=params,
        broadcast=(Broadcast(params),) * 3,
        replicas=(fresh_replica(),) * 3,
        outer=((empty_inner_state(),),) * 3,
    )
    commit(tmp_path, start, "")
    assert bits(load_round(round_directory(tmp_path, 0))[0]) == bits(start)


def test_replicas_with_parameters_of_their_own_come_back_and_share_what_they_shared(tmp_path):
    vectors = [flatten(network(seed), layout_of(network(seed))) for seed in (5, 6, 7)]
    own, other = Broadcast(vectors[1]), Broadcast(vectors[2])
    first, second = (adam_state(network(8), 1), adam_state(network(9), 1)), (adam_state(network(10), 2),) * 2
    state = replace(
        state_of(4, replicas=3),
        model=vectors[0],
        broadcast=(own, other, own),
        replicas=tuple(
            replace(r, residual=np.float32([k, -0.0, np.inf])) for k, r in enumerate(state_of(4, 3).replicas)
        ),
        outer=(first, second, first),
    )
    commit(tmp_path, state, "plan")
    back, _ = load_round(round_directory(tmp_path, 4))
    assert bits(back) == bits(state)
    assert back.broadcast[0] is back.broadcast[2]
    assert back.outer[0] is back.outer[2]
    names = sorted(path.name for path in round_directory(tmp_path, 4).glob("*.safetensors"))
    assert [name for name in names if name.startswith("params")] == [
        "params-0001.safetensors",
        "params-0002.safetensors",
        "params.safetensors",
    ]
    assert [name for name in names if name.startswith("outer")] == [f"outer-{k:04d}.safetensors" for k in range(4)]


def with_all(state):
    """A state with all that ways of averaging add: residuals, control variates, a moving average, an outer state."""
    count, params = state.model.layout.num_params, state.model
    ema = replace(params, flat=params.flat * np.float32(0.5))
    values = [np.float32(k + np.arange(count)) for k in range(5)]
    values[1][:3] = -0.0, np.finfo(np.float32).max, 1e-45
    start = Broadcast(params, control=values[0])
    replicas = tuple(
        replace(own, residual=values[1 + k], control=values[3 + k]) for k, own in enumerate(state.replicas)
    )
    outer = ((adam_state(network(3), 1),),) * 2
    return replace(state, broadcast=(start, start), replicas=replicas, outer=outer, ema=ema)


def test_control_variates_residuals_and_the_moving_average_come_back(tmp_path):
    state = with_all(STATES[2])
    commit(tmp_path, state, "plan")
    back, _ = load_round(round_directory(tmp_path, 2))
    assert bits(back) == bits(state)
    assert back.broadcast[0] is back.broadcast[1]
    assert back.ema.extra.tobytes() == state.ema.extra.tobytes()
    assert all(own.params is back.model for own in back.broadcast)
    names = {path.name for path in round_directory(tmp_path, 2).glob("*.safetensors")}
    assert {"ema.safetensors", "control.safetensors"} <= names
    saved = safetensors.torch.load_file(round_directory(tmp_path, 2) / "ema.safetensors")
    assert saved.keys() == network(0).state_dict().keys()


@pytest.mark.parametrize("without", ["control", "residual", "ema"])
def test_each_of_them_may_be_missing(tmp_path, without):
    state = with_all(STATES[2])
    if without == "ema":
        state = replace(state, ema=None)
    else:
        state = replace(state, replicas=tuple(replace(own, **{without: None}) for own in state.replicas))
    if without == "control":
        state = replace(state, broadcast=(Broadcast(state.model),) * 2)
    commit(tmp_path, state, "plan")
    assert bits(load_round(round_directory(tmp_path, 2))[0]) == bits(state)


def test_a_model_with_statistics_of_its_own_is_kept_beside_what_training_goes_on_from(tmp_path):
    """Recalibrated batch norm: the model is saved, and never comes back into training."""
    state = with_all(STATES[2])
    model = replace(state.model, flat=state.model.flat + np.float32(1))
    state = replace(state, model=model)
    commit(tmp_path, state, "plan")
    back, _ = load_round(round_directory(tmp_path, 2))
    assert bits(back) == bits(state)
    assert back.broadcast[0] is back.broadcast[1]
    assert back.broadcast[0].params is not back.model


def test_the_moving_average_has_the_frozen_parameters(tmp_path):
    module = network(1)
    module[0].weight.requires_grad_(False)
    params = flatten(module, layout_of(module))
    ema = replace(params, flat=params.flat * np.float32(2))
    state = replace(STATES[1], model=params, broadcast=(Broadcast(params),) * 2, ema=ema)
    commit(tmp_path, state, "plan")
    back, _ = load_round(round_directory(tmp_path, 1))
    assert bits(back) == bits(state)
    assert back.ema.frozen.tobytes() == params.frozen.tobytes() != b""


def test_training_goes_on_from_a_loaded_round_as_if_nothing_had_been(run):
    ends = []
    for state in (STATES[2], load_round(round_directory(run, 2))[0]):
        module = network(5)
        load_into(module, state.broadcast[0].params)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        unpack_inner_state(state.replicas[0].inner, optimizer, list(module.parameters()))
        module(torch.ones(2, 3) * torch.tensor([[1.0], [2.0]])).square().mean().backward()
        optimizer.step()
        ends.append(params_sha256(flatten(module, layout_of(module))))
    assert ends[0] == ends[1] != params_sha256(STATES[2].model)


def test_arrays_may_be_read_only_as_dask_gives_them(tmp_path):
    state = with_all(STATES[1])
    params = replace_arrays(state.model)
    frozen = tuple(
        ReplicaState(InnerState(r.inner.slots, read_only(r.inner.data)), read_only(r.residual), read_only(r.control))
        for r in state.replicas
    )
    start = Broadcast(params, control=read_only(state.broadcast[0].control))
    given = replace(state, model=params, broadcast=(start,) * 2, replicas=frozen, ema=replace_arrays(state.ema))
    commit(tmp_path, given, "plan")
    assert bits(load_round(round_directory(tmp_path, 1))[0]) == bits(state)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def replace_arrays(params):
    return replace(params, flat=read_only(params.flat), extra=read_only(params.extra))


def test_the_manifest_lists_every_file_with_its_sha256(run):
    directory = round_directory(run, 2)
    manifest = json.loads((directory / "manifest.json").read_text())
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "manifest.json"}
    assert set(files) == {
        "params.safetensors",
        "inner-0000.safetensors",
        "inner-0001.safetensors",
        "state.json",
    }
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    assert manifest["round"] == 2


def test_the_bytes_written_are_returned(tmp_path):
    written = commit(tmp_path, STATES[1], "plan")
    files = [p.stat().st_size for p in round_directory(tmp_path, 1).iterdir() if p.name != "manifest.json"]
    assert written == sum(files)


def test_params_safetensors_is_the_state_dict(run):
    tensors = safetensors.torch.load_file(round_directory(run, 2) / "params.safetensors")
    state = network(2).state_dict()
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_the_files_of_a_state_are_the_same_bytes_every_time(tmp_path):
    for place in ("a", "b"):
        described(tmp_path / place)
        commit(tmp_path / place, STATES[1], "plan")
    one, two = (round_directory(tmp_path / place, 1) for place in ("a", "b"))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:97]))
    commit(tmp_path, STATES[1], "plan")
    assert bits(load_round(round_directory(tmp_path, 1))[0]) == bits(STATES[1])


def test_committing_over_a_damaged_round_replaces_it(run):
    (round_directory(run, 2) / "manifest.json").write_text("{}")
    (round_directory(run, 2) / "odd").write_text("odd")
    commit(run, STATES[2], "other plan")
    back, fingerprint = load_round(round_directory(run, 2))
    assert (bits(back), fingerprint) == (bits(STATES[2]), "other plan")
    assert not (round_directory(run, 2) / "odd").exists()
    assert left_over(run) == []


# Damage ---------------------------------------------------------------------------------------------------------

FILES = ("params.safetensors", "inner-0000.safetensors", "inner-0001.safetensors", "state.json", "manifest.json")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 3),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped bit": flip,
    "missing": lambda path: path.unlink(),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_round_is_named_and_the_one_before_is_used(run, name, damage):
    damage(round_directory(run, 2) / name)
    with pytest.raises(RunDamaged) as caught:
        load_round(round_directory(run, 2))
    assert caught.value.code == 5
    state, fingerprint, damaged = newest_state(run)
    assert bits(state) == bits(STATES[1])
    assert fingerprint == "plan"
    assert [number for number, _ in damaged] == [2]
    assert "round-000002" in damaged[0][1]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "3",
        "null",
        '"text"',
        '{"files": []}',
        '{"files": {}}',
        '{"files": {"state.json": 3}}',
        '{"files": {"state.json": {}}}',
        '{"files": {"state.json": {"bytes": "x", "sha256": 3}}}',
        '{"files": {"../../rounds": {"bytes": 1, "sha256": ""}}}',
        '{"files": {"\\u0000": {"bytes": 1, "sha256": ""}}}',
        "\xff\xfe garbage",
    ],
)
def test_a_garbage_manifest_is_damage(run, text):
    (round_directory(run, 2) / "manifest.json").write_bytes(text.encode("latin-1"))
    state, _, damaged = newest_state(run)
    assert state.round == 1
    assert [number for number, _ in damaged] == [2]


def test_any_flipped_bit_of_a_manifest_is_damage_or_changes_nothing(run):
    path = round_directory(run, 2) / "manifest.json"
    good = path.read_bytes()
    harmless = 0
    for place in range(len(good)):
        flipped = bytearray(good)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        try:
            state, _ = load_round(round_directory(run, 2))
        except RunDamaged:
            continue
        harmless += 1  # the format's or the round's number, or white space
        assert bits(state) == bits(STATES[2])
    assert harmless < len(good) / 8


def test_if_all_rounds_are_damaged_the_run_is(run):
    for number in (1, 2):
        flip(round_directory(run, number) / "params.safetensors")
    with pytest.raises(RunDamaged, match="none of its 2 committed rounds can be read") as caught:
        newest_state(run)
    assert "round-000002" in caught.value.message
    assert caught.value.code == 5


def test_a_run_without_rounds_has_no_state(tmp_path):
    assert newest_state(tmp_path) == (None, "", [])
    assert committed_rounds(tmp_path) == []


def test_temporary_directories_are_no_rounds(run):
    shutil.copytree(round_directory(run, 2), run / "rounds" / ".round-000003-0badcafe")
    assert committed_rounds(run) == [1, 2]
    assert newest_state(run)[0].round == 2


# Full and broken disks --------------------------------------------------------------------------------------------


def before_first(run):
    return 1, None


def before_second(run):
    commit(run, STATES[1], "plan")
    return 2, STATES[1]


def before_repair(run):
    commit(run, STATES[1], "plan")
    commit(run, STATES[2], "plan")
    flip(round_directory(run, 2) / "state.json")
    return 2, STATES[1]


STARTS = pytest.mark.parametrize("before", [before_first, before_second, before_repair])


def calls_of(monkeypatch, run, before):
    number, _ = before(run)
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        commit(run, STATES[number], "plan")
    return disk.calls


@pytest.mark.sampled(4)
@STARTS
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_disk_loses_no_round(tmp_path, monkeypatch, before, error):
    described(tmp_path / "counted")
    calls = calls_of(monkeypatch, tmp_path / "counted", before)
    assert set(calls) == set(CALLS)
    ends = set()
    for fail_at, name in enumerate(calls):
        run = described(tmp_path / str(fail_at))
        number, old = before(run)
        failed = None
        with monkeypatch.context() as patch:
            Disk(patch, fail_at, error)
            try:
                commit(run, STATES[number], "plan")
            except DiskFull as raised:
                failed = raised
        found = newest_state(run)[0] if committed_rounds(run) else None
        if failed is None:
            assert name == "mkdir"  # of rounds/, which was there
            assert bits(found) == bits(STATES[number])
        else:
            assert os.strerror(error) in failed.message
            assert failed.code == 8
            assert (found and bits(found)) in ((old and bits(old)), bits(STATES[number]))
        assert left_over(run) == []
        ends.add(found.round if found else None)
    assert ends == {number, old.round if old else None}


@pytest.mark.sampled(2)
@STARTS
def test_a_killed_process_loses_no_round(tmp_path, monkeypatch, before):
    described(tmp_path / "counted")
    calls = calls_of(monkeypatch, tmp_path / "counted", before)
    ends, litter = set(), 0
    for fail_at in range(len(calls)):
        run = described(tmp_path / str(fail_at))
        number, old = before(run)
        with monkeypatch.context() as patch:
            Disk(patch, fail_at, Killed)
            with pytest.raises(Killed):
                commit(run, STATES[number], "plan")
        found = newest_state(run)[0] if committed_rounds(run) else None
        assert (found and bits(found)) in ((old and bits(old)), bits(STATES[number]))
        ends.add(found.round if found else None)
        litter += bool(left_over(run))
        sweep(run)
        assert left_over(run) == []
        commit(run, STATES[number], "plan")
        assert bits(newest_state(run)[0]) == bits(STATES[number])
    assert ends == {number, old.round if old else None}
    assert litter > 5


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    Disk(monkeypatch, 5, errno.ENOSPC)
    with pytest.raises(DiskFull, match="round 1 could not be written") as caught:
        commit(tmp_path, STATES[1], "plan")
    assert "Free some space" in caught.value.hint


def test_an_interrupt_leaves_nothing_behind(run, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            commit(run, STATES[3], "plan")
    assert left_over(run) == []
    assert bits(newest_state(run)[0]) == bits(STATES[2])


def test_a_run_directory_that_is_gone_is_a_disk_error(tmp_path):
    with pytest.raises(DiskFull):
        commit(tmp_path / "gone", STATES[1], "plan")


# Order on the disk --------------------------------------------------------------------------------------------------


def test_everything_is_synced_before_the_rename_and_the_rename_after(tmp_path, monkeypatch):
    log, names = [], {}
    opened, synced, renamed = os.open, os.fsync, os.rename

    def spy_open(path, *arguments, **options):
        descriptor = opened(path, *arguments, **options)
        names[descriptor] = Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced(descriptor), log.append(names[descriptor])))
    monkeypatch.setattr(os, "rename", lambda a, b: (renamed(a, b), log.append("rename")))
    commit(tmp_path, STATES[1], "plan")
    assert sorted(log[:4]) == sorted(name for name in FILES if name != "manifest.json")
    assert log[4] == "manifest.json"
    assert log[5].startswith(".round-000001-")
    assert log[6:] == ["rename", "rounds"]


# Permissions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "file_mode", "directory_mode"), [(0o027, 0o640, 0o750), (0o002, 0o664, 0o775)])
def test_the_umask_is_honoured(tmp_path, mask, file_mode, directory_mode):
    before = os.umask(mask)
    try:
        commit(tmp_path, STATES[1], "plan")
    finally:
        os.umask(before)

    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    directory = round_directory(tmp_path, 1)
    assert {mode(path) for path in directory.iterdir()} == {file_mode}
    assert {mode(directory), mode(directory.parent)} == {directory_mode}


# Which rounds are kept ----------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    """A run of ten rounds; their content does not matter."""
    for number in range(1, 11):
        round_directory(tmp_path, number).mkdir(parents=True)
        (round_directory(tmp_path, number) / "state.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (3, None, [8, 9, 10]),
        (3, 4, [4, 8, 9, 10]),
        (3, 9, [8, 9, 10]),
        (1, 10, [10]),
        (1, 1, [1, 10]),
        (20, 2, list(range(1, 11))),
        (3, 77, [8, 9, 10]),
    ],
)
def test_the_newest_and_the_best_rounds_are_kept(many, keep, best, kept):
    prune(many, keep, best)
    assert committed_rounds(many) == kept
    assert left_over(many) == []


def test_a_round_that_cannot_be_deleted_is_in_nobodys_way(many, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "no")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        prune(many, 3, None)
    assert committed_rounds(many) == [8, 9, 10]
    assert len(left_over(many)) == 7
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        prune(many, 1, None)
    assert committed_rounds(many) == [8, 9, 10]
    sweep(many)
    assert left_over(many) == []


def test_sweep_takes_temporary_directories_only(run):
    (run / "rounds" / ".round-000003-0badcafe").mkdir()
    (run / "rounds" / ".round-000003-0badcafe" / "params.safetensors").write_text("x")
    (run / "rounds" / "notes").mkdir()
    sweep(run)
    assert sorted(path.name for path in (run / "rounds").iterdir()) == ["notes", "round-000001", "round-000002"]
    sweep(run / "nothing")


def test_rounds_sort_by_their_numbers(tmp_path):
    for number in (2, 10, 999_999, 1_000_000):
        round_directory(tmp_path, number).mkdir(parents=True)
    (tmp_path / "rounds" / "round-x").mkdir()
    assert committed_rounds(tmp_path) == [2, 10, 999_999, 1_000_000]


@pytest.mark.parametrize(
    ("wanted", "best", "found"),
    [("last", 4, 10), ("best", 4, 4), ("best", None, 10), ("best", 77, 10), ("7", 4, 7), ("007", 4, 7)],
)
def test_a_round_is_found_by_name_or_number(many, wanted, best, found):
    assert find_round(many, wanted, best) == found


@pytest.mark.parametrize("wanted", ["11", "0", "-1", "first", "", "1.0"])
def test_a_round_that_is_not_kept_is_exit_code_2(many, wanted):
    with pytest.raises(RoundNotFound, match=f'keeps no round "{wanted}"') as caught:
        find_round(many, wanted, 4)
    assert caught.value.hint.startswith("Kept are best, last and 1, 2, 3")
    assert caught.value.code == 2


def test_without_rounds_none_is_found(tmp_path):
    with pytest.raises(RoundNotFound, match="no committed round yet"):
        find_round(tmp_path, "last", None)


# No code from files -------------------------------------------------------------------------------------------------

PACKAGE = Path(dtrain.__file__).parent
SOURCES = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "cli" / "dtrain_cli").rglob("*.py")]
EXECUTING = {"pickle", "_pickle", "dill", "joblib", "shelve", "marshal"}


def called(node):
    """The dotted name of what a call calls."""
    parts, value = [], node.func
    while isinstance(value, ast.Attribute):
        parts.append(value.attr)
        value = value.value
    parts.append(getattr(value, "id", ""))
    return ".".join(reversed(parts))


def faults(text):
    """What in a source text can run code from a file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] in EXECUTING)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.partition(".")[0] in EXECUTING:
                yield node.module
            yield from (f"torch.{a.name}" for a in node.names if node.module == "torch" and a.name in ("load", "jit"))
        elif isinstance(node, ast.Call):
            name = called(node)
            if name in ("torch.load", "torch.jit.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
                yield name
            if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                yield "allow_pickle"


def test_nothing_in_the_package_can_run_code_from_a_file():
    assert len(SOURCES) > 20
    found = {str(path): list(faults(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}


def test_cloudpickle_is_where_code_travels_and_nowhere_else():
    """The user's, and that of dtrain for workers and schedulers that may not have it."""
    users = {path.name for path in SOURCES if "cloudpickle" in path.read_text(encoding="utf-8").split('"""', 2)[2]}
    assert users <= {"codebytes.py", "connect.py", "machine.py", "dashboard.py"}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import numpy, pickle as p",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
    ],
)
def test_the_check_itself_can_fail(text):
    assert list(faults(text))


def test_no_other_files_are_read_than_the_manifest_names(run, monkeypatch):
    read, real = [], runfiles.check_regular
    monkeypatch.setattr(runfiles, "check_regular", lambda path, *hint: (read.append(path.name), real(path, *hint))[1])
    (round_directory(run, 2) / "extra.safetensors").write_bytes(b"x")
    load_round(round_directory(run, 2))
    assert sorted(read) == sorted([*FILES, "plan.json", "history.jsonl"])
