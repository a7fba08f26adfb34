"""Training of transformers: the loss, LoRA, resuming, data and the command, on models of a few layers in float32."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.core.lora_files import merged_lora
from wan_core.__main__ import main
from wan_core.config import VARIANTS, Architecture
from wan_core.errors import WanError
from wan_core.loading.dit import load_dit, read_dit
from wan_core.media.video import save_video
from wan_core.sampling.schedules import schedule
from wan_core.tools.tiny import TinySizes, write_tiny
from wan_core.train.cache import Entry, batches_of
from wan_core.train.data import Frame, read_folder
from wan_core.train.dit import Data, DiTTask, Recipe
from wan_core.train.loop import Plan, _average, train
from wan_core.train.lora import AdaptedLinear, add_lora
from wan_core.train.model import CheckpointedRunner, TrainedDiT, load_trained, new_dit
from wan_core.train.objective import (
    NoiseRange,
    expert_range,
    noisy,
    velocity_loss,
    with_clean_first_frame,
    with_subject,
)
from wan_core.train.optim import orthogonal
from wan_core.train.report import Log, read_log
from wan_core.train.run import Request, files_in, run
from wan_core.train.sample import Given, Sampling, sample

T2V, I2V, TI2V = (VARIANTS[task] for task in ("t2v-A14B", "i2v-A14B", "ti2v-5B"))
CONFIG = Architecture(16, 16, dim=128, ffn_dim=64, layers=2, text_dim=32, freq_dim=256, heads=1)
SIZES = TinySizes(dim=128, ffn_dim=64, layers=1, text_dim=32, text_layers=1, vae_dim=4)


def random_dit(config: Architecture = CONFIG, seed: int = 0) -> TrainedDiT:
    """A model whose every weight does something."""
    model = new_dit(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def random_data(count: int = 4, channels: int = 16, frames: int = 2, concat: bool = False) -> Data:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    entries = [Entry(draw(channels, frames, 4, 4), draw(20, frames, 4, 4) if concat else None) for _ in range(count)]
    texts = [draw(3 + i, 32) for i in range(count)]
    return Data(entries.__getitem__, texts.__getitem__, draw(1, 32), [(channels, frames, 4, 4)] * count, "random")


# --- the loss


def test_gradients_are_those_of_a_hand_written_loss():
    """The task's loss and its gradients against the formula written out: 512 padded text rows, no shortcuts."""
    data, model = random_data(), random_dit()
    task = DiTTask(model, data, Recipe(T2V, NoiseRange(0.2, 0.9, 3.0), batch=2, caption_dropout=0.5, precision="fp32"))
    loss, _ = task.loss(1, torch.Generator().manual_seed(1))
    loss.backward()

    twin = random_dit()
    generator = torch.Generator().manual_seed(1)
    clips = batches_of(data.shapes, 2, 0, 0)[1]
    x0 = torch.stack([data.entries(i).latent for i in clips])
    noise = torch.randn(x0.shape, generator=generator)
    sigma = NoiseRange(0.2, 0.9, 3.0).sigmas(2, generator)
    dropped = torch.rand(2, generator=generator) < 0.5
    text = torch.zeros(2, 512, 32)
    for row, (clip, drop) in enumerate(zip(clips, dropped, strict=True)):
        states = data.empty if drop else data.texts(clip)
        text[row, : len(states)] = states
    s = sigma[:, None, None, None, None]
    expected = ((twin((1 - s) * x0 + s * noise, sigma * 1000, text) - (noise - x0)) ** 2).mean()
    expected.backward()

    assert dropped.sum() == 1  # both kinds of caption are seen
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        assert (mine.grad - theirs.grad).abs().max() <= 1e-3 * scale + 5e-8, name


def test_gradient_points_downhill_by_finite_differences():
    model, task = random_dit(), None
    task = DiTTask(model, random_data(), Recipe(T2V, NoiseRange(0, 1, 5.0), batch=2, precision="fp32"))
    task.loss(0, torch.Generator().manual_seed(1))[0].backward()
    weight = model.blocks[0].self_attn.v.weight
    place, step = weight.grad.abs().argmax(), 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.view(-1)[place] += sign * step
            values.append(task.loss(0, torch.Generator().manual_seed(1))[0].item())
            weight.view(-1)[place] -= sign * step
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(weight.grad.view(-1)[place].item(), rel=0.05)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_noise_levels_stay_with_their_expert_and_follow_the_shift(expert: str):
    levels = expert_range(T2V, expert).sigmas(4000, torch.Generator().manual_seed(0))
    boundary = T2V.boundary
    assert ((levels >= boundary) if expert == "high" else (levels < boundary)).all()
    grid = schedule("dpm++", 4000, T2V.shift).sigmas[:-1]
    grid = grid[grid >= boundary] if expert == "high" else grid[grid < boundary]
    quantiles = torch.linspace(0.05, 0.95, 10)
    assert torch.allclose(levels.quantile(quantiles), grid.float().quantile(quantiles), atol=0.01)


