"""Cases of test_memory.py, run as ``memory_cases.py MEMORY_PY --cpu`` (see cases.py).

ComfyUI frees nothing on a CPU by itself, so the amounts are made up: 1000 bytes in all, of which the engine holds some.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

memory_py = Path(sys.argv.pop(1))

import comfy.options  # noqa: E402, TID251

comfy.options.enable_args_parsing()

import comfy.model_management as management  # noqa: E402, TID251
import torch  # noqa: E402
from cases import report  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402, TID251


def alone(path: Path):
    """A module of the pack without the pack."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


memory = alone(memory_py)
Budget = alone(memory_py.parents[1] / "wan_core" / "memory" / "budget.py").Budget

CPU = torch.device("cpu")
REAL = {name: getattr(management, name) for name in ("free_memory", "load_models_gpu")}


class Engine:
    """As much of the engine as the memory manager sees; parts are name -> bytes, least recently used first."""

    def __init__(self):
        self.parts: dict[str, int] = {}
        self.released = False
        self.residency = memory.Residency(self, CPU)

    def load(self, name: str, size: int) -> None:
        self.residency.make_room(Budget(size), CPU)
        self.parts[name] = size

    def bytes_on(self, device: torch.device) -> int:
        return sum(self.parts.values())

    def shrink(self, wanted: int, device: torch.device) -> int:
        before = self.bytes_on(device)
        while self.parts and before - self.bytes_on(device) < wanted:
            del self.parts[next(iter(self.parts))]
        return before - self.bytes_on(device)

    def release(self) -> None:
        self.parts.clear()
        self.released = True

    @property
    def entries(self) -> list:
        return [entry for entry in management.current_loaded_models if entry.model is self.residency]


def listed_once_and_truthfully(engine: Engine) -> None:
    engine.load("high", 300)
    engine.load("low", 200)
    assert engine.parts == {"high": 300, "low": 200}
    (entry,) = engine.entries
    assert (entry.model_memory(), entry.model_loaded_memory(), entry.model_offloaded_memory()) == (500, 500, 0)
    assert not entry.is_dead()
    management.cleanup_models_gc()
    management.cleanup_models()
    assert len(engine.entries) == 1


def gives_way_part_by_part(engine: Engine) -> None:
    """Somebody needs 700 and 500 are free: the least recently used part goes, the other stays."""
    engine.load("high", 300)
    engine.load("low", 200)
    management.free_memory(700, CPU)
    assert engine.parts == {"low": 200}
    assert len(engine.entries) == 1
    assert not engine.released


def gives_way_wholly(engine: Engine) -> None:
    """What "free memory" does, and running out of memory; the next load is listed again."""
    engine.load("high", 300)
    management.unload_all_models()
    assert engine.released
    assert engine.entries == []
    engine.load("low", 200)
    assert len(engine.entries) == 1


def native_models_are_asked_to_leave(engine: Engine) -> None:
    """A load on a card asks ComfyUI for as much room there as it needs, and the engine itself is not asked."""
    management.load_models_gpu([ModelPatcher(torch.nn.Linear(8, 8), load_device=CPU, offload_device=CPU)])
    asked = []
    management.free_memory = lambda needed, device, *rest, **options: asked.append((needed, device)) or []
    card = torch.device("meta")
    memory.Residency(engine, card).make_room(Budget(400, activations=2 * 10**9), card)
    assert asked[0][0] >= 400 + 3 * 10**9  # what it works with, and workspace
    assert asked[0][1] == card


def an_unknown_manager_is_reported_once(engine: Engine) -> None:
    def changed(*args: object, **options: object) -> None:
        raise TypeError("the interface is another now")

    said = []
    memory.log.warning = lambda text, **_: said.append(text)
    management.load_models_gpu = changed
    engine.load("high", 300)
    engine.load("low", 200)
    assert engine.parts == {"high": 300, "low": 200}
    assert len(said) == 1
    assert "works in a way that the Wan nodes do not know" in said[0]


CASES = (
    listed_once_and_truthfully,
    gives_way_part_by_part,
    gives_way_wholly,
    native_models_are_asked_to_leave,
    an_unknown_manager_is_reported_once,
)


def with_an_engine(case: Callable[[Engine], None]) -> Callable[[], None]:
    @wraps(case)
    def run() -> None:
        management.current_loaded_models.clear()
        for name, function in REAL.items():
            setattr(management, name, function)
        engine = Engine()

        def free_bytes(device: torch.device | None = None, torch_free_too: bool = False) -> int | tuple[int, int]:
            free = 1000 - engine.bytes_on(device)
            return (free, 0) if torch_free_too else free

        management.get_free_memory = free_bytes
        case(engine)

    return run


if __name__ == "__main__":
    report(map(with_an_engine, CASES))
