"""A plan as plan.json keeps it: numbers, texts, and lists of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dtrain.data.plan.blocks import BlockAxis
from dtrain.data.plan.units import LATER, DataPlan


def plan_table(plan: DataPlan) -> dict[str, Any]:
    """Return the fields of a plan; without later fields it is a plan that an earlier version can read."""
    table = {name: value for name, value in asdict(plan).items() if name not in LATER or value != LATER[name]}
    return {**table, "jumps": plan.jump_rows.tolist()} if plan.jumps else table


def plan_from(values: Mapping[str, Any]) -> DataPlan:
    """Return the plan of which `plan_table` has returned the fields."""
    absent = tuple((start, stop) for start, stop in values.get("absent", ()))
    jumps = " ".join(map(str, values.get("jumps", ())))
    blocks = tuple(BlockAxis(**axis) for axis in values.get("blocks", ()))
    members = tuple((begin, first, stop) for begin, first, stop in values.get("members", ()))
    most = tuple(values.get("values", ()))
    lists = {"absent": absent, "jumps": jumps, "blocks": blocks, "members": members, "values": most}
    return DataPlan(**{**values, **lists})
