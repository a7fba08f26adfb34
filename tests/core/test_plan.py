"""What the planner says: against the real modules without data, against measured memory, and against a budget."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan_core.config import TEXT_LENGTH, Architecture, VAEConfig
from wan_core.errors import WanError
from wan_core.files.checkpoint import Checkpoint
from wan_core.files.marks import TensorInfo
from wan_core.loading.dit import DiTFile, read_dit
from wan_core.mapped import is_mapped
from wan_core.memory.activations import _traced, dit_activations, vae_budget
from wan_core.memory.build import build_dit
from wan_core.memory.plan import check_fits, check_frames_fit, context_tokens, plan, smaller, weights_of
from wan_core.memory.stream.ring import spread
from wan_core.models.dit import dit
from wan_core.models.dit.dit import TOKENS_AT_ONCE, WanDiT
from wan_core.models.dit.features.clip_tokens import ClipTokensConfig
from wan_core.models.dit.layers import SLICE
from wan_core.models.dit.rope import SLICE as ROTATED_AT_ONCE
from wan_core.pipeline import read_models
from wan_core.recipe import ModelRecipe
from wan_core.tools.tiny import TinySizes, _random_weights, write_tiny

A14B = Architecture(16, 16, 5120, 13824, layers=40, text_dim=4096, freq_dim=256, heads=40)
TI2V_5B = Architecture(48, 48, 3072, 14336, layers=30, text_dim=4096, freq_dim=256, heads=24)
I2V_14B = replace(A14B, in_channels=36, features=(ClipTokensConfig(1280),))
FLF2V_14B = replace(A14B, in_channels=36, features=(ClipTokensConfig(1280, 514),))


def counted_by_hand(
    config: Architecture,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    fused: bool = False,
    whole: bool = False,
    against: bool = False,
) -> int:
    """The peak of a block as one reads it off the code: copies of the tokens at each hungry moment, and pieces."""
    item, dim = dtype.itemsize, config.dim
    wide = 0 if dtype == torch.float32 or fused else 4  # bytes of a number in a float32 island

    def piece(most: int, bytes_each: int, width: int = dim) -> int:
        return batch * min(tokens, most) * width * bytes_each

    x = batch * tokens * dim * item
    part = piece(TOKENS_AT_ONCE, item)  # what a layer answers before it is written over its argument
    given = part if batch > 1 and tokens > TOKENS_AT_ONCE else 0  # a part of several videos is gathered first
    text = 2 * batch * context_tokens(config) * dim * item
    branches = context_tokens(config) > TEXT_LENGTH  # which are heard beside the text, a part of the tokens at a time
    copy = 0 if tokens > TOKENS_AT_ONCE else x  # a short video's answer is a copy of its own
    moments = (
        6 * x if whole else 4 * x + part + given,  # tokens; queries, keys, values; (a part of) what is seen
        4 * x + bool(wide) * piece(ROTATED_AT_ONCE, 2 * wide + item),  # rotating the keys
        3 * x + 2 * part if branches else 4 * x,  # tokens, the same normed, queries, what is heard
        against * (3 * x + 2 * part + piece(SLICE, item)),  # of two texts
        2 * x + piece(TOKENS_AT_ONCE, item, config.ffn_dim) + part + given,  # feed-forward
        2 * x + copy + piece(SLICE, 3 * wide),  # adding with a gate
        2 * x + bool(wide) * piece(SLICE, 2 * wide),  # norm
    )
    return max(moments) + (1 + against) * text + tokens * config.dim // config.heads // 2 * 8  # cosine and sine


SIZES = [(1, 75600), (1, 32760), (1, 27280), (2, 27280), (1, 6000), (1, 1560)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [A14B, TI2V_5B, I2V_14B, FLF2V_14B], ids=["A14B", "5B", "I2V-14B", "FLF2V-14B"])
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
@pytest.mark.parametrize(("fused", "whole"), [(False, False), (True, False), (False, True)])
def test_activations_are_what_one_counts_by_hand(
    config: Architecture, batch: int, tokens: int, dtype: torch.dtype, fused: bool, whole: bool
):
    traced = dit_activations(config, batch, tokens, dtype, fused=fused, whole_attention=whole)
    by_hand = counted_by_hand(config, batch, tokens, dtype, fused=fused, whole=whole)
    assert traced == pytest.approx(by_hand, rel=0.05)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 253_000), (7, 40_000), (6, 200_000)])
def test_what_is_too_large_to_trace_lies_on_the_line_of_what_is_not(batch: int, tokens: int, whole: bool):
    config, given = replace(TI2V_5B, dim=192, ffn_dim=384, heads=2), {"fused": False, "whole_attention": whole}
    expected = _traced(config, batch, tokens, dtype=torch.bfloat16, **given)
    assert dit_activations(config, batch, tokens, torch.bfloat16, **given) == pytest.approx(expected, rel=1e-3)


def test_a_trace_is_made_once():
    def misses() -> int:
        return _traced.cache_info().misses

    plan(recipe(A14B), SHAPE_720P, "meta")
    before = misses()
    for limit in (8.0, 24.0):
        plan(recipe(A14B, vram_limit=limit), SHAPE_720P, "meta")
    assert misses() == before


def header(config: Architecture, stored: torch.dtype = torch.bfloat16) -> DiTFile:
    """A model's file as its header tells it, with no file behind it."""
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in WanDiT(config).state_dict().items()}
    path = Path("model.safetensors")
    checkpoint = Checkpoint(path, {key: TensorInfo(shape, stored, path) for key, shape in shapes.items()}, {})
    return DiTFile(checkpoint, {key: key for key in shapes}, config, ())


