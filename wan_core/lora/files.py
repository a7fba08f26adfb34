"""A LoRA file whose header has been read and fitted to a model; its tensors have not been read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import Architecture
from ..errors import WanError
from ..files.checkpoint import Checkpoint, _some, open_checkpoint
from ..layouts.variants import candidates
from ..loading.dit import DiTFile
from ..mapped import fetch
from .adapters import Adapter, BiasOfUp
from .dialects import keys_of_expert, names_of, relative_of, sort_keys
from .kinds import kinds_of
from .scale import Scales


@dataclass(frozen=True)
class Part:
    """One adapter of a file: its kind, and the file's key of each role.

    Attributes:
        rank: what an alpha among the tensors is divided by; ``scale`` counts where there is none.
    """

    kind: type[Adapter]
    keys: Mapping[str, str]
    rank: int | None = None
    scale: float = 1.0

    def read(self, checkpoint: Checkpoint) -> Adapter:
        """The adapter with its tensors, as they lie in the file.

        Raises:
            WanError: numbers in them that no adapter can have.
        """
        tensors = {role: checkpoint.tensor(key) for role, key in self.keys.items()}
        alpha = float(fetch(tensors.pop("alpha")).item()) if "alpha" in tensors else None
        if alpha is not None and not math.isfinite(alpha):
            raise WanError(
                f"{checkpoint.path} is broken: its {self.keys['alpha']} is {alpha}, expected a finite "
                "number. Download the file again, or have its maker save it again."
            )
        scale = self.scale if alpha is None or self.rank is None else alpha / self.rank
        try:
            return self.kind(tensors, scale=scale, alpha=alpha)
        except ValueError as error:
            raise WanError(
                f"{checkpoint.path} is broken: {', '.join(self.keys.values())} make no rotations ({error}). "
                "Download the file again, or have its maker save it again."
            ) from error


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
    notes: tuple[str, ...] = field(default=())

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    def report(self) -> str:
        """For the user: how much of the file takes part, and what does not."""
        total = self.matched + len(self.unmatched) + len(self.misfits)
        lines = [f"{self.path.name}: {self.matched} of {total} keys matched, {len(self.parts)} weights changed"]
        lines += self.notes
        unknown: dict[str | None, list[str]] = {}
        for key in sorted(self.unmatched):
            unknown.setdefault(relative_of(key), []).append(key)
        for whose, keys in unknown.items():
            said = f"left out, for {whose}, which this model lacks" if whose else "not matched"
            lines.append(f"{said} ({len(keys)}): {_some(keys)}")
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
    found, scales = sort_keys(keys, model.names), Scales(checkpoint)
    unmatched, misfits = list(found.unknown), list[str]()
    parts: dict[str, tuple[Part, ...]] = {}
    for own, roles in found.targets.items():
        fit = _fit(checkpoint, own, roles, _shape(model, own))
        misfits += fit.misfits
        unmatched += fit.left
        if fit.parts:
            parts[own] = tuple(_scaled(part, own, found.targets, checkpoint, scales) for part in fit.parts)
    _refuse_other_models(checkpoint, found.targets, misfits, model)
    if not parts:
        raise WanError(_nothing(checkpoint, misfits, model))
    matched = len(keys) - len(unmatched) - len(misfits)
    notes = tuple(scales.report())
    return LoraFile(checkpoint, parts, matched, tuple(unmatched), tuple(misfits), checkpoint.fingerprint, notes)


@dataclass(frozen=True)
class _Fit:
    """Adapters that fit a weight; keys of those that do not; keys that make no adapter."""

    parts: Sequence[Part]
    misfits: Sequence[str]
    left: Sequence[str]


def _fit(checkpoint: Checkpoint, own: str, roles: Mapping[str, str], weight: tuple[int, ...]) -> _Fit:
    """Sort a weight's tensors into adapters.

    Raises:
        WanError: the tensors of one contradict each other.
    """
    parts, misfits, used = list[Part](), list[str](), set[str]()
    shapes = {role: checkpoint.tensors[key].shape for role, key in roles.items()}
    for kind, needed in kinds_of(shapes):
        used |= needed
        keys = {role: roles[role] for role in sorted(needed)}
        mine = {role: shapes[role] for role in needed}
        if not _has_size(_size(kind, mine), weight):
            misfits += keys.values()
        elif not kind.coherent(mine, weight):
            raise WanError(_broken(checkpoint, own, list(keys.values())))
        else:
            parts.append(Part(kind, keys, kind.rank(mine)))
    return _Fit(parts, misfits, [key for role, key in roles.items() if role not in used])


def _scaled(
    part: Part, own: str, targets: Mapping[str, Mapping[str, str]], checkpoint: Checkpoint, scales: Scales
) -> Part:
    """With the scale of the header; the bias of a LoRA's second matrix has its matrices' scale."""
    if part.kind is BiasOfUp:
        beside = targets.get(own.removesuffix("bias") + "weight", {})
        shape = checkpoint.tensors[beside["down"]].shape if "down" in beside else ()
        single = "alpha" in beside and math.prod(checkpoint.tensors[beside["alpha"]].shape) == 1
        alpha = {"alpha": beside["alpha"]} if single and shape and shape[0] else {}
        part = replace(part, keys={**part.keys, **alpha}, rank=shape[0] if shape else None)
    elif not part.kind.scaled:
        return part
    if "alpha" in part.keys:
        return part
    key = next(iter(part.keys.values()))
    return replace(part, scale=scales.of(key, names_of(key, own), part.rank))


def _has_size(size: tuple[int, int | None] | None, weight: tuple[int, ...]) -> bool:
    return size is not None and size[0] == weight[0] and size[1] in (None, math.prod(weight[1:]))


def _size(kind: type[Adapter], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int | None] | None:
    try:
        return kind.size(shapes)
    except IndexError:  # a number where a matrix belongs
        return None


def _broken(checkpoint: Checkpoint, own: str, keys: list[str]) -> str:
    found = ", ".join(f"{key} [{'x'.join(map(str, checkpoint.tensors[key].shape))}]" for key in keys)
    return (
        f"{checkpoint.path} is broken: what it has for {own} does not go together. Found {found}; expected factors "
        "of one rank and a single number as alpha. Download the file again, or have its maker save it again."
    )


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
        sizes = [
            _size(kind, {role: shapes[role] for role in needed}) or (0, 0)
            for kind, needed in kinds_of(shapes)
            if roles[min(needed)] in wrong
        ]
        raise WanError(
            f"{checkpoint.path} was made for another model{_made_for(own, sizes)}: its {own} is "
            f"{' and '.join(map(_times, sizes))}, but {model.checkpoint.path.name} "
            f"({_described(model.config)}) has {'x'.join(map(str, _shape(model, own)))}. LoRAs of Wan2.1 14B and "
            "Wan2.2 A14B fit A14B; LoRAs of TI2V-5B fit only TI2V-5B."
        )


def _times(size: tuple[int, int | None]) -> str:
    return "x".join("any" if number is None else str(number) for number in size)


_WIDTHS = {1536: "Wan2.1 1.3B", 3072: "TI2V-5B", 5120: "A14B or Wan2.1 14B"}


def _made_for(own: str, sizes: list[tuple[int, int | None]]) -> str:
    side = sizes[0][1] if own.endswith(("q.weight", "k.weight", "v.weight", "ffn.0.weight")) else sizes[0][0]
    return f" ({_WIDTHS[side]})" if side in _WIDTHS else ""


def _described(config: Architecture) -> str:
    names = [row.display_name for row in candidates(config)]
    return f"{' or '.join(names)}, {config.dim} wide, {config.layers} blocks"


def _nothing(checkpoint: Checkpoint, misfits: list[str], model: DiTFile) -> str:
    keys = checkpoint.tensors
    if not keys:
        return f"{checkpoint.path} is empty: expected a LoRA for a Wan model. Download the file again."
    begins = ", ".join(f"{name} ({count})" for name, count in Counter(key.split(".")[0] for key in keys).most_common(3))
    shapes = f", and {len(misfits)} are of another shape" if misfits else ""
    return (
        f"{checkpoint.path} changes nothing of {model.checkpoint.path.name}: it takes none of the {len(keys)} keys"
        f"{shapes} (they begin with {begins}; for example {_some(sorted(keys))}). Is it a LoRA for a Wan model?"
    )
