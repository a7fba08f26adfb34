"""A tiny decoder for previews from a file."""

from __future__ import annotations

from math import isqrt
from pathlib import Path

import torch

from ..errors import WanError
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..layouts.prefixes import find_places, only_place
from ..models.vae.taehv import STAGES, TinyConfig, TinyDecoder, published_key
from .build import load_strict


def load_tiny_decoder(path: str | Path, channels: int) -> TinyDecoder:
    """A decoder in float32 on the CPU, checked to be one of latents with so many channels.

    Raises:
        WanError: not a checkpoint, other layers than a TAEHV's, or made for another latent space.
    """
    checkpoint = open_checkpoint(path)
    names = _names(checkpoint)
    config = _read_config(checkpoint, names)
    if config.channels != channels:
        raise WanError(
            f"{checkpoint.path.name} decodes latents of {config.channels} channels, expected {channels}: "
            "taew2_1 is for the 14B models, taew2_2 for the 5B."
        )
    with torch.device("meta"):
        decoder = TinyDecoder(config)
    theirs = {key: names.get(published_key(key)) for key in decoder.state_dict()}
    names = {key: name for key, name in theirs.items() if name}
    return load_strict(decoder, checkpoint, names, dtype=torch.float32).eval().requires_grad_(False)


def _names(checkpoint: Checkpoint) -> dict[str, str]:
    """The published key -> the file's, in which a wrapper or a program may have put words before it."""
    marks = {"taehv": ((published_key("enter.weight"),), (published_key("leave.weight"),))}
    place = only_place(find_places(checkpoint.tensors, marks), checkpoint.path, "tiny decoders")
    return dict(place.keys) if place else {}


def _read_config(checkpoint: Checkpoint, names: dict[str, str]) -> TinyConfig:
    try:
        shape_of = {key: checkpoint.tensors[theirs].shape for key, theirs in names.items()}
        shapes = [shape_of[published_key(f"stages.{stage}.grow.weight")] for stage in range(STAGES)]
        channels = shape_of[published_key("enter.weight")][1]
        colours, last = shape_of[published_key("leave.weight")][:2]
        patch, grow = isqrt(colours // 3), tuple(outside // inside for outside, inside, *_ in shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise WanError(
            f"{checkpoint.path.name} is no TAEHV decoder: its layers do not fit ({error}). "
            "Expected taew2_1 or taew2_2 as published, .safetensors or .pth."
        ) from None
    return TinyConfig(channels, (*(shape[1] for shape in shapes), last), grow, patch)
