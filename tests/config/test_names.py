"""The names of the configuration are exactly those that the mathematics has functions for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dtrain.algorithm.losses import LOSSES as LOSS_FUNCTIONS
from dtrain.algorithm.losses import mean_of_batch
from dtrain.algorithm.metrics.named import FROM_LOSS, metric_named
from dtrain.algorithm.metrics.named import METRICS as METRIC_FUNCTIONS
from dtrain.algorithm.schedules import SCHEDULES as SCHEDULE_FUNCTIONS
from dtrain.config.names import IGNORED_CLASS, LABEL_LOSSES, LOSSES, METRICS, SCHEDULES


def test_every_loss_has_a_function_and_every_function_is_a_loss():
    assert set(LOSSES) == LOSS_FUNCTIONS.keys()


def test_every_metric_has_a_function_and_every_function_is_a_metric():
    assert {name for name, facts in METRICS.items() if facts.from_loss} == FROM_LOSS.keys()
    assert {name for name, facts in METRICS.items() if not facts.from_loss} == METRIC_FUNCTIONS.keys()


def test_losses_and_metrics_of_labels_leave_out_the_ignored_class():
    labels, numbers = torch.tensor([0, 1, IGNORED_CLASS]), torch.tensor([0.0, 1.0, 5.0])
    for name in LOSSES:
        outputs = torch.eye(3) if name == "cross_entropy" else numbers
        whole, part = LOSS_FUNCTIONS[name](outputs, labels), LOSS_FUNCTIONS[name](outputs[:2], labels[:2])
        left_out = mean_of_batch(whole, 3).value.isclose(mean_of_batch(part, 2).value)
        assert bool(left_out) == (name in LABEL_LOSSES)
    for name, facts in METRICS.items():
        if not facts.from_loss and not facts.needs_climate:
            metric = metric_named(name)
            whole, part = metric.of_batch(numbers, labels), metric.of_batch(numbers[:2], labels[:2])
            is_alike = all(np.array_equal(*arrays) for arrays in zip(whole, part, strict=True))
            assert is_alike == facts.of_labels


@pytest.mark.parametrize("classes", [1, 7])
def test_states_have_as_many_numbers_as_the_facts_say(classes):
    table = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for name, facts in METRICS.items():
        row = next(line for line in table.splitlines() if line.startswith("| `") and f"`{name}`" in line.split("|")[1])
        said = facts.floats_by_class or facts.floats
        assert row.split("|")[-2].strip() == (f"{said:,} a class" if facts.floats_by_class else str(said))
        assert row.split("|")[-3].strip() == ("more" if facts.higher_is_better else "less")
        if facts.from_loss:
            continue
        if facts.of_labels and classes > 1:
            pair = torch.zeros(5, classes), torch.zeros(5, dtype=torch.int64)
        else:
            pair = torch.zeros(5, 2), torch.zeros(5, 2)
        more = {"climate": torch.zeros(5, 2)} if facts.needs_climate else {}
        numbers = sum(part.size for part in metric_named(name).of_batch(*pair, **more))
        assert numbers == facts.floats + facts.floats_by_class * classes


def test_every_schedule_has_a_function_and_every_function_is_a_schedule():
    assert set(SCHEDULES) == SCHEDULE_FUNCTIONS.keys()
    assert all(schedule(0, 10) == 1.0 for schedule in SCHEDULE_FUNCTIONS.values())


def test_names_are_known_without_torch():
    code = "import sys, dtrain.config.schema; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
