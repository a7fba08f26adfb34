"""What every node promises, tried within ComfyUI's own Python but without a server. See node_cases.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.comfy import cases


@pytest.fixture(scope="module")
def outcomes(comfyui_path: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Case -> traceback."""
    folder = tmp_path_factory.mktemp("alone")
    for part in models.iterdir():
        (folder / part.name).symlink_to(part)
    clips = folder / "input/clips"
    clips.mkdir(parents=True)
    (clips / "metadata.csv").write_text("video,prompt\na.mp4,a cat\n")
    return cases.outcomes("node_cases.py", comfyui_path, folder)


@pytest.mark.parametrize(
    "case",
    [
        "no_hostile_value_is_queued",
        "nor_comes_it_through_a_link",
        "every_number_has_a_range",
        "nothing_but_readable_errors_leaves_a_node",
        "cancel_and_ctrl_c_pass",
        "every_node_is_guarded",
        "a_panic_in_the_tokenizer_is_an_error",
        "no_key_passes_silently",
        "comfyuis_samplers_are_told_too",
        "what_patches_ask_for_is_refused_or_said",
        "the_model_is_no_circle",
        "faults_of_our_own_are_no_unknown_version",
        "an_unknown_comfyui_is_named",
        "evictable_memory_counts_as_free",
        "sizes_that_no_machine_holds_are_refused",
        "encoding_can_be_cancelled_within_a_chunk",
        "pictures_of_every_kind",
        "whole_numbers_encode_like_fractions",
        "devices_can_be_chosen",
        "attention_follows_comfyuis_options",
        "an_empty_latent_in_the_middle_is_said",
        "one_sided_loras_are_refused_at_cfg_1",
    ],
)
def test_nodes_alone(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == "", outcomes[case]
