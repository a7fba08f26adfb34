"""A small world on film: one shape on a named ground, its motion or the camera's, and the light it is shot in.

A scene is a handful of words; ``film`` makes the clip of it. All places are in picture widths with the origin in the
middle, x to the right and y down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

RGB = tuple[float, float, float]

COLOURS: dict[str, RGB] = {
    "red": (0.88, 0.10, 0.12), "green": (0.10, 0.70, 0.20), "blue": (0.12, 0.22, 0.88),
    "yellow": (0.96, 0.86, 0.10), "purple": (0.58, 0.14, 0.74), "white": (0.97, 0.97, 0.97),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
MOTIONS: dict[str, tuple[float, float]] = {
    "still": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
CAMERAS: dict[str, tuple[float, float, float]] = {  # how the picture's frame moves: x, y, and growth of scale
    "fixed": (0, 0, 0), "pan_left": (-1, 0, 0), "pan_right": (1, 0, 0), "tilt_up": (0, -1, 0), "tilt_down": (0, 1, 0),
    "push_in": (0, 0, 1), "pull_back": (0, 0, -1),
}  # fmt: skip
TONES = ("plain", "warm", "cool", "saturated", "desaturated")
LIGHTS = ("plain", "low_key", "high_key", "rim", "soft", "hard")
TIMES = ("plain", "day", "dusk", "night")
COMPOSITIONS = ("plain", "centre", "left_heavy", "right_heavy")
SHOTS: dict[str, float] = {"plain": 0.22, "close_up": 0.30, "wide": 0.14}  # half the size of the shape

TRAVEL = 0.40  # picture widths that a moving shape covers
PAN = 0.36  # picture widths that a moving camera covers
ZOOM = 1.7  # how many times larger the picture gets when the camera pushes in


@dataclass(frozen=True)
class Scene:
    """What is to be seen. ``x`` and ``y`` are where the shape is in the middle of the clip."""

    shape: str
    colour: str
    ground: str
    motion: str = "still"
    camera: str = "fixed"
    tone: str = "plain"
    light: str = "plain"
    time: str = "plain"
    composition: str = "plain"
    shot: str = "plain"
    x: float = 0.0
    y: float = 0.0


Ground = Callable[[np.ndarray, np.ndarray], np.ndarray]  # world places -> a number 0..1 that blends two colours


def _wave(v: np.ndarray, period: float) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(2 * np.pi * v / period)


def _bricks(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(_wave(x, 0.28), _wave(y, 0.16)) ** 3


GROUNDS: dict[str, tuple[RGB, RGB, Ground]] = {
    "meadow": ((0.30, 0.52, 0.22), (0.42, 0.64, 0.30), lambda x, y: _wave(x, 0.33) * _wave(y, 0.33)),
    "desert": ((0.80, 0.62, 0.38), (0.90, 0.76, 0.52), lambda x, y: _wave(y + 0.06 * np.sin(9 * x), 0.30)),
    "ocean": ((0.05, 0.28, 0.42), (0.16, 0.46, 0.58), lambda x, y: _wave(y + 0.04 * np.sin(14 * x), 0.22)),
    "snow": ((0.80, 0.84, 0.90), (0.70, 0.76, 0.86), lambda x, y: _wave(x + y, 0.42) ** 2),
    "brick wall": ((0.46, 0.26, 0.20), (0.62, 0.38, 0.30), _bricks),
    "grey studio": ((0.34, 0.34, 0.36), (0.50, 0.50, 0.52), lambda x, y: _wave(x, 0.50)),
}

ALIKE = {("green", "meadow"), ("white", "snow"), ("blue", "ocean"), ("red", "brick wall"), ("yellow", "desert")}


FEW_LOOKS, MANY_LOOKS = (0.4, 0.4, 0.2), (0.0, 0.2, 0.8)  # how often a scene has none, one or two


def random_scene(random: np.random.Generator, looks: tuple[float, ...] = FEW_LOOKS) -> Scene:
    """A scene of the world, with at most two looks, so that a caption stays short."""
    while True:
        colour, ground = str(random.choice(list(COLOURS))), str(random.choice(list(GROUNDS)))
        if (colour, ground) not in ALIKE:
            break
    scene = Scene(str(random.choice(SHAPES)), colour, ground)
    if random.random() < 0.75:
        scene = replace(scene, motion=str(random.choice(list(MOTIONS))))
    else:
        scene = replace(scene, camera=str(random.choice(list(CAMERAS))))
    chosen = random.permutation(list(LOOKS))[: random.choice([0, 1, 2], p=looks)]
    for name in chosen:
        scene = replace(scene, **{str(name): str(random.choice(LOOKS[str(name)][1:]))})
    return placed(scene, random)


LOOKS: dict[str, tuple[str, ...]] = {
    "tone": TONES,
    "light": LIGHTS,
    "time": TIMES,
    "composition": COMPOSITIONS,
    "shot": tuple(SHOTS),
}


def placed(scene: Scene, random: np.random.Generator) -> Scene:
    """The scene with a place for its shape: where the composition wants it, else near the middle; never cut off."""
    room = 0.48 / largest_scale(scene.camera) - SHOTS[scene.shot]
    dx, dy = (abs(way) * TRAVEL / 2 for way in MOTIONS[scene.motion])
    pan_x, pan_y = (abs(way) * PAN / 2 for way in CAMERAS[scene.camera][:2])
    free_x, free_y = max(0.0, room - dx - pan_x), max(0.0, room - dy - pan_y)
    x, y = random.uniform(-0.14, 0.14), random.uniform(-0.14, 0.14)
    if scene.composition != "plain":
        x = {"centre": 0.0, "left_heavy": -0.24, "right_heavy": 0.24}[scene.composition] + random.uniform(-0.02, 0.02)
    return replace(scene, x=float(np.clip(x, -free_x, free_x)), y=float(np.clip(y, -free_y, free_y)))


def largest_scale(camera: str) -> float:
    """How many times larger than in the middle of the clip the picture gets."""
    return ZOOM ** (abs(CAMERAS[camera][2]) / 2)


def film(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    """The clip of a scene, [frames, height, width, 3] float32 in 0..1."""
    return np.stack([picture(scene, moment, height, width) for moment in moments(frames)])


def moments(frames: int) -> np.ndarray:
    """-0.5 at the first frame to 0.5 at the last; the middle alone for one frame."""
    return np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)


def picture(scene: Scene, moment: float, height: int, width: int) -> np.ndarray:
    """One frame, [height, width, 3]."""
    x, y, scale = world_places(scene.camera, moment, height, width)
    pixel = scale / width
    u, v = _from_shape(scene, moment, x, y)
    size = SHOTS[scene.shot]
    rgb = ground_picture(scene.ground, x, y)
    rgb = _shadow(rgb, scene, u, v, size, pixel)
    colour = np.array(COLOURS[scene.colour], np.float32)
    distance = outline(scene.shape, u, v, size)
    edge = 0.05 if scene.light == "soft" else pixel
    inside = np.clip(0.5 - distance / edge, 0, 1)[..., None]
    rgb = rgb + (colour - rgb) * inside
    if scene.light == "rim":
        rim = np.clip(1 - np.abs(distance + 0.012) / 0.018, 0, 1)[..., None]
        rgb = rgb + (np.array((1.0, 1.0, 0.92), np.float32) - rgb) * rim
    return graded(scene, rgb, height)


def world_places(camera: str, moment: float, height: int, width: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Where in the world each pixel looks, [height, width] twice, and how much world a picture's width shows."""
    dx, dy, growth = CAMERAS[camera]
    scale = ZOOM ** (-growth * moment)
    across = (np.arange(width, dtype=np.float32) + 0.5) / width - 0.5
    down = (np.arange(height, dtype=np.float32) + 0.5) / width - 0.5 * height / width
    x, y = np.meshgrid(across * scale + dx * PAN * moment, down * scale + dy * PAN * moment)
    return x.astype(np.float32), y.astype(np.float32), float(scale)


