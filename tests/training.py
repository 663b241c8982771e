"""Short runs for tests, and what is compared of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import dtrain
from dtrain.asking import Question
from dtrain.runfiles import history_sha256, lines_of, sealed, sha256


def shas(run: dtrain.Run) -> list[str]:
    """The digest of the parameters after each round."""
    return [row["params_sha256"] for row in run.rows]


def bits(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a history without what may differ from one time to the next."""
    return [{k: v for k, v in row.items() if k != "retried" and not k.startswith("seconds")} for row in rows]


def evaluated(
    run: dtrain.Run, samples: dtrain.Samples | None, split: Any, cluster: Any = "serial"
) -> tuple[dict[str, float], int, int]:
    """The figures of the last round without baselines, its number, and the number of samples."""
    scores = run.scores(samples, Question(split=split, baselines=False), round="last", cluster=cluster)
    return scores.values, scores.round, scores.samples


def trained(
    model: Any, samples: dtrain.Samples, where: Path, table: Mapping[str, Any], cluster: Any = "serial", **more: Any
) -> dtrain.Run:
    """Train two replicas quietly; `table` is ``[train]`` where `more` does not say otherwise."""
    return dtrain.train(
        model,
        samples,
        train={**table, **more.pop("train", {})},
        average={"replicas": 2, **more.pop("average", {})},
        cluster=cluster,
        run_dir=where,
        progress=False,
        **more,
    )


def rewrite(run: Path, rows: Iterable[Mapping[str, Any]] | None = None, plan: Mapping[str, Any] | None = None) -> None:
    """Write other rows or another plan into a run, as if its rounds had been trained with them."""
    history, planned = run / "history.jsonl", run / "plan.json"
    if rows is not None:
        history.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if plan is not None:
        planned.write_text(json.dumps(sealed({key: value for key, value in plan.items() if key != "sha256"})))
    for path in run.glob("rounds/round-*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        digests = {
            "plan": sha256(planned.read_bytes()),
            "history": history_sha256(lines_of(history), manifest["round"]),
        }
        path.write_text(json.dumps(sealed({**manifest, **digests})))


def rewrite_env(run: Path, **values: str) -> None:
    """Write other values into a run's env.json."""
    environment = json.loads((run / "env.json").read_text())
    del environment["sha256"]
    (run / "env.json").write_text(json.dumps(sealed({**environment, **values})))
