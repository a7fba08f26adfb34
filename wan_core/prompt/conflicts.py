"""Which terms contradict each other.

A row is a question to which a picture has one answer, with the answers' terms. Two terms of a row contradict each
other unless one answer holds both: a golden hour is either end of the day, and so stands in two answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import combinations

from .vocabulary import GROUPS

Row = tuple[tuple[str, ...], ...]


def _each(*terms: str) -> Row:
    return tuple((term,) for term in terms)


def _all(group: str, *but: str) -> tuple[str, ...]:
    return tuple(term.id for term in GROUPS[group].terms if term.id not in but)


_DRAWN = ("anime_style", "pixel_art", "monochrome_animation", "comic_style", "watercolor", "oil_painting", "ink_wash",
          "pencil_sketch", "paper_cut", "ukiyo_e")  # fmt: skip
_MODELLED = ("cartoon_3d", "game_3d", "felt_style", "claymation", "puppet_animation", "stop_motion")
_COLOURLESS = ("black_and_white", "monochrome_animation")
_SUNLESS = ("fog", "heavy_rain", "snowfall", "thunderstorm", "sandstorm")

CONFLICTS: tuple[Row, ...] = (
    # style
    (("realistic_style", "documentary_photography"), (*_DRAWN, *_MODELLED)),
    (_DRAWN, _MODELLED),
    # when
    (
        ("daytime", "noon"), ("daytime", "early_morning"), ("daytime", "sunrise"), ("daytime", "sunset"),
        ("daytime", "golden_hour"), ("dawn", "sunrise", "early_morning", "golden_hour"), ("dawn", "blue_hour"),
        ("sunset", "dusk", "golden_hour"), ("dusk", "blue_hour"), ("nighttime", "midnight"),
    ),
    (
        ("daytime", "noon", "early_morning", "sunrise", "golden_hour", "daylight", "sunny_lighting"),
        ("nighttime", "midnight", "moonlight", "starlight"),
    ),
    # weather
    (("clear_sky", "sunny_lighting"), ("overcast_lighting", *_SUNLESS)),
    _each("light_rain", "heavy_rain"),
    _each("fog", "thin_mist"),
    # light
    _each("soft_lighting", "hard_lighting"),
    (("high_key_lighting",), ("low_key_lighting", "silhouette")),
    (("front_lighting",), ("backlighting", "silhouette")),
    _each("top_lighting", "underlighting"),
    # colour
    (("warm_colors", "golden_tones", "sepia_tones"), ("cool_colors",), ("neutral_colors",)),
    (_COLOURLESS, _all("color_tone", "black_and_white", "sepia_tones", "neutral_colors", "vintage_colors")),
    (_COLOURLESS, ("high_saturation",)),
    (("pastel_colors",), ("high_saturation",)),
    _each(*_all("saturation")),
    _each(*_all("contrast")),
    # frame
    (("full_body_shot", "wide_shot"), *_each(*_all("shot_size", "full_body_shot", "wide_shot"))),
    (("center_composition", "symmetrical_composition", "balanced_composition"), ("left_heavy_composition",),
     ("right_heavy_composition",)),
    _each("center_composition", "rule_of_thirds"),
    # lens
    (("medium_lens",), ("wide_angle_lens", "fisheye_lens"), ("long_lens", "telephoto_lens"), ("macro_lens",)),
    (("shallow_depth_of_field", "blurred_background"), ("deep_depth_of_field",)),
    (("macro_lens", "extreme_close_up_shot"), ("wide_shot", "long_shot", "extreme_wide_shot", "aerial_shot",
                                               "establishing_shot")),
    # where the camera stands
    (("eye_level_shot",), ("low_angle_shot", "upward_shot", "ground_level_shot"),
     ("high_angle_shot", "overhead_shot", "aerial_shot")),
    _each("side_view", "rear_view", "first_person_view", "over_the_shoulder_shot"),
    # who is in the picture
    (*_each(*_all("shot_type", "establishing_shot", "scenery_shot", "reaction_shot", "insert_shot", "one_take")),
     ("scenery_shot",)),
    _each("establishing_shot", "reaction_shot", "insert_shot"),
    (("scenery_shot",), _all("emotion")),
    # how the camera moves
    (("static_camera", "zoom_in", "zoom_out"), _all("camera_movement", "static_camera")),
    _each("push_in", "pull_back"),
    _each("slow_push_in", "pull_back"),
    _each("move_left", "move_right"),
    _each("pan_left", "pan_right"),
    _each("tilt_up", "tilt_down"),
    _each("crane_up", "crane_down"),
    _each("zoom_in", "zoom_out"),
    # how people feel
    (("happy", "excited", "surprised"), ("happy", "calm"), ("happy", "shy"), ("sad", "calm", "thoughtful", "serious"),
     ("angry", "serious"), ("fearful", "surprised"), ("shy", "calm", "thoughtful")),
    # how time runs
    _each("time_lapse", "slow_motion", "bullet_time"),
    _each("one_take", "split_screen"),
)  # fmt: skip


def conflicts(terms: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of these term ids that contradict each other, each in the given order."""
    contradicting = _contradicting()
    return [pair for pair in combinations(dict.fromkeys(terms), 2) if frozenset(pair) in contradicting]


@cache
def _contradicting() -> frozenset[frozenset[str]]:
    return frozenset(pair for row in CONFLICTS for pair in _apart(row))


def _apart(row: Row) -> set[frozenset[str]]:
    """Pairs of a row's terms that no answer holds together."""
    together = {frozenset(pair) for answer in row for pair in combinations(answer, 2)}
    terms = dict.fromkeys(term for answer in row for term in answer)
    return {frozenset(pair) for pair in combinations(terms, 2)} - together