def ground_picture(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    first, second, pattern = GROUNDS[name]
    blend = pattern(x, y)[..., None].astype(np.float32)
    return (1 - blend) * np.array(first, np.float32) + blend * np.array(second, np.float32)


def outline(shape: str, u: np.ndarray, v: np.ndarray, size: float) -> np.ndarray:
    """Signed distance to the shape's edge, negative within. Shapes have about the same area."""
    if shape == "circle":
        return np.sqrt(u * u + v * v) - size
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - size * 0.88
    inner = size * 0.80  # radius of the inscribed circle of an equilateral triangle, point up, centred by its box
    return np.maximum(np.abs(u) * 0.866 - (v - inner / 2) * 0.5, v - inner / 2) - inner


def _from_shape(scene: Scene, moment: float, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World places as seen from the middle of the shape."""
    dx, dy = MOTIONS[scene.motion]
    return x - scene.x - dx * TRAVEL * moment, y - scene.y - dy * TRAVEL * moment


def presence(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    """Where the shape is, [frames, height, width] of booleans, its edge and a pixel around it included."""
    seen = []
    for moment in moments(frames):
        x, y, scale = world_places(scene.camera, moment, height, width)
        seen.append(outline(scene.shape, *_from_shape(scene, moment, x, y), SHOTS[scene.shot]) < 1.5 * scale / width)
    return np.stack(seen)


def _shadow(rgb: np.ndarray, scene: Scene, u: np.ndarray, v: np.ndarray, size: float, pixel: float) -> np.ndarray:
    """Hard light throws a sharp dark shadow, soft light a faint wide one."""
    if scene.light not in ("hard", "soft"):
        return rgb
    blur, depth = (pixel, 0.65) if scene.light == "hard" else (0.12, 0.3)
    distance = outline(scene.shape, u - 0.06, v - 0.07, size)
    return rgb * (1 - depth * np.clip(0.5 - distance / blur, 0, 1)[..., None])


GAINS: dict[str, dict[str, RGB]] = {
    "tone": {"warm": (1.18, 1.0, 0.70), "cool": (0.72, 0.98, 1.22)},
    "time": {"day": (1.06, 1.06, 1.02), "dusk": (1.06, 0.72, 0.58), "night": (0.36, 0.44, 0.68)},
    "light": {"low_key": (0.45, 0.45, 0.45), "rim": (0.72, 0.72, 0.72)},
}
SATURATION = {"saturated": 1.5, "desaturated": 0.35}


def graded(scene: Scene, rgb: np.ndarray, height: int) -> np.ndarray:
    """The looks that change all colours alike."""
    for look, gains in GAINS.items():
        if getattr(scene, look) in gains:
            rgb = rgb * np.array(gains[getattr(scene, look)], np.float32)
    if scene.light == "high_key":
        rgb = 1 - (1 - rgb) * 0.55
    if scene.tone in SATURATION:
        grey = rgb.mean(axis=-1, keepdims=True)
        rgb = grey + (rgb - grey) * SATURATION[scene.tone]
    return np.clip(rgb, 0, 1).astype(np.float32)