def recipe(config: Architecture, **options) -> ModelRecipe:
    return ModelRecipe(header(config), **({"dtype": "bfloat16"} | options))


SHAPE_720P = (1, 16, 21, 90, 160)  # 1280x720, 81 frames
SHAPE_5B = (1, 48, 31, 44, 80)  # 1280x704, 121 frames
CUDA = "cuda:0"  # nothing is asked of it


def test_weights_are_those_of_the_published_models():
    """28.6 GB for an expert of A14B, 10 GB for the 5B, in bfloat16."""
    big, small = (weights_of(header(config), "bfloat16", CUDA) for config in (A14B, TI2V_5B))
    assert big.total == pytest.approx(28.6e9, rel=0.01) and small.total == pytest.approx(10.0e9, rel=0.01)
    assert big.blocks[0] == pytest.approx(0.70e9, rel=0.01) and len(set(big.blocks)) == 1


def test_weights_are_those_that_the_built_model_holds(tmp_path: Path):
    config = Architecture(16, 16, 256, 512, layers=3, text_dim=32, freq_dim=256, heads=2)
    weights = _random_weights(WanDiT, config, torch.Generator().manual_seed(0))
    save_file({key: value.half() for key, value in weights.items()}, tmp_path / "half.safetensors")
    file = read_dit(tmp_path / "half.safetensors")
    for dtype in ("bfloat16", "float32"):
        model = build_dit(file, dtype=dtype)
        held = sum(p.nbytes for p in model.parameters())
        assert weights_of(file, dtype, "cpu").total == held  # nothing fits as it lies in the file
        assert weights_of(file, dtype, CUDA).blocks[1] == sum(p.nbytes for p in model.blocks[1].parameters())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("swapped", [0, 1, 3])
def test_a_cpu_holds_what_does_not_stay_in_the_file(tmp_path: Path, dtype: str, swapped: int):
    """Resident: everything. With blocks that stream: what is small, what is converted, and whole blocks that stay."""
    config = Architecture(16, 16, 256, 512, layers=3, text_dim=32, freq_dim=256, heads=2)
    weights = _random_weights(WanDiT, config, torch.Generator().manual_seed(0))
    save_file({key: value.half() for key, value in weights.items()}, tmp_path / "half.safetensors")
    file = read_dit(tmp_path / "half.safetensors")
    model = build_dit(file, dtype=dtype, swap_blocks=swapped)
    held = sum(p.nbytes for p in model.parameters() if not p.is_meta and not is_mapped(p))
    said = weights_of(file, dtype, "cpu", streaming=swapped > 0)
    assert said.kept(spread(swapped, 3)) - said.scratch == held
    assert swapped == 0 or max(said.slots) <= model.swap.block_bytes < max(said.slots) + 24 * 256  # and alignment


