"""What guidance rules bring on the nano pair: calls of the model, what of the prompt is seen, and how far they lead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch

from nano.evaluate import Rate, score
from nano.world import Scene
from wan_core.pipeline import Models
from wan_core.sampling.guidance_rules import (
    Guidance,
    Interval,
    NormalisedAttention,
    Projected,
    Rule,
    SkipLayers,
    Tangential,
    ZeroStar,
)

from . import document

_BEGIN, _END = "<!-- guidance: written by python -m bench quality -->", "<!-- end of guidance -->"


@dataclass(frozen=True)
class Way:
    """Rules and a guidance scale."""

    scale: float
    rules: tuple[Rule, ...] = ()

    def __str__(self) -> str:
        return ", ".join([f"cfg {self.scale:g}", *map(str, [Guidance(self.rules)] if self.rules else [])])


# What 55 is to the 2.1 million values of an 832x480 clip's latent, 2.7 is to the 5120 of these.
APG = Projected(norm_threshold=2.7)
PLAIN = Way(3.0)
WAYS = (
    Way(3.0, (Interval(1.0, 0.5),)),
    Way(3.0, (Interval(1.0, 0.8),)),
    Way(1.0),
    Way(1.0, (NormalisedAttention(),)),
    Way(3.0, (ZeroStar(1),)),
    Way(3.0, (Tangential(),)),
    Way(3.0, (APG,)),
    Way(3.0, (SkipLayers(1.0, 0.5, (1,)),)),
    Way(8.0),
    Way(8.0, (ZeroStar(1),)),
    Way(8.0, (Tangential(),)),
    Way(8.0, (APG,)),
)

Draw = Callable[[Models, str, float], "Clip"]


@dataclass(frozen=True, eq=False)
class Clip:
    """A latent, how often the model was asked for it, and its video [3, F, H, W] in -1..1."""

    latent: torch.Tensor
    calls: int
    video: torch.Tensor


def rows(models: Models, scenes: Sequence[tuple[Scene, str]], draw: Draw, ways: Sequence[Way] = WAYS) -> Iterator[dict]:
    """One for each way, plain guidance first: all others are measured by its clips."""
    whole: list[Clip] = []
    for way in (PLAIN, *ways):
        made = replace(models, dit=replace(models.dit, guidance=Guidance(way.rules)))
        clips = [draw(made, caption, way.scale) for _, caption in scenes]
        whole = whole or clips
        far = [((one.latent - all_.latent).norm() / all_.latent.norm()).item() for one, all_ in pairs(clips, whole)]
        calls = sum(one.calls for one in whole) / sum(one.calls for one in clips)
        seen = score((clip.video, scene) for clip, (scene, _) in zip(clips, scenes, strict=True)).values()
        yield {"way": str(way), "speed": round(calls, 3), "distance": round(mean(far), 4), **_words(list(seen))}


def pairs(ours: list[Clip], whole: list[Clip]) -> Iterator[tuple[Clip, Clip]]:
    return zip(ours, whole, strict=True)


def _words(seen: list[Rate]) -> dict[str, int]:
    return {"seen": sum(rate.hits for rate in seen), "words": sum(rate.count for rate in seen)}


def publish(found: Sequence[dict]) -> None:
    lines = ["| | times as fast | words seen | distance |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['way']} | {row['speed']:.2f} | {row['seen']} of {row['words']} | {row['distance']:.3f} |"
        for row in found
    ]
    document.publish("\n".join(lines) + "\n", _BEGIN, _END)
