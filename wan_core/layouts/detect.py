"""What a file is, from its keys alone, so that a wrong choice is named at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from ..errors import Hint, WanError
from ..files.checkpoint import Checkpoint, _some
from . import clip, dit, text, vae
from .architecture import family_of
from .extras import leave_out
from .prefixes import Place, find_places, only_place, place_note
from .text import is_spiece

Part = Literal["dit", "vae", "text", "clip"]

_PARTS: dict[Part, ModuleType] = {"dit": dit, "vae": vae, "text": text, "clip": clip}
NAMES: dict[Part, str] = {
    "dit": "a Wan diffusion model",
    "vae": "a Wan VAE",
    "text": "a umT5 text encoder",
    "clip": "a CLIP vision encoder",
}
_ARCHITECTURE = "general.architecture"  # what a GGUF file says of itself
_ARCHITECTURES: dict[Part, tuple[str, ...]] = {"dit": ("wan",), "text": ("t5encoder", "t5"), "vae": (), "clip": ()}
_ANY_ARCHITECTURE = ("pig", "cow")  # what one converter writes for every model


@dataclass(frozen=True)
class Found:
    """A part of a model in a file, which may hold other parts and other things beside it."""

    part: Part
    place: Place
    names: dict[str, str]  # our key -> the file's, unknown ones too
    outside: tuple[str, ...]  # keys of the file that belong to no part
    notes: tuple[str, ...]

    def fit(self, wanted: Collection[str], checkpoint: Checkpoint) -> tuple[dict[str, str], tuple[str, ...]]:
        """Our key -> the file's for every tensor of the model, and what to say of the rest.

        Raises:
            WanError: see ``leave_out``.
        """
        names, notes = leave_out(checkpoint.path, wanted, self.names, self.outside, NAMES[self.part])
        return names, (*self.notes, *notes)


def find(part: Part, checkpoint: Checkpoint) -> Found:
    """Where a checkpoint holds this part, and under which names.

    Raises:
        WanError: it holds another part (named, with the loader to use), a LoRA, unknown keys, or several such models.
    """
    keys = checkpoint.tensors.keys()
    places = _places(part, checkpoint)
    place = only_place(places, checkpoint.path, f"{NAMES[part].split(' ', 1)[1]}s")
    if place is None:
        raise _not_this(f"{checkpoint.path} is not {NAMES[part]}", checkpoint)
    note = place_note(places, place)
    place, outside = _apart(place, {name: _places(name, checkpoint) for name in _PARTS}, part, keys)
    names = _PARTS[part].names_in(place, checkpoint.path, outside)
    return Found(part, place, names, outside, (f"{checkpoint.path.name}: {note}.",) if note else ())


def _apart(
    place: Place, held: Mapping[Part, Sequence[Place]], part: Part, keys: Collection[str]
) -> tuple[Place, tuple[str, ...]]:
    """A part without what other parts of the file own, and the keys that no part owns.

    All keys with the first word of another part's prefix are that part's.
    """
    others = [other for name, places in held.items() if name != part for other in places]
    roots = tuple({other.root for other in others if other.root and other.root != place.root})
    if not place.prefix:
        place = Place(
            place.dialect, place.prefix, {core: key for core, key in place.keys.items() if not _begins(core, roots)}
        )
    owned = {key for one in (*held[part], *others) if one.prefix or not place.prefix for key in one.keys.values()}
    if any(not other.prefix for other in others):  # it has all keys that are below no other part's first word
        owned.update(key for key in keys if not _begins(key, (*roots, place.root)))
    owned.update(key for key in keys if _begins(key, roots) or part == "text" and is_spiece(key))
    return place, tuple(key for key in keys if key not in owned)


def _begins(key: str, roots: Sequence[str]) -> bool:
    return any(key.startswith(root) for root in roots)


def part_of(checkpoint: Checkpoint) -> Part:
    """Which part of a model a checkpoint holds; the first of several.

    Raises:
        WanError: none that is known.
    """
    for part in _PARTS:
        if _places(part, checkpoint):
            return part
    raise _not_this(f"{checkpoint.path} is no part of a Wan model", checkpoint)


def parts_of(checkpoint: Checkpoint) -> tuple[Part, ...]:
    """Every part that a checkpoint holds."""
    return tuple(part for part in _PARTS if _places(part, checkpoint))


def _places(part: Part, checkpoint: Checkpoint) -> list[Place]:
    return find_places(checkpoint.tensors, _PARTS[part].MARKS) if _fits_architecture(part, checkpoint) else []


def _not_this(problem: str, checkpoint: Checkpoint) -> WanError:
    """A problem, and what the file is instead."""
    keys = checkpoint.tensors.keys()
    for part in parts_of(checkpoint):
        return WanError(f"{problem}: it is {NAMES[part]}.", Hint.LOAD_AS, part=part)
    if _is_lora(keys):
        return WanError(f"{problem}: it is a LoRA.", Hint.CHOOSE_BASE)
    if stated := checkpoint.metadata.get(_ARCHITECTURE):
        expected = " or ".join(name for names in _ARCHITECTURES.values() for name in names)
        return WanError(f"{problem}: it is a GGUF file of the architecture {stated!r}; expected {expected}.")
    if patch := family_of({key: info.shape for key, info in checkpoint.tensors.items()}):
        return patch.refuse(f"{problem}: it is {patch.name}")
    return WanError(f"{problem}: none of the known layouts has its keys ({_some(keys, 3) or 'it holds no tensors'}).")


def _fits_architecture(part: Part, checkpoint: Checkpoint) -> bool:
    stated = checkpoint.metadata.get(_ARCHITECTURE)
    return stated is None or stated in (*_ARCHITECTURES[part], *_ANY_ARCHITECTURE)


def _is_lora(keys: Collection[str]) -> bool:
    return any(".lora_" in key or key.startswith("lora_") for key in keys)
