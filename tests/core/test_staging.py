"""The way from a file to a device through pinned memory, with the device played by the host."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wan_core import mapped, staging
from wan_core.errors import WanError
from wan_core.staging import Piece, upload

CPU = torch.device("cpu")


class Event:
    """Of a copy; waiting for it is noted."""

    waited = 0

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None:
        Event.waited += 1


@pytest.fixture(autouse=True)
def host_as_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Event.waited = 0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(staging, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    yield


@pytest.fixture
def readers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pieces_arrive_in_their_places(readers: ThreadPoolExecutor, dtype: torch.dtype):
    """More than the ring has room for, of several lengths, cast on the way."""
    stored = torch.arange(57, dtype=torch.float32)
    made = torch.full((57,), -1.0, dtype=dtype)
    starts = range(0, 57, 8)
    pieces = [Piece(_reader(stored[i : i + 8]), stored.dtype, made[i : i + 8]) for i in starts]
    upload(pieces, CPU, 8 * 4, readers)
    assert torch.equal(made, stored.to(dtype))
    assert Event.waited == len(starts) - staging.PIECES  # for each buffer before it is used again


def _reader(part: Tensor):
    return lambda room: room.copy_(part)


def test_a_reader_that_fails_is_heard(readers: ThreadPoolExecutor):
    def fail(room: Tensor) -> None:
        raise WanError("gone")

    made = torch.zeros(8)
    pieces = [Piece(_reader(torch.ones(4)), torch.float32, made[:4]), Piece(fail, torch.float32, made[4:])]
    with pytest.raises(WanError, match="gone"):
        upload(pieces, CPU, 16, readers)
    assert made.tolist() == [1.0] * 4 + [0.0] * 4


def test_a_file_reaches_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Real reads of a mapped file, in pieces that cut tensors."""
    monkeypatch.setattr(staging, "PIECE", 64)
    values = torch.randn(101).half()
    (tmp_path / "file").write_bytes(values.numpy().tobytes())
    file = mapped.MappedFile(tmp_path / "file")
    first, second = file.tensor(0, (60,), torch.float16), file.tensor(120, (41,), torch.float16)
    places = torch.zeros(60, dtype=torch.float16), torch.zeros(41, dtype=torch.bfloat16)
    sources = [(mapped._behind(one), one.dtype, place) for one, place in zip((first, second), places, strict=True)]
    mapped._upload(CPU, sources)
    assert torch.equal(places[0], values[:60]) and torch.equal(places[1], values[60:].bfloat16())


def test_conversion_on_the_host_is_shared_by_the_readers(tmp_path: Path):
    values = torch.randn(3, 70001)
    (tmp_path / "file").write_bytes(values.numpy().tobytes())
    tensor = mapped.MappedFile(tmp_path / "file").tensor(0, (3, 70001), torch.float32)
    place = torch.empty(3, 70001, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(mapped, "_PART", 40000)
        assert len(list(mapped._parts(mapped._behind(tensor), place, tensor.dtype, 40000))) == 22
        mapped.read_into([(tensor, place)])
    assert torch.equal(place, values.bfloat16())
