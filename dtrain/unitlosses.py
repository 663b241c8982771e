"""The losses of units, with what is known of each: from the streams that were evaluated to a data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.algorithm.evaluate import Term
from dtrain.data.located import Location, locate
from dtrain.data.plan.units import Box
from dtrain.runtime.resident import Stream
from dtrain.urls import redacted_url

if TYPE_CHECKING:
    from dtrain.report.partitions import Partitions


def partitions_of(streams: Sequence[Stream], losses: Sequence[Sequence[Term]], replicas: int) -> Partitions:
    """Return the losses of units as a data set, in the order of stores and rows.

    Parameters
    ----------
    streams : sequence of Stream
        The partitions of the replicas, then the held-out pieces.
    losses : sequence of sequence of (sum, count)
        By stream, of each of its parts.
    replicas : int
    """
    from dtrain.report.partitions import Partitions, scores

    rows: list[dict[str, Any]] = []
    for number, (stream, terms) in enumerate(zip(streams, losses, strict=True)):
        partition = number if number < replicas else -1
        split = "train" if number < replicas else stream.key[0]
        boxes = [stream.partition.box(part) for part in range(len(terms))]
        sizes = stream.partition.part_sizes.tolist()
        for box, term, samples, place in zip(boxes, terms, sizes, _located(stream, boxes), strict=True):
            rows.append(
                {
                    "loss": term[0] / term[1] if term[1] else math.nan,
                    "samples": samples,
                    "split": split,
                    "partition": partition,
                    "store": place.store,
                    "first_row": place.first,
                    "last_row": place.last,
                    "start": place.start,
                    "stop": place.stop,
                    "box": ", ".join(f"{dim} {start}:{stop}" for dim, start, stop in box.block),
                    "object": place.object,
                }
            )
    rows.sort(key=lambda row: (row["store"], row["first_row"], row["box"]))
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    columns = {"loss": columns["loss"], "score": scores(columns["loss"]), **columns}
    return Partitions({n: ("unit", v) for n, v in columns.items()}, coords={"unit": np.arange(len(rows))})


def _located(stream: Stream, boxes: Sequence[Box]) -> list[Location]:
    """Return where boxes lie; of a store that only its own workers may read, rows alone."""
    samples = stream.source.samples
    if stream.source.workers:
        return [Location(redacted_url(samples.path), box.start, box.stop - 1) for box in boxes]
    return locate(samples, boxes)
