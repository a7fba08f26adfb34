"""A VAE from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch

from ..config import VAEConfig, VAEKind
from ..dtypes import resolve_dtype
from ..files.checkpoint import Checkpoint
from ..layouts import vae as vae_files
from ..layouts.detect import find
from ..models.vae.vae import VideoVAE
from ..models.vae.wan21 import Wan21VAE
from ..models.vae.wan22 import Wan22VAE
from .build import load_strict
from .file import ModelFile, Understood, read_file

VAE_CLASSES: dict[VAEKind, Callable[[VAEConfig], VideoVAE]] = {"wan2.1": Wan21VAE, "wan2.2": Wan22VAE}


VAEFile: TypeAlias = ModelFile[VAEConfig]


def read_vae(path: str | Path) -> VAEFile:
    """Read a VAE's header.

    Raises:
        WanError: not there, damaged, or something else than a Wan VAE.
    """
    return read_file(path, understand_vae)


def understand_vae(checkpoint: Checkpoint) -> Understood[VAEConfig]:
    """Dimensions; our key -> the checkpoint's for every tensor of the VAE; and what to say of the rest.

    Raises:
        WanError: see ``read_vae``.
    """
    found = find("vae", checkpoint)
    config = vae_files.read_config({own: checkpoint.tensors[theirs].shape for own, theirs in found.names.items()})
    with torch.device("meta"):
        wanted = VAE_CLASSES[config.kind](config).state_dict().keys()
    names, notes = found.fit(wanted, checkpoint)
    return config, names, notes


def build_vae(file: VAEFile, *, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None) -> VideoVAE:
    """The VAE with its weights on the device; arguments as in ``load_vae``."""
    with torch.device("meta"):
        vae = VAE_CLASSES[file.config.kind](file.config)
    dtype = resolve_dtype(dtype, device, file.checkpoint.dtype)
    load_strict(vae, file.checkpoint, file.names, device=device, dtype=dtype)
    return vae


def load_vae(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> VideoVAE:
    """Load the Wan2.1- or the Wan2.2-VAE, whichever the file holds, in any of its layouts.

    Args:
        path: ``Wan2.1_VAE.pth``, ``Wan2.2_VAE.pth``, a safetensors file of either, or diffusers' ``vae/`` folder.
        dtype: to compute in; None means bfloat16 where the device is fast in it, else float32.

    Raises:
        WanError: no such file, a broken one, one without a Wan VAE, or one with missing or unexpected tensors.
    """
    return build_vae(read_vae(path), device=device, dtype=dtype)
