"""Rules of guidance: each against another implementation, and in runs that are stopped, cached, merged and refused."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.core.test_denoise import NEGATIVE, POSITIVE, Toy, normal, pair, walk
from wan_core.cli.guidance import parse_rule
from wan_core.config import PerExpert
from wan_core.errors import WanError
from wan_core.memory.engine import Engine
from wan_core.models.dit.features.clip_tokens import ClipTokens
from wan_core.models.dit.inputs import Concat
from wan_core.pipeline import Models, Request, check_run, generate, needs, read_models
from wan_core.recipe import ModelRecipe, check_guidance, model_calls
from wan_core.recipe import pair as join
from wan_core.sampling.denoise import Callbacks, KnownLatent, RunState, StepReport, denoise
from wan_core.sampling.experts import Expert, Experts, Switch
from wan_core.sampling.guidance import Condition, Entry
from wan_core.sampling.guidance_rules import (
    RULES,
    Answers,
    Guidance,
    Interval,
    Merge,
    NormalisedAttention,
    Projected,
    Rule,
    SkipLayers,
    Tangential,
    ZeroStar,
    make,
    settings_of,
)
from wan_core.sampling.guidance_run import Guided, merged
from wan_core.sampling.schedules import schedule
from wan_core.sampling.step_cache import StepCache
from wan_core.tools.tiny import TinySizes, write_tiny

TOLERANCE = 1e-5
SHAPE = (2, 3, 2, 4, 5)
C, U, X = (normal(seed, SHAPE) for seed in (1, 2, 3))
W, SIGMA = 4.0, 0.7
STEPS = 12
ALONG = schedule("unipc", STEPS, 5)


def velocity(*rules: Rule, c: Tensor = C, u: Tensor = U, x: Tensor = X, kept: dict | None = None) -> Tensor:
    """What these rules make of two answers."""
    answers = iter((c, u))
    expert = Expert(lambda *args, **options: next(answers), W, "only")
    guided = Guided(Guidance(rules), POSITIVE, NEGATIVE)
    return guided.velocity(expert, x, torch.full((len(x),), 700.0), SIGMA, kept or {})[0]


# --- formulas


def test_no_rule_is_plain_guidance_to_the_last_bit():
    assert torch.equal(velocity(), U + W * (C - U))


_PATCHED = """
    import importlib
    class Model:
        def clone(self):
            return self
        def set_model_sampler_post_cfg_function(self, function):
            self.function = function
        set_model_sampler_pre_cfg_function = set_model_sampler_post_cfg_function
    model = Model()
    node = getattr(importlib.import_module("comfy_extras." + inputs["module"]), inputs["node"])
    node.execute(model, *inputs["values"])
    x, c, u, w, sigma = (inputs[name] for name in ("x", "c", "u", "w", "sigma"))
    if inputs["pre"]:
        for clean, unclean, level in zip(c, u, sigma):
            args = {"conds_out": [clean, unclean], "conds": [1, 1], "cond_scale": w, "input": x,
                    "sigma": torch.tensor([level])}
            a, b = model.function(args)[:2]
            outputs.setdefault("clean", []).append(b + w * (a - b))
    else:
        args = {"cond_denoised": c, "uncond_denoised": u, "denoised": u + w * (c - u), "input": x, "cond_scale": w}
        outputs["clean"] = model.function(args)