def test_a_clean_first_frame_is_told_so_and_not_learnt():
    latent, noise = torch.randn(2, 48, 3, 2, 2), torch.randn(2, 48, 3, 2, 2)
    whole = noisy(latent, noise, torch.tensor([0.5, 0.7]))
    example = with_clean_first_frame(whole, latent, torch.tensor([True, False]))
    assert torch.equal(example.x[0, :, 0], latent[0, :, 0]) and not torch.equal(example.x[1, :, 0], latent[1, :, 0])
    assert example.t.tolist() == [[0, 500, 500], [pytest.approx(700)] * 3]
    wrong_first = example.target.clone()
    wrong_first[:, :, 0] += 1
    assert velocity_loss(wrong_first, example).item() == pytest.approx(0.5 / 3, rel=1e-5)  # of the second sample alone


def test_the_subject_counts_more_where_it_can_be_seen():
    """Against the mean written out: 1 + emphasis (1 - sigma) for each place of the subject, 1 for the others."""
    latent, noise = torch.randn(2, 16, 2, 2, 2), torch.randn(2, 16, 2, 2, 2)
    subject = torch.zeros(2, 1, 2, 2, 2)
    subject[:, :, 1, 0] = 1
    example = with_subject(noisy(latent, noise, torch.tensor([0.25, 1.0])), subject, 8.0)
    answer = torch.randn(2, 16, 2, 2, 2)
    error = (answer - (noise - latent)).square().mean(dim=1, keepdim=True)
    weight = 1 + 8 * 0.75 * subject[:1]
    clear = (error[:1] * weight).sum() / weight.sum()
    assert velocity_loss(answer, example).item() == pytest.approx((clear + error[1].mean()).item() / 2, rel=1e-5)


@pytest.mark.parametrize("variant", [I2V, TI2V], ids=["channels", "frame"])
def test_conditions_enter_as_in_sampling(variant):
    config = replace(CONFIG, in_channels=variant.in_channels, out_channels=48 if variant is TI2V else 16)
    data = random_data(channels=config.out_channels, concat=variant is I2V)
    recipe = Recipe(variant, NoiseRange(0, 1, 5.0), batch=2, image_dropout=0.0, precision="fp32")
    task = DiTTask(random_dit(config), data, recipe)
    entries = [data.entries(0), data.entries(1)]
    example = task.example(entries, torch.Generator().manual_seed(0))
    if variant is I2V:
        assert torch.equal(example.x[:, 16:], torch.stack([entry.concat for entry in entries]))
    else:
        assert torch.equal(example.x[:, :, 0], torch.stack([entry.latent[:, 0] for entry in entries]))
        assert (example.t[:, 0] == 0).all() and (example.t[:, 1] > 0).all()
    assert torch.isfinite(task.loss(0, torch.Generator().manual_seed(0))[0])


