"""The command line: files come out right, mistakes are one line and exit code 2."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save_file

from wan_core.__main__ import main
from wan_core.cli import arguments
from wan_core.media.video import made_here, save_video
from wan_core.memory.engine import Engine
from wan_core.models.vae.vae import denormalise
from wan_core.tools.tiny import TinySizes, write_tiny

ROOT = Path(__file__).parents[2]
SIZES = TinySizes(dim=128, ffn_dim=128, layers=1, text_dim=64, text_layers=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ti2v")
    write_tiny(folder, "ti2v-5B", sizes=SIZES)
    return folder


def generate(*arguments: object) -> int:
    fixed = ["--task", "ti2v-5B", "--size", "64*32", "--frame_num", "5", "--sample_steps", "2", "--prompt", "a cat"]
    return main(["generate", *fixed, *map(str, arguments)])


def test_video_and_tensors(checkpoint: Path, tmp_path: Path):
    out, tensors = tmp_path / "out.mp4", tmp_path / "out.safetensors"
    assert generate("--ckpt_dir", checkpoint, "--base_seed", 3, "--save_file", out, "--save_tensors", tensors) == 0
    saved = load_file(tensors)
    assert saved["latent"].shape == (48, 2, 2, 4) and saved["latent"].dtype == torch.float32
    assert saved["video"].shape == (3, 5, 32, 64) and saved["video"].abs().max() <= 1
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 32, 24)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 5
    shown = torch.tensor(frames[2]).float() / 127.5 - 1
    assert (shown - saved["video"][:, 2].permute(1, 2, 0)).abs().mean() < 0.25  # lossy, and chroma at half size


def test_guidance_rules(checkpoint: Path, tmp_path: Path, caplog, capsys):
    """They change the latent; what they cost is said before, and what cannot be is one line."""
    caplog.set_level(logging.INFO)
    drawn = {}
    for name, rules in {
        "plain": [],
        "merged": ["--cfg_merge"],
        "two": ["--guidance", "apg:eta=0.5:momentum=-0.5", "--guidance", "interval:sigma_end=0.9"],
    }.items():
        file = tmp_path / f"{name}.safetensors"
        out = ["--save_file", tmp_path / f"{name}.mp4", "--save_tensors", file]
        assert generate("--ckpt_dir", checkpoint, "--base_seed", 3, *out, *rules) == 0
        drawn[name] = load_file(file)["latent"]
    assert (drawn["two"] - drawn["plain"]).abs().max() > 1e-4
    torch.testing.assert_close(drawn["merged"], drawn["plain"], rtol=0.05, atol=0.05)  # bfloat16
    assert "interval (sigma_start 1, sigma_end 0.9), apg" in caplog.text
    assert "3 calls of the model in 2 steps instead of 4" in caplog.text
    capsys.readouterr()
    for rules, said in (
        (["--cfg_merge", "--guidance", "nag"], "Choose one of cfg_merge and nag"),
        (["--guidance", "slg:blocks=4"], "slg leaves out the blocks 4, but the model has 1"),
        (["--guidance", "apg", "--sample_guide_scale", "1"], "The guidance is 1"),
        (["--guidance", "interval:sigma_end=2"], "sigma_end is 2: expected 0 to 1"),
    ):
        assert generate("--ckpt_dir", checkpoint, "--save_file", tmp_path / "no.mp4", *rules) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not (tmp_path / "no.mp4").exists()


def test_a_seed_means_the_same_video(checkpoint: Path, tmp_path: Path):
    latents = []
    for seed in (3, 3, 4):
        file = tmp_path / f"{len(latents)}.safetensors"
        common = ("--ckpt_dir", checkpoint, "--save_file", tmp_path / "x.mp4", "--save_tensors", file)
        assert generate(*common, "--base_seed", seed) == 0
        latents.append(load_file(file)["latent"])
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])


def test_offloading_and_the_official_flags_change_nothing(checkpoint: Path, tmp_path: Path):
    plain, flagged = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    common = ("--ckpt_dir", checkpoint, "--base_seed", 3, "--save_file", tmp_path / "x.mp4")
    assert generate(*common, "--save_tensors", plain) == 0
    assert (
        generate(
            *common,
            "--save_tensors",
            flagged,
            "--offload_model",
            "True",
            "--convert_model_dtype",
            "--t5_cpu",
            "--ulysses_size",
            1,
        )
        == 0
    )
    assert torch.equal(load_file(plain)["video"], load_file(flagged)["video"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frame_num", "6"], "5 and 9"),
        (["--size", "70*32"], "multiple"),
        (["--sample_solver", "ddim"], "Unknown solver"),
        (["--device", "quantum"], "not available"),
        (["--dtype", "float12"], "Unknown dtype"),
        (["--attention", "magic"], "Unknown attention"),
        (["--image", "missing.png"], "No such image"),
        (["--save_file", "no/such/folder/x.mp4"], "there is no folder"),
        (["--ulysses_size", "8"], "not supported"),
    ],
)
def test_mistakes_are_one_line(checkpoint: Path, capsys, monkeypatch, tmp_path: Path, arguments, message: str):
    monkeypatch.chdir(tmp_path)
    assert generate("--ckpt_dir", checkpoint, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("Error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_found_first(checkpoint: Path, capsys, monkeypatch, tmp_path: Path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1024))
    assert generate("--ckpt_dir", checkpoint, "--save_file", tmp_path / "x.mp4") == 2
    assert "0 MB free" in capsys.readouterr().err


def test_a_missing_tokenizer_is_found_first(checkpoint: Path, capsys, tmp_path: Path):
    without = tmp_path / "without"
    shutil.copytree(checkpoint, without)
    shutil.rmtree(without / "google")
    assert generate("--ckpt_dir", without, "--save_file", tmp_path / "x.mp4") == 2
    assert "tokenizer" in capsys.readouterr().err


def test_a_text_encoder_of_another_width_is_found_first(checkpoint: Path, capsys, tmp_path: Path):
    write_tiny(tmp_path / "other", "ti2v-5B", sizes=replace(SIZES, text_dim=128))
    mixed = tmp_path / "mixed"
    shutil.copytree(checkpoint, mixed)
    shutil.copy(tmp_path / "other" / "models_t5_umt5-xxl-enc-bf16.pth", mixed)
    assert generate("--ckpt_dir", mixed, "--save_file", tmp_path / "x.mp4") == 2
    assert "embeddings 128 wide" in capsys.readouterr().err


def test_make_tiny_says_what_it_wrote(capsys, tmp_path: Path):
    assert main(["make-tiny", str(tmp_path), "--task", "i2v-A14B", "--layout", "official", "--seed", "5"]) == 0
    assert "i2v-A14B" in capsys.readouterr().out
    config = json.loads((tmp_path / "high_noise_model" / "config.json").read_text())
    assert config["in_dim"] == 36 and (tmp_path / "google/umt5-xxl/spiece.model").is_file()


# --- files: formats, what is in the way, what is kept


def frames_of(file: Path) -> list[np.ndarray]:
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("ending", [".mp4", ".MP4", ".mkv", ".mov", ".webm", ".gif", ".webp", ".png", ".jpg", ".jpeg"])
def test_the_ending_is_honoured(tmp_path: Path, ending: str):
    """Chunks of unequal length, as the VAE gives them: 1, 4 and 4 frames; each frame a grey of its own."""
    greys = torch.linspace(-0.8, 0.8, 9)
    video = greys[None, :, None, None].expand(3, 9, 32, 64)
    written = save_video(video.split([1, 4, 4], dim=1), tmp_path / f"out{ending}", 16)
    assert sorted(tmp_path.iterdir()) == sorted(written) and all(made_here(file) for file in written)
    if ending in (".gif", ".webp"):
        with Image.open(written[0]) as picture:
            shown = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
            assert picture.format == ending[1:].upper()
    elif ending in (".png", ".jpg", ".jpeg"):
        assert [file.name for file in written] == [f"out_{i:04d}{ending}" for i in range(1, 10)]
        shown = [np.asarray(Image.open(file).convert("RGB")) for file in written]
    else:
        shown = frames_of(written[0])
    expected = ((greys + 1) * 127.5).numpy()
    assert len(shown) == 9 and all(frame.shape == (32, 64, 3) for frame in shown)
    assert np.abs([frame.mean() for frame in shown] - expected).max() < 4  # lossy, and a limited range


def test_durations_of_animations_add_up(tmp_path: Path):
    """A sixteenth of a second is no whole number of hundredths: 48 frames last 3 seconds all the same."""
    video = torch.rand(3, 48, 8, 8) * 2 - 1
    for ending in (".gif", ".webp"):
        file = save_video([video], tmp_path / f"x{ending}", 16)[0]
        with Image.open(file) as picture:
            times = [frame.info["duration"] for frame in ImageSequence.Iterator(picture) if frame.load() or True]
        assert len(times) == 48 and sum(times) == 3000


@pytest.mark.parametrize(
    ("ending", "size"),
    [(".mp4", (34, 48)), (".mkv", (34, 48)), (".webm", (33, 47)), (".gif", (33, 47)), (".png", (33, 47))],
)
def test_odd_sides(tmp_path: Path, ending: str, size: tuple[int, int]):
    """H.264 repeats the last row and column; the other formats hold odd sides."""
    written = save_video(torch.zeros(3, 5, 33, 47).split([1, 4], dim=1), tmp_path / f"x{ending}", 16)
    assert frames_of(written[0])[0].shape[:2] == size


def test_one_frame_as_a_picture(checkpoint: Path, tmp_path: Path):
    assert generate("--ckpt_dir", checkpoint, "--frame_num", 1, "--save_file", tmp_path / "out.png") == 0
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]
    assert Image.open(tmp_path / "out.png").size == (64, 32)


def test_a_shorter_sequence_leaves_no_frame_of_a_longer_one(tmp_path: Path):
    mine = tmp_path / "x_0007.png"
    for frames in (9, 5):
        save_video([torch.zeros(3, frames, 8, 8)], tmp_path / "x.png", 16)
        if frames == 9:
            Image.new("RGB", (4, 4)).save(mine)  # a user's, in its place since
    assert {file.name for file in tmp_path.iterdir()} == {*(f"x_{i:04d}.png" for i in range(1, 6)), "x_0007.png"}


@pytest.mark.parametrize(
    ("name", "flag"),
    [("x.mp4", "--save_file"), ("x.gif", "--save_file"), ("x.png", "--save_file"), ("x.safetensors", "--save_tensors")],
)
def test_foreign_files_are_not_replaced(checkpoint: Path, tmp_path: Path, capsys, name: str, flag: str):
    mine, other = tmp_path / name, tmp_path / "other.mp4"
    if name == "x.png":
        mine = tmp_path / "x_0003.png"
    mine.write_bytes(b"holidays")
    options = ("--ckpt_dir", checkpoint, *(() if flag == "--save_file" else ("--save_file", other)))
    assert generate(*options, flag, tmp_path / name) == 2
    assert "--overwrite" in capsys.readouterr().err and mine.read_bytes() == b"holidays"
    assert list(tmp_path.iterdir()) == [mine]
    assert generate(*options, flag, tmp_path / name, "--overwrite") == 0
    assert mine.read_bytes() != b"holidays"
    assert generate(*options, flag, tmp_path / name) == 0  # now it is ours


def test_what_a_run_reads_is_never_replaced(checkpoint: Path, tmp_path: Path, capsys):
    Image.new("RGB", (64, 32), "red").save(tmp_path / "cat.png")
    before = (tmp_path / "cat.png").read_bytes()
    assert (
        generate(
            "--ckpt_dir",
            checkpoint,
            "--image",
            tmp_path / "cat.png",
            "--save_file",
            tmp_path / "cat.png",
            "--frame_num",
            1,
            "--overwrite",
        )
        == 2
    )
    assert "what this run reads" in capsys.readouterr().err and (tmp_path / "cat.png").read_bytes() == before


@pytest.mark.parametrize("failure", ["encoder", "decoder", "cancel", "disk"])
def test_a_late_failure_keeps_the_latent(checkpoint: Path, tmp_path: Path, capsys, monkeypatch, failure: str):
    """However the end fails, the message's own command makes the video that the run would have made."""
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.mp4"
    common = ("--ckpt_dir", checkpoint, "--base_seed", 5)
    assert generate(*common, "--save_file", tmp_path / "whole.mp4", "--save_tensors", whole) == 0
    capsys.readouterr()

    def fails(*_: object, **__: object) -> None:
        raise {"cancel": KeyboardInterrupt, "disk": OSError(errno.ENOSPC, "No space left on device")}.get(
            failure, RuntimeError("Cannot change height after codec is open")
        )

    with monkeypatch.context() as patch:
        broken = "pipeline.Engine.vae" if failure == "decoder" else "media.video._FrameWriter.write"
        patch.setattr(f"wan_core.{broken}", fails)
        assert generate(*common, "--save_file", out) == (130 if failure == "cancel" else 2)
    said = capsys.readouterr()
    kept = tmp_path / "out.latent.safetensors"
    assert f"Latent: {kept}" in said.out and "Traceback" not in said.err
    assert {file.name for file in tmp_path.iterdir()} == {"whole.mp4", "whole.safetensors", kept.name}
    command = shlex.split(said.err[said.err.index("python -m wan_core decode") :].partition("  (")[0])[3:]
    assert main([*command, "--save_tensors", str(tmp_path / "again.safetensors")]) == 0
    first, second = load_file(whole), load_file(tmp_path / "again.safetensors")
    assert torch.equal(first["latent"], second["latent"]) and torch.equal(first["video"], second["video"])
    assert len(frames_of(out)) == 5 and kept.exists()  # the file that decode was given is the user's


