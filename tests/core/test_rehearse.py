"""The real code on a device without data, held against the committed table; and the device itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.rehearse.files import Shelf
from bench.rehearse.machine import Machine
from bench.rehearse.report import Report, grown, load, rehearsed, tables
from bench.rehearse.scenes import Run, models_of, rehearse
from wan_core import pipeline
from wan_core.errors import WanError
from wan_core.memory import engine as engines
from wan_core.memory.budget import Budget
from wan_core.memory.build import build_dit
from wan_core.memory.engine import Engine
from wan_core.memory.plan import Plan, plan
from wan_core.memory.vae_placement import place
from wan_core.models.dit.layers import layer_norm
from wan_core.pipeline import Request

ROOT = Path(__file__).resolve().parents[2]
MB = 1024**2


# --- the device


def test_the_host_stays_real_and_the_device_has_no_data():
    machine = Machine()
    with machine.running():
        here, there = torch.arange(6).view(2, 3), torch.zeros(2, 3, device="cuda:0")
        assert here.sum().item() == 15 and type(here) is torch.Tensor
        assert there.device == torch.device("cuda", 0) and torch.cuda.is_available()
        back = (there + 1).cpu()
        assert type(back) is torch.Tensor and back.device.type == "cpu" and back.shape == (2, 3)
        assert torch.empty(3, device="cuda").device == torch.device("cuda", 0)
    assert here.sum().item() == 15


@pytest.mark.parametrize("inference", [False, True])
def test_two_devices_do_not_mix(inference: bool):
    with Machine().running(), torch.inference_mode(inference):
        there = torch.zeros(4, 4, device="cuda:0")
        assert (there * torch.tensor(2.0)).device.type == "cuda"  # a number is no tensor of the host
        for wrong in (lambda: there + torch.ones(4, 4), lambda: F.linear(there, torch.ones(4, 4))):
            for _ in range(2):  # also where the answer could be remembered
                with pytest.raises((RuntimeError, torch._subclasses.fake_tensor.DynamicOutputShapeException)):
                    wrong()


@pytest.mark.parametrize("inference", [False, True])
def test_kernels_and_bytes_of_operations_that_are_known(inference: bool):
    machine = Machine()
    with machine.running() as tally, torch.inference_mode(inference):
        x = torch.zeros(100, 64, device="cuda:0", dtype=torch.bfloat16)
        w, bias = torch.zeros(32, 64, device="cuda:0", dtype=torch.bfloat16), x.new_zeros(32)
        for _ in range(2):  # the second time from memory
            counts = tally.begin()
            y = F.linear(x, w, bias)
            wide = y.float()
            wide[:10].mul_(wide.new_zeros(1, 32))
            y.view(50, 64).t().copy_(x[:50].t())
            x.new_empty(1000)
            tally.end(counts)
            product = 2 * (100 * 64 + 32 * 64 + 32) + 2 * 100 * 32
            cast, scaled, copied = 100 * 32 * (2 + 4), 10 * 32 * 4 * 2 + 32 * 4, 2 * 50 * 64 * 2
            zeros = 32 * 4
            assert counts.of == {"addmm": 1, "_to_copy": 1, "mul_": 1, "copy_": 1, "new_zeros": 1}, counts.of
            assert counts.moved == product + cast + scaled + copied + zeros
            assert counts.operations == 2 * 100 * 64 * 32 and counts.between == counts.moved - product
            assert not counts.waits


def test_own_kernels_are_one_pass():
    for there in (True, False):
        machine = Machine(kernels=there)
        with machine.running() as tally, torch.no_grad():
            x = torch.zeros(1, 100, 64, device="cuda:0", dtype=torch.bfloat16)
            weight, bias = (torch.zeros(64, device="cuda:0") for _ in "ab")
            counts = tally.begin()
            layer_norm(x, 1e-6, weight, bias)
            assert (counts.kernels == 1) is there, counts.of
            assert counts.moved == 2 * x.nbytes + 2 * 64 * 4 if there else counts.moved > 6 * x.nbytes


def test_attention_is_one_kernel():
    machine = Machine()
    with machine.running() as tally:
        q, k = (torch.zeros(1, 8, n, 128, device="cuda:0", dtype=torch.bfloat16) for n in (4096, 512))
        counts = tally.begin()
        assert F.scaled_dot_product_attention(q, k, k).shape == q.shape
        assert counts.kernels == 1 and counts.operations == 4 * 8 * 4096 * 512 * 128


def test_waits_and_copies_are_told_apart():
    machine = Machine()
    with machine.running() as tally:
        counts, pinned = tally.begin(), torch.empty(MB, dtype=torch.uint8, pin_memory=True)
        x = torch.ones(MB // 4).to("cuda:0")
        x.view(torch.uint8).copy_(pinned, non_blocking=True)
        assert not counts.waits and (counts.pageable, counts.pinned, counts.uploads) == (MB, MB, 2)
        assert bool(torch.isfinite(x).all())
        x[:5].tolist()
        x.cpu()
        torch.cuda.current_stream().synchronize()
        assert sum(counts.waits.values()) == 4 and counts.down == MB + 5 * 4


def test_waiting_for_what_was_before_is_told_apart():
    """A copy into pinned memory is not waited for; an event is, and the device may have more to do by then."""
    with Machine().running() as tally:
        counts, flag = tally.begin(), torch.zeros(1, dtype=torch.bool, pin_memory=True)
        flag.copy_(torch.ones(1, device="cuda:0").isfinite(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream())
        assert not counts.waits and not event.query() and counts.down == 1
        event.synchronize()
        assert flag.item() is True and sum(counts.waits.values()) == 1 and not counts.behind
        event.record()
        torch.zeros(5, device="cuda:0").add_(1)
        event.synchronize()
        assert sum(counts.waits.values()) == 1 and sum(counts.behind.values()) == 1
        flag.copy_(torch.ones(1, device="cuda:0").isfinite())
        assert sum(counts.waits.values()) == 2


def test_memory_is_what_lives_and_can_run_out():
    machine = Machine(total=10 * MB)
    with machine.running() as tally:
        x = torch.zeros(4 * MB, dtype=torch.uint8, device="cuda:0")
        view = x[: 2 * MB].view(2, MB)
        x = x.add_(1)
        del x
        assert tally.live.now == 4 * MB and torch.cuda.mem_get_info() == (6 * MB, 10 * MB)
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.zeros(7 * MB, dtype=torch.uint8, device="cuda:0")
        del view
        assert tally.live.now == 0 and tally.live.peak == 4 * MB
        torch.zeros(7 * MB, dtype=torch.uint8, device="cuda:0")


def test_threads_work_on_the_device_too():
    machine, seen = Machine(), []

    def work() -> None:
        seen.append((torch.zeros(3, device="cuda:0")[[0, 2]].cpu() + 1).sum().item())

    with machine.running():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [2.0]


def test_growth_is_found():
    old = {"runs": {"a": {"block_kernels": 100, "waits": 1, "block_gb": 5.0, "peak_gb": 2.0}}}
    assert grown(old, {"runs": {"a": {"block_kernels": 90, "waits": 1, "block_gb": 5.01, "peak_gb": 2.0}}}) == []
    now = {"runs": {"a": {"block_kernels": 101, "waits": 2, "block_gb": 5.1, "peak_gb": 2.0}, "b": {"waits": 1}}}
    assert [line.partition(" is ")[0] for line in grown(old, now)] == [
        "a: block_kernels", "a: block_gb", "a: waits", "b: waits",
    ]  # fmt: skip


# --- the table


@pytest.fixture(scope="module")
def report() -> Report:
    made: Report = {"runs": {}, "autoencoders": {}, "text": {}}
    for table, name, row in rehearsed():
        made[table][name] = row
    return made


def test_nothing_has_grown(report: Report):
    """Kernels, bytes, waits, copies and peaks; where they fell, `python -m bench rehearse` writes the new table."""
    assert {table: list(rows) for table, rows in report.items()} == {t: list(rows) for t, rows in load().items()}
    assert grown(load(), report) == []
    assert tables(report).count("\n") > 25


def test_plans_are_true(report: Report):
    """Peaks of sampling and of decoding are within 2 % of what was said before."""
    for name, row in report["runs"].items():
        assert abs(row["over_plan_percent"]) <= 2, name
    for name, row in report["autoencoders"].items():
        if "planned_gb" in row:
            assert row["peak_gb"] == pytest.approx(row["planned_gb"], rel=0.02), name


def test_the_device_never_waits_for_the_host_between_steps(report: Report):
    """Whether a step's numbers are finite is read while the device computes the next one; of the last, at the end."""
    finite = {"waits for an event: wan_core/sampling/finite.py failed": 1}
    for name, row in report["runs"].items():
        assert (row["waits"], row["waits_behind"], row["waits_at_the_end"]) == (0, finite, finite), name
    assert all(row["waits"] == 0 for row in report["text"].values())


