"""The command line against the official code.

``data/official.safetensors`` holds the latents that the official Wan2.2 pipelines (``wan/text2video.py``,
``image2video.py``, ``textimage2video.py``; float32 on a CPU, attention by scaled_dot_product_attention, the noise of
seed 1 and the prompt "a cat") gave for the small random checkpoints that the fixture below writes;
``data/official_wan21.safetensors`` those of the official Wan2.1 pipelines (``wan/first_last_frame2video.py`` too).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from wan_core.__main__ import main
from wan_core.tools.tiny import TinySizes, write_tiny

TOLERANCE = 1e-4  # relative, in the norm; 1e-6 was measured
SIZES = TinySizes(dim=128, ffn_dim=256, layers=2, text_dim=4096, text_layers=2)

RUNS = {
    "t2v_unipc": ("t2v-A14B", "48*32", 9, "unipc", None),
    "t2v_dpm": ("t2v-A14B", "48*32", 9, "dpm++", None),
    "i2v_wide": ("i2v-A14B", "48*32", 9, "unipc", (160, 100)),
    "i2v_tall": ("i2v-A14B", "48*32", 5, "unipc", (70, 120)),
    "ti2v_text": ("ti2v-5B", "64*32", 9, "unipc", None),
    "ti2v_image": ("ti2v-5B", "64*64", 9, "unipc", (160, 100)),
    "21_t2v_unipc": ("t2v-1.3B", "48*32", 9, "unipc", None),
    "21_t2v_dpm": ("t2v-14B", "48*32", 5, "dpm++", None),
    "21_t2i": ("t2i-14B", "48*48", 1, "unipc", None),
    "21_i2v_wide": ("i2v-14B", "48*32", 9, "unipc", (160, 100)),
    "21_i2v_tall": ("i2v-14B", "48*32", 5, "dpm++", (70, 120)),
    "21_flf2v": ("flf2v-14B", "48*32", 81, "unipc", (160, 100)),
}


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    data = Path(__file__).parent / "data"
    return load_file(data / "official.safetensors") | load_file(data / "official_wan21.safetensors")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def get(task: str) -> Path:
        if task not in made:
            made[task] = tmp_path_factory.mktemp(task)
            write_tiny(made[task], task, layout="official", seed=0, sizes=SIZES)
        return made[task]

    return get


def picture(width: int, height: int) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((255 * np.stack([across, down, 0.5 + 0.5 * np.sin(9 * across * down)], -1)).astype(np.uint8))


@pytest.mark.parametrize("name", RUNS)
def test_same_latent_and_video(official, checkpoint, tmp_path: Path, name: str):
    task, size, frames, solver, image = RUNS[name]
    tensors = tmp_path / "out.safetensors"
    arguments = [
        "--task",
        task,
        "--ckpt_dir",
        checkpoint(task),
        "--size",
        size,
        "--frame_num",
        frames,
        "--prompt",
        "a cat",
        "--base_seed",
        1,
        "--sample_steps",
        6,
        "--sample_solver",
        solver,
        "--save_file",
        tmp_path / "out.mp4",
        "--save_tensors",
        tensors,
    ]
    if image:
        picture(*image).save(tmp_path / "image.png")
        arguments += ["--first_frame" if task.startswith("flf2v") else "--image", tmp_path / "image.png"]
    if task.startswith("flf2v"):
        picture(*image).rotate(180).save(tmp_path / "last.png")
        arguments += ["--last_frame", tmp_path / "last.png"]
    assert main(["generate", *map(str, arguments)]) == 0
    ours = load_file(tensors)
    for part in ("latent", "video"):
        theirs = official[f"{name}.{part}"].float()
        shown = ours[part] if part == "latent" else ours[part][:, ::4, ::4, ::4]  # a sample of the pixels is kept
        assert shown.shape == theirs.shape
        assert (shown - theirs).norm() < TOLERANCE * theirs.norm()
