"""The hand-over benchmark: where the experts change, and what it makes of distances."""

from __future__ import annotations

import pytest
import torch

from bench.handoff import CUSTOM, KSAMPLER, distance, high_steps, summarise, table
from wan_core.sampling.schedules import schedule


@pytest.mark.parametrize(("steps", "count"), [(4, 2), (10, 5), (20, 9)])
def test_experts_change_where_our_own_schedule_says(steps: int, count: int):
    """Of even steps 1 - i/n those with 5s / (1 + 4s) at or above 0.875, hence s at or above 0.5833."""
    assert high_steps(KSAMPLER, "euler", steps) == count
    assert (schedule("simple", steps, 5.0).timesteps >= 875).sum() == count


def test_a_grid_of_one_step_more_without_the_last_but_one():
    """Eleven steps are laid out for ten: five of them lie above, s = 1 - i/11."""
    assert high_steps(KSAMPLER, "uni_pc", 10) == 5
    assert (high_steps(KSAMPLER, "uni_pc", 7), high_steps(CUSTOM, "uni_pc", 7)) == (4, 3)


def test_distances_are_paired_by_seed():
    assert distance(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])) == pytest.approx(1 / 3 / 2**0.5)
    case = (CUSTOM, "uni_pc", 20)
    rows = summarise({(case, "one"): [0.1, 0.2], (case, "two"): [0.3, 0.4]})
    assert rows[0]["one_is_nearer"] == "2 of 2"
    assert rows[0]["two_over_one"] == {"mean": 2.5, "error": 0.5}
    assert "2.5000 ± 0.5000" in table(rows)