def test_checkpointed_blocks_give_the_same_gradients():
    grads = []
    for offload in (None, False, True):
        model = random_dit()
        if offload is not None:
            model.runner = CheckpointedRunner(offload=offload)
        task = DiTTask(model, random_data(), Recipe(T2V, NoiseRange(0, 1, 5.0), batch=2, precision="fp32"))
        task.loss(0, torch.Generator().manual_seed(0))[0].backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_muon_steps_are_orthogonal():
    for shape in ((8, 20), (20, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.6 and values.max() < 1.3


# --- LoRA


def adapted_dit(targets=("q", "k", "v", "o", "ffn.0", "ffn.2")) -> tuple[TrainedDiT, dict[str, AdaptedLinear]]:
    model = random_dit()
    adapted = add_lora(model, 3, targets, alpha=6.0, seed=1)
    for i, layer in enumerate(adapted.values()):
        torch.nn.init.normal_(layer.lora_B, std=0.05, generator=torch.Generator().manual_seed(i))
    return model, adapted


def test_a_merged_lora_is_the_applied_one(tmp_path: Path):
    model, adapted = adapted_dit()
    task = DiTTask(model, random_data(), Recipe(T2V, NoiseRange(0, 1, 5.0)), adapted=adapted)
    task.save(tmp_path / "lora.safetensors")
    merged = new_dit(CONFIG, 0)
    merged.load_state_dict(merged_lora(random_dit().state_dict(), tmp_path / "lora.safetensors"))
    x, t, text = torch.randn(1, 16, 2, 4, 4), torch.tensor([600.0]), torch.randn(1, 512, 32)
    with torch.no_grad():
        plain, applied, expected = random_dit()(x, t, text), model(x, t, text), merged(x, t, text)
    assert (applied - expected).abs().max() < 1e-5
    assert (applied - plain).abs().max() > 1e-2


def test_only_the_update_is_trained_and_only_where_asked():
    model, adapted = adapted_dit(("q", "ffn.2"))
    assert {name.split(".", 2)[2] for name in adapted} == {"self_attn.q", "cross_attn.q", "ffn.2"}
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(WanError, match="LoRA targets qq"):
        add_lora(random_dit(), 4, ("q", "qq"))


def test_comfyui_reads_the_lora(in_comfyui, tmp_path: Path):
    """ComfyUI's own loader finds every key, and what it adds to a weight is what ours merges."""
    model, adapted = adapted_dit()
    file = tmp_path / "lora.safetensors"
    DiTTask(model, random_data(), Recipe(T2V, NoiseRange(0, 1, 5.0)), adapted=adapted).save(file)
    weights = random_dit().state_dict()
    found = in_comfyui(
        """
        import comfy.lora, comfy.lora_convert
        lora = comfy.lora_convert.convert_lora(inputs["lora"])
        to_load = {"diffusion_model." + key.removesuffix(".weight"): "diffusion_model." + key
                   for key in inputs["weights"] if key.endswith(".weight")}
        patches = comfy.lora.load_lora(lora, to_load)
        for key, patch in patches.items():
            weight = inputs["weights"][key.removeprefix("diffusion_model.")].clone()
            name = key.removeprefix("diffusion_model.")
            outputs[name] = comfy.lora.calculate_weight([(0.7, patch, 1.0, None, None)], weight, key)
        """,
        lora=load_file(file),
        weights=weights,
    )
    merged = merged_lora(weights, file, 0.7)
    assert set(found) == {f"{name}.weight" for name in adapted}
    for name, weight in found.items():
        assert torch.allclose(weight, merged[name], atol=1e-6), name


# --- the loop


def a_task(lora: bool = False) -> DiTTask:
    model = random_dit()
    adapted = add_lora(model, 2) if lora else None
    recipe = Recipe(T2V, NoiseRange(0, 1, 5.0), batch=2, precision="fp32")
    return DiTTask(model, random_data(), recipe, adapted=adapted)


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, optimiser: str):
    plan = Plan(7, 1e-2, optimiser=optimiser, warmup=2, ema=0.9, accumulate=2, save_every=2)

    def stop(report):
        if report.step in stops:
            stops.remove(report.step)
            raise Killed

    stops, whole, parts = [3, 4], a_task(), None
    assert train(whole, plan, tmp_path / "whole")
    for _ in range(3):
        parts = a_task()
        try:
            finished = train(parts, plan, tmp_path / "parts", on_step=stop)
        except Killed:
            continue
    assert finished
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))
    losses = [[row["loss"] for row in read_log(tmp_path / name / "log.csv")] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 7
    assert Image.open(tmp_path / "parts" / "loss.png").size == (800, 400)


@pytest.mark.parametrize("before", [True, False])
def test_cancelled_in_the_midst_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool):
    """After the weights have changed, before or after the average has: that is no state to go on from."""
    plan, whole = Plan(5, 1e-2, warmup=2, ema=0.9, save_every=1), a_task()
    assert train(whole, plan, tmp_path / "whole")

    def cancelled(average: dict, parameters: dict, decay: float, step: int) -> None:
        if step == 3 and before:
            raise KeyboardInterrupt
        _average(average, parameters, decay, step)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("wan_core.train.loop._average", cancelled)
        with pytest.raises(KeyboardInterrupt):
            train(a_task(), plan, tmp_path / "parts")
    parts = a_task()
    assert train(parts, plan, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))


def test_the_seed_decides_the_order():
    orders = []
    for seed in (0, 0, 1):
        task = DiTTask(random_dit(), random_data(), Recipe(T2V, NoiseRange(0, 1, 5.0), seed=seed))
        orders.append([task._clips(batch) for batch in range(12)])
    assert orders[0] == orders[1] != orders[2]


