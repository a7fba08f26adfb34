"""Grids against the official code, diffusers and ComfyUI, and what is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from wan_core.errors import WanError
from wan_core.sampling.schedules import FIXED, SCHEDULES, from_sigmas, schedule, truncate

# First, second and last sigma and timestep, and how many steps belong to the high-noise expert at 0.875, as printed by
# the official wan/utils/fm_solvers_unipc.py (set_timesteps) and fm_solvers.py (get_sampling_sigmas).
OFFICIAL = [
    ("unipc", 40, 12.0, (0.999916613, 0.997782648, 0.235109538), (999, 997, 235), 26),
    ("unipc", 40, 5.0, (0.999799848, 0.994694769, 0.11353305), (999, 994, 113), 17),
    ("unipc", 50, 5.0, (0.999799848, 0.995732367, 0.0925068557), (999, 995, 92), 21),
    ("dpm++", 40, 12.0, (1.0, 0.997867823, 0.235294119), (1000, 997, 235), 26),
    ("dpm++", 40, 5.0, (1.0, 0.994897962, 0.113636367), (1000, 994, 113), 17),
    ("dpm++", 50, 5.0, (1.0, 0.995934963, 0.0925925896), (1000, 995, 92), 21),
]


@pytest.mark.parametrize(("solver", "steps", "shift", "sigmas", "timesteps", "high"), OFFICIAL)
def test_official_grids(solver: str, steps: int, shift: float, sigmas: tuple, timesteps: tuple, high: int):
    made = schedule("auto", steps, shift, solver=solver)
    assert made.name == solver
    assert made.steps == steps
    assert torch.equal(made.sigmas[[0, 1, -2]].float(), torch.tensor(sigmas))
    assert made.sigmas[-1] == 0
    assert made.timesteps[[0, 1, -1]].tolist() == list(timesteps)
    assert (made.timesteps >= 875).sum() == high


FREE = [name for name in SCHEDULES if name not in FIXED]  # of any number of steps


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_every_grid_falls_to_zero_in_float32_values(name: str, steps: int):
    made = schedule(name, steps, 5)
    assert made.sigmas.shape == (steps + 1,) and made.timesteps.shape == (steps,)
    assert (made.sigmas.diff() < 0).all() and made.sigmas[-1] == 0
    assert torch.equal(made.sigmas, made.sigmas.float().double())
    assert (made.timesteps - made.sigmas[:-1] * 1000).abs().max() <= 1


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (4, 1.0), (13, 3.0), (40, 12.0), (50, 5.0)])
def test_diffusers_grid_is_diffusers(steps: int, shift: float):
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    theirs.set_timesteps(steps)
    ours = schedule("diffusers", steps, shift)
    assert torch.equal(ours.sigmas.float(), theirs.sigmas)
    assert torch.equal(ours.timesteps.long(), theirs.timesteps)


COMFY_CASES = [(1, 8.0, 1.0), (4, 5.0, 1.0), (20, 8.0, 1.0), (30, 1.0, 1.0),
               (7, 3.0, 0.5), (20, 12.0, 0.37), (1000, 5.0, 1.0)]  # fmt: skip


def test_simple_and_denoise_are_comfyui_s(in_comfyui):
    theirs = in_comfyui(
        """
        from types import SimpleNamespace
        from comfy import model_sampling, samplers
        for steps, shift, denoise in inputs["cases"]:
            sampling = model_sampling.ModelSamplingDiscreteFlow()
            sampling.set_parameters(shift=shift)
            model = SimpleNamespace(get_model_object=lambda name: sampling)
            picked = samplers.KSampler(model, steps, "cpu", "euler", "simple", denoise=denoise).sigmas
            outputs[(steps, shift, denoise)] = picked, sampling.timestep(picked)
        """,
        cases=COMFY_CASES,
    )
    for (steps, shift, denoise), (sigmas, timesteps) in theirs.items():
        ours = schedule("simple", steps, shift, denoise=denoise)
        assert torch.equal(ours.sigmas, sigmas.double())
        assert torch.equal(ours.timesteps, timesteps[:-1].double())
        same = from_sigmas(sigmas)
        assert torch.equal(same.sigmas, ours.sigmas) and torch.equal(same.timesteps, ours.timesteps)


@pytest.mark.parametrize("name", FREE)
def test_denoise_keeps_the_end_of_a_finer_schedule(name: str):
    whole = schedule(name, 20, 5)
    half = truncate(whole, 0.5)
    finer = schedule(name, 40, 5)
    assert half.steps == 20
    assert torch.equal(half.sigmas, finer.sigmas[20:]) and torch.equal(half.timesteps, finer.timesteps[20:])
    assert truncate(whole, 1.0) is whole


@pytest.mark.parametrize("denoise", [0, -0.1, 1.01, float("nan")])
def test_denoise_outside_its_range_is_refused(denoise: float):
    with pytest.raises(WanError, match="more than 0 and at most 1"):
        schedule("unipc", 10, 5, denoise=denoise)


def test_a_user_s_sigmas_may_stop_early_but_not_be_stretched():
    made = from_sigmas([1.0, 0.9, 0.5])
    assert made.steps == 2 and made.timesteps.tolist() == pytest.approx([1000, 900])
    with pytest.raises(WanError, match="cut the sigmas"):
        truncate(made, 0.5)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([], "no step"),
        ([1.0], "no step"),
        ([1.0, 0.5, 0.5], "fall at every step"),
        ([0.2, 0.4], "fall at every step"),
        ([14.6, 3.0, 0.0], "within 0..1"),
        ([1.0, float("nan"), 0.0], "within 0..1"),
    ],
)
def test_sigmas_that_are_no_flow_schedule_are_refused(sigmas: list, message: str):
    with pytest.raises(WanError, match=message):
        from_sigmas(sigmas)


@pytest.mark.parametrize(
    ("steps", "shift", "message"),
    [
        (0, 5, "at least 1"),
        (-3, 5, "at least 1"),
        (4, 0, "above 0"),
        (4, -1, "above 0"),
        (4, float("nan"), "above 0"),
        (1001, 5, "fewer steps"),
    ],
)
def test_bad_numbers_are_refused(steps: int, shift: float, message: str):
    with pytest.raises(WanError, match=message):
        schedule("simple", steps, shift)


def test_an_unknown_schedule_names_the_known_ones():
    with pytest.raises(WanError, match=r"'simpel'.*unipc, dpm\+\+, simple, diffusers, self-forcing.*mean 'simple'"):
        schedule("simpel", 10, 5)


# --- distilled models' own steps

FASTWAN, CAUSVID = (1000, 757, 522), (999, 934, 862, 756, 603, 410, 250, 140, 74)


def diffusers_table(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The thousand levels and timesteps of diffusers' FlowMatchEulerDiscreteScheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return scheduler.sigmas[:1000], scheduler.timesteps


@pytest.mark.parametrize(
    ("name", "shift", "published"), [("fastwan", 8, FASTWAN), ("fastwan", 5, FASTWAN), ("causvid", 1, CAUSVID)]
)
def test_lists_without_warp_are_the_published_ones(name: str, shift: float, published: tuple):
    """The model is told the list; the solver's sigma is the nearest of diffusers' table (float32: 1e-6)."""
    made = schedule(name, len(published), shift)
    assert made.timesteps.tolist() == list(published)
    levels, timesteps = diffusers_table(shift)
    nearest = torch.stack([levels[(timesteps - told).abs().argmin()] for told in published])
    torch.testing.assert_close(made.sigmas[:-1].float(), nearest, rtol=0, atol=1e-6)
    assert made.sigmas[-1] == 0


def test_warped_lists_are_the_published_ones():
    """Self-Forcing's 1000, 750, 500, 250 become 1000, 937.5, 833.33, 625: ComfyUI's simple at shift 5, to the bit."""
    made, simple = schedule("self-forcing", 4, 5), schedule("simple", 4, 5)
    assert made.timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    assert torch.equal(made.sigmas, simple.sigmas) and torch.equal(made.timesteps, simple.timesteps)
    levels, _ = diffusers_table(5)
    theirs = torch.stack([levels[1000 - place] for place in (1000, 750, 500, 250)])
    torch.testing.assert_close(made.sigmas[:-1].float(), theirs, rtol=0, atol=1e-6)


RCM = {"rcm-80": 0.987654, "rcm-200": 0.995025, "rcm-1600": 1600 / 1601}


@pytest.mark.parametrize(("name", "first"), RCM.items())
def test_rcms_levels_are_the_published_ones(name: str, first: float):
    made = schedule(name, 4, 1)
    assert made.sigmas.tolist() == pytest.approx([first, 0.933781, 0.852895, 0.608979, 0], abs=5e-7)
    assert made.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in made.sigmas[:-1].tolist()])
    noise = torch.randn(3)
    assert torch.equal(made.first(noise), noise * made.sigmas[0].item())  # a run begins with scaled noise
    assert schedule("simple", 4, 5).first(noise) is noise
    assert [schedule(name, steps, 1).sigmas[:-1].tolist() for steps in (1, 3)] == [
        made.sigmas[:1].tolist(),
        made.sigmas[:3].tolist(),
    ]


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [("fastwan", 4, "list of 3 steps, found 4.*to 3"), ("rcm-80", 5, "1 to 4 steps, found 5")],
)
def test_lists_have_their_own_number_of_steps(name: str, steps: int, message: str):
    with pytest.raises(WanError, match=message):
        schedule(name, steps, 5)


def test_lists_are_not_stretched():
    with pytest.raises(WanError, match="leave denoise at 1"):
        schedule("fastwan", 3, 8, denoise=0.5)
