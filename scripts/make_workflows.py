"""Write the example workflows: for each graph the editor's JSON and its API twin.

    python scripts/make_workflows.py http://127.0.0.1:8188 [NAME ...]

The address is a running ComfyUI with this pack: it says which inputs a node has, in which order, and their defaults.
Standard library only.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from workflow_format import BYPASSED, TITLE, Graph, Node, Output

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from wan_core.config import VARIANTS, Variant  # noqa: E402
from wan_core.layouts import comfyui  # noqa: E402

MODELS, PROMPT, SIZE, SAMPLING, VIDEO = "#3f789e", "#4f8f5b", "#a1793d", "#8a4f9e", "#a14b4b"
POSITIVE, NEGATIVE = ("#232", "#353"), ("#322", "#533")
GAP, HALF, MARGIN = 24, 12, 20  # between groups; half of it; inside a group
TOP, MODEL_LANE = 120, 60  # the first row of nodes, below a group's title and the model's lane
SEEN_LANE, CLIP_LANE, VAE_LANE, END = 18, 44, 70, 98  # below the floor: lanes of links, and where groups end
APART = 30  # between nodes above each other: a badge of the classic canvas fits in, or a line that a node says

TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
BOXING_CATS = "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage."
SURFING_CAT = (
    "Summer beach vacation style, a white cat wearing sunglasses sits on a surfboard. The fluffy-furred feline gazes "
    "directly at the camera with a relaxed expression. Blurred beach scenery forms the background featuring "
    "crystal-clear waters, distant green hills, and a blue sky dotted with white clouds. The cat assumes a naturally "
    "relaxed posture, as if savoring the sea breeze and warm sunlight. A close-up shot highlights the feline's "
    "intricate details and the refreshing atmosphere of the seaside."
)


BLUE_BIRD = (  # the official script's example
    "CG动画风格，一只蓝色的小鸟从地面起飞，煽动翅膀。小鸟羽毛细腻，胸前有独特的花纹，背景是蓝天白云，阳光明媚。镜跟随小鸟向上移动，"
    "展现出小鸟飞翔的姿态和天空的广阔。近景，仰视视角。"
)


def main(url: str, *names: str) -> None:
    with urllib.request.urlopen(url + "/object_info") as answer:
        schemas = json.load(answer)
    for table, fast in ((WORKFLOWS, False), (FAST_WORKFLOWS, True)):
        for task, (name, prompt) in table.items():
            if names and name not in names:
                continue
            graph = Graph(name, schemas)
            describe(graph, VARIANTS[task], prompt, fast=fast)
            write(ROOT / "workflows" / f"{name}.json", graph.ui())
            write(ROOT / "workflows/api" / f"{name}.json", graph.api())


WORKFLOWS = {
    "t2v-A14B": ("wan22_t2v_a14b", BOXING_CATS),
    "i2v-A14B": ("wan22_i2v_a14b", SURFING_CAT),
    "ti2v-5B": ("wan22_ti2v_5b", SURFING_CAT),
    "i2v-14B": ("wan21_i2v_14b_480p", SURFING_CAT),
    "flf2v-14B": ("wan21_flf2v_14b", BLUE_BIRD),
}
SIZES = {"i2v-14B": (832, 480)}  # where it is not the variant's own: the 480p model has a file of its own
FAST_WORKFLOWS = {  # with a 4-step LoRA
    "t2v-A14B": ("wan22_t2v_a14b_4steps", BOXING_CATS),
    "i2v-A14B": ("wan22_i2v_a14b_4steps", SURFING_CAT),
}
FAST = {
    "steps": 4, "cfg_high": 1.0, "cfg_low": 1.0, "shift": 5.0, "solver": "euler", "schedule": "simple",
    "preset": "LightX2V-4step",
}  # fmt: skip


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(g: Graph, variant: Variant, prompt: str, *, fast: bool = False) -> None:
    """Laid out twice: the lanes lie below the highest column, which the first time finds."""
    draft = Graph(g.name, g.schemas)
    lay_out(draft, variant, prompt, fast)
    *above, beside = [node.bottom for node in draft.nodes]  # the lanes; they end where the video's group begins
    g.floor = max(*above, beside - END + MARGIN)
    end = lay_out(g, variant, prompt, fast)
    add_notes(g, end, variant, fast)


def lay_out(g: Graph, variant: Variant, prompt: str, fast: bool) -> int:
    """The way of the data, left to right: models, prompt, size or image, sampling, video. Returns where it ends."""
    model, clip, vae, seen, x = add_models(g, variant, fast)
    model, clip = g.lead(model, (x - HALF, MODEL_LANE)), g.lead(clip, (x - HALF, g.floor + CLIP_LANE))
    vae, seen = g.lead(vae, (x - HALF, g.floor + VAE_LANE)), seen and g.lead(seen, (x - HALF, g.floor + SEEN_LANE))

    positive, negative, x = add_prompts(g, x, clip, prompt, variant.negative)
    model, vae = g.lead(model, (x - HALF, MODEL_LANE)), g.lead(vae, (x - HALF, g.floor + VAE_LANE))

    if variant.image == "none":
        latent, x = add_size(g, x, variant, model)
    else:
        positive, negative, latent, vae, x = add_image(g, x, variant, model, vae, seen, positive, negative)
    model = g.lead(model, (x - HALF, MODEL_LANE))

    sampled, x = add_sampler(g, x, variant, model, positive, negative, latent, fast)
    vae = g.lead(vae, (x - HALF, g.floor + VAE_LANE), (x - HALF, TOP + 40))
    return add_video(g, x, variant, sampled, vae)


def below(*nodes: Node) -> int:
    """Where a node stands beneath these, from top to bottom: its position is the lower edge of its title."""
    return max((node.bottom + APART + TITLE for node in nodes), default=TOP)


def add_models(g: Graph, variant: Variant, fast: bool) -> tuple[Output, Output, Output, Output | None, int]:
    column: list[Node] = []

    def loader(kind: str, *models: dict[str, str], **values: Any) -> Output:
        column.append(g.node(kind, (MARGIN, below(*column)), (340, 0), models=list(models), **values))
        return column[-1][0]

    files = [download("diffusion_models", name) for name in comfyui.NAMES[variant.task].models]
    titles = ["High-noise expert", "Low-noise expert"] if variant.experts == 2 else [None]
    loaded = [
        loader("WanCoreLoadModel", file, title=title, model_name=file["name"])
        for file, title in zip(files, titles, strict=True)
    ]
    text_encoder = download("text_encoders", TEXT_ENCODER)
    clip = loader("WanCoreLoadTextEncoder", text_encoder, text_encoder_name=text_encoder["name"])
    file = download("vae", comfyui.VAES[variant.vae])
    vae = loader("WanCoreLoadVAE", file, vae_name=file["name"])
    seen = None
    if variant.clip:
        vision = download("clip_vision", comfyui.CLIP_VISION)
        seen = loader("WanCoreLoadClipVision", vision, clip_name=vision["name"])

    x, model = MARGIN + 340 + 35, loaded[0]
    if variant.experts == 2:
        model = g.node(
            "WanCoreExpertSwitch", (x, TOP), (230, 0), high=loaded[0], low=loaded[1], boundary=variant.boundary
        )[0]
        x += 230 + 30
    if fast:
        loras = [download("loras", name) for name in comfyui.NAMES[variant.task].loras]
        model = g.node(
            "WanCoreLora",
            (x, TOP),
            (340, 400),
            title="4-step LoRA",
            models=loras,
            model=model,
            lora_name=loras[0]["name"],
        )[0]
        x += 340 + 30
    model = g.node("WanCoreBlockSwap", (x, TOP), (230, 0), mode=BYPASSED, model=model)[0]
    x += 230 + MARGIN
    g.group("1 · Models", (0, 0), (x, g.floor + END), MODELS)
    return model, clip, vae, seen, x + GAP


def add_prompts(g: Graph, x: int, clip: Output, prompt: str, avoided: str) -> tuple[Output, Output, int]:
    left, right = x + MARGIN, x + MARGIN + 290 + 45
    worded = g.node("WanCoreAestheticPrompt", (left, TOP), (290, 735), colours=POSITIVE, text=prompt)[0]
    clip = g.lead(clip, (right - 22, g.floor + CLIP_LANE), (right - 22, TOP + 220))
    positive = g.node(
        "CLIPTextEncode", (right, TOP), (290, 100), title="Positive prompt", colours=POSITIVE, clip=clip, text=worded
    )
    negative = g.node(
        "CLIPTextEncode",
        (right, below(positive) + APART),
        (290, 240),
        title="Negative prompt",
        colours=NEGATIVE,
        clip=clip,
        text=avoided,
    )
    end = right + 290 + MARGIN
    g.group("2 · Prompt", (x, 0), (end - x, g.floor + END), PROMPT)
    return positive[0], negative[0], end + GAP


def add_size(g: Graph, x: int, variant: Variant, model: Output) -> tuple[Output, int]:
    width, height = variant.size
    latent = g.node(
        "WanCoreEmptyLatent",
        (x + MARGIN, TOP + 280),
        (250, 0),
        model=model,
        width=width,
        height=height,
        frames=variant.frames,
    )[0]
    end = x + 250 + 2 * MARGIN
    g.group("3 · Size", (x, 0), (end - x, g.floor + END), SIZE)
    return latent, end + GAP


def add_image(
    g: Graph,
    x: int,
    variant: Variant,
    model: Output,
    vae: Output,
    seen: Output | None,
    positive: Output,
    negative: Output,
) -> tuple[Output, Output, Output, Output, int]:
    width, height = size_of(variant)
    count = 2 if variant.needs_end else 1
    left = x + MARGIN + count * (250 + 20) + 25
    pictures: dict[str, Any] = {
        f"{name}_image": g.node(
            "LoadImage",
            (x + MARGIN + i * 270, TOP + 330),
            (250, 340),
            title=f"{name.title()} image",
            image="example.png",
        )[0]
        for i, name in enumerate(("start", "end")[:count])
    }
    vae = g.lead(vae, (left - 22, g.floor + VAE_LANE))
    if seen:
        pictures["clip_vision"] = g.lead(seen, (left - 34, g.floor + SEEN_LANE), (left - 34, TOP + 180))
    start = g.node(
        "WanCoreImageToVideo",
        (left, TOP),
        (270, 0),
        model=model,
        vae=g.lead(vae, (left - 22, TOP + 60)),
        positive=positive,
        negative=negative,
        width=width,
        height=height,
        frames=variant.frames,
        **pictures,
    )
    end = left + 270 + MARGIN
    g.group("3 · Image and size", (x, 0), (end - x, g.floor + END), SIZE)
    return start[0], start[1], start[2], vae, end + GAP


def add_sampler(
    g: Graph, x: int, variant: Variant, model: Output, positive: Output, negative: Output, latent: Output, fast: bool
) -> tuple[Output, int]:
    official = {
        "steps": variant.steps,
        "cfg_high": variant.guidance.high,
        "cfg_low": variant.guidance.low,
        "shift": variant.shift_for(size_of(variant)),
    }
    sampled = g.node(
        "WanCoreSampler",
        (x + MARGIN, TOP),
        (290, 0),
        model=model,
        positive=positive,
        negative=negative,
        latent=latent,
        seed=42,
        **(FAST if fast else official),
    )[0]
    end = x + 290 + 2 * MARGIN
    g.group("4 · Sampling", (x, 0), (end - x, g.floor + END), SAMPLING)
    return sampled, end + GAP


def add_video(g: Graph, x: int, variant: Variant, latent: Output, vae: Output) -> int:
    left, width = x + MARGIN, 500
    images = g.node("WanCoreVAEDecode", (left, TOP), (230, 0), vae=vae, samples=latent)
    video = g.node("CreateVideo", (left + 270, TOP), (230, 0), images=images[0], fps=float(variant.fps))
    row = below(images, video)
    led = g.lead(video[0], (left + width - 10, row - TITLE), (left + 10, row - TITLE))
    top = row + APART
    high = max(width + 120, g.floor + END - MARGIN - top)  # a square video fits in
    g.node("SaveVideo", (left, top), (width, high), video=led, filename_prefix=f"video/{g.name}")
    end = left + width + MARGIN
    g.group("5 · Video", (x, 0), (end - x, g.floor + END), VIDEO)
    return end


def add_notes(g: Graph, end: int, variant: Variant, fast: bool) -> None:
    notes = {
        "Files": files_note(variant, fast),
        "Size, length and memory": size_note(variant),
        "Settings": fast_note() if fast else settings_note(variant),
    }
    width = (end - (len(notes) - 1) * GAP) // len(notes)
    for i, (title, text) in enumerate(notes.items()):
        g.note(title, (i * (width + GAP), g.floor + END + GAP + TITLE), (width, 190), text)


def size_of(variant: Variant) -> tuple[int, int]:
    return SIZES.get(variant.task, variant.size)


def download(directory: str, name: str) -> dict[str, str]:
    """A file with the address that ComfyUI's own templates give for it."""
    first = directory in ("text_encoders", "clip_vision") or name.startswith("wan2.1")
    repository = "Wan_2.1_ComfyUI_repackaged" if first else "Wan_2.2_ComfyUI_Repackaged"
    url = f"https://huggingface.co/Comfy-Org/{repository}/resolve/main/split_files/{directory}/{name}"
    return {"name": name, "url": url, "directory": directory}


