"""Each kind of user of examples/your_data.md: a store as xarray writes it, then the commands that stand there."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dtrain_cli.main import run
from tests.foreign import STORES, climate, table

if TYPE_CHECKING:
    from distributed import Client

TEXT = (Path(__file__).parents[1] / "examples" / "your_data.md").read_text(encoding="utf-8")
USERS = re.findall(r"^## (.*?)\n(?:.*?)```console\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)
KINDS = {"era5": "climate", "nuclei": "nuclei", "table": "table", "tokens": "tokens", "cells": "cells"}
"""By name of the store in the text: what `tests.foreign` writes."""
COLUMNS = 80


def commands(text: str) -> list[list[str]]:
    return [line.removeprefix("$ dtrain ").split() for line in text.splitlines()]


def store_of(text: str) -> str:
    return re.findall(r"--data (\w+)\.zarr", text)[0]


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def losses(directory: str) -> list[float]:
    (history,) = Path(directory).glob("runs/*/history.jsonl")
    return [json.loads(line)["val_loss"] for line in history.read_text().splitlines()]


def test_every_kind_of_user_is_there() -> None:
    assert sorted(KINDS[store_of(text)] for _, text in USERS) == sorted(STORES)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("title", "text"), USERS, ids=[title for title, _ in USERS])
def test_the_commands_of_a_user(capsys: pytest.CaptureFixture[str], title: str, text: str) -> None:
    name = store_of(text)
    STORES[KINDS[name]](Path(f"{name}.zarr"))
    assert len(commands(text)) < 5
    for words in commands(text):
        more = [] if words[0] == "init" else ["--scheduler", "serial"]
        more += ["--set", "train.rounds=8"] if words[0] == "train" else []
        assert run([*words, *more]) == 0, capsys.readouterr().err
        said = capsys.readouterr()
        if words[0] == "init":
            assert max(map(len, (said.out + said.err).splitlines())) <= COLUMNS
            assert f"next: dtrain plan {words[1]}/dtrain.toml" in said.err
    directory = commands(text)[0][1]
    assert losses(directory)[-1] < losses(directory)[0]
    lines = Path(directory, "dtrain.toml").read_text().splitlines()
    assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize(("title", "text"), USERS, ids=[title for title, _ in USERS])
def test_the_keys_that_the_text_shows_are_those_that_are_written(title: str, text: str) -> None:
    name = store_of(text)
    section = TEXT.split(f"## {title}")[1].split("\n## ")[0]
    STORES[KINDS[name]](Path(f"{name}.zarr"))
    assert run(["-q", "init", "here", "--data", f"{name}.zarr"]) == 0
    written = tomllib.loads(Path("here/dtrain.toml").read_text())["data"]
    for shown in re.findall(r"```toml\n(.*?)```", section, re.DOTALL):
        keys = tomllib.loads(shown)
        assert {key: written.get(key) for key in keys} == keys


@pytest.mark.sampled(3)
@pytest.mark.parametrize("chunk", [1, 24, 120])
@pytest.mark.parametrize("packed", [True, False])
def test_climate_in_chunks_of_any_length_gives_the_same_config_file(chunk: int, packed: bool) -> None:
    climate(Path("usual.zarr"))
    climate(Path("s.zarr"), chunk=chunk, packed=packed)
    assert run(["-q", "init", "usual", "--data", "usual.zarr"]) == 0
    assert run(["-q", "init", "here", "--data", "s.zarr"]) == 0
    usual, here = (Path(name, "dtrain.toml").read_text() for name in ("usual", "here"))
    assert here == usual.replace("usual.zarr", "s.zarr")


def test_a_cluster_trains_to_the_same_bits(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    table(Path("table.zarr"))
    assert run(["-q", "init", "here", "--data", "table.zarr"]) == 0
    hashes = []
    for number, scheduler in enumerate(("serial", client.scheduler.address)):
        capsys.readouterr()
        words = ["--json", "-q", "train", "here/dtrain.toml", "--run", f"r{number}", "--set", "train.rounds=2"]
        assert run([*words, "--scheduler", scheduler]) == 0, capsys.readouterr().err
        hashes.append(json.loads(capsys.readouterr().out.splitlines()[-1])["params_sha256"])
    assert hashes[0] == hashes[1]
