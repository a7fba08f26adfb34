"""What Wan as ComfyUI MODEL tells ComfyUI and its nodes, and how it keeps a memory limit. See native_cases.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.comfy import cases
from wan_core.tools.tiny import write_tiny


@pytest.fixture(scope="module")
def outcomes(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Case -> traceback."""
    folder = tmp_path_factory.mktemp("pair")
    write_tiny(folder, "t2v-A14B", layout="comfyui")
    return cases.outcomes("native_cases.py", comfyui_path, folder / "diffusion_models")


@pytest.mark.parametrize(
    "case",
    [
        "a_memory_limit_is_kept_for_one_prompt_at_a_time",
        "room_is_asked_for_the_weights_until_they_are_there",
        "with_a_memory_limit_the_plan_makes_room",
        "what_other_nodes_reach_for_in_vain_is_told",
    ],
)
def test_native_model(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == "", outcomes[case]
