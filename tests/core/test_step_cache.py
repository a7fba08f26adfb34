"""Step caches: what is left out, what stands in its place, and that a run with one is a run like others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.core.test_denoise import Toy, normal, pair, walk
from wan_core.config import VARIANTS, PerExpert
from wan_core.errors import WanError
from wan_core.memory.engine import Engine
from wan_core.pipeline import Request, check_run, generate, read_models
from wan_core.sampling.denoise import Callbacks, RunState, denoise
from wan_core.sampling.experts import Experts, Switch
from wan_core.sampling.magnitudes import Curve, curves_of
from wan_core.sampling.schedules import Schedule, from_sigmas, schedule
from wan_core.sampling.step_cache import POLICIES, CachedSteps, Memory, Step, StepCache
from wan_core.tools.tiny import TinySizes, write_tiny

STEPS = 20
ALONG = schedule("unipc", STEPS, 5)
HALF = Switch("step", 10)


def experts_of(task: str, along: Schedule, switch: int | None) -> list[str]:
    return ["only"] * along.steps if switch is None else ["high"] * switch + ["low"] * (along.steps - switch)


def sampled(cache: StepCache | None, begin: Tensor | RunState | None = None, said: list[str] | None = None, **options):
    models = Toy(), Toy(0.8)
    experts = pair(*models, switch=HALF)
    notes = Callbacks(on_note=(said if said is not None else []).append)
    state = denoise(normal(0) if begin is None else begin, experts, walk(along=ALONG, cache=cache, **options), notes)
    return state, [len(model.calls) // 2 for model in models]  # both prompts


# --- which steps


def test_every_second_step_after_the_first_fifth():
    """Of 10 steps each: 0 and 1 are dense, then 2, 4, 6 and 8 are left out."""
    cache = StepCache("every", 2)
    _, calls = sampled(cache)
    assert calls == [6, 6]
    names = pair(Toy(), Toy(), switch=HALF).names(ALONG)
    assert cache.predicted(ALONG, names, 0, STEPS) == 12


@pytest.mark.parametrize("n", [3, 4])
def test_one_of_so_many_but_never_more_in_a_row_than_allowed(n: int):
    for most in (1, 2, 3):
        cache = StepCache("every", n, dense=0, most=most)
        steps = CachedSteps(cache, ALONG, ["only"] * STEPS, 0, STEPS)
        asked: list[int] = []

        def compute(i: int) -> Tensor:
            asked.append(i)  # noqa: B023
            return torch.zeros(1)

        for i in range(STEPS):
            steps.answer(i, torch.ones(1), lambda i=i: compute(i))
        gaps = [b - a for a, b in zip(asked, asked[1:], strict=False)]
        assert max(gaps) == min(most, n - 1) + 1 and asked[-1] == STEPS - 1


def test_easy_leaves_out_more_the_more_change_is_allowed():
    counts = []
    for threshold in (0.001, 0.05, 0.2, 1.0):
        said: list[str] = []
        _, calls = sampled(StepCache("easy", threshold), said=said)
        counts.append(sum(calls))
        assert f"Step cache easy: {sum(calls)} of {STEPS} steps were computed" in said[0]
    assert counts == sorted(counts, reverse=True) and counts[0] == STEPS and counts[-1] < 15


def test_easys_rule_is_the_published_one():
    """EasyCache by hand: the rate of the last two computed steps times the sample's change, of the answer's size."""
    cache, memory = StepCache("easy", 0.5), Memory()
    xs, vs = [normal(i, (1, 2, 1, 3, 3)) for i in range(4)], [normal(9 + i, (1, 2, 1, 3, 3)) for i in range(2)]
    for i in range(2):
        memory = memory.computed(Step(1 - i / 4, "only", xs[i]), vs[i])
    size = lambda value: value.abs().mean()  # noqa: E731
    rate = size(vs[1] - vs[0]) / size(xs[1] - xs[0])
    first = rate * size(xs[2] - xs[1]) / size(vs[1])
    _, memory = POLICIES["easy"].decide(cache, memory, Step(0.5, "only", xs[2]))
    assert memory.change == pytest.approx(first.item())
    memory = memory.passed(Step(0.5, "only", xs[2]))
    second = first + rate * size(xs[3] - xs[2]) / size(vs[1])
    skips, memory = POLICIES["easy"].decide(cache, memory, Step(0.25, "only", xs[3]))
    assert memory.change == pytest.approx(second.item()) and skips is (second.item() < 0.5)


# The published settings: threshold 0.06, two in a row; the first part of each expert that is computed.
PUBLISHED = {"ti2v-5B": (0.2, 2.00), "t2v-A14B": (0.4, 1.54)}


def published_skips(task: str, dense: float, threshold: float = 0.06, most: int = 2) -> list[int]:
    """MagCache's rule on its own arrays, step by step."""
    import json

    measured = json.loads((Path(__file__).parents[2] / "wan_core/sampling/magnitudes.json").read_text())[task]
    steps, switch = measured["steps"], measured.get("switch") or measured["steps"]
    always = set(range(int(switch * dense))) | set(range(switch, switch + int((steps - switch) * dense)))
    ratio, error, row, skipped = 1.0, 0.0, 0, []
    for i in range(steps):
        if i in always:
            ratio, error, row = 1.0, 0.0, 0
            continue
        ratio *= measured["ratios"][i - 1]
        error, row = error + abs(1 - ratio), row + 1
        if error < threshold and row <= most:
            skipped.append(i)
        else:
            ratio, error, row = 1.0, 0.0, 0
    return skipped


