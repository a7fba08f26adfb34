"""How LoRA files name things: dialects of module paths, and what hangs below a path.

A key is a module path and a role: ``diffusion_model.blocks.0.self_attn.q`` and ``.lora_A.weight``. Paths are the
official ones, diffusers', or either with underscores, below prefixes, and with names of wrappers between, that say
nothing. Roles are those that ComfyUI's ``comfy/lora.py`` and ``comfy/weight_adapter`` read, those of PEFT, and
``.diff_m``, a difference of a modulation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..layouts.dit import DIALECTS

# Modules that stand around a model, or around a layer inside it, and change nothing: compilers', trainers' and savers'.
_AROUND_LAYERS = frozenset({
    "_orig_mod", "orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
    "inner_module", "wrapped_module", "processor",
})  # fmt: skip
_EXPERTS = {
    "transformer": "high", "dit": "high", "high_noise_model": "high",
    "transformer_2": "low", "dit2": "low", "low_noise_model": "low",
}  # fmt: skip
_AROUND_MODELS = _AROUND_LAYERS | _EXPERTS.keys() | {
    "base_model", "model", "inner_model", "wrapped_model", "diffusion_model", "diffusion", "pipe", "pipeline", "unet",
    "net", "network", "wan", "generator", "generator_ema", "student", "ema", "ema_model", "model_ema", "backbone",
    "denoiser", "state_dict",
}  # fmt: skip
_PARTS = {"vace": "vace_"}  # a part of a model under its own name, and how its layers begin

_FLAT_PREFIXES = ("lora_unet", "lora_transformer", "lora_dit", "lora_wan", "lycoris", "lora")
_AROUND_FLAT = re.compile(
    "_*(?:" + "|".join(sorted((re.escape(name.strip("_")) for name in _AROUND_MODELS), key=len, reverse=True)) + ")_"
)
_AROUND_FLAT_LAYERS = re.compile(
    "_+(?:" + "|".join(re.escape(name.strip("_")) for name in sorted(_AROUND_LAYERS)) + ")(?=_|$)"
)

_LONGEST = 512  # no module's name comes near; what is longer is not looked at
_ADAPTER = r"(?:\.[\w-]+)?"  # PEFT writes the adapter's name between: lora_A.default.weight
_DOWN = r"(?:\.lora_down|\.lora_A|[._]lora\.down|\.lora_linear_layer\.down)"
_UP = r"(?:\.lora_up|\.lora_B|[._]lora\.up|\.lora_linear_layer\.up)"
_NAMES = {
    "down": _DOWN + rf"(?:{_ADAPTER}\.weight)?",
    "up": _UP + rf"(?:{_ADAPTER}\.weight)?",
    "up_bias": _UP + rf"{_ADAPTER}\.bias",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "dora": r"\.dora_scale",
    "magnitude": rf"\.lora_magnitude_vector(?:{_ADAPTER}\.weight)?",
    "diff": r"(?:\.diff|\.w_norm)",
    "diff_b": r"(?:\.diff_b|\.b_norm)",
    "diff_m": r"\.diff_m",
    "set": r"\.set_weight",
    "oft_blocks": r"\.oft_blocks",
    "rescale": r"\.rescale",
    **{name: rf"\.{name}{_ADAPTER}" for name in (
        "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    )},
    **{name: rf"\.{name}\.weight" for name in ("a1", "a2", "b1", "b2")},
}  # fmt: skip
_ROLE = re.compile("(?:" + "|".join(f"(?P<{role}>{pattern})" for role, pattern in _NAMES.items()) + ")$")
_OF_BIAS = {"diff_b": "diff", "up_bias": "up_bias"}  # role -> the role that it has there
_OF_MODULATION = {"diff_m": "diff"}


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
        target = _target(module, role, weights) if module and role else None
        if target is None or role is None:
            found.unknown.append(key)
            continue
        roles, role = found.targets.setdefault(target, {}), _OF_BIAS.get(role, _OF_MODULATION.get(role, role))
        if role in roles:
            found.unknown.append(key)
        else:
            roles[role] = key
    return found


def names_of(key: str, own: str) -> tuple[str, ...]:
    """A module's names, by a key of a file and our key of its weight: as the file has it, ours and diffusers'."""
    path = own.removesuffix(".weight").removesuffix(".bias")
    return tuple(dict.fromkeys(filter(None, (_bare(_split(key)[0]), path, DIALECTS["diffusers"].to_theirs(path)))))


def keys_of_expert(keys: Collection[str], expert: str | None) -> list[str]:
    """The keys that are for an expert, "low" or another: a file may hold both, each below names of its own."""
    levels = {key: expert_of(key) for key in keys}
    if not {"high", "low"} <= set(levels.values()):
        return list(keys)
    return [key for key, level in levels.items() if level in (None, expert or "high")]


def expert_of(key: str) -> str | None:
    """The expert that a key's prefix names, as diffusers', DiffSynth's and the official folders' do.

    The first one's name alone says nothing: it is the only model's too.
    """
    for name in key[:_LONGEST].split("."):
        if name in _EXPERTS:
            return _EXPERTS[name]
        if name not in _AROUND_MODELS:
            return None
    return None


# What a model may lack, by parts of names: a LoRA of its relative says nothing wrong about it.
_OF_RELATIVES: tuple[tuple[re.Pattern, str], ...] = tuple(
    (re.compile(pattern), whose)
    for pattern, whose in [
        (r"[kv]_img|norm_k_img|img_emb|add_[kv]_proj|norm_added_|image_embedder", "the image branch of Wan2.1 I2V"),
        (r"vace_", "VACE's blocks"),
        (r"control_adapter|ref_conv", "the control layers of Wan Fun"),
        (r"(?:^|[._])(?:lora_)?te\d?_|text_encoder|text_model", "a text encoder"),
        (r"audio|face_adapter|motion_encoder|pose", "layers of a relative"),
    ]
)


def relative_of(key: str) -> str | None:
    """Whose layers an unknown key is for, where that is known."""
    return next((whose for pattern, whose in _OF_RELATIVES if pattern.search(key[:_LONGEST])), None)


def _split(key: str) -> tuple[str, str | None]:
    match = _ROLE.search(key) if len(key) <= _LONGEST else None
    return (key[: match.start()], match.lastgroup) if match else (key, None)


def _target(module: str, role: str, weights: Collection[str]) -> str | None:
    """The weight of a module that a role is about; a parameter that is no module's weight may be named itself."""
    if role in _OF_BIAS:
        names = [f"{module}.bias"]
    else:
        names = [f"{module}.modulation"] if role in _OF_MODULATION else [f"{module}.weight", module]
    return next((name for name in names if name in weights), None)


