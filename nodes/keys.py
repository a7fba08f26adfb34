"""What a CONDITIONING carries beside its prompt: what we understand, what changes nothing, what we cannot do.

A key that nobody looks at is a node without effect. So every key is one of these: understood; harmless; asking for
another model, which is refused; or unknown, which is said on the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

UNDERSTOOD = frozenset({"concat_latent_image", "concat_mask", "clip_vision_output"})

# Where an entry applies, and with what weight beside others.
RANGES = frozenset(
    {
        "start_percent",
        "end_percent",
        "clip_start_percent",
        "clip_end_percent",
        "mask",
        "mask_strength",
        "strength",
        "default",
    }
)

# Nothing of them reaches a Wan model, in ComfyUI neither: marks of text encoders, sizes for other families, and what
# ComfyUI's samplers themselves add before they ask the model.
HARMLESS = frozenset({
    "pooled_output", "attention_mask", "prompt_type", "width", "height", "crop_w", "crop_h",
    "target_width", "target_height", "aesthetic_score", "frame_rate", "fps", "device", "noise", "latent_image",
    "denoise_mask", "seed", "cross_attn", "uuid", "model_conds", "latent_shapes", "timestep_start", "timestep_end",
    "additional_models",
})  # fmt: skip

NEEDS_MODEL = {
    "vace_frames": "a VACE model", "vace_mask": "a VACE model", "vace_strength": "a VACE model",
    "reference_latents": "a model with a reference image (Fun Control, S2V)", "concat_mask_index": "a Fun model",
    "camera_conditions": "a Fun Camera model", "time_dim_concat": "a Phantom model",
    "context_latents": "a model edited by its context (Bernini)", "audio_embed": "an S2V or HuMo model",
    "audio_inject_scale": "an S2V model", "reference_motion": "an S2V model", "control_video": "an S2V model",
    "face_video_pixels": "an Animate model", "pose_video_latent": "an Animate or SCAIL model",
    "clip_vision_output_pose": "an Animate-2 model", "clip_vision_output_ref": "an Animate-2 model",
    "cross_attn_pose": "an Animate-2 model", "pose_strength": "an Animate-2 model",
    "reference_strength": "an Animate-2 model", "driving_mask_28ch": "a SCAIL-2 model",
    "ref_mask_28ch": "a SCAIL-2 model", "ref_mask_flag": "a SCAIL-2 model",
}  # fmt: skip

# Done by ComfyUI's samplers around any model, and not by ours.
SAMPLERS_OWN = {
    "control": "ControlNet", "gligen": "GLIGEN", "hooks": "hooks", "area": "areas",
    "set_area_to_bounds": "areas (mask bounds)",
    "control_apply_to_uncond": "ControlNet",
}  # fmt: skip

# Values with which a key asks for nothing.
_NOTHING: dict[str, Callable[[object], bool]] = {
    "concat_mask_index": lambda v: v == 0, "pose_strength": lambda v: v == 1, "reference_strength": lambda v: v == 1,
}  # fmt: skip


def asking(options: Mapping[str, object]) -> Iterator[str]:
    """The keys that ask for something that a Wan2.2 model alone is not told."""
    for key, value in options.items():
        if key not in UNDERSTOOD | RANGES | HARMLESS and not _asks_nothing(key, value):
            yield key


def ranged(options: Mapping[str, object]) -> bool:
    """Whether an entry, though alone, does not apply everywhere alike."""
    percents = ("start_percent", 0.0), ("clip_start_percent", 0.0), ("end_percent", 1.0), ("clip_end_percent", 1.0)
    return options.get("mask") is not None or any(options.get(key, all_of) != all_of for key, all_of in percents)


def _asks_nothing(key: str, value: object) -> bool:
    if value is None or value is False or (isinstance(value, (list, tuple, dict, str)) and not value):
        return True
    return key in _NOTHING and isinstance(value, (int, float)) and _NOTHING[key](value)