def files_note(variant: Variant, fast: bool) -> str:
    files = [download("diffusion_models", name) for name in comfyui.NAMES[variant.task].models]
    files += [download("loras", name) for name in comfyui.NAMES[variant.task].loras if fast]
    files += [download("text_encoders", TEXT_ENCODER), download("vae", comfyui.VAES[variant.vae])]
    files += [download("clip_vision", comfyui.CLIP_VISION)] if variant.clip else []
    rows = "\n".join(f"- {file['directory']} / [{file['name']}]({file['url']})" for file in files)
    return f"Put these into ComfyUI's **models** folder, then press **R**.\n\n{rows}"


def size_note(variant: Variant) -> str:
    sizes = ", ".join(f"{width} × {height}" for width, height in variant.sizes)
    multiple = variant.size_multiple
    return "\n\n".join(
        (
            f"**Sizes** {sizes}. Sides are multiples of {multiple}. The button above the selected node sets them.",
            f"**Length** 4n + 1 frames; {variant.frames} at {variant.fps} fps are 5 seconds.",
            *IMAGE_NOTES[variant.image],
            MEMORY_NOTES[variant.task],
            "Out of memory? Enable **Wan Block Swap**: select it, press Ctrl+B. More blocks, less memory, same video.",
        )
    )


_FIT = "**fit** area keeps the image's aspect ratio at about width × height pixels; exact crops to the size."
_NO_IMAGE = "**Without an image** select Start image and press Ctrl+B to bypass it: the video follows the text alone."
IMAGE_NOTES = {"none": (), "channels": (_FIT,), "frame": (_NO_IMAGE, _FIT)}
_A14B_MEMORY = (
    "**Memory** Each expert has 14 billion weights, 28 GB in bfloat16; only one is on the GPU at a time. The official "
    "code needs 41 GB at 832 × 480 and 60 GB at 1280 × 720."
)
MEMORY_NOTES = {
    "t2v-A14B": _A14B_MEMORY,
    "i2v-A14B": _A14B_MEMORY,
    "i2v-14B": "**Memory** 14 billion weights, 28 GB in bfloat16.",
    "flf2v-14B": "**Memory** 14 billion weights, 28 GB in bfloat16.",
    "ti2v-5B": "**Memory** 5 billion weights, 10 GB in bfloat16. The official code runs it on a 24 GB GPU.",
}


