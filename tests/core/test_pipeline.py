"""Whole runs against diffusers' pipelines on one small checkpoint, float32, the same noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import Tensor

from wan_core.config import VARIANTS, PerExpert
from wan_core.errors import WanError
from wan_core.media import geometry as latents
from wan_core.memory.engine import Engine
from wan_core.pipeline import Request, generate, read_models
from wan_core.tools.tiny import LAYOUTS, TinySizes, write_tiny

TOLERANCE = 1e-3  # relative, in the norm
SIZES = TinySizes(dim=256, ffn_dim=256, layers=2, text_dim=64)
CPU = torch.device("cpu")
PROMPT, NEGATIVE = "a cat on a surfboard, 暖色调", "blurred"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    made: dict[tuple[str, str], Path] = {}

    def get(task: str, layout: str = "diffusers") -> Path:
        if (task, layout) not in made:
            made[task, layout] = tmp_path_factory.mktemp(f"{task}-{layout}")
            write_tiny(made[task, layout], task, layout=layout, sizes=SIZES)
        return made[task, layout]

    return get


def reference(pipeline: type, folder: Path, shift: float, **kwargs):
    made = pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    made.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    made.set_progress_bar_config(disable=True)
    return made(prompt=PROMPT, negative_prompt=NEGATIVE, output_type="latent", **kwargs).frames.detach()


def picture(width: int, height: int) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((255 * np.stack([across, down, 0.5 + 0.5 * np.sin(9 * across * down)], -1)).astype(np.uint8))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def run(folder: Path, task: str, request: Request, engine: Engine | None = None):
    return generate(read_models(folder, task), request, engine or Engine(), device=CPU)


def request(**changes) -> Request:
    settings = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "size": (96, 64), "frames": 9, "steps": 8, "seed": 7}
    return Request(**({"schedule": "diffusers"} | settings | changes))


def shape_of(latent: Tensor) -> dict:
    """The reference's arguments for a run of this shape, from the same noise."""
    noise = latents.noise(7, latent.shape)[None]
    return {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 8, "latents": noise}


def test_t2v_with_two_experts_agrees_with_diffusers(folder):
    ours = run(folder("t2v-A14B"), "t2v-A14B", request(guidance=PerExpert(low=3.0, high=4.0))).latent
    theirs = reference(
        WanPipeline, folder("t2v-A14B"), 12.0, guidance_scale=4.0, guidance_scale_2=3.0, **shape_of(ours)
    )
    assert relative(ours, theirs[0]) < TOLERANCE


def test_i2v_with_two_experts_agrees_with_diffusers(folder, tmp_path: Path):
    picture(96, 64).save(tmp_path / "start.png")
    ours = run(folder("i2v-A14B"), "i2v-A14B", request(image=tmp_path / "start.png")).latent
    theirs = reference(
        WanImageToVideoPipeline,
        folder("i2v-A14B"),
        5.0,
        image=picture(96, 64),
        guidance_scale=3.5,
        guidance_scale_2=3.5,
        **shape_of(ours),
    )
    assert relative(ours, theirs[0]) < TOLERANCE


def test_ti2v_without_an_image_agrees_with_diffusers(folder):
    ours = run(folder("ti2v-5B"), "ti2v-5B", request()).latent
    theirs = reference(WanPipeline, folder("ti2v-5B"), 5.0, guidance_scale=5.0, **shape_of(ours))
    assert relative(ours, theirs[0]) < TOLERANCE


def test_ti2v_with_an_image_agrees_with_diffusers(folder, tmp_path: Path):
    picture(96, 64).save(tmp_path / "start.png")
    ours = run(folder("ti2v-5B"), "ti2v-5B", request(image=tmp_path / "start.png")).latent
    theirs = reference(
        WanImageToVideoPipeline, folder("ti2v-5B"), 5.0, image=picture(96, 64), guidance_scale=5.0, **shape_of(ours)
    )
    assert relative(ours, theirs[0]) < TOLERANCE


def test_layouts_give_the_same_video_to_the_last_bit(folder):
    folders = [folder("t2v-A14B", layout) for layout in LAYOUTS]
    runs = [run(path, "t2v-A14B", request(steps=3)) for path in folders]
    assert all(torch.equal(runs[0].latent, other.latent) for other in runs[1:])
    videos = [torch.cat(list(one.video()), dim=1) for one in runs]
    assert videos[0].shape == (3, 9, 64, 96) and all(torch.equal(videos[0], other) for other in videos[1:])


