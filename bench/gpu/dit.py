"""A forward pass of 8 layers at the real widths: ours, diffusers and ComfyUI on the same random weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from wan_core.models.dit.dit import WanDiT, keeps_float32

from .. import peers
from ..peers import COMFYUI, DIFFUSERS, PREPARED
from .card import Card, relative
from .pieces import without_kernels
from .shapes import A14B_480P, A14B_720P, Size, sizes

PLAIN = "ours, without kernels"
LAYERS = 8
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}  # of a contender's answer to ours, in the norm


def rows(card: Card) -> dict:
    found = {}
    for size in sizes(card):
        size = size.shortened(2 if card.quick else LAYERS)
        found |= compete(card, size)
        card.clear()
    return found | growth(found)


def growth(found: dict) -> dict:
    """Cost by tokens, of one model at two sizes: the exponents of time and of operations."""
    made = {size.name: size.shortened(LAYERS) for size in (A14B_720P, A14B_480P)}
    pair = [(size, found.get(row_of(size, PREPARED))) for size in made.values()]
    if not all(row for _, row in pair):
        return {}
    (large, slow), (small, fast) = pair
    tokens = math.log(large.tokens / small.tokens)
    exponents = [math.log(a / b) / tokens for a, b in (
        (slow["seconds"], fast["seconds"]), (large.block_flops(), small.block_flops()))]  # fmt: skip
    said = "from {} to {} tokens seconds grow as tokens^{:.2f}, operations as tokens^{:.2f}"
    return {"cost": said.format(small.tokens, large.tokens, *exponents)}


def row_of(size: Size, name: str) -> str:
    return f"{size.name}, {size.tokens} tokens, {size.config.layers} layers, {name}"


def compete(card: Card, size: Size) -> dict:
    weights, inputs = random_weights(card, size), size.inputs(card)
    calls = {name: contender(name, card, size, weights) for name in (PREPARED, DIFFUSERS, COMFYUI)}
    if card.is_cuda:
        calls[PLAIN] = lambda *args: without_kernels(lambda: calls[PREPARED](*args))
    answers = {name: call(*inputs) for name, call in calls.items()}
    errors = {name: relative(answer, answers[PREPARED]) for name, answer in answers.items()}
    for name, error in errors.items():
        if not error <= TOLERANCE[card.dtype]:
            raise SystemExit(f"{size.name}: {name} and ours differ by {error:.1e}. A wrong answer is not timed.")
    del answers
    peaks = {name: card.peak_gb(lambda call=call: call(*inputs)) for name, call in calls.items()}
    times = card.interleaved({name: (lambda call=call: call(*inputs)) for name, call in calls.items()}, 3)
    flops = size.block_flops() * size.config.layers
    return {
        row_of(size, name): {
            "seconds": seconds,
            "tflops": flops / seconds / 1e12,
            "ours_over_it": times[PREPARED] / seconds,
            "peak_gb": peaks[name],
            "difference": errors[name],
        }
        for name, seconds in times.items()
    }


def random_weights(card: Card, size: Size) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        dit = WanDiT(size.config)
    made = card.weights(dit, card.dtype)
    return {key: value.float() if keeps_float32(key) else value for key, value in made.items()}


def contender(name: str, card: Card, size: Size, weights: dict[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Each in the dtypes that its own loader would leave."""
    if name == PREPARED:
        return peers.DITS[name](size.config, weights)
    exact = _float32_of_diffusers if name == DIFFUSERS else _float32_of_comfyui
    theirs = {key: value.to(torch.float32 if exact(key) else card.dtype) for key, value in weights.items()}
    call = peers.DITS[name](size.config, theirs)
    return lambda x, t, text: call(x.to(card.dtype), t, text.to(card.dtype)).float()


def _float32_of_diffusers(key: str) -> bool:
    return ".norm3." in key or key.endswith("modulation") or key.startswith("time_embedding.")


def _float32_of_comfyui(key: str) -> bool:
    return key.startswith("patch_embedding.")
