"""Which expert works when."""

from __future__ import annotations

import pytest

from wan_core.config import VARIANTS
from wan_core.errors import WanError
from wan_core.sampling.experts import Expert, Experts, Switch
from wan_core.sampling.schedules import from_sigmas, schedule

AUTO = Switch()


def pair(boundary: float | None = 0.875, switch: Switch = AUTO) -> Experts:
    return Experts(Expert(None, 4.0, "high"), Expert(None, 3.0, "low"), boundary, switch)


def high_steps(experts: Experts, along) -> int:
    names = experts.names(along)
    count = names.count("high")
    assert names == ["high"] * count + ["low"] * (along.steps - count)
    return count


# Steps whose timestep is at or above the boundary, counted in the official schedulers' timesteps.
@pytest.mark.parametrize(
    ("task", "solver", "count"),
    [("t2v-A14B", "unipc", 26), ("t2v-A14B", "dpm++", 26), ("i2v-A14B", "unipc", 15), ("i2v-A14B", "dpm++", 15)],
)
def test_the_variant_s_own_boundary(task: str, solver: str, count: int):
    row = VARIANTS[task]
    assert high_steps(pair(row.boundary), schedule("auto", row.steps, row.shift, solver=solver)) == count


def test_the_boundary_itself_is_high_and_counts_in_told_timesteps():
    along = from_sigmas([0.9, 0.875, 0.874, 0.0])
    assert pair(0.875).names(along) == ["high", "high", "low"]
    official = schedule("unipc", 100, 2)
    assert official.timesteps[22] == 875 and official.sigmas[22] > 0.8755
    assert pair(0.875).at(22, official).name == "high"
    assert pair(0.8755).at(22, official).name == "low"


@pytest.mark.parametrize(
    ("switch", "count"),
    [
        (Switch("timestep", 0.5), 6),
        (Switch("timestep", 0), 10),
        (Switch("timestep", 1), 1),
        (Switch("step", 0), 0),
        (Switch("step", 3), 3),
        (Switch("step", 99), 10),
        (Switch("snr", 0), 0),
        (Switch("snr", 1), 5),
        (Switch("snr", float("inf")), 10),
    ],
)
def test_explicit_switches(switch: Switch, count: int):
    """Even sigmas 1, 0.9 … 0.1: SNR = ((1 - sigma) / sigma)^2 reaches 1 at sigma 0.5, the sixth."""
    even = from_sigmas([1 - i / 10 for i in range(11)])
    assert high_steps(pair(switch=switch), even) == count


def test_each_expert_brings_its_guidance():
    along = schedule("unipc", 10, 12)
    experts = pair()
    assert (experts.at(0, along).guidance, experts.at(9, along).guidance) == (4.0, 3.0)


def test_a_dense_model_is_both():
    along = schedule("unipc", 5, 5)
    assert set(Experts.dense(None, 5.0).names(along)) == {"only"}


@pytest.mark.parametrize(
    ("mode", "value", "message"),
    [
        ("timestep", None, "fraction"),
        ("timestep", 875, "0 to 1"),
        ("step", -1, "0 or more"),
        ("step", 2.5, "step number"),
        ("snr", -1, "0 or more"),
        ("timestep", float("nan"), "fraction"),
    ],
)
def test_bad_values_are_refused(mode: str, value: float | None, message: str):
    with pytest.raises(WanError, match=message):
        Switch(mode, value)


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(WanError, match="'steps'.*auto, timestep, step, snr.*mean 'step'"):
        Switch("steps", 3)


def test_auto_needs_a_boundary():
    with pytest.raises(WanError, match="no boundary"):
        pair(None)
