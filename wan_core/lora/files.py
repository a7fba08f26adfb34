"""A LoRA file whose header has been read and fitted to a model; its tensors have not been read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import VARIANTS, DiTConfig
from ..errors import WanError
from ..files.checkpoint import Checkpoint, _some, open_checkpoint
from ..loading.dit import DiTFile
from .adapters import Adapter, kinds_of
from .dialects import keys_of_expert, sort_keys


@dataclass(frozen=True)
class Part:
    """One adapter of a file: its kind, and the file's key of each role."""

    kind: type[Adapter]
    keys: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What a file changes of a model.

    Attributes:
        parts: our key of a weight -> its adapters.
        unmatched: keys of the file that mean nothing to the model; ``misfits`` those of weights of another shape.
    """

    checkpoint: Checkpoint
    parts: Mapping[str, tuple[Part, ...]]
    matched: int
    unmatched: tuple[str, ...]
    misfits: tuple[str, ...]
    fingerprint: tuple

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    def report(self) -> str:
        """For the user: how much of the file takes part, and what does not."""
        total = self.matched + len(self.unmatched) + len(self.misfits)
        lines = [f"{self.path.name}: {self.matched} of {total} keys matched, {len(self.parts)} weights changed"]
        if self.unmatched:
            lines.append(f"not matched ({len(self.unmatched)}): {_some(sorted(self.unmatched))}")
        if self.misfits:
            lines.append(f"left out, of another shape ({len(self.misfits)}): {_some(sorted(self.misfits))}")
        return "\n".join(lines)


def read_lora(path: str | Path, model: DiTFile, expert: str | None = None) -> LoraFile:
    """Read a LoRA's header and fit it to a model.

    Args:
        expert: "high" or "low", for a file that holds both.

    Raises:
        WanError: not there, damaged, nothing in it that the model has, or made for a model of other dimensions.
    """
    checkpoint = open_checkpoint(path)
    keys = keys_of_expert(checkpoint.tensors, expert)
    found = sort_keys(keys, model.names)
    unmatched, misfits, parts = list(found.unknown), [], {}
    for own, roles in found.targets.items():
        fitting, other_shape, left = _fit(checkpoint, own, roles, _shape(model, own))
        misfits += other_shape
        unmatched += left
        if fitting:
            parts[own] = fitting
    _refuse_other_models(checkpoint, found.targets, misfits, model)
    if not parts:
        raise WanError(_nothing(checkpoint, misfits, model))
    matched = len(keys) - len(unmatched) - len(misfits)
    return LoraFile(checkpoint, parts, matched, tuple(unmatched), tuple(misfits), checkpoint.fingerprint)


def _fit(
    checkpoint: Checkpoint, own: str, roles: Mapping[str, str], shape: tuple[int, ...]
) -> tuple[tuple[Part, ...], list[str], list[str]]:
    """Adapters that fit a weight of this shape; keys of those that do not; keys that make no adapter.

    Raises:
        WanError: the tensors of one contradict each other.
    """
    parts, misfits, used = [], [], set()
    shapes = {role: checkpoint.tensors[key].shape for role, key in roles.items()}
    for kind, needed in kinds_of(tuple(roles)):
        used |= needed
        if _size(kind, shapes) == (shape[0], math.prod(shape[1:])):
            if not kind.coherent({role: shapes[role] for role in needed}):
                raise WanError(_broken(checkpoint, own, [roles[role] for role in sorted(needed)]))
            parts.append(Part(kind, {role: roles[role] for role in sorted(needed)}))
        else:
            misfits += [roles[role] for role in sorted(needed)]
    return tuple(parts), misfits, [key for role, key in roles.items() if role not in used]


def _size(kind: type[Adapter], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    try:
        return kind.size(shapes)
    except IndexError:  # a number where a matrix belongs
        return None


def _broken(checkpoint: Checkpoint, own: str, keys: list[str]) -> str:
    found = ", ".join(f"{key} [{'x'.join(map(str, checkpoint.tensors[key].shape))}]" for key in keys)
    return (f"{checkpoint.path} is broken: what it has for {own} does not go together. Found {found}; expected factors "
            "of one rank and a single number as alpha. Download the file again, or have its maker save it again.")


def _shape(model: DiTFile, own: str) -> tuple[int, ...]:
    return tuple(model.checkpoint.tensors[model.names[own]].shape)


def _refuse_other_models(
    checkpoint: Checkpoint, targets: Mapping[str, Mapping[str, str]], misfits: list[str], model: DiTFile
) -> None:
    """A matrix of a block that does not fit means another model; one outside may be another number of channels."""
    wrong = set(misfits)
    for own, roles in targets.items():
        if not own.startswith("blocks.") or not wrong & set(roles.values()):
            continue
        shapes = {role: checkpoint.tensors[key].shape for role, key in roles.items()}
        sizes = [_size(kind, shapes) or (0, 0) for kind, needed in kinds_of(tuple(roles))
                 if roles[min(needed)] in wrong]  # fmt: skip
        raise WanError(
            f"{checkpoint.path} was made for another model{_made_for(own, sizes)}: its {own} is "
            f"{' and '.join('x'.join(map(str, size)) for size in sizes)}, but {model.checkpoint.path.name} "
            f"({_described(model.config)}) has {'x'.join(map(str, _shape(model, own)))}. LoRAs of Wan2.1 14B and "
            "Wan2.2 A14B fit A14B; LoRAs of TI2V-5B fit only TI2V-5B."
        )


_WIDTHS = {1536: "Wan2.1 1.3B", 3072: "TI2V-5B", 5120: "A14B or Wan2.1 14B"}


def _made_for(own: str, sizes: list[tuple[int, int]]) -> str:
    width = _WIDTHS.get(sizes[0][1] if own.endswith(("q.weight", "k.weight", "v.weight", "ffn.0.weight"))
                        else sizes[0][0])  # fmt: skip
    return f" ({width})" if width else ""


def _described(config: DiTConfig) -> str:
    names = [row.display_name for row in VARIANTS.values() if row.in_channels == config.in_channels]
    return f"{' or '.join(names)}, {config.dim} wide, {config.layers} blocks"


def _nothing(checkpoint: Checkpoint, misfits: list[str], model: DiTFile) -> str:
    keys = checkpoint.tensors
    if not keys:
        return f"{checkpoint.path} is empty: expected a LoRA for a Wan model. Download the file again."
    begins = ", ".join(f"{name} ({count})" for name, count in Counter(key.split(".")[0] for key in keys).most_common(3))
    shapes = f", and {len(misfits)} are of another shape" if misfits else ""
    return (f"{checkpoint.path} changes nothing of {model.checkpoint.path.name}: it takes none of the {len(keys)} keys"
            f"{shapes} (they begin with {begins}; for example {_some(sorted(keys))}). Is it a LoRA for a Wan model?")
