"""A run's guidance at work: the model is asked by the rules, and its answers are made into one velocity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ..config import TEXT_LENGTH
from .experts import Expert, Model
from .guidance import Condition, OnBlock, Side, active, given, guided, predicted
from .guidance_rules import Answers, Guidance, Kept


class Guided:
    """Asked in place of a model.

    Args:
        note: told what the user should know.

    Attributes:
        calls: how often the model has been asked.
    """

    def __init__(
        self,
        guidance: Guidance,
        positive: Side,
        negative: Side | None,
        on_block: OnBlock | None = None,
        note: Callable[[str], None] = lambda text: None,
    ):
        self.guidance, self.positive, self.negative = guidance, positive, negative
        self.on_block, self.note = on_block, note
        self.calls = 0
        self._merged: dict[tuple[int, int], Condition | None] = {}  # by both keys

    def velocity(self, expert: Expert, x: Tensor, t: Tensor, sigma: float, kept: Kept) -> tuple[Tensor, Kept]:
        """The guided velocity [B,C,T,h,w], float32, and what the next step is to find.

        Args:
            kept: by the step before. It is not changed: a step that is done again begins with the same.

        Raises:
            WanError: a scale other than 1 without a negative side.
        """
        model = self._counted(expert.model)
        if not self.guidance:
            negative, scale = self.negative, expert.guidance
            return guided(model, x, t, self.positive, negative, scale, self.on_block, sigma=sigma), kept
        positive = self.positive
        for rule in self.guidance.rules:
            positive = rule.positive(positive, self.negative, sigma)
        if expert.guidance == 1 or not self.guidance.asks_both(sigma):
            return predicted(model, x, t, sigma, positive, self.on_block), kept
        c, u = self._both(model, x, t, sigma, positive, given(self.negative, expert.guidance))
        for rule in self.guidance.rules:
            u = rule.unconditional(c, u)
        answers = Answers(c, u, expert.guidance, x, sigma)
        for rule in self.guidance.rules:
            if (joined := rule.joined(answers, kept)) is not None:
                return joined
        return u + expert.guidance * (c - u), kept

    def _both(
        self, model: Model, x: Tensor, t: Tensor, sigma: float, positive: Side, negative: Side
    ) -> tuple[Tensor, Tensor]:
        for rule in self.guidance.rules:
            negative = rule.negative(negative, sigma)
        both = self._in_one(positive, negative, sigma, x) if self.guidance.merges else None
        if both is None:
            c, u = (predicted(model, x, t, sigma, side, self.on_block) for side in (positive, negative))
            return c, u
        c, u = model(torch.cat([x, x]), torch.cat([t, t]), both, on_block=self.on_block).float().chunk(2)
        return c, u

    def _in_one(self, positive: Side, negative: Side, sigma: float, x: Tensor) -> Condition | None:
        """Both sides as one condition, the same object whenever they are the same; None where they are no pair."""
        c, u = active(positive, sigma), active(negative, sigma)
        if c is None or u is None:
            return None
        if (c.key, u.key) not in self._merged:
            self._merged[c.key, u.key] = merged(c, u, len(x))
            if self._merged[c.key, u.key] is None:
                self.note("cfg_merge: the prompts carry unlike things, so that they are asked one after the other.")
        return self._merged[c.key, u.key]

    def _counted(self, model: Model) -> Model:
        def ask(*args: Any, **options: Any) -> Tensor:
            self.calls += 1
            return model(*args, **options)

        return ask


def merged(first: Condition, second: Condition, batch: int) -> Condition | None:
    """Two conditions of a batch as one of twice as many; None if their inputs or lengths are unlike."""
    text = _stacked(*_of_one_length(first.text, second.text), batch)
    kinds = [type(one) for one in first.inputs]
    if text is None or kinds != [type(one) for one in second.inputs]:
        return None
    inputs = [_both_inputs(a, b, batch) for a, b in zip(first.inputs, second.inputs, strict=True)]
    return None if None in inputs else Condition(text, tuple(inputs))


def _of_one_length(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Texts with zeros behind the shorter one, which has them anyway up to the length that models see."""
    rows = max(first.shape[1], second.shape[1])
    if rows > TEXT_LENGTH:
        return first, second
    a, b = (torch.nn.functional.pad(text, (0, 0, 0, rows - text.shape[1])) for text in (first, second))
    return a, b


def _both_inputs(first: Any, second: Any, batch: int) -> Any | None:
    """Two inputs of one kind, whose fields are tensors."""
    stacked = {one.name: _stacked(getattr(first, one.name), getattr(second, one.name), batch) for one in fields(first)}
    return None if None in stacked.values() else replace(first, **stacked)


def _stacked(first: Tensor, second: Tensor, batch: int) -> Tensor | None:
    """[1 or B, …] twice -> [2B, …]; None if they differ in what follows."""
    if first.shape[1:] != second.shape[1:]:
        return None
    return torch.cat([one.expand(batch, *one.shape[1:]) for one in (first, second.to(first.device))])
