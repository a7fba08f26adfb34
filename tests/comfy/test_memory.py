"""The engine in ComfyUI's list of loaded models, against ComfyUI's own memory manager."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.comfy import cases

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def outcomes(comfyui_path: Path) -> dict[str, str]:
    """Case -> traceback."""
    return cases.outcomes("memory_cases.py", comfyui_path, ROOT / "nodes/memory.py")


@pytest.mark.parametrize(
    "case",
    [
        "listed_once_and_truthfully",
        "gives_way_part_by_part",
        "gives_way_wholly",
        "native_models_are_asked_to_leave",
        "an_unknown_manager_is_reported_once",
    ],
)
def test_memory_manager(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == "", outcomes[case]
