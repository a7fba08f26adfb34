"""The option --guidance: rules and their settings."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import WanError
from .arguments import boolean

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
        "--cfg_merge",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="compute both prompts as one batch: more memory, fewer calls",
    )


def parse_rule(text: str) -> Rule:
    """``apg``, ``apg:eta=0.5`` or ``slg:blocks=9,10:sigma_end=0.3``."""
    from ..sampling.guidance_rules import RULES, blocks_of, make, settings_of

    name, *given = text.split(":")
    usual = settings_of(RULES[name]) if name in RULES else {}
    settings: dict[str, Any] = {}
    try:
        for one in given:
            key, equals, value = one.partition("=")
            if not equals:
                raise argparse.ArgumentTypeError(f"expected NAME=VALUE after each colon, found {one!r}")
            like = usual.get(key)
            settings[key] = blocks_of(value) if isinstance(like, tuple) else _number(value, like, one)
        return make(name, settings)
    except WanError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def _number(text: str, like: object, whole: str) -> float:
    try:
        return int(text) if isinstance(like, int) else float(text)
    except ValueError:
        expected = "a whole number" if isinstance(like, int) else "a number"
        raise argparse.ArgumentTypeError(f"expected {expected}, found {whole!r}") from None


def guidance_of(args: argparse.Namespace) -> Guidance:
    """
    Raises:
        WanError: rules that cannot be combined.
    """
    from ..sampling.guidance_rules import Guidance, Merge

    return Guidance((*args.guidance, *([Merge()] if args.cfg_merge else [])))
