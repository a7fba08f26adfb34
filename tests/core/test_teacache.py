"""TeaCache: its polynomials, its signal on a model's own weights, its rule, and where it is refused.

Its published speed-ups are those of trained weights: how far the embeddings of two timesteps lie apart is in the
weights of ``time_embedding``, which are not here. What is shown is that the signal is the network's, and that on given
distances the same steps are left out as by the published rule.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wan_core.config import VARIANTS, PerExpert
from wan_core.errors import WanError
from wan_core.loading.dit import read_dit
from wan_core.loading.step_caches import embedding, step_cache
from wan_core.memory.engine import Engine
from wan_core.pipeline import Request, check_run, generate, read_models
from wan_core.sampling.schedules import schedule
from wan_core.sampling.step_cache import CachedSteps, StepCache
from wan_core.sampling.teacache import POLYNOMIALS, growths, name_for
from wan_core.tools.tiny import TinySizes, write_tiny

SIZES = TinySizes(dim=256, ffn_dim=256, layers=2, text_dim=64)
CPU = torch.device("cpu")
STEPS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("t2v")
    write_tiny(made, "t2v-1.3B", layout="diffusers", sizes=SIZES)
    return made


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polynomials_are_read_as_numpy_reads_them(name: str):
    """The published arrays are numpy's poly1d, highest power first."""
    rule = POLYNOMIALS[name]
    for change in (0.0, 0.005, 0.02, 0.1):
        assert rule(change) == pytest.approx(float(np.poly1d(rule.coefficients)(change)), rel=1e-12)


@pytest.mark.parametrize("signal", ["time", "modulation"])
def test_the_signal_is_what_diffusers_embeds(folder: Path, signal: str):
    """On a model's own weights, at the timesteps of a run: 2e-5, for diffusers takes its sines of float32 angles."""
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(folder / "transformer").condition_embedder
    timesteps = schedule("unipc", STEPS, 5).timesteps
    with torch.no_grad():
        e = theirs.time_embedder(theirs.timesteps_proj(timesteps).float())
        expected = e if signal == "time" else theirs.time_proj(theirs.act_fn(e))
    ours = embedding(read_dit(folder / "transformer"), signal)(timesteps)
    assert ((ours - expected).norm() / expected.norm()).item() < 2e-5


# --- the rule


class Upstream:
    """TeaCache's rule by its published description, counting calls: of each pair one with and one without the prompt,
    each half with a state of its own."""

    def __init__(self, coefficients: tuple[float, ...], threshold: float, *, first: int, last: int):
        self.rescale, self.threshold = np.poly1d(coefficients), threshold
        self.first, self.last, self.calls = 2 * first, 2 * last, 0
        self.halves = [{"sum": 0.0, "before": None} for _ in range(2)]

    def computes(self, signal: Tensor) -> bool:
        half, count = self.halves[self.calls % 2], self.calls
        self.calls += 1
        if count < self.first or count >= self.last:
            half["sum"], computes = 0.0, True
        else:
            change = ((signal - half["before"]).abs().mean() / half["before"].abs().mean()).item()
            half["sum"] += self.rescale(change)
            computes = not half["sum"] < self.threshold
            half["sum"] = 0.0 if computes else half["sum"]
        half["before"] = signal
        return computes


def apart(rule, seed: int, most: float) -> Tensor:
    """Embeddings [N, 8] whose neighbours lie as far apart as a polynomial can tell: its values from 0 to ``most``."""
    found = np.linspace(0.001, 0.4, 4000)
    found = found[[0 < rule(change) < most for change in found]]
    chosen = np.random.default_rng(seed).choice(found, STEPS)
    signs = torch.tensor([1.0, -1, 1, 1, -1, 1, -1, -1])
    return torch.from_numpy(np.cumprod(1 + chosen))[:, None].float() * signs


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("half", [0, 1], ids=["quality", "speed"])
def test_on_given_distances_it_leaves_out_what_the_published_rule_does(name: str, half: int):
    """At the published thresholds, with the first five of 50 steps computed; but for the last step, which ours
    computes. Not on trained weights: the distances are made up in the polynomial's range."""
    rule = POLYNOMIALS[name]
    threshold = rule.usual[half]
    embedded = apart(rule, seed=len(name), most=0.6 * threshold)
    upstream = Upstream(rule.coefficients, threshold, first=5, last=STEPS)
    pairs = [(upstream.computes(row), upstream.computes(row)) for row in embedded]
    theirs = {i for i, (cond, uncond) in enumerate(pairs) if cond and uncond}
    assert all(cond == uncond for cond, uncond in pairs)  # both halves see the same signal
    cache = StepCache("teacache", threshold, dense=0.1, most=STEPS, tea=rule, embed=lambda _: embedded)
    along = schedule("unipc", STEPS, 5)
    ours = cache.planned(along, ["only"] * STEPS, 0, STEPS)
    assert ours == theirs | {STEPS - 1} and len(ours) < 40
    assert cache.growths(along) == pytest.approx(growths(rule, embedded))


