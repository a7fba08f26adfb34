"""Load Wan Model: a checkpoint's header becomes a recipe."""

from __future__ import annotations

from comfy_api.latest import io

from ..wan_core.config import VARIANTS
from ..wan_core.dtypes import resolve_dtype
from ..wan_core.layouts.variants import AUTO, Choice, choose
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
            description="Chooses one Wan diffusion model, 2.1 or 2.2. Only the file's header is read now; the weights "
            "are read when sampling begins. T2V-A14B and I2V-A14B are two files each: load both and join them with Wan "
            "Expert Switch.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.model_names(FOLDER),
                    tooltip="A Wan model in ComfyUI's diffusion_models folder: one file (safetensors, fp8 and int8 "
                    "too, or GGUF), or the folder of a sharded checkpoint as the official download has it.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=host.WEIGHT_DTYPES,
                    default="auto",
                    tooltip="Number format of the computation. auto: bfloat16 where the device is fast in it, else "
                    "float16 on older GPUs and float32 on CPUs. Quantised files stay as they are in memory. fp8_e4m3fn "
                    "and int8 quantise the weights while they are loaded: half the memory of bfloat16, a slightly "
                    "different video.",
                ),
                io.Combo.Input(
                    "attention",
                    options=["auto", *BACKENDS],
                    default="auto",
                    tooltip="How self-attention is computed. auto is sdpa, PyTorch's own, or what ComfyUI was started "
                    "with (--use-sage-attention, --use-flash-attention). The others are faster on some GPUs and must "
                    "be installed; sage, sage3 and kitchen round more, and sol leaves things out in long videos.",
                ),
                io.Combo.Input(
                    "variant",
                    options=[AUTO, *VARIANTS],
                    default=AUTO,
                    optional=True,
                    tooltip="Which official model the file is, where several have the same layers: auto goes by the "
                    "file's and its folder's name, and says what it assumed.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    tooltip="Compiles the transformer's blocks (torch.compile; on a GPU it needs Triton). The first "
                    "step of a new video size takes longer, up to some minutes. On cards that run the pack's own "
                    "kernels, compiling was found no faster; it is for others. It takes more memory, and leaves out "
                    "quantised weights.",
                ),
            ],
            outputs=[WanModel.Output(display_name="model")],
        )

    @classmethod
    def check_inputs(cls, model_name: str | None, variant: str | None = AUTO) -> None:
        host.check_file(read_dit, FOLDER, model_name)
        if model_name and variant:
            _chosen(host.read_header(read_dit, FOLDER, model_name), variant)

    @classmethod
    def fingerprint_inputs(
        cls, model_name: str, dtype: str, attention: str, variant: str = AUTO, compile: bool = False
    ) -> tuple:
        return host.fingerprint(FOLDER, model_name, read_dit)

    @classmethod
    def execute(
        cls, model_name: str, dtype: str, attention: str, variant: str = AUTO, compile: bool = False
    ) -> io.NodeOutput:
        file: DiTFile = host.read_header(read_dit, FOLDER, model_name)
        compute = resolve_dtype(dtype, host.device(), file.checkpoint.dtype)
        attention, followed = host.attention_asked(attention, compute)
        find_backend(attention, host.device(), compute)
        note = quantised_note(file, dtype, host.device())
        chosen = _chosen(file, variant)
        notes = tuple(filter(None, (*file.notes, note, chosen.assumed, followed)))
        model = ModelRecipe(
            file, dtype=dtype, attention=attention, notes=notes, variant=chosen.variant, compile=compile
        )
        return io.NodeOutput(model, ui=host.told("\n".join(model.notes)))


def _chosen(file: DiTFile, variant: str) -> Choice:
    return choose(file.config, file.path, wanted=variant)
