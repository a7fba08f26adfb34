"""What kinds of devices there are, and what each says of itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from wan_core.dtypes import default_dtype
from wan_core.errors import is_out_of_memory
from wan_core.memory import devices
from wan_core.memory.devices import available_bytes, default_device, resolve_device, total_bytes


@pytest.fixture
def xpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A machine with a card of Intel's, of 16 GB."""
    answers = SimpleNamespace(
        mem_get_info=lambda device: (9 * 10**9, 16 * 10**9),
        memory_reserved=lambda device: 3 * 10**9,
        memory_allocated=lambda device: 10**9,
        device_count=lambda: 2,
        emptied=[],
    )
    answers.empty_cache = lambda: answers.emptied.append(True)
    monkeypatch.setattr(torch, "xpu", answers)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    return torch.device("xpu", 0)


def test_another_accelerator_is_the_default_and_has_its_own_memory(xpu: torch.device):
    assert default_device() == torch.device("xpu") and devices._here() == ["cpu", "xpu:0", "xpu:1"]
    assert total_bytes(xpu) == 16e9 and available_bytes(xpu) == 11e9
    devices.empty_cache()
    assert torch.xpu.emptied == [True]
    with pytest.raises(Exception, match="Expected one of cpu, xpu:0, xpu:1"):
        resolve_device("cuda:7")


def test_apples_memory_is_part_of_the_machines(monkeypatch: pytest.MonkeyPatch):
    answers = SimpleNamespace(recommended_max_memory=lambda: 24 * 10**9, current_allocated_memory=lambda: 4 * 10**9)
    monkeypatch.setattr(torch, "mps", answers)
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=30 * 10**9))
    assert total_bytes(torch.device("mps")) == 24e9 and available_bytes(torch.device("mps")) == 20e9
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * 10**9))
    assert available_bytes(torch.device("mps")) == 5e9


def test_a_machine_without_an_accelerator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert default_device() == torch.device("cpu") and devices._here() == ["cpu"]


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1.00 GB)"), True),
        (RuntimeError("Could not allocate tensor. There is not enough GPU video memory available!"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to"), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError("Cannot allocate memory (os error 12)"), True),
        (OSError(28, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_has_other_words_elsewhere(error: Exception, ran_out: bool):
    assert is_out_of_memory(error) is ran_out


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("gfx1030", torch.float16), ("gfx1012:xnack-", torch.float16), ("gfx906:sramecc+", torch.float16),
     ("gfx1100", torch.bfloat16), ("gfx90a:sramecc+:xnack-", torch.bfloat16), ("gfx942", torch.bfloat16)],
)  # fmt: skip
def test_cards_of_amd_without_bfloat16(monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: torch.dtype):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=architecture, major=10)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    assert default_dtype("cuda:0") is dtype
