"""Classifier-free guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wan_core.errors import WanError
from wan_core.sampling.guidance import Condition, Entry, guided, predicted, sigma_at, silent

POSITIVE, NEGATIVE = Condition(torch.full((1, 2, 3), 2.0)), Condition(torch.full((1, 2, 3), -1.0))
X = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))


class Model:
    """Answers with x times the mean of the text, in bfloat16 as a fast model might."""

    def __init__(self):
        self.seen: list[Condition] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, on_block=None) -> Tensor:
        self.seen.append(condition)
        if on_block:
            on_block(0)
        return (x * condition.text.mean()).bfloat16()


def test_away_from_the_negative_prompt():
    model = Model()
    made = guided(model, X, torch.tensor([500.0]), POSITIVE, NEGATIVE, 3.5)
    cond, uncond = (X * 2).bfloat16().float(), (-X).bfloat16().float()
    assert made.dtype == torch.float32
    assert torch.equal(made, uncond + 3.5 * (cond - uncond))
    assert model.seen == [POSITIVE, NEGATIVE]


@pytest.mark.parametrize("negative", [NEGATIVE, None])
def test_guidance_of_one_asks_once(negative: Condition | None):
    model = Model()
    made = guided(model, X, torch.tensor([500.0]), POSITIVE, negative, 1.0)
    assert model.seen == [POSITIVE]
    assert torch.equal(made, (X * 2).bfloat16().float())


def test_guidance_without_a_negative_prompt_is_refused():
    with pytest.raises(WanError, match="needs a negative prompt"):
        guided(Model(), X, torch.tensor([500.0]), POSITIVE, None, 5.0)


def test_every_block_of_both_passes_may_cancel():
    calls = []
    guided(Model(), X, torch.tensor([500.0]), POSITIVE, NEGATIVE, 2.0, on_block=calls.append)
    assert calls == [0, 0]


# --- several entries on a side


CALC_COND_BATCH = """
    import types
    from comfy import conds, samplers
    class Model:
        current_patcher = types.SimpleNamespace(
            prepare_state=lambda *_: None,  # of newer versions with the model's options
            apply_hooks=lambda hooks: {},
            get_free_memory=lambda device: 1.0,  # whom newer versions ask
        )
        def memory_required(self, *shapes, **options):
            return 1e30  # one at a time
        def apply_model(self, x, t, c_crossattn, transformer_options):
            velocity = torch.tanh(x.roll(1, dims=3) * c_crossattn.mean()) + c_crossattn.mean()
            return x - t.view(-1, 1, 1, 1, 1) * velocity
    side = []
    for entry in inputs["entries"]:
        cond = {"model_conds": {"c_crossattn": conds.CONDRegular(entry.pop("text"))}, "uuid": len(side)}
        side.append(entry | cond)
    x = inputs["x"]
    samplers.resolve_areas_and_cond_masks_multidim(side, x.shape[2:], "cpu")
    for sigma in inputs["sigmas"]:
        (outputs[sigma],) = samplers.calc_cond_batch(Model(), [side], x, torch.full((len(x),), sigma), {})
"""

LEFT, FADED = torch.zeros(1, 3, 3), torch.full((1, 3, 3), 0.5)
LEFT[..., :1] = 1
TEXTS = [torch.full((1, 2, 3), value) for value in (2.0, -1.0, 0.3)]
CASES = {
    "weights": ([{"strength": 0.3}, {"strength": 1.5}], [{"weight": 0.3}, {"weight": 1.5}]),
    "ranges": (
        [{"timestep_start": 1.0, "timestep_end": 0.5}, {"timestep_start": 0.5, "timestep_end": 0.1}],
        [{"first": 1.0, "last": 0.5}, {"first": 0.5, "last": 0.1}],
    ),
    "masks": (
        [{"mask": LEFT, "strength": 0.5}, {"mask": FADED}, {}],
        [{"weight": LEFT[None, None] * 0.5}, {"weight": FADED[None, None]}, {}],
    ),
    "places without": ([{"mask": LEFT}], [{"weight": LEFT[None, None]}]),
    "default": ([{"mask": LEFT}, {"default": True}], [{"weight": LEFT[None, None]}, {"rest": True}]),
    "default beside a whole one": ([{"strength": 1.0}, {"default": True}], [{}, {"rest": True}]),
    "default alone at times": (
        [{"timestep_start": 1.0, "timestep_end": 0.5}, {"default": True}],
        [{"first": 1.0, "last": 0.5}, {"rest": True}],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_entries_are_averaged_as_in_comfyui(in_comfyui, case: str):
    """Against calc_cond_batch, around a toy network, at noise levels in, at the edges of, and outside the ranges."""
    theirs, ours = CASES[case]
    sigmas = [0.9, 0.5, 0.25, 0.05]
    given = [entry | {"text": text} for entry, text in zip(theirs, TEXTS, strict=False)]
    expected = in_comfyui(CALC_COND_BATCH, entries=given, x=X, sigmas=sigmas)
    side = tuple(Entry(Condition(text), **entry) for entry, text in zip(ours, TEXTS, strict=False))

    def model(x: Tensor, t: Tensor, condition: Condition, on_block=None) -> Tensor:
        return torch.tanh(x.roll(1, dims=3) * condition.text.mean()) + condition.text.mean()

    for sigma in sigmas:
        clean = X - sigma * predicted(model, X, torch.tensor([1000 * sigma]), sigma, side)
        assert (clean - expected[sigma]).abs().max() <= 1e-5, sigma


def test_percentages_are_comfyuis_noise_levels(in_comfyui):
    code = """
        from comfy.model_sampling import ModelSamplingDiscreteFlow
        sampling = ModelSamplingDiscreteFlow()
        sampling.set_parameters(shift=5.0)
        outputs["sigmas"] = [sampling.percent_to_sigma(percent) for percent in inputs["percents"]]
    """
    percents = [-1.0, 0.0, 0.1, 0.5, 0.999, 1.0, 2.0]
    assert [sigma_at(percent, 5.0) for percent in percents] == in_comfyui(code, percents=percents)["sigmas"]


def test_a_prompt_out_of_its_range_is_not_asked():
    model, early = Model(), (Entry(POSITIVE, last=0.5), Entry(NEGATIVE, first=0.5))
    for sigma in (0.9, 0.4):
        predicted(model, X, torch.tensor([1000 * sigma]), sigma, early)
    assert model.seen == [POSITIVE, NEGATIVE]
    assert silent(early, [0.9, 0.5, 0.1]) == [] and silent(early[:1], [0.9, 0.5, 0.1]) == [2]
    assert silent(POSITIVE, [0.9]) == []
