"""What only a CUDA device can show: the same results as on the CPU, streaming that changes no bit, memory as planned.

Skipped where there is none; nothing else is needed, neither ComfyUI nor a network.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.memory import of_one_call
from wan_core import kernels
from wan_core.config import VARIANTS, Architecture, PerExpert, VAEConfig
from wan_core.errors import WanError
from wan_core.loading.dit import read_dit
from wan_core.loading.step_caches import step_cache
from wan_core.memory.build import build_dit
from wan_core.memory.engine import Engine
from wan_core.memory.plan import plan
from wan_core.models.dit.attention import BACKENDS, Backend
from wan_core.models.dit.dit import WanDiT
from wan_core.models.dit.runner import BlockRunner, CompiledRunner
from wan_core.models.vae.tiles import Tiles, decode_tiled, encode_tiled
from wan_core.models.vae.wan21 import Wan21VAE
from wan_core.models.vae.wan22 import Wan22VAE
from wan_core.pipeline import Request, generate, read_models
from wan_core.recipe import ModelRecipe
from wan_core.sampling.guidance_rules import (
    Guidance,
    Interval,
    Merge,
    NormalisedAttention,
    Projected,
    SkipLayers,
    Tangential,
    ZeroStar,
)
from wan_core.sampling.presets import PRESETS
from wan_core.tools.convert import convert
from wan_core.tools.tiny import TinySizes, _random_weights, write_tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = TinySizes(dim=256, ffn_dim=512, layers=3, text_dim=64)
CONFIG = Architecture(16, 16, 512, 1024, layers=6, text_dim=64, freq_dim=256, heads=4)
TASKS = ("t2v-A14B", "i2v-A14B", "ti2v-5B", "t2v-1.3B", "i2v-14B", "flf2v-14B")


@pytest.fixture(autouse=True)
def _exact_products():
    """The CPU's float32 is the reference: the device's must be float32 too, where by default it rounds to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer in bfloat16."""
    weights = _random_weights(WanDiT, CONFIG, torch.Generator().manual_seed(0))
    file = tmp_path_factory.mktemp("dit") / "model.safetensors"
    save_file({key: value.bfloat16() for key, value in weights.items()}, file)
    return file


def inputs(frames: int = 3, side: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator).cuda()  # noqa: E731
    return draw(1, 16, frames, side, side), torch.tensor([937.0]).cuda(), draw(1, 20, 64)


def relative(ours: Tensor, expected: Tensor) -> float:
    ours, expected = ours.float().cpu(), expected.float().cpu()
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("task", TASKS)
def test_a_run_gives_what_it_gives_on_the_cpu(task: str, tmp_path: Path):
    """Latent and video, from the same seed, in float32."""
    write_tiny(tmp_path / "model", task, layout="diffusers" if "A14B" in task else "official", sizes=SIZES)
    across = np.linspace(0, 255, 96, dtype=np.uint8)
    picture = tmp_path / "picture.png"
    Image.fromarray(np.stack([np.tile(across, (64, 1))] * 3, -1)).save(picture)
    image = {"image": picture} if task.startswith(("i2v", "flf2v", "ti2v")) else {}
    image |= {"end_image": picture} if task == "flf2v-14B" else {}
    request = Request("a cat", "blurred", size=(96, 64), frames=9, steps=4, seed=7, **image)
    models = read_models(tmp_path / "model", task, dtype="float32")
    results = [generate(models, request, Engine(), device=device) for device in (CPU, CUDA)]
    expected, ours = results
    assert relative(ours.latent, expected.latent) < 1e-3  # measured: below 1e-4, with CLIP's tokens 3e-4
    videos = [torch.cat(list(result.video()), dim=1) for result in results]
    assert (videos[1] - videos[0]).abs().max() < 5e-3


@pytest.mark.parametrize("way", ["rCM-T2V-4step", "rCM-T2V-4step-ODE", "FastWan-1.3B-3step", "every", "magnitude"])
def test_few_steps_and_left_out_ones_as_on_the_cpu(way: str, tmp_path: Path):
    """Fresh noise is the CPU's on every device; what a step cache leaves out is the same."""
    write_tiny(tmp_path, "t2v-A14B", layout="diffusers", sizes=SIZES)
    models = read_models(tmp_path, "t2v-A14B", dtype="float32")
    request = Request("a cat", "blurred", size=(96, 64), frames=9, steps=12, seed=7)
    if preset := PRESETS.get(way):
        settings = {"steps": preset.steps, "shift": preset.shift, "guidance": preset.guidance}
        request = replace(request, solver=preset.solver, schedule=preset.schedule, **settings)
    else:
        cache = step_cache(way, models.dit.variant, models.dit.high, models.dit.low)
        models = replace(models, dit=replace(models.dit, step_cache=cache))
    latents = [generate(models, request, Engine(), device=device).latent for device in (CPU, CUDA)]
    assert relative(latents[1], latents[0]) < 5e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "fp8_e4m3fn", "int8"])
