"""The scale of a LoRA where its tensors do not say it: what trainers write into the header, or into a file beside it.

Tensors named alpha come first; without them it is, in this order,

- ``lora_adapter_metadata``: PEFT's settings as diffusers writes them, the entries of each model below its own prefix;
- ``adapter_config``, ``peft_config`` or ``lora_config``: PEFT's settings as one JSON text;
- ``lora_alpha`` with ``r``, or other names of the two, each an entry of its own;
- ``ss_network_alpha`` with ``ss_network_dim``: kohya's and musubi-tuner's;
- ``adapter_config.json`` beside ``adapter_model.safetensors``, the two files that PEFT saves.

A scale is alpha / rank, or alpha / sqrt(rank) where rank-stabilised (arXiv 2312.03732). The rank is the tensors' own.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..files.checkpoint import Checkpoint
from .patterns import Patterns

_JSON_ENTRIES = ("lora_adapter_metadata", "adapter_config", "peft_config", "lora_config")
_ALPHAS = ("lora_alpha", "network_alpha", "alpha")
_RANKS = ("r", "rank", "lora_rank", "network_dim", "dim")
_KOHYA = "ss_network_alpha"
_LARGEST = 1 << 20  # bytes of a configuration file
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq")  # these ways to begin alter the model's own weights


@dataclass(frozen=True)
class Said:
    """What one place says of a model's adapters."""

    source: str
    alpha: float | None
    rank: int | None
    stabilised: bool = False
    alphas: Patterns = field(default_factory=Patterns)
    ranks: Patterns = field(default_factory=Patterns)
    kind: str = "LORA"

    def scale(self, names: Sequence[str], rank: int | None) -> tuple[float, int | None] | None:
        """The scale of a module that goes by these names, and the rank that is stated for it."""
        alpha, number = self.alphas.find(names, self.alpha), self.ranks.find(names, self.rank)
        stated = None if number is None else int(number)
        if rank is None and self.kind == "LOKR":
            rank = stated
        if alpha is None or not rank:
            return None
        if alpha == 0 and self.source == _KOHYA:  # there it means the rank
            return 1.0, stated
        return alpha / (math.sqrt(rank) if self.stabilised else rank), stated


class Scales:
    """The scales of a file's modules, and what is to be told about them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.notes: list[str] = []
        self._said = _read(checkpoint, self.notes)
        self._used: Counter[tuple[str, float]] = Counter()
        self._other_rank: Counter[tuple[str, int, int]] = Counter()
        self._unsaid = 0

    def of(self, key: str, names: Sequence[str], rank: int | None) -> float:
        """Of an adapter without an alpha of its own.

        Args:
            key: one of the file's.
            names: its module's in the file's own and in other spellings.
        """
        said = _component(self._said, key)
        found = said.scale(names, rank) if said else None
        if said is None or found is None:
            self._unsaid += 1
            return 1.0
        scale, stated = found
        self._used[said.source, scale] += 1
        if rank is not None and stated is not None and stated != rank:
            self._other_rank[said.source, stated, rank] += 1
        return scale

    def report(self) -> list[str]:
        """What was assumed, a line each."""
        lines = []
        for source in dict.fromkeys(source for source, _ in self._used):
            found = ", ".join(
                f"{scale:.4g} on {count} weights"
                for (place, scale), count in self._used.most_common(5)
                if place == source
            )
            lines.append(f"scaled as its {source} says: {found}")
        if self._unsaid:
            lines.append(f"no alpha for {self._unsaid} weights, in tensors or header: scale 1")
        for (source, stated, rank), count in self._other_rank.most_common(3):
            lines.append(
                f"Warning: its {source} states rank {stated}, but {count} weights are of rank {rank}: scaled "
                "by the tensors' own"
            )
        return lines + self.notes


def config_beside(path: Path) -> Path | None:
    """PEFT's settings of a file: those that it saves together, never another file's."""
    if path.is_dir():
        file = path / "adapter_config.json"
    elif path.stem.lower() == "adapter_model":
        file = path.with_name("adapter_config.json")
    else:
        return None
    return file if file.is_file() else None


def _component(said: Mapping[str, Said], key: str) -> Said | None:
    """Of several models' settings in one header those of the model that a key names first."""
    for name in (key.split(".", 1)[0], "", "transformer"):
        if name in said:
            return said[name]
    models = [name for name in said if not name.startswith("text_encoder")]
    return said[models[0]] if len(models) == 1 else None


def _read(checkpoint: Checkpoint, notes: list[str]) -> dict[str, Said]:
    """Model -> what is said of it, from the first place that says anything; "" where models are not told apart."""
    metadata = checkpoint.metadata
    for entry in _JSON_ENTRIES:
        if entry in metadata and (found := _from_json(metadata[entry], f"header's {entry}", notes)):
            return found
    if said := _plain(metadata, notes) or _kohya(checkpoint, notes):
        return {"": said}
    file = config_beside(checkpoint.path)
    return _from_file(file, checkpoint, notes) if file else {}