@pytest.mark.parametrize("task", PUBLISHED)
def test_magnitudes_leave_out_what_magcache_does(task: str):
    """On its own schedule, but for the last step, which we compute; its speed-ups are those that were published."""
    dense, speed = PUBLISHED[task]
    variant = VARIANTS[task]
    along = schedule("unipc", variant.steps, 5.0 if task == "ti2v-5B" else 12.0)
    skipped = published_skips(task, dense)
    assert variant.steps / (variant.steps - len(skipped)) == pytest.approx(speed, abs=0.01)
    experts = experts_of(task, along, 26 if variant.experts == 2 else None)
    cache = StepCache("magnitude", 0.06, dense, 2, curves_of(task))
    steps = CachedSteps(cache, along, experts, 0, along.steps)
    asked: list[int] = []
    for i in range(along.steps):
        steps.memory = steps.memory if i == 0 or experts[i] == experts[i - 1] else Memory()
        steps.answer(i, torch.ones(1), lambda i=i: (asked.append(i), torch.zeros(1))[1])
    ours = sorted(set(range(along.steps)) - set(asked))
    # Upstream rounds the dense part down, and knows no reset at the switch.
    assert set(ours) <= set(skipped) | {i + 1 for i in skipped}
    assert abs(len(ours) - len(skipped)) <= 2
    assert cache.predicted(along, experts, 0, along.steps) == len(asked)


def test_a_curve_holds_for_any_number_of_steps():
    """The ratio between two noise levels is the product of those between."""
    curve = curves_of("ti2v-5B")["only"]
    sigmas = schedule("unipc", 50, 5).sigmas.tolist()
    far = curve.growth(sigmas[10], sigmas[14])
    near = math.prod(curve.growth(sigmas[i], sigmas[i + 1]) for i in range(10, 14))
    assert far == pytest.approx(near) and far < 1
    assert curve.growth(1.0, sigmas[0]) == 1.0 and curve.growth(0.001, 0.0005) == 1.0  # flat beyond what was measured


def test_models_without_a_curve_are_told_so():
    with pytest.raises(WanError, match="No curve of magnitudes is known.*easy"):
        StepCache("magnitude", 0.06, curves=curves_of("flf2v-14B")).check(ALONG, "unipc", ["only"])


