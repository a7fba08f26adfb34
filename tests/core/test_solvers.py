"""Solvers over whole trajectories: against diffusers, the official code's numbers, and mathematics."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from wan_core.sampling.schedules import Schedule, from_sigmas, schedule
from wan_core.sampling.solvers import SOLVERS, History

THEIRS = {"unipc": UniPCMultistepScheduler, "dpm++": DPMSolverMultistepScheduler}


def noise() -> Tensor:
    return torch.randn(2, 4, 3, 6, 5, generator=torch.Generator().manual_seed(1))


def velocity(x: Tensor, timestep: float) -> Tensor:
    """Bent, coupled across channels, and different at every timestep."""
    mixed = x.roll(1, dims=1) * 0.8 - x.roll(2, dims=1) * 0.5
    return torch.tanh(1.5 * mixed + timestep / 1000) + 0.5 * torch.sin(3 * x) + 0.8 * (x - 0.3)


def solve(name: str, x: Tensor, along: Schedule, field=velocity) -> Tensor:
    history = History()
    for i in range(along.steps):
        x, history = SOLVERS[name](x, i, along, lambda x, i: field(x, along.timesteps[i].item()), history)
    return x


def diffusers_run(name: str, x: Tensor, along: Schedule) -> Tensor:
    scheduler = THEIRS[name](prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(along.steps)
    scheduler.sigmas = along.sigmas.float()
    scheduler.timesteps = torch.arange(along.steps)  # only a counter here: the field takes ours
    for i in scheduler.timesteps:
        x = scheduler.step(velocity(x, along.timesteps[i].item()), i, x).prev_sample
    return x


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("grid", ["auto", "diffusers"])
@pytest.mark.parametrize(("steps", "shift"), [(1, 5), (2, 5), (3, 1), (8, 3), (14, 12), (15, 12), (40, 5)])
def test_trajectories_agree_with_diffusers(name: str, grid: str, steps: int, shift: float):
    along = schedule(grid, steps, shift, solver=name)
    assert relative(solve(name, noise(), along), diffusers_run(name, noise(), along)) <= 5e-6


# Ends of whole runs of the official FlowUniPCMultistepScheduler (wan/utils/fm_solvers_unipc.py) and
# FlowDPMSolverMultistepScheduler (wan/utils/fm_solvers.py) from START with v = tanh(2x) + t/1000 sin(3x) - 0.3.
START = (1.0, -0.5, 2.0, 0.25)
OFFICIAL = [
    ("unipc", 6, 3.0, (0.107740939, 0.112662725, 1.64137101, 0.0961869061)),
    ("unipc", 20, 12.0, (0.104816765, 0.113523602, 1.64127374, 0.0953731984)),
    ("dpm++", 6, 3.0, (0.107570231, 0.111993596, 1.64160979, 0.0964402184)),
    ("dpm++", 20, 12.0, (0.102923423, 0.114132367, 1.64196527, 0.095097594)),
]


@pytest.mark.parametrize(("name", "steps", "shift", "expected"), OFFICIAL)
def test_trajectories_agree_with_the_official_code(name: str, steps: int, shift: float, expected: tuple):
    start = torch.tensor(START).view(1, 1, 1, 1, 4)
    along = schedule("auto", steps, shift, solver=name)
    made = solve(name, start, along, lambda x, t: torch.tanh(2 * x) + t / 1000 * torch.sin(3 * x) - 0.3)
    assert relative(made.flatten(), torch.tensor(expected)) <= 1e-6


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("grid", ["unipc", "dpm++", "simple"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_straight_flow_is_walked_exactly(name: str, grid: str, steps: int):
    data, start = torch.full((1, 4, 1, 2, 2), 0.7), noise()[:1, :, :1, :2, :2]
    along = schedule(grid, steps, 5)
    sigma = along.sigmas[0].item()
    x = sigma * start + (1 - sigma) * data
    made = solve(name, x, along, lambda x, t: start - data)
    torch.testing.assert_close(made, data, rtol=0, atol=2e-6)


def end_error(name: str, steps: int) -> float:
    """Against the exact solution of dx/dsigma = x cos(3 sigma) from sigma 0.9 to 0.1, in float64."""
    sigmas = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
    along = Schedule("even", sigmas, sigmas[:-1] * 1000)
    made = solve(name, torch.ones(1, dtype=torch.float64), along, lambda x, t: x * math.cos(3 * t / 1000))
    return abs(made.item() - math.exp((math.sin(0.3) - math.sin(2.7)) / 3))


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2), ("unipc", 2)])
def test_order_of_convergence(name: str, order: int):
    """Heun's one Euler step at the end has a local error of order two, so it costs no order."""
    coarse, fine = end_error(name, 80), end_error(name, 160)
    assert math.log2(coarse / fine) >= order - 0.05


def test_heun_asks_twice_but_for_the_last_step():
    asked = []
    along = schedule("unipc", 4, 5)
    history = History()
    x = noise()
    for i in range(along.steps):
        x, history = SOLVERS["heun"](x, i, along, lambda x, i: asked.append(i) or velocity(x, 0), history)
    assert asked == [0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", SOLVERS)
def test_sigmas_that_stop_early_leave_noise(name: str):
    """Two runs over the halves of one list of sigmas; the second-order step at the cut must not divide by zero."""
    along = schedule("dpm++", 10, 5)
    made = solve(name, noise(), from_sigmas(along.sigmas[:6]))
    assert torch.isfinite(made).all()
    assert torch.isfinite(solve(name, made, from_sigmas(along.sigmas[5:]))).all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("stop", [1, 2, 6])
def test_a_saved_history_goes_on_bit_for_bit(name: str, stop: int, tmp_path):
    from safetensors.torch import load_file, save_file

    along = schedule("auto", 7, 5, solver=name)
    x, history = noise(), History()
    for i in range(along.steps):
        if i == stop:
            save_file({"sample": x, **history.to_tensors()}, tmp_path / "run.safetensors")
            saved = load_file(tmp_path / "run.safetensors")
            x, history = saved.pop("sample"), History.from_tensors(saved)
        x, history = SOLVERS[name](x, i, along, lambda x, i: velocity(x, along.timesteps[i].item()), history)
    assert torch.equal(x, solve(name, noise(), along))


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_stay_float32_and_the_input_is_left_alone(name: str):
    x = noise()
    made = solve(name, x, schedule("auto", 3, 5, solver=name))
    assert made.dtype == torch.float32
    assert torch.equal(x, noise())
