"""Looks: combinations of terms that go well together, by name.

The first three are combinations with which Wan2.2 was introduced: two of keywords, one of its example prompt.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    id: str
    en: str
    zh: str
    terms: tuple[str, ...]  # ids


_ALL = (
    Look("sunset_romance", "Sunset romance", "落日浪漫",
         ("dusk", "soft_lighting", "edge_lighting", "warm_colors", "center_composition")),
    Look("science_fiction", "Science fiction film", "科幻大片",
         ("cool_colors", "hard_lighting", "symmetrical_composition", "low_angle_shot")),
    Look("far_planet", "Far planet", "遥远星球",
         ("daytime", "sunny_lighting", "edge_lighting", "warm_colors", "low_saturation", "extreme_wide_shot",
          "balanced_composition")),
    Look("golden_hour_portrait", "Golden hour portrait", "黄金时刻人像",
         ("golden_hour", "backlighting", "soft_lighting", "warm_colors", "close_up_shot", "shallow_depth_of_field",
          "lens_flare")),
    Look("film_noir", "Film noir", "黑色电影",
         ("film_noir", "nighttime", "low_key_lighting", "hard_lighting", "side_lighting", "black_and_white",
          "high_contrast", "dutch_angle_shot")),
    Look("neon_night", "Neon night", "霓虹之夜",
         ("cyberpunk", "nighttime", "light_rain", "neon_lighting", "cool_colors", "high_contrast", "low_angle_shot",
          "shallow_depth_of_field")),
    Look("nature_documentary", "Nature documentary", "自然纪录片",
         ("documentary_photography", "daylight", "telephoto_lens", "eye_level_shot", "shallow_depth_of_field",
          "tracking_shot")),
    Look("drone_landscape", "Drone landscape", "航拍风光",
         ("sunrise", "thin_mist", "volumetric_lighting", "extreme_wide_shot", "aerial_shot", "scenery_shot",
          "slow_push_in")),
    Look("window_light", "Quiet window light", "静谧窗光",
         ("early_morning", "window_light", "soft_lighting", "neutral_colors", "medium_close_up_shot",
          "negative_space", "static_camera", "calm")),
    Look("candlelit", "By candlelight", "烛光",
         ("nighttime", "candlelight", "low_key_lighting", "rembrandt_lighting", "warm_colors", "medium_close_up_shot",
          "shallow_depth_of_field")),
    Look("action", "Action", "动作片",
         ("cinematic_style", "teal_and_orange", "high_contrast", "medium_wide_shot", "low_angle_shot",
          "handheld_camera", "running", "motion_blur")),
    Look("old_film", "Old home film", "旧家庭录像",
         ("vintage_film", "sunny_lighting", "vintage_colors", "low_contrast", "handheld_camera", "film_grain",
          "light_leaks")),
    Look("product", "Product shot", "产品广告",
         ("artificial_lighting", "soft_lighting", "high_key_lighting", "center_composition", "macro_lens",
          "orbit_shot", "blurred_background")),
    Look("storm", "Storm", "暴风雨",
         ("thunderstorm", "overcast_lighting", "cool_colors", "low_saturation", "wide_shot", "low_angle_shot",
          "slow_motion")),
    Look("fairy_forest", "Fairy-tale forest", "童话森林",
         ("fairy_tale", "early_morning", "dappled_light", "volumetric_lighting", "pastel_colors", "wide_shot",
          "floating_particles")),
    Look("anime", "Anime summer", "动漫夏日",
         ("anime_style", "daytime", "clear_sky", "sunny_lighting", "high_saturation", "wide_shot", "pan_right")),
    Look("ink_mountains", "Ink mountains", "水墨山水",
         ("ink_wash", "thin_mist", "low_saturation", "long_shot", "negative_space", "static_camera")),
    Look("clay_kitchen", "Clay animation", "黏土动画",
         ("claymation", "soft_lighting", "warm_colors", "medium_shot", "eye_level_shot", "tilt_shift")),
)  # fmt: skip

LOOKS: dict[str, Look] = {look.id: look for look in _ALL}
