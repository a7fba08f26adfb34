"""Where ``generate`` takes its weights from: a folder, single files, both; and plans of models that are nowhere yet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench.sparse import shapes_of, write_sparse
from wan_core.__main__ import main
from wan_core.config import VARIANTS
from wan_core.layouts.variants import candidates
from wan_core.loading.published import TEXT_CONFIG, VAE_CONFIGS, architecture_of, published_dit
from wan_core.loading.vae import VAE_CLASSES
from wan_core.memory.plan import weights_of
from wan_core.models.dit.dit import WanDiT
from wan_core.models.text.umt5 import Umt5Encoder
from wan_core.tools.tiny import TinySizes, write_tiny

SIZES = TinySizes(dim=128, ffn_dim=128, layers=1, text_dim=64, text_layers=1)
TASKS = ("t2v-A14B", "ti2v-5B", "i2v-14B")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {task: tmp_path_factory.mktemp(task) for task in TASKS}
    for task, folder in made.items():
        write_tiny(folder, task, layout="comfyui", sizes=SIZES)
    return made


def files_of(folder: Path, task: str) -> list[object]:
    """The options that name each file of a folder."""
    models = sorted((folder / "diffusion_models").iterdir())  # high before low
    found = ["--dit", *models]
    for flag, part in (("--vae", "vae"), ("--text_encoder", "text_encoders"), ("--clip", "clip_vision")):
        if (folder / part).is_dir():
            found += [flag, next((folder / part).iterdir())]
    return found


def run(task: str, tmp_path: Path, *flags: object) -> tuple[int, torch.Tensor | None]:
    tensors = tmp_path / "out.safetensors"
    tensors.unlink(missing_ok=True)
    fixed = ["--task", task, "--size", "64*32" if task == "ti2v-5B" else "64*64", "--frame_num", 5, "--base_seed", 3,
             "--sample_steps", 2, "--prompt", "a cat", "--save_file", tmp_path / "out.mp4",
             "--save_tensors", tensors]  # fmt: skip
    if VARIANTS[task].image == "channels":
        Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "start.png")
        fixed += ["--image", tmp_path / "start.png"]
    code = main(["generate", *map(str, [*fixed, *flags])])
    return code, load_file(tensors)["latent"] if tensors.exists() else None


@pytest.mark.parametrize("task", TASKS)
def test_single_files_are_the_folder(folders, tmp_path: Path, task: str) -> None:
    code, expected = run(task, tmp_path, "--ckpt_dir", folders[task])
    assert code == 0
    code, found = run(task, tmp_path, *files_of(folders[task], task))
    assert code == 0 and torch.equal(found, expected)


def test_a_file_in_place_of_the_folders(folders, tmp_path: Path) -> None:
    """Another model in it, under another name and in another place; everything else is the folder's."""
    write_tiny(tmp_path / "other", "ti2v-5B", layout="comfyui", sizes=SIZES, seed=5)
    (other,) = (tmp_path / "other/diffusion_models").iterdir()
    _, plain = run("ti2v-5B", tmp_path, "--ckpt_dir", folders["ti2v-5B"])
    code, mixed = run("ti2v-5B", tmp_path, "--ckpt_dir", folders["ti2v-5B"], "--dit", other)
    own = files_of(folders["ti2v-5B"], "ti2v-5B")
    _, expected = run("ti2v-5B", tmp_path, "--dit", other, *own[own.index("--vae") :])
    assert code == 0 and torch.equal(mixed, expected) and not torch.equal(mixed, plain)


def test_what_is_missing_or_does_not_fit_is_said(folders, tmp_path: Path, capfd) -> None:
    t2v, ti2v = (files_of(folders[task], task) for task in ("t2v-A14B", "ti2v-5B"))
    high, low = t2v[1:3]
    cases = [
        ("t2v-A14B", [], "Where are the weights? Give --ckpt_dir, or all of --dit, --vae and --text_encoder."),
        ("i2v-14B", ["--dit", high], "--text_encoder and --clip."),
        ("t2v-A14B", ["--dit", high, low], "Where are the weights?"),
        ("t2v-A14B", ["--dit", high, *t2v[3:]], "names 1 files, but Wan2.2 T2V-A14B has two files, --dit HIGH LOW"),
        ("ti2v-5B", ["--dit", high, low, *ti2v[2:]], "names 2 files, but Wan2.2 TI2V-5B has one file"),
        ("t2v-A14B", ["--dit", low, high, *t2v[3:]], "The experts seem to be swapped"),
        ("ti2v-5B", [*ti2v, "--vae", t2v[4]], "is a wan2.1 VAE, but Wan2.2 TI2V-5B needs wan2.2"),
        ("ti2v-5B", [*ti2v, "--vae", tmp_path / "none"], "No such file"),
    ]
    for task, flags, reason in cases:
        assert run(task, tmp_path, *flags) == (2, None), flags
        assert reason in capfd.readouterr().err


