"""Reading behind mapped tensors: the same numbers as the mapping, and errors where the mapping would kill."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from wan_core import mapped
from wan_core.errors import WanError
from wan_core.mapped import MappedFile, read_into

COUNT = 1000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Random float16 numbers behind three bytes: safetensors does not promise alignment."""
    path = tmp_path / "weights.bin"
    path.write_bytes(b"abc" + torch.randn(COUNT).half().numpy().tobytes())
    return path


def weights(file: Path) -> torch.Tensor:
    return MappedFile(file).tensor(3, (COUNT // 10, 10), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("part", [slice(None), slice(7, 31), slice(0, 0), 3], ids=["all", "rows", "nothing", "row"])
def test_read_equals_mapped(file: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, part: slice | int):
    monkeypatch.setattr(mapped, "_CHUNK", 64)
    stored = weights(file)[part]
    place = torch.full(stored.shape, torch.nan, dtype=dtype)
    read_into([(stored, place)])
    assert torch.equal(place, stored.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["as-stored", "converted"])
@pytest.mark.parametrize("made", [True, False], ids=["inference", "normal"])
@pytest.mark.parametrize("reads", [True, False], ids=["in-inference", "outside"])
def test_places_of_every_mode_are_filled(file: Path, dtype: torch.dtype, made: bool, reads: bool):
    """ComfyUI runs nodes in inference mode; the reading threads are in none of their own."""
    stored = weights(file)
    with torch.inference_mode(made):
        place = torch.full(stored.shape, torch.nan, dtype=dtype)
    with torch.inference_mode(reads):
        read_into([(stored, place)])
        assert torch.equal(place, stored.to(dtype))


def test_what_no_file_holds_in_this_order_is_copied(file: Path):
    stored = weights(file)
    pairs = [(value, torch.zeros_like(value)) for value in (stored.T, stored.clone(), torch.tensor(2.0))]
    read_into(pairs)
    assert all(torch.equal(value, place) for value, place in pairs)


def test_the_mapping_is_not_touched(file: Path):
    """Its pages may be gone: a mapping that was written to still reads what the file holds."""
    stored = weights(file)
    before = stored.clone()
    stored.zero_()  # private: the file keeps its bytes
    place = torch.empty_like(stored)
    read_into([(stored, place)])
    assert torch.equal(place, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["as-stored", "converted"])
@pytest.mark.parametrize("damage", ["truncated", "rewritten", "removed"])
def test_a_changed_file_is_refused(file: Path, damage: str, dtype: torch.dtype):
    stored = weights(file)
    if damage == "truncated":
        os.truncate(file, 100)
    elif damage == "rewritten":
        file.write_bytes(bytes(file.stat().st_size))
        os.utime(file, ns=(1, 1))  # a clock may be too coarse to tell
    else:
        file.unlink()
    with pytest.raises(WanError, match="weights.bin was changed or removed after it was chosen"):
        read_into([(stored, torch.empty(stored.shape, dtype=dtype))])


def test_a_file_that_shrinks_while_it_is_read_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch):
    stored = weights(file)
    monkeypatch.setattr(mapped, "_state", lambda stream: None)
    (held,) = (one for one in mapped._maps if one.file == file)
    held.state = None
    os.truncate(file, 100)
    with pytest.raises(WanError, match="was changed or removed"):
        read_into([(stored, torch.empty_like(stored))])


def test_a_failing_disk_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch):
    stored = weights(file)

    def broken(self: Path, *args, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(WanError, match="cannot be read any more .*Input/output error.*network share"):
        read_into([(stored, torch.empty_like(stored))])


def test_a_mapping_lives_as_long_as_its_tensors(file: Path):
    stored = weights(file)[5]
    gc.collect()
    assert [one for one in mapped._maps if one.file == file]
    del stored
    gc.collect()
    assert not [one for one in mapped._maps if one.file == file]