def _modules(weights: Collection[str]) -> dict[str, str]:
    """Every spelling of a module's path, without a prefix -> our path."""
    own = {key.removesuffix(".weight") for key in weights} | {key.rpartition(".")[0] for key in weights}
    spelled = {path: path for path in own if path}
    spelled |= {theirs: path for path in spelled.values() if (theirs := DIALECTS["diffusers"].to_theirs(path))}
    spelled |= {path.removesuffix(".0"): own for path, own in spelled.items() if path.endswith(".to_out.0")}
    return spelled | {path.replace(".", "_"): module for path, module in spelled.items()}


def _find(path: str, modules: Mapping[str, str]) -> str | None:
    """Our path of theirs; whole names only, so that ``cross_attn_k_img`` is never taken for ``cross_attn_k``."""
    return modules.get(path) or modules.get(_bare(path)) or _find_flat(path, modules)


def _bare(path: str) -> str:
    """A path without what stands around the model and its layers."""
    names = [name for name in path.split(".") if name not in _AROUND_LAYERS]
    while len(names) > 1 and (names[0] in _AROUND_MODELS or names[1].startswith(_PARTS.get(names[0], "\0"))):
        names = names[1:]
    return ".".join(names)


def _find_flat(path: str, modules: Mapping[str, str]) -> str | None:
    prefix = next((prefix for prefix in _FLAT_PREFIXES if path.startswith((f"{prefix}_", f"{prefix}."))), None)
    if prefix is None:
        return None
    rest = path[len(prefix) :].lstrip("._").replace(".", "_")
    for _ in range(_LONGEST):
        if module := modules.get(rest) or modules.get(_AROUND_FLAT_LAYERS.sub("", rest)):
            return module
        around = _AROUND_FLAT.match(rest)
        if around is None:
            return None
        rest = rest[around.end() :].lstrip("_")
    return None
