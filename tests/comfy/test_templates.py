"""ComfyUI's official Wan2.2 templates with only their loaders and samplers replaced by ours.

The small checkpoints bear the names that the templates ask for, so that each template also runs as it is; where it
samples with euler, the replaced one must end in the same latent (1e-3 of the largest value: two implementations of the
network in float32). Sizes and numbers of steps are lowered, and pictures that do not come with the package are replaced
by ComfyUI's example. ComfyUI builds the Wan2.2-VAE in its real width whatever the file, so that the small one is loaded
by our node in both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_server import Client, Server

from tests.comfy import graphs as wan
from tests.comfy import templates
from tests.comfy.graphs import Video
from tests.comfy.templates import Api

SIZE, FRAMES, STEPS = (64, 64), 5, 4
SUBGRAPHED = "03_video_wan2_2_14B_i2v_subgraphed"  # packages of ComfyUI 0.33 have only an i2v that is so itself
PAIRS = (
    "video_wan2_2_14B_t2v",
    "video_wan2_2_14B_i2v",
    "video_wan2_2_14B_flf2v",
    *([SUBGRAPHED] if templates.exists(SUBGRAPHED) else []),
)
DENSE = "video_wan2_2_5B_ti2v"
WITH_EASYCACHE = "video_hunyuan_video_1.5_720p_t2v"  # ComfyUI has no template of Wan2.2 with it; its node is taken


# --- the templates as they are


def template(client: Client, name: str, *, image: bool = False) -> Api:
    """A template in the API format at a small size; ``image`` turns on what it loads but bypasses."""
    workflow = templates.read(name)
    if image:
        for node in workflow["nodes"]:
            node["mode"] = 0 if node["type"] == "LoadImage" else node.get("mode", 0)
    graph = templates.to_api(workflow, client.object_info())
    for id in of_type(graph, "PrimitiveBoolean"):  # the way with the 4-step LoRA, which older templates go by default
        graph[id]["inputs"]["value"] = True
    return small(templates.settled(graph))


def small(graph: Api) -> Api:
    for node in graph.values():
        inputs = node["inputs"]
        if {"width", "height", "length"} <= inputs.keys():
            inputs |= {"width": SIZE[0], "height": SIZE[1], "length": FRAMES}
        if "start_at_step" in inputs:
            scale = STEPS / inputs["steps"]
            inputs |= {
                "start_at_step": int(inputs["start_at_step"] * scale),
                "end_at_step": min(STEPS, int(inputs["end_at_step"] * scale)),
            }
        if "steps" in inputs:
            inputs["steps"] = STEPS
        if node["class_type"] == "LoadImage":
            inputs["image"] = "example.png"
        if inputs.get("vae_name") == wan.VAES["ti2v"]:
            node |= {"class_type": "WanCoreLoadVAE", "inputs": inputs | {"dtype": "float32"}}
    return graph


# --- replacing


def of_type(graph: Api, kind: str) -> list[str]:
    return [id for id, node in graph.items() if node["class_type"] == kind]


def chain(graph: Api, sampler: str) -> dict[str, str]:
    """What makes a sampler's model: class -> id, from the sampler back to the loader."""
    found, id = {}, sampler
    while "model" in graph[id]["inputs"]:
        id = graph[id]["inputs"]["model"][0]
        found[graph[id]["class_type"]] = id
    return found


def stages(graph: Api) -> list[str]:
    """The two samplers of a pair, high noise first."""
    return sorted(of_type(graph, "KSamplerAdvanced"), key=lambda id: graph[id]["inputs"]["start_at_step"])


def our_loader(graph: Api, made: dict[str, str]) -> str:
    """Load Wan Model, and Wan LoRA if the template has a LoRA, in the place of ComfyUI's; returns the last node."""
    loader, lora = made["UNETLoader"], made.get("LoraLoaderModelOnly")
    name = graph[loader]["inputs"]["unet_name"]
    graph[loader] = {
        "class_type": "WanCoreLoadModel",
        "inputs": {"model_name": name, "dtype": "float32", "attention": "auto"},
    }
    if not lora:
        return loader
    given = graph[lora]["inputs"]
    strength = given["strength_model"]
    graph[lora] = {
        "class_type": "WanCoreLora",
        "inputs": {
            "model": [loader, 0],
            "lora_name": given["lora_name"],
            "strength_high": strength,
            "strength_low": strength,
            "low_name": given["lora_name"],
            "first_step": 0,
            "last_step": 10000,
        },
    }
    return lora


def their_loader(graph: Api, made: dict[str, str]) -> str:
    """ComfyUI's loader and LoRA stay; what they make comes over to us."""
    last = made.get("LoraLoaderModelOnly", made["UNETLoader"])
    graph[f"from_{last}"] = {"class_type": "WanCoreFromModel", "inputs": {"model": [last, 0]}}
    return f"from_{last}"


def join(graph: Api, load: Callable[[Api, dict[str, str]], str]) -> tuple[str, str]:
    """Both experts as one; returns the switch, and the ModelSamplingSD3 of the first sampler, the only one kept."""
    first, second = stages(graph)
    chains = [chain(graph, sampler) for sampler in (first, second)]
    high, low = (load(graph, made) for made in chains)
    graph["switch"] = {
        "class_type": "WanCoreExpertSwitch",
        "inputs": {
            "high": [high, 0],
            "low": [low, 0],
            "mode": "step",
            "boundary": graph[second]["inputs"]["start_at_step"],
        },
    }
    del graph[chains[1]["ModelSamplingSD3"]]
    return "switch", chains[0]["ModelSamplingSD3"]


