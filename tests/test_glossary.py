"""The code uses the words of docs/glossary.md, and not those that it rules out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL = ("dtrain", "cli/dtrain_cli")


@dataclass(frozen=True)
class Rule:
    """A word that the code must not use where it would mean a word of the glossary."""

    pattern: str
    where: tuple[str, ...] = ALL
    allowed: str = "(?!)"
    """What is left out of the search: the word means something else there."""
    reason: str = ""
    """Why it is left out, or why some folders are."""


RULES = {
    "example": Rule(
        r"examples?", allowed=r"for\s+example|an example\.|^ *Examples$", reason="An example may explain an option."
    ),
    "record": Rule(
        r"records?",
        ("dtrain/data", "dtrain/algorithm", "dtrain/runtime", "dtrain/report"),
        allowed=r"\.record\(|\.record_stream\(|record_size",
        reason="CUDA records events; the command line prints JSON records; a key of kerchunk.",
    ),
    "client": Rule(
        r"clients?",
        ("dtrain/data", "dtrain/algorithm", "dtrain/report", "dtrain/config"),
        allowed=r"client_kwargs|client(-key)?\.pem",
        reason="Elsewhere it is Dask's Client; an option of s3fs; files of `dtrain certs`.",
    ),
    "node": Rule(
        r"nodes?",
        ("dtrain/algorithm", "dtrain/runtime", "dtrain/report"),
        reason="In data it is a node of Zarr.",
    ),
    "rank": Rule(
        r"ranks?", ("dtrain/algorithm", "dtrain/runtime", "dtrain/report"), reason="In data it is a place in an order."
    ),
    "shard": Rule(
        r"shards?", ("dtrain/algorithm", "dtrain/runtime", "dtrain/report"), reason="In data it is Zarr's shard."
    ),
    "server": Rule(
        r"servers?",
        ("dtrain/algorithm", "dtrain/runtime", "dtrain/report"),
        allowed=r"fork\s+server|bokeh\.server|PROTOCOL_TLS_SERVER|server_side",
        reason="In data it holds a remote store; Python's fork server; a folder of Bokeh; words of Python's ssl.",
    ),
    "delta": Rule(r"deltas?", allowed=r"min_delta|Huber loss with delta", reason="A key of [stop]; Huber's parameter."),
    "iteration": Rule(r"iterations?"),
    "experiment": Rule(
        r"experiments?",
        allowed=r"MLFLOW_EXPERIMENT_\w+|\w+_experiment(_by_name)?\b|\bexperiment_id",
        reason="MLflow's word for runs that belong together.",
    ),
    "job": Rule(
        r"jobs?",
        ("dtrain/data", "dtrain/algorithm", "dtrain/config", "dtrain/report"),
        reason="A Job is a run not started.",
    ),
    "block": Rule(
        r"blocks?",
        ("dtrain/config", "dtrain/report", "dtrain/runtime"),
        allowed=r"the block ends|block_size",
        reason="A block of Python code; an option of fsspec; in data, of chunks; in algorithm, numbers added at once.",
    ),
    "asked again": Rule(r"asked\s+again"),
    "cut short": Rule(r"cut\s+short"),
    "written again": Rule(r"written\s+again"),
    "deviation": Rule(r"deviations?", ALL, allowed=r"standard\s+deviation"),
    "memory law": Rule(r"memory\s+law"),
    "kept whole": Rule(r"kept\s+whole"),
    "corner": Rule(r"corners?"),
    "room": Rule(r"rooms?"),
}
UNCHECKED = {
    "split": "The word of the glossary for train, validation and test.",
    "window": "The word of the glossary for a sample's offsets.",
    "piece": "An everyday word.",
    "state": "An optimizer and a replica have one.",
}


def rows() -> list[tuple[str, str, list[str]]]:
    """The rows of the glossary's tables: word, meaning, and the words that are never used for it."""
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [
        (word, meaning, [name for name in never.split(", ") if name != "-"])
        for word, meaning, never in cells
        if word != "word"
    ]


def uses(rule: Rule, text: str) -> list[str]:
    """The lines in which a text uses a word, also as a part of a name: ``num_examples``."""
    left = re.sub(rule.allowed, lambda match: "\n" * match[0].count("\n"), text, flags=re.MULTILINE | re.IGNORECASE)
    return [
        f"line {left.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for match in re.finditer(rf"(?<![A-Za-z]){rule.pattern}(?![A-Za-z])", left, re.IGNORECASE)
    ]


@pytest.mark.parametrize("word", RULES)
def test_the_code_does_not_use_a_word_that_the_glossary_rules_out(word: str) -> None:
    rule = RULES[word]
    files = [path for folder in rule.where for path in (ROOT / folder).rglob("*.py")]
    assert files
    found = {str(path.relative_to(ROOT)): uses(rule, path.read_text(encoding="utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_every_word_that_is_ruled_out_is_looked_for_or_has_a_reason() -> None:
    ruled_out = {name for _, _, never in rows() for name in never}
    assert ruled_out == RULES.keys() | UNCHECKED.keys()
    assert not RULES.keys() & UNCHECKED.keys()
    assert all(rule.reason for word, rule in RULES.items() if rule.where != ALL)


def test_every_word_has_one_meaning() -> None:
    words = [word for word, _, _ in rows()]
    assert len(words) > 30
    assert len(set(words)) == len(words)
    assert all(meaning for _, meaning, _ in rows())


@pytest.mark.parametrize(
    ("word", "text", "lines"),
    [
        ("example", "num_examples = 3\nfor\nexample, this\n", ["line 1: examples"]),
        ("example", "    Examples\n    --------\n", []),
        ("delta", "min_delta, delta, Deltas", ["line 1: delta", "line 1: Deltas"]),
        ("client", "a\nclass FlowerClient: client_id", ["line 2: client"]),
        ("deviation", "mean and standard\n    deviation, and\ndeviation", ["line 3: deviation"]),
        ("iteration", "iterate over iterations_", ["line 1: iterations"]),
    ],
)
def test_the_check_itself_can_fail(word: str, text: str, lines: list[str]) -> None:
    assert uses(RULES[word], text) == lines
