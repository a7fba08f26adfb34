"""Guidance rules on a device without numbers: nothing waits for it, nothing lies elsewhere, all of it is planned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from bench.rehearse import scenes
from bench.rehearse.files import Shelf
from bench.rehearse.scenes import Run, rehearse
from wan_core.sampling.guidance_rules import (
    Guidance,
    Interval,
    Merge,
    NormalisedAttention,
    Projected,
    Rule,
    SkipLayers,
    Tangential,
    ZeroStar,
)

RUN = Run("t2v-1.3B", "480p", layers=2, guided=True)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    yield Shelf(tmp_path_factory.mktemp("shelf"))


def figures(shelf: Shelf, run: Run, *rules: Rule) -> dict:
    plain = scenes.models_of

    def with_rules(run: Run, shelf: Shelf):
        models = plain(run, shelf)
        return replace(models, dit=replace(models.dit, guidance=Guidance(rules)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "models_of", with_rules)
        return rehearse(run, shelf).row(run)


@pytest.mark.parametrize(
    ("run", "rules"),
    [
        (RUN, (Projected(), ZeroStar(1), SkipLayers(1.0, 0.0, (1,)), NormalisedAttention())),
        (RUN, (Tangential(), Interval(1.0, 0.0))),
        (RUN, (Merge(),)),
        (replace(RUN, guided=False), (NormalisedAttention(),)),
        (Run("ti2v-5B", "704p", image=True, guided=True), (Merge(), Projected())),
        (Run("i2v-14B", "480p", image=True, guided=True), (NormalisedAttention(),)),
    ],
    ids=["all", "tcfg", "merged", "nag", "image, merged", "picture, nag"],
)
def test_rules_cost_what_is_planned(shelf: Shelf, run: Run, rules: tuple[Rule, ...]) -> None:
    """The step before whose end is one wait (see test_rehearse) has no other with them."""
    plain, ours = figures(shelf, run), figures(shelf, run, *rules)
    assert ours["waits"] <= plain["waits"], (ours["waits_where"], plain["waits_where"])
    assert ours["over_plan_percent"] <= 2, ours
    assert ours["peak_gb"] >= plain["peak_gb"] - 0.01
