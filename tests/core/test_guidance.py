"""Classifier-free guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wan_core.errors import WanError
from wan_core.sampling.guidance import Condition, guided

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