def _from_file(file: Path, checkpoint: Checkpoint, notes: list[str]) -> dict[str, Said]:
    try:
        text = file.read_text(encoding="utf-8-sig") if file.stat().st_size <= _LARGEST else ""
    except (OSError, ValueError):
        text = ""
    said = _from_json(text, file.name, notes)
    own = {
        info.shape[0]
        for key, info in checkpoint.tensors.items()
        if ".lora_A" in key and key.endswith(".weight") and len(info.shape) > 1
    }
    stated = {rank for one in said.values() for rank in (one.rank, *one.ranks.values()) if rank}
    if own and stated and not own & stated:
        notes.append(
            f"Warning: {file.name} beside it is another file's (rank {_some_numbers(stated)}, but the tensors "
            f"here are of rank {_some_numbers(own)}): not used"
        )
        return {}
    return said


def _some_numbers(numbers: Iterable[float]) -> str:
    found = sorted(numbers)
    return ", ".join(f"{number:g}" for number in found[:3]) + (" …" if len(found) > 3 else "")


def _from_json(text: object, source: str, notes: list[str]) -> dict[str, Said]:
    try:
        config = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        notes.append(f"Warning: its {source} cannot be read (expected a JSON object): not used")
        return {}
    models: dict[str, dict] = {}
    for name, value in config.items():
        model, _, entry = name.rpartition(".")
        models.setdefault(model, {})[entry] = value
    found = {model: _peft(entries, source, notes) for model, entries in models.items()}
    return {model: said for model, said in found.items() if said}


def _peft(entries: Mapping[str, object], source: str, notes: list[str]) -> Said | None:
    alpha = _first(entries, _ALPHAS, source, notes)
    alphas = _patterns(entries.get("alpha_pattern"), f"{source}, alpha_pattern", notes)
    if alpha is None and not alphas:
        return None
    begun = str(entries.get("init_lora_weights", "")).lower()
    if begun.startswith(_CHANGED_BASES):
        notes.append(
            f"Warning: its {source} says that it was begun as {begun[:20]}, which changes the model's own "
            "weights; on the unchanged model it means something else"
        )
    return Said(
        source,
        alpha,
        _rank(entries, source, notes),
        _true(entries.get("use_rslora")),
        alphas,
        _patterns(entries.get("rank_pattern"), f"{source}, rank_pattern", notes),
        str(entries.get("peft_type", "LORA")).upper(),
    )


def _plain(metadata: Mapping[str, str], notes: list[str]) -> Said | None:
    """Entries that are named as in PEFT's settings; alpha alone may be anything, beside a rank it is a LoRA's."""
    if not any(name in metadata for name in ("lora_alpha", "network_alpha", "alpha_pattern")) and not (
        "alpha" in metadata and any(name in metadata for name in _RANKS)
    ):
        return None
    patterns = {}
    for name in ("alpha_pattern", "rank_pattern"):
        try:
            patterns[name] = json.loads(metadata[name])
        except (KeyError, ValueError, TypeError, RecursionError):
            continue
    return _peft(dict(metadata) | patterns, "header", notes)


def _kohya(checkpoint: Checkpoint, notes: list[str]) -> Said | None:
    metadata = checkpoint.metadata
    alpha = _number(metadata.get(_KOHYA))
    if alpha is None:
        return None
    renamed = any(".lora_A." in key or key.endswith(".lora_A") for key in checkpoint.tensors)
    if renamed and "ss_network_module" in metadata:
        # These trainers write lora_down and alpha; the converters that rename them multiply the scale into the
        # matrices, and leave the header as it was.
        notes.append(
            "converted from a kohya file: its scale is in the matrices, the header's ss_network_alpha is not used again"
        )
        return None
    rank = _number(metadata.get("ss_network_dim"))
    return Said(_KOHYA, alpha, int(rank) if rank and rank > 0 else None)


def _first(entries: Mapping[str, object], names: Iterable[str], source: str, notes: list[str]) -> float | None:
    for name in names:
        if entries.get(name) is None:
            continue
        if (number := _number(entries[name])) is not None:
            return number
        notes.append(f"Warning: its {source} has a {name} that is no number: not used")
    return None


def _rank(entries: Mapping[str, object], source: str, notes: list[str]) -> int | None:
    rank = _first(entries, _RANKS, source, notes)
    return int(rank) if rank is not None and rank >= 1 else None


def _number(value: object) -> float | None:
    """A finite number that float32 holds too, or None."""
    try:
        number = None if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # whatever it is
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and abs(number) < 3e38 else None


def _true(value: object) -> bool:
    return value is True or str(value).strip().lower() in ("true", "1", "yes")


def _patterns(value: object, source: str, notes: list[str]) -> Patterns:
    if value is None:
        return Patterns()
    rows = value if isinstance(value, dict) else {"": None}
    numbers = {name: _number(number) for name, number in rows.items()}
    made = Patterns({name: number for name, number in numbers.items() if number is not None})
    if lost := len(rows) - len(made):
        notes.append(
            f"Warning: its {source}: {lost} of {len(rows)} rows cannot be read (expected names of modules and "
            "numbers): not used"
        )
    return made
