"""Tensors of a file beside those of a whole model: which may be left out, and which may not.

What is missing is always an error. What is left over is mostly of no use to a model that runs here: a trainer's losses,
an exporter's counters, gates of an attention that is not used. That is said and ignored. But a scale, an adapter or a
bias that hangs on a layer which does run would change the result, and so would the layers of a relative: those are
refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import WanError
from ..files.checkpoint import _some

# Of a key's last word: numbers without which quantised weights mean something else.
_QUANTISED = re.compile(
    r"(^|_)(scales?|zero_?points?|zeros|qweight|qzeros|qscales|absmax|g_idx|amax|codebook|quant_(map|state)|bitsandbytes\w*)"
    r"(_|$|\d)"
)
_NO_SCALE = frozenset(("logit_scale", "scale_factor", "sigma_scale"))  # of CLIP, and of latents: no weight's
_ADAPTER = re.compile(r"(^|[._])(lora|lokr|loha|hada|dora|glora|oft|boft)([._]|$)|\.diff(_[bm])?$")
_NUMBER = re.compile(r"\.([0-9]{1,9})[0-9]*(?=\.)")  # of a longer one the beginning: it is large enough


def leave_out(
    path: Path, wanted: Collection[str], names: Mapping[str, str], outside: Sequence[str], what: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The keys of a model, and what to say of the rest.

    Args:
        wanted: our key of every tensor of the model.
        names: our key -> the file's, for all that lies where the model lies.
        outside: keys of the file that lie elsewhere and belong to no other model that is known.
        what: the model's kind, for messages.

    Raises:
        WanError: tensors are missing, or others are there that would change the result.
    """
    extra = {own: theirs for own, theirs in names.items() if own not in wanted}
    missing = sorted(key for key in wanted if key not in names)
    if missing:
        raise misfit(path, missing, sorted(extra.values()))
    changing = sorted({*_changed(wanted, extra), *(key for key in outside if _ADAPTER.search(key))})
    if changing:
        raise WanError(
            f"{misfit(path, (), changing)} They belong to layers of the model, so without them the result "
            "would be another: merge or dequantise them first, or use the file as published."
        )
    kept = {own: theirs for own, theirs in names.items() if own in wanted}
    return kept, _notes(path, [*extra.values(), *outside], what)


def misfit(path: Path, missing: Iterable[str], unexpected: Iterable[str]) -> WanError:
    """A file whose tensors are not those of the model that its shapes describe."""
    return WanError(
        f"{path} does not fit the model that its shapes describe. "
        f"Missing: {_some(missing) or 'nothing'}. Unexpected: {_some(unexpected) or 'nothing'}. "
        "Is it a partial download, a LoRA, or a model that this version does not support?"
    )


def _changed(wanted: Collection[str], extra: Mapping[str, str]) -> list[str]:
    """The file's keys among the extra ones that change what a layer of ours computes, or add one of a numbered list."""
    layers = {key.rsplit(".", 1)[0] for key in wanted if key.endswith((".weight", ".gamma"))}
    modules, counts = {module for key in wanted for module in _modules_of(key)}, _numbered(wanted)
    return [
        theirs
        for own, theirs in extra.items()
        if not layers.isdisjoint(_modules_of(own))
        or _ADAPTER.search(own)
        or _is_scale(own, modules)
        or _goes_on(own, counts)
    ]


def _modules_of(key: str) -> list[str]:
    """The modules that a tensor is in, from the outermost on: "blocks", "blocks.0", ..."""
    words = key.split(".")
    return [".".join(words[:end]) for end in range(1, len(words))]


def _is_scale(key: str, modules: Collection[str]) -> bool:
    """A number that weights of the module it lies in are multiplied by."""
    module, _, last = key.rpartition(".")
    return module in modules and last not in _NO_SCALE and bool(_QUANTISED.search(last))


def _numbered(keys: Iterable[str]) -> dict[str, int]:
    """List of modules -> how many it has."""
    found: dict[str, int] = {}
    for key in keys:
        for match in _NUMBER.finditer(key):
            name = key[: match.start()]
            found[name] = max(found.get(name, 0), int(match[1]) + 1)
    return found


def _goes_on(key: str, counts: Mapping[str, int]) -> bool:
    return any(int(match[1]) >= counts.get(key[: match.start()], int(match[1]) + 1) for match in _NUMBER.finditer(key))


def _notes(path: Path, ignored: list[str], what: str) -> tuple[str, ...]:
    if not ignored:
        return ()
    tensors = "1 tensor" if len(ignored) == 1 else f"{len(ignored)} tensors"
    return (
        f"{path.name}: {tensors} that {what} does not have {'is' if len(ignored) == 1 else 'are'} ignored: "
        f"{_some(sorted(ignored))}.",
    )
