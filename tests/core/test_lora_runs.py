"""LoRAs on quantised and streamed models, through the engine, and over the steps of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.core.lora_files import DIALECTS_OF_LORA, STRENGTH, paths
from tests.core.quant_files import is_matrix, write_gguf
from tests.core.test_lora import CONFIG, close, inputs, velocity, weights_of
from wan_core.config import PerExpert
from wan_core.errors import WanError
from wan_core.layouts.dit import packs
from wan_core.loading.dit import read_dit
from wan_core.lora.apply import PatchedLinear, adaptation_of
from wan_core.lora.attach import with_lora
from wan_core.lora.files import read_lora
from wan_core.lora.use import bytes_beside
from wan_core.memory.build import build_dit
from wan_core.memory.engine import Engine
from wan_core.memory.plan import dit_budget
from wan_core.memory.stream import transfer as offload
from wan_core.memory.stream.transfer import HostBackend
from wan_core.models.dit.dit import WanDiT
from wan_core.quant.fp8 import FP8
from wan_core.quant.int8 import Int8
from wan_core.quant.linear import QuantLinear
from wan_core.recipe import Loras, LoraUse, ModelRecipe, pair
from wan_core.sampling.denoise import Run, denoise
from wan_core.sampling.experts import Switch
from wan_core.sampling.guidance import Condition
from wan_core.sampling.schedules import schedule
from wan_core.tools.tiny import _random_weights

# One that is added, one that is merged each time, one that needs the whole matrix, one of vectors too; then those that
# change a weight by what it is.
KINDS = ("A_B_alpha_everywhere", "lokr_two", "dora_columns", "differences", "glora", "oft", "boft")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two experts in float32, the first in bfloat16 and GGUF too, and a LoRA of each kind in bfloat16."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("base", "other")):
        weights = _random_weights(WanDiT, CONFIG, torch.Generator().manual_seed(seed))
        weights = {key: value.bfloat16().float() for key, value in weights.items()}
        save_file(weights, folder / f"{name}.safetensors")
        if name == "base":
            save_file({key: value.bfloat16() for key, value in weights.items()}, folder / "bf16.safetensors")
            kind_of = lambda key, value: "Q8_0" if is_matrix(key, value) and "blocks" in key else "F32"  # noqa: E731
            write_gguf(folder / "base.gguf", weights, kind_of)
    base = weights_of(folder / "base.safetensors")
    for kind in KINDS:
        torch.manual_seed(5)
        tensors = {key: value.bfloat16() for key, value in DIALECTS_OF_LORA[kind].make(base)[0].items()}
        save_file(tensors, folder / f"{kind}.safetensors")
    return {path.name.removesuffix(".safetensors"): path for path in folder.iterdir()}


@pytest.fixture
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader thread, the ring and the slots, as on CUDA, with plain memory."""
    monkeypatch.setitem(offload.BACKENDS, "cpu", HostBackend)


def dequantised(dit: WanDiT) -> dict[str, Tensor]:
    weights = dict(dit.state_dict())
    for name, layer in dit.named_modules():
        if isinstance(layer, QuantLinear):
            weights[f"{name}.weight"] = layer.packed.dequantise()
    return weights


def expected_on(dit: WanDiT, kind: str, folder: Path) -> Tensor:
    """What the model of the dequantised weights answers with the LoRA merged in float32."""
    with torch.device("meta"):
        wanted = WanDiT(CONFIG).state_dict()
    weights = {key: value for key, value in dequantised(dit).items() if key in wanted}
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "plain.safetensors")
    file = read_dit(folder / "plain.safetensors")
    merged = build_dit(file, dtype="float32")
    adaptation_of(merged, file).set([read_lora(folder / f"{kind}.safetensors", file)], [STRENGTH], merge=True)
    return merged(*inputs())


