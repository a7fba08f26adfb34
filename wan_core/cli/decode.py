"""``decode``: a latent that was kept, by ``generate`` or as a file of ComfyUI's, to a video."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import TEMPORAL_STRIDE, VAES, VARIANTS, VAESpec, Variant
from ..errors import WanError
from .arguments import number, path, whole
from .output import Output

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "latent",
        type=path,
        metavar="LATENT",
        help="a .latent.safetensors or --save_tensors file of generate, or ComfyUI's .latent",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--ckpt_dir", type=path, help="folder of the checkpoint, as downloaded, with the VAE in it")
    where.add_argument("--vae", type=path, metavar="FILE", help="the VAE itself")
    add("--save_file", type=path, metavar="FILE", help="as of generate (default: the latent's name as mp4)")
    add("--save_tensors", type=path, metavar="FILE.safetensors", help="as of generate")
    add(
        "--overwrite",
        action="store_true",
        help="replace whatever has the name; without it only what this program saved is replaced",
    )
    add("--fps", type=number(1, 1000), help="frames a second (default: as the latent's file or its model says)")
    add("--vae_tile", type=whole(64), metavar="N", help="decode in tiles of so many pixels a side")
    add("--vram_limit", type=number(above=0), metavar="GB", help="memory that decoding may take")
    add("--device", default="auto", help="cuda, cuda:1, cpu ... (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> None:
    from ..loading.vae import read_vae
    from ..memory.budget import GB
    from ..memory.devices import resolve_device
    from ..memory.engine import Engine
    from ..models.vae.vae import normalise
    from ..pipeline import check_decode, check_latent, decode

    output = Output(
        args.save_file or _default_name(args.latent),
        args.save_tensors,
        args.overwrite,
        [args.latent, *filter(None, [args.vae])],
    )
    output.check()
    device = resolve_device(args.device)
    latent, raw, notes = read_latent(args.latent)
    spec = _space(latent, args.latent)
    file = read_vae(args.vae or _vae_in(args.ckpt_dir, spec, notes.get("task")))
    check_latent(file, latent)
    if raw:
        latent = normalise(latent[None], spec.kind)[0]
    room = math.inf if args.vram_limit is None else args.vram_limit * GB
    height, width = (side * spec.spatial_stride for side in latent.shape[2:])
    check_decode(file, (height, width), device, tile=args.vae_tile, room=room)
    frames = (latent.shape[1] - 1) * TEMPORAL_STRIDE + 1
    output.check_size(width, height, frames, latent.shape)
    fps = args.fps or _fps(notes, spec)
    log.info("%dx%d, %d frames, %g a second, on %s", width, height, frames, fps, device)
    chunks = decode(file, latent, Engine(), device, tile=args.vae_tile, room=room)
    output.save(latent, chunks, fps, notes)


def read_latent(file: Path) -> tuple[Tensor, bool, dict[str, str]]:
    """The latent [C, T, h, w] of a file, float32; whether it is raw (ComfyUI's) instead of normalised; its notes.

    Raises:
        WanError: not there, no safetensors file, or one without a single video's latent.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise WanError(f"No such latent: {file}. Expected a file that `generate` kept or --save_tensors wrote.")
    try:
        with safe_open(file, framework="pt") as content:
            notes, keys = dict(content.metadata() or {}), set(content.keys())
            name = next((name for name in ("latent", "latent_tensor") if name in keys), None)
            if name is None:
                raise WanError(
                    f"{file} holds no latent: expected a tensor named 'latent' (or ComfyUI's 'latent_tensor')."
                )
            latent = content.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise WanError(
            f"{file} is no whole safetensors file: expected one that `generate` kept or --save_tensors wrote."
        ) from error
    if latent.ndim == 5 and latent.shape[0] == 1:
        latent = latent[0]
    if latent.ndim != 4 or not latent.is_floating_point() or not latent.numel():
        raise WanError(
            f"{file} holds a tensor {list(latent.shape)} of {latent.dtype}: expected one video's latent "
            "[channels, frames, height, width]."
        )
    return latent.float(), name == "latent_tensor", notes


def _default_name(latent: Path) -> Path:
    return latent.with_name(latent.name.removesuffix(".safetensors").removesuffix(".latent") + ".mp4")


def _space(latent: Tensor, file: Path) -> VAESpec:
    for spec in VAES.values():
        if spec.channels == len(latent):
            return spec
    raise WanError(
        f"{file} holds {len(latent)} channels: Wan's latents have "
        f"{' or '.join(str(spec.channels) for spec in VAES.values())}."
    )


def _vae_in(folder: Path, spec: VAESpec, task: str | None) -> Path:
    from ..layouts.folder import find_parts

    rows = [row for row in VARIANTS.values() if row.vae == spec.kind]
    variant: Variant = next((row for row in rows if row.task == task), rows[0])
    return find_parts(folder, variant, ["vae"]).vae


def _fps(notes: dict[str, str], spec: VAESpec) -> float:
    """As the file says, else as the models of this latent space are shown."""
    try:
        return number(1, 1000)(notes["fps"])
    except (KeyError, argparse.ArgumentTypeError):
        return next(row.fps for row in VARIANTS.values() if row.vae == spec.kind)
