"""The loop: experts, given frames, inpainting, stopping and going on, and what is refused."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan_core.errors import WanError
from wan_core.sampling.denoise import SILENT, Callbacks, KnownLatent, Run, RunState, StepReport, denoise, noised
from wan_core.sampling.experts import Expert, Experts, Switch
from wan_core.sampling.guidance import Condition
from wan_core.sampling.schedules import Schedule, from_sigmas, schedule
from wan_core.sampling.solvers import SOLVERS

SHAPE = (2, 4, 3, 4, 5)  # two videos, because every rule must hold for each
POSITIVE, NEGATIVE = Condition(torch.full((2, 1, 1), 0.4)), Condition(torch.full((2, 1, 1), -0.2))


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Toy:
    """A velocity that mixes space and time; remembers what it was told."""

    def __init__(self, bend: float = 1.0):
        self.bend = bend
        self.calls: list[tuple[Tensor, Tensor, Condition]] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, on_block=None) -> Tensor:
        self.calls.append((x, t, condition))
        if on_block:
            on_block(0)
        t = t.view(x.shape[0], 1, -1, 1, 1)
        around = x.roll(1, dims=2) + x.roll(1, dims=3) - x.roll(1, dims=4)
        return torch.tanh(self.bend * around + condition.text.mean()) + x * t / 1000


AUTO = Switch()


def pair(high: Toy, low: Toy, guidance: tuple[float, float] = (4.0, 3.0), switch: Switch = AUTO) -> Experts:
    return Experts(Expert(high, guidance[0], "high"), Expert(low, guidance[1], "low"), 0.875, switch)


def walk(solver: str = "unipc", along: Schedule | None = None, **options) -> Run:
    along = along or schedule("auto", 6, 12, solver=solver)
    made = {"schedule": along, "solver": solver, "positive": POSITIVE, "negative": NEGATIVE, "fresh": fresh}
    return Run(**made | options)


def fresh(step: int) -> Tensor:
    """The noise of each step, for solvers that noise anew."""
    return normal(1000 + step)


def run(experts: Experts, solver: str = "unipc", callbacks: Callbacks = SILENT, **options) -> Tensor:
    return denoise(normal(0), experts, walk(solver, **options), callbacks).x


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("switch", [AUTO, Switch("step", 3), Switch("snr", 0.01)])
def test_twins_as_experts_equal_the_dense_run_bit_for_bit(solver: str, switch: Switch):
    """One solver state crosses the switch: nothing restarts there."""
    toy = Toy()
    twins = pair(toy, toy, (3.0, 3.0), switch)
    assert set(twins.names(schedule("auto", 6, 12, solver=solver))) == {"high", "low"}
    assert torch.equal(run(twins, solver), run(Experts.dense(toy, 3.0), solver))


def test_each_expert_works_on_its_side_with_its_guidance():
    high, low = Toy(1.0), Toy(0.5)
    run(pair(high, low, (4.0, 1.0), Switch("step", 2)))
    assert [c for _, _, c in high.calls] == [POSITIVE, NEGATIVE] * 2
    assert [c for _, _, c in low.calls] == [POSITIVE] * 4  # guidance 1: half the calls


def test_the_model_is_told_the_schedule_s_timestep_for_every_video():
    toy = Toy()
    run(Experts.dense(toy, 1.0))
    told = [t.tolist() for _, t, _ in toy.calls]
    assert told == [[t, t] for t in schedule("unipc", 6, 12).timesteps.tolist()]


def test_a_batch_is_its_videos_one_by_one():
    toy = Toy()
    both = run(Experts.dense(toy, 3.0))
    for i in range(2):
        sides = {"positive": Condition(POSITIVE.text[:1]), "negative": Condition(NEGATIVE.text[:1])}
        alone = denoise(normal(0)[i : i + 1], Experts.dense(toy, 3.0), walk(**sides)).x
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stopping_and_going_on_is_bit_identical(solver: str, stop: int, tmp_path: Path):
    experts = pair(Toy(), Toy(0.5))
    state = denoise(normal(0), experts, walk(solver, end=stop))
    save_file(state.to_tensors(), tmp_path / "run.safetensors")
    state = RunState.from_tensors(load_file(tmp_path / "run.safetensors"))
    assert state.step == stop and state.expert in ("high", "low")
    assert torch.equal(denoise(state, experts, walk(solver, start=stop)).x, run(experts, solver))
    assert torch.equal(denoise(state, experts, walk(solver)).x, run(experts, solver))  # of the whole run


def test_what_caches_keep_is_saved_and_dropped_at_the_switch():
    """The solver's history is not dropped there."""
    experts = pair(Toy(), Toy(0.5), switch=Switch("step", 3))
    state = denoise(normal(0), experts, walk(end=2))
    state = replace(state, kept={"cache": normal(1)})
    state = RunState.from_tensors(state.to_tensors())
    assert torch.equal(state.kept["cache"], normal(1))
    same = denoise(state, experts, walk(start=2, end=3))
    assert same.expert == "high" and torch.equal(same.kept["cache"], normal(1))
    other = denoise(same, experts, walk(start=3))
    assert other.expert == "low" and not other.kept
    assert torch.equal(other.x, run(experts))


