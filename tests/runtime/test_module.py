"""The global state that a task finds and leaves."""

from __future__ import annotations

import random
import traceback

import numpy as np
import pytest
import torch

from dtrain.runtime.module import isolated


def drawn() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def test_a_task_draws_the_numbers_of_its_seed_and_leaves_those_of_others() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)[2].item()
    torch.manual_seed(1)
    before = torch.rand(2)
    with isolated(7, threads=1):
        first = drawn()
    with isolated(7, threads=1):
        assert drawn() == first
    torch.manual_seed(7)
    assert torch.rand(1).item() == first[0]  # as torch.manual_seed seeds the CPU
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), before)
    with isolated(8, threads=1):
        assert drawn() != first
    assert torch.rand(1).item() == expected


def test_a_task_does_not_collect_stacks_for_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed does, one for each kind of accelerator, which takes milliseconds."""
    if not torch.cuda.is_available():
        stacks: list[object] = []
        monkeypatch.setattr(traceback, "format_stack", lambda *arguments: stacks.append(arguments))
        with isolated(7, threads=1):
            pass
        assert stacks == []
