"""Video autoencoders in files: which dialect, which dimensions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import VAES, VAEConfig, VAEKind
from ..errors import WanError
from ..models.vae.vae import LATENT_MEAN, LATENT_STD, TEMPORAL
from .keys import IDENTITY, Renames, count_blocks, refuse_empty
from .prefixes import Marks, Place, own_names

Shapes = Mapping[str, tuple[int, ...]]

LEVELS = len(TEMPORAL) + 1  # widths of the encoder, and of the decoder
BLOCKS = 2  # residual blocks a level of every published VAE: diffusers' names of the Wan2.1-VAE depend on it

_RESIDUAL = (
    ("norm1", "residual.0"),
    ("conv1", "residual.2"),
    ("norm2", "residual.3"),
    ("conv2", "residual.6"),
    ("conv_shortcut", "shortcut"),
)
_RESAMPLE = (("resample", "resample"), ("time_conv", "time_conv"))


def _below(theirs: str, ours: str, rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{theirs}.{a}", f"{ours}.{b}") for a, b in rows]


def _diffusers_frame() -> list[tuple[str, str]]:
    """What both of diffusers' layouts share: everything but the levels."""
    rows = [("quant_conv", "conv1"), ("post_quant_conv", "conv2")]
    for part in ("encoder", "decoder"):
        rows += _below(
            part,
            part,
            [
                ("conv_in", "conv1"),
                ("norm_out", "head.0"),
                ("conv_out", "head.2"),
                ("mid_block.attentions.0", "middle.1"),
            ],
        )
        rows += _below(f"{part}.mid_block.resnets.0", f"{part}.middle.0", _RESIDUAL)
        rows += _below(f"{part}.mid_block.resnets.1", f"{part}.middle.2", _RESIDUAL)
    return rows


def _diffusers_21() -> list[tuple[str, str]]:
    """The encoder's levels lie in one list in both; the decoder's only in ours."""
    rows = _below("encoder.down_blocks.{a}", "encoder.downsamples.{a}", (*_RESIDUAL, *_RESAMPLE))
    for level in range(LEVELS):
        first = level * (BLOCKS + 2)
        for block in range(BLOCKS + 1):
            theirs, ours = f"decoder.up_blocks.{level}.resnets.{block}", f"decoder.upsamples.{first + block}"
            rows += _below(theirs, ours, _RESIDUAL)
        if level < LEVELS - 1:
            theirs, ours = f"decoder.up_blocks.{level}.upsamplers.0", f"decoder.upsamples.{first + BLOCKS + 1}"
            rows += _below(theirs, ours, _RESAMPLE)
    return rows


def _diffusers_22() -> list[tuple[str, str]]:
    rows = _below("encoder.down_blocks.{a}.resnets.{b}", "encoder.downsamples.{a}.downsamples.{b}", _RESIDUAL)
    rows += _below("encoder.down_blocks.{a}.downsampler", f"encoder.downsamples.{{a}}.downsamples.{BLOCKS}", _RESAMPLE)
    rows += _below("decoder.up_blocks.{a}.resnets.{b}", "decoder.upsamples.{a}.upsamples.{b}", _RESIDUAL)
    rows += _below("decoder.up_blocks.{a}.upsampler", f"decoder.upsamples.{{a}}.upsamples.{BLOCKS + 1}", _RESAMPLE)
    return rows


DIALECTS: dict[str, Renames] = {
    "official": IDENTITY,  # Wan2.1_VAE.pth, Wan2.2_VAE.pth and ComfyUI's safetensors
    "diffusers-2.1": Renames(_diffusers_frame() + _diffusers_21()),
    "diffusers-2.2": Renames(_diffusers_frame() + _diffusers_22()),
}

_BLOCK = "decoder.mid_block.resnets.0.norm1.gamma"
MARKS: Marks = {
    "official": (("encoder.conv1.weight",), ("decoder.middle.0.residual.0.gamma",)),
    "diffusers-2.2": ((_BLOCK,), ("decoder.up_blocks.0.upsampler.resample.1.weight",)),
    "diffusers-2.1": ((_BLOCK,), ("decoder.up_blocks.0.resnets.0.norm1.gamma",)),
}


def diffusers_dialect(kind: VAEKind) -> str:
    """diffusers names the layers of the two autoencoders differently."""
    return {"wan2.1": "diffusers-2.1", "wan2.2": "diffusers-2.2"}[kind]


