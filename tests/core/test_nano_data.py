"""The nano world, its captions and its evaluator, which must read films of the world without a mistake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from nano.captions import caption
from nano.dataset import RandomClips, held_out, scenes, subject, to_tensor, training_clips
from nano.evaluate import PAIRS, ceiling, look_at, score, score_pairs
from nano.judge import T2V, Judge, held_out_prompts
from nano.place import PlacedTask, PlaceTask
from nano.text import WORDS, make_tokenizer, tokenizer_of
from nano.world import CAMERAS, MOTIONS, SHAPES, Scene, film, placed, random_scene
from wan_core.config import Architecture
from wan_core.train.cache import Entry
from wan_core.train.data import Frame
from wan_core.train.dit import Data, DiTTask, Recipe
from wan_core.train.loop import Plan, train
from wan_core.train.model import new_dit
from wan_core.train.objective import NoiseRange
from wan_core.train.sample import Sampling

SIDE, FRAMES = 64, 9
PLAIN = Scene("circle", "red", "ocean")


def first(count: int, *, test: bool = True, seed: int = 3) -> list[tuple[Scene, str]]:
    return [row for _, row in zip(range(count), scenes(seed, test=test), strict=False)]


def clip(scene: Scene) -> torch.Tensor:
    return to_tensor(film(scene, FRAMES, SIDE, SIDE))


def test_the_same_seed_is_the_same_clip():
    a, b = (training_clips(3, Frame(SIDE, SIDE, FRAMES))[2] for _ in range(2))
    assert a.prompt == b.prompt and a.key == b.key and torch.equal(a.pixels(), b.pixels())
    assert a.pixels().shape == (3, FRAMES, SIDE, SIDE) and a.pixels().abs().max() <= 1


def test_training_never_sees_a_combination_of_the_test():
    def combinations(test: bool) -> set[tuple]:
        return {(s.shape, s.colour, s.ground, s.motion) for s, _ in first(400, test=test, seed=0)}

    assert not combinations(True) & combinations(False)
    assert 0.05 < np.mean([held_out(random_scene(np.random.default_rng(i))) for i in range(400)]) < 0.2


def test_shapes_cover_about_the_same_area():
    areas = [
        (clip(replace(PLAIN, shape=shape)) != clip(replace(PLAIN, shape=shape, x=9.0)))[:, 4].any(0).float().mean()
        for shape in SHAPES
    ]
    assert max(areas) / min(areas) < 1.25


def test_the_subject_of_a_latent_is_where_the_shape_passes():
    """Eight pixels and, after the first, four frames of a film share a place; where none shows the shape, it is 0."""
    scene, frame = replace(PLAIN, motion="right"), Frame(SIDE, SIDE, FRAMES)
    mask = subject(scene, frame, 8)
    assert mask.shape == (1, 3, 8, 8) and set(mask.unique().tolist()) == {0.0, 1.0}
    differs = (clip(scene) - clip(replace(scene, y=9.0))).abs().amax(dim=0) > 0.05
    passed = [differs[part].any(0).view(8, 8, 8, 8).any(3).any(1) for part in (slice(0, 1), slice(1, 5), slice(5, 9))]
    assert not (torch.stack(passed) & (mask[0] == 0)).any()  # nothing of it is missed
    assert mask.mean() < 2 * torch.stack(passed).float().mean()  # and not much more is marked


def test_shapes_stay_in_the_picture():
    random = np.random.default_rng(0)
    for motion in MOTIONS:
        for shot in ("plain", "wide"):
            scene = placed(replace(PLAIN, motion=motion, shot=shot), random)
            changed = (clip(scene) - clip(replace(scene, x=9.0))).abs().amax(0) > 0.1
            assert not changed[:, [0, -1]].any() and not changed[:, :, [0, -1]].any(), (motion, shot)


def test_the_evaluator_reads_the_world():
    rates = ceiling(24, FRAMES, SIDE)
    for word in ("ground", "colour", "shape", "motion", "camera"):
        assert rates[word].value >= 0.95, (word, str(rates[word]))


def test_the_evaluator_sees_what_is_wrong():
    """Against scenes that differ from the film in one word, that word alone is missed."""
    wrong = replace(PLAIN, shape="square", colour="green", ground="snow", motion="left")
    seen = look_at(clip(wrong), PLAIN)
    assert (seen.shape, seen.colour, seen.ground, seen.motion) == ("square", "green", "snow", "left")
    noise = torch.rand(3, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rates = score([(noise, scene) for scene, _ in first(12)])
    assert rates["motion"].value < 0.5 and rates["shape"].value < 0.7


@pytest.mark.parametrize("camera", list(CAMERAS))
def test_camera_moves_are_told_apart(camera: str):
    scene = Scene("square", "yellow", "brick wall", camera=camera)
    assert look_at(clip(scene), scene).camera == camera


def test_pairs_of_words_move_their_statistic():
    rates = score_pairs(clip, [replace(PLAIN, ground="meadow"), Scene("square", "purple", "desert")])
    assert set(rates) == set(PAIRS) and all(rate.value == 1 for rate in rates.values()), rates


def test_captions_name_every_word_in_both_languages():
    scene = Scene("triangle", "purple", "brick wall", motion="left", tone="warm", shot="close_up")
    english = caption(scene, np.random.default_rng(0), language="en").lower()
    chinese = caption(scene, np.random.default_rng(0), language="zh")
    assert all(word in english for word in ("triangle", "purple", "brick wall", "left", "warm colors", "close-up"))
    assert all(word in chinese for word in ("三角形", "紫色", "砖墙", "暖色调", "近景"))
    wordings = {caption(scene, np.random.default_rng(i)) for i in range(40)}
    assert len(wordings) > 15


def test_the_tokenizer_knows_the_words():
    tokenizer = tokenizer_of(make_tokenizer(400))
    lengths = [len(tokenizer.encode(words)) for _, words in first(50)]
    assert np.mean(lengths) < 40 and max(lengths) < 100


def test_every_word_of_a_scene_is_asked_of_the_text_encoder():
    for scene, _ in first(50):
        assert all(getattr(scene, name) in words for name, words in WORDS.items())


def test_clips_for_the_autoencoder_are_parts_of_films():
    clips = RandomClips(Frame(SIDE, SIDE, 17))
    a, b = (clips(torch.Generator().manual_seed(1), 5) for _ in range(2))
    assert a.shape == (3, 5, SIDE, SIDE) and torch.equal(a, b)


class Perfect(Judge):
    """A judge of clips that are what was asked for, or with ``wrong`` what somebody else asked for."""

    wrong = False

    def clips(self, high, low, variant, prompts, seed, *, images=False):
        for scene, _ in prompts:
            shown = replace(scene, motion="up", shape="circle", colour="red") if self.wrong else scene
            yield self.film(shown), scene


def test_the_judge_finds_perfect_clips_perfect_and_wrong_ones_wrong():
    judge = Perfect(lambda stage: None, Frame(SIDE, SIDE, FRAMES), Sampling())
    prompts = held_out_prompts(12, fixed=True)
    seen, moved = judge.words("", "", T2V, prompts, [0]), judge.animated("", "", T2V, prompts, [0])
    assert all(rate.value == 1 for rate in seen.rates.values()) and seen.share.value == 1 and seen.explained.value > 30
    assert moved.first.value > 60 and moved.motion.value == 1
    assert all(rate.value == 1 for rate in judge.pairs("", "", T2V, 2).values())
    judge.wrong = True
    worse = judge.words("", "", T2V, prompts, [0])
    assert worse.rates["motion"].value < 0.5 and worse.rates["colour"].value < 0.5
    assert worse.share.value < seen.share.value and worse.explained.value < seen.explained.value - 5


def test_prompts_of_the_judge_are_held_out():
    assert all(held_out(scene) for scene, _ in held_out_prompts(20))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy machine several threads wait for each other at every small product, ten times as long as one takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_places_are_learnt_from_noise_alone(tmp_path, one_thread):
    """Four rows and columns, chance 0.25: nothing but the grid's edges tells them apart."""
    model = new_dit(Architecture(16, 16, dim=128, ffn_dim=256, layers=2, text_dim=32, freq_dim=256, heads=1), seed=0)
    task = PlaceTask(model, (16, 2, 8, 8), torch.zeros(1, 32))
    assert task.accuracy() < 0.4
    train(task, Plan(200, 3e-3, optimiser="muon", weight_decay=0.0), tmp_path)
    assert task.accuracy() > 0.5


def test_training_keeps_the_places_in_mind():
    """The second loss is a cross-entropy over the places of the tokens after two blocks, on top of the velocity's."""
    model = new_dit(Architecture(16, 16, dim=128, ffn_dim=64, layers=2, text_dim=32, freq_dim=256, heads=1), seed=0)
    latent = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    data = Data(lambda i: Entry(latent, None), lambda i: torch.ones(1, 32), torch.zeros(1, 32), [(16, 2, 4, 4)], "one")
    task = PlacedTask(model, data, Recipe(T2V, NoiseRange(0, 1, 5.0), precision="fp32"))
    loss, figures = task.loss(0, torch.Generator().manual_seed(1))
    plain, _ = DiTTask(model, data, task.recipe).loss(0, torch.Generator().manual_seed(1))
    assert figures["velocity"] == pytest.approx(plain.item(), rel=1e-5)
    assert 0.1 < loss.item() - plain.item() < 1.0  # about half of log 2: two frames, rows and columns
    loss.backward()
    taught = (task.parameters()[name] for name in ("reader.votes.weight", "blocks.0.ffn.0.weight"))
    assert all(parameter.grad.abs().sum() > 0 for parameter in taught)
