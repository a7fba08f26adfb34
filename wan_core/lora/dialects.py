"""How LoRA files name things: dialects of module paths, and what hangs below a path.

A key is a module path and a role: ``diffusion_model.blocks.0.self_attn.q`` and ``.lora_A.weight``. Paths are the
official ones, diffusers', or either with underscores, below a prefix that says nothing. Roles are those that ComfyUI's
``comfy/lora.py`` and ``comfy/weight_adapter`` read, those of PEFT, and ``.diff_m``, a difference of a modulation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..layouts.dit import DIALECTS

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "diffusion.model.", "pipe.dit.", "dit.",
             "transformer.", "transformer_2.", "unet.", "model.")  # fmt: skip
_FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")

_ADAPTER = r"(?:(?:\.[\w-]+)?\.weight)?"  # PEFT writes the adapter's name between: lora_A.default.weight
_ROLES: tuple[tuple[re.Pattern, str], ...] = tuple(
    (re.compile(pattern + "$"), role)
    for pattern, role in [
        (r"(?:\.lora_down|\.lora_A|[._]lora\.down|\.lora_linear_layer\.down)" + _ADAPTER, "down"),
        (r"(?:\.lora_up|\.lora_B|[._]lora\.up|\.lora_linear_layer\.up)" + _ADAPTER, "up"),
        (r"\.alpha", "alpha"),
        (r"\.dora_scale", "dora"),
        (r"\.lora_magnitude_vector" + _ADAPTER, "magnitude"),
        (r"\.diff", "diff"),
        (r"\.w_norm", "diff"),
        (r"\.diff_b", "diff_b"),
        (r"\.b_norm", "diff_b"),
        (r"\.diff_m", "diff_m"),
        (r"\.set_weight", "set"),
        *((rf"\.{name}", name) for name in (
            "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b",
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
        )),
    ]
)  # fmt: skip
_OF_BIAS, _OF_MODULATION = "diff_b", "diff_m"


@dataclass
class Sorted:
    """A file's keys by the weight of ours that they change: our key -> role -> their key; and those without one."""

    targets: dict[str, dict[str, str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def sort_keys(keys: Iterable[str], weights: Collection[str]) -> Sorted:
    """Find for every key the weight that it changes, among our keys ``weights``."""
    modules, found = _modules(weights), Sorted()
    for key in keys:
        path, role = _split(key)
        module = _find(path, modules) if role else None
        target = module and _target(module, role, weights)
        roles = found.targets.setdefault(target, {}) if target else {}
        role = "diff" if role in (_OF_BIAS, _OF_MODULATION) else role
        if target is None or role in roles:
            found.unknown.append(key)
        else:
            roles[role] = key
    return found


def keys_of_expert(keys: Collection[str], expert: str | None) -> list[str]:
    """The keys that are for an expert, "low" or another: diffusers may keep both in one file."""
    sides = {name: [key for key in keys if key.startswith(name)] for name in ("transformer.", "transformer_2.")}
    if not all(sides.values()):
        return list(keys)
    return sides["transformer_2." if expert == "low" else "transformer."]


def _split(key: str) -> tuple[str, str | None]:
    for pattern, role in _ROLES:
        if match := pattern.search(key):
            return key[: match.start()], role
    return key, None


def _target(module: str, role: str, weights: Collection[str]) -> str | None:
    """The weight of a module that a role is about; a parameter that is no module's weight may be named itself."""
    names = {_OF_BIAS: [f"{module}.bias"], _OF_MODULATION: [f"{module}.modulation"]}.get(
        role, [f"{module}.weight", module]
    )
    return next((name for name in names if name in weights), None)


def _modules(weights: Collection[str]) -> dict[str, str]:
    """Every spelling of a module's path, without a prefix -> our path."""
    own = {key.removesuffix(".weight") for key in weights} | {key.rpartition(".")[0] for key in weights}
    spelled = {path: path for path in own if path}
    spelled |= {theirs: path for path in spelled.values() if (theirs := DIALECTS["diffusers"].to_theirs(path))}
    return spelled | {path.replace(".", "_"): module for path, module in spelled.items()}


def _find(path: str, modules: Mapping[str, str]) -> str | None:
    for flat in _FLAT_PREFIXES:
        if path.startswith(flat) and (module := modules.get(path.removeprefix(flat))):
            return module
    while (module := modules.get(path)) is None:
        prefix = next((prefix for prefix in _PREFIXES if path.startswith(prefix)), None)
        if prefix is None:
            return None
        path = path.removeprefix(prefix)
    return module