# --- what stands in their place


@pytest.mark.parametrize("solver", ["euler", "dpm++", "unipc"])
def test_what_is_straight_is_extrapolated_without_error(solver: str):
    """A model whose v - x lies on a line over sigma: leaving out changes nothing."""
    line = normal(1), normal(2)

    class Straight(Toy):
        def __call__(self, x: Tensor, t: Tensor, condition, on_block=None) -> Tensor:
            self.calls.append((x, t, condition))
            return x + line[0] + line[1] * t.view(-1, 1, 1, 1, 1) / 1000

    along = from_sigmas(torch.linspace(0.999, 0, 21))
    results = [
        denoise(normal(0), Experts.dense(Straight(), 1.0), walk(solver, along, cache=cache)).x
        for cache in (None, StepCache("every", 3))
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_extrapolation_is_nearer_than_reuse():
    expected, _ = sampled(None)
    ours, _ = sampled(StepCache("every", 2))

    class Reuse(Memory):
        def extrapolated(self, step: Step) -> Tensor:
            return step.x + self.deltas[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Memory, "extrapolated", Reuse.extrapolated)
        reused, _ = sampled(StepCache("every", 2))
    far, near = ((one.x - expected.x).norm() / expected.x.norm() for one in (reused, ours))
    assert near < 0.8 * far and near < 0.05, (near, far)


# --- a run like others


FALLING = Curve((1.0, 0.0), (0.0, -0.2))
RESUMED = {
    "every": StepCache("every", 2),
    "easy": StepCache("easy", 0.3),
    "magnitude": StepCache("magnitude", 0.06, curves={"high": FALLING, "low": FALLING}),
}


@pytest.mark.parametrize("policy", RESUMED)
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_stopping_at_any_step_and_going_on_is_bit_identical(policy: str, solver: str, tmp_path: Path):
    """Across the switch at step 10, also where it stops with a step left out and right before and after the switch;
    the whole run's end is that of the schedule."""
    cache = RESUMED[policy]
    expected, _ = sampled(cache, solver=solver)
    reports: list = []
    experts = pair(Toy(), Toy(0.8), switch=HALF)
    denoise(normal(0), experts, walk(solver, ALONG, cache=cache), Callbacks(on_step=reports.append, on_note=print))
    left_out = [report.index for report in reports if not report.computed]
    assert any(i < 9 for i in left_out) and any(i > 10 for i in left_out)  # on both sides of the switch
    for stop in range(1, STEPS):
        save_file(reports[stop - 1].state.to_tensors(), tmp_path / "state.safetensors")
        state = RunState.from_tensors(load_file(tmp_path / "state.safetensors"))
        ours, _ = sampled(cache, state, solver=solver)
        assert torch.equal(ours.x, expected.x), stop


def test_nothing_is_carried_from_one_expert_to_the_other():
    states: list[RunState] = []
    experts = pair(Toy(), Toy(0.8), switch=HALF)
    run = walk(along=ALONG, cache=StepCache("every", 2))
    denoise(normal(0), experts, run, Callbacks(on_step=lambda report: states.append(report.state), on_note=print))
    mine = [{name.removeprefix("cache."): tensor for name, tensor in state.kept.items()} for state in states]
    kept = [Memory.from_tensors(tensors, torch.device("cpu")).sigmas for tensors in mine]
    assert len(kept[9]) == 2 and kept[10] == (ALONG.sigmas[10].item(),)


@pytest.mark.parametrize(
    ("cache", "steps", "solver", "message"),
    [
        (StepCache("easy", 0.1), 8, "unipc", "only 8.*from 10 steps on"),
        (StepCache("easy", 0.1), 20, "heun", "heun asks the model more than once"),
        (StepCache("easy", 0.1), 20, "lcm", "lcm noises the sample anew"),
        (StepCache("magnitude", 0.1), 20, "unipc", "No curve"),
        (StepCache("teacache", 0.1), 20, "unipc", "No polynomial of TeaCache is published for this model"),
    ],
)
def test_runs_that_cannot_have_one_are_refused(cache: StepCache, steps: int, solver: str, message: str):
    toy = Toy()
    with pytest.raises(WanError, match=message):
        denoise(normal(0), Experts.dense(toy, 1.0), walk(solver, schedule("unipc", steps, 5), cache=cache))
    assert not toy.calls


@pytest.mark.parametrize(
    "values", [("easy", math.nan), ("easy", 0), ("every", 1), ("every", 9), ("easy", 0.1, -0.1), ("easy", 0.1, 0.2, 0)]
)
def test_numbers_out_of_range_are_refused(values: tuple):
    with pytest.raises(WanError, match="expected"):
        StepCache(*values)


def test_unknown_policies_are_named():
    with pytest.raises(WanError, match="'teacach'.*easy, magnitude, teacache, every.*mean 'teacache'"):
        StepCache("teacach", 0.1)


def test_curves_are_read_at_their_ends():
    curve = Curve((1.0, 0.5), (0.0, -1.0))
    assert curve.growth(1.0, 0.75) == pytest.approx(math.exp(-0.5))


def test_in_the_pipeline(tmp_path: Path):
    """Both experts of a small checkpoint; refused before a weight is read where there are too few steps."""
    from dataclasses import replace

    write_tiny(tmp_path, "t2v-A14B", layout="diffusers", sizes=TinySizes(dim=256, ffn_dim=256, layers=2, text_dim=64))
    models = read_models(tmp_path, "t2v-A14B", dtype="float32")
    models = replace(models, dit=replace(models.dit, step_cache=StepCache("every", 2)))
    request = Request("a cat", "", size=(64, 32), frames=5, steps=12, seed=3, guidance=PerExpert(low=1.0, high=1.0))
    cpu = torch.device("cpu")
    dense = generate(replace(models, dit=replace(models.dit, step_cache=None)), request, Engine(), device=cpu).latent
    cached = generate(models, request, Engine(), device=cpu).latent
    assert 0 < (cached - dense).norm() < 0.5 * dense.norm()  # random weights are nothing smooth
    few = replace(request, steps=4).completed(models.dit.variant)
    with pytest.raises(WanError, match="only 4"):
        check_run(models, few, Engine(), cpu)


@pytest.mark.parametrize("stop", [7, 8, 9])
def test_the_nano_pair_goes_on_bit_for_bit(stop: int, tmp_path: Path):
    """Trained weights in the engine, UniPC, magnitude by curves of its own: saved around the switch, and gone on with
    by another engine."""
    from bench.quality import family
    from wan_core.sampling.guidance import Condition

    recipe = family(Path(__file__).parents[2] / "nano").dit
    along = schedule("unipc", 16, 5)
    curves = dict.fromkeys(("high", "low"), Curve((1.0, 0.0), (0.0, -0.3)))
    cache = StepCache("magnitude", 0.12, 0.15, curves=curves)
    said = Condition(torch.randn(1, 8, recipe.high.config.text_dim, generator=torch.Generator().manual_seed(1)))
    run = walk("unipc", along, positive=said, cache=cache)
    reports: list = []

    def sampled(begin: Tensor | RunState) -> Tensor:
        experts = Engine().experts(recipe, PerExpert(1.0, 1.0), "cpu")
        return denoise(begin, experts, run, Callbacks(on_step=reports.append, on_note=print)).x

    whole = sampled(torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(2)))
    experts = [report.expert for report in reports]
    assert experts[stop - 1 : stop + 1] in (["high", "high"], ["high", "low"], ["low", "low"])
    assert {report.expert for report in reports if not report.computed} == {"high", "low"}
    save_file(reports[stop - 1].state.to_tensors(), tmp_path / "state.safetensors")
    assert torch.equal(sampled(RunState.from_tensors(load_file(tmp_path / "state.safetensors"))), whole)
