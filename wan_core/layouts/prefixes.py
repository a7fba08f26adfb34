"""Where in a file a model's keys lie: below which prefix, once the names that wrappers leave in them are gone.

Compilers, trainers and programs that save several models in one file all put words around the keys of a model:
``_orig_mod.``, ``module.``, ``model.diffusion_model.``, ``pipe.dit.``, ``ema_model.``, also in the middle of a key.
Which words they are does not matter: a model is found by keys that only it has, and what stands before them is its
prefix.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import WanError
from .keys import Renames

# Modules that hold nothing but the module they wrap: torch.compile, DDP, FSDP, checkpointing, DeepSpeed and PEFT.
_WRAPPERS = frozenset(("_orig_mod", "_orig_module", "module", "_module", "_fsdp_wrapped_module", "_fpw_module",
                       "_checkpoint_wrapped_module", "_forward_module", "base_layer"))  # fmt: skip
_AVERAGES = frozenset(("ema", "shadow", "averaged"))  # words in the prefix of weights that were averaged in training

# Dialect -> groups of keys: of each group one must be there. The likelier dialect comes first.
Marks = Mapping[str, Sequence[tuple[str, ...]]]


@dataclass(frozen=True)
class Place:
    """One model in a file.

    Attributes:
        dialect: whose names its keys have.
        prefix: what stands before each of them, without wrappers.
        keys: the model's key in its dialect -> the file's.
    """

    dialect: str
    prefix: str
    keys: Mapping[str, str]

    @property
    def root(self) -> str:
        """The first word of the prefix, which in a file of several models all keys of one share."""
        return self.prefix.split(".")[0] + "." if self.prefix else ""


def find_places(keys: Iterable[str], marks: Marks) -> list[Place]:
    """Every model in a file that has one dialect's marks, in the order of their prefixes."""
    plain = _without_wrappers(keys)
    dialects: dict[str, str] = {}  # prefix -> dialect
    for dialect, groups in marks.items():
        for prefix in _prefixes(plain, groups):
            dialects.setdefault(prefix, dialect)
    return [
        Place(dialect, prefix, {key.removeprefix(prefix): plain[key] for key in plain if key.startswith(prefix)})
        for prefix, dialect in sorted(dialects.items())
    ]


def only_place(places: Sequence[Place], path: Path, what: str) -> Place | None:
    """The one that is meant: of weights and their average in one file, the average.

    Raises:
        WanError: there are several, and nothing says which.
    """
    averaged = [place for place in places if _is_average(place)]
    if len(places) > 1 and len(averaged) == 1:
        return averaged[0]
    if len(places) > 1:
        found = ", ".join(f"{place.prefix}*" if place.prefix else "keys without a prefix" for place in places)
        raise WanError(
            f"{path} holds {len(places)} of {what} ({found}), and which of them is meant cannot be told. "
            "Save the one you want in a file of its own."
        )
    return places[0] if places else None


def place_note(places: Sequence[Place], place: Place) -> str | None:
    """What the user should know of the choice of ``only_place``."""
    if len(places) < 2:
        return None
    others = ", ".join(f"{other.prefix or 'no prefix'}" for other in places if other is not place)
    return f"the averaged weights ({place.prefix}*) are used, not those beside them ({others})"


def own_names(place: Place, renames: Renames) -> dict[str, str]:
    """Our key -> the file's; a key that the dialect does not know stands for itself."""
    found: dict[str, str] = {}
    for key, theirs in place.keys.items():
        found.setdefault(renames.to_own(key) or key, theirs)
    return found


def _without_wrappers(keys: Iterable[str]) -> dict[str, str]:
    """Key without wrappers -> the file's key. Where two would be one, both keep their words."""
    found: dict[str, str] = {}
    for key in keys:
        plain = ".".join(word for word in key.split(".") if word not in _WRAPPERS) or key
        found[key if plain in found else plain] = key
    return found


def _prefixes(plain: Collection[str], groups: Sequence[tuple[str, ...]]) -> set[str]:
    marks, *others = groups
    found = {key.removesuffix(mark) for mark in marks for key in plain if f".{key}".endswith(f".{mark}")}
    return {prefix for prefix in found if all(any(prefix + key in plain for key in group) for group in others)}


def _is_average(place: Place) -> bool:
    return not _AVERAGES.isdisjoint(re.split(r"[._]", place.prefix.lower()))
