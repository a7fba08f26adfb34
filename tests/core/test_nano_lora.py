"""A LoRA trained on one look of the nano world: it changes that look, in every dialect and on every kind of base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nano.evaluate import score, statistics
from nano.judge import FILES, TI2V, Judge, held_out_prompts, plain
from tests.core.nano_night import DIALECTS, NANO, nano_judge, write_as
from wan_core.loading.dit import read_dit
from wan_core.lora.apply import adaptation_of
from wan_core.lora.files import read_lora
from wan_core.memory.build import build_dit
from wan_core.memory.engine import pad_text
from wan_core.models.dit.dit import WanDiT
from wan_core.tools.convert import convert
from wan_core.train.sample import Sampling

PROMPTS = 6


@dataclass(frozen=True, eq=False)
class Night:
    """The LoRA, and what the model makes of plain prompts without it.

    Attributes:
        base: the model in float32.
    """

    judge: Judge
    base: Path
    lora: Path
    prompts: Sequence
    before: list

    def clips(self, base: Path, lora: Path, steps: int = 8, prompts: int = PROMPTS) -> list:
        """Clips of the first prompts with a LoRA file on a base, as the loaders of the pack read both."""
        file = read_dit(base)
        dit = build_dit(file, dtype="float32")
        adaptation_of(dit, file).set([read_lora(lora, file)], [1.0])
        model = Texts(dit)
        self.judge.dit, self.judge.how = lambda stage: model, Sampling(steps=steps)
        return list(self.judge.clips("ti2v", "ti2v", TI2V, self.prompts[:prompts], 0))


@dataclass(frozen=True, eq=False)
class Texts:
    """A model as the judge calls it, with its texts in a list."""

    dit: WanDiT
    device = torch.device("cpu")

    def __call__(
        self, x: Tensor, t: Tensor, texts: list[Tensor], on_block: object = None, inputs: tuple = ()
    ) -> Tensor:
        return self.dit(x, t, torch.stack([pad_text(text[None])[0] for text in texts]), inputs=inputs)


@pytest.fixture(scope="module")
def night(night_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Night:
    base = tmp_path_factory.mktemp("night") / "base.safetensors"
    convert(NANO / FILES["ti2v"], base, "fp32")
    judge = nano_judge()
    prompts = [row for row in held_out_prompts(200, fixed=True) if plain(row[0])][:PROMPTS]
    return Night(judge, base, night_lora, prompts, list(judge.clips("ti2v", "ti2v", TI2V, prompts, 0)))


def brightness(clips: list) -> float:
    return sum(statistics(clip, scene).brightness for clip, scene in clips) / len(clips)


def test_it_makes_the_clips_dark_and_what_the_prompt_says_stays(night: Night):
    """Brightness falls below 0.6 of before (the world's night is at about 0.45), grounds are still told apart."""
    after = night.clips(night.base, night.lora)
    assert brightness(after) < 0.6 * brightness(night.before)
    dark = [(clip, replace(scene, time="night")) for clip, scene in after]
    assert score(dark)["ground"].value >= 0.8


@pytest.mark.parametrize("kind", ["as it is", "gguf:Q8_0", "gguf:Q4_0", "int8"])
def test_it_works_on_a_quantised_base(night: Night, tmp_path: Path, kind: str):
    """The family's own file is fp8_scaled."""
    base = NANO / FILES["ti2v"]
    if kind != "as it is":
        base = tmp_path / ("base.gguf" if "gguf" in kind else "base.safetensors")
        convert(night.base, base, kind)
    assert brightness(night.clips(base, night.lora)) < 0.6 * brightness(night.before)


FEW = {"steps": 4, "prompts": 2}


@pytest.fixture(scope="module")
def expected(night: Night) -> list:
    return night.clips(night.base, night.lora, **FEW)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_it_is_the_same_in_every_dialect(night: Night, expected: list, tmp_path: Path, dialect: str):
    """Pictures within 1e-3 (of -1..1) of those of the file that was trained, and dark."""
    write_as(dialect, night.lora, tmp_path / "lora.safetensors")
    found = night.clips(night.base, tmp_path / "lora.safetensors", **FEW)
    assert max((a - b).abs().max().item() for (a, _), (b, _) in zip(found, expected, strict=True)) < 1e-3
    assert brightness(found) < 0.6 * brightness(night.before[:2])