def test_a_second_run_loads_nothing_and_a_release_gives_everything_back(folder):
    engine = Engine()
    first = run(folder("t2v-A14B"), "t2v-A14B", request(steps=3), engine)
    list(first.video())
    assert engine.loads == 4  # text encoder, two experts, VAE
    second = run(folder("t2v-A14B"), "t2v-A14B", request(steps=3), engine)
    list(second.video())
    assert engine.loads == 4 and torch.equal(first.latent, second.latent)
    assert engine.bytes_on("cpu") > 0
    engine.release()
    assert engine.bytes_on("cpu") == 0
    maps = Path("/proc/self/maps").read_text()
    assert str(folder("t2v-A14B")) not in maps


@pytest.mark.parametrize("blocks", [1, 2])
def test_block_swap_changes_nothing(folder, blocks: int):
    from dataclasses import replace

    models = read_models(folder("t2v-A14B"), "t2v-A14B")
    swapped = replace(models, dit=replace(models.dit, swap_blocks=blocks))
    resident = generate(models, request(steps=3), Engine(), device=CPU).latent
    engine = Engine()
    assert torch.equal(generate(swapped, request(steps=3), engine, device=CPU).latent, resident)
    assert engine.bytes_on("cpu") > 0


def test_vae_tiles_leave_the_latent_and_nearly_the_video_as_they_are(folder, tmp_path: Path):
    """The video differs where tiles meet: on average by less than a twentieth of its own deviation."""
    picture(192, 64).save(tmp_path / "image.png")
    for task, image in (("t2v-A14B", None), ("i2v-A14B", tmp_path / "image.png")):
        asked = request(size=(192, 64), frames=5, steps=2, image=image)
        whole, tiled = (run(folder(task), task, replace(asked, vae_tile=side)) for side in (None, 128))
        if image is None:
            assert torch.equal(tiled.latent, whole.latent)
        videos = [torch.cat(list(result.video()), dim=1) for result in (whole, tiled)]
        assert videos[0].shape == videos[1].shape and not torch.equal(*videos)
        assert (videos[0] - videos[1]).abs().mean() < 0.05 * videos[0].std()


def test_the_size_of_an_image_run_follows_the_image(folder, tmp_path: Path):
    for width, height, expected in ((160, 80, (4, 8)), (80, 200, (8, 2))):
        picture(width, height).save(tmp_path / "start.png")
        wanted = request(image=tmp_path / "start.png", size=(64, 32), steps=1, frames=1)
        made = run(folder("i2v-A14B"), "i2v-A14B", wanted)
        assert made.latent.shape[2:] == expected, made.latent.shape


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("t2v-A14B", {"frames": 10}, "4n ?\\+ ?1|9 and 13"),
        ("t2v-A14B", {"size": (100, 64)}, "16"),
        ("ti2v-5B", {"size": (96, 80)}, "32"),
        ("t2v-A14B", {"solver": "euler a"}, "Unknown solver|euler"),
        ("t2v-A14B", {"schedule": "karras"}, "schedule"),
        ("t2v-A14B", {"steps": 0}, "step"),
        ("t2v-A14B", {"shift": 0.0}, "shift"),
        ("i2v-A14B", {}, "animates an image. Give a start image"),
        ("t2v-A14B", {"image": Path("x.png")}, "takes no image"),
        ("i2v-A14B", {"image": Path("x.png")}, "No such image"),
    ],
)
def test_mistakes_are_found_before_any_weight_is_read(folder, task: str, changes: dict, message: str):
    engine = Engine()
    with pytest.raises(WanError, match=message):
        run(folder(task), task, request(**changes), engine)
    assert engine.loads == 0


def test_another_variants_folder_is_refused(folder, tmp_path: Path):
    with pytest.raises(WanError, match="is not Wan2.2 T2V-A14B: by its layers it is Wan2.2 I2V-A14B"):
        read_models(folder("i2v-A14B", "official"), "t2v-A14B")
    with pytest.raises(WanError, match="lacks transformer_2|lacks .*low_noise"):
        read_models(folder("ti2v-5B"), "t2v-A14B")
    with pytest.raises(WanError, match="No such folder"):
        read_models(tmp_path / "nowhere", "t2v-A14B")


def test_the_wrong_vae_is_refused(folder, tmp_path: Path):
    import shutil

    mixed = tmp_path / "mixed"
    shutil.copytree(folder("ti2v-5B"), mixed)
    shutil.rmtree(mixed / "vae")
    shutil.copytree(folder("t2v-A14B") / "vae", mixed / "vae")
    with pytest.raises(WanError, match="wan2.1 VAE, but Wan2.2 TI2V-5B needs wan2.2 .Wan2.2_VAE.pth"):
        read_models(mixed, "ti2v-5B")


def test_the_official_negative_prompt_is_the_default():
    assert Request("x").completed(VARIANTS["t2v-A14B"]).negative_prompt.startswith("色调艳丽")