def test_quantised_weights_count_as_they_are_packed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plain, packed = (weights_of(header(A14B), dtype, CUDA) for dtype in ("bfloat16", "fp8_e4m3fn"))
    assert packed.blocks[0] == pytest.approx(plain.blocks[0] / 2, rel=0.01)
    assert packed.outside == plain.outside
    assert packed.scratch == 5120 * 13824 * 2 and plain.scratch == 0


def test_the_goals_fit():
    """T2V-A14B at 720p in 6 GB, TI2V-5B in 5 GB, both in full bfloat16: what the sampler needs."""
    big = plan(recipe(A14B, vram_limit=6.0), SHAPE_720P, CUDA)
    small = plan(recipe(TI2V_5B, vram_limit=5.0), SHAPE_5B, CUDA)
    assert big.total <= 6e9 and big.swapped == 40 and big.prefetch == 1
    assert small.total <= 5e9 and small.swapped < 30
    assert big.needs.pinned <= 0.27e9


@pytest.mark.parametrize("limit", [6.0, 8.0, 12.0, 16.0, 24.0, 32.0])
def test_a_budget_is_used_and_not_exceeded(limit: float):
    found = plan(recipe(A14B, vram_limit=limit), SHAPE_720P, CUDA)
    assert found.total <= limit * 1e9
    one_more = plan(recipe(A14B, swap_blocks=max(0, found.swapped - 1)), SHAPE_720P, CUDA)
    kept = 2 * 40 * 2 * 512 * 5120 * 2  # a limit gives up the prompts' keys and values
    assert found.swapped == 0 or one_more.total - kept > limit * 1e9


def test_an_impossible_budget_names_the_smallest_that_works():
    with pytest.raises(WanError, match="does not fit into 3.0 GB on cuda:0.*Allow [0-9.]+ GB") as caught:
        plan(recipe(A14B, vram_limit=3.0), SHAPE_720P, CUDA)
    named = float(re.search(r"Allow ([0-9.]+) GB", str(caught.value))[1])
    tight = plan(recipe(A14B, vram_limit=named), SHAPE_720P, CUDA)
    assert tight.total <= named * 1e9 and tight.prefetch == 0
    with pytest.raises(WanError, match=f"Allow {named} GB"):
        plan(recipe(A14B, vram_limit=named - 0.1), SHAPE_720P, CUDA)


@pytest.mark.parametrize("limit", [0, -1.0, "much", float("nan")])
def test_a_budget_is_a_number_or_auto(limit: object):
    with pytest.raises(WanError, match="expected gigabytes, more than 0, or auto"):
        plan(recipe(A14B, vram_limit=limit), SHAPE_720P, CUDA)


def test_auto_leaves_a_margin():
    found = plan(recipe(A14B, vram_limit="auto"), SHAPE_720P, CUDA, free=int(16e9))
    assert 14e9 < found.total <= 15e9
    assert plan(recipe(A14B, vram_limit="auto"), SHAPE_720P, CUDA, free=int(80e9)).swapped == 0


def test_what_is_moved_each_step():
    both = plan(recipe(A14B, swap_blocks=10), SHAPE_720P, CUDA)
    alone = plan(recipe(A14B, swap_blocks=10), SHAPE_720P, CUDA, prompts=1)
    shapes = {name: info.shape for name, info in header(A14B).checkpoint.tensors.items() if "blocks.0." in name}
    numbers = sum(math.prod(shape) for shape in shapes.values())
    assert both.moved == 2 * alone.moved == 20 * 2 * numbers  # as stored: norms too are cast on the device
    single = replace(recipe(A14B, swap_blocks=10), high=header(A14B, torch.float32))
    wide = plan(single, SHAPE_720P, CUDA)
    assert wide.moved == 2 * both.moved and wide.needs.stream == both.needs.stream
    assert wide.needs.pinned == both.needs.pinned == 8 * 32 * 1024**2  # pieces, whatever a block takes
    assert both.needs.stream == 2 * weights_of(header(A14B), "bfloat16", CUDA).blocks[0]


def test_a_cpu_uses_the_file_itself():
    mapped = plan(recipe(A14B, swap_blocks=40), SHAPE_720P, "cpu")
    assert mapped.needs.weights < 0.5e9  # float32 norms, modulation, time embedding and head of a bfloat16 file
    converted = plan(recipe(A14B, dtype="float32"), SHAPE_720P, "cpu")
    assert converted.needs.weights > 50e9


