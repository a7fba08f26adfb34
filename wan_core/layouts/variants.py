"""Which official model a file is: the rows of the table whose network looks like it, and the choice among them.

Several models have the same shapes. Then the user decides, or the experts' pairing, or what the names say; and what was
taken on a guess is said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import VARIANTS, Architecture, Variant
from ..errors import WanError
from ..lookup import look_up
from ..models.dit.features.clip_tokens import ClipTokensConfig
from .noise_level import noise_level_of

AUTO = "auto"
_PICTURES_ONLY = "t2i-14B"  # the weights of T2V-14B under another name; only a user can want it
_WAN_21 = re.compile(r"wan_?-?2[._]?1|(?<!\d)2[._]1(?!\d)")
_SIZES = {1536: "1.3b", 5120: "14b", 3072: "5b"}  # as names write them
_WAN_22 = re.compile(r"wan_?-?2[._]?2|(?<!\d)2[._]2(?!\d)|a14b")


@dataclass(frozen=True)
class Choice:
    """The variant that a model is run as, and what was assumed to come to it, or None where nothing was."""

    variant: Variant
    assumed: str | None = None


def signature_of(config: Architecture) -> tuple[int, int, int]:
    """What `Variant.signature` is of a table row, of a network."""
    clip = config.feature(ClipTokensConfig)
    pictures = 0 if clip is None else 2 if clip.positions else 1
    return config.in_channels, config.out_channels, pictures


def candidates(config: Architecture) -> tuple[Variant, ...]:
    """The variants whose network looks like this one, the likeliest width first."""
    alike = (row for row in VARIANTS.values() if row.signature == signature_of(config))
    return tuple(sorted(alike, key=lambda row: abs(row.dim - config.dim)))


def choose(config: Architecture, path: Path, *, wanted: str = AUTO, pair: bool = False) -> Choice:
    """The variant of a file.

    Args:
        path: of the file or folder, whose name may tell.
        wanted: a task's name, or "auto".
        pair: it is one of two experts.

    Raises:
        WanError: the network is none of the table's, or not the wanted one's.
    """
    rows = candidates(config)
    if not rows:
        raise WanError(
            f"{path} takes {config.in_channels} channels and gives {config.out_channels}: no Wan model that "
            "this version runs does."
        )
    if wanted != AUTO:
        return Choice(_wanted(look_up(VARIANTS, wanted, "model"), rows, path))
    if pair:
        return Choice(next((row for row in rows if row.experts == 2), rows[0]))
    rows = tuple(row for row in rows if row.task != _PICTURES_ONLY)
    if any(row.dim == config.dim for row in rows):
        rows = tuple(row for row in rows if row.dim == config.dim)
    return Choice(rows[0]) if len(rows) == 1 else _by_name(rows, path)


def _wanted(row: Variant, rows: Sequence[Variant], path: Path) -> Variant:
    if row not in rows:
        fitting = " or ".join(f"{one.display_name} ({one.task})" for one in rows)
        raise WanError(
            f"{path} is not {row.display_name}: by its layers it is {fitting}. Choose that, or another file."
        )
    return row


def _by_name(rows: Sequence[Variant], path: Path) -> Choice:
    """One dense model or one of two experts: what the file and its folder say, else a guess that is told."""
    pairs = [row for row in rows if row.experts == 2]
    dense = [row for row in rows if row.experts == 1]
    names = f"{path.parent.name} {path.name}".lower()
    dense = [row for row in dense if _SIZES.get(row.dim, "?") in names.replace("_", ".")] or dense
    if _is_expert(path):
        return Choice((pairs or dense)[0])
    if pairs and dense and _WAN_22.search(names) and not _WAN_21.search(names):
        return Choice(pairs[0])
    if dense and _WAN_21.search(names):
        return Choice(dense[0])
    chosen = (dense or pairs)[0]
    others = ", ".join(row.display_name for row in rows if row is not chosen)
    return Choice(
        chosen,
        f"{path.name} is taken for {chosen.display_name}: its layers are also those of {others}, and "
        "its name does not tell. Choose the variant if that is wrong.",
    )


def _is_expert(path: Path) -> bool:
    """Whether the name is one expert's; diffusers' ``transformer`` is one only beside a ``transformer_2``."""
    alone = path.name == "transformer" and not (path.parent / "transformer_2").exists()
    return not alone and noise_level_of(path) is not None