def test_never_more_in_a_row_than_allowed():
    rule = POLYNOMIALS["Wan2.1-T2V-14B"]
    cache = StepCache("teacache", 1.0, most=2, tea=rule, embed=lambda t: torch.ones(len(t), 1))  # it expects no change
    computed = sorted(cache.planned(schedule("unipc", STEPS, 5), ["only"] * STEPS, 0, STEPS))
    assert computed[:10] == list(range(10))  # the first fifth
    assert {b - a for a, b in zip(computed[9:], computed[10:], strict=False)} <= {1, 2, 3} and len(computed) == 24


# --- of models


def test_models_go_by_their_own_polynomial():
    assert name_for(VARIANTS["t2v-1.3B"], "x") == "Wan2.1-T2V-1.3B"
    assert name_for(VARIANTS["t2i-14B"], "x") == "Wan2.1-T2V-14B"
    assert name_for(VARIANTS["i2v-14B"], "wan2.1_i2v_480p_14B_fp8.safetensors") == "Wan2.1-I2V-14B-480P"
    assert name_for(VARIANTS["i2v-14B"], "Wan2.1-I2V-14B-720P") == "Wan2.1-I2V-14B-720P"
    assert name_for(VARIANTS["ti2v-5B"], "x") == "Wan2.2-TI2V-5B"
    assert [name_for(VARIANTS[task], "x") for task in ("t2v-A14B", "i2v-A14B", "flf2v-14B")] == [None] * 3


def test_the_plan_is_known_before_the_run_and_kept(folder: Path):
    """Random weights: a threshold at which some steps are left out. What was foretold is what was computed."""
    models = read_models(folder, "t2v-1.3B", dtype="float32")
    cache = step_cache("teacache", models.dit.variant, models.dit.high, amount=0.999, dense=0.1)
    cache = replace(cache, tea=replace(cache.tea, coefficients=(1.0, 0.0)))  # the change itself
    models = replace(models, dit=replace(models.dit, step_cache=cache))
    request = Request("a cat", "", size=(64, 32), frames=5, steps=20, seed=3, guidance=PerExpert(1.0, 1.0))
    request = request.completed(models.dit.variant)
    foretold = cache.planned(request.timetable(), ["only"] * 20, 0, 20)
    computed = set()
    generate(
        models,
        request,
        Engine(),
        device=CPU,
        on_step=lambda report: computed.add(report.index) if report.computed else None,
    )
    assert computed == foretold and 0 < len(foretold) < 20
    said = cache.forecast(request.timetable(), ["only"] * 20, 0, 20)
    assert f"teacache, the polynomial of Wan2.1-T2V-1.3B: {len(foretold)} of 20 steps" in said


@pytest.mark.parametrize("task", ["t2v-A14B", "flf2v-14B"])
def test_models_without_a_polynomial_are_told_what_to_use(task: str, tmp_path: Path):
    write_tiny(tmp_path, task, sizes=SIZES)
    models = read_models(tmp_path, task)
    cache = step_cache("teacache", models.dit.variant, models.dit.high, models.dit.low)
    models = replace(models, dit=replace(models.dit, step_cache=cache))
    experts = ["high", "low"] if task == "t2v-A14B" else ["only"] * 2
    with pytest.raises(WanError, match="No polynomial of TeaCache is published.*magnitude.*easy"):
        cache.check(schedule("unipc", 20, 5), "unipc", experts * 10)
    if task == "t2v-A14B":  # with another model's polynomial too
        forced = step_cache("teacache", models.dit.variant, models.dit.high, models.dit.low, tea_model="Wan2.1-T2V-14B")
        models = replace(models, dit=replace(models.dit, step_cache=forced))
        request = Request("a cat", size=(64, 32), frames=5, steps=20).completed(models.dit.variant)
        with pytest.raises(WanError, match="two experts"):
            check_run(models, request, Engine(), CPU)


def test_unknown_models_are_named(folder: Path):
    models = read_models(folder, "t2v-1.3B")
    with pytest.raises(WanError, match="Unknown TeaCache model 'Wan2.1-T2V-15B'.*Wan2.1-T2V-14B"):
        step_cache("teacache", models.dit.variant, models.dit.high, tea_model="Wan2.1-T2V-15B")


def test_a_model_that_another_program_holds_is_refused():
    cache = StepCache("teacache", 0.1, tea=POLYNOMIALS["Wan2.1-T2V-14B"])
    with pytest.raises(WanError, match="another program holds this model.*easy"):
        cache.check(schedule("unipc", 20, 5), "unipc", ["only"] * 20)


def test_what_adds_up_starts_again_after_a_computed_step():
    rule = replace(POLYNOMIALS["Wan2.1-T2V-14B"], coefficients=(1.0, 0.0))
    embedded = torch.cumprod(torch.full((20, 1), 1.04), dim=0)  # each step moves 0.04
    cache = StepCache("teacache", 0.1, dense=0, most=9, tea=rule, embed=lambda _: embedded)
    steps = CachedSteps(cache, schedule("unipc", 20, 5), ["only"] * 20, 0, 20)
    asked: list[int] = []
    for i in range(20):
        steps.answer(i, torch.ones(1), lambda i=i: (asked.append(i), torch.zeros(1))[1])
    assert asked == [0, 1, 4, 7, 10, 13, 16, 19]
