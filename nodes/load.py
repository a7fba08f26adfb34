"""Load Wan Model: a checkpoint's header becomes a recipe."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..wan_core.dtypes import resolve_dtype
from ..wan_core.loading.dit import DiTFile, quantised_note, read_dit
from ..wan_core.models.dit.attention import BACKENDS, find_backend
from ..wan_core.recipe import ModelRecipe
from . import host
from .base import WanNode
from .types import WanModel

FOLDER = "diffusion_models"


class LoadModel(WanNode):
    files = ("model_name",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreLoadModel",
            display_name="Load Wan Model",
            category="Wan 2.2/loaders",
            description="Chooses one Wan diffusion model. Only the file's header is read now; the weights are read "
            "when sampling begins. T2V-A14B and I2V-A14B are two files each: load both and join them with Wan Expert "
            "Switch.",
            inputs=[
                io.Combo.Input(
                    "model_name", options=host.model_names(FOLDER),
                    tooltip="A Wan2.2 model in ComfyUI's diffusion_models folder: one file (safetensors, fp8 and int8 "
                    "too, or GGUF), or the folder of a sharded checkpoint as the official download has it.",
                ),
                io.Combo.Input(
                    "dtype", options=host.WEIGHT_DTYPES, default="auto",
                    tooltip="Number format of the computation. auto: bfloat16 where the device is fast in it, else "
                    "float16 on older GPUs and float32 on CPUs. Quantised files stay as they are in memory. fp8_e4m3fn "
                    "and int8 quantise the weights while they are loaded: half the memory of bfloat16, a slightly "
                    "different video.",
                ),
                io.Combo.Input(
                    "attention", options=["auto", *BACKENDS], default="auto",
                    tooltip="How attention is computed. auto is sdpa, PyTorch's own; the others are faster on some "
                    "GPUs and must be installed (sage: pip install sageattention).",
                ),
            ],
            outputs=[WanModel.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def check_inputs(cls, model_name: str | None) -> None:
        host.check_file(_read, FOLDER, model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name: str, dtype: str, attention: str) -> tuple:
        return host.fingerprint(FOLDER, model_name, _read)

    @classmethod
    def execute(cls, model_name: str, dtype: str, attention: str) -> io.NodeOutput:
        file: DiTFile = host.read_header(_read, FOLDER, model_name)
        find_backend(attention, host.device(), resolve_dtype(dtype, host.device(), file.checkpoint.dtype))
        note = quantised_note(file, dtype, host.device())
        notes = (*file.notes, note) if note else file.notes
        model = ModelRecipe(file, dtype=dtype, attention=attention, notes=notes)
        return io.NodeOutput(model, ui=host.told("\n".join(model.notes)))


def _read(path: Path) -> DiTFile:
    file = read_dit(path)
    ModelRecipe(file).variant  # noqa: B018 - refuses one that this version does not know
    return file
