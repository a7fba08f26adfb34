"""Where the weights are: a folder, files of their own in place of its parts, or, for a plan, nowhere yet."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import VARIANTS, Variant
from ..errors import WanError
from .arguments import path

if TYPE_CHECKING:
    from ..pipeline import Models

_PARTS = ("vae", "text_encoder", "tokenizer", "clip")


def add_weight_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ckpt_dir", type=path, help="folder of the checkpoint, as downloaded")
    add(
        "--dit",
        type=path,
        nargs="+",
        metavar="FILE",
        help="the diffusion model's file instead of the folder's, such as ComfyUI's or a GGUF; of models with two "
        "experts both, HIGH LOW. With --vae and --text_encoder (and --clip for Wan2.1's I2V and FLF2V) no --ckpt_dir "
        "is needed",
    )
    add("--vae", type=path, metavar="FILE", help="the VAE instead of the folder's")
    add("--text_encoder", type=path, metavar="FILE", help="the text encoder instead of the folder's")
    add("--tokenizer", type=path, metavar="FILE", help="where the text encoder's file has none inside or beside it")
    add("--clip", type=path, metavar="FILE", help="CLIP's picture encoder, for Wan2.1's I2V and FLF2V")


def models_from(args: argparse.Namespace, *, plan: bool = False) -> Models:
    """The models that the arguments name.

    Args:
        plan: without a folder, the parts for which no file is given are taken to be as published.

    Raises:
        WanError: a part that is missing, damaged, or belongs to another variant.
    """
    from ..pipeline import planned_models, read_models

    options = {"dtype": args.dtype, "attention": args.attention, "own": _own(args)}
    if plan and args.ckpt_dir is None:
        return planned_models(args.task, **options)
    return read_models(args.ckpt_dir, args.task, **options)


def given_files(args: argparse.Namespace) -> list[Path]:
    """The files that are named one by one."""
    return [*(args.dit or ()), *(file for part in _PARTS if (file := getattr(args, part)))]


def where_the_vae_is(args: argparse.Namespace) -> str:
    """As an option of ``decode``."""
    if args.vae:
        return f"--vae {shlex.quote(str(args.vae))}"
    return f"--ckpt_dir {shlex.quote(str(args.ckpt_dir))}"


def _own(args: argparse.Namespace) -> dict[str, Path]:
    own = {part: file for part in _PARTS if (file := getattr(args, part))}
    return own | dict(zip(("high", "low"), _experts(args.dit, VARIANTS[args.task]), strict=False))


def _experts(files: list[Path] | None, variant: Variant) -> list[Path]:
    if files and len(files) != variant.experts:
        wanted = "two files, --dit HIGH LOW" if variant.experts == 2 else "one file"
        raise WanError(f"--dit names {len(files)} files, but {variant.display_name} has {wanted}.")
    return files or []
