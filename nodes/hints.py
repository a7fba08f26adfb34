"""What the nodes say for each hint of wan_core: their own names and ComfyUI's."""

from __future__ import annotations

from collections import defaultdict

from ..wan_core.errors import Hint, WanError

HINTS: dict[Hint, str] = {
    Hint.RELOAD: "Load it again: press R to refresh the node definitions, then queue.",
    Hint.LOAD_AS: "Load it with {loader}.",
    Hint.RUN_ELSEWHERE: "Use ComfyUI's Load Diffusion Model with its {nodes} for it.",
    Hint.RUN_BY_ITS_MAKERS: "ComfyUI itself does not run it; use the pack it was published with.",
    Hint.TEXT_ENCODER: "Use Load Wan Text Encoder with umT5-XXL, or ComfyUI's CLIPLoader with type wan.",
    Hint.LORA_HELD: "Put ComfyUI's LoraLoaderModelOnly before Wan from ComfyUI MODEL, and Wan LoRA between Load Wan "
    "Model and Wan Expert Switch.",
    Hint.SWAP_HELD: "ComfyUI offloads it by itself (--lowvram, --reserve-vram). Put Wan Block Swap between Load Wan "
    "Model and Wan Expert Switch.",
    Hint.TRAIN_HELD: "Load the same file with Load Wan Model.",
    Hint.ONE_EACH: "Connect the loaders themselves.",
    Hint.ALONE: "Connect it to the sampler by itself.",
    Hint.BAD_LATENT: "Check the node that made it.",
    Hint.CLIP: "Connect Load Wan CLIP Vision to clip_vision.",
    Hint.LANGUAGE_MODEL: "Download it with `hf download {name} --local-dir ComfyUI/models/LLM/{folder}`, or choose the "
    "method dashscope or openai.",
    Hint.SERVER_KEY: "Set it in ComfyUI's settings (Wan, Prompt extension), or set the environment variable {variable} "
    "before ComfyUI starts.",
    Hint.TRAIN_TASK: "Choose its variant in Load Wan Model.",
    Hint.CALIBRATE: "Or measure its own with `python -m wan_core calibrate`.",
    Hint.CALIBRATE_AGAIN: "Measure it again with `python -m wan_core calibrate --overwrite`, or remove it.",
}

_LOADERS = {
    "dit": "Load Wan Model",
    "vae": "Load Wan VAE",
    "text": "Load Wan Text Encoder",
    "clip": "Load Wan CLIP Vision",
}
_NODES = defaultdict(
    lambda: "own nodes",
    {
        "VACE": "WanVaceToVideo nodes",
        "Wan2.1 Fun Control-Camera": "WanCameraImageToVideo nodes",
        "Wan2.2 Fun Control-Camera": "WanCameraImageToVideo nodes",
        "Wan2.2 S2V (speech)": "WanSoundImageToVideo nodes",
        "HuMo": "WanHuMoImageToVideo nodes",
        "Wan2.2 Animate": "WanAnimateToVideo nodes",
        "Wan2.1 Fun Control V1.1": "WanFunControlToVideo nodes",
        "Wan2.1 Fun Control": "WanFunControlToVideo nodes",
        "Wan2.2 Fun-5B-InP": "WanFunInpaintToVideo nodes",
        "Wan2.2 Fun-5B-Control": "Wan22FunControlToVideo nodes",
        "Wan2.2 Fun-A14B-Control": "Wan22FunControlToVideo nodes",
    },
)


def worded(error: WanError) -> str:
    """An error's text, as a node shows it."""
    part, family = (str(error.details.get(name)) for name in ("part", "family"))
    more = {"loader": _LOADERS.get(part), "nodes": _NODES[family]}
    return WanError(error.problem, error.hint, **error.details | more).worded(HINTS)
