"""Training of the autoencoders: the whole-clip forward is that of inference, and the run is resumable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nano.dataset import RandomClips
from wan_core.config import VAEConfig
from wan_core.loading.vae import load_vae
from wan_core.models.vae.vae import denormalise
from wan_core.train.data import Frame
from wan_core.train.dit import save_weights
from wan_core.train.loop import Plan, train
from wan_core.train.report import read_log
from wan_core.train.vae import Phase, VAERecipe, VAETask, calibrate, moments, new_vae, pixels, psnr

CONFIGS = [VAEConfig("wan2.1", 16, 4, 4), VAEConfig("wan2.2", 48, 4, 4)]
IDS = ["wan2.1", "wan2.2"]


def random_vae(config: VAEConfig):
    """A model whose every weight does something."""
    vae = new_vae(config, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return vae


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_training_forward_is_inference(config: VAEConfig):
    """One chunk with gradients against the streamed chunks of encode and decode."""
    vae, video = random_vae(config), torch.rand(2, 3, 9, 32, 32) * 2 - 1
    mean, _ = moments(vae, video)
    made = pixels(vae, mean)
    latent = vae.encode(video)
    assert (denormalise(latent, vae.config.kind) - mean).abs().max() < 1e-5 * max(1, mean.abs().max())
    assert (vae.decode(latent) - made.clamp(-1, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_every_weight_gets_the_gradient_of_the_loss(config: VAEConfig):
    """Finite differences in the direction of the gradient."""
    vae, video = random_vae(config), torch.rand(1, 3, 5, 32, 32) * 2 - 1

    def loss() -> torch.Tensor:
        mean, log_variance = moments(vae, video)
        return pixels(vae, mean + 0.1 * log_variance).square().mean()

    value = loss()
    value.backward()
    grads = {name: parameter.grad for name, parameter in vae.named_parameters()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())
    length = sum(grad.square().sum() for grad in grads.values()).sqrt()
    step, values = 2e-3, []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in vae.named_parameters():
                parameter.add_(grads[name] * (sign * step / length))
        values.append(loss().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(length.item(), rel=0.05)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_calibration_changes_the_latent_and_nothing_else(config: VAEConfig):
    vae = random_vae(config).requires_grad_(False)
    videos = [torch.rand(2, 3, 5, 64, 64) * 2 - 1 for _ in range(4)]
    before = vae.decode(vae.encode(videos[0]))
    calibrate(vae, videos)
    after = vae.decode(vae.encode(videos[0]))
    assert (after - before).abs().max() < 1e-3
    latents = torch.cat([vae.encode(video).movedim(1, 0).flatten(1) for video in videos], dim=1)
    assert latents.mean(dim=1).abs().max() < 1e-3 and (latents.std(dim=1) - 1).abs().max() < 1e-3


def a_task(seed: int = 0) -> VAETask:
    phases = (Phase(0.5, 1, 32, 2), Phase(1.0, 5, 32, 1))
    vae = new_vae(CONFIGS[0], seed)
    return VAETask(vae, RandomClips(Frame(32, 32, 5)), "world", VAERecipe(phases, 4, precision="fp32"))


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path):
    plan = Plan(4, 1e-3, optimiser="muon", ema=0.9)
    whole, parts = a_task(), None
    train(whole, plan, tmp_path / "whole")
    finished = False
    while not finished:
        parts = a_task()
        finished = train(parts, plan, tmp_path / "parts", seconds=0)  # one step a call
    assert all(torch.equal(a, b) for a, b in zip(whole.vae.parameters(), parts.vae.parameters(), strict=True))
    assert len(read_log(tmp_path / "parts" / "log.csv")) == 4


def test_what_is_trained_loads(tmp_path: Path):
    task = a_task()
    save_weights(task.vae.state_dict(), tmp_path / "vae.safetensors", "fp16", {})
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    loaded = load_vae(tmp_path / "vae.safetensors", dtype=torch.float32)
    with torch.no_grad():
        assert psnr(loaded.decode(loaded.encode(video)), task.vae.decode(task.vae.encode(video))) > 40


def test_images_are_learnt(tmp_path: Path):
    """From the linear start at about 8 dB to more than 15 in 70 steps."""
    task = VAETask(
        new_vae(VAEConfig("wan2.1", 16, 8, 8), 0),
        RandomClips(Frame(32, 32, 1)),
        "world",
        VAERecipe((Phase(1.0, 1, 32, 4),), 70, precision="fp32"),
    )
    train(task, Plan(70, 4e-3, optimiser="muon", warmup=5), tmp_path)
    values = [float(row["psnr"]) for row in read_log(tmp_path / "log.csv")]
    assert sum(values[-5:]) / 5 > 15 > values[0]