@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_swapped_equals_resident_to_the_last_bit(stored: Path, dtype: str, prefetch: int):
    file, args = read_dit(stored), inputs()
    resident = build_dit(file, device=CUDA, dtype=dtype)(*args)
    for blocks in (1, 3, 6):
        dit = build_dit(file, device=CUDA, dtype=dtype, swap_blocks=blocks, prefetch=prefetch)
        assert all(torch.equal(dit(*args), resident) for _ in range(4)), blocks


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_skipped_blocks_leave_the_others_their_turn(stored: Path, prefetch: int):
    """Of those that stream, in calls that skip them and calls that do not."""
    file, args = read_dit(stored), inputs()
    resident = build_dit(file, device=CUDA, dtype="bfloat16")
    dit = build_dit(file, device=CUDA, dtype="bfloat16", swap_blocks=6, prefetch=prefetch)
    for skip in ((), (1,), (), (0, 5), (2, 3), ()):
        assert torch.equal(dit(*args, skip=skip), resident(*args, skip=skip)), skip


RULES = {
    "answers": Guidance((ZeroStar(1), Projected())),
    "network": Guidance((SkipLayers(1.0, 0.0, (1,)), NormalisedAttention(), Tangential())),
    "merged": Guidance((Merge(), Interval(1.0, 0.5))),
}


@pytest.mark.parametrize("rules", RULES)
def test_guidance_rules_lead_where_they_lead_on_the_cpu(rules: str, tmp_path: Path):
    write_tiny(tmp_path / "model", "t2v-A14B", layout="diffusers", sizes=SIZES)
    request = Request("a cat", "blurred", size=(96, 64), frames=9, steps=4, seed=7)
    models = read_models(tmp_path / "model", "t2v-A14B", dtype="float32")
    models = replace(models, dit=replace(models.dit, guidance=RULES[rules]))
    expected, ours = (generate(models, request, Engine(), device=device).latent for device in (CPU, CUDA))
    assert relative(ours, expected) < 1e-3


