"""The nodes: ComfyUI's side of the pack."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .cache import StepCacheNode
from .clip_vision import LoadClipVision
from .experts import ExpertSwitch
from .extend import PromptExtend
from .finding import findable
from .guidance import GuidanceNode
from .latents import EmptyLatent, ImageToVideo
from .load import LoadModel
from .lora import Lora
from .native import ToModel
from .native_reverse import FromModel
from .options import BlockSwap
from .prompt import AestheticPrompt
from .sample import Sampler
from .text import LoadTextEncoder
from .train import TrainLora
from .vae import LoadVAE, VAEDecode, VAEEncode

NODES: list[type[io.ComfyNode]] = [
    LoadModel,
    FromModel,
    ExpertSwitch,
    Lora,
    BlockSwap,
    StepCacheNode,
    GuidanceNode,
    LoadTextEncoder,
    LoadVAE,
    LoadClipVision,
    AestheticPrompt,
    PromptExtend,
    EmptyLatent,
    ImageToVideo,
    VAEEncode,
    Sampler,
    ToModel,
    VAEDecode,
    TrainLora,
]
for _node in NODES:
    findable(_node)


class WanCoreExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