def test_euler_may_go_on_without_history():
    experts = Experts.dense(Toy(), 3.0)
    x = denoise(normal(0), experts, walk("euler", schedule("unipc", 6, 12), end=4)).x
    x = denoise(x, experts, walk("euler", schedule("unipc", 6, 12), start=4, end=10_000)).x
    assert torch.equal(x, run(experts, "euler"))


def test_reports_tell_the_story_of_each_step():
    reports: list[StepReport] = []
    along = schedule("unipc", 6, 12)
    experts = pair(Toy(), Toy(), switch=Switch("step", 3))
    final = denoise(normal(0), experts, walk("unipc", along, start=2, end=5), Callbacks(reports.append)).x
    assert [(r.index, r.done, r.total, r.expert) for r in reports] == [
        (2, 1, 3, "high"),
        (3, 2, 3, "low"),
        (4, 3, 3, "low"),
    ]
    assert [r.sigma for r in reports] == along.sigmas[3:6].tolist()
    assert reports[-1].x is final
    assert reports[0].x0.shape == SHAPE


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_estimate_of_a_full_run_is_its_result(solver: str):
    reports: list[StepReport] = []
    final = run(Experts.dense(Toy(), 3.0), solver, Callbacks(reports.append))
    torch.testing.assert_close(reports[-1].x0, final, rtol=1e-5, atol=1e-6)


class Cancelled(Exception):
    pass


def test_a_callback_may_cancel():
    def cancel(_: object) -> None:
        raise Cancelled

    toy = Toy()
    with pytest.raises(Cancelled):
        run(Experts.dense(toy, 3.0), callbacks=Callbacks(on_block=cancel))
    assert len(toy.calls) == 1
    with pytest.raises(Cancelled):
        run(Experts.dense(toy, 3.0), callbacks=Callbacks(cancel))
    assert len(toy.calls) == 3


# --- TI2V: clean given frames


def first_frame_given(frames: int = 1) -> KnownLatent:
    mask = torch.ones(1, 1, *SHAPE[2:])
    mask[:, :, :frames] = 0
    return KnownLatent(normal(7), mask, clean=True)


def official_ti2v(toy: Toy, given: KnownLatent, steps: int, scale: float) -> Tensor:
    """The loop of the official textimage2video.py around Euler steps, which need no scheduler."""
    along = schedule("unipc", steps, 12)
    z, mask = given.latent, given.mask
    x = (1 - mask) * z + mask * normal(0)
    for i in range(steps):
        t = (mask[:, 0, :, 0, 0] * along.timesteps[i]).float().expand(2, -1)
        uncond = toy(x, t, NEGATIVE)
        v = uncond + scale * (toy(x, t, POSITIVE) - uncond)
        x = x + (along.sigmas[i + 1] - along.sigmas[i]).float() * v
        x = (1 - mask) * z + mask * x
    return x


