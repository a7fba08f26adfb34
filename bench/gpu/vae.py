"""Decoding at the real widths: ours, diffusers and ComfyUI; then whole clips by ours, in one piece and in tiles."""

from __future__ import annotations

from functools import partial

import torch

from wan_core.config import VAEConfig
from wan_core.loading.vae import VAE_CLASSES
from wan_core.memory.activations import vae_budget
from wan_core.memory.budget import GB
from wan_core.models.vae.tiles import Tiles, decode_tiled_chunks
from wan_core.models.vae.vae import VideoVAE

from .. import peers
from .card import Card, relative

WIDE = {
    "Wan2.1": (VAEConfig("wan2.1", 16, 96, 96), (480, 832)),
    "Wan2.2": (VAEConfig("wan2.2", 48, 160, 256), (704, 1280)),
}
SMALL = {"Wan2.1": (VAEConfig("wan2.1", 16, 16, 16), (32, 48)), "Wan2.2": (VAEConfig("wan2.2", 48, 16, 32), (32, 64))}
CLIPS = {"Wan2.1": (21, 720, 1280), "Wan2.2": (31, 704, 1280)}


def rows(card: Card) -> dict:
    found = {}
    for name, (config, (height, width)) in (SMALL if card.quick else WIDE).items():
        found |= compete(card, name, config, height, width)
        card.clear()
        if not card.quick:
            found |= clips(card, name, config)
            card.clear()
    return found


def weights_of(card: Card, config: VAEConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        vae = VAE_CLASSES[config.kind](config)
    return card.weights(vae, dtype)


def compete(card: Card, name: str, config: VAEConfig, height: int, width: int) -> dict:
    """17 frames, both directions, in float32 (what the official pipelines use) and half precision."""
    found, stride = {}, {"wan2.1": 8, "wan2.2": 16}[config.kind]
    for dtype in (torch.float32, torch.bfloat16) if card.is_cuda else (torch.float32,):
        weights = weights_of(card, config, dtype)
        coders = {contender: peers.VAES[contender](config, weights) for contender in peers.VAES}
        latent = card.randn(1, config.channels, 5, height // stride, width // stride, dtype=torch.float32)
        calls = {contender: partial(coder.decode, latent.to(dtype)) for contender, coder in coders.items()}
        answers = {contender: call() for contender, call in calls.items()}
        peaks = {contender: card.peak_gb(call) for contender, call in calls.items()}
        times = card.interleaved(calls, 3, 0)
        for contender, seconds in times.items():
            found[f"{name} decode, {width}x{height}x17, {str(dtype)[6:]}, {contender}"] = {
                "seconds": seconds,
                "ours_over_it": times[peers.OURS] / seconds,
                "peak_gb": peaks[contender],
                "difference": relative(answers[contender], answers[peers.OURS]),
            }
        del coders, calls, answers
        card.clear()
    return found


def clips(card: Card, name: str, config: VAEConfig) -> dict:
    """A whole clip, streamed; its peak beside what the planner says."""
    frames, height, width = CLIPS[name]
    stride, found = {"wan2.1": 8, "wan2.2": 16}[config.kind], {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            vae = VAE_CLASSES[config.kind](config)
        vae.load_state_dict(weights_of(card, config, dtype), assign=True)
        vae.eval().requires_grad_(False)
        latent = card.randn(1, config.channels, frames, height // stride, width // stride, dtype=torch.float32)
        ways = {
            "whole": (partial(whole, vae, latent), (height, width)),
            "in tiles of 512": (partial(tiled, vae, latent.cpu()), (512, 512)),
        }
        for way, (call, side) in ways.items():
            if way != "whole" and dtype == torch.float32:
                continue
            peak = card.peak_gb(call)
            found[f"{name} decode, {width}x{height}x{4 * frames - 3}, {str(dtype)[6:]}, {way}"] = {
                "seconds": card.seconds(call, 1, 0),
                "peak_gb": peak,
                "planned_gb": vae_budget(config, *side, dtype).activations / GB,
            }
            card.clear()
    return found


def whole(vae: VideoVAE, latent: torch.Tensor) -> None:
    for _ in vae.decode_chunks(latent):
        pass


def tiled(vae: VideoVAE, latent: torch.Tensor) -> None:
    for _ in decode_tiled_chunks(vae, latent, Tiles.square(512)):
        pass