def test_the_latent_lies_there_before_decoding_and_goes_after(checkpoint: Path, tmp_path: Path, monkeypatch):
    seen, engine_vae = [], Engine.vae

    def vae(self: Engine, *arguments: object, **options: object) -> object:
        seen.append({file.name for file in tmp_path.iterdir()})
        return engine_vae(self, *arguments, **options)

    monkeypatch.setattr(Engine, "vae", vae)
    (tmp_path / "x.latent.safetensors").write_bytes(b"mine")
    assert generate("--ckpt_dir", checkpoint, "--save_file", tmp_path / "x.mp4") == 0
    assert "x.latent_2.safetensors" in seen[-1]
    assert {file.name for file in tmp_path.iterdir()} == {"x.mp4", "x.latent.safetensors"}
    assert (tmp_path / "x.latent.safetensors").read_bytes() == b"mine"


def test_a_disk_that_fills_up_leaves_nothing_half_written(checkpoint: Path, tmp_path: Path):
    """A real limit of the system's on the size of files, in a process of its own: the latent fits, the video not."""
    code = (
        "import resource, sys; from wan_core.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(main(sys.argv[1:]))"
    )
    words = [
        "generate",
        "--task",
        "ti2v-5B",
        "--ckpt_dir",
        checkpoint,
        "--size",
        "192*192",
        "--frame_num",
        9,
        "--sample_steps",
        1,
        "--prompt",
        "x",
        "--save_file",
        tmp_path / "x.mp4",
        "--save_tensors",
        tmp_path / "t.safetensors",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr.splitlines()[-1] and "wan_core decode" in done.stderr
    names = {file.name for file in tmp_path.iterdir()}
    assert "x.latent.safetensors" in names and not names - {"x.latent.safetensors", "x.mp4"}


# --- decode


def test_comfyuis_latents_are_decoded(checkpoint: Path, tmp_path: Path):
    """SaveLatent writes raw latents [1, C, T, h, w] under a name of its own."""
    latent = torch.randn(48, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    save_file({"latent": latent}, tmp_path / "ours.safetensors")
    raw = denormalise(latent[None], "wan2.2").contiguous()
    save_file({"latent_tensor": raw, "latent_format_version_0": torch.tensor([])}, tmp_path / "theirs.latent")
    for name in ("ours.safetensors", "theirs.latent"):
        words = [
            "decode",
            tmp_path / name,
            "--vae",
            checkpoint / "Wan2.2_VAE.pth",
            "--save_tensors",
            tmp_path / f"{name}.out",
        ]
        assert main([str(word) for word in words]) == 0
    ours, theirs = (load_file(tmp_path / f"{name}.out")["video"] for name in ("ours.safetensors", "theirs.latent"))
    assert (ours - theirs).abs().max() < 1e-4
    with av.open(str(tmp_path / "theirs.mp4")) as container:
        assert container.streams.video[0].average_rate == 24


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such latent"),
        (b"no tensors", "no whole safetensors file"),
        ({"x": torch.zeros(48, 2, 2, 4)}, "holds no latent"),
        ({"latent": torch.zeros(2, 48, 2, 2, 4)}, "one video's latent"),
        ({"latent": torch.zeros(48, 2, 2, 4, dtype=torch.int64)}, "one video's latent"),
        ({"latent": torch.zeros(7, 2, 2, 4)}, "7 channels"),
        ({"latent": torch.zeros(16, 2, 2, 4)}, "lacks Wan2.1_VAE.pth"),
        ({"latent": torch.full((48, 2, 2, 4), torch.nan)}, "no numbers"),
    ],
)
def test_what_cannot_be_decoded(checkpoint: Path, tmp_path: Path, capsys, content, message: str):
    file = tmp_path / "a.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        save_file(content, file)
    assert main(["decode", str(file), "--ckpt_dir", str(checkpoint), "--save_file", str(tmp_path / "x.mp4")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x.mp4").exists()


# --- whatever is typed


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            [flag, value]
            for flag in ("--frame_num", "--sample_steps", "--base_seed", "--vae_tile", "--swap_blocks", "--prefetch")
            for value in ("nan", "1.5", "", "9" * 30, "９x")
        ),
        *(
            [flag, value]
            for flag in ("--frame_num", "--sample_steps", "--vae_tile", "--swap_blocks", "--prefetch")
            for value in ("-1", "9223372036854775808")
        ),
        *(
            [flag, value]
            for flag in ("--sample_shift", "--vram_limit", "--sample_guide_scale")
            for value in ("nan", "inf", "-inf", "1e999", "", "many", "1,2,3")
        ),
        *([flag, "0"] for flag in ("--frame_num", "--sample_steps", "--sample_shift", "--vram_limit", "--vae_tile")),
        *(
            ["--size", value]
            for value in (
                "0*0",
                "-64*-32",
                "64",
                "64*32*1",
                "axb",
                "nan*nan",
                "",
                "1e3*1e3",
                "99999999999*32",
                "16384*16384",
            )
        ),
        *(
            [flag, value]
            for flag in ("--save_file", "--save_tensors", "--image", "--ckpt_dir", "--lora")
            for value in ("", " ", "\ud800.mp4", "a" * 300 + ".mp4", "/no/such/folder/x.mp4", "/dev/null", "/")
        ),
        *(["--save_file", value] for value in ("x", "x.", ".mp4x", "x.txt", "x.exe", "/proc/x.mp4")),
        *(["--device", value] for value in ("", "cuda", "cuda:99", "cuda:x", "meta", "cpu:x", "\ud800", "9" * 30)),
        *(["--dtype", value] for value in ("", "float12", "int64", "\ud800")),
        *([flag, ""] for flag in ("--attention", "--sample_solver", "--sample_schedule")),
        *(["--lora", value] for value in ("x:nan", "x:inf", "x:1e9", "x:", ":", ",", "a,b,c")),
        ["--prompt", "\udcff"],
        ["--negative_prompt", "\ud83d"],
        ["--offload_model", "perhaps"],
        ["--task", "t2v-1000B"],
        ["--swap_blocks", "1", "--vram_limit", "8"],
        ["--save_file", "x.mp4", "--save_tensors", "x.mp4"],
        ["--no_such_option"],
        ["surplus"],
    ],
    ids=ascii,
)
def test_whatever_is_typed_is_answered_in_words(checkpoint: Path, tmp_path: Path, capsys, monkeypatch, arguments):
    """Before anything is loaded, with exit code 2 and one line; nothing is left in the folder."""
    monkeypatch.chdir(tmp_path)
    for loads in ("dit", "vae", "text_encoder", "experts"):
        monkeypatch.setattr(f"wan_core.memory.engine.Engine.{loads}", None, raising=False)
    assert generate("--ckpt_dir", checkpoint, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and len(error.splitlines()) == 1 and len(error) < 1500
    assert "unforeseen" not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["64*32", "64x32", "64X32", "64×32", "64,32", " 64 * 32 "])