@pytest.mark.parametrize("frames", [1, 2])
def test_given_frames_stay_clean_as_in_the_official_loop(frames: int):
    given, toy = first_frame_given(frames), Toy()
    reports: list[StepReport] = []
    along = schedule("unipc", 6, 12)
    made = denoise(normal(0), Experts.dense(toy, 3.0), walk("euler", along, known=given), Callbacks(reports.append)).x
    for x in [*(x for x, _, _ in toy.calls), *(r.x for r in reports), made]:
        assert torch.equal(x[:, :, :frames], given.latent[:, :, :frames])
    torch.testing.assert_close(made, official_ti2v(Toy(), given, 6, 3.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_given_frames_are_told_timestep_zero(solver: str):
    toy = Toy()
    made = run(Experts.dense(toy, 1.0), solver, known=first_frame_given())
    assert torch.equal(made[:, :, 0], normal(7)[:, :, 0])
    for _, t, _ in toy.calls:
        assert t.shape == (2, 3)
        assert (
            (t[:, 0] == 0).all()
            and (t[:, 1:] == t[0, 1]).all()
            and t[0, 1] in schedule("auto", 6, 12, solver=solver).timesteps
        )


def test_nothing_given_is_the_plain_run():
    nothing = KnownLatent(normal(7), torch.ones(1, 1, 1, 1, 1), clean=True)
    toy = Toy()
    assert torch.equal(run(Experts.dense(toy, 3.0), known=nothing), run(Experts.dense(toy, 3.0)))
    noisy = KnownLatent(normal(7), torch.ones(1, 1, 1, 1, 1), noise=normal(0))
    assert torch.equal(run(Experts.dense(toy, 3.0), known=noisy), run(Experts.dense(toy, 3.0)))


# --- inpainting


def hole() -> Tensor:
    mask = torch.zeros(1, 1, *SHAPE[2:])
    mask[..., 1:3, 2:] = 1
    return mask


@pytest.mark.parametrize("solver", SOLVERS)
def test_inpainting_shows_kept_places_at_the_step_s_noise_and_ends_clean(solver: str):
    toy, given = Toy(), KnownLatent(normal(7), hole(), normal(0))
    along = schedule("auto", 6, 12, solver=solver)
    made = run(Experts.dense(toy, 1.0), solver, known=given)
    kept = (hole() == 0).expand(SHAPE)
    for x, t, _ in toy.calls:
        i = along.timesteps.tolist().index(t[0].item())
        expected = noised(normal(7), normal(0), along.sigmas[i].item())
        torch.testing.assert_close(x[kept], expected[kept], rtol=0, atol=1e-6)
        assert t.shape == (2,)
    assert torch.equal(made[kept], normal(7)[kept])
    assert not torch.allclose(made[~kept], normal(7)[~kept], atol=0.1)


def test_kept_places_without_noise_are_our_own_mistake():
    with pytest.raises(ValueError, match="noise"):
        KnownLatent(normal(7), hole())


COMFY_MASK_RUN = """
from types import SimpleNamespace
from comfy import model_base, model_sampling
from comfy.k_diffusion.sampling import sample_euler
from comfy.samplers import KSamplerX0Inpaint

class Sampling(model_sampling.ModelSamplingDiscreteFlow, model_sampling.CONST):
    pass

sampling = Sampling()

def denoised(x, sigma, mask, clean):
    t = sampling.timestep(sigma).float()
    if clean:
        t = model_base.WAN22.process_timestep(None, t, x, denoise_mask=mask)
    around = x.roll(1, dims=2) + x.roll(1, dims=3) - x.roll(1, dims=4)
    v = torch.tanh(around + 0.4) + x * t.view(x.shape[0], 1, -1, 1, 1) / 1000
    return sampling.calculate_denoised(sigma, v, x)

for clean in (True, False):
    def inpaint(x, sigma, noise, latent_image, **_):  # newer versions also tell the mask
        if clean:
            return model_base.WAN22.scale_latent_inpaint(None, sigma, noise, latent_image)
        return sampling.noise_scaling(sigma.reshape(-1, 1, 1, 1, 1), noise, latent_image)
    model = lambda x, sigma, **_: denoised(x, sigma, inputs["mask"], clean)
    wrapped = KSamplerX0Inpaint(lambda *a, **k: model(*a), inputs["sigmas"])
    wrapped.inner_model = type("Model", (), {"__call__": lambda self, x, sigma, **_: model(x, sigma)})()
    wrapped.inner_model.inner_model = SimpleNamespace(scale_latent_inpaint=inpaint)
    wrapped.noise, wrapped.latent_image = inputs["noise"], inputs["latent"]
    start = sampling.noise_scaling(inputs["sigmas"][0], inputs["noise"], inputs["latent"])
    outputs[clean] = sample_euler(wrapped, start, inputs["sigmas"], {"denoise_mask": inputs["mask"]}, disable=True)
"""


def test_masks_mean_what_they_mean_in_comfyui(in_comfyui):
    """Soft edges, a wholly kept frame and a wholly free one, against KSamplerX0Inpaint around ComfyUI's Euler."""
    mask = torch.rand(SHAPE[0], 1, *SHAPE[2:], generator=torch.Generator().manual_seed(3))
    mask[:, :, 0], mask[:, :, 1] = 0, 1
    mask = mask.expand(SHAPE).contiguous()
    along = schedule("simple", 6, 5)
    theirs = in_comfyui(COMFY_MASK_RUN, mask=mask, sigmas=along.sigmas.float(), noise=normal(0), latent=normal(7))
    for clean, expected in theirs.items():
        given = KnownLatent(normal(7), mask, normal(0), clean)
        made = denoise(normal(0), Experts.dense(Toy(), 1.0), Run(along, "euler", POSITIVE, known=given)).x
        assert ((made - expected).abs().max() / expected.abs().max()).item() <= 1e-5


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 6}, "start step is 6.*6 steps.*0 to 5"),
        ({"start": 99}, "start step is 99"),
        ({"start": -1}, "-1"),
        ({"start": 3, "end": 3}, "not after"),
        ({"start": 4, "end": 2}, "not after"),
    ],
)
def test_steps_outside_the_schedule_are_refused_before_the_model_is_asked(options: dict, message: str):
    toy = Toy()
    with pytest.raises(WanError, match=message):
        run(Experts.dense(toy, 3.0), **options)
    assert not toy.calls


