"""Presets: what they set, beside what was published; what they refuse, and what is said of them."""

from __future__ import annotations

import pytest
import torch

from wan_core.config import VARIANTS, PerExpert
from wan_core.errors import WanError
from wan_core.sampling.presets import PRESETS, check_distilled, replaced, uneven
from wan_core.sampling.schedules import schedule

# As published: solver, the sigmas that are walked, and the timesteps that the model is told.
LIGHTX2V = (1.0, 0.9375, 5 / 6, 0.625, 0.0)
RCM = (0.933781, 0.852895, 0.608979, 0.0)
PUBLISHED = {
    "LightX2V-4step": ("euler", LIGHTX2V),
    "Self-Forcing-4step": ("lcm", LIGHTX2V),
    "rCM-T2V-4step": ("lcm", (0.987654, *RCM)),
    "rCM-T2V-4step-ODE": ("euler", (0.987654, *RCM)),
    "rCM-I2V-4step": ("lcm", (0.995025, *RCM)),
    "rCM-I2V-4step-ODE": ("euler", (0.995025, *RCM)),
}


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items())
def test_sigmas_are_the_published_ones(name: str, expected: tuple):
    preset, (solver, sigmas) = PRESETS[name], expected
    assert preset.timetable().sigmas.tolist() == pytest.approx(sigmas, abs=5e-7)
    assert (preset.solver, preset.guidance, preset.distilled) == (solver, PerExpert(1, 1), True)


@pytest.mark.parametrize(
    ("name", "told", "shift"),
    [
        ("FastWan-1.3B-3step", (1000, 757, 522), 8),
        ("FastWan-5B-3step", (1000, 757, 522), 5),
        ("CausVid-9step", (999, 934, 862, 756, 603, 410, 250, 140, 74), 1),
    ],
)
def test_timesteps_are_the_published_ones(name: str, told: tuple, shift: float):
    preset = PRESETS[name]
    assert preset.timetable().timesteps.tolist() == list(told)
    assert (preset.solver, preset.shift, preset.guidance) == ("lcm", shift, PerExpert(1, 1))


def test_official_presets_are_the_variants_own():
    for variant in VARIANTS.values():
        preset = PRESETS[variant.display_name.removeprefix("Wan2.2 ")]
        assert (preset.steps, preset.guidance, preset.shift) == (variant.steps, variant.guidance, variant.shift)
        assert (preset.solver, preset.schedule, preset.distilled) == ("unipc", "auto", False)
        assert preset.stranger(variant) is None


def test_what_is_said_of_a_preset():
    said = PRESETS["LightX2V-4step"].described()
    assert said == "solver euler, schedule simple, 4 steps, shift 5, cfg 1, noise levels 1, 0.9375, 0.8333, 0.625, 0"
    assert "cfg 4 (high noise) and 3 (low noise)" in PRESETS["T2V-A14B"].described()
    assert "shift" not in PRESETS["rCM-T2V-4step"].described() and "shift" not in PRESETS["rCM-T2V-4step"].values


def test_another_model_is_said_and_any_goes_where_the_lora_decides():
    assert "made for Wan2.2 TI2V-5B; the model is Wan2.2 T2V" in PRESETS["FastWan-5B-3step"].stranger(
        VARIANTS["t2v-A14B"]
    )
    assert all(PRESETS["LightX2V-4step"].stranger(variant) is None for variant in VARIANTS.values())


def test_what_was_given_beside_a_preset_is_found():
    given = {"steps": 20, "shift": 5.0, "solver": "euler", "seed": 3}
    assert replaced(PRESETS["LightX2V-4step"], given) == {"steps": 20}


@pytest.mark.parametrize(("shift", "boundary", "split"), [(5, 0.875, (2, 2)), (8, 0.875, (3, 1)), (7, 0.875, (3, 1))])
def test_three_and_one_is_said(shift: float, boundary: float, split: tuple[int, int]):
    """At shift 8 the third level, 0.889, and at shift 7 the third, 0.875 exactly, still belong to T2V's high expert."""
    along = schedule("simple", 4, shift)
    experts = ["high" if t >= 1000 * boundary else "low" for t in along.timesteps.tolist()]
    assert (experts.count("high"), experts.count("low")) == split
    said = uneven(experts, along)
    assert (said is None) == (split == (2, 2))
    if said:
        assert f"Of the 4 steps at shift {shift} the high-noise expert does 3 and the low-noise expert 1" in said
    assert uneven(["only"] * 4, along) is None and uneven(["high"] * 4, along) is not None


def test_guidance_is_refused_for_distilled_steps_alone():
    fastwan, simple = schedule("fastwan", 3, 8), schedule("simple", 4, 5)
    check_distilled(fastwan, "lcm", PerExpert(1, 1), pair=True)
    check_distilled(fastwan, "lcm", PerExpert(low=1, high=3), pair=False)  # there is no high-noise expert
    check_distilled(simple, "euler", PerExpert(3, 3), pair=True)  # whether a LoRA is distilled is not known here
    check_distilled(schedule("simple", 20, 5), "lcm", PerExpert(3, 3), pair=True)
    for along, solver in ((fastwan, "lcm"), (schedule("rcm-80", 4, 1), "euler"), (simple, "lcm")):
        with pytest.raises(WanError, match="distilled models.*guidance is 4 .* and 3 .*set it to 1"):
            check_distilled(along, solver, PerExpert(low=3, high=4), pair=True)
    with pytest.raises(WanError, match="guidance is 3: set"):
        check_distilled(fastwan, "lcm", PerExpert(low=3, high=1), pair=False)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_lcm_goes_on_to_the_identical_result(stop: int, tmp_path):
    """From a saved state, and with the noise drawn from seed and step: nothing else is kept."""
    from safetensors.torch import load_file, save_file

    from tests.core.test_denoise import Toy, normal, pair, walk
    from wan_core.media.geometry import noise
    from wan_core.sampling.denoise import Callbacks, RunState, denoise
    from wan_core.sampling.solvers import step_seed

    def fresh(step: int) -> torch.Tensor:
        return noise(step_seed(5, step), normal(0).shape)

    def sampled(begin: torch.Tensor | RunState) -> tuple[RunState, list[RunState]]:
        states: list[RunState] = []
        run = walk("lcm", PRESETS["rCM-T2V-4step"].timetable(), fresh=fresh)
        keep = Callbacks(on_step=lambda report: states.append(report.state))
        return denoise(begin, pair(Toy(), Toy(0.8)), run, keep), states

    whole, states = sampled(normal(0))
    save_file(states[stop - 1].to_tensors(), tmp_path / "state.safetensors")
    again, _ = sampled(RunState.from_tensors(load_file(tmp_path / "state.safetensors")))
    assert torch.equal(again.x, whole.x) and not torch.equal(states[0].x, whole.x)
