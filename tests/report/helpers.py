"""The result of a round, as reports see it."""

from __future__ import annotations

from dtrain.types import Contribution, RoundResult


def result_of(number=1, **changes):
    contributions = tuple(
        Contribution(
            replica=k,
            samples=10,
            steps=2,
            loss_sum=5.0,
            loss_count=40,
            finite=True,
            units_decoded=1,
            bytes_read=100,
            seconds=0.1 * (k + 1),
            waited=0.05 * k,
            fetch=0.03 * k,
            decode=0.02 * k,
            gather=0.01 * k,
            process=f"host:{k}",
            update_norm=1.5 + k,
        )
        for k in range(2)
    )
    values = {
        "round": number,
        "train_loss": 0.5,
        "metrics": {"val_loss": 0.75, "val_accuracy": 0.875},
        "samples": 20,
        "steps": 4,
        "seconds": 1.23456789,
        "bytes_reduced": 800,
        "rejected": 0,
        "retried": 1,
        "params_sha256": "ab" * 32,
        "replica_loss": (0.25, 0.75),
        "contributions": contributions,
        "update_cosine": 0.5,
        "reduce_seconds": 0.01,
        "evaluate_seconds": 0.25,
        "state": None,
    }
    return RoundResult(**{**dict.fromkeys(RoundResult.__dataclass_fields__), **values, **changes})
