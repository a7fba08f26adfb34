"""Load Wan Text Encoder, and the CLIP object that ComfyUI's own prompt nodes call."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from comfy_api.latest import io

from ..wan_core.dtypes import resolve_dtype
from ..wan_core.loading.text import TextFile, read_text_encoder
from . import host
from .base import WanNode, guarded_methods
from .checks import check_characters
from .placement import Placement

if TYPE_CHECKING:
    from ..wan_core.models.text.tokenizer import Tokenizer

FOLDER = "text_encoders"
Tokens = dict[str, list[list[tuple]]]
_KEY = "umt5xxl"  # under which ComfyUI's own Wan tokenizer returns its ids


class LoadTextEncoder(WanNode):
    files = ("text_encoder_name",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreLoadTextEncoder",
            display_name="Load Wan Text Encoder",
            category="Wan 2.2/loaders",
            description="Chooses a umT5-XXL text encoder for CLIP Text Encode. Its weights are read when a prompt is "
            "encoded. Prompts are taken literally, as in the official code: (word:1.2) has no special meaning.",
            inputs=[
                io.Combo.Input(
                    "text_encoder_name",
                    options=host.model_names(FOLDER),
                    tooltip="A umT5-XXL encoder in ComfyUI's text_encoders folder: safetensors, fp8 too, GGUF or .pth. "
                    "ComfyUI's file and GGUF carry their tokenizer; the official .pth needs the folder google/umt5-xxl "
                    "beside it.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=host.WEIGHT_DTYPES,
                    default="auto",
                    tooltip="Number format of the computation. auto: bfloat16 where the device is fast in it. "
                    "fp8_e4m3fn and int8 quantise the weights while they are loaded.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    tooltip="default: where ComfyUI runs text encoders; cpu: slower, and takes no GPU memory.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip")],
        )

    @classmethod
    def check_inputs(cls, text_encoder_name: str | None) -> None:
        host.check_file(read_text_encoder, FOLDER, text_encoder_name)

    @classmethod
    def fingerprint_inputs(cls, text_encoder_name: str, dtype: str, device: str) -> tuple:
        return host.fingerprint(FOLDER, text_encoder_name, read_text_encoder)

    @classmethod
    def execute(cls, text_encoder_name: str, dtype: str, device: str) -> io.NodeOutput:
        resolve_dtype(dtype, "cpu")
        file = host.read_header(read_text_encoder, FOLDER, text_encoder_name)
        return io.NodeOutput(WanCLIP(file, dtype, device), ui=host.told("\n".join(file.notes)))


@guarded_methods("tokenize", "encode_from_tokens", "encode_from_tokens_scheduled", "encode")
class WanCLIP:
    """A text encoder on a CLIP socket: the part of ComfyUI's CLIP interface that makes sense for umT5."""

    use_clip_schedule = False
    apply_hooks_to_conds = None

    def __init__(self, file: TextFile, dtype: str, device: str) -> None:
        self.file = file
        self.dtype = dtype
        self.device = device
        self.patcher = Placement(host.text_device(device))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"The connected node asks the Wan text encoder for {name!r}, which it does not have. "
            "If that node cannot do without, load the encoder with ComfyUI's CLIPLoader, type wan."
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from ..wan_core.models.text.tokenizer import load_tokenizer

        return load_tokenizer(self.file.tokenizer)

    def tokenize(self, text: str, return_word_ids: bool = False, **_: object) -> Tokens:
        """Text -> ids with weight 1 each, in the shape of ComfyUI's tokenizers."""
        check_characters("The prompt", text, lines=True)
        ids = self.tokenizer.encode(text)
        return {_KEY: [[(i, 1.0, 0) if return_word_ids else (i, 1.0) for i in ids]]}

    def encode_from_tokens(
        self, tokens: Tokens, return_pooled: bool | str = False, return_dict: bool = False
    ) -> torch.Tensor | tuple | dict:
        """Ids -> [1,512,D]; umT5 has no pooled output, so None stands for it."""
        encoder = host.engine().text_encoder(self.file, self.patcher.load_device, self.dtype)
        ids = [token[0] for part in tokens[_KEY] for token in part]
        cond = encoder.encode_ids([ids], on_block=host.check_cancelled).to(host.storage_device())
        if return_dict:
            return {"cond": cond, "pooled_output": None}
        return (cond, None) if return_pooled else cond

    def encode_from_tokens_scheduled(
        self, tokens: Tokens, unprojected: bool = False, add_dict: dict | None = None, show_pbar: bool = True
    ) -> list:
        """Ids -> CONDITIONING."""
        return [[self.encode_from_tokens(tokens), {"pooled_output": None, **(add_dict or {})}]]

    def encode(self, text: str) -> torch.Tensor:
        return cast(torch.Tensor, self.encode_from_tokens(self.tokenize(text)))

    def clone(self) -> WanCLIP:
        other = WanCLIP(self.file, self.dtype, self.device)
        other.patcher = self.patcher.clone()
        return other

    def clip_layer(self, layer_idx: int) -> None:
        """The last layer is the only one that Wan was trained with."""

    def set_tokenizer_option(self, option_name: str, value: object) -> None:
        """Options of other tokenizers; umT5's takes none."""

    def get_ram_usage(self) -> int:
        return 0