# --- what real sizes show of the engine


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("checkpoints"))


def loads_of_experts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The file of each expert that is read, in order."""
    made, build = [], engines.build_dit

    def counted(file, **options):
        made.append("high" if "high" in file.path.name else "low")
        return build(file, **options)

    monkeypatch.setattr(engines, "build_dit", counted)
    return made


def planned(run: Run, shelf: Shelf) -> Plan:
    with Machine().running():
        return plan(models_of(run, shelf).dit, run.latent, "cuda:0", prompts=1 + run.guided)


@pytest.mark.parametrize("stay", [True, False])
def test_two_experts_stay_only_beside_what_they_compute_with(monkeypatch: pytest.MonkeyPatch, shelf: Shelf, stay: bool):
    """Both fit by their weights; whether their activations fit too decides, and nothing runs out on the way."""
    run = Run("t2v-A14B", "720p", dtype="fp8_e4m3fn")
    needed = planned(run, shelf)
    both = 2 * needed.needs.weights + needed.needs.working
    assert needed.needs.working > 3e9
    seen = rehearse(run, shelf, Machine(both + 1.2e9 if stay else both - 0.5e9))
    assert (seen.beside > 0) is stay and not seen.notes


def test_the_first_cure_is_that_the_other_expert_goes(monkeypatch: pytest.MonkeyPatch, shelf: Shelf):
    """On a device that says it has more than it has; nothing streams."""
    run = Run("t2v-A14B", "480p", dtype="fp8_e4m3fn", layers=3)
    loads = loads_of_experts(monkeypatch)
    seen = rehearse(run, shelf, Machine(planned(run, shelf).total + 1e9, claims=20e9))
    assert len(seen.notes) == 1 and "after 1 steps" in seen.notes[0] and "one model at a time" in seen.notes[0], (
        seen.notes
    )
    assert loads == ["high", "low", "low"] and seen.plan.swapped == 0 and seen.beside == 0


def test_the_second_cure_is_that_blocks_stream(monkeypatch: pytest.MonkeyPatch, shelf: Shelf):
    """Where one expert alone is too much."""
    run = Run("t2v-A14B", "480p", layers=6)
    loads = loads_of_experts(monkeypatch)
    seen = rehearse(run, shelf, Machine(planned(run, shelf).total - 0.5e9, claims=40e9))
    assert len(seen.notes) == 1 and "3 of 6 blocks streamed" in seen.notes[0], seen.notes
    assert loads == ["high", "high", "low"] and seen.plan.swapped == 3


LATENT = (16, 4, 90, 160)  # 720p, four latent frames


def decode_720p(machine: Machine, shelf: Shelf, engine: Engine, **options) -> list[int]:
    """Frames of the chunks of a video."""
    latent = torch.zeros(LATENT, device="cuda:0")
    chunks = pipeline.decode(shelf.vae("t2v-A14B"), latent, engine, machine.device, **options)
    return [chunk.shape[1] for chunk in chunks if chunk.shape[2:] == (720, 1280)]


def test_decoding_makes_room_for_what_it_computes_with(shelf: Shelf):
    """Beside an expert of 20 GB on a device of 24: the expert goes, the frame is decoded whole."""
    machine = Machine(24e9)
    with machine.running() as tally, torch.no_grad():
        engine = Engine()
        weights = partial(torch.zeros, 20 * 10**9, dtype=torch.uint8, device="cuda:0")
        engine.get(("dit", "an expert"), Budget(20 * 10**9), "cuda:0", weights)
        assert decode_720p(machine, shelf, engine) == [1, 4, 4, 4]
        assert tally.live.peak < 21e9 and engine.bytes_on("cuda:0") < 1e9


@pytest.mark.parametrize(("total", "tile"), [(12e9, 1024), (6e9, 512)])
def test_decoding_that_runs_out_goes_on_in_tiles(
    shelf: Shelf, caplog: pytest.LogCaptureFixture, total: float, tile: int
):
    """On a device that says it has more than it has: no chunk twice, none left out."""
    machine = Machine(total, claims=80e9)
    with machine.running(), torch.no_grad():
        assert decode_720p(machine, shelf, Engine()) == [1, 4, 4, 4]
    assert f"in tiles of {tile}x{tile} pixels" in caplog.messages[-1], caplog.messages


def test_decoding_with_nothing_left_to_try_says_so(shelf: Shelf):
    machine = Machine(0.6e9, claims=80e9)
    with machine.running(), torch.no_grad(), pytest.raises(WanError, match="also in small tiles.*smaller size"):
        decode_720p(machine, shelf, Engine())


def test_encoding_that_runs_out_goes_on_in_tiles(shelf: Shelf, caplog: pytest.LogCaptureFixture):
    machine = Machine(6e9, claims=80e9)
    with machine.running(), torch.no_grad():
        models = models_of(Run("i2v-A14B", "720p"), shelf)
        chunks = (torch.zeros(1, 3, count, 720, 1280) for count in (1, 4, 4))
        latent = pipeline._encode(models, Request(""), Engine(), chunks, 9, (720, 1280), machine.device)
        assert latent.shape == (1, 16, 3, 90, 160) and latent.device == machine.device
    assert "in tiles of" in caplog.messages[-1]


def test_a_device_that_is_small_is_not_refused(shelf: Shelf):
    """Without a memory limit: tiles that fit are chosen before anything runs out."""
    run = Run("t2v-A14B", "720p")
    machine = Machine(8e9)
    with machine.running() as tally, torch.no_grad():
        models, engine = models_of(run, shelf), Engine()
        room = pipeline._room(models, engine, machine.device)
        pipeline.check_decode(models.vae, (720, 1280), machine.device, room=room)
        assert decode_720p(machine, shelf, engine, room=room) == [1, 4, 4, 4]
        assert 4e9 < tally.live.peak < 7e9


@pytest.mark.parametrize(("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "fp8_e4m3fn"), ("Q4_K", "auto")])
def test_weights_are_loaded_from_pinned_memory(shelf: Shelf, stored: str, dtype: str):
    """As they are stored, in pieces of 32 MB, and cast on the device."""
    machine = Machine()
    with machine.running() as tally, torch.no_grad():
        file, counts = shelf.dit("ti2v-5B", 1, stored=stored), tally.begin()
        model = build_dit(file, device=machine.device, dtype=dtype)
        assert counts.pageable < 1e6
        assert counts.pinned == pytest.approx(sum(map(file.checkpoint.stored_bytes, file.names.values())), rel=0.01)
        made = [*model.parameters(), *model.buffers()]
        assert tally.live.now == pytest.approx(sum(one.nbytes for one in made), rel=0.01)


def test_tiles_larger_than_one_side_of_the_frame_are_no_reason_for_the_cpu(shelf: Shelf):
    machine = Machine(15e9)
    with machine.running():
        config = shelf.vae("ti2v-5B").config
        where = place(config, (704, 1280), machine.device, torch.float32, room=14.3e9)
    assert where.device == machine.device and where.tiles.width == 1024


# --- devices of other kinds

_ELSEWHERE = """
import sys
from pathlib import Path
from bench.rehearse.files import Shelf
from bench.rehearse.machine import Machine, play_other_kind
from bench.rehearse.scenes import Run, rehearse
kind, shelf = play_other_kind(), Shelf(Path(sys.argv[1]))
for run in (
    Run("t2v-1.3B", "480p", stored="Q4_0", dtype="float16", solver="dpm++", guided=True, lora="added"),
    Run("t2v-1.3B", "480p", dtype="float16", layers=3, swap=2, masked=True),
    Run("ti2v-5B", "704p", dtype="float16", image=True),
    Run("i2v-14B", "480p", dtype="fp8_e4m3fn", image=True),
):
    seen = rehearse(run, shelf, Machine(kind=kind))
    assert sum(seen.steps[-1].waits.values()) == 1, (str(run), seen.steps[-1].waits)
    print("ran", run)
try:
    with Machine(kind=kind).running():
        import torch
        torch.zeros(3, device=kind).double().add_(1)
except TypeError as error:
    print("refused", error)
"""


def test_a_device_without_float64_and_complex_numbers(tmp_path: Path):
    """In a process of its own: PyTorch knows the place for other backends, once used, to the end of the process."""
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ran ") == 4 and "refused" in done.stdout
