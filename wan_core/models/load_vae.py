"""A VAE from a file."""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoint import vae as vae_files
from ..checkpoint.build import load_strict
from ..checkpoint.read import Checkpoint, open_checkpoint
from ..config import VAEConfig, VAEKind
from ..dtypes import resolve_dtype
from ..errors import WanError
from .vae import VideoVAE
from .vae21 import Wan21VAE
from .vae22 import Wan22VAE

VAE_CLASSES: dict[VAEKind, type[VideoVAE]] = {"wan2.1": Wan21VAE, "wan2.2": Wan22VAE}


def load_vae(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> VideoVAE:
    """Load the Wan2.1- or the Wan2.2-VAE, whichever the file holds, in any of its layouts.

    Args:
        path: ``Wan2.1_VAE.pth``, ``Wan2.2_VAE.pth``, a safetensors file of either, or diffusers' ``vae/`` folder.
        dtype: to compute in; None chooses by the device and the file.

    Raises:
        WanError: no such file, a broken one, one without a Wan VAE, or one with missing or unexpected tensors.
    """
    checkpoint = open_checkpoint(path)
    names, config = read_vae_header(checkpoint)
    with torch.device("meta"):
        vae = VAE_CLASSES[config.kind](config)
    return load_strict(vae, checkpoint, names, device=device, dtype=resolve_dtype(dtype, device, checkpoint.dtype))


def read_vae_header(checkpoint: Checkpoint) -> tuple[dict[str, str], VAEConfig]:
    """Our key -> the file's key, and the dimensions, without reading weights."""
    dialect = vae_files.recognise(checkpoint.tensors)
    if dialect is None:
        raise WanError(f"{checkpoint.path} holds no Wan VAE: expected Wan2.1_VAE.pth, Wan2.2_VAE.pth, "
                       "wan_2.1_vae.safetensors, wan2.2_vae.safetensors or diffusers' vae folder.")
    names = vae_files.names(checkpoint, dialect)
    return names, vae_files.read_config({own: checkpoint.tensors[theirs].shape for own, theirs in names.items()})