"""


def test_zero_star_is_diffusers():
    scaled = U * cfg_zero_star_scale(C.flatten(1), U.flatten(1)).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(velocity(ZeroStar(0)), scaled + W * (C - scaled), rtol=TOLERANCE, atol=TOLERANCE)


def test_zero_star_has_comfyuis_factor(in_comfyui: Callable[..., dict]):
    """ComfyUI's node multiplies the clean estimate by it, the paper and diffusers the velocity: the results differ by
    (1 - factor) (w - 1) x."""
    given = {"module": "nodes_cfg", "node": "CFGZeroStar", "values": [], "pre": False, "sigma": [SIGMA]}
    theirs = in_comfyui(_PATCHED, x=X, c=X - SIGMA * C, u=X - SIGMA * U, w=W, **given)["clean"]
    factor = (ZeroStar().unconditional(C, U) / U).mean(dim=(1, 2, 3, 4), keepdim=True)
    ours = X - SIGMA * velocity(ZeroStar(0)) + (1 - factor) * (W - 1) * X
    assert (ours - theirs).abs().max() <= TOLERANCE


def test_tcfg_is_comfyuis_without_its_decomposition(in_comfyui: Callable[..., dict]):
    """Also for answers that are almost the same, as they are late in a run."""
    for far in (1.0, 1e-2, 1e-4):
        u = C + far * U
        given = {"module": "nodes_tcfg", "node": "TCFG", "values": [], "pre": True, "sigma": [SIGMA]}
        theirs = in_comfyui(_PATCHED, x=X, c=[X - SIGMA * C], u=[X - SIGMA * u], w=W, **given)["clean"][0]
        assert (X - SIGMA * velocity(Tangential(), u=u) - theirs).abs().max() <= TOLERANCE, far


@pytest.mark.parametrize("u", [torch.zeros(SHAPE), -C, 2 * C], ids=["nothing", "opposite", "along"])
def test_tcfg_where_both_lie_on_a_line(u: Tensor):
    torch.testing.assert_close(Tangential().unconditional(C, u), u, rtol=1e-4, atol=1e-5)


APG = Projected(-0.6, 3.0, 0.3)


@pytest.mark.parametrize("rule", [APG, Projected(0, 0, 0), Projected(0.5, 2.0, 1.0), Projected()], ids=str)
def test_apg_is_diffusers_on_clean_estimates(rule: Projected):
    """Three steps, so that momentum tells; diffusers' original formulation counts the scale from 0."""
    buffer, kept = MomentumBuffer(rule.momentum) if rule.momentum else None, {}
    for step in range(3):
        c, u, x, sigma = normal(step, SHAPE), normal(9 + step, SHAPE), normal(5 + step, SHAPE), 0.9 - step / 4
        theirs = normalized_guidance(
            x - sigma * c, x - sigma * u, W - 1, buffer, rule.eta, rule.norm_threshold, use_original_formulation=True
        )
        ours, kept = rule.joined(Answers(c, u, W, x, sigma), kept)
        torch.testing.assert_close(x - sigma * ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_apg_is_comfyuis_for_one_channel(in_comfyui: Callable[..., dict]):
    """ComfyUI's takes the norms of each channel by itself, the paper and diffusers those of the whole sample; and its
    scale counts from 0."""
    shape = (2, 1, 3, 4, 5)
    x, cs, us = normal(1, shape), [normal(2 + i, shape) for i in range(3)], [normal(7 + i, shape) for i in range(3)]
    sigmas = [0.9, 0.6, 0.3]
    rule, kept = APG, {}
    given = {"module": "nodes_apg", "node": "APG", "values": [rule.eta, rule.norm_threshold, rule.momentum]}
    cleans = {name: [x - s * v for v, s in zip(each, sigmas, strict=True)] for name, each in (("c", cs), ("u", us))}
    theirs = in_comfyui(_PATCHED, x=x, w=W - 1, pre=True, sigma=sigmas, **given, **cleans)["clean"]
    for c, u, sigma, expected in zip(cs, us, sigmas, theirs, strict=True):
        ours, kept = rule.joined(Answers(c, u, W, x, sigma), kept)
        assert (x - sigma * ours - expected).abs().max() <= TOLERANCE


def test_apg_without_limits_is_plain_guidance():
    torch.testing.assert_close(velocity(Projected(0, 0, 1)), U + W * (C - U), rtol=1e-5, atol=1e-5)


RUNNING = [ZeroStar(2), APG, Tangential()]


@pytest.mark.parametrize("rule", RUNNING, ids=lambda rule: rule.name)
def test_each_video_of_a_batch_by_itself(rule: Rule):
    both = velocity(rule)
    for i in range(2):
        one = slice(i, i + 1)
        alone = velocity(rule, c=C[one], u=U[one], x=X[one])
        torch.testing.assert_close(both[one], alone, rtol=1e-5, atol=1e-6)


def test_rules_together_act_in_their_order():
    """The negative answer is damped first, then scaled; what is joined is joined last, in whichever order they come."""
    damped = Tangential().unconditional(C, U)
    scaled = ZeroStar().unconditional(C, damped)
    assert torch.equal(velocity(ZeroStar(), Tangential()), scaled + W * (C - scaled))
    expected, _ = APG.joined(Answers(C, ZeroStar().unconditional(C, U), W, X, SIGMA), {})
    assert torch.equal(velocity(APG, ZeroStar()), expected)
    assert Guidance((APG, ZeroStar())) == Guidance((ZeroStar(), APG))


# --- runs


def sampled(*rules: Rule, begin: Tensor | RunState | None = None, on_step=None, experts: Experts | None = None, **more):
    experts = experts or pair(Toy(), Toy(0.8), switch=Switch("step", 6))
    begin = normal(0) if begin is None else begin
    run = walk(**{"along": ALONG, "guidance": Guidance(rules)} | more)
    return denoise(begin, experts, run, Callbacks(on_step=on_step, on_note=lambda _: None))


def asked(*rules: Rule, guidance: tuple[float, float] = (4.0, 3.0), **more) -> list[int]:
    """How often the model was asked at each step."""
    calls: list[int] = []
    experts = pair(Toy(), Toy(0.8), guidance, Switch("step", 6))
    sampled(*rules, experts=experts, on_step=lambda report: calls.append(report.calls), **more)
    return calls


def test_an_interval_asks_one_prompt_outside_of_it():
    first, last = ALONG.sigmas[2].item(), ALONG.sigmas[8].item()
    rule = Interval(first, last)
    assert asked(rule) == [1] * 2 + [2] * 7 + [1] * 3
    experts = pair(Toy(), Toy(0.8), switch=Switch("step", 6))
    scales = {"high": 4.0, "low": 3.0}
    assert Guidance((rule,)).calls(ALONG, experts.names(ALONG), scales) == asked(rule)
    whole = sampled(Interval(1.0, 0.0))
    assert torch.equal(whole.x, sampled().x)
    off = denoise(normal(0), Experts.dense(Toy(), 3.0), walk(along=ALONG, guidance=Guidance((Interval(1.0, 0.99),))))
    plain = denoise(normal(0), Experts.dense(Toy(), 1.0), walk(along=ALONG, start=0))
    assert not torch.equal(off.x, plain.x)  # the first step is guided
    # What comes after the range is the plain positive run from there.
    half = denoise(normal(0), Experts.dense(Toy(), 3.0), walk(along=ALONG, end=4))
    cut = Guidance((Interval(1.0, ALONG.sigmas[3].item()),))
    ours = denoise(normal(0), Experts.dense(Toy(), 3.0), walk(along=ALONG, guidance=cut))
    assert torch.equal(ours.x, denoise(half, Experts.dense(Toy(), 1.0), walk(along=ALONG)).x)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_nothing_moves_in_the_first_steps(solver: str):
    """A velocity of 0; the predictors of all solvers then leave the sample where it is."""
    states: list[RunState] = []
    along = schedule("auto", STEPS, 5, solver=solver)
    sampled(ZeroStar(2), solver=solver, along=along, on_step=lambda report: states.append(report.state))
    for state in states[:2]:
        torch.testing.assert_close(state.x, normal(0), rtol=1e-5, atol=1e-5)
    assert (states[2].x - normal(0)).abs().max() > 1e-3
    assert asked(ZeroStar(2), solver=solver, along=along) == [0, 0] + [2] * 10


@pytest.mark.parametrize(
    ("solver", "cache"),
    [
        ("unipc", None),
        ("euler", None),
        ("heun", None),
        ("unipc", StepCache("every", 2)),
        ("euler", StepCache("easy", 0.3)),
    ],
)
@pytest.mark.parametrize("stop", [2, 5, 6, 9])
def test_stopping_and_going_on_is_bit_identical(solver: str, cache: StepCache | None, stop: int, tmp_path: Path):
    rules, options = (APG, ZeroStar(1)), {"solver": solver, "cache": cache}
    states: list[RunState] = []
    expected = sampled(*rules, **options, on_step=lambda report: states.append(report.state))
    assert {name.partition(".")[0] for name in states[-1].kept} == ({"guidance", "cache"} if cache else {"guidance"})
    save_file(states[stop - 1].to_tensors(), tmp_path / "state.safetensors")
    state = RunState.from_tensors(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(sampled(*rules, **options, begin=state).x, expected.x)


def test_momentum_matters_and_is_dropped_at_the_switch():
    states: list[RunState] = []
    sampled(APG, on_step=lambda report: states.append(report.state))
    without = sampled(replace(APG, momentum=0))
    assert (states[-1].x - without.x).abs().max() > 1e-3 and not without.kept
    at_switch = replace(states[5], kept={})
    assert torch.equal(sampled(APG, begin=at_switch).x, states[-1].x)  # the low-noise expert begins with none
    within = replace(states[2], kept={})
    assert not torch.equal(sampled(APG, begin=within).x, states[-1].x)


def test_momentum_goes_on_once_a_step_under_a_solver_that_asks_twice():
    """By hand: d of the step's own call, plus momentum times what the step before kept."""
    states: list[RunState] = []
    experts = Experts.dense(Toy(), W)
    sampled(APG, experts=experts, solver="heun", on_step=lambda report: states.append(report.state))
    expected, x = None, normal(0)
    for i, state in enumerate(states[:-1]):
        sigma, t = ALONG.sigmas[i].item(), ALONG.timesteps[i].float().repeat(2)
        c, u = (Toy()(x, t, one) for one in (POSITIVE, NEGATIVE))
        moved = sigma * (u - c)
        expected = moved if expected is None else moved + APG.momentum * expected
        torch.testing.assert_close(state.kept["guidance.average"], expected, rtol=1e-4, atol=1e-4)
        x = state.x


class Rounding(Toy):
    """Answers once with NaN, then is made exact."""

    broken = True

    def __call__(self, *args, **options) -> Tensor:
        v = super().__call__(*args, **options)
        return v * math.nan if self.broken and len(self.calls) > 6 else v

    def be_exact(self) -> str | None:
        was, self.broken = self.broken, False
        return "sage" if was else None


def test_a_step_that_is_done_again_finds_what_it_found_before():
    expected = sampled(APG, experts=Experts.dense(Toy(), W))
    ours = sampled(APG, experts=Experts.dense(Rounding(), W))
    assert torch.equal(ours.x, expected.x)
    assert torch.equal(ours.kept["guidance.average"], expected.kept["guidance.average"])


def test_known_places_are_kept_whatever_the_rule():
    latent, mask = normal(4), torch.ones(2, 1, 3, 4, 5)
    mask[:, :, 0] = 0
    for rule in RUNNING:
        known = KnownLatent(latent, mask, clean=True)
        made = sampled(rule, experts=Experts.dense(Toy(), W), known=known)
        assert torch.equal(made.x[:, :, 0], latent[:, :, 0]) and made.x.isfinite().all()


def test_a_step_cache_does_not_take_rest_for_an_answer():
    """A velocity of 0 in the first steps is no answer of the model: nothing is extrapolated from it."""
    reports: list[StepReport] = []
    cache = StepCache("every", 2, dense=0)
    sampled(ZeroStar(3), experts=Experts.dense(Toy(), W), cache=cache, on_step=reports.append)
    assert [report.computed for report in reports[:5]] == [False] * 3 + [True, False]
    first = reports[3].state.kept["cache.sigmas"].tolist()
    assert first == [ALONG.sigmas[3].item()]


def test_a_step_cache_does_not_extrapolate_over_the_ends_of_a_range():
    """The guided velocity jumps where guidance ends: the steps there begin anew, as with another expert."""
    cut = Interval(1.0, ALONG.sigmas[5].item())
    guidance, experts = Guidance((cut, ZeroStar(1))), Experts.dense(Toy(), W)
    assert guidance.turns(ALONG) == {6} and not Guidance((APG, ZeroStar())).turns(ALONG)
    reports: list[StepReport] = []
    cache = StepCache("every", 2, dense=0)
    sampled(*guidance.rules, experts=experts, cache=cache, on_step=reports.append)
    computed = [report.computed for report in reports]
    assert computed == [False, True, False, True, False, True, True, False, True, False, True, True]
    assert len(reports[6].state.kept["cache.sigmas"]) == 1
    assert cache.predicted(ALONG, ["only"] * STEPS, 1, STEPS, guidance.turns(ALONG)) == sum(computed)


# --- both prompts in one call


class Batched(Toy):
    """Tells its samples apart by their own text."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, on_block=None) -> Tensor:
        self.calls.append((x, t, condition))
        text = condition.text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
        return torch.tanh(x.roll(1, dims=3) + text) + t.view(len(x), 1, -1, 1, 1) / 1000


def test_merged_prompts_answer_the_same_in_half_as_many_calls():
    apart, together = Batched(), Batched()
    expected = sampled(experts=Experts.dense(apart, W))
    ours = sampled(Merge(), experts=Experts.dense(together, W))
    torch.testing.assert_close(ours.x, expected.x, rtol=1e-5, atol=1e-5)
    assert len(together.calls) == STEPS == len(apart.calls) / 2
    assert {len(x) for x, _, _ in together.calls} == {4}
    assert len({condition.key for _, _, condition in together.calls}) == 1  # what is computed from it is found again


def test_merging_conditions():
    text, long = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    channels, seen = torch.randn(1, 20, 2, 4, 4), torch.randn(1, 257, 6)
    first = Condition(text, (Concat(channels), ClipTokens(seen)))
    second = Condition(long, (Concat(channels + 1), ClipTokens(seen + 1)))
    both = merged(first, second, 2)
    assert both.text.shape == (4, 5, 8) and not both.text[:2, 3:].any() and torch.equal(both.text[3], long[0])
    assert torch.equal(both.inputs[0].channels[[0, 1]], channels.expand(2, -1, -1, -1, -1))
    assert torch.equal(both.inputs[1].features[2:], (seen + 1).expand(2, -1, -1))
    assert merged(first, Condition(long), 2) is None
    assert merged(first, Condition(long, (Concat(channels), ClipTokens(torch.randn(1, 514, 6)))), 2) is None
    assert merged(Condition(torch.randn(1, 600, 8)), Condition(text), 1) is None  # 600 rows are seen as they are


def test_what_cannot_be_merged_is_asked_one_after_the_other_and_said():
    model, said = Batched(), []
    odd = Condition(NEGATIVE.text, (Concat(torch.zeros(1, 1, 3, 4, 5)),))
    run = walk(along=ALONG, guidance=Guidance((Merge(),)), negative=odd)
    ours = denoise(normal(0), Experts.dense(model, W), run, Callbacks(on_note=said.append))
    expected = denoise(normal(0), Experts.dense(Batched(), W), replace(run, guidance=Guidance()))
    assert torch.equal(ours.x, expected.x) and len(model.calls) == 2 * STEPS
    assert len(said) == 1 and "one after the other" in said[0]
    several = (Entry(POSITIVE, last=0.5), Entry(NEGATIVE, first=0.6))
    notes = Guidance((Merge(),)).check_sides(several, NEGATIVE, [0.9])
    assert "one by one" in notes[0]


# --- several prompts on a side


def test_skipped_blocks_are_those_of_the_negative_side():
    toy, other = Toy(), Condition(torch.full((2, 1, 1), 0.7))
    negative = (Entry(NEGATIVE), Entry(other, weight=0.5))
    rule = SkipLayers(ALONG.sigmas[0].item(), ALONG.sigmas[4].item(), (2, 1, 2))
    assert rule.blocks == (1, 2)
    sampled(rule, experts=Experts.dense(toy, W), negative=negative)
    skips = [sorted(condition.skip) for _, _, condition in toy.calls]
    assert skips == [[], [1, 2], [1, 2]] * 5 + [[], [], []] * 7
    assert {condition.key for _, _, condition in toy.calls} == {POSITIVE.key, NEGATIVE.key, other.key}


def test_nag_hears_the_negative_prompt_of_the_step():
    toy, late = Toy(), Condition(torch.full((2, 1, 1), 0.7))
    negative = (Entry(NEGATIVE, last=0.8), Entry(late, first=0.75))
    rule = NormalisedAttention()
    sampled(rule, experts=Experts.dense(toy, 1.0), negative=negative)
    assert len(toy.calls) == STEPS  # one call a step: it works at guidance 1
    for (_, _, condition), sigma in zip(toy.calls, ALONG.sigmas.tolist(), strict=False):
        heard = condition.against.condition if condition.against else None
        assert heard is (NEGATIVE if sigma >= 0.8 else late if sigma <= 0.75 else None), sigma
        assert condition.key == POSITIVE.key
    both = Toy()
    sampled(rule, experts=Experts.dense(both, W))
    assert [condition.against is not None for _, _, condition in both.calls] == [True, False] * STEPS


@pytest.mark.parametrize(
    "negative",
    [(Entry(NEGATIVE), Entry(POSITIVE)), (Entry(NEGATIVE, weight=torch.ones(1, 1, 1, 4, 5)),), None],
    ids=["several", "masked", "none"],
)
def test_nag_needs_one_negative_prompt(negative):
    toy = Toy()
    with pytest.raises(WanError, match="nag (hears one|needs a) negative prompt"):
        sampled(NormalisedAttention(), experts=Experts.dense(toy, 1.0), negative=negative)
    assert not toy.calls


# --- what is refused, and said


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: Guidance((APG, Tangential())), "tcfg and apg"),
        (lambda: Guidance((Merge(), SkipLayers())), "cfg_merge.*slg"),
        (lambda: Guidance((NormalisedAttention(), Merge())), "cfg_merge.*nag"),
        (lambda: Guidance((APG, Projected())), "apg is given twice"),
        (lambda: Interval(0.5, 0.5), "end must be below"),
        (lambda: Interval(1.5, 0.5), "sigma_start is 1.5: expected 0 to 1"),
        (lambda: Projected(math.nan), "momentum is nan: expected -5 to 1"),
        (lambda: NormalisedAttention(alpha=1.1), "alpha is 1.1: expected 0 to 1"),
        (lambda: ZeroStar(-1), "zero_steps is -1"),
        (lambda: SkipLayers(blocks=()), r"\(none\)"),
        (lambda: SkipLayers(blocks=(-1,)), "0 or more"),
        (lambda: make("slq", {}), "'slq'.*Did you mean 'slg'"),
        (lambda: make("apg", {"betta": 1}), "no setting 'betta': it has momentum, norm_threshold, eta"),
        (lambda: make("tcfg", {"eta": 1}), "it has none"),
        (lambda: Guidance((SkipLayers(blocks=(30,)),)).check_network(30), "the model has 30: expected 0 to 29"),
        (lambda: Guidance((SkipLayers(blocks=(0, 1)),)).check_network(2), "all 2 blocks"),
        (lambda: Guidance((Merge(),)).check_network(30, own=False), "another program holds"),
        (lambda: Guidance((NormalisedAttention(),)).check_network(30, own=False), "another program holds"),
        (lambda: sampled(Interval(0.02, 0.01)), "acts at noise levels from 0.02 to 0.01.*lie at 1.000, 0.98"),
        (lambda: sampled(ZeroStar(STEPS)), "only 12"),
        (lambda: sampled(ZeroStar(1), solver="lcm"), "noises anew at each: set zero_steps to 0"),
        (lambda: sampled(APG, experts=Experts.dense(Toy(), 1.0)), "The guidance is 1.*apg needs two prompts"),
    ],
)
def test_what_makes_no_sense_is_refused(make_it: Callable[[], object], message: str):
    with pytest.raises(WanError, match=message):
        make_it()


def test_rules_without_a_negative_prompt_are_refused():
    with pytest.raises(WanError, match="Guidance 4.0 needs a negative prompt"):
        sampled(APG, experts=Experts.dense(Toy(), W), negative=None)


def test_an_expert_without_guidance_is_said():
    names = ["high"] * 4 + ["low"] * 8
    rules = Guidance((ZeroStar(), Interval(), NormalisedAttention()))
    notes = rules.check(ALONG, names, {"high": 4, "low": 1}, 0, STEPS)
    assert notes == ["The low-noise expert has a guidance of 1: interval and cfg_zero_star do nothing there."]
    assert rules.check(ALONG, names, {"high": 4, "low": 1}, 0, 4) == []  # who does not work needs none
    with pytest.raises(WanError, match="guidance is 1"):
        rules.check(ALONG, names, {"high": 4, "low": 1}, 4, STEPS)
    assert Guidance((NormalisedAttention(),)).check(ALONG, names, {"high": 1, "low": 1}, 0, STEPS) == []


def test_every_rule_has_a_row_and_usual_values():
    order = "interval nag slg cfg_merge tcfg cfg_zero_star apg"
    assert list(RULES) == order.split()
    for name, rule in RULES.items():
        assert make(name, settings_of(rule)) == rule()
        assert name in str(Guidance((rule(),)))


def test_the_command_line_writes_rules_as_text():
    assert parse_rule("apg") == Projected()
    assert parse_rule("slg:blocks=10,9:sigma_end=0.25") == SkipLayers(1.0, 0.25, (9, 10))
    assert parse_rule("cfg_zero_star:zero_steps=2") == ZeroStar(2)
    for text, message in {
        "apg:eta": "NAME=VALUE",
        "slg:blocks=a": "whole numbers with commas",
        "cfg_zero_star:zero_steps=1.5": "a whole number",
        "nag:tau=0.5": "expected 1 to 100",
        "agp": "expected one of",
    }.items():
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            parse_rule(text)


# --- real networks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, "t2v-A14B", layout="diffusers", sizes=TinySizes(dim=256, ffn_dim=256, layers=3, text_dim=64))
    return read_models(folder, "t2v-A14B", dtype="float32")


CPU = torch.device("cpu")
REQUEST = Request("a cat", "a dog", size=(64, 32), frames=5, steps=4, seed=3, guidance=PerExpert(low=3.0, high=4.0))
ALONE = replace(REQUEST, guidance=PerExpert(low=1.0, high=1.0))


def drawn(models: Models, *rules: Rule, request: Request = REQUEST, **options) -> Tensor:
    recipe = replace(models.dit, guidance=Guidance(rules), **options)
    return generate(replace(models, dit=recipe), request, Engine(), device=CPU).latent


NETWORK = {
    "slg": (SkipLayers(1.0, 0.0, (1,)), REQUEST),
    "nag": (NormalisedAttention(), ALONE),
    "nag beside guidance": (NormalisedAttention(), REQUEST),
}


@pytest.mark.parametrize("case", NETWORK)
def test_in_the_pipeline_whatever_streams(tiny: Models, case: str):
    """Another video than without the rule; the same, to the bit, with blocks that stream and nothing kept."""
    rule, request = NETWORK[case]
    plain, ours = drawn(tiny, request=request), drawn(tiny, rule, request=request)
    assert (ours - plain).abs().max() > 1e-4 and ours.isfinite().all()
    assert torch.equal(drawn(tiny, rule, request=request, swap_blocks=2), ours)
    assert torch.equal(drawn(tiny, rule, request=request, vram_limit=50.0), ours)  # texts are not kept then


def test_nag_at_scale_1_changes_nothing(tiny: Models):
    plain, ours = drawn(tiny, request=ALONE), drawn(tiny, NormalisedAttention(scale=1.0, alpha=1.0), request=ALONE)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_merging_changes_nothing_in_the_pipeline(tiny: Models):
    plain, ours = drawn(tiny), drawn(tiny, Merge())
    assert (ours - plain).abs().max() <= 1e-4 * plain.abs().max()
    both = drawn(tiny, Merge(), Interval(1.0, 0.9), ZeroStar(0))
    assert both.isfinite().all() and (both - plain).abs().max() > 1e-4


def test_blocks_that_the_model_has_not_are_refused_before_weights_are_read(tiny: Models):
    request, engine = REQUEST.completed(tiny.dit.variant), Engine()
    recipe = replace(tiny.dit, guidance=Guidance((SkipLayers(blocks=(9,)),)))
    for call in (
        lambda: check_run(replace(tiny, dit=recipe), request, engine, CPU),
        lambda: check_guidance(recipe, request.timetable(), request.guidance),
    ):
        with pytest.raises(WanError, match="the blocks 9, but the model has 3"):
            call()
    assert engine.loads == 0


def test_what_one_expert_was_given_alone_is_said(tiny: Models):
    """The options of a pair are one side's: what the other had is not lost without a word."""
    high, low = (ModelRecipe(file, dtype="float32", variant=tiny.dit.variant) for file in tiny.dit.files)
    rules, cache = Guidance((APG,)), StepCache("every", 2)
    with_rules = replace(low, guidance=rules, step_cache=cache)
    joined = join(high, with_rules, Switch())
    assert not joined.guidance and "guidance rules and the step cache given to" in joined.notes[-1]
    for first, second in ((replace(high, guidance=rules), low), (replace(high, guidance=rules),) * 2):
        both = join(first, second, Switch())
        assert both.guidance == rules and not any("not used" in note for note in both.notes)


def test_what_a_run_costs_is_said(tiny: Models):
    request = replace(REQUEST, steps=10).completed(tiny.dit.variant)
    recipe = replace(tiny.dit, guidance=Guidance((Interval(1.0, 0.9), ZeroStar(1))))
    calls = model_calls(recipe, request.timetable(), request.guidance)
    guided = sum(sigma >= 0.9 for sigma in request.timetable().sigmas.tolist()[1:-1])
    assert calls[0] == 0 and sum(calls) == 2 * guided + (9 - guided)
    said = needs(replace(tiny, dit=recipe), request, CPU, CPU)
    assert f"{sum(calls)} calls of the model in 10 steps instead of 20" in said
    assert "instead" not in needs(replace(tiny, dit=replace(recipe, guidance=Guidance((APG,)))), request, CPU, CPU)
