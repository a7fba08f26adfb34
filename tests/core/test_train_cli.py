"""The train command: several processes, sample grids, and mistakes that are told before anything is loaded."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from wan_core.__main__ import main
from wan_core.errors import WanError
from wan_core.media.video import save_video
from wan_core.tools.tiny import TinySizes, write_tiny
from wan_core.train.data import Frame
from wan_core.train.report import read_log
from wan_core.train.run import Hooks, Request, files_in, run

ROOT = Path(__file__).parents[2]
SIZES = TinySizes(dim=128, ffn_dim=64, layers=1, text_dim=32, text_layers=1, vae_dim=4)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    generator = torch.Generator().manual_seed(0)
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        save_video([torch.rand(3, 5, 32, 32, generator=generator) * 2 - 1], folder / name, 16)
    with (folder / "metadata.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["video", "prompt"], *([f"{name}.mp4", f"a clip, {name}"] for name in "abc")])
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for task in ("t2v-A14B", "i2v-A14B", "ti2v-5B"):
        write_tiny(folder / task, task, sizes=SIZES)
    return folder


def flags(checkpoints: Path, clips: Path, out: Path, task: str = "t2v-A14B", **more: object) -> list[str]:
    expert = [] if task == "ti2v-5B" else ["--expert", "low"]
    given = {"max_steps": 4, "lora_rank": 2, "learning_rate": 1e-3, "precision": "fp32", "device": "cpu"} | more
    words = [
        "train",
        "--task",
        task,
        *expert,
        "--ckpt_dir",
        checkpoints / task,
        "--dataset_base_path",
        clips,
        "--output_path",
        out,
        "--width",
        32,
        "--height",
        32,
        "--num_frames",
        5,
    ]
    words += [word for name, value in given.items() for word in (f"--{name}", value)]
    return [str(word) for word in words]


# --- several processes


_TWO_PROCESSES = """
import os, sys
import torch._dynamo, wan_core.train.run  # once for all: the imports take longer than the training
from wan_core.__main__ import main

def start(rank):
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)