@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_streamed_blocks_are_cast_on_the_device_to_the_same_bits(
    stored: Path, tmp_path: Path, kept: torch.dtype, dtype: str
):
    """From files in other number formats than the computation's; loading casts on the device too."""
    save_file({key: value.to(kept) for key, value in load_file(stored).items()}, tmp_path / "model.safetensors")
    file, args = read_dit(tmp_path / "model.safetensors"), inputs()
    resident = build_dit(file, device=CUDA, dtype=dtype)(*args)
    for prefetch in (0, 2):
        dit = build_dit(file, device=CUDA, dtype=dtype, swap_blocks=6, prefetch=prefetch)
        assert all(torch.equal(dit(*args), resident) for _ in range(4)), prefetch
        before = {name: value.cpu() for name, value in build_dit(file, dtype=dtype).blocks[5].named_parameters()}
        with dit.swap.block(5):
            for name, value in dit.blocks[5].named_parameters():
                assert torch.equal(value.cpu(), before[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("swapped", [0, 4])
def test_compiled_blocks_answer_as_plain_ones(stored: Path, dtype: str, swapped: int):
    """One graph for all blocks, resident and streamed; a second one for all other sizes."""
    said: list[str] = []
    dit = build_dit(read_dit(stored), device=CUDA, dtype=dtype, swap_blocks=swapped)
    compiled, plain = CompiledRunner(), BlockRunner()
    compiled.tell = compiled.progress = said.append
    with torch.inference_mode():
        for side in (32, 32, 16, 24):
            args = inputs(side=side)
            dit.runner = plain
            expected = dit(*args)
            dit.runner = compiled
            assert relative(dit(*args), expected) < (0.02 if dtype == "bfloat16" else 1e-5)
    assert compiled.graphs in (1, 2) and not [line for line in said if "cannot be compiled" in line], said


def test_a_step_that_is_not_finite_is_found_while_the_next_one_runs(tmp_path: Path, monkeypatch, caplog):
    """The device fails in the second step; the host learns of it later, goes back, names the block, ends the same."""
    write_tiny(tmp_path / "model", "t2v-1.3B", layout="official", sizes=replace(SIZES, layers=4))
    request = Request("a cat", "", size=(96, 64), frames=9, steps=4, seed=1, guidance=PerExpert(1.0, 1.0))
    expected = generate(read_models(tmp_path / "model", "t2v-1.3B", dtype="float32"), request, Engine(), device=CUDA)
    calls: list[int] = []

    def unsound(q: Tensor, k: Tensor, v: Tensor, *, kind: str = "self") -> Tensor:
        answer = BACKENDS["sdpa"].run(q, k, v, kind=kind)
        calls.extend([1] if kind == "self" else [])
        return answer * float("nan") if kind == "self" and len(calls) > 6 else answer

    monkeypatch.setitem(BACKENDS, "flash2", Backend("flash2", unsound))
    reports: list[int] = []
    models = read_models(tmp_path / "model", "t2v-1.3B", dtype="float32", attention="flash2")
    made = generate(models, request, Engine(), device=CUDA, on_step=lambda report: reports.append(report.index))
    assert torch.equal(made.latent, expected.latent) and reports == [0, 1, 2, 3]
    assert "Step 2 of 4" in caplog.text and "first in blocks." in caplog.text


@pytest.mark.parametrize("kind", ["fp8_scaled", "int8", "mxfp8", "nvfp4", "gguf:Q8_0", "gguf:Q4_0"])
def test_quantised_files_answer_as_on_the_cpu(stored: Path, tmp_path: Path, kind: str):
    """The CPU dequantises; the device may multiply the packed numbers, which rounds activations too."""
    target = tmp_path / ("model.gguf" if kind.startswith("gguf") else "model.safetensors")
    convert(stored, target, kind)
    file, args = read_dit(target), inputs()
    expected = build_dit(file, dtype="float32")(*(value.cpu() for value in args))
    assert relative(build_dit(file, device=CUDA, dtype="float32")(*args), expected) < 1e-4
    assert relative(build_dit(file, device=CUDA, dtype="bfloat16")(*args), expected) < 0.06
    swapped = build_dit(file, device=CUDA, dtype="bfloat16", swap_blocks=4)
    assert torch.equal(swapped(*args), build_dit(file, device=CUDA, dtype="bfloat16")(*args))


@pytest.mark.parametrize("swapped", [0, 6])
@pytest.mark.parametrize("frames", [5, 21])
def test_memory_is_what_the_plan_says(stored: Path, swapped: int, frames: int):
    """Peaks of the allocator beside the plan's, which counts tensors: at most 3 % and 24 MB apart."""
    file, (x, t, text) = read_dit(stored), inputs(frames, 64)
    recipe = ModelRecipe(file, variant=VARIANTS["t2v-14B"], dtype="bfloat16", swap_blocks=swapped)
    found = plan(recipe, tuple(x.shape), CUDA, prompts=1)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dit = build_dit(file, device=CUDA, dtype="bfloat16", swap_blocks=found.swapped, prefetch=found.prefetch)
    with torch.inference_mode():
        states = dit.text_states(text, keep=False)
        for _ in range(2):
            dit(x, t, states)
    measured = torch.cuda.max_memory_allocated() - before
    planned = of_one_call(found)
    assert abs(measured - planned) < 0.03 * planned + 24e6, (measured, planned)


def test_a_run_that_ran_out_of_memory_goes_on_with_less(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """For real: most of the device is taken away while the run is under way."""
    sizes = replace(SIZES, dim=2048, ffn_dim=4096, layers=6)
    write_tiny(tmp_path / "model", "t2v-1.3B", layout="official", sizes=sizes)
    models = read_models(tmp_path / "model", "t2v-1.3B", dtype="bfloat16")
    request = Request("a cat", "", size=(256, 256), frames=9, steps=4, seed=1, guidance=PerExpert(1.0, 1.0))
    expected = generate(models, request, Engine(), device=CUDA).latent
    gc.collect()
    torch.cuda.empty_cache()

    def take(report) -> None:
        """What is there stays; nothing can be added, as if another program had taken the rest."""
        if report.done == 2 and not caplog.records:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(CUDA).total_memory
            torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)

    try:
        ours = generate(models, request, Engine(), device=CUDA, on_step=take).latent
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Sampling goes on from there, with" in caplog.text
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "fp8_e4m3fn", "int8"])
def test_kernels_change_no_more_than_rounding(stored: Path, dtype: str, monkeypatch: pytest.MonkeyPatch):
    file, args = read_dit(stored), inputs()
    with torch.inference_mode():
        ours = build_dit(file, device=CUDA, dtype=dtype)(*args)
        assert not kernels._broken
        monkeypatch.setattr(kernels, "available", lambda device: False)
        plain = build_dit(file, device=CUDA, dtype=dtype)(*args)
    assert relative(ours, plain) < (0.01 if dtype in ("bfloat16", "float16") else 0.06)


