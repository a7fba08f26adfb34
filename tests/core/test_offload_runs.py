"""Whole runs under a memory limit: out of memory and on, the second expert, the command line, what stays in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wan_core.__main__ import main
from wan_core.config import PerExpert
from wan_core.errors import WanError
from wan_core.memory import engine as engines
from wan_core.memory.engine import Engine
from wan_core.memory.readahead import ReadAhead
from wan_core.models.dit import attention
from wan_core.models.dit.attention import Backend
from wan_core.models.dit.dit import WanDiT
from wan_core.pipeline import Models, Request, generate, read_models
from wan_core.sampling.denoise import StepReport
from wan_core.tools.tiny import TinySizes, write_tiny

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LAYERS = 4
REQUEST = Request(
    "a cat", "", size=(64, 32), frames=5, steps=6, seed=3, schedule="diffusers", guidance=PerExpert(low=3.0, high=2.0)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("t2v")
    write_tiny(made, "t2v-A14B", layout="diffusers", sizes=TinySizes(dim=256, ffn_dim=256, layers=LAYERS, text_dim=64))
    return made


@pytest.fixture
def models(folder: Path) -> Models:
    return read_models(folder, "t2v-A14B", dtype="float32")


def run(models: Models, engine: Engine | None = None, on_step=None, **swap) -> Tensor:
    changed = replace(models, dit=replace(models.dit, **swap))
    return generate(changed, REQUEST, engine or Engine(), device=CPU, on_step=on_step).latent


@pytest.fixture
def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """``out_of_memory(*calls)``: these calls of a transformer, counted from 0, fail in the middle of their blocks."""

    def arrange(*failing: int) -> list[int]:
        calls: list[int] = []
        forward = WanDiT.forward

        def failing_forward(self: WanDiT, *args, on_block=None, **options) -> Tensor:
            calls.append(len(self.swap.indices) if self.swap else 0)

            def fail(index: int) -> None:
                if len(calls) - 1 in failing and index == 2:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

            return forward(self, *args, on_block=fail, **options)

        monkeypatch.setattr(WanDiT, "forward", failing_forward)
        return calls

    yield arrange


@pytest.mark.parametrize("call", [0, 3, 6, 11], ids=["first", "second-step", "mid-run", "last"])
def test_out_of_memory_goes_on_from_the_last_finished_step(
    models: Models, out_of_memory, caplog: pytest.LogCaptureFixture, call: int
):
    """The same latent to the last bit, no step done twice, the progress without a gap, and a note."""
    expected = run(models)
    calls, reports = out_of_memory(call), []
    assert torch.equal(run(models, on_step=reports.append), expected)
    assert len(calls) == 12 + 1 + call % 2  # two calls a step; the half step is done again
    assert [(report.done, report.total) for report in reports] == [(i + 1, 6) for i in range(6)]
    assert calls[call] == 0 and set(calls[call + 1 :]) == {LAYERS // 2}
    assert f"ran out after {call // 2} steps" in caplog.text and "2 of 4 blocks streamed" in caplog.text


def test_the_next_run_begins_with_the_smaller_plan(models: Models, out_of_memory):
    engine = Engine()
    calls = out_of_memory(0)
    first = run(models, engine)
    done = len(calls)
    assert torch.equal(run(models, engine), first)
    assert set(calls[done:]) == {2}


def test_out_of_memory_twice_is_told_and_leaves_the_engine_usable(models: Models, out_of_memory):
    engine = Engine()
    out_of_memory(4, 6)
    with pytest.raises(WanError, match="ran out, also with fewer weights.*2.00 GiB.*smaller size"):
        run(models, engine)
    assert engine.bytes_on("cpu") == 0
    assert run(models, engine).isfinite().all()


def test_with_nothing_left_to_give_there_is_no_second_try(models: Models, out_of_memory):
    calls = out_of_memory(1)
    with pytest.raises(WanError, match="smaller size"):
        run(models, swap_blocks=LAYERS, prefetch=0)
    assert len(calls) == 2


def test_other_errors_are_not_retried(models: Models, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fail(*_, **__):
        calls.append(1)
        raise RuntimeError("a bug")

    monkeypatch.setattr(WanDiT, "forward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(models)
    assert len(calls) == 1


@pytest.mark.parametrize("limit", ["auto", 1.0])
def test_a_limit_changes_nothing(models: Models, limit: float | str):
    assert torch.equal(run(models, vram_limit=limit), run(models))


def test_auto_is_decided_once(models: Models, monkeypatch: pytest.MonkeyPatch):
    """Otherwise some bytes more or less would move blocks, and all weights would be read again."""
    engine = Engine()
    run(models, engine, vram_limit="auto")
    loads = engine.loads
    monkeypatch.setattr(engines, "available_bytes", lambda device: 10**6)
    run(models, engine, vram_limit="auto")
    assert engine.loads == loads


def test_a_limit_that_is_too_small_is_refused_before_a_weight_of_the_transformer_is_read(models: Models):
    engine = Engine()
    with pytest.raises(WanError, match="Allow 0.1 GB"):
        run(models, engine, vram_limit=0.001)
    assert engine.loads == 1  # the text encoder


def test_the_second_expert_is_read_ahead_during_the_last_step_before_it(
    models: Models, monkeypatch: pytest.MonkeyPatch
):
    seen, done = [], []
    monkeypatch.setattr(ReadAhead, "begin", lambda self, files: seen.append((len(done), files)))

    def on_step(report: StepReport) -> None:
        done.append(report.expert)

    run(models, on_step=on_step)
    switch = done.index("low")
    assert done == ["high"] * switch + ["low"] * (6 - switch) and 0 < switch < 6
    assert seen == [(switch - 1, models.dit.low.checkpoint.files)]


@pytest.mark.parametrize("swap_blocks", [0, LAYERS])
def test_nothing_of_the_second_expert_is_mapped_before_it_is_needed(models: Models, swap_blocks: int):
    """And then only with blocks that stream: what is resident has been read."""
    gc.collect()  # what earlier tests mapped
    name, mapped = str(models.dit.low.checkpoint.files[0].parent), {}

    def on_step(report: StepReport) -> None:
        mapped.setdefault(report.expert, name + "/" in Path("/proc/self/maps").read_text())

    run(models, on_step=on_step, swap_blocks=swap_blocks)
    assert mapped == {"high": False, "low": swap_blocks > 0}


def test_reading_ahead_reads_all_and_stops_when_told(tmp_path: Path):
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 10**6)
    ahead = ReadAhead()
    ahead.begin([path])
    thread = ahead.thread
    ahead.begin([path])
    assert ahead.thread is thread  # once is enough
    thread.join(10)
    ahead.begin([tmp_path / "missing"])  # whoever needs it will say so
    ahead.thread.join(10)
    ahead.stop()
    assert not ahead.thread.is_alive()


def test_the_command_line_says_what_a_run_needs(folder: Path, capsys: pytest.CaptureFixture):
    basic = ["generate", "--task", "t2v-A14B", "--ckpt_dir", str(folder), "--size", "64*32", "--frame_num", "5"]
    assert main([*basic, "--plan", "--vram_limit", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for part in ("Text encoder: ", "Sampling: ", "of 2.0 GB allowed", "4 of 4 blocks stay", "VAE decode: "):
        assert part in said, said
    assert main([*basic, "--plan", "--swap_blocks", "3", "--prefetch", "2"]) == 0
    assert "3 stream" in capsys.readouterr().out
    assert main([*basic, "--plan", "--vram_limit", "0.0001"]) == 2
    assert "Allow 0.1 GB" in capsys.readouterr().err


def test_the_command_line_runs_swapped(folder: Path, tmp_path: Path):
    latents = []
    for name, options in (("resident", []), ("swapped", ["--swap_blocks", "3"]), ("limited", ["--vram_limit", "auto"])):
        out = tmp_path / f"{name}.safetensors"
        made = main(
            [
                "generate",
                "--task",
                "t2v-A14B",
                "--ckpt_dir",
                str(folder),
                "--size",
                "64*32",
                "--frame_num",
                "5",
                "--sample_steps",
                "2",
                "--base_seed",
                "1",
                "--prompt",
                "a cat",
                "--dtype",
                "float32",
                "--device",
                "cpu",
                "--save_file",
                str(tmp_path / f"{name}.mp4"),
                "--save_tensors",
                str(out),
                *options,
            ]
        )
        assert made == 0
        from safetensors.torch import load_file

        latents.append(load_file(out)["latent"])
    assert all(torch.equal(latents[0], other) for other in latents[1:])


def test_exact_attention_is_the_runs_alone(models: Models, monkeypatch: pytest.MonkeyPatch):
    """A backend that makes NaNs in the third step: the run ends as one without it, and the engine's model keeps it."""
    calls: list[str] = []

    def breaks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append("broken")
        return attention.sdpa(q, k, v) * (float("nan") if len(calls) > 10 * LAYERS else 1)

    monkeypatch.setitem(attention.BACKENDS, "broken", Backend("broken", lambda q, k, v, *, kind: breaks(q, k, v)))
    engine = Engine()
    expected = run(models)
    assert torch.equal(run(models, engine, attention="broken"), expected)
    made = len(calls)
    assert 10 * LAYERS < made < 18 * LAYERS  # each expert finds out for itself
    assert torch.equal(run(models, engine, attention="broken"), expected)
    assert len(calls) > made