def names_in(place: Place, path: Path | None = None, outside: Collection[str] = ()) -> dict[str, str]:
    """Our key -> the file's, of one place in it; unknown keys stand for themselves."""
    return own_names(place, DIALECTS[place.dialect])


def read_config(shapes: Shapes) -> VAEConfig:
    """Every dimension of a VAE, from the shapes under our keys.

    Raises:
        WanError: a key or a dimension is missing that tells one.
    """
    kind: VAEKind = "wan2.2" if any(key.startswith("decoder.upsamples.0.upsamples.") for key in shapes) else "wan2.1"
    try:
        refuse_empty(shapes)
        encoder_dim = shapes["encoder.conv1.weight"][0]
        widths, blocks = _encoder_widths(shapes, kind)
        config = VAEConfig(
            kind=kind,
            channels=shapes["conv2.weight"][0],
            encoder_dim=encoder_dim,
            decoder_dim=shapes["decoder.head.0.gamma"][0] * encoder_dim // widths[0],
            multipliers=tuple(width // encoder_dim for width in widths),
            blocks=blocks,
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise WanError(
            f"This looks like the {kind} VAE, but its dimensions cannot be read: {error} is missing. "
            "Is it a partial download, or pruned to its decoder? The whole file is needed."
        ) from error
    _check_config(config, widths)
    return config


def _encoder_widths(shapes: Shapes, kind: VAEKind) -> tuple[list[int], int]:
    """The encoder's width at each level, and the residual blocks of one level."""
    first_resample = "encoder.downsamples.{}.resample.1.weight"
    level = "encoder.downsamples.{}.residual.2.weight"
    if kind == "wan2.2":
        first_resample = "encoder.downsamples.0.downsamples.{}.resample.1.weight"
        level = "encoder.downsamples.{}.downsamples.0.residual.2.weight"
    blocks = _first_index(shapes, first_resample)
    step = 1 if kind == "wan2.2" else blocks + 1
    return [shapes[level.format(i * step)][0] for i in range(LEVELS)], blocks


def _first_index(shapes: Shapes, template: str) -> int:
    """The number of the first resampling layer of a level; every layer before it is there.

    Raises:
        KeyError: one is missing.
    """
    stack = template.partition("{")[0]
    count = count_blocks((key for key in shapes if key.startswith(stack)), stack)
    found = next((i for i in range(count) if template.format(i) in shapes), None)
    if found is None:
        raise KeyError(template.format("*"))
    return found


def _check_config(config: VAEConfig, widths: list[int]) -> None:
    if config.channels != VAES[config.kind].channels:
        raise WanError(
            f"This {config.kind} VAE has latents of {config.channels} channels; the normalisation is known "
            f"for {VAES[config.kind].channels} channels only. Use the official VAE or one of its shape."
        )
    if [config.encoder_dim * m for m in config.multipliers] != widths:
        raise WanError(
            f"The {config.kind} VAE has levels of {widths} channels, which are not multiples of its first "
            f"width {config.encoder_dim}: it is not a Wan VAE that this version knows."
        )
    if any(max(pair) % min(pair) for pair in zip(widths[:-1], widths[1:], strict=True)):
        raise WanError(
            f"The {config.kind} VAE has levels of {widths} channels: expected neighbours to be multiples of "
            "each other. It is not a Wan VAE that this version knows."
        )


def diffusers_config(config: VAEConfig) -> dict[str, Any]:
    """The ``config.json`` of diffusers' AutoencoderKLWan for these dimensions."""
    layout = {"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.35.0"}
    return {**layout, **_dimensions(config), **_PIXELS[config.kind]}


def _dimensions(config: VAEConfig) -> dict[str, Any]:
    return {
        "base_dim": config.encoder_dim,
        "decoder_base_dim": config.decoder_dim,
        "z_dim": config.channels,
        "dim_mult": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "attn_scales": [],
        "temperal_downsample": list(TEMPORAL),
        "dropout": 0.0,
        "latents_mean": list(LATENT_MEAN[config.kind]),
        "latents_std": list(LATENT_STD[config.kind]),
        "scale_factor_temporal": 4,
        "scale_factor_spatial": VAES[config.kind].spatial_stride,
    }


_PIXELS: dict[VAEKind, dict[str, Any]] = {
    "wan2.1": {"is_residual": False, "in_channels": 3, "out_channels": 3, "patch_size": None},
    "wan2.2": {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2},
}