def test_a_log_is_cut_back_at_once(tmp_path: Path):
    """Going on from step 2 drops what came later, and half a row; the file is replaced, never empty in between."""
    file = tmp_path / "log.csv"
    file.write_text("step,loss\n1,0.5\n2,0.4\n3,0.3\n4")
    before = file.stat().st_ino
    Log(file, 2).write({"step": 3, "loss": 0.2})
    assert file.read_text().split() == ["step,loss", "1,0.5", "2,0.4", "3,0.2"] and file.stat().st_ino != before


_KILLABLE = """
import sys
from pathlib import Path
import torch
from wan_core.config import VARIANTS, Architecture
from wan_core.train.cache import Entry
from wan_core.train.dit import Data, DiTTask, Recipe
from wan_core.train.loop import Plan, _average, train
from wan_core.train.model import new_dit
from wan_core.train.objective import NoiseRange

torch.set_num_threads(1)
torch.manual_seed(0)
latent, text, folder = torch.randn(16, 1, 4, 4), torch.randn(3, 32), Path(sys.argv[1])
data = Data(lambda i: Entry(latent * i, None), lambda i: text, text[:1], [(16, 1, 4, 4)] * 4, "two")
model = new_dit(Architecture(16, 16, 128, 64, 1, 32, 256, 1), 0)
task = DiTTask(model, data, Recipe(VARIANTS["t2v-A14B"], NoiseRange(0, 1, 5.0), batch=2, precision="fp32"))
train(task, Plan(12, 1e-2, ema=0.9, save_every=4), folder)
torch.save(model.state_dict(), folder / "end.pt")
"""


def test_a_killed_process_goes_on_to_the_same_weights(tmp_path: Path):
    """SIGKILL in the middle of a run, then the same command again."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for name in ("killed", "whole"):
        command = [sys.executable, "-c", _KILLABLE, str(tmp_path / name)]
        if name == "killed":
            first = subprocess.Popen(command, env=environment)
            while not (tmp_path / name / "state.pt").exists() and first.poll() is None:
                time.sleep(0.02)
            first.send_signal(signal.SIGKILL)
            first.wait()
            assert not (tmp_path / name / "end.pt").exists()
        subprocess.run(command, env=environment, check=True)
    ends = [torch.load(tmp_path / name / "end.pt") for name in ("killed", "whole")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[1])


def test_another_runs_state_is_refused(tmp_path: Path):
    plan = Plan(2, 1e-2)
    train(a_task(), plan, tmp_path)
    with pytest.raises(WanError, match=r"another run: steps was 2, now 3"):
        train(a_task(), replace(plan, steps=3), tmp_path)


def test_overfitting_one_clip(tmp_path: Path):
    """Two layers learn one flat clip in 120 steps: the loss falls from 1.1 below 0.05, and sampling gives it back.

    The clip is flat because a place is known to the model only through its neighbours, which takes longer to learn.
    """
    noise = random_data(1)
    clip = (noise.entries(0).latent.mean(dim=(1, 2, 3), keepdim=True) * 4).expand(16, 2, 4, 4)
    data = replace(noise, entries=lambda i: Entry(clip, None))
    model = new_dit(CONFIG, 0)
    task = DiTTask(model, data, Recipe(T2V, NoiseRange(0, 1, 3.0), batch=8, caption_dropout=0, precision="fp32"))
    train(task, Plan(120, 1e-2, warmup=5, weight_decay=0), tmp_path)
    losses = [float(row["loss"]) for row in read_log(tmp_path / "log.csv")]
    assert losses[0] > 1 and np.mean(losses[-10:]) < 0.05
    how = Sampling(steps=10, shift=3.0, guidance=1.0)
    made = sample(model, model, Given([data.texts(0)], data.empty), (16, 2, 4, 4), how, T2V)[0]
    assert (made - clip).square().mean() < 0.3 * clip.square().mean()


# --- data


def test_batches_hold_one_shape_and_every_clip():
    shapes = [(16, 1, 4, 4)] * 5 + [(16, 2, 4, 4)] * 4
    for epoch in range(3):
        batches = batches_of(shapes, 3, 0, epoch)
        assert all(len({shapes[i] for i in batch}) == 1 and len(batch) == 3 for batch in batches)
        assert {i for batch in batches for i in batch} == set(range(9))
    assert batches_of(shapes, 3, 0, 1) == batches_of(shapes, 3, 0, 1) != batches_of(shapes, 3, 0, 2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good clips, an image, a short clip, a file that is no video, and one that is missing."""
    folder = tmp_path_factory.mktemp("clips")
    generator = torch.Generator().manual_seed(0)
    for name, frames in (("a.mp4", 5), ("b.mp4", 7), ("short.mp4", 3)):
        save_video([torch.rand(3, frames, 48, 64, generator=generator) * 2 - 1], folder / name, 16)
    Image.fromarray(np.full((40, 80, 3), 200, np.uint8)).save(folder / "c.png")
    (folder / "broken.mp4").write_bytes(b"no video")
    write_table(folder / "metadata.csv", ["a.mp4", "b.mp4", "c.png"])
    write_table(folder / "bad.csv", ["a.mp4", "short.mp4", "broken.mp4", "missing.mp4"])
    return folder


