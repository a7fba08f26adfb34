"""Solvers over whole trajectories: against diffusers, the official code's numbers, and mathematics."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from wan_core.sampling.schedules import Schedule, from_sigmas, schedule
from wan_core.sampling.solvers import RENOISES, SOLVERS, History, step_seed

FLOWS = [name for name in SOLVERS if name not in RENOISES]  # that draw no noise of their own
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
        x, history = stepped(name, x, i, along, field, history)
    return x


def stepped(name: str, x: Tensor, i: int, along: Schedule, field, history: History) -> tuple[Tensor, History]:
    options = {"fresh": fresh} if name in RENOISES else {}
    return SOLVERS[name](x, i, along, lambda x, i: field(x, along.timesteps[i].item()), history, **options)


def fresh(step: int) -> Tensor:
    return torch.randn(noise().shape, generator=torch.Generator().manual_seed(100 + step))


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


# --- lcm, which noises anew

FEW = [("simple", 4, 5), ("self-forcing", 4, 5), ("fastwan", 3, 8), ("rcm-80", 4, 1), ("rcm-200", 2, 1)]


@pytest.mark.parametrize(("grid", "steps", "shift"), FEW)
def test_lcm_agrees_with_diffusers_flow_match_lcm(grid: str, steps: int, shift: float, monkeypatch):
    """Its scheduler with our sigmas and our noise: 1e-6 of the largest value."""
    from diffusers import FlowMatchLCMScheduler
    from diffusers.schedulers import scheduling_flow_match_lcm as theirs

    along = schedule(grid, steps, shift)
    scheduler = FlowMatchLCMScheduler()
    scheduler.set_timesteps(sigmas=along.sigmas[:-1].tolist())
    drawn = iter(range(steps))
    monkeypatch.setattr(theirs, "randn_tensor", lambda *_, **__: fresh(next(drawn)))
    x = noise()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, along.timesteps[i].item()), t, x).prev_sample
    assert relative(solve("lcm", noise(), along), x) <= 1e-6


@pytest.mark.parametrize(("grid", "steps", "shift"), FEW)
def test_lcm_agrees_with_comfyuis(grid: str, steps: int, shift: float, in_comfyui):
    """Its sample_lcm on its flow sampling, with the noise of ours: 1e-6 of the largest value."""
    along = schedule(grid, steps, shift)
    theirs = in_comfyui(
        """
        from types import SimpleNamespace
        from comfy import model_sampling
        from comfy.k_diffusion.sampling import sample_lcm
        class Sampling(model_sampling.ModelSamplingDiscreteFlow, model_sampling.CONST): ...
        sampling, sigmas, told = Sampling(), inputs["sigmas"].float(), inputs["told"]
        class Model:
            inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))
            def __call__(self, x, sigma):
                step = (sigmas == sigma[0]).nonzero().item()
                mixed = x.roll(1, dims=1) * 0.8 - x.roll(2, dims=1) * 0.5
                v = torch.tanh(1.5 * mixed + told[step].item() / 1000) + 0.5 * torch.sin(3 * x) + 0.8 * (x - 0.3)
                return sampling.calculate_denoised(sigma, v, x)
        drawn = iter(inputs["noise"])
        outputs["x"] = sample_lcm(Model(), inputs["x"], sigmas, disable=True, noise_sampler=lambda *_: next(drawn))
        """,
        sigmas=along.sigmas,
        told=along.timesteps,
        x=noise(),
        noise=[fresh(i) for i in range(steps)],
    )["x"]
    assert relative(solve("lcm", noise(), along), theirs) <= 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize(("solver", "sigma_max"), [("lcm", 80), ("euler", 80), ("lcm", 200), ("euler", 200)])
def test_rcm_agrees_with_its_formulas_in_float64(solver: str, sigma_max: int, steps: int):
    """The whole sampler by the published formulas, in float64 as TurboDiffusion computes it: ours differs by 1e-6."""
    angles = [math.atan(sigma_max), 1.5, 1.4, 1.0][:steps] + [0.0]
    levels = [math.sin(a) / (math.cos(a) + math.sin(a)) for a in angles]
    x = noise().double() * levels[0]
    for i, (s, following) in enumerate(zip(levels, levels[1:], strict=False)):
        v = velocity(x.float(), s * 1000).double()
        if solver == "lcm":
            x = (1 - following) * (x - s * v) + following * fresh(i).double()
        else:
            x = x - (s - following) * v
    along = schedule(f"rcm-{sigma_max}", steps, 1)
    assert relative(solve(solver, along.first(noise()), along), x.float()) <= 2e-6


def test_lcms_noise_depends_on_seed_and_step_alone():
    seeds = {step_seed(seed, step) for seed in (0, 1, 2**64 - 1) for step in range(50)}
    assert len(seeds) == 150 and step_seed(7, 3) == step_seed(7, 3)
    assert all(0 <= seed < 2**64 for seed in seeds) and not seeds & {0, 1, 2**64 - 1}


def test_lcm_without_noise_is_a_mistake_of_the_caller():
    along = schedule("simple", 4, 5)
    with pytest.raises(ValueError, match="fresh noise"):
        SOLVERS["lcm"](noise(), 0, along, lambda x, i: x, History())


@pytest.mark.parametrize("name", FLOWS)
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
        x, history = stepped(name, x, i, along, velocity, history)
    assert torch.equal(x, solve(name, noise(), along))


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_stay_float32_and_the_input_is_left_alone(name: str):
    x = noise()
    made = solve(name, x, schedule("auto", 3, 5, solver=name))
    assert made.dtype == torch.float32
    assert torch.equal(x, noise())