def one_sampler(graph: Api, node: dict[str, Any]) -> None:
    """In the place of both."""
    first, second = stages(graph)
    graph[first] = node
    del graph[second]
    for other in graph.values():
        for name, value in other["inputs"].items():
            if value == [second, 0]:
                other["inputs"][name] = [first, 0]


def kept(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: inputs[name] for name in names}


def with_ksampler(graph: Api) -> None:
    """Our loaders, one MODEL, and one KSampler."""
    inputs = graph[stages(graph)[0]]["inputs"]
    switch, shifted = join(graph, our_loader)
    graph["one"] = {"class_type": "WanCoreToModel", "inputs": {"model": [switch, 0], "shift": 1.0}}
    graph[shifted]["inputs"]["model"] = ["one", 0]
    same = kept(inputs, "positive", "negative", "latent_image", "steps", "cfg", "sampler_name", "scheduler")
    one_sampler(
        graph,
        {
            "class_type": "KSampler",
            "inputs": {**same, "model": [shifted, 0], "seed": inputs["noise_seed"], "denoise": 1.0},
        },
    )


def with_our_sampler(graph: Api, load: Callable[[Api, dict[str, str]], str] = our_loader) -> None:
    inputs = graph[stages(graph)[0]]["inputs"]
    switch, shifted = join(graph, load)
    shift = graph.pop(shifted)["inputs"]["shift"]
    one_sampler(graph, our_sampler(inputs, [switch, 0], shift, inputs["noise_seed"]))


def our_sampler(inputs: dict[str, Any], model: list, shift: float, seed: int) -> dict[str, Any]:
    solver = {"uni_pc": "unipc"}.get(inputs["sampler_name"], inputs["sampler_name"])
    return {
        "class_type": "WanCoreSampler",
        "inputs": {
            **kept(inputs, "positive", "negative", "steps"),
            "latent": inputs["latent_image"],
            "model": model,
            "seed": seed,
            "cfg_high": inputs["cfg"],
            "cfg_low": inputs["cfg"],
            "shift": shift,
            "solver": solver,
            "schedule": inputs["scheduler"],
            "denoise": 1.0,
            "start_step": 0,
            "end_step": 10000,
            "add_noise": True,
        },
    }


def with_their_loaders(graph: Api) -> None:
    with_our_sampler(graph, their_loader)


REPLACED = {"KSampler": with_ksampler, "Wan Sampler": with_our_sampler, "native loaders": with_their_loaders}


# --- running


def run(client: Client, server: Server, graph: Api, name: str, fps: int) -> torch.Tensor:
    """The latent before it is decoded; the video is there, and as it should be."""
    (decode,) = of_type(graph, "VAEDecode")
    graph["latent"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": graph[decode]["inputs"]["samples"], "filename_prefix": f"latents/{name}"},
    }
    done = client.run(graph)
    assert done.ok, done.error
    assert wan.read_video(client, done) == Video(FRAMES, *SIZE, fps)
    latent = wan.read_latent(server, name)
    assert torch.isfinite(latent).all() and latent.std() > 0.1
    return latent


@pytest.fixture(scope="module")
def as_they_are(server: Server) -> Callable[[str], torch.Tensor]:
    """name -> the latent that the untouched template ends in."""
    known: dict[str, torch.Tensor] = {}

    def latent(name: str) -> torch.Tensor:
        if name not in known:
            client = Client(server.url, server.check)
            known[name] = run(client, server, template(client, name), f"template_plain_{name}", 16)
        return known[name]

    return latent


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(client: Client, server: Server, as_they_are: Callable, name: str, how: str) -> None:
    graph = template(client, name)
    REPLACED[how](graph)
    mark = f"template_{how.replace(' ', '')}_{name}"
    assert_same(run(client, server, graph, mark, 16), as_they_are(name))


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_dense(client: Client, server: Server, image: bool, cached: bool) -> None:
    """UniPC of ComfyUI through our MODEL equals that over its own; with EasyCache too, as another template sets it."""
    latents = []
    for which in ("theirs", "ours"):
        graph = template(client, DENSE, image=image)
        (sampler,) = of_type(graph, "KSampler")
        made = chain(graph, sampler)
        if which == "ours":
            graph["one"] = {
                "class_type": "WanCoreToModel",
                "inputs": {"model": [our_loader(graph, made), 0], "shift": 1.0},
            }
            graph[made["ModelSamplingSD3"]]["inputs"]["model"] = ["one", 0]
        if cached:
            graph["cache"] = easycache(client)
            graph["cache"]["inputs"]["model"] = graph[sampler]["inputs"]["model"]
            graph[sampler]["inputs"] |= {"model": ["cache", 0], "steps": 2 * STEPS}
        latents.append(run(client, server, graph, f"template_dense_{which}_{image}_{cached}", 24))
    assert_same(*latents)


def test_dense_with_our_sampler(client: Client, server: Server) -> None:
    graph = template(client, DENSE)
    (sampler,) = of_type(graph, "KSampler")
    made, inputs = chain(graph, sampler), graph[sampler]["inputs"]
    shift = graph.pop(made["ModelSamplingSD3"])["inputs"]["shift"]
    graph[sampler] = our_sampler(inputs, [our_loader(graph, made), 0], shift, inputs["seed"])
    run(client, server, graph, "template_dense_sampler", 24)


def easycache(client: Client) -> dict[str, Any]:
    """The node as ComfyUI's template sets it; there it is bypassed until somebody wants it."""
    node = next(node for node in templates.nodes_of(templates.read(WITH_EASYCACHE)) if node["type"] == "EasyCache")
    alone = {"nodes": [copy.deepcopy(node) | {"mode": 0, "inputs": []}], "links": []}
    (made,) = templates.to_api(alone, client.object_info()).values()
    return made