@pytest.mark.parametrize("swap_blocks", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, dtype", [("base", "fp8_e4m3fn"), ("base", "int8"), ("base.gguf", "float32")])
def test_on_quantised_weights_it_works_in_the_dequantised_space(
    files, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, kind: str, swap_blocks: int
):
    """To 1e-5 of the float32 merge with the dequantised matrices; packed matrices stay packed."""
    for kind_of_format in (FP8, Int8):  # their products round what goes into a layer; the weights are the question
        monkeypatch.setattr(kind_of_format, "multiply", lambda *_: None)
    file = read_dit(files[name])
    lora = read_lora(files[kind], file)
    plain = build_dit(file, dtype=dtype)
    expected = expected_on(plain, kind, files["base"].parent)
    before = plain(*inputs())
    dit = build_dit(file, dtype=dtype, swap_blocks=swap_blocks)
    adaptation_of(dit, file).set([lora], [STRENGTH])
    assert close(dit(*inputs()), expected, 1e-5)
    assert not close(before, expected, 1e-2)
    assert sum(isinstance(layer, QuantLinear) for layer in dit.modules()) == 10 * CONFIG.layers
    adaptation_of(dit, file).set([lora], [0.0])
    assert torch.equal(dit(*inputs()), before)


@pytest.mark.usefixtures("in_a_thread")
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_travel_with_streamed_blocks(files, kind: str, prefetch: int):
    """Three calls, then another strength, then none: as resident, to 1e-5, and without the LoRA to the bit."""
    file = read_dit(files["bf16"])
    lora = read_lora(files[kind], file)
    dit = build_dit(file, dtype="float32", swap_blocks=3, prefetch=prefetch)
    plain = dit(*inputs())
    own = dit.swap.block_bytes
    for strength in (STRENGTH, -0.4, 0.0):
        adaptation_of(dit, file).set([lora], [strength])
        expected = velocity(files["base"], (files[kind], strength))
        assert all(close(dit(*inputs()), expected, 1e-5) for _ in range(3))
        assert (dit.swap.block_bytes > own) == (kind == KINDS[0])  # the others are merged as they lie in the file
    adaptation_of(dit, file).set([], [])
    assert torch.equal(dit(*inputs()), plain) and dit.swap.block_bytes == own


@pytest.mark.parametrize("swap_blocks", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_no_further_off_than_merging_and_rounding(files, kind: str, swap_blocks: int):
    """Error against the float32 model, beside that of a bfloat16 model of weights merged in float32 and rounded."""
    options = {"dtype": "bfloat16", "swap_blocks": swap_blocks}
    exact = velocity(files["base"], (files[kind], STRENGTH))
    merged = velocity(files["base"], (files[kind], STRENGTH), merge=True, dtype="bfloat16")
    ours = velocity(files["bf16"], (files[kind], STRENGTH), **options)
    assert (ours - exact).norm() <= 1.25 * (merged - exact).norm()


def recipe_of(files, *uses: LoraUse) -> ModelRecipe:
    return ModelRecipe(read_dit(files["base"]), dtype="float32", loras=Loras(high=uses))


def run(
    engine: Engine,
    recipe: ModelRecipe,
    *,
    steps: int = 3,
    start: int = 0,
    x: Tensor | None = None,
    end: int | None = None,
) -> Tensor:
    noise, _, text = inputs()
    experts = engine.experts(recipe, PerExpert(1, 1), "cpu")
    plan = schedule("simple", steps, 5.0, solver="euler")
    walk = Run(plan, "euler", Condition(text), start=start, end=end)
    return denoise(noise if x is None else x, experts, walk).x


def use(files, kind: str, strength: float = STRENGTH, **steps: int) -> LoraUse:
    return LoraUse(read_lora(files[kind], read_dit(files["base"])), strength, **steps)


def test_other_strengths_and_other_loras_load_nothing_again(files):
    engine = Engine()
    plain = run(engine, recipe_of(files))
    for uses in ([use(files, KINDS[0])], [use(files, KINDS[0], 0.3)], [use(files, KINDS[1]), use(files, KINDS[0])]):
        assert not close(run(engine, recipe_of(files, *uses)), plain, 1e-2)
        fresh = Engine()
        assert torch.equal(run(engine, recipe_of(files, *uses)), run(fresh, recipe_of(files, *uses)))
    assert torch.equal(run(engine, recipe_of(files)), plain)
    assert engine.loads == 1


def test_strength_0_costs_nothing(files):
    engine = Engine()
    recipe = recipe_of(files, use(files, KINDS[0], 0.0))
    assert torch.equal(run(engine, recipe), run(engine, recipe_of(files)))
    assert engine.dit(recipe.high, recipe, "cpu").adaptation is None
    assert dit_budget(recipe.high, recipe, "cpu") == dit_budget(recipe.high, recipe_of(files), "cpu")


@pytest.mark.parametrize("first, last", [(2, None), (0, 1), (1, 1)])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]])
def test_steps_outside_of_its_range_are_the_plain_models(files, kind: str, first: int, last: int | None):
    """To the bit: the run step by step, each with the LoRA or without, in an engine of its own."""
    found = run(Engine(), recipe_of(files, use(files, kind, first_step=first, last_step=last)))
    with_lora, without = (Engine(), recipe_of(files, use(files, kind))), (Engine(), recipe_of(files))
    x = None
    for step in range(3):
        inside = first <= step and (last is None or step <= last)
        x = run(*(with_lora if inside else without), start=step, end=step + 1, x=x)
    assert torch.equal(found, x)
    assert not torch.equal(found, run(*with_lora)) and not torch.equal(found, run(*without))


