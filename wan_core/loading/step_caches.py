"""Step caches with what they need of a model's files: its own measured curve, and how it embeds timesteps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from ..config import Variant
from ..errors import Hint, WanError
from ..external import ExternalModel
from ..files.atomic import unfinished
from ..models.dit.layers import sinusoid
from ..sampling import teacache
from ..sampling.magnitudes import Curve, curve, curves_of
from ..sampling.step_cache import POLICIES, StepCache
from .dit import DiTFile

FORMAT = "wan_core magnitudes 1"
_ENDING = ".magnitudes.json"
_LARGEST = 1_000_000  # bytes of a file of curves: a thousand steps take 50,000
_ROWS = 4096  # of the modulations' matrix that become float32 at once


def step_cache(
    policy: str,
    variant: Variant,
    high: DiTFile | ExternalModel,
    low: DiTFile | ExternalModel | None = None,
    *,
    amount: float | None = None,
    dense: float = 0.2,
    most: int = 2,
    tea_model: str | None = None,
) -> StepCache:
    """A step cache for a model. What it lacks is said where it is used (``StepCache.check``).

    Args:
        amount: None is the policy's usual one.
        tea_model: whose polynomial, of ``teacache.POLYNOMIALS``; None goes by the model.

    Raises:
        WanError: numbers out of range, an unknown policy or model, a damaged file of curves.
    """
    if policy == "magnitude":
        curves, source = _curves(variant, high, low)
        return StepCache(policy, _amount(policy, amount), dense, most, curves, source=source)
    if policy == "teacache":
        name = tea_model or teacache.name_for(variant, high.path.name)
        rule = teacache.polynomial(name) if name else None
        embed = None
        if rule is not None and low is None and not isinstance(high, ExternalModel):
            embed = embedding(high, rule.signal)
        usual = amount if amount is not None or rule is None else rule.usual[0]
        return StepCache(policy, _amount(policy, usual), dense, most, tea=rule, embed=embed, source=_tea_source(name))
    return StepCache(policy, _amount(policy, amount), dense, most)


def _amount(policy: str, amount: float | None) -> float:
    if amount is not None or policy not in POLICIES:
        return 0.0 if amount is None else amount
    return POLICIES[policy].usual


def _tea_source(name: str | None) -> str:
    return f"the polynomial of {name}" if name else ""


# --- curves


def curve_file(path: Path) -> Path:
    """Where a model's own curve lies: beside its file, or in its folder."""
    return path / _ENDING[1:] if path.is_dir() else path.with_name(path.stem + _ENDING)


def write_curve(file: Path, model: DiTFile, sigmas: list[float], ratios: list[float], measured: Mapping) -> None:
    """
    Args:
        sigmas: the noise levels of the steps, falling.
        ratios: how the residual grew between each two of them.
        measured: how, for whoever reads the file.
    """
    content = {"format": FORMAT, "model_bytes": _bytes_of(model), **measured, "sigmas": sigmas, "ratios": ratios}
    with unfinished(file) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def own_curve(model: DiTFile) -> Curve | None:
    """The curve that was measured of this very file, if one was.

    Raises:
        WanError: the file of curves is damaged, or was measured on another file of this name.
    """
    file = curve_file(model.path)
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError("too large")
        content = json.loads(file.read_text(encoding="utf-8"))
        sigmas, ratios = ([float(value) for value in content[name]] for name in ("sigmas", "ratios"))
        good = content["format"] == FORMAT and len(ratios) == len(sigmas) - 1 >= 1
        good &= all(0 <= b < a <= 1 for a, b in zip(sigmas, sigmas[1:], strict=False))
        if not (good and all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)):
            raise ValueError("not falling sigmas with a ratio between each two")
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise WanError(
            f"{file} holds no curve of magnitudes ({type(error).__name__}).", Hint.CALIBRATE_AGAIN
        ) from error
    if content.get("model_bytes") != _bytes_of(model):
        raise WanError(
            f"{file} was measured on another file than {model.path.name}, which has changed since.",
            Hint.CALIBRATE_AGAIN,
        )
    return curve(sigmas, ratios)


def _bytes_of(model: DiTFile) -> int:
    return sum(file.stat().st_size for file in model.checkpoint.files)


def _curves(
    variant: Variant, high: DiTFile | ExternalModel, low: DiTFile | ExternalModel | None
) -> tuple[Mapping[str, Curve], str]:
    """The experts' curves, its own before published ones, and where they are from."""
    experts = {"only": high} if low is None else {"high": high, "low": low}
    published = curves_of(variant.task)
    found = {name: published[name] for name in experts if name in published}
    own = {name: own_curve(file) for name, file in experts.items() if not isinstance(file, ExternalModel)}
    measured = {name: curve for name, curve in own.items() if curve}
    if not measured:
        return found, "the published curves" if found else ""
    if len(measured) == len(experts):
        return measured, "the model's own curves" if low is not None else "the model's own curve"
    return found | measured, f"the {' and '.join(measured)}-noise expert's own curve, and published ones"


# --- TeaCache's signal


def embedding(file: DiTFile, signal: teacache.Signal) -> teacache.Embed:
    """How a model embeds timesteps, from its file, computed on the CPU in float32; without LoRAs.

    Args:
        signal: "time", the embedding that its head takes, or "modulation", its blocks' six.
    """

    @lru_cache(maxsize=8)
    def computed(timesteps: tuple[float, ...]) -> torch.Tensor:
        with file.checkpoint.reading(), torch.no_grad():
            waves = sinusoid(torch.tensor(timesteps, dtype=torch.float64), file.config.freq_dim)
            e = F.linear(waves, _weight(file, "time_embedding.0.weight"), _weight(file, "time_embedding.0.bias"))
            e = F.linear(F.silu(e), _weight(file, "time_embedding.2.weight"), _weight(file, "time_embedding.2.bias"))
            if signal == "time":
                return e
            matrix = file.checkpoint.tensor(file.names["time_projection.1.weight"])
            parts = [F.linear(F.silu(e), rows.float()) for rows in matrix.split(_ROWS)]
            return torch.cat(parts, dim=-1) + _weight(file, "time_projection.1.bias")

    return lambda timesteps: computed(tuple(timesteps.tolist()))


def _weight(file: DiTFile, name: str) -> torch.Tensor:
    return file.checkpoint.tensor(file.names[name]).float()
