"""Block swap: it changes no bit, it overlaps, it holds no second copy, and it ends well."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan_core.config import Architecture
from wan_core.errors import WanError
from wan_core.loading.dit import read_dit
from wan_core.memory.build import build_dit
from wan_core.memory.stream import transfer as offload
from wan_core.memory.stream.ring import Ring, spread
from wan_core.memory.stream.swap import BlockSwap
from wan_core.memory.stream.transfer import HostBackend, transfer_of
from wan_core.models.dit.dit import WanDiT, keeps_float32
from wan_core.models.dit.features.clip_tokens import ClipTokens, ClipTokensConfig
from wan_core.staging import pinned
from wan_core.tools.tiny import _random_weights

LAYERS = 5
CONFIG = Architecture(16, 16, 128, 256, layers=LAYERS, text_dim=32, freq_dim=256, heads=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model, stored in float32, bfloat16 and float16."""
    folder = tmp_path_factory.mktemp("dit")
    weights = _random_weights(WanDiT, CONFIG, torch.Generator().manual_seed(0))
    rounded = {key: value.bfloat16() for key, value in weights.items()}
    save_file({key: value.float() for key, value in rounded.items()}, folder / "float32.safetensors")
    save_file(rounded, folder / "bfloat16.safetensors")
    save_file({key: value.half() for key, value in rounded.items()}, folder / "float16.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("float32", "bfloat16", "float16")}


@pytest.fixture
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader thread, the ring and the slots, as on CUDA, with plain memory."""
    monkeypatch.setitem(offload.BACKENDS, "cpu", HostBackend)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return draw(1, 16, 3, 6, 8), torch.tensor([937.0]), draw(1, 20, 32)


def velocities(path: Path, calls: int = 3, **options) -> list[Tensor]:
    dit = build_dit(read_dit(path), dtype="float32", **options)
    return [dit(*inputs()) for _ in range(calls)]


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("blocks", range(LAYERS + 1))
def test_swapped_equals_resident_to_the_last_bit(files: dict[str, Path], stored: str, blocks: int):
    """Mapped (float32 as it lies in the file), and converted block by block."""
    resident = velocities(files["float32"], calls=1)[0]
    assert all(torch.equal(v, resident) for v in velocities(files[stored], swap_blocks=blocks))


@pytest.mark.usefixtures("in_a_thread")
@pytest.mark.parametrize("positions", [0, 514], ids=["i2v", "flf2v"])
def test_models_that_hear_a_picture_swap_too(tmp_path: Path, positions: int):
    """Its keys and values are made in the block that streams: kept or made anew, to the last bit."""
    config = replace(CONFIG, in_channels=36, features=(ClipTokensConfig(64, positions),))
    weights = _random_weights(WanDiT, config, torch.Generator().manual_seed(0))
    weights = {key: value.bfloat16() for key, value in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    file, (x, t, text) = read_dit(tmp_path / "model.safetensors"), inputs()
    seen = (ClipTokens(torch.randn(1, positions or 257, 64, generator=torch.Generator().manual_seed(2))),)
    x = torch.cat([x, torch.randn(1, 20, *x.shape[2:], generator=torch.Generator().manual_seed(3))], dim=1)
    resident = build_dit(file, dtype="float32")
    expected = resident(x, t, text, inputs=seen)
    for options in ({"swap_blocks": 2}, {"swap_blocks": LAYERS}, {"swap_blocks": LAYERS, "prefetch": 2}):
        dit = build_dit(file, dtype="float32", **options)
        states = dit.text_states(text, inputs=seen)
        for _ in range(2):
            assert torch.equal(dit(x, t, text, inputs=seen), expected)
            assert torch.equal(dit(x, t, states), expected)
    assert not torch.equal(resident(x, t, text), expected)


@pytest.mark.usefixtures("in_a_thread")
@pytest.mark.parametrize("prefetch", range(LAYERS + 2))
@pytest.mark.parametrize("blocks", [1, 2, LAYERS])
def test_every_prefetch_depth_equals_resident(files: dict[str, Path], blocks: int, prefetch: int):
    resident = velocities(files["float32"], calls=1)[0]
    for velocity in velocities(files["bfloat16"], swap_blocks=blocks, prefetch=prefetch):
        assert torch.equal(velocity, resident)


def test_half_precision_equals_resident(files: dict[str, Path]):
    """Also the mixture: norms and modulation stay float32 in a bfloat16 model."""
    make = lambda n: build_dit(read_dit(files["bfloat16"]), dtype="bfloat16", swap_blocks=n)  # noqa: E731
    resident, swapped = make(0), make(LAYERS)
    assert torch.equal(resident(*inputs()), swapped(*inputs()))
    sizes = {item.dtype for item in swapped.swap._transfers[0].tensors}
    assert sizes == {torch.float32}  # bfloat16 matrices are used as they lie in the file


def cast_on_the_way(calls: list[tuple[torch.dtype, torch.dtype]]) -> Callable[[Tensor, Tensor], None]:
    """In place of what casts, noting from what to what."""
    plain = offload._cast

    def cast(stored: Tensor, place: Tensor) -> None:
        calls.append((stored.dtype, place.dtype))
        plain(stored, place)

    return cast


@pytest.mark.usefixtures("in_a_thread")
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("compute", ["bfloat16", "float16", "float32"])
def test_blocks_travel_as_they_are_stored(
    files: dict[str, Path], stored: str, compute: str, monkeypatch: pytest.MonkeyPatch
):
    """And are cast where they arrive, piece by piece, to the same bits as on the host; a stage holds stored bytes."""
    calls: list[tuple[torch.dtype, torch.dtype]] = []
    monkeypatch.setattr(offload, "_cast", cast_on_the_way(calls))
    monkeypatch.setattr(offload, "PIECE", 5000)  # fewer bytes than a matrix, and no multiple of its numbers'
    file = read_dit(files[stored])
    resident = build_dit(file, dtype=compute)(*inputs())
    dit = build_dit(file, dtype=compute, swap_blocks=LAYERS)
    assert all(torch.equal(dit(*inputs()), resident) for _ in range(2))
    kind, targets = getattr(torch, stored), {getattr(torch, compute), torch.float32}  # norms stay float32
    assert set(calls) == {(kind, target) for target in targets - {kind}}
    transfer = dit.swap._transfers[0]
    parts = [part for piece in transfer.pieces for part in piece.parts]
    assert len(transfer.pieces) > 5 or stored == compute  # then a CPU's matrices stay where they are
    assert max((piece.bytes for piece in transfer.pieces), default=0) <= 5000
    assert sum(part.stored.nbytes for part in parts) == sum(item.stored.nbytes for item in transfer.tensors)
    direct, slot = torch.empty(transfer.bytes, dtype=torch.uint8), torch.empty(transfer.bytes, dtype=torch.uint8)
    stage = torch.empty(5000, dtype=torch.uint8)
    transfer.read_into(direct)
    for piece in transfer.pieces:
        piece.read_into(stage)
        piece.copy(stage, slot)
    for item in transfer.tensors:
        assert torch.equal(item.view(slot), item.view(direct)), item.name
    dit.swap.close()


@pytest.mark.parametrize(("count", "expected"), [(0, ()), (1, (4,)), (2, (2, 4)), (3, (1, 3, 4)), (5, (0, 1, 2, 3, 4))])
def test_swapped_blocks_are_spread(count: int, expected: tuple[int, ...]):
    assert spread(count, LAYERS) == expected


@pytest.mark.parametrize(("count", "prefetch"), [(-1, 1), (LAYERS + 1, 1), (1, -1)])
def test_impossible_counts_are_refused(files: dict[str, Path], count: int, prefetch: int):
    with pytest.raises(WanError, match="Choose 0 to 5|0 or more"):
        build_dit(read_dit(files["float32"]), swap_blocks=count, prefetch=prefetch)


class Quantised(nn.Module):
    """As a quantised layer stores itself: raw bytes and scales in buffers, the bias as a parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("packed", torch.arange(12, dtype=torch.uint8).view(3, 4))
        self.register_buffer("scales", torch.rand(3, dtype=torch.float16))
        self.register_buffer("nothing", None)
        self.bias = nn.Parameter(torch.rand(3, dtype=torch.bfloat16), requires_grad=False)


def test_buffers_are_moved_as_they_are_and_parameters_converted():
    layer = nn.ModuleDict({"q": Quantised(), "norm": nn.LayerNorm(3, dtype=torch.bfloat16)})
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    device = torch.device("meta")  # nothing lies there yet: all must move
    load = transfer_of(layer, device, torch.float16, keeps_float32)
    load.take_away()
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    slot = torch.zeros(load.bytes, dtype=torch.uint8)
    load.read_into(slot)
    load.put(slot)
    dtypes = {key: value.dtype for key, value in layer.state_dict().items()}
    assert dtypes == {
        "q.packed": torch.uint8,
        "q.scales": torch.float16,
        "q.bias": torch.float16,
        "norm.weight": torch.float32,
        "norm.bias": torch.float32,
    }
    assert all(torch.equal(value, before[key].to(value.dtype)) for key, value in layer.state_dict().items())
    assert isinstance(layer["q"].bias, nn.Parameter)
    assert all(item.offset % offload.ALIGNMENT == 0 for item in load.tensors)


class FakeClock:
    """Reader, copier and computation as a ring lets them work, each step taking its time; an event at a time.

    Checks on the way that nobody writes where another still reads.
    """

    def __init__(self, ring: Ring, seconds: dict[str, float], between: Callable[[int], float] = lambda block: 0.0):
        self.ring, self.seconds, self.between = ring, seconds, between
        self.now = 0.0
        self.busy: dict[str, tuple[float, int]] = {}  # who -> (until when, ticket)
        self.computed: list[tuple[int, float, float]] = []

    def run(self, blocks: int) -> float:
        """The time until so many blocks are computed."""
        while len(self.computed) < blocks:
            self._begin()
            who = min(self.busy, key=lambda name: self.busy[name][0])
            began, ticket = self.busy.pop(who)
            self.now = began
            counter = {"read": "read", "copy": "copied", "compute": "released"}[who]
            assert getattr(self.ring, counter) == ticket
            setattr(self.ring, counter, ticket + 1)
            if who == "compute":
                start = self.now - self._seconds("compute", ticket)
                self.computed.append((self.ring.block(ticket), start, self.now))
        return self.now

    def _begin(self) -> None:
        ring = self.ring
        for who, may, ticket in (
            ("read", ring.may_read(), ring.read),
            ("copy", ring.may_copy(), ring.copied),
            ("compute", ring.may_compute(), ring.released),
        ):
            if may and who not in self.busy:
                self.busy[who] = self.now + self._seconds(who, ticket), ticket
        self._check()

    def _seconds(self, who: str, ticket: int) -> float:
        return self.seconds[who] + (self.between(self.ring.block(ticket)) if who == "compute" else 0)

    def _check(self) -> None:
        ticket = {who: entry[1] for who, entry in self.busy.items()}
        if {"read", "copy"} <= ticket.keys():
            assert self.ring.stage(ticket["read"]) != self.ring.stage(ticket["copy"])
        if {"copy", "compute"} <= ticket.keys():
            block, _ = self.ring.of_piece(ticket["copy"])
            assert self.ring.slot(block) != self.ring.slot(ticket["compute"])


def simulate(
    blocks: int = 80, *, slots: int, stages: int = 2, pieces: int = 1, read: float, copy: float, compute: float
) -> FakeClock:
    ring = Ring(range(40), slots=slots, stages=stages, pieces=pieces)
    clock = FakeClock(ring, {"read": read / pieces, "copy": copy / pieces, "compute": compute})
    clock.run(blocks)
    return clock


def test_copies_hide_behind_the_computation():
    """The figures of A14B at 720p on a fast card: a step of 40 blocks costs the first read and copy, then nothing."""
    clock = simulate(slots=2, read=0.10, copy=0.03, compute=0.28)
    assert clock.now == pytest.approx(0.10 + 0.03 + 80 * 0.28)
    resident = 80 * 0.28
    assert resident / clock.now > 0.97


@pytest.mark.parametrize(("pieces", "stages"), [(22, 8), (22, 2), (3, 8), (1, 8)])
def test_in_pieces_a_small_ring_hides_them_as_well(pieces: int, stages: int):
    """Reading and copying overlap within a block too: only the first block's last piece is copied by itself."""
    clock = simulate(slots=2, stages=stages, pieces=pieces, read=0.10, copy=0.03, compute=0.28)
    assert clock.now == pytest.approx(0.10 + 0.03 / pieces + 80 * 0.28)


@pytest.mark.parametrize("stages", [2, 8])
def test_in_pieces_a_slow_disk_sets_the_pace(stages: int):
    clock = simulate(slots=2, stages=stages, pieces=22, read=0.5, copy=0.03, compute=0.28)
    assert clock.now == pytest.approx(80 * 0.5 + 0.03 / 22 + 0.28)


def test_without_prefetch_every_copy_is_waited_for():
    clock = simulate(slots=1, read=0.10, copy=0.03, compute=0.28)
    assert clock.now == pytest.approx(0.10 + 80 * (0.03 + 0.28))  # reading still overlaps, copying cannot


def test_the_second_half_of_the_guidance_finds_its_first_blocks_there():
    """Between block 39 and the next call's block 0 there is no pause."""
    clock = simulate(slots=2, read=0.10, copy=0.03, compute=0.28)
    pauses = [start - end for (_, _, end), (_, start, _) in pairwise(clock.computed)]
    assert clock.computed[39][0] == 39 and clock.computed[40][0] == 0
    assert max(pauses) == pytest.approx(0, abs=1e-9)


def test_a_slow_disk_sets_the_pace_and_depth_does_not_help():
    for slots in (2, 3, 5):
        clock = simulate(slots=slots, read=0.5, copy=0.03, compute=0.28)
        assert clock.now == pytest.approx(80 * 0.5 + 0.03 + 0.28)


def test_resident_blocks_between_swapped_ones_hide_slower_copies():
    """Half of the blocks swapped: each copy has the time of two computations, because they are spread."""
    swapped = spread(20, 40)
    clock = FakeClock(
        Ring(swapped, slots=2, stages=2), {"read": 0.5, "copy": 0.03, "compute": 0.28}, between=lambda block: 0.28
    )
    assert clock.run(40) == pytest.approx(0.5 + 0.03 + 40 * 0.56)


def test_a_deeper_ring_evens_out_hiccups():
    """A read that takes ten times as long as usual once per call is hidden by depth, not by one block of prefetch."""

    def total(slots: int) -> float:
        ring = Ring(range(40), slots=slots, stages=2)
        clock = FakeClock(ring, {"copy": 0.03, "compute": 0.28})
        clock._seconds = lambda who, ticket: {"copy": 0.03, "compute": 0.28}.get(who, 1.0 if ticket % 40 == 20 else 0.1)
        return clock.run(80)

    resident = 80 * 0.28
    assert total(2) > resident + 0.3
    assert total(5) == pytest.approx(resident + 0.13)


def test_a_restart_goes_on_anywhere():
    ring = Ring([1, 3, 4], slots=2, stages=2)
    ring.read, ring.copied, ring.released = 4, 3, 2
    ring.restart(3)
    assert (ring.copied, ring.released) == (4, 4)
    assert [ring.block(ticket) for ticket in range(4, 9)] == [3, 4, 1, 3, 4]
    assert ring.may_read() and not ring.may_copy() and not ring.may_compute()


@pytest.mark.parametrize("read", [12, 13, 14])
def test_a_restart_in_the_midst_of_a_block_begins_with_its_first_piece(read: int):
    ring = Ring([1, 3, 4], slots=2, stages=8, pieces=3)
    ring.read, ring.copied, ring.released = read, 11, 2
    ring.restart(3)
    assert ring.of_piece(ring.read) == (ring.released, 0) and ring.read == ring.copied >= read
    assert [ring.block(ring.released + n) for n in range(4)] == [3, 4, 1, 3]
    assert ring.may_read() and not ring.may_copy() and not ring.may_compute()


@pytest.mark.usefixtures("in_a_thread")
def test_a_cancelled_call_is_followed_by_a_right_one(files: dict[str, Path]):
    class Cancelled(Exception): ...

    def cancel_at(wanted: int) -> Callable[[int], None]:
        def on_block(index: int) -> None:
            if index == wanted:
                raise Cancelled

        return on_block

    dit = build_dit(read_dit(files["bfloat16"]), dtype="float32", swap_blocks=4, prefetch=2)
    resident = velocities(files["float32"], calls=1)[0]
    for block in (0, 2, 3, 4, 1):
        with pytest.raises(Cancelled):
            dit(*inputs(), on_block=cancel_at(block))
        assert torch.equal(dit(*inputs()), resident)


@pytest.mark.usefixtures("in_a_thread")
def test_an_error_inside_a_block_gives_the_slot_back(files: dict[str, Path]):
    dit = build_dit(read_dit(files["bfloat16"]), dtype="float32", swap_blocks=4)
    attend, resident = dit.attend, velocities(files["float32"], calls=1)[0]

    def fail(*_, **__):
        raise torch.OutOfMemoryError("made up")

    dit.attend = fail
    with pytest.raises(torch.OutOfMemoryError):
        dit(*inputs())
    dit.attend = attend
    assert torch.equal(dit(*inputs()), resident)
    assert all(p.is_meta for i in dit.swap.indices for p in dit.blocks[i].parameters())


def readers() -> int:
    return sum(thread.name == "wan-block-reader" for thread in threading.enumerate())


@pytest.mark.usefixtures("in_a_thread")
def test_with_the_model_go_its_thread_and_its_mapping(files: dict[str, Path]):
    dit = build_dit(read_dit(files["bfloat16"]), dtype="float32", swap_blocks=3)
    dit(*inputs())
    assert readers() == 1
    assert str(files["bfloat16"]) in Path("/proc/self/maps").read_text()
    del dit
    gc.collect()
    assert readers() == 0
    assert str(files["bfloat16"]) not in Path("/proc/self/maps").read_text()


@pytest.mark.usefixtures("in_a_thread")
def test_a_closed_swap_begins_anew(files: dict[str, Path]):
    dit = build_dit(read_dit(files["bfloat16"]), dtype="float32", swap_blocks=3)
    first = dit(*inputs())
    dit.swap.close()
    assert readers() == 0
    assert torch.equal(dit(*inputs()), first)


@pytest.mark.usefixtures("in_a_thread")
def test_slots_are_used_again(files: dict[str, Path]):
    dit = build_dit(read_dit(files["bfloat16"]), dtype="float32", swap_blocks=LAYERS, prefetch=2)
    places = set()
    original = offload.BlockTransfer.put

    def spy(load: offload.BlockTransfer, buffer: Tensor) -> None:
        places.add(buffer.data_ptr())
        original(load, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload.BlockTransfer, "put", spy)
        for _ in range(3):
            dit(*inputs())
    assert len(places) == dit.swap.slots == 3
    assert dit.swap.block_bytes == max(load.bytes for load in dit.swap._transfers.values())


@pytest.mark.usefixtures("in_a_thread")
def test_it_works_in_inference_mode(files: dict[str, Path]):
    """ComfyUI's nodes run in it, the reader thread does not, and training may follow."""
    resident = velocities(files["float32"], calls=1)[0]
    with torch.inference_mode():
        dit = build_dit(read_dit(files["bfloat16"]), dtype="float32", swap_blocks=4)
        assert torch.equal(dit(*inputs()), resident)
    assert torch.equal(dit(*inputs()), resident)


@pytest.mark.parametrize("lane", [None, HostBackend], ids=["direct", "thread"])
@pytest.mark.parametrize("asked", [True, False], ids=["before", "while-reading"])
@pytest.mark.parametrize("damage", ["truncated", "replaced", "removed"])
def test_a_file_that_changes_while_mapped_is_noticed(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lane: type | None, asked: bool, damage: str
):
    """Also after it was asked for and before it is read: to touch the mapping then would kill the process."""
    if lane:
        monkeypatch.setitem(offload.BACKENDS, "cpu", lane)
    if not asked:
        monkeypatch.setattr("wan_core.memory.build.check_unchanged", lambda file: None)
    path = tmp_path / "model.safetensors"
    path.write_bytes(files["bfloat16"].read_bytes())
    dit = build_dit(read_dit(path), dtype="float32", swap_blocks=LAYERS)
    right = dit(*inputs())
    if damage == "truncated":
        os.truncate(path, 0)
    elif damage == "replaced":
        other = tmp_path / "other"
        other.write_bytes(files["float32"].read_bytes())
        other.replace(path)
    else:
        path.unlink()
    with pytest.raises(WanError, match="model.safetensors was changed or removed after it was chosen"):
        for _ in range(3):  # what was prefetched before the change is still right
            assert torch.equal(dit(*inputs()), right)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA streams")
def test_copies_overlap_the_computation_on_cuda(tmp_path: Path):
    """By the clock of the device: with prefetch a call takes hardly longer than resident."""
    config = Architecture(16, 16, 2048, 8192, layers=8, text_dim=32, freq_dim=256, heads=16)
    weights = _random_weights(WanDiT, config, torch.Generator().manual_seed(0))
    save_file({key: value.bfloat16() for key, value in weights.items()}, tmp_path / "wide.safetensors")
    file = read_dit(tmp_path / "wide.safetensors")
    x, t, context = (v.cuda() for v in (torch.randn(1, 16, 9, 96, 96), torch.tensor([500.0]), torch.randn(1, 512, 32)))

    def milliseconds(**options) -> tuple[float, Tensor]:
        dit = build_dit(file, device="cuda", dtype="bfloat16", **options)
        for _ in range(2):
            velocity = dit(x, t, context)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            velocity = dit(x, t, context)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 4, velocity

    resident, expected = milliseconds()
    prefetched, found = milliseconds(swap_blocks=8, prefetch=1)
    sequential, _ = milliseconds(swap_blocks=8, prefetch=0)
    assert torch.equal(found, expected)
    assert prefetched < 1.1 * resident, (resident, prefetched, sequential)
    assert prefetched < 1.05 * sequential, (resident, prefetched, sequential)


def test_a_swap_may_be_built_by_hand():
    """On the meta device, with nothing to move: for whoever has a model of his own."""
    with torch.device("meta"):
        model = WanDiT(CONFIG)
    swap = BlockSwap(model.blocks, 2, device="meta", dtype=torch.float32, keep_float32=keeps_float32).adopt()
    assert not swap.moves and swap.indices == (2, 4)
    assert not swap.places("blocks.2.ffn.0.bias")
    assert swap.places("blocks.3.ffn.0.bias") and swap.places("head.head.bias")


def test_without_pinned_memory_plain_memory_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    real = torch.empty

    def refuse(*shape, pin_memory: bool = False, **options) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return real(*shape, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    assert not pinned(64).is_pinned()
    assert "no pinned memory (CUDA error: out of memory)" in caplog.text