def test_the_memory_that_is_told_of_grows_with_the_adapters(files):
    """Resident updates at the width of the computation; freed when the LoRA is gone."""
    engine, added = Engine(), use(files, KINDS[0])
    plain, with_lora = recipe_of(files), recipe_of(files, added)
    tensors = added.file.checkpoint.tensors
    beside = 4 * sum(math.prod(info.shape) for key, info in tensors.items() if ".blocks." in key and "lora" in key)
    alphas = len(paths(weights_of(files["base"]))) * 4
    engine.dit(plain.high, plain, "cpu")
    before = engine.bytes_on("cpu")
    run(engine, with_lora)
    assert engine.bytes_on("cpu") - before == pytest.approx(beside + alphas, abs=alphas)
    run(engine, plain)
    assert engine.bytes_on("cpu") == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_adapters_hold_is_what_is_counted(files, kind: str):
    """Beside packed matrices, to the byte but for alphas, which are not kept; rotations in float32."""
    file = read_dit(files["base"])
    lora, dit = read_lora(files[kind], file), build_dit(file, dtype="fp8_e4m3fn")
    adaptation_of(dit, file).set([lora], [STRENGTH])
    held = sum(
        buffer.nbytes
        for layer in dit.modules()
        if isinstance(layer, PatchedLinear)
        for adapter in layer.adapters
        for buffer in adapter.buffers()
    )
    beside = [key for key in lora.parts if packs(key)]
    told = sum(bytes_beside([LoraUse(lora, STRENGTH)], key, dit.dtype) for key in beside)
    assert held and held <= told <= held + 4 * len(beside)


def test_each_expert_has_its_own(files):
    """LoRAs before Wan Expert Switch stay with their side; the low-noise expert's are not the high one's."""
    high = recipe_of(files, use(files, KINDS[0]))
    low = replace(recipe_of(files, use(files, KINDS[1], 0.3)), high=read_dit(files["other"]))
    both = pair(high, low, Switch("step", 2))
    assert [one.strength for one in both.loras.high] == [STRENGTH]
    assert [one.strength for one in both.loras.low] == [0.3]
    halfway = run(Engine(), high, end=2)
    assert torch.equal(run(Engine(), both), run(Engine(), low, start=2, x=halfway))


def test_one_file_as_both_experts_has_each_sides_own(files):
    """The weights are loaded once, and the LoRAs change with the expert; run again, from the first one's."""
    first, second = (recipe_of(files, use(files, kind)) for kind in KINDS[:2])
    both = pair(first, replace(second, high=first.high), Switch("step", 2))
    expected = run(Engine(), second, start=2, x=run(Engine(), first, end=2))
    engine = Engine()
    assert torch.equal(run(engine, both), expected) and torch.equal(run(engine, both), expected)
    assert engine.loads == 1


def test_the_halves_of_one_lora_file_change_with_the_expert(files, tmp_path: Path):
    """A file for both experts, on one model as both: its halves have the file's fingerprint in common."""
    made = load_file(files[KINDS[0]])
    halves = {
        f"{top}.{key.removeprefix('diffusion_model.')}": value * scale
        for top, scale in (("transformer", 1), ("transformer_2", -1))
        for key, value in made.items()
    }
    save_file(halves, tmp_path / "both.safetensors")
    plain = recipe_of(files)
    model, _ = with_lora(pair(plain, plain, Switch("step", 1)), tmp_path / "both.safetensors", PerExpert(1, 1))
    engine = Engine()
    found = run(engine, model)
    low = replace(plain, loras=Loras(high=model.loras.low))
    high = replace(plain, loras=Loras(high=model.loras.high))
    expected = run(Engine(), low, start=1, x=run(Engine(), high, end=1))
    assert torch.equal(found, expected) and not close(found, run(engine, high), 1e-3)


def test_a_lora_changed_on_disk_is_refused(files, tmp_path: Path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(files[KINDS[0]].read_bytes())
    file = read_dit(files["base"])
    recipe = recipe_of(files, LoraUse(read_lora(path, file), 1.0))
    path.write_bytes(files[KINDS[1]].read_bytes())
    with pytest.raises(WanError, match="changed or removed"):
        run(Engine(), recipe)
