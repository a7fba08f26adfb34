"""What a clip shows, by plain image statistics and tracking: no learnt part, so nothing can flatter the models.

The evaluator knows the world: it asks which ground, colour, shape or camera move of the world, under the light that was
asked for, explains the pixels best. Its own ceiling is measured on films of the world itself (``ceiling``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import scenes, to_tensor
from .world import (
    CAMERAS,
    COLOURS,
    GROUNDS,
    MOTIONS,
    SHAPES,
    Scene,
    film,
    graded,
    ground_picture,
    moments,
    outline,
    picture,
    placed,
    world_places,
)

_STILL = 0.12  # picture widths below which a shape stays where it is; a moving one covers 0.4
_TEMPLATE = 32  # side of the square that a shape is compared in


@dataclass(frozen=True)
class Seen:
    """What a clip shows; a word is None where nothing was found."""

    ground: str
    colour: str | None
    shape: str | None
    motion: str | None
    camera: str


@dataclass(frozen=True)
class Statistics:
    """Numbers that the words of light and framing move."""

    warmth: float  # red minus blue
    brightness: float
    saturation: float
    area: float  # of the shape, as a part of the picture
    x: float  # of the shape, -0.5 at the left edge to 0.5 at the right


# The first word of a pair must give the larger statistic.
PAIRS: dict[str, tuple[str, str, str]] = {
    "warm / cool": ("tone", "warm", "cool"), "saturated / desaturated": ("tone", "saturated", "desaturated"),
    "high-key / low-key": ("light", "high_key", "low_key"), "day / night": ("time", "day", "night"),
    "close-up / wide": ("shot", "close_up", "wide"), "right / left": ("composition", "right_heavy", "left_heavy"),
}  # fmt: skip
_STATISTIC = {
    "warm / cool": "warmth", "saturated / desaturated": "saturation", "high-key / low-key": "brightness",
    "day / night": "brightness", "close-up / wide": "area", "right / left": "x",
}  # fmt: skip


def look_at(video: Tensor, asked: Scene) -> Seen:
    """Read a clip [3, F, H, W] in -1..1; ``asked`` tells the light and the camera under which to read it."""
    clip = _to_array(video)
    ground = find_ground(clip, asked)
    masks = find_shape(clip, replace(asked, ground=ground))
    places = [_centre(mask) for mask in masks]
    return Seen(ground, _colour(clip, masks, asked), _shape(masks), _motion(places), find_camera(clip))


def statistics(video: Tensor, asked: Scene) -> Statistics:
    """Numbers of a clip [3, F, H, W] in -1..1."""
    clip = _to_array(video)
    masks = find_shape(clip, replace(asked, ground=find_ground(clip, asked)))
    centres = [place for place in map(_centre, masks) if place is not None]
    return Statistics(
        warmth=float((clip[..., 0] - clip[..., 2]).mean()),
        brightness=float(clip.mean()),
        saturation=float((clip.max(axis=-1) - clip.min(axis=-1)).mean()),
        area=float(np.mean([mask.mean() for mask in masks])),
        x=float(np.mean([x for x, _ in centres])) if centres else 0.0,
    )


def find_ground(clip: np.ndarray, asked: Scene) -> str:
    """The ground whose picture, in the light asked for, differs least; large differences count as the shape."""
    errors = {name: float(np.minimum(_difference(clip, replace(asked, ground=name)), 0.25).mean()) for name in GROUNDS}
    return min(errors, key=errors.__getitem__)


def find_shape(clip: np.ndarray, scene: Scene) -> list[np.ndarray]:
    """For each frame the one connected piece that is not ground, [H, W] of booleans (empty where there is none)."""
    difference = _difference(clip, scene)
    threshold = max(0.05, 0.5 * float(np.quantile(difference, 0.99)))
    return [_largest_piece(frame > threshold) for frame in difference]


def find_camera(clip: np.ndarray, stride: int = 4) -> str:
    """The camera move that turns each frame into a later one with the least error."""
    frames = torch.from_numpy(clip).permute(0, 3, 1, 2)
    if len(frames) <= stride:
        return "fixed"
    return min(CAMERAS, key=lambda camera: _warp_error(frames, camera, stride))


def _warp_error(frames: Tensor, camera: str, stride: int) -> float:
    count, _, height, width = frames.shape
    when, total = moments(count), 0.0
    for i in range(0, count - stride, stride):
        x, y, _ = world_places(camera, when[i + stride], height, width)
        x0, y0, scale = world_places(camera, when[i], height, width)
        # world -> picture of frame i, in -1..1 for grid_sample
        across = (x - x0.mean()) / scale * 2
        down = (y - y0.mean()) / scale * 2 * width / height
        grid = torch.from_numpy(np.stack([across, down], axis=-1))[None]
        seen = F.grid_sample(frames[i : i + 1], grid, mode="bilinear", padding_mode="border", align_corners=False)
        inside = (grid.abs().amax(-1) <= 1).float()[:, None]
        error = (seen - frames[i + stride]).abs().clamp(max=0.2).mean(1, keepdim=True)
        total += float((error * inside).sum() / inside.sum().clamp(min=1))
    return total


def _to_array(video: Tensor) -> np.ndarray:
    return video.detach().float().clamp(-1, 1).add(1).div(2).permute(1, 2, 3, 0).cpu().numpy()


def _difference(clip: np.ndarray, scene: Scene) -> np.ndarray:
    """[F, H, W]: how far each pixel is from the empty ground."""
    empty = _empty_film(replace(scene, x=0.0, y=0.0, shape="circle", colour="red", motion="still"), *clip.shape[:3])
    return np.abs(clip - empty).mean(axis=-1)


@lru_cache(maxsize=64)
def _empty_film(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    pictures = []
    for moment in moments(frames) if scene.camera != "fixed" else [0.0]:
        x, y, _ = world_places(scene.camera, moment, height, width)
        pictures.append(graded(scene, ground_picture(scene.ground, x, y), height))
    return np.broadcast_to(np.stack(pictures), (frames, height, width, 3))


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    """The connected piece around the densest place of a mask."""
    grid = torch.from_numpy(mask)[None, None].float()
    if not mask.any():
        return mask
    dense = F.avg_pool2d(grid, 7, stride=1, padding=3) * grid
    piece = torch.zeros_like(grid)
    piece.view(-1)[int(dense.argmax())] = 1
    size = 0.0
    while float(piece.sum()) > size:
        size = float(piece.sum())
        for _ in range(8):
            piece = F.max_pool2d(piece, 3, stride=1, padding=1) * grid
    return piece[0, 0].bool().numpy()


def _centre(mask: np.ndarray) -> tuple[float, float] | None:
    """In picture widths from the middle."""
    if mask.sum() < 8:
        return None
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    return float((columns.mean() + 0.5 - width / 2) / width), float((rows.mean() + 0.5 - height / 2) / width)


def _motion(places: list[tuple[float, float] | None]) -> str | None:
    """The direction of the line through the places; None if the shape is lost in half of the frames."""
    known = [(i, *place) for i, place in enumerate(places) if place is not None]
    if len(known) < max(2, len(places) / 2):
        return None
    when, x, y = np.array(known).T
    dx, dy = (np.polyfit(when, along, 1)[0] * (len(places) - 1) for along in (x, y))
    if max(abs(dx), abs(dy)) < _STILL:
        return "still"
    wanted = (np.sign(dx), 0) if abs(dx) > abs(dy) else (0, np.sign(dy))
    return next(name for name, way in MOTIONS.items() if way == wanted)


def _colour(clip: np.ndarray, masks: list[np.ndarray], asked: Scene) -> str | None:
    """The colour of the world that, in the light asked for, is nearest to the shape's inside."""
    inner = [picture[_shrunk(mask)] for picture, mask in zip(clip, masks, strict=True)]
    pixels = np.concatenate(inner)
    if len(pixels) < 8:
        return None
    found = np.median(pixels, axis=0)
    lit = {name: graded(asked, np.array(rgb, np.float32)[None, None], 1)[0, 0] for name, rgb in COLOURS.items()}
    return min(lit, key=lambda name: float(np.abs(lit[name] - found).sum()))