def test_what_is_left_to_give():
    first = plan(recipe(A14B), SHAPE_720P, CUDA)
    assert smaller(first) == (20, 0)
    second = plan(recipe(A14B, swap_blocks=20), SHAPE_720P, CUDA)
    assert smaller(second) == (30, 1)
    assert smaller(plan(recipe(A14B, swap_blocks=40), SHAPE_720P, CUDA)) == (40, 0)
    assert smaller(plan(recipe(A14B, swap_blocks=40, prefetch=0), SHAPE_720P, CUDA)) is None


def test_too_many_blocks_are_refused():
    with pytest.raises(WanError, match="has 40 blocks"):
        plan(recipe(A14B, swap_blocks=41), SHAPE_720P, CUDA)


def test_a_plan_reads_as_a_text():
    text = str(plan(recipe(A14B, vram_limit=8.0), SHAPE_720P, CUDA))
    for part in ("GB on cuda:0 of 8.0 GB allowed", "160x90x21", "of 40 blocks stay on the device", "copied", "RAM"):
        assert part in text, text


@pytest.mark.parametrize(("kind", "channels", "dim"), [("wan2.1", 16, 96), ("wan2.2", 48, 256)])
def test_decoding_is_planned_by_its_frames_size_alone(kind: str, channels: int, dim: int):
    config = VAEConfig(kind, channels, dim, dim)
    small, large = (vae_budget(config, side, side).total for side in (128, 256))
    weights = vae_budget(config, 32, 32).total
    assert weights < small < large < 4.1 * small
    assert vae_budget(config, 256, 256, torch.bfloat16).total < 0.6 * large


@pytest.mark.parametrize("tokens", [5, 16, 24])
def test_a_long_video_is_answered_in_place(monkeypatch: pytest.MonkeyPatch, tokens: int):
    """Parts of the tokens at a time, and the same velocity: also for two videos at once."""
    config = Architecture(16, 16, 256, 512, layers=2, text_dim=32, freq_dim=256, heads=2)
    model = WanDiT(config)
    model.load_state_dict(_random_weights(WanDiT, config, torch.Generator().manual_seed(0)))
    model.eval().requires_grad_(False)
    torch.manual_seed(1)
    x, t, context = torch.randn(2, 16, 4, 6, 4), torch.tensor([937.0, 3.0]), torch.randn(2, 20, 32)
    whole = model(x, t, context)
    monkeypatch.setattr(dit, "TOKENS_AT_ONCE", tokens)
    parts = model(x, t, context)
    assert (parts - whole).abs().max() <= 1e-5 * whole.abs().max()


# --- what no machine holds


def test_sizes_that_no_machine_holds(tmp_path: Path):
    """Refused within seconds and without an allocation of their size; what fits by a byte is not."""
    write_tiny(tmp_path, "ti2v-5B", sizes=TinySizes(dim=128, ffn_dim=128, layers=2, text_dim=64, text_layers=1))
    models, device = read_models(tmp_path, "ti2v-5B"), "cpu"
    for width, height, frames in ((16384, 16384, 1025), (2**30, 2**30, 2**31 - 3), (32, 32, 2**40 + 1)):
        shape = (1, 48, (frames - 1) // 4 + 1, height // 16, width // 16)
        with pytest.raises(WanError, match=r"takes at least .* of memory, but cpu has"):
            check_fits(models.dit, shape, device)
    shape = (1, 48, 3, 8, 8)
    needed = min(plan(replace(models.dit, swap_blocks=swapped), shape, device).total for swapped in (0, 2))
    check_fits(models.dit, shape, device, total=needed)
    with pytest.raises(WanError, match="Choose a smaller size"):
        check_fits(models.dit, shape, device, total=needed - 1)
    frame = vae_budget(models.vae.config, 128, 256).total
    check_frames_fit(models.vae.config, 128, 256, device, total=frame)
    with pytest.raises(WanError, match="Decode in tiles"):
        check_frames_fit(models.vae.config, 128, 256, device, total=frame - 1)
    with pytest.raises(WanError, match="Decode in tiles"):
        check_frames_fit(models.vae.config, 2**40, 2**40, device)
