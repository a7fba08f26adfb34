"""The engine in ComfyUI's list of loaded models, against ComfyUI's own memory manager."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def outcomes(comfyui_path: Path) -> dict[str, str]:
    """Case -> traceback. All run in one process, because ComfyUI and this pack both have a module named nodes."""
    script = ROOT / "tests/comfy/memory_cases.py"
    done = subprocess.run(
        [sys.executable, script, ROOT / "nodes/memory.py", "--cpu"], cwd=comfyui_path,
        env=dict(os.environ, PYTHONPATH=str(comfyui_path)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "case",
    [
        "listed_once_and_truthfully", "gives_way_part_by_part", "gives_way_wholly",
        "native_models_are_asked_to_leave", "an_unknown_manager_is_reported_once",
    ],
)  # fmt: skip
def test_memory_manager(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == "", outcomes[case]
