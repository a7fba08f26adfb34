"""What a Wan transformer may understand besides text: one file for each capability, registered here.

A feature's file holds everything that is particular to it: how keys and shapes show it (``detect``), its keys in other
dialects (``DIFFUSERS``), its modules (``attach``), and what it makes of an input before the blocks run (``branch``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from ....config import FeatureConfig
from . import clip_tokens

Shapes = Mapping[str, tuple[int, ...]]


class Feature(Protocol):
    """What the module of a feature offers."""

    CONFIG: type[FeatureConfig]
    DIFFUSERS: list[tuple[str, str]]  # rows of ``layouts.keys.Renames``: diffusers' name, the official one
    NORMS: tuple[str, ...]  # how keys of norms begin that are not called so

    def detect(self, shapes: Shapes) -> FeatureConfig | None:
        """The feature's dimensions, from official keys and their shapes; None where the model lacks it."""

    def attach(self, dit: nn.Module, config: FeatureConfig) -> None:
        """Add the feature's modules to a transformer, under their official names."""

    def branch(self, dit: nn.Module, inputs: tuple, batch: int) -> Branch | None:
        """What a second source for cross-attention says for these inputs; None where the feature adds none."""

    def context_tokens(self, config: FeatureConfig) -> int:
        """The most tokens that every block attends to besides the text's, for the memory plan."""

    def example(self, config: FeatureConfig, batch: int) -> object:
        """The largest input that the feature takes, without content, for the memory plan."""


class Branch(Protocol):
    """Tokens beside the text that every block's cross-attention hears, with keys and values of their own."""

    kind: str
    tokens: torch.Tensor  # [B, N, dim]

    def keys_values(self, attention: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one block: keys and values [B, N, heads, head_dim]."""


FEATURES: tuple[Feature, ...] = (clip_tokens,)


def detect(shapes: Shapes) -> tuple[FeatureConfig, ...]:
    """The features that a model's keys and shapes show."""
    found = (feature.detect(shapes) for feature in FEATURES)
    return tuple(config for config in found if config is not None)


def feature_of(config: FeatureConfig) -> Feature:
    """The module that knows a feature."""
    return next(feature for feature in FEATURES if feature.CONFIG is type(config))
