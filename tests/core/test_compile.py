"""Compiled blocks: one graph for all, the answers of plain ones, and plain ones where compiling is not possible."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.core.test_dit import CLIP, T2V, TI2V, inputs, make
from wan_core.config import Architecture, PerExpert
from wan_core.loading.dit import read_dit
from wan_core.lora.apply import adaptation_of
from wan_core.lora.files import read_lora
from wan_core.memory import engine as engines
from wan_core.memory.activations import dit_activations
from wan_core.memory.build import build_dit
from wan_core.memory.engine import Engine
from wan_core.models.dit import attention
from wan_core.models.dit import dit as dit_module
from wan_core.models.dit.attention import sdpa
from wan_core.models.dit.dit import WanDiT
from wan_core.models.dit.features.clip_tokens import ClipTokens
from wan_core.models.dit.runner import BlockRunner, CompiledRunner
from wan_core.pipeline import Models, Request, generate, read_models
from wan_core.tools.convert import convert
from wan_core.tools.tiny import TinySizes, _random_weights, write_tiny

TOLERANCE = 1e-5  # of the largest value: float32 in another order
BACKEND = "aot_eager"  # all that torch.compile does but writing kernels


@pytest.fixture(autouse=True)
def _fresh():
    """What PyTorch has seen change in earlier tests it would take for changing from the beginning."""
    torch._dynamo.reset()


class Notes(CompiledRunner):
    """Keeps what it told."""

    def __init__(self, backend: str = BACKEND):
        super().__init__(backend)
        self.told: list[str] = []
        self.tell = self.progress = self.told.append


def both(model: WanDiT, runner: CompiledRunner, *args, **options) -> tuple[Tensor, Tensor]:
    """Compiled, and as it is."""
    with torch.no_grad():
        model.runner = runner
        compiled = model(*args, **options)
        model.runner = BlockRunner()
        return compiled, model(*args, **options)


def near(compiled: Tensor, plain: Tensor) -> None:
    assert (compiled - plain).abs().max() <= TOLERANCE * plain.abs().max()


def seen(config: Architecture) -> dict:
    return {"inputs": (ClipTokens(torch.randn(1, 257, 64)),)} if config.features else {}


@pytest.mark.parametrize(("config", "segments"), [(T2V, 1), (TI2V, 2), (CLIP, 1)], ids=["t2v", "ti2v", "clip"])
def test_one_graph_serves_all_blocks_steps_and_prompts(config: Architecture, segments: int):
    """And a second one all further sizes; with a clean first frame too."""
    model, runner = make(config), Notes()
    for height in (4, 4, 6, 8, 10):
        for step, words in ((937.0, 20), (12.5, 300)):
            x, _, text = inputs(config, 1, 3, height, 4, words)
            t = torch.full((1, 3), step) if segments == 2 else torch.tensor([step])
            if segments == 2:
                t[:, 0] = 0
            states = model.text_states(torch.nn.functional.pad(text, (0, 0, 0, 512 - words)), **seen(config))
            near(*both(model, runner, x, t, states))
        assert runner.graphs == (1 if height == 4 else 2)
    assert len(runner.told) == 2 and "being compiled:" in runner.told[0] and "again" in runner.told[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_float32_than_plain(dtype: torch.dtype):
    model, (x, t, text) = make(T2V), inputs(T2V, 1, 3, 8, 8)
    exact = model(x, t, text)
    compiled, plain = both(model.to(dtype), Notes(), x, t, text)
    error = lambda made: ((made - exact).norm() / exact.norm()).item()  # noqa: E731
    assert error(compiled) < 1.2 * error(plain) + 1e-4


def test_nothing_is_taken_apart(monkeypatch: pytest.MonkeyPatch):
    """A graph holds no slices, however long the video is, and writes over nothing that it is given."""
    monkeypatch.setattr(dit_module, "TOKENS_AT_ONCE", 8)
    graphs: list[torch.fx.GraphModule] = []
    plain = torch._dynamo.lookup_backend

    def kept(graph: torch.fx.GraphModule, example: list) -> Callable:
        graphs.append(graph)
        return plain("eager")(graph, example)

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: kept)
    model, (x, t, text) = make(T2V), inputs(T2V, 1, 3, 8, 8)
    near(*both(model, Notes(), x, t, text))
    (graph,) = graphs
    nodes = [node for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    names = [str(node.target) for node in nodes]
    assert any("scaled_dot_product" in name for name in names)
    assert not [name for name in names if any(part in name for part in ("split", "narrow", "cat", "copy_"))]
    assert not [name for name in names if name.endswith("_") and "__" not in name]
    assert not [node for node in nodes if node.args[1:] and "slice(" in str(node.args[1]) and "x" in str(node.args[0])]


def test_another_packages_attention_is_one_operator(monkeypatch: pytest.MonkeyPatch):
    """Which the compiler does not look into: it asks Python for numbers that a graph has not."""

    def opaque(q: Tensor, k: Tensor, v: Tensor, *, kind: str = "self") -> Tensor:
        assert q.sum().item() == q.sum().item()
        return sdpa(q, k, v).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setitem(attention.BACKENDS, "flash2", attention.Backend("flash2", opaque))
    model, runner, (x, t, text) = make(T2V), Notes(), inputs(T2V, 1, 3, 4, 4)
    model.attend = opaque
    near(*both(model, runner, x, t, text))
    assert runner.graphs == 1 and len(runner.told) == 1


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(T2V, layers=3, text_dim=64)
    weights = _random_weights(WanDiT, config, torch.Generator().manual_seed(0))
    file = tmp_path_factory.mktemp("dit") / "model.safetensors"
    save_file(weights, file)
    return file


ARGS = torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 512, 64)


def test_with_loras_of_any_strength(stored: Path, tmp_path: Path):
    """Updates that are added are in the graph. A new strength makes another (PyTorch may try two), no wrong answer."""
    keys = [
        f"diffusion_model.blocks.{i}.{layer}" for i in range(3) for layer in ("self_attn.q", "cross_attn.v", "ffn.0")
    ]
    shapes = {"ffn.0": 512}
    made = {}
    for key in keys:
        out = shapes.get(key.split(".", 3)[3], 256)
        made[f"{key}.lora_A.weight"], made[f"{key}.lora_B.weight"] = 0.1 * torch.randn(4, 256), torch.randn(out, 4)
    save_file(made, tmp_path / "lora.safetensors")
    file = read_dit(stored)
    model, runner = build_dit(file, dtype="float32"), Notes()
    with torch.no_grad():
        before = model(*ARGS)
    lora, adaptation = read_lora(tmp_path / "lora.safetensors", file), adaptation_of(model, file)
    for strength in (1.0, 0.5):
        adaptation.set([lora], [strength])
        compiled, plain = both(model, runner, *ARGS)
        near(compiled, plain)
        assert (plain - before).abs().max() > 0.01
    assert runner.graphs <= 3 and all("being compiled" in line for line in runner.told)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_with_blocks_that_stream(stored: Path, tmp_path: Path, prefetch: int, monkeypatch: pytest.MonkeyPatch):
    """Through slots, as on a device with streams: the same graph for blocks that stay and blocks that come."""
    from wan_core.memory.stream import swap
    from wan_core.memory.stream.transfer import HostBackend

    monkeypatch.setitem(swap.BACKENDS, "cpu", HostBackend)
    half = {key: value.bfloat16() for key, value in load_file(stored).items()}
    save_file(half, tmp_path / "half.safetensors")
    file = read_dit(tmp_path / "half.safetensors")
    model, runner = build_dit(file, dtype="float32", swap_blocks=2, prefetch=prefetch), Notes()
    assert model.swap.moves
    compiled, plain = both(model, runner, *ARGS)
    near(compiled, plain)
    assert runner.graphs == 1
    model.swap.close()


@pytest.mark.parametrize("kind", ["fp8_scaled", "int8", "gguf:Q8_0"])
def test_quantised_weights_are_left_as_they_are_and_said(stored: Path, tmp_path: Path, kind: str):
    target = tmp_path / ("model.gguf" if kind.startswith("gguf") else "model.safetensors")
    convert(stored, target, kind)
    model, runner = build_dit(read_dit(target), dtype="float32"), Notes()
    compiled, plain = both(model, runner, *ARGS)
    assert torch.equal(compiled, plain) and runner.graphs == 0
    assert len(runner.told) == 1 and "(QuantLinear) are not compiled" in runner.told[0]


def test_matrices_that_stay_in_their_file_too(stored: Path):
    """On a CPU, where streamed blocks are not copied."""
    model, runner = build_dit(read_dit(stored), dtype="float32", swap_blocks=2), Notes()
    compiled, plain = both(model, runner, *ARGS)
    near(compiled, plain)
    assert len([line for line in runner.told if "(Linear) are not compiled" in line]) == 1


def test_what_cannot_be_compiled_runs_as_it_is_and_is_said_once(monkeypatch: pytest.MonkeyPatch):
    def fails(graph: torch.fx.GraphModule, example: list) -> Callable:
        raise RuntimeError("no C compiler was found\nand more")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: fails)
    model, runner, args = make(T2V), Notes(), inputs(T2V, 1, 3, 8, 8)
    for _ in range(2):
        compiled, plain = both(model, runner, *args)
        assert torch.equal(compiled, plain)
    assert sum("cannot be compiled here" in line and "no C compiler" in line for line in runner.told) == 1


def test_running_out_of_memory_is_not_taken_for_it():
    def full(*_) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = make(T2V)
    model.runner = runner = Notes()
    runner._block = full
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        model(*inputs(T2V, 1, 1, 4, 4))
    assert not runner.told


def test_graphs_go_with_the_model():
    model = make(T2V)
    model.runner = Notes()
    with torch.no_grad():
        model(*inputs(T2V, 1, 1, 4, 4))
    held = [weakref.ref(one) for one in (model, model.runner, model.blocks[0].ffn[0].weight)]
    del model
    gc.collect()
    assert not any(one() for one in held)


def test_gradients_take_the_plain_path():
    model = make(T2V).requires_grad_(True)
    model.runner = runner = Notes()
    model(*inputs(T2V, 1, 1, 4, 4)).sum().backward()
    assert runner.graphs == 0 and model.blocks[0].ffn[0].weight.grad is not None


@pytest.fixture
def models(tmp_path: Path) -> Models:
    write_tiny(tmp_path / "pair", "t2v-A14B", layout="official", sizes=TinySizes(256, 512, layers=3, text_dim=64))
    return read_models(tmp_path / "pair", "t2v-A14B", dtype="float32")


def test_a_run_of_both_experts(models: Models, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """An option of the recipe: each expert has its graph, kept for the next run and dropped with the option."""
    made_so = {"__init__": lambda self: CompiledRunner.__init__(self, BACKEND)}
    monkeypatch.setattr(engines, "CompiledRunner", type("Made", (CompiledRunner,), made_so))
    caplog.set_level("INFO")
    request = Request("a cat", "", size=(64, 32), frames=5, steps=4, seed=3, guidance=PerExpert(2.0, 3.0))
    engine = Engine()
    plain = generate(models, request, Engine(), device=torch.device("cpu")).latent
    compiled = replace(models, dit=replace(models.dit, compile=True))
    for _ in range(2):
        made = generate(compiled, request, engine, device=torch.device("cpu")).latent
        assert (made - plain).norm() < 1e-4 * plain.norm()
    assert sum("being compiled" in message for message in caplog.messages) == 2
    assert torch.equal(generate(models, request, engine, device=torch.device("cpu")).latent, plain)


def test_a_plan_counts_what_compiled_blocks_take():
    a14b = Architecture(16, 16, 5120, 13824, layers=40, text_dim=4096, freq_dim=256, heads=40)
    plain, compiled = (dit_activations(a14b, 1, 75600, torch.bfloat16, compiled=one) for one in (False, True))
    tokens, wide = 75600 * 5120 * 2, 75600 * 13824 * 2
    assert plain < 4 * tokens + wide < compiled < 11 * tokens


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_real_kernels():
    """What people get: PyTorch's own compiler, here for the CPU."""
    model, runner, args = make(T2V), Notes("inductor"), inputs(T2V, 1, 3, 8, 8)
    near(*both(model, runner, *args))
    assert runner.graphs == 1 and len(runner.told) == 1, runner.told