def settings_note(variant: Variant) -> str:
    guidance = variant.guidance
    scales = f"cfg {guidance.high:g}"
    if guidance.high != guidance.low:
        scales = f"cfg_high {guidance.high:g}, cfg_low {guidance.low:g}"
    lines = [
        f"**Official** {variant.steps} steps, {scales}, shift {variant.shift_for(size_of(variant)):g}, solver unipc, "
        "schedule auto. "
        "The button above the selected Wan Sampler brings these back.",
        "**Cheaper** 832 × 480, 49 frames and 20 steps show whether a prompt works. cfg 1 halves the time, and "
        "ignores the negative prompt.",
        "**Seed** The same seed gives the same noise on every device.",
        "**Prompt** Wan Aesthetic Prompt adds words of light, lens and movement; all none leaves the text as it is. "
        "English and Chinese both work.",
    ]
    if variant.experts == 2:
        lines.insert(
            1,
            f"**Experts** Mode auto: the high-noise expert works while the timestep is at least "
            f"{variant.boundary * 1000:g} of 1000, then the low-noise expert takes over.",
        )
    return "\n\n".join(lines)


def fast_note() -> str:
    return "\n\n".join(
        (
            "**4 steps** with a distilled LoRA: cfg 1, shift 5, solver euler, schedule simple. Wan Sampler's preset "
            "brings these back: LightX2V-4step.",
            "**LoRA** One Wan LoRA node does both experts: it finds the low-noise file by its name and says so. "
            "Further LoRAs go into further nodes behind it.",
            "**Too little movement?** Give it more steps and set the LoRA's first_step above 0: the first steps are "
            "then the model's own, with cfg_high above 1.",
            "**Negative prompt** With cfg 1 it is not used, and each step takes half the time.",
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
