"""Wan LoRA on a real server: the same picture as ComfyUI's own loader makes of the same file, and readable refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfy_server import Client, PromptRejected, Server
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out
from tests.core.lora_files import DIALECTS_OF_LORA

STEPS, SHIFT, SEED = 2, 5.0, 3


@pytest.fixture(scope="module")
def loras(server: Server) -> Path:
    """A pair in ComfyUI's folder, each a LoRA of its own."""
    folder = server.base / "models/loras"
    folder.mkdir(exist_ok=True)
    for seed, (level, dialect) in enumerate((("high", "kohya"), ("low", "lokr_two"))):
        torch.manual_seed(seed)
        weights = load_file(server.base / "models/diffusion_models" / wan.expert("t2v", level))
        save_file(DIALECTS_OF_LORA[dialect].make(weights)[0], folder / f"test_pair_{level}_noise.safetensors")
    return folder


def lora(g: Graph, m: Out, **inputs: object) -> Out:
    given = {
        "lora_name": "test_pair_high_noise.safetensors",
        "strength_high": 0.7,
        "strength_low": 0.7,
        "low_name": "auto",
        "first_step": 0,
        "last_step": 10000,
    }
    return g.add("WanCoreLora", model=m, **given | inputs)


def ours(g: Graph, m: Out, latent: Out, sides: dict[str, Out], **settings: object) -> Out:
    return wan.sample(
        g,
        m,
        sides,
        latent,
        **{
            "seed": SEED,
            "steps": STEPS,
            "shift": SHIFT,
            "cfg_high": 1.0,
            "cfg_low": 1.0,
            "solver": "euler",
            "schedule": "simple",
        }
        | settings,
    )


def results(client: Client, server: Server, g: Graph, **latents: Out) -> list[Tensor]:
    for name, latent in latents.items():
        wan.save_latent(g, latent, f"lora_{name}")
    run = client.run(g.nodes)
    assert run.ok, run.error
    return [wan.read_latent(server, f"lora_{name}") for name in latents]


@pytest.mark.parametrize("level", ["high", "low"])
def test_one_expert_equals_comfyuis_own_loader(client: Client, server: Server, loras: Path, level: str):
    """To 1e-4 of the largest value, as without LoRAs; the LoRA changes more than 1 %."""
    g = Graph()
    plain = wan.load(g, wan.expert("t2v", level))
    latent, sides = wan.empty(g, plain), wan.prompts(g)
    mine = ours(g, lora(g, plain), latent, sides)
    unet = g.add("UNETLoader", unet_name=wan.expert("t2v", level), weight_dtype="default")
    model = g.add(
        "LoraLoaderModelOnly", model=unet, lora_name=f"test_pair_{level}_noise.safetensors", strength_model=0.7
    )
    model = g.add("ModelSamplingSD3", model=model, shift=SHIFT)
    native = g.add(
        "KSampler",
        model=model,
        seed=SEED,
        steps=STEPS,
        cfg=1.0,
        **sides,
        latent_image=latent,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    without = ours(g, plain, latent, sides)
    made = results(client, server, g, mine=mine, native=native, without=without)
    assert (made[0] - made[1]).abs().max() <= 1e-4 * made[1].abs().max()
    assert (made[0] - made[2]).abs().max() > 1e-2 * made[1].abs().max()


def test_a_pair_is_found_placed_and_told(client: Client, server: Server, loras: Path):
    """One node on the pair equals one on each expert with its own file; the node shows the report."""
    g = Graph()
    both = wan.model(g, "t2v", mode="step", boundary=1)
    node = lora(g, both, lora_name="test_pair_low_noise.safetensors")
    high, low = (
        lora(
            g, wan.load(g, wan.expert("t2v", level)), lora_name=f"test_pair_{level}_noise.safetensors", low_name="none"
        )
        for level in ("high", "low")
    )
    joined = g.add("WanCoreExpertSwitch", high=high, low=low, mode="step", boundary=1)
    latent, sides = wan.empty(g, both), wan.prompts(g)
    late = ours(g, lora(g, both, first_step=1), latent, sides)
    names = {"one": ours(g, node, latent, sides), "two": ours(g, joined, latent, sides), "late": late}
    for name, made in names.items():
        wan.save_latent(g, made, f"lora_{name}")
    run = client.run(g.nodes)
    assert run.ok, run.error
    one, two, late = (wan.read_latent(server, f"lora_{name}") for name in names)
    assert torch.equal(one, two) and not torch.equal(one, late)
    report = run.history["outputs"][node.node]["text"][0]
    assert "twin" in report and report.count("keys matched") == 2


def test_a_twin_that_changes_or_goes_is_noticed(client: Client, server: Server, loras: Path):
    """The node names one file of the pair; the other is not among its inputs."""
    pair = [loras / f"test_passing_{level}_noise.safetensors" for level in ("high", "low")]
    for file in pair:
        file.write_bytes((loras / file.name.replace("passing", "pair")).read_bytes())
    g = Graph()
    both = wan.model(g, "t2v")
    node = lora(g, both, lora_name=pair[0].name)
    wan.save_latent(g, ours(g, node, wan.empty(g, both), wan.prompts(g)), "lora_passing")
    assert client.run(g.nodes).ok and client.run(g.nodes).executed == []
    pair[1].write_bytes(pair[0].read_bytes())
    run = client.run(g.nodes)
    assert run.ok and node.node in run.executed, run.error
    pair[1].unlink()
    run = client.run(g.nodes)
    assert run.ok and "no twin" in run.history["outputs"][node.node]["text"][0], run.error


def test_native_samplers_see_it_at_its_steps(client: Client, server: Server, loras: Path):
    """Through Wan as ComfyUI MODEL and KSampler, to 1e-4, with a LoRA that begins at the second step."""
    g = Graph()
    both = wan.model(g, "t2v")
    late = lora(g, both, first_step=1)
    latent, sides = wan.empty(g, both), wan.prompts(g)
    model = g.add("WanCoreToModel", model=late, shift=SHIFT)
    native = g.add(
        "KSampler",
        model=model,
        seed=SEED,
        steps=STEPS,
        cfg=1.0,
        **sides,
        latent_image=latent,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    always = ours(g, lora(g, both), latent, sides)
    mine, native, always = results(client, server, g, mine=ours(g, late, latent, sides), native=native, always=always)
    assert (mine - native).abs().max() <= 1e-4 * native.abs().max()
    assert (mine - always).abs().max() > 1e-2 * native.abs().max()


def test_what_cannot_be_is_refused_before_a_weight_is_read(client: Client, server: Server, loras: Path):
    save_file({"lora_te_text_model_encoder.lora_up.weight": torch.zeros(4, 4)}, loras / "test_clip.safetensors")
    g = Graph()
    m = wan.load(g, wan.expert("t2v", "high"))
    node = lora(g, m, lora_name="test_clip.safetensors", low_name="none")
    wan.save_latent(g, ours(g, node, wan.empty(g, m), wan.prompts(g)), "lora_refused")
    run = client.run(g.nodes)
    assert not run.ok and "changes nothing" in run.error
    g.set(node, first_step=5, last_step=2)
    with pytest.raises(PromptRejected, match="lies before"):
        client.run(g.nodes)
