"""Blocks that stream from a written file beside the same blocks resident: seconds, peaks against the plan, and bits."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from wan_core.config import VARIANTS
from wan_core.loading.dit import read_dit
from wan_core.memory.budget import GB
from wan_core.memory.build import build_dit
from wan_core.memory.plan import plan
from wan_core.recipe import ModelRecipe

from ..memory import of_one_call
from .card import Card
from .dit import random_weights
from .shapes import Size, sizes

LAYERS = 8


def rows(card: Card) -> dict:
    size = sizes(card)[-1 if card.quick else 1].shortened(2 if card.quick else LAYERS)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        weights = random_weights(card, size)
        save_file({key: value.to(torch.bfloat16).cpu() for key, value in weights.items()}, file)
        del weights
        card.clear()
        return {name: row for size_ in _sizes(card, size) for name, row in compare(card, size_, file).items()}


def _sizes(card: Card, size: Size) -> list[Size]:
    return [size] if card.quick else [size, sizes(card)[0].shortened(LAYERS)]


def compare(card: Card, size: Size, path: Path) -> dict:
    file, (x, t, text) = read_dit(path), size.inputs(card)
    layers, found, expected = size.config.layers, {}, None
    for swapped, prefetch in ((0, 0), (layers, 0), (layers, 1), (layers // 2, 1)):
        recipe = ModelRecipe(
            file,
            dtype="bfloat16" if card.is_cuda else "float32",
            swap_blocks=swapped,
            prefetch=prefetch,
            variant=VARIANTS["t2v-14B"],
        )
        planned = plan(recipe, tuple(x.shape), card.device, prompts=1)
        began, built = time.monotonic(), []

        def use(planned=planned, built=built) -> None:
            dit = build_dit(
                file, device=card.device, dtype=planned.dtype, swap_blocks=planned.swapped, prefetch=planned.prefetch
            )
            built += [dit, dit.text_states(text, keep=False), time.monotonic()]
            built.append(dit(x, t, built[1]))

        peak = card.peak_gb(use)
        if peak is None:
            use()
        dit, states, loaded, answer = built
        expected = answer if expected is None else expected
        found[f"{size.name}, {swapped} of {layers} blocks stream, prefetch {prefetch}"] = {
            "seconds": card.seconds(lambda dit=dit, states=states: dit(x, t, states), 3, 1),
            "loading_s": loaded - began,
            "moved_gb": planned.moved / GB,
            "peak_gb": peak,
            "planned_gb": of_one_call(planned) / GB,
            "same_bits": torch.equal(answer, expected),
        }
        built.clear()
        del dit, states, answer
        card.clear()
    return found
