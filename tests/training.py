"""Short runs for tests, and what is compared of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import dtrain


def shas(run: dtrain.Run) -> list[str]:
    """The digest of the parameters after each round."""
    return [row["params_sha256"] for row in run.rows]


def bits(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a history without what may differ from one time to the next."""
    return [{k: v for k, v in row.items() if k != "retried" and not k.startswith("seconds")} for row in rows]


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