port, *arguments = sys.argv[1:]
sys.exit(sum(os.waitpid(child, 0)[1] for child in [start(0), start(1)]) != 0)
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_processes_learn_what_one_with_two_batches_does(checkpoints: Path, clips: Path, tmp_path: Path):
    """Weights within 1e-3 of the longest way that any went in 4 steps: averaging adds in another order, and Adam's
    first steps divide by gradients near 0. Other batches, or gradients not averaged, miss by more than a tenth.

    The processes are told of each other in the variables that torchrun and accelerate launch set, which would only add
    seconds here.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-c", _TWO_PROCESSES, free_port()]
    two = subprocess.run(
        [*launch, *flags(checkpoints, clips, tmp_path / "two")], env=environment, capture_output=True, text=True
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Wrote ") == two.stdout.count("clips are ready") == 1
    one = flags(checkpoints, clips, tmp_path / "one", gradient_accumulation_steps=2)
    assert main(one) == 0
    alone = flags(checkpoints, clips, tmp_path / "alone")  # half of the clips: what a lonely process would learn
    assert main(alone) == 0

    ours, theirs, other = (load_file(tmp_path / name / "lora.safetensors") for name in ("two", "one", "alone"))
    keys = [key for key in theirs if key.endswith("lora_B.weight")]  # these begin at 0
    way = max(theirs[key].abs().max().item() for key in keys)
    assert max((ours[key] - theirs[key]).abs().max().item() for key in theirs) <= 1e-3 * way
    assert max((other[key] - theirs[key]).abs().max().item() for key in keys) > 0.1 * way
    losses = [[float(row["loss"]) for row in read_log(tmp_path / name / "log.csv")] for name in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # The state is one's that accumulates two batches, who may go on with it.
    assert main(flags(checkpoints, clips, tmp_path / "two", gradient_accumulation_steps=2)) == 0


# --- sample grids


@pytest.mark.parametrize("task", ["t2v-A14B", "i2v-A14B", "ti2v-5B"])
def test_sample_grids_lie_beside_the_log(checkpoints: Path, clips: Path, tmp_path: Path, task: str):
    more = {"sample_every": 1, "sample_steps": 2, "max_steps": 2}
    assert main(flags(checkpoints, clips, tmp_path, task, **more, learning_rate=0.1)) == 0
    grids = [Image.open(tmp_path / f"sample_{step:06d}.png") for step in (1, 2)]
    assert all(grid.size == (5 * 32, 3 * (32 + 14)) for grid in grids)  # 5 frames; 3 clips, captions above them
    first, second = (np.asarray(grid, dtype=float) for grid in grids)
    assert first[14:46].std() > 1 and np.abs(first - second).max() > 1  # the same noise, another model


def test_sample_prompts_and_what_they_leave_alone(checkpoints: Path, clips: Path, tmp_path: Path):
    """Samples take no chance from training: the LoRA is the same with and without them."""
    given = flags(checkpoints, clips, tmp_path / "with", sample_every=2, sample_steps=1)
    assert main([*given, "--sample_prompt", "a cat", "--sample_prompt", "a dog"]) == 0
    assert main(flags(checkpoints, clips, tmp_path / "without")) == 0
    assert Image.open(tmp_path / "with/sample_000004.png").size == (5 * 32, 2 * (32 + 14))
    one, other = (load_file(tmp_path / name / "lora.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- hooks, and mistakes told early


def a_request(clips: Path, out: Path) -> Request:
    return Request(
        task="t2v-A14B", expert="low", clips=clips, out=out, frame=Frame(32, 32, 5), rank=2, steps=2, precision="fp32"
    )


@pytest.mark.parametrize("when", [1, 4, 30])
def test_a_cancelled_run_goes_on_to_the_same_lora(checkpoints: Path, clips: Path, tmp_path: Path, when: int):
    """Cancelled while clips are encoded and while a step is computed."""
    files, calls = files_in(checkpoints / "t2v-A14B", "t2v-A14B", "low"), []

    def check(*_: object) -> None:
        calls.append(0)
        if len(calls) == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(replace(a_request(clips, tmp_path / "parts"), steps=20), files, hooks=Hooks(check=check))
    for name in ("parts", "whole"):
        run(replace(a_request(clips, tmp_path / name), steps=20), files)
    parts, whole = (load_file(tmp_path / name / "lora.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


def test_hooks_hear_of_clips_and_steps(checkpoints: Path, clips: Path, tmp_path: Path):
    files, heard = files_in(checkpoints / "t2v-A14B", "t2v-A14B", "low"), []
    hooks = Hooks(
        on_step=lambda report: heard.append(report.step), on_clip=lambda *done: heard.append(done), tell=heard.append
    )
    run(a_request(clips, tmp_path), files, hooks=hooks)
    assert heard[:3] == [(1, 3), (2, 3), (3, 3)] and heard[3].startswith("3 clips are ready") and heard[4:] == [1, 2]


def test_a_clip_in_two_rows_is_made_ready_once(checkpoints: Path, clips: Path, tmp_path: Path):
    heard, rows = [], [["video", "prompt"], ["a.mp4", "a"], ["a.mp4", "b"], ["b.mp4", "b"]]
    with (tmp_path / "twice.csv").open("w", newline="") as out:
        csv.writer(out).writerows(rows)
    request = replace(a_request(clips, tmp_path / "out"), metadata=tmp_path / "twice.csv")
    run(request, files_in(checkpoints / "t2v-A14B", "t2v-A14B", "low"), hooks=Hooks(on_clip=lambda *n: heard.append(n)))
    assert heard == [(1, 2), (1, 2), (2, 2)]


def test_mistakes_are_told_before_anything_is_loaded(
    checkpoints: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files, good = files_in(checkpoints / "t2v-A14B", "t2v-A14B", "low"), a_request(clips, tmp_path / "out")
    run(good, files)
    for name in ("load_vae", "load_text_encoder", "load_trained"):
        monkeypatch.setattr(f"wan_core.train.run.{name}", None)
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin/metadata.csv").write_bytes("video,prompt\na.mp4,ein Bär\n".encode("latin-1"))
    quantised = tmp_path / "fp8.safetensors"
    save_file(quantise(load_all(files.dit)), quantised)
    wrong_vae = replace(files, vae=files_in(checkpoints / "ti2v-5B", "ti2v-5B", "only").vae)
    for request, parts, expected in (
        (replace(good, steps=3), files, "another run: steps was 2, now 3"),
        (replace(good, targets=("q", "k_img")), files, "LoRA targets k_img"),
        (replace(good, frame=Frame(32, 32, 9)), files, "a.mp4 has 5 frames, expected at least 9"),
        (replace(good, frame=Frame(32, 32, 6)), files, r"6 frames: Wan makes 4n \+ 1"),
        (replace(good, clips=tmp_path / "latin"), files, "not a table in UTF-8"),
        (replace(good, boundaries=(0.9, 0.1)), files, "minimum < maximum"),
        (replace(good, rank=0), replace(files, dit=quantised), r"fp8.safetensors is quantised .* train a LoRA"),
        (good, wrong_vae, "wan2.2 VAE, but Wan2.2 T2V-A14B needs wan2.1"),
        (replace(good, task="i2v-A14B"), files, "takes 16 channels"),
    ):
        with pytest.raises(WanError, match=expected):
            run(request, parts)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"batch_size": 0}, "batch is 0: expected 1 or more"),
        ({"dataset_repeat": 0}, "repeat is 0"),
        ({"learning_rate": -1}, "learning_rate is -1.0: expected a number above 0"),
        ({"caption_dropout": 2}, "caption_dropout is 2.0"),
        ({"shift": 0}, "shift is 0.0: expected a number above 0"),
        ({"device": "cuda:99"}, "Device 'cuda:99' is not available"),
        ({"cache_path": __file__}, "Cannot make the folder"),
    ],
)
def test_numbers_and_places_that_cannot_be(
    checkpoints: Path, clips: Path, tmp_path: Path, capsys, more: dict, expected: str
):
    assert main(flags(checkpoints, clips, tmp_path / "out", **more)) == 2
    assert expected in capsys.readouterr().err


def test_single_files_stand_in_for_a_folders(checkpoints: Path, clips: Path, tmp_path: Path, capsys):
    """All three need no folder; one beside a folder needs of it what is left, and never the other expert."""
    whole = files_in(checkpoints / "t2v-A14B", "t2v-A14B", "low")
    rest = tmp_path / "rest"
    rest.mkdir()
    for name in (whole.vae.name, whole.text_encoder.name):
        (rest / name).symlink_to((whole.vae.parent / name).absolute())
    assert files_in(rest, "t2v-A14B", "low", dit=whole.dit).vae == rest / whole.vae.name
    (rest / "low_noise_model").symlink_to(whole.dit.absolute())
    assert files_in(rest, "t2v-A14B", "low").dit == rest / "low_noise_model"

    words = flags(checkpoints, clips, tmp_path / "out", lora_target_modules="q, k")
    place = words.index("--ckpt_dir")
    del words[place : place + 2]
    assert main(words) == 2
    assert "Give --ckpt_dir, or all of --dit, --vae and --text_encoder" in capsys.readouterr().err
    parts = {"dit": whole.dit, "vae": whole.vae, "text_encoder": whole.text_encoder, "tokenizer": whole.tokenizer}
    words += [str(word) for name, file in parts.items() if file for word in (f"--{name}", file)]
    assert main(words) == 0
    assert load_file(tmp_path / "out/lora.safetensors")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_base_weights_of_every_format(checkpoints: Path, clips: Path, tmp_path: Path, dtype: str, precision: str):
    """The 5B, whose first frame has a timestep of its own, has the most to mix."""
    files = files_in(checkpoints / "ti2v-5B", "ti2v-5B", "only")
    request = replace(a_request(clips, tmp_path), task="ti2v-5B", expert="only", dtype=dtype, precision=precision)
    run(request, files)
    assert all(float(row["loss"]) < 10 for row in read_log(tmp_path / "log.csv"))


def test_other_base_weights_and_other_lora_layers_are_refused(checkpoints: Path, clips: Path, tmp_path: Path):
    files, request = files_in(checkpoints / "t2v-A14B", "t2v-A14B", "low"), a_request(clips, tmp_path)
    run(request, files)
    high = files_in(checkpoints / "t2v-A14B", "t2v-A14B", "high")
    fewer, weaker = replace(request, targets=("q",)), replace(request, alpha=1.0)
    smaller = replace(request, frame=Frame(16, 32, 5))
    for other, parts, expected in (
        (request, high, "the model's weights are others"),
        (fewer, files, "lora_layers"),
        (weaker, files, "lora_alpha was 2"),
        (replace(request, dtype="float16"), files, "base_dtype was"),
        (smaller, files, "the clips, their prompts, size or number"),
    ):
        with pytest.raises(WanError, match=expected):
            run(other, parts)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def test_a_lora_on_a_quantised_base_is_that_on_its_values(checkpoints: Path, clips: Path, tmp_path: Path):
    files = files_in(checkpoints / "t2v-A14B", "t2v-A14B", "low")
    packed = quantise(load_all(files.dit))
    save_file(packed, tmp_path / "packed.safetensors")
    save_file({key: tensor.float() for key, tensor in packed.items()}, tmp_path / "plain.safetensors")
    for name in ("packed", "plain"):
        run(a_request(clips, tmp_path / name), replace(files, dit=tmp_path / f"{name}.safetensors"))
    ours, expected = (load_file(tmp_path / name / "lora.safetensors") for name in ("packed", "plain"))
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def quantise(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    wide = ("q.weight", "k.weight", "v.weight", "o.weight")
    return {key: tensor.to(torch.float8_e4m3fn) if key.endswith(wide) else tensor for key, tensor in weights.items()}


# --- what lies in the output folder


FOREIGN = {
    "lora.safetensors": [],
    "log.csv": [],
    "loss.png": [],
    "state.pt": [],
    "sample_000002.png": ["--sample_every", "2"],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_never_replaced(checkpoints: Path, clips: Path, tmp_path: Path, capsys, name: str):
    (tmp_path / name).write_bytes(b"mine")
    assert main([*flags(checkpoints, clips, tmp_path), *FOREIGN[name]]) == 2
    said = capsys.readouterr().err
    assert name in said and "Traceback" not in said
    assert (tmp_path / name).read_bytes() == b"mine" and list(tmp_path.iterdir()) == [tmp_path / name]
    with pytest.raises(WanError):  # nor where a run shall be forgotten
        files = files_in(checkpoints / "t2v-A14B", "t2v-A14B", "low")
        run(replace(a_request(clips, tmp_path), restart=True, sample_every=2), files)
    assert (tmp_path / name).read_bytes() == b"mine"


def test_a_foreign_lora_in_a_runs_own_folder(checkpoints: Path, clips: Path, tmp_path: Path, capsys):
    assert main(flags(checkpoints, clips, tmp_path)) == 0
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    before = (tmp_path / "lora.safetensors").read_bytes()
    assert main(flags(checkpoints, clips, tmp_path)) == 2 and "lora.safetensors" in capsys.readouterr().err
    assert (tmp_path / "lora.safetensors").read_bytes() == before


def test_the_same_run_again_and_a_new_one_in_its_folder(checkpoints: Path, clips: Path, tmp_path: Path, capsys):
    """Going on replaces the run's own file; a new run, whose state was taken away, gives the old LoRA a number."""
    for _ in range(2):
        assert main(flags(checkpoints, clips, tmp_path)) == 0
    assert not (tmp_path / "lora_2.safetensors").exists()
    old = (tmp_path / "lora.safetensors").read_bytes()
    (tmp_path / "state.pt").unlink()
    assert main(flags(checkpoints, clips, tmp_path, seed=7)) == 0
    assert "is now lora_2.safetensors" in capsys.readouterr().out
    assert (tmp_path / "lora_2.safetensors").read_bytes() == old != (tmp_path / "lora.safetensors").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "inside", "other", "parts"])