def test_spellings_of_a_size(size: str):
    assert arguments.size(size) == (64, 32)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"<svg/>", b"\xff\xd8\xff" * 9])
def test_no_images(checkpoint: Path, tmp_path: Path, capsys, content: bytes):
    (tmp_path / "x.png").write_bytes(content)
    assert generate("--ckpt_dir", checkpoint, "--image", tmp_path / "x.png") == 2
    assert "not an image that can be read" in capsys.readouterr().err


def test_a_fault_of_ours_is_told_in_words_and_its_traceback_kept(checkpoint: Path, tmp_path: Path, capsys, monkeypatch):
    class Panic(BaseException):
        """As libraries written in Rust raise them."""

    def fails(*_: object, **__: object) -> None:
        raise Panic("index out of bounds")

    monkeypatch.setattr("wan_core.pipeline.generate", fails)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    common = ("--ckpt_dir", checkpoint, "--save_file", tmp_path / "x.mp4")
    assert generate(*common) == 1
    said = capsys.readouterr().err
    log = next(tmp_path.glob("wan_core-error-*.log"))
    assert "Panic: index out of bounds" in said and str(log) in said and "Traceback" not in said
    assert "Traceback" in log.read_text() and "fails" in log.read_text()
    assert generate(*common, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_closed_pipe_does_not_end_the_work(checkpoint: Path, tmp_path: Path):
    """As in `python -m wan_core generate … | true`, and with no stdout and stderr at all."""
    words = [
        "generate",
        "--task",
        "ti2v-5B",
        "--ckpt_dir",
        checkpoint,
        "--size",
        "64*32",
        "--frame_num",
        1,
        "--sample_steps",
        1,
        "--prompt",
        "x",
        "--save_file",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = shlex.join([sys.executable, "-m", "wan_core", *map(str, words)])
    for name, end in (("pipe", "| true; exit ${PIPESTATUS[0]}"), ("none", ">&- 2>&-"), ("full", "> /dev/full")):
        done = subprocess.run(
            ["bash", "-c", f"{command} {tmp_path / name}.png {end}"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr
        assert (tmp_path / f"{name}.png").exists()


def test_ctrl_c_while_sampling(checkpoint: Path, tmp_path: Path, capsys, monkeypatch):
    def cancelled(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wan_core.pipeline.denoise_in_memory", cancelled)
    assert generate("--ckpt_dir", checkpoint, "--save_file", tmp_path / "x.mp4") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Cancelled." and not list(tmp_path.iterdir())


def test_make_tiny_touches_nothing_that_is_there(capsys, tmp_path: Path):
    mine = tmp_path / "Wan2.2_VAE.pth"
    mine.write_bytes(b"28 GB")
    assert main(["make-tiny", str(tmp_path), "--task", "ti2v-5B"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert mine.read_bytes() == b"28 GB" and list(tmp_path.iterdir()) == [mine]
    assert main(["make-tiny", str(mine)]) == 2 and "Cannot make the folder" in capsys.readouterr().err


def test_make_tiny_puts_tasks_into_one_models_folder(capsys, tmp_path: Path):
    """In ComfyUI's layout they share the text encoder; a real one of that name is left alone."""
    for task in ("t2v-A14B", "i2v-A14B"):
        assert main(["make-tiny", str(tmp_path), "--task", task, "--layout", "comfyui"]) == 0
    real = tmp_path / "vae/wan_2.1_vae.safetensors"
    save_file({"x": torch.zeros(1)}, real)
    before = real.read_bytes()
    assert main(["make-tiny", str(tmp_path), "--layout", "comfyui"]) == 2 and "wan_2.1_vae" in capsys.readouterr().err
    assert real.read_bytes() == before