def test_a_history_of_another_step_is_refused():
    experts = Experts.dense(Toy(), 3.0)
    state = denoise(normal(0), experts, walk(end=2))
    with pytest.raises(WanError, match="goes on at step 2, but the start step is 3"):
        denoise(state, experts, walk(start=3))
    with pytest.raises(WanError, match="goes on at step 2, .* the end step 1"):
        denoise(state, experts, walk(end=1))


def test_an_unknown_solver_names_the_known_ones():
    with pytest.raises(WanError, match=r"'unipcc'.*unipc, dpm\+\+, euler, heun.*mean 'unipc'"):
        denoise(normal(0), Experts.dense(Toy(), 3.0), walk("unipcc", schedule("unipc", 6, 12)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_names_step_and_expert(bad: float):
    class Broken(Toy):
        def __call__(self, x: Tensor, *rest, **options) -> Tensor:
            answer = super().__call__(x, *rest, **options)
            answer[0, 0, 0, 0, 0] = bad
            return answer

    with pytest.raises(WanError, match="Step 3 of 6: the low-noise expert.*NaN.*bfloat16"):
        run(pair(Toy(), Broken(), switch=Switch("step", 2)))


class Rounded(Toy):
    """Answers with NaN in its third call, until it is told to be exact."""

    def __init__(self, mends: bool = True):
        super().__init__()
        self.asked, self.exact, self.mends = 0, False, mends

    def be_exact(self) -> str | None:
        told, self.exact = self.exact, True
        return None if told else "sage"

    def __call__(self, x: Tensor, *rest, **options) -> Tensor:
        answer = super().__call__(x, *rest, **options)
        self.asked += 1
        bad = self.asked >= 3 and not (self.exact and self.mends)
        return answer * float("nan") if bad else answer


def test_a_step_that_is_not_finite_is_done_again_with_exact_attention():
    said: list[str] = []
    model = Rounded()
    expected = denoise(normal(0), Experts.dense(Toy(), 1.0), walk()).x
    ours = denoise(normal(0), Experts.dense(model, 1.0), walk(), Callbacks(on_note=said.append)).x
    assert torch.equal(ours, expected)
    assert len(said) == 1 and "Step 3 of 6: with the attention 'sage' the model answered with NaN" in said[0]
    assert model.asked == 7


def test_what_stays_not_finite_ends_the_run():
    with pytest.raises(WanError, match="Step 3 of 6: the model answered with NaN"):
        denoise(normal(0), Experts.dense(Rounded(mends=False), 1.0), walk(), Callbacks(on_note=lambda _: None))


def test_a_start_that_is_not_finite_is_refused():
    x = normal(0)
    x[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(WanError, match="latent to start from"):
        denoise(x, Experts.dense(Toy(), 3.0), walk())


def test_video_to_video_starts_between_noise_and_latent():
    latent, white = normal(7), normal(0)
    assert torch.equal(noised(latent, white, 1.0), white)
    assert torch.equal(noised(latent, white, 0.0), latent)
    exact = Experts.dense(lambda x, t, condition, on_block=None: white - latent, 1.0)
    along = from_sigmas([0.6, 0.3, 0.0])
    made = denoise(noised(latent, white, 0.6), exact, Run(along, "unipc", POSITIVE)).x
    torch.testing.assert_close(made, latent, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cancelled", [False, True])
def test_what_a_run_held_goes_with_it(cancelled: bool):
    """Not when a collection comes: a sample may be half of a card's memory, and ComfyUI lends its models for a run."""

    def stop(report: StepReport) -> None:
        if cancelled:
            raise KeyboardInterrupt

    model = Toy()
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        with suppress(KeyboardInterrupt):
            denoise(normal(0), Experts.dense(model, 3.0), walk(), Callbacks(on_step=stop, on_block=lambda index: None))
        del model
        assert gone() is None
    finally:
        gc.enable()
