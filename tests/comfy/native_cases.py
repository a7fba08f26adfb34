"""Cases of test_native_model.py, run as ``native_cases.py FOLDER --cpu`` (see cases.py), with a tiny pair in FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

folder = Path(sys.argv.pop(1))

import comfy.options  # noqa: E402, TID251

comfy.options.enable_args_parsing()

import torch  # noqa: E402
from cases import import_pack, report  # noqa: E402

import_pack()
from wan_pack.nodes import native  # noqa: E402
from wan_pack.wan_core.loading.dit import read_dit  # noqa: E402
from wan_pack.wan_core.memory.engine import Engine  # noqa: E402
from wan_pack.wan_core.memory.plan import dit_budget  # noqa: E402
from wan_pack.wan_core.models.dit.dit import WanDiT  # noqa: E402
from wan_pack.wan_core.recipe import ModelRecipe  # noqa: E402

CPU = torch.device("cpu")
SHAPE = [1, 16, 2, 8, 8]
HALVES = {"cond_or_uncond": [1, 0]}


def recipe(**options: object) -> ModelRecipe:
    high, low = (read_dit(next(folder.glob(f"*{level}_noise*"))) for level in ("high", "low"))
    return ModelRecipe(high, low, dtype="float32", **options)


def halves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both prompts of one step, as ComfyUI joins them."""
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(SHAPE, generator=draw).expand(2, *SHAPE[1:])
    return latent, torch.full((2,), 950.0), torch.randn(2, 12, recipe().high.config.text_dim, generator=draw)


def batches(model: ModelRecipe) -> tuple[list[int], torch.Tensor]:
    """Sizes of the calls of the model for one joined step, and what it answers."""
    seen, compute = [], WanDiT.forward

    def watched(self: WanDiT, x: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        seen.append(len(x))
        return compute(self, x, *args, **options)

    network = native.WanAsNetwork(model, Engine(), CPU)
    WanDiT.forward = watched
    try:
        with torch.inference_mode():
            return seen, network(*halves(), transformer_options=HALVES)
    finally:
        WanDiT.forward = compute


def a_memory_limit_is_kept_for_one_prompt_at_a_time() -> None:
    together, joined = batches(recipe())
    apart, same = batches(recipe(vram_limit=0.05))
    assert (together, apart) == ([2], [1, 1])
    assert (joined - same).abs().max() <= 1e-5 * joined.abs().max()


def room_is_asked_for_the_weights_until_they_are_there() -> None:
    model, engine = recipe(), Engine()
    patcher = native.to_model(model, 5.0, engine, CPU)
    first = patcher.model.memory_required(SHAPE)
    with torch.inference_mode():
        patcher.model.diffusion_model(*halves(), transformer_options=HALVES)
    assert engine.loads == 1
    assert first - patcher.model.memory_required(SHAPE) == dit_budget(model.high, model, CPU).loaded


def with_a_memory_limit_the_plan_makes_room() -> None:
    plain, limited = (native.to_model(recipe(vram_limit=limit), 5.0, Engine(), CPU).model for limit in (None, 0.05))
    extra = plain.memory_required(SHAPE) - limited.memory_required(SHAPE)
    assert extra == dit_budget(recipe().high, recipe(), CPU).loaded


def what_other_nodes_reach_for_in_vain_is_told() -> None:
    network = native.to_model(recipe(), 5.0, Engine(), CPU).model.diffusion_model
    assert not hasattr(network, "blocks")
    try:
        network.blocks  # noqa: B018
    except AttributeError as error:
        assert "reaches for blocks" in str(error) and "Load Diffusion Model" in str(error)


CASES = (
    a_memory_limit_is_kept_for_one_prompt_at_a_time,
    room_is_asked_for_the_weights_until_they_are_there,
    with_a_memory_limit_the_plan_makes_room,
    what_other_nodes_reach_for_in_vain_is_told,
)


if __name__ == "__main__":
    report(CASES)
