"""Graphs in the API format, built as a person wires them; and what comes out of them, read back.

``g.add("Node", input=value)`` returns an `Out`; ``out`` is the node's first output, ``out[1]`` its second.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import av
import torch
from comfy_server import Client, Run, Server
from safetensors.torch import load_file

VAES = {"t2v": "wan_2.1_vae.safetensors", "i2v": "wan_2.1_vae.safetensors", "ti2v": "wan2.2_vae.safetensors"}
DENSE = "wan2.2_ti2v_5B_fp16.safetensors"
TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"


class Out(NamedTuple):
    """One output of a node."""

    node: str
    slot: int = 0

    def at(self, slot: int) -> Out:
        return Out(self.node, slot)


@dataclass
class Graph:
    """A growing prompt."""

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, class_type: str, **inputs: Any) -> Out:
        node = str(len(self.nodes) + 1)
        links = {k: [v.node, v.slot] if isinstance(v, Out) else v for k, v in inputs.items()}
        self.nodes[node] = {"class_type": class_type, "inputs": links}
        return Out(node)

    def set(self, out: Out, **inputs: Any) -> None:
        self.nodes[out.node]["inputs"] |= {k: [v.node, v.slot] if isinstance(v, Out) else v for k, v in inputs.items()}


def expert(task: str, noise: str) -> str:
    return f"wan2.2_{task}_{noise}_noise_14B_fp8_scaled.safetensors"


def load(g: Graph, name: str, **options: Any) -> Out:
    return g.add("WanCoreLoadModel", **{"model_name": name, "dtype": "float32", "attention": "auto"} | options)


def model(g: Graph, task: str, **switch: Any) -> Out:
    """The whole model of a task: both experts joined, or the dense one."""
    if task == "ti2v":
        return load(g, DENSE)
    high, low = (load(g, expert(task, noise)) for noise in ("high", "low"))
    return g.add("WanCoreExpertSwitch", **{"high": high, "low": low, "mode": "auto", "boundary": 0.875} | switch)


def clip(g: Graph) -> Out:
    return g.add("WanCoreLoadTextEncoder", text_encoder_name=TEXT_ENCODER, dtype="float32", device="default")


def prompts(g: Graph, encoder: Out | None = None) -> dict[str, Out]:
    encoder = encoder or clip(g)
    texts = {"positive": "A white cat on a surfboard", "negative": "blurry"}
    return {side: g.add("CLIPTextEncode", clip=encoder, text=text) for side, text in texts.items()}


def vae(g: Graph, task: str) -> Out:
    return g.add("WanCoreLoadVAE", vae_name=VAES[task], dtype="float32")


def empty(g: Graph, m: Out, width: int = 64, height: int = 64, frames: int = 5, batch_size: int = 1) -> Out:
    return g.add("WanCoreEmptyLatent", model=m, width=width, height=height, frames=frames, batch_size=batch_size)


def sample(g: Graph, m: Out, sides: dict[str, Out], latent: Out, **settings: Any) -> Out:
    defaults = {
        "seed": 7,
        "steps": 3,
        "cfg_high": 2.0,
        "cfg_low": 3.0,
        "shift": 5.0,
        "solver": "unipc",
        "schedule": "auto",
        "denoise": 1.0,
        "start_step": 0,
        "end_step": 10000,
        "add_noise": True,
    }
    return g.add("WanCoreSampler", **{"model": m, "latent": latent} | sides | defaults | settings)


def decode(g: Graph, v: Out, latent: Out) -> Out:
    return g.add("WanCoreVAEDecode", vae=v, samples=latent)


def save_video(g: Graph, images: Out, fps: float = 16.0) -> Out:
    video = g.add("CreateVideo", images=images, fps=fps)
    return g.add("SaveVideo", video=video, filename_prefix="video/test", format="mp4", codec="h264")


def save_latent(g: Graph, latent: Out, name: str) -> Out:
    return g.add("SaveLatent", samples=latent, filename_prefix=f"latents/{name}")


def photograph(g: Graph) -> Out:
    return g.add("LoadImage", image="example.png")


class Video(NamedTuple):
    frames: int
    width: int
    height: int
    fps: float


def read_video(client: Client, run: Run) -> Video:
    """The one video that a run saved, decoded frame by frame."""
    (file,) = [file for file in run.files if file["filename"].endswith(".mp4")]
    with av.open(io.BytesIO(client.download(file))) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return Video(len(frames), stream.width, stream.height, float(stream.average_rate))


def read_latent(server: Server, name: str) -> torch.Tensor:
    """The newest latent that SaveLatent wrote under a name."""
    return load_file(sorted(Path(server.base, "output/latents").glob(f"{name}_*.latent"))[-1])["latent_tensor"]


def loads(server: Server) -> int:
    """How often the engine has read weights, by the server's log."""
    return server.said().count("wan_core: loaded ")
