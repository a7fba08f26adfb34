"""Scenes in words, English and Chinese; the words for light, colour and camera are those of Wan's vocabulary."""

from __future__ import annotations

import numpy as np

from wan_core.prompt.vocabulary import GROUPS

from .world import Scene

_GROUP_OF = {
    "warm": ("color_tone", "warm_colors"), "cool": ("color_tone", "cool_colors"),
    "saturated": ("saturation", "high_saturation"), "desaturated": ("saturation", "low_saturation"),
    "low_key": ("lighting_type", "low_key_lighting"), "high_key": ("lighting_type", "high_key_lighting"),
    "rim": ("light_angle", "edge_lighting"), "soft": ("lighting_type", "soft_lighting"),
    "hard": ("lighting_type", "hard_lighting"), "day": ("time_of_day", "daytime"), "dusk": ("time_of_day", "dusk"),
    "night": ("time_of_day", "nighttime"), "centre": ("composition", "center_composition"),
    "left_heavy": ("composition", "left_heavy_composition"), "right_heavy": ("composition", "right_heavy_composition"),
    "close_up": ("shot_size", "close_up_shot"), "wide": ("shot_size", "wide_shot"),
    "fixed": ("camera_movement", "static_camera"), "pan_left": ("camera_movement", "pan_left"),
    "pan_right": ("camera_movement", "pan_right"), "tilt_up": ("camera_movement", "tilt_up"),
    "tilt_down": ("camera_movement", "tilt_down"), "push_in": ("camera_movement", "push_in"),
    "pull_back": ("camera_movement", "pull_back"),
}  # fmt: skip

_LOOK_ORDER = ("time", "light", "tone", "shot", "composition")

_ZH = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "white": "白色",
    "circle": "圆形", "square": "方块", "triangle": "三角形",
    "meadow": "草地",
    "desert": "沙漠", "ocean": "海面", "snow": "雪地", "brick wall": "砖墙", "grey studio": "灰色摄影棚",
}  # fmt: skip
_MOTION_EN = {
    "still": ("stays still", "does not move", "rests"),
    "left": ("moves to the left", "slides left", "travels left"),
    "right": ("moves to the right", "slides right", "travels right"),
    "up": ("moves up", "rises", "travels upwards"),
    "down": ("moves down", "sinks", "travels downwards"),
}
_MOTION_ZH = {
    "still": ("静止不动", "停在原处"),
    "left": ("向左移动", "滑向左边"),
    "right": ("向右移动", "滑向右边"),
    "up": ("向上移动", "上升"),
    "down": ("向下移动", "下降"),
}
_SCENE_EN = (
    "A {colour} {shape} {motion} over the {ground}",
    "On the {ground}, a {colour} {shape} {motion}",
    "The {colour} {shape} {motion} in front of the {ground}",
    "A video of a {colour} {shape} that {motion}, the background is the {ground}",
)
_SCENE_ZH = (
    "{ground}上，一个{colour}{shape}{motion}",
    "一个{colour}的{shape}在{ground}上{motion}",
    "背景是{ground}，{colour}{shape}{motion}",
)


def caption(scene: Scene, random: np.random.Generator, *, language: str | None = None) -> str:
    """One wording of a scene; a quarter are Chinese unless a language is given."""
    language = language or ("zh" if random.random() < 0.25 else "en")
    told = _told(scene, random, language)
    terms = [_term(getattr(scene, look), language) for look in _LOOK_ORDER if getattr(scene, look) != "plain"]
    if scene.camera != "fixed" or random.random() < 0.15:
        terms.append(_term(scene.camera, language))
    if not terms:
        return told + ("。" if language == "zh" else ".")
    return _joined([*terms, told] if random.random() < 0.6 else [told, *terms], language)


def _told(scene: Scene, random: np.random.Generator, language: str) -> str:
    if language == "zh":
        words = {key: _ZH[getattr(scene, key)] for key in ("colour", "shape", "ground")}
        return str(random.choice(_SCENE_ZH)).format(motion=random.choice(_MOTION_ZH[scene.motion]), **words)
    words = {key: getattr(scene, key) for key in ("colour", "shape", "ground")}
    return str(random.choice(_SCENE_EN)).format(motion=random.choice(_MOTION_EN[scene.motion]), **words)


def _term(value: str, language: str) -> str:
    group, term = _GROUP_OF[value]
    return getattr(GROUPS[group][term], language)


def _joined(parts: list[str], language: str) -> str:
    if language == "zh":
        return "，".join(parts) + "。"
    text = ", ".join(parts) + "."
    return text[0].upper() + text[1:]


def phrases() -> list[str]:
    """Every wording that means one thing: of the vocabulary, of motion, of colours, shapes and grounds."""
    english = [term.en for term in _terms()] + [way for ways in _MOTION_EN.values() for way in ways]
    english += list(_ZH) + ["moves", "slides", "travels", "left", "right", "up", "down"]
    chinese = [term.zh for term in _terms()] + [way for ways in _MOTION_ZH.values() for way in ways] + [*_ZH.values()]
    return [" " + words.lower() for words in english] + chinese


def _terms() -> list:
    return [GROUPS[group][term] for group, term in _GROUP_OF.values()]