def _shrunk(mask: np.ndarray) -> np.ndarray:
    """Without the edge, as long as something is left."""
    hole = F.max_pool2d(1 - torch.from_numpy(mask)[None, None].float(), 5, stride=1, padding=2)
    inner = (hole[0, 0] == 0).numpy()
    return inner if inner.sum() >= 4 else mask


def _shape(masks: list[np.ndarray]) -> str | None:
    """The shape whose filled outline overlaps best, each stretched to its own box."""
    boxed = [box for box in map(_boxed, masks) if box is not None]
    if not boxed:
        return None
    scores = {name: np.mean([_overlap(box, _template(name)) for box in boxed]) for name in SHAPES}
    return max(scores, key=scores.__getitem__)


def _boxed(mask: np.ndarray) -> np.ndarray | None:
    if mask.sum() < 16:
        return None
    rows, columns = np.nonzero(mask)
    box = torch.from_numpy(mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])[None, None].float()
    return F.interpolate(box, size=(_TEMPLATE, _TEMPLATE), mode="bilinear")[0, 0].numpy() > 0.5


@lru_cache
def _template(shape: str) -> np.ndarray:
    places = np.linspace(-1.6, 1.6, 321)
    u, v = np.meshgrid(places, places)
    return _boxed(outline(shape, u, v, 1.0) < 0)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


