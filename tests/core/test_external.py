"""A network that another program holds, in the place of a checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wan_core.config import PerExpert
from wan_core.errors import WanError
from wan_core.external import ExternalModel
from wan_core.loading.dit import DiTFile, read_dit
from wan_core.lora.attach import with_lora
from wan_core.memory.engine import Engine
from wan_core.memory.run import denoise_in_memory
from wan_core.recipe import ModelRecipe, pair
from wan_core.sampling.denoise import Callbacks, Run
from wan_core.sampling.experts import Switch
from wan_core.sampling.guidance import Condition
from wan_core.sampling.schedules import schedule
from wan_core.tools.tiny import TinySizes, write_tiny

SHAPE = (1, 16, 1, 4, 4)
ONE = PerExpert(1, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[DiTFile]:
    """High, low."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, "t2v-A14B", layout="comfyui", sizes=TinySizes(dim=128, ffn_dim=128, layers=1))
    return [read_dit(path) for path in sorted(folder.glob("diffusion_models/*.safetensors"))]


def held(file: DiTFile, **changes: object) -> ExternalModel:
    """A network elsewhere that happens to be ours, called by an engine of its own."""
    elsewhere = Engine()
    recipe = ModelRecipe(file, dtype="float32")
    made = ExternalModel(
        file.path.name,
        file.config,
        torch.float32,
        (file.path.name,),
        lambda device: elsewhere.experts(recipe, ONE, device).high.model,
    )
    return replace(made, **changes)


def sampled(recipe: ModelRecipe) -> tuple[torch.Tensor, Engine, list]:
    torch.manual_seed(0)
    x, text = torch.randn(SHAPE), Condition(torch.randn(1, 4, recipe.high.config.text_dim))
    engine, plans = Engine(), []
    made = denoise_in_memory(
        engine,
        recipe,
        ONE,
        torch.device("cpu"),
        x,
        Run(schedule("simple", 4, 5.0), "unipc", text),
        Callbacks(on_plan=plans.append),
    )
    return made, engine, plans


def test_pairs_give_the_same_wherever_the_weights_are(files: list[DiTFile]) -> None:
    own = [ModelRecipe(file, dtype="float32") for file in files]
    others = [ModelRecipe(held(file)) for file in files]
    expected, _, _ = sampled(pair(*own, Switch()))
    for high, low, loads in ((others[0], others[1], 0), (others[0], own[1], 1), (own[0], others[1], 1)):
        made, engine, plans = sampled(pair(high, low, Switch()))
        assert torch.equal(made, expected)
        assert engine.loads == loads and len(plans) == loads  # the engine plans and loads its own part alone


def test_options_are_those_of_the_side_that_has_weights(files: list[DiTFile]) -> None:
    own = ModelRecipe(files[1], dtype="float32", swap_blocks=1)
    mixed = pair(ModelRecipe(held(files[0])), own, Switch("step", 2))
    assert (mixed.dtype, mixed.swap_blocks, mixed.switch.value) == ("float32", 1, 2)
    assert mixed.high.name == files[0].path.name and mixed.own == (files[1],)


def test_what_a_pair_says_of_its_files(files: list[DiTFile]) -> None:
    high, low = (ModelRecipe(held(file)) for file in files)
    assert "High-noise expert: wan2.2_t2v_high" in pair(high, low, Switch()).notes[0]
    assert "the same file" in pair(high, ModelRecipe(held(files[0])), Switch()).notes[0]
    changed = ModelRecipe(held(files[0], fingerprint=("with a LoRA",)))
    assert "both files are high-noise" in pair(high, changed, Switch()).notes[0]
    with pytest.raises(WanError, match="seem to be swapped"):
        pair(low, high, Switch())
    with pytest.raises(WanError, match="differ in dim 128 and 256"):
        pair(high, ModelRecipe(held(files[1], config=replace(files[1].config, dim=256))), Switch())


def test_its_weights_are_not_ours_to_change(files: list[DiTFile]) -> None:
    with pytest.raises(WanError, match=r"another program holds wan2.2_t2v_high.*where the model is held"):
        with_lora(ModelRecipe(held(files[0])), Path("any.safetensors"), ONE)


def test_running_out_of_memory_there_is_not_mended_here(files: list[DiTFile]) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(WanError, match="memory ran out"):
        sampled(ModelRecipe(held(files[0], connect=lambda device: full)))


@pytest.mark.parametrize("fails", [False, True])
def test_it_is_told_when_the_run_is_over(files: list[DiTFile], fails: bool) -> None:
    """At once: its owner may use it for something else from then on."""

    class Lent:
        def __init__(self, device: torch.device):
            self.own, self.ended = held(files[0]).connect(device), 0
            lent.append(self)

        def __call__(self, *args: object, **options: object) -> torch.Tensor:
            if fails:
                raise KeyboardInterrupt
            return self.own(*args, **options)

        def end(self) -> None:
            self.ended += 1

    lent: list[Lent] = []
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        sampled(ModelRecipe(held(files[0], connect=Lent)))
    assert [one.ended for one in lent] == [1]
