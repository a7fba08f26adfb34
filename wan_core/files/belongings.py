"""Which tensors of a file are no weights but belong to one: scales and the like, by the names in use.

What is known is handed to who understands the weight. What looks like a part of a packed weight and is not known makes
the file be refused: weights would be wrong without it, and nobody would see why.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import WanError
from .door import shown

if TYPE_CHECKING:
    from .marks import TensorInfo

Belongings = dict[str, str]  # role -> key

# The ends of names, and the roles: "scale" is what to multiply by, "whole" one more factor of the matrix, "smooth" one
# for each column. "activation" is how inputs were to be rounded, which changes no weight and is not needed.
_ROLES = {
    ".weight_scale": "scale", ".scale_weight": "scale", ".weight.scale": "scale", ".weight_scale_2": "whole",
    ".pre_quant_scale": "smooth", ".input_scale": "activation", ".scale_input": "activation",
}  # fmt: skip

# What other programs write, and for whom: none of it is read.
_FOREIGN = {
    ".SCB": "bitsandbytes' int8", ".weight.absmax": "bitsandbytes' 4 bits", ".weight.quant_map": "bitsandbytes' 4 bits",
    ".qweight": "GPTQ, AWQ or Nunchaku", ".qzeros": "GPTQ or AWQ", ".wscales": "Nunchaku (SVDQuant)",
    ".weight_packed": "compressed-tensors", ".weight_global_scale": "compressed-tensors",
    ".weight_zero_point": "compressed-tensors", ".weight._data": "quanto", ".W_q": "HQQ",
    ".weight_s_rel": "ComfyUI's asym_w4a8_int8", ".weight_scale_inv": "fp8 with block-wise scales",
}  # fmt: skip

_USE = "Use a bf16, fp16, fp8, int8, mxfp8, nvfp4 or GGUF file of the same model."

_WORDS = ("scale", "zero", "absmax", "amax", "quant", "codebook", "smooth")
_OF_WEIGHT = ("weight_scale", "weight.scale", "scale_weight")


def belongings_of(path: Path, stored: Mapping[str, TensorInfo]) -> tuple[dict[str, Belongings], set[str]]:
    """The belongings of each tensor that has any, and the keys of all of them.

    Raises:
        WanError: a scale of a tensor that the file does not hold, or two for one tensor.
    """
    found: dict[str, Belongings] = {}
    taken: set[str] = set()
    for key in stored:
        owner, role = _owner(key, stored)
        if role is None:
            continue
        taken.add(key)
        if role == "activation":
            continue
        if owner is None:
            raise WanError(
                f"{shown(path)} holds {shown(key)}, but not the weight that it belongs to. Is it a partial download?"
            )
        if (other := found.setdefault(owner, {}).setdefault(role, key)) != key:
            raise WanError(
                f"{shown(path)} has two scales of {shown(owner)}: {shown(other)} and {shown(key)}. Expected "
                "one. Use another file of the same model."
            )
    return found, taken


def _owner(key: str, stored: Mapping[str, TensorInfo]) -> tuple[str | None, str | None]:
    """Whose belonging a tensor is, and what it is to it."""
    for end, role in _ROLES.items():
        if key.endswith(end):
            layer = key.removesuffix(end)
            return next((one for one in (f"{layer}.weight", layer) if one in stored), None), role
    named = key.removesuffix("_scale")
    return (named, "scale") if named != key and named in stored else (None, None)


def refuse_foreign(
    path: Path, stored: Mapping[str, TensorInfo], taken: Collection[str], marked: Collection[str]
) -> None:
    """
    Raises:
        WanError: tensors of a quantised format that is not read, by the name of who writes it.
    """
    for key in stored:
        if key in taken:
            continue
        end, who = next(((end, who) for end, who in _FOREIGN.items() if key.endswith(end)), (None, None))
        if end and key.removesuffix(end) not in marked and not _is_wide(stored.get(f"{key.removesuffix(end)}.weight")):
            raise WanError(
                f"{shown(path)} holds {shown(key)}: it is quantised for {who}, which this version does not read. {_USE}"
            )
        layer, part = _layer_and_part(key)
        weight = stored.get(f"{layer}.weight")
        if weight is None or not part or layer in marked:
            continue
        if weight.format is None and weight.dtype.itemsize == 1 or part.startswith(_OF_WEIGHT):
            raise WanError(
                f"{shown(path)} holds {shown(key)}, which seems to say how {shown(layer)}.weight is packed "
                f"and is not known to this version. {_USE}"
            )


def _is_wide(weight: TensorInfo | None) -> bool:
    """Whether a weight is there in more than a byte a number: what is said of its packing is then an odd tensor like
    others, which who builds the model refuses.
    """
    return weight is not None and weight.format is None and weight.dtype.itemsize > 1


def _layer_and_part(key: str) -> tuple[str, str]:
    """Of a name that looks like a part of how a weight is packed: the layer, and the rest."""
    for inside in (".weight.", ".weight_"):
        if (place := key.find(inside)) >= 0:
            return key[:place], key[place + 1 :]
    layer, _, part = key.rpartition(".")
    return (layer, part) if any(word in part for word in _WORDS) else (layer, "")