@dataclass(frozen=True)
class Rate:
    """A share of hits, and its standard error."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        return self.hits / max(1, self.count)

    @property
    def error(self) -> float:
        return math.sqrt(self.value * (1 - self.value) / max(1, self.count))

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f} of {self.count}"


def score(pairs: Iterable[tuple[Tensor, Scene]]) -> dict[str, Rate]:
    """How often each word of the scene is seen in its clip.

    Colour, ground and shape count on every clip; motion where the camera is fixed, the camera where the shape stays.
    """
    hits: dict[str, list[bool]] = {}
    for video, scene in pairs:
        seen = look_at(video, scene)
        words = ["ground", "colour", "shape"] + (["motion"] if scene.camera == "fixed" else [])
        words += ["camera"] if scene.motion == "still" else []
        for word in words:
            hits.setdefault(word, []).append(getattr(seen, word) == getattr(scene, word))
    return {word: Rate(sum(row), len(row)) for word, row in hits.items()}


def together(scores: Iterable[Mapping[str, Rate]]) -> dict[str, Rate]:
    """The scores of several sets of clips as one."""
    hits: dict[str, list[Rate]] = {}
    for rates in scores:
        for word, rate in rates.items():
            hits.setdefault(word, []).append(rate)
    return {word: Rate(sum(r.hits for r in row), sum(r.count for r in row)) for word, row in hits.items()}


def score_pairs(films: Callable[[Scene], Tensor], base: Iterable[Scene]) -> dict[str, Rate]:
    """How often the first word of a pair moves the statistic above the second, all else the same."""
    hits: dict[str, list[bool]] = {name: [] for name in PAIRS}
    for scene in base:
        for name, won in hits.items():
            more, less = (pair_scene(scene, name, side) for side in (0, 1))
            won.append(pair_won(name, (films(more), more), (films(less), less)))
    return {name: Rate(sum(row), len(row)) for name, row in hits.items()}


def pair_scene(scene: Scene, name: str, side: int) -> Scene:
    """The scene with the first (0) or the second (1) word of a pair."""
    look, *words = PAIRS[name]
    return placed(replace(scene, **{look: words[side]}), np.random.default_rng(0))


def pair_won(name: str, more: tuple[Tensor, Scene], less: tuple[Tensor, Scene]) -> bool:
    """Whether the clip of a pair's first word has the larger statistic."""
    first, second = (getattr(statistics(*side), _STATISTIC[name]) for side in (more, less))
    return first > second


def explanation(video: Tensor, asked: Scene) -> float:
    """PSNR in dB of a clip against the world's own picture of what was asked for, with the shape where it is seen.

    It falls with the wrong colours, a torn shape, noise or blur, whatever words can still be read.
    """
    clip = _to_array(video)
    errors = []
    for frame, mask, moment in zip(clip, find_shape(clip, asked), moments(len(clip)), strict=True):
        x, y = _world_place(_centre(mask) or (0.0, 0.0), asked, moment, *frame.shape[:2])
        seen = picture(replace(asked, motion="still", x=x, y=y), moment, *frame.shape[:2])
        errors.append(float(np.square(frame - seen).mean()))
    return -10 * math.log10(max(1e-10, float(np.mean(errors))))


def _world_place(
    place: tuple[float, float], scene: Scene, moment: float, height: int, width: int
) -> tuple[float, float]:
    """A place in the picture, in picture widths from its middle, as a place in the world."""
    x, y, scale = world_places(scene.camera, moment, height, width)
    return float(x.mean()) + place[0] * scale, float(y.mean()) + place[1] * scale


def ceiling(
    count: int, frames: int, side: int, *, through: Callable[[Tensor], Tensor] = lambda video: video, seed: int = 900
) -> Mapping[str, Rate]:
    """The evaluator's own accuracy on films of the world, or on what a model makes of them (``through`` a VAE, say)."""
    rows = zip(range(count), scenes(seed, test=True), strict=False)
    return score((through(to_tensor(film(scene, frames, side, side))), scene) for _, (scene, _) in rows)
