"""The option --lora: files, strengths and which expert they are for."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import PerExpert
from .arguments import path

if TYPE_CHECKING:
    from ..recipe import ModelRecipe

log = logging.getLogger(__name__)

_STRONGEST = 100  # as ComfyUI's LoRA loaders


@dataclass(frozen=True)
class LoraOption:
    """``low`` is None where the twin shall be looked for."""

    file: Path
    low: Path | None
    strength: float


def add_lora_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="FILE[:strength]",
        help="a LoRA, also several times; for a pair either file, the other is found by its name, or "
        "HIGH,LOW[:strength]",
    )


def parse_lora(text: str) -> LoraOption:
    """``FILE``, ``FILE:0.8``, ``HIGH,LOW`` or ``HIGH,LOW:0.8``."""
    names, strength = text, 1.0
    before, colon, after = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            names, strength = before, float(after)
        except ValueError:
            if len(before) > 1:  # not the letter of a drive
                raise argparse.ArgumentTypeError(f"expected FILE or FILE:strength, found {text!r}") from None
    if not abs(strength) <= _STRONGEST:  # NaN is not
        raise argparse.ArgumentTypeError(
            f"expected FILE:strength with a strength within -{_STRONGEST} to {_STRONGEST}, found {text!r}"
        )
    files = [names] if Path(names).exists() else names.split(",")
    if len(files) > 2 or not all(files):
        raise argparse.ArgumentTypeError(f"expected FILE or HIGH,LOW, with :strength or without, found {text!r}")
    first, *second = map(path, files)
    return LoraOption(first, second[0] if second else None, strength)


def with_loras(recipe: ModelRecipe, options: Sequence[LoraOption]) -> ModelRecipe:
    """The recipe with the LoRAs of a command line, in their order; says what each does.

    Raises:
        WanError: see ``with_lora``.
    """
    from ..lora.attach import AUTO, with_lora

    for option in options:
        both = PerExpert(low=option.strength, high=option.strength)
        recipe, report = with_lora(recipe, option.file, both, low=option.low or AUTO)
        log.info("LoRA: %s", report)
    return recipe