def write_table(file: Path, names: list[str]) -> None:
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([["video", "prompt"], *([name, f"a clip, {name}"] for name in names)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t2v")
    write_tiny(folder, "t2v-A14B", sizes=SIZES)
    return folder


@pytest.fixture
def request_(clips: Path, tmp_path: Path) -> Request:
    return Request(
        task="t2v-A14B",
        expert="low",
        clips=clips,
        out=tmp_path / "out",
        frame=Frame(32, 32, 5),
        rank=2,
        steps=3,
        learning_rate=1e-2,
        precision="fp32",
    )


def test_bad_clips_are_named_and_refused_or_skipped(checkpoint: Path, clips: Path, request_: Request, caplog):
    request_ = replace(request_, metadata=clips / "bad.csv")
    files = files_in(checkpoint, "t2v-A14B", "low")
    with pytest.raises(WanError) as error:
        run(request_, files)
    for text in ("short.mp4 has 3 frames, expected at least 5", "broken.mp4 is not a readable", "missing.mp4 no such"):
        assert text in str(error.value)
    run(replace(request_, skip_bad_clips=True), files)
    assert sum("Skipped" in line for line in caplog.messages) == 3


def test_a_table_that_is_none(tmp_path: Path):
    with pytest.raises(WanError, match=r"No .*metadata\.csv"):
        read_folder(tmp_path, Frame(32, 32, 5))
    (tmp_path / "metadata.csv").write_text("file,text\na.mp4,b\n")
    with pytest.raises(WanError, match="has the columns file, text; expected video,prompt"):
        read_folder(tmp_path, Frame(32, 32, 5))


def test_encoders_work_once(checkpoint: Path, request_: Request, monkeypatch: pytest.MonkeyPatch):
    """What one run cached serves the next, whose encoders must not even be loaded; files of the clips may move."""
    files = files_in(checkpoint, "t2v-A14B", "low")
    cache = request_.out / "cache"
    run(request_, files)
    monkeypatch.setattr("wan_core.train.run.load_vae", None)
    monkeypatch.setattr("wan_core.train.run.load_text_encoder", None)
    run(replace(request_, out=request_.out / "again", cache=cache), files)


@pytest.mark.parametrize("task", list(VARIANTS))
def test_the_command_trains_every_variant_and_its_files_load(task: str, clips: Path, tmp_path: Path):
    folder, out = tmp_path / "model", tmp_path / "out"
    write_tiny(folder, task, sizes=SIZES)
    expert = [] if VARIANTS[task].experts == 1 else ["--expert", "high"]
    flags = [
        "--task",
        task,
        *expert,
        "--ckpt_dir",
        folder,
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
        "--max_steps",
        2,
        "--lora_rank",
        0,
        "--precision",
        "fp32",
    ]
    assert main(["train", *map(str, flags)]) == 0
    trained = load_dit(out / "model.safetensors")
    before = load_trained(read_dit(files_in(folder, task, "high" if expert else "only").dit))
    assert trained.config == before.config
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True))
    assert [row["step"] for row in read_log(out / "log.csv")] == ["1", "2"] and (out / "loss.png").exists()


def test_mistakes_of_the_command(checkpoint: Path, clips: Path, tmp_path: Path, capsys):
    flags = [
        "train",
        "--task",
        "t2v-A14B",
        "--ckpt_dir",
        checkpoint,
        "--dataset_base_path",
        clips,
        "--output_path",
        tmp_path / "out",
        "--num_frames",
        5,
    ]
    for more, expected in (
        (["--width", 32, "--height", 32], "--expert high or --expert low"),
        (["--expert", "low", "--width", 30, "--height", 32], "multiples of 16"),
        (["--expert", "only"], "has no expert 'only'"),
        (["--expert", "low", "--min_timestep_boundary", 0.1], "Give both"),
    ):
        assert main([*map(str, [*flags, *more])]) == 2
        assert expected in capsys.readouterr().err
