"""What the command line says for each hint: its own flags."""

from __future__ import annotations

from ..errors import Hint

HINTS: dict[Hint, str] = {
    Hint.FOLDER: "--ckpt_dir is the folder of a downloaded checkpoint.",
    Hint.OTHER_TASK: "Download the rest, or choose another --task.",
    Hint.TRAIN_TASK: "Choose its --task.",
    Hint.IMAGES: "Give a start image (--image), an end image (--end_image), or both. For text alone use a T2V model or "
    "TI2V-5B.",
    Hint.BOTH_IMAGES: "Give both (--first_frame and --last_frame).",
    Hint.OVERWRITE: "Name another place, or remove it first (--overwrite does, where it was converted by this "
    "program).",
    Hint.TARGET: "Expected --to bf16, fp16, fp32, official, comfyui or diffusers.",
    Hint.WEIGHTS: "Give --ckpt_dir, or all of --dit, --vae and --text_encoder.",
    Hint.CLIP_WEIGHTS: "Give --ckpt_dir, or all of --dit, --vae, --text_encoder and --clip.",
    Hint.CLIP: "Give it with --clip.",
    Hint.EXPERT: "Choose --expert {experts}.",
    Hint.LANGUAGE_MODEL: "Name with --prompt_extend_model the folder of one, or its name on Hugging Face, such as "
    "{name}.",
    Hint.PROCESSES: "Start several, torchrun --nproc_per_node N -m wan_core train ..., or leave --fsdp out.",
    Hint.NO_SHARDS: "Leave --fsdp out, or train all weights: --lora_rank 0.",
    Hint.RUN_ELSEWHERE: "ComfyUI's own nodes may run it.",
    Hint.CALIBRATE: "Or measure its own with `python -m wan_core calibrate`.",
    Hint.CALIBRATE_AGAIN: "Measure it again with `python -m wan_core calibrate --overwrite`, or remove it.",
}