def test_what_is_read_is_not_written_to(folders, tmp_path: Path, capfd) -> None:
    own = files_of(folders["ti2v-5B"], "ti2v-5B")
    before = own[1].read_bytes()
    assert run("ti2v-5B", tmp_path, *own, "--save_tensors", own[1], "--overwrite")[0] == 2
    assert "is what this run reads" in capfd.readouterr().err and own[1].read_bytes() == before


def test_a_kept_latent_is_decoded_with_the_file_that_was_named(folders, tmp_path: Path, capfd, monkeypatch) -> None:
    from wan_core.media import video

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "save_video", full)
    own = files_of(folders["ti2v-5B"], "ti2v-5B")
    assert run("ti2v-5B", tmp_path, *own)[0] == 2
    assert f"--vae {own[3]} --save_file" in capfd.readouterr().err


# --- plans without a checkpoint


def plan(capfd, *flags: object) -> list[str]:
    assert main(["generate", "--plan", *map(str, flags)]) == 0
    return capfd.readouterr().out.splitlines()


@pytest.mark.parametrize("task", VARIANTS)
def test_every_model_is_planned_from_its_name(task: str, capfd) -> None:
    """Also those that will need a picture."""
    first, *lines = plan(capfd, "--task", task)
    width, height = VARIANTS[task].size
    assert VARIANTS[task].display_name in first and f"{width}x{height}, {VARIANTS[task].frames} frames" in first
    assert [line.partition(":")[0] for line in lines if ":" in line] == ["Text encoder", "Sampling", "VAE decode"]


@pytest.mark.parametrize("task", VARIANTS)
def test_published_dimensions_are_recognised_as_the_model(task: str) -> None:
    assert VARIANTS[task] in candidates(architecture_of(VARIANTS[task]))


def test_published_models_are_as_large_as_published() -> None:
    """In bfloat16: A14B 28.6 GB each, I2V-14B 32.8 (16.4 billion), 5B 10.0, 1.3B 2.84."""
    sizes = {"t2v-A14B": 28.58e9, "i2v-14B": 32.8e9, "ti2v-5B": 10.0e9, "t2v-1.3B": 2.84e9}
    for task, size in sizes.items():
        found = weights_of(published_dit(VARIANTS[task], "high"), "bfloat16", "cuda:0").total
        assert found == pytest.approx(size, rel=0.01), task


@pytest.mark.parametrize("task", ["t2v-1.3B", "ti2v-5B"])
def test_a_plan_is_that_of_files_of_the_published_shapes(
    task: str, tmp_path: Path, umt5_tokenizer: Path, capfd
) -> None:
    """Real headers over holes, read as any file is."""
    variant = VARIANTS[task]
    config, vae = architecture_of(variant), VAE_CONFIGS[variant.vae]
    dit, text = shapes_of(lambda: WanDiT(config)), shapes_of(lambda: Umt5Encoder(TEXT_CONFIG))
    decoder = shapes_of(lambda: VAE_CLASSES[vae.kind](vae))
    files = [
        "--dit", write_sparse(tmp_path / "dit.safetensors", dit),
        "--vae", write_sparse(tmp_path / "vae.safetensors", decoder, torch.float32),
        "--text_encoder", write_sparse(tmp_path / "text.safetensors", text), "--tokenizer", umt5_tokenizer,
    ]  # fmt: skip
    options = ["--task", task, "--vram_limit", 4, "--size", "832*480" if task == "t2v-1.3B" else "1280*704"]
    first, *found = plan(capfd, *options)
    named, *expected = plan(capfd, *options, *files)
    assert found == expected and "as_published" in first and "dit.safetensors" in named
    one, *rest = plan(capfd, *options, *files[:2])  # a file of one's own beside published parts
    assert rest == expected and "dit.safetensors" in one


def test_a_run_needs_weights(capfd) -> None:
    assert main(["generate", "--task", "ti2v-5B", "--prompt", "a cat"]) == 2
    assert "Where are the weights?" in capfd.readouterr().err


def test_pictures_may_be_missing_from_a_plan_only() -> None:
    from wan_core.errors import WanError
    from wan_core.pipeline import Request

    variant = VARIANTS["i2v-A14B"]
    assert Request("a").completed(variant, planned=True).size == variant.size
    with pytest.raises(WanError, match="animates an image"):
        Request("a").completed(variant)
    with pytest.raises(WanError):  # what is given is checked
        replace(Request("a"), image=Path("nowhere.png")).completed(variant, planned=True)
