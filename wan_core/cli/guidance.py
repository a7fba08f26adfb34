"""The option --guidance: rules and their settings."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import WanError

if TYPE_CHECKING:
    from ..sampling.guidance_rules import Guidance, Rule


def add_guidance_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance",
        type=parse_rule,
        action="append",
        default=[],
        metavar="RULE[:NAME=VALUE...]",
        help="what is done with the two prompts beside --sample_guide_scale, also several: cfg_zero_star, apg, tcfg, "
        "interval (two prompts only from one noise level to another), slg (blocks left out for the negative prompt), "
        "nag (the negative prompt within attention; works at scale 1). For example interval:sigma_end=0.5, "
        "slg:blocks=9,10:sigma_start=0.98, nag:scale=11:tau=2.5:alpha=0.25, apg:momentum=-0.75:eta=0, "
        "cfg_zero_star:zero_steps=1",
    )
    parser.add_argument(
        "--cfg_merge", action="store_true", help="compute both prompts as one batch: more memory, fewer calls"
    )


def parse_rule(text: str) -> Rule:
    """``apg``, ``apg:eta=0.5`` or ``slg:blocks=9,10:sigma_end=0.3``."""
    from ..sampling.guidance_rules import RULES, make, settings_of

    name, *given = text.split(":")
    usual = settings_of(RULES[name]) if name in RULES else {}
    settings = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"expected NAME=VALUE after each colon, found {one!r}")
        settings[key] = _parsed(value, usual.get(key), one)
    try:
        return make(name, settings)
    except WanError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def _parsed(text: str, like: Any, whole: str) -> Any:
    try:
        if isinstance(like, tuple):
            return tuple(int(part) for part in text.split(","))
        return int(text) if isinstance(like, int) else float(text)
    except ValueError:
        expected = {tuple: "whole numbers with commas", int: "a whole number"}.get(type(like), "a number")
        raise argparse.ArgumentTypeError(f"expected {expected}, found {whole!r}") from None


def guidance_of(args: argparse.Namespace) -> Guidance:
    """
    Raises:
        WanError: rules that cannot be combined.
    """
    from ..sampling.guidance_rules import Guidance, Merge

    return Guidance((*args.guidance, *([Merge()] if args.cfg_merge else [])))