def test_release_gives_the_memory_back(tmp_path: Path):
    write_tiny(tmp_path / "model", "t2v-A14B", layout="diffusers", sizes=SIZES)
    models = read_models(tmp_path / "model", "t2v-A14B", dtype="bfloat16")
    gc.collect()
    before = torch.cuda.memory_allocated()
    engine = Engine()
    request = Request("a cat", "", size=(96, 64), frames=9, steps=4, seed=1)
    for swap in (0, 3):
        list(generate(replace(models, dit=replace(models.dit, swap_blocks=swap)), request, engine, device=CUDA).video())
    assert torch.cuda.memory_allocated() > before
    engine.release()
    gc.collect()
    left = torch.cuda.memory_allocated() - before
    assert left < 24e6, left  # cuBLAS' workspace stays


def test_a_cancel_in_the_midst_of_streaming(stored: Path):
    file, args = read_dit(stored), inputs()
    dit = build_dit(file, device=CUDA, dtype="bfloat16", swap_blocks=6, prefetch=2)
    expected = dit(*args)

    def stop(index: int) -> None:
        if index == 3:
            raise WanError("stopped")

    for _ in range(3):
        with pytest.raises(WanError, match="stopped"):
            dit(*args, on_block=stop)
        assert torch.equal(dit(*args), expected)


VAES = {"wan2.1": (Wan21VAE, VAEConfig("wan2.1", 16, 32, 32)), "wan2.2": (Wan22VAE, VAEConfig("wan2.2", 48, 32, 64))}


@pytest.mark.parametrize("kind", VAES)
def test_vaes_answer_as_on_the_cpu(kind: str):
    """Encoding and decoding, whole and in tiles, in float32; bfloat16 near it."""
    made, config = VAES[kind]
    vae = made(config)
    weights = _random_weights(made, config, torch.Generator().manual_seed(0))
    vae.load_state_dict(weights)
    vae.eval().requires_grad_(False)
    video = torch.rand(1, 3, 9, 192, 256, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latent = vae.encode(video)
    expected = vae.decode(latent)
    tiles = Tiles.square(128)
    tiled = decode_tiled(vae, latent, tiles), encode_tiled(vae, video, tiles)
    vae.cuda()
    assert relative(vae.encode(video.cuda()), latent) < 1e-4
    assert relative(vae.decode(latent.cuda()), expected) < 1e-4
    assert relative(decode_tiled(vae, latent.cuda(), tiles), tiled[0]) < 1e-4
    assert relative(encode_tiled(vae, video.cuda(), tiles), tiled[1]) < 1e-4
    vae.bfloat16()
    assert relative(vae.decode(latent.cuda()), expected) < 0.05


@pytest.mark.parametrize("shape", [(1, 300, 4, 128), (1, 9000, 2, 128)])
def test_attention_backends_agree(shape: tuple[int, ...]):
    """Every backend that is installed and fits, beside float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, device=CUDA, dtype=torch.bfloat16) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v)))
    exact = exact.transpose(1, 2)
    for backend in BACKENDS.values():
        if backend.installed and backend.fits(CUDA, torch.bfloat16):
            found = relative(backend.run(q, k, v, kind="self"), exact)
            print(backend.name, found)
            assert found < (0.1 if backend.name.startswith("sage") else 0.01), backend.name


def test_training_has_the_gradients_of_the_cpu():
    from tests.core.test_train import random_data, random_dit
    from wan_core.train.dit import DiTTask, Recipe
    from wan_core.train.objective import NoiseRange

    losses = []
    for device in (CPU, CUDA):
        task = DiTTask(
            random_dit().to(device),
            random_data(),
            Recipe(VARIANTS["t2v-A14B"], NoiseRange(0.2, 0.9, 3.0), batch=2, caption_dropout=0.0, precision="fp32"),
        )
        loss, _ = task.loss(1, torch.Generator().manual_seed(1))
        loss.backward()
        gradients = torch.cat([p.grad.flatten().cpu() for p in task.model.parameters() if p.grad is not None])
        losses.append((loss.item(), gradients))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-4)
    assert relative(losses[1][1], losses[0][1]) < 1e-3
