"""Wan from ComfyUI MODEL: models that ComfyUI loaded do in our nodes what those of our own loader do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from comfy_server import Client, Server
from safetensors.torch import load_file, save_file

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out
from tests.core.lora_files import DIALECTS_OF_LORA

RUN = {"seed": 3, "steps": 4, "cfg_high": 2.0, "cfg_low": 3.0}
SIZE = {"width": 64, "height": 32, "frames": 5}


def native(g: Graph, name: str) -> Out:
    return g.add("WanCoreFromModel", model=g.add("UNETLoader", unet_name=name, weight_dtype="default"))


def switch(g: Graph, high: Out, low: Out) -> Out:
    return g.add("WanCoreExpertSwitch", high=high, low=low, mode="auto", boundary=0.875)


def results(client: Client, server: Server, g: Graph, **latents: Out) -> list[torch.Tensor]:
    for name, latent in latents.items():
        wan.save_latent(g, latent, f"reverse_{name}")
    run = client.run(g.nodes)
    assert run.ok, run.error
    return [wan.read_latent(server, f"reverse_{name}") for name in latents]


def assert_same(ours: torch.Tensor, *others: torch.Tensor) -> None:
    """Float32 on both sides, in another order of additions: 1e-4 of the largest value after all steps."""
    assert ours.std() > 0.1
    for other in others:
        assert (other - ours).abs().max() <= 1e-4 * ours.abs().max()


def test_pairs_of_native_own_and_mixed_models_are_equal(client: Client, server: Server) -> None:
    """Also behind Wan as ComfyUI MODEL; the node tells the file that it found, so that swapped experts are noticed."""
    g = Graph()
    files = [wan.expert("t2v", noise) for noise in ("high", "low")]
    own, theirs = [wan.load(g, file) for file in files], [native(g, file) for file in files]
    sides, latent = wan.prompts(g), wan.empty(g, own[0], **SIZE)
    pairs = {
        "own": switch(g, *own),
        "native": switch(g, *theirs),
        "mixed": switch(g, theirs[0], own[1]),
        "other_mixed": switch(g, own[0], theirs[1]),
    }
    made = {name: wan.sample(g, m, sides, latent, **RUN) for name, m in pairs.items()}
    plain = {"solver": "euler", "schedule": "simple", "cfg_high": 2.0, "cfg_low": 2.0}
    made["euler"] = wan.sample(g, pairs["own"], sides, latent, **RUN | plain)
    back = g.add("WanCoreToModel", model=pairs["native"], shift=5.0)
    made["back"] = g.add(
        "KSampler",
        model=back,
        seed=3,
        steps=4,
        cfg=2.0,
        **sides,
        latent_image=latent,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    *four, euler, back = results(client, server, g, **made)
    assert_same(*four)
    assert_same(euler, back)
    swapped = switch(g, theirs[1], theirs[0])
    wan.save_latent(g, wan.sample(g, swapped, sides, latent, **RUN), "reverse_swapped")
    run = client.run(g.nodes)
    assert "seem to be swapped" in run.error, run.error


def test_an_image_reaches_native_models(client: Client, server: Server) -> None:
    """As channels beside the noise, and as a clean first frame with a timestep of its own."""
    g = Graph()
    made, size = {}, {"width": 64, "height": 32, "length": 5, "batch_size": 1}
    for task, name in (("i2v", wan.expert("i2v", "low")), ("ti2v", wan.DENSE)):
        sides, shown = wan.prompts(g), {"vae": wan.vae(g, task), "start_image": wan.photograph(g)}
        if task == "i2v":
            start = g.add("WanImageToVideo", **sides, **shown, **size)
            sides, latent = {"positive": start, "negative": start.at(1)}, start.at(2)
        else:
            latent = g.add("Wan22ImageToVideoLatent", **shown, **size)
        for kind, m in (("own", wan.load(g, name)), ("native", native(g, name))):
            made[f"{task}_{kind}"] = wan.sample(g, m, sides, latent, **RUN)
    channels_own, channels, frame_own, frame = results(client, server, g, **made)
    assert_same(channels_own, channels)
    assert_same(frame_own, frame)


def test_loras_of_comfyui_stay_in_effect(client: Client, server: Server) -> None:
    """On one model once with and once without, as high and low: ComfyUI patches its weights when they change over."""
    folder, file = server.base / "models/loras", wan.expert("t2v", "low")
    folder.mkdir(exist_ok=True)
    models = server.base / "models/diffusion_models"
    copy = Path(shutil.copy(models / file, models / "test_reverse_low_noise.safetensors"))
    weights = load_file(models / file)
    save_file(DIALECTS_OF_LORA["kohya"].make(weights)[0], folder / "test_reverse.safetensors")
    g = Graph()
    lora, own = "test_reverse.safetensors", wan.load(g, file)
    changed = g.add(
        "WanCoreLora",
        model=own,
        lora_name=lora,
        strength_high=0.7,
        strength_low=0.7,
        low_name="none",
        first_step=0,
        last_step=10000,
    )
    sides, latent = wan.prompts(g), wan.empty(g, own, **SIZE)
    loaded = g.add("UNETLoader", unet_name=file, weight_dtype="default")
    patched = g.add("LoraLoaderModelOnly", model=loaded, lora_name=lora, strength_model=0.7)
    pairs = {
        "lora_own": switch(g, changed, wan.load(g, copy.name)),
        "lora_native": switch(g, *(g.add("WanCoreFromModel", model=m) for m in (patched, loaded))),
        "lora_without": own,
    }
    ours, theirs, without = results(
        client, server, g, **{name: wan.sample(g, m, sides, latent, **RUN) for name, m in pairs.items()}
    )
    copy.unlink()
    assert_same(ours, theirs)
    assert (ours - without).abs().max() > 1e-2 * ours.abs().max()


def swapped(g: Graph, m: Out) -> Out:
    return g.add("WanCoreBlockSwap", model=m, blocks=1)


def with_lora(g: Graph, m: Out) -> Out:
    return g.add(
        "WanCoreLora",
        model=m,
        lora_name="test_reverse.safetensors",
        strength_high=1.0,
        strength_low=1.0,
        low_name="none",
        first_step=0,
        last_step=10000,
    )


@pytest.mark.parametrize(("node", "instead"), [(swapped, "--lowvram"), (with_lora, "LoraLoaderModelOnly")])
def test_nodes_that_change_weights_say_what_to_use_instead(client: Client, server: Server, node, instead: str) -> None:
    (server.base / "models/loras").mkdir(exist_ok=True)
    save_file({"x": torch.zeros(1)}, server.base / "models/loras/test_reverse.safetensors")
    g = Graph()
    m = node(g, native(g, wan.expert("t2v", "low")))
    wan.save_latent(g, wan.sample(g, m, wan.prompts(g), wan.empty(g, m, **SIZE)), "reverse_refused")
    run = client.run(g.nodes)
    assert "ComfyUI holds" in run.error and instead in run.error, run.error


def cached(g: Graph, model: Out) -> Out:
    return g.add("EasyCache", model=model, reuse_threshold=0.2, start_percent=0.1, end_percent=0.9, verbose=False)


def rescaled(g: Graph, model: Out) -> Out:
    return g.add("RescaleCFG", model=model, multiplier=0.7)


@pytest.mark.parametrize("patch", [cached, rescaled])
def test_patches_of_comfyuis_sampling_are_refused(client: Client, patch) -> None:
    """They would be left out without a word."""
    g = Graph()
    m = g.add("WanCoreFromModel", model=patch(g, g.add("UNETLoader", unet_name=wan.DENSE, weight_dtype="default")))
    wan.save_latent(g, wan.empty(g, m, **SIZE), "reverse_patched")
    run = client.run(g.nodes)
    assert "Wan Sampler samples by itself" in run.error, run.error


def test_a_shift_is_told_to_be_elsewhere(client: Client) -> None:
    g = Graph()
    loaded = g.add("UNETLoader", unet_name=wan.DENSE, weight_dtype="default")
    m = g.add("WanCoreFromModel", model=g.add("ModelSamplingSD3", model=loaded, shift=8.0))
    wan.save_latent(g, wan.empty(g, m, **SIZE), "reverse_shifted")
    run = client.run(g.nodes)
    assert run.ok, run.error
    (text,) = run.history["outputs"][m.node]["text"]
    assert wan.DENSE in text and "set it on Wan Sampler" in text


def test_models_of_other_kinds_are_named(client: Client, server: Server) -> None:
    """A relative of Wan, by the layers that it has more; and a model that is one of ours already."""
    file = server.base / "models/diffusion_models" / wan.expert("t2v", "low")
    weights = load_file(file)
    wider = torch.zeros(256, 96, 1, 2, 2)
    first = {k: v for k, v in weights.items() if k.startswith("blocks.0.")}
    vace = {f"vace_{k}": v.clone() for k, v in first.items()}
    vace |= {
        f"vace_blocks.0.{side}_proj.{part}": torch.zeros((256, 256) if part == "weight" else 256)
        for side in ("before", "after")
        for part in ("weight", "bias")
    }
    vace |= {"vace_patch_embedding.weight": wider, "vace_patch_embedding.bias": torch.zeros(256)}
    save_file(weights | vace, file.with_name("test_vace.safetensors"))
    for name, expected in (("test_vace.safetensors", "WAN21_Vace"), (None, "connect the WAN_MODEL before")):
        g = Graph()
        own = wan.load(g, file.name)
        model = (
            g.add("UNETLoader", unet_name=name, weight_dtype="default")
            if name
            else g.add("WanCoreToModel", model=own, shift=5.0)
        )
        m = g.add("WanCoreFromModel", model=model)
        wan.save_latent(g, wan.empty(g, m, **SIZE), "reverse_kind")
        run = client.run(g.nodes)
        assert expected in run.error, run.error