def test_a_damaged_state(checkpoints: Path, clips: Path, tmp_path: Path, capsys, damage: str):
    assert main(flags(checkpoints, clips, tmp_path)) == 0
    state = tmp_path / "state.pt"
    whole, lora = state.read_bytes(), (tmp_path / "lora.safetensors").read_bytes()
    if damage == "other":
        torch.save({"weights": {}}, state)
    elif damage == "parts":
        saved = torch.load(state, weights_only=True)
        name = next(iter(saved["weights"]))
        torch.save({**saved, "weights": {**saved["weights"], name: torch.zeros(3)}}, state)
    else:
        state.write_bytes(
            {
                "cut": whole[: len(whole) // 2],
                "empty": b"",
                "text": b"state",
                "inside": whole[:200] + b"\xff" * 400 + whole[600:],
            }[damage]
        )
    broken = state.read_bytes()
    capsys.readouterr()
    assert main(flags(checkpoints, clips, tmp_path)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert str(state) in said and ("damaged" in said or "no state" in said) and "move it away" in said.lower()
    assert state.read_bytes() == broken and (tmp_path / "lora.safetensors").read_bytes() == lora
    state.unlink()
    assert main(flags(checkpoints, clips, tmp_path)) == 0  # as the message says


_FULL = """
import resource, sys
from wan_core.__main__ import main
from wan_core.train import loop

save = loop._save

def full(task, plan, state, *rest):
    if state.step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    save(task, plan, state, *rest)

loop._save = full
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_at_a_checkpoint(checkpoints: Path, clips: Path, tmp_path: Path):
    """The system refuses to write the third state: the one before stays, nothing half-written, and the run goes on."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = flags(checkpoints, clips, tmp_path / "full", save_steps=1)
    done = subprocess.run([sys.executable, "-c", _FULL, *words], env=environment, capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert said.startswith("Error: Cannot write") and "state.pt" in said and "too large" in said
    names = {file.name for file in (tmp_path / "full").iterdir()}
    assert names <= {"state.pt", "log.csv", "loss.png", "cache"}
    assert torch.load(tmp_path / "full/state.pt", weights_only=True)["step"] == 2
    assert main(words) == 0 and main(flags(checkpoints, clips, tmp_path / "whole", save_steps=1)) == 0
    full, whole = (load_file(tmp_path / name / "lora.safetensors") for name in ("full", "whole"))
    assert all(torch.equal(full[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", ["../a.mp4", "/etc/passwd", "x/../../a.mp4"])
@pytest.mark.parametrize("column", ["video", "start_image"])
def test_a_table_names_files_inside_its_folder_only(
    checkpoints: Path, clips: Path, tmp_path: Path, capsys, name: str, column: str
):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.mp4").write_bytes((clips / "a.mp4").read_bytes())
    row = {"video": "a.mp4", "prompt": "a", "start_image": ""} | {column: name}
    with (data / "metadata.csv").open("w", newline="") as out:
        csv.writer(out).writerows([list(row), list(row.values())])
    assert main(flags(checkpoints, data, tmp_path / "out")) == 2
    assert "not inside" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more",
    [
        *(
            {name: value}
            for name in ("learning_rate", "weight_decay", "ema", "caption_dropout", "shift", "lora_alpha")
            for value in ("nan", "inf", "", "much")
        ),
        *(
            {name: value}
            for name in ("lora_rank", "num_frames", "width", "max_steps", "save_steps", "seed")
            for value in ("nan", "1.5", "", "9" * 30)
        ),
        {"lora_rank": 100_000},
        {"lora_rank": -1},
        {"width": 0},
        {"height": -32},
        {"num_frames": 6},
        {"lora_alpha": 0},
        {"width": 16384, "height": 16384, "num_frames": 1025},
        {"output_path": ""},
        {"output_path": __file__},
        {"dataset_base_path": __file__},
        {"ckpt_dir": __file__},
        {"dit": "/no/such.safetensors"},
        {"vae": "/"},
        {"device": "meta"},
        {"sample_prompt": "\udcff"},
    ],
    ids=ascii,
)
def test_whatever_is_typed_is_answered_in_words(checkpoints: Path, clips: Path, tmp_path: Path, capsys, more: dict):
    assert main(flags(checkpoints, clips, tmp_path / "out", **more)) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ") and len(said.splitlines()) == 1 and "unforeseen" not in said
    assert not (tmp_path / "out").exists()
