"""The global state that a task finds and leaves."""

from __future__ import annotations

import random

import numpy as np
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


def test_nothing_is_kept_of_a_task() -> None:
    """torch.manual_seed keeps a call, with its stack, where there is no GPU: workers would grow with each task."""
    if not torch.cuda.is_available():
        kept = [len(getattr(kind, "_queued_calls", ())) for kind in (torch.cuda, torch.xpu, torch.mtia)]
        for seed in range(3):
            with isolated(seed, threads=1):
                pass
        assert kept == [len(getattr(kind, "_queued_calls", ())) for kind in (torch.cuda, torch.xpu, torch.mtia)]
