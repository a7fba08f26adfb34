"""How each node is found by other words, and which of its inputs few people need: newer ComfyUI versions ask for both.

One table, because what it says only makes sense for all nodes together: who searches for "lora" wants the node that
adds one before the node that trains one.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Finding(NamedTuple):
    """The words a node is searched by, beside its names, and its inputs that may be folded away."""

    words: tuple[str, ...]
    advanced: tuple[str, ...] = ()


FINDING = {
    "WanCoreLoadModel": Finding(("unet loader", "checkpoint", "gguf loader", "diffusion model"),
                                ("attention", "variant")),
    "WanCoreFromModel": Finding(("model to wan", "native model", "gguf model")),
    "WanCoreExpertSwitch": Finding(("high noise low noise", "moe", "boundary", "two experts")),
    "WanCoreLora": Finding(("lightx2v", "lightning", "4 step", "lora loader", "causvid"),
                           ("first_step", "last_step", "merge")),
    "WanCoreBlockSwap": Finding(("offload", "low vram", "out of memory", "vram limit"), ("prefetch",)),
    "WanCoreStepCache": Finding(("teacache", "magcache", "easycache", "faster", "speed up"),
                                ("dense", "most", "tea_model")),
    "WanCoreGuidance": Finding(("cfg zero star", "apg", "slg", "skip layer", "nag", "negative prompt", "tcfg"),
                               ("momentum", "norm_threshold", "eta", "nag_tau", "nag_alpha")),
    "WanCoreLoadTextEncoder": Finding(("umt5", "t5", "clip loader"), ("device",)),
    "WanCoreLoadVAE": Finding(("wan vae loader", "video autoencoder")),
    "WanCoreLoadClipVision": Finding(("clip vision loader", "image encoder", "vit-h")),
    "WanCoreAestheticPrompt": Finding(("camera words", "lighting", "prompt styler")),
    "WanCorePromptExtend": Finding(("prompt enhancer", "llm", "qwen", "prompt rewrite", "caption"), ("timeout",)),
    "WanCoreEmptyLatent": Finding(("video size", "t2v latent", "text to video"), ("batch_size",)),
    "WanCoreImageToVideo": Finding(("i2v", "first last frame", "flf2v", "animate image", "start image")),
    "WanCoreVAEEncode": Finding(("video to latent", "v2v")),
    "WanCoreSampler": Finding(("ksampler", "video sampler", "unipc", "denoise", "lcm", "fastwan", "turbodiffusion"),
                              ("start_step", "end_step", "add_noise", "force")),
    "WanCoreToModel": Finding(("wan to model", "native sampler", "ksampler model")),
    "WanCoreVAEDecode": Finding(("latent to video", "tiled decode"), ("overlap",)),
    "WanCoreTrainLora": Finding(("lora training", "finetune", "fine-tune"),
                                ("alpha", "targets", "seed", "checkpointing", "skip_bad_clips")),
}  # fmt: skip


def findable(node: Any) -> Any:
    """The node class, whose schema says all this where the running ComfyUI has words for it, and nothing else anew."""
    define = node.define_schema.__func__

    def define_schema(cls: type) -> Any:
        return _told(define(cls))

    node.define_schema = classmethod(define_schema)
    return node


def _told(schema: Any) -> Any:
    finding = FINDING[schema.node_id]
    if hasattr(schema, "search_aliases"):
        schema.search_aliases = list(finding.words)
    for field in schema.inputs:
        if field.id in finding.advanced and hasattr(field, "advanced"):
            field.advanced = True
    return schema
