"""The contenders, each built from one state dict (our key names), whose tensors they all share.

Every DiT is called as ours is, ``(x, t, context) -> velocity``, and every VAE as ours, on normalised latents; so one
input serves all, and their answers can be compared.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from wan_core.config import Architecture, VAEConfig
from wan_core.layouts.dit import DIALECTS as DIT_DIALECTS
from wan_core.layouts.dit import diffusers_config as dit_diffusers_config
from wan_core.layouts.vae import DIALECTS as VAE_DIALECTS
from wan_core.layouts.vae import diffusers_config as vae_diffusers_config
from wan_core.layouts.vae import diffusers_dialect
from wan_core.loading.vae import VAE_CLASSES
from wan_core.models.dit.dit import WanDiT
from wan_core.models.vae.vae import LATENT_MEAN, LATENT_STD

Weights = Mapping[str, torch.Tensor]
DiTCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

OURS, PREPARED, DIFFUSERS, COMFYUI = "ours", "ours, text prepared", "diffusers", "comfyui"


@dataclass(frozen=True)
class Coder:
    """A VAE's two directions: video in -1..1 <-> normalised latent."""

    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]


def random_weights(module: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values for a module on the meta device that keep activations near 1, with every part doing something."""
    torch.manual_seed(seed)
    return {key: _random_weight(key, slot.shape) for key, slot in module.state_dict().items()}


def _random_weight(key: str, shape: torch.Size) -> torch.Tensor:
    noise = torch.empty(shape).uniform_(-1.7, 1.7)  # variance 1
    if "norm" in key or key.endswith("gamma"):
        return noise.mul_(0.1).add_(0 if key.endswith("bias") else 1)
    if key.endswith(("bias", "modulation")):
        return noise.mul_(0.1)
    small = 0.2 if "decoder.head" in key else 1  # pixels stay within -1..1, where clamping hides nothing
    return noise.mul_(small / max(shape[1:].numel(), 1) ** 0.5)


def dit_weights(config: Architecture) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        module = WanDiT(config)
    return random_weights(module)


def vae_weights(config: VAEConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        module = VAE_CLASSES[config.kind](config)
    return random_weights(module)


def _our_dit(config: Architecture, weights: Weights) -> WanDiT:
    with torch.device("meta"):
        dit = WanDiT(config)
    return _filled(dit, weights)


def _prepared_dit(config: Architecture, weights: Weights) -> DiTCall:
    """Ours as sampling uses it: a prompt's keys and values are computed in the first call and kept."""
    dit, states = _our_dit(config, weights), {}

    def call(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if id(context) not in states:
            states[id(context)] = dit.text_states(context)
        return dit(x, t, states[id(context)])

    return call


def _diffusers_dit(config: Architecture, weights: Weights) -> DiTCall:
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    with init_empty_weights(include_buffers=False):
        dit = WanTransformer3DModel(**_arguments(dit_diffusers_config(config)))
    renames = DIT_DIALECTS["diffusers"]
    _filled(dit, {renames.to_theirs(key): tensor for key, tensor in weights.items()})
    return lambda x, t, context: dit(x, t, context, return_dict=False)[0]


def _comfyui_dit(config: Architecture, weights: Weights) -> DiTCall:
    use_comfyui()
    import comfy.ops  # noqa: TID251
    from comfy.ldm.wan.model import WanModel  # noqa: TID251

    with torch.device("meta"):
        dit = WanModel(
            in_dim=config.in_channels,
            out_dim=config.out_channels,
            dim=config.dim,
            ffn_dim=config.ffn_dim,
            freq_dim=config.freq_dim,
            text_dim=config.text_dim,
            num_heads=config.heads,
            num_layers=config.layers,
            eps=config.eps,
            operations=comfy.ops.disable_weight_init,
        )
    return _filled(dit, weights)


def _our_vae(config: VAEConfig, weights: Weights) -> Coder:
    with torch.device("meta"):
        vae = VAE_CLASSES[config.kind](config)
    _filled(vae, weights)
    return Coder(vae.encode, vae.decode)


def _diffusers_vae(config: VAEConfig, weights: Weights) -> Coder:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLWan

    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKLWan(**_arguments(vae_diffusers_config(config)))
    renames = VAE_DIALECTS[diffusers_dialect(config.kind)]
    _filled(vae, {renames.to_theirs(key): tensor for key, tensor in weights.items()})
    mean, std = _statistics(config, weights)
    return Coder(
        lambda video: (vae.encode(video, return_dict=False)[0].mode() - mean) / std,
        lambda latent: vae.decode(latent * std + mean, return_dict=False)[0],
    )


def _comfyui_vae(config: VAEConfig, weights: Weights) -> Coder:
    use_comfyui()
    with torch.device("meta"):
        vae = _comfyui_vae_module(config)
    _filled(vae, weights)
    mean, std = _statistics(config, weights)
    return Coder(
        lambda video: (vae.encode(video) - mean) / std, lambda latent: vae.decode(latent * std + mean).clamp_(-1, 1)
    )


def _comfyui_vae_module(config: VAEConfig) -> nn.Module:
    from comfy.ldm.wan import vae, vae2_2  # noqa: TID251

    common = {
        "z_dim": config.channels,
        "dim_mult": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "temperal_downsample": [False, True, True],
    }
    if config.kind == "wan2.1":
        return vae.WanVAE(dim=config.encoder_dim, **common)
    return vae2_2.WanVAE(dim=config.encoder_dim, dec_dim=config.decoder_dim, **common)


DITS: dict[str, Callable[[Architecture, Weights], DiTCall]] = {
    OURS: _our_dit,
    PREPARED: _prepared_dit,
    DIFFUSERS: _diffusers_dit,
    COMFYUI: _comfyui_dit,
}
VAES: dict[str, Callable[[VAEConfig, Weights], Coder]] = {
    OURS: _our_vae,
    DIFFUSERS: _diffusers_vae,
    COMFYUI: _comfyui_vae,
}


def use_comfyui() -> None:
    """Make ComfyUI's modules importable and fast on a CPU, where it would choose a slower attention by itself.

    ComfyUI comes first on sys.path because both it and this repository have a module ``nodes``.
    """
    root = os.environ.get("COMFYUI_PATH", "")
    if not (Path(root) / "comfy").is_dir():
        raise SystemExit("The benchmark compares with ComfyUI: set COMFYUI_PATH to its folder.")
    if root not in sys.path:
        sys.path.insert(0, root)
    from comfy.cli_args import args  # noqa: TID251 - ComfyUI parses no command line unless asked

    args.cpu = not torch.cuda.is_available()
    args.use_pytorch_cross_attention = True


def _filled(module: nn.Module, weights: Weights) -> nn.Module:
    module.load_state_dict(weights, strict=True, assign=True)
    module.to(next(iter(weights.values())).device)  # buffers that no file has, such as tables of rotations
    return module.eval().requires_grad_(False)


def _arguments(config: dict) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _statistics(config: VAEConfig, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel, as the weights are stored."""
    like = weights["conv2.weight"]
    mean, std = (torch.tensor(values[config.kind]).to(like) for values in (LATENT_MEAN, LATENT_STD))
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)
