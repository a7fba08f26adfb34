"""A file that is truncated while its weights are in use ends in an answer or in an error, never with the process.

Each case runs in a process of its own, which the system would end by SIGBUS if a page that is gone were touched. What
is resident goes on to the same answer; what is read as it is used says that the file was changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core.quant_files import is_matrix, write_gguf
from wan_core.config import Architecture
from wan_core.models.dit.dit import WanDiT
from wan_core.tools.tiny import _random_lora, _random_weights, write_tiny

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Architecture(16, 16, 256, 512, layers=3, text_dim=32, freq_dim=256, heads=2)

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from wan_core.errors import WanError
torch.set_num_threads(1)
kind, path, options = sys.argv[1], Path(sys.argv[2]), eval(sys.argv[3])
began = []

def truncate(*_):
    began.append(1)
    if len(began) == 2:  # in the middle of a call
        for file in path.rglob("*.safetensors") if path.is_dir() else [path]:
            os.truncate(file, 0)

def dit(path, lora=None, merge=False, on_block=None, **options):
    from wan_core.lora.apply import adaptation_of
    from wan_core.lora.files import read_lora
    from wan_core.loading.dit import read_dit
    from wan_core.memory.build import build_dit
    file = read_dit(path)
    model = build_dit(file, **options)
    if lora:
        adaptation_of(model, file).set([read_lora(Path(lora), file)], [0.7], merge=merge)
    torch.manual_seed(0)
    inputs = torch.randn(1, 16, 3, 6, 8), torch.tensor([937.0]), torch.randn(1, 20, 32)
    model(*inputs, on_block=on_block)
    return model(*inputs)

def lora(lora, base, **options):
    return dit(Path(base), lora=lora, **options)

def text(path, spiece, on_block=None, **options):
    from wan_core.loading.text import load_text_encoder
    encoder = load_text_encoder(path, tokenizer=Path(spiece).read_bytes(), **options)
    encoder(["a cat"], on_block=on_block)
    return encoder(["two dogs at the sea"])

def vae(path, on_block=None):
    from wan_core.loading.vae import load_vae
    vae = load_vae(path, dtype="float32")
    torch.manual_seed(0)
    latent = torch.randn(1, 16, 4, 4, 4)
    parts = []
    for part in vae.decode_chunks(latent):
        parts.append(part.clone())
        on_block and on_block()
    return torch.cat(parts, dim=2)

def convert(path, to, target, on_block=None):
    from wan_core.tools.convert import convert
    convert(path, target, to, on_tensor=on_block, overwrite=True)
    return torch.zeros(1)

run = {"dit": dit, "text": text, "vae": vae, "lora": lora, "convert": convert}[kind]
with torch.no_grad():
    right = run(path, **options)
    try:
        found = run(path, **options, on_block=truncate)
        assert len(began) >= 2
        print("answered", torch.equal(found, right))
    except WanError as error:
        print("refused", error)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    weights = _random_weights(WanDiT, CONFIG, torch.Generator().manual_seed(0))
    save_file(weights, folder / "float32.safetensors")
    save_file({key: value.bfloat16() for key, value in weights.items()}, folder / "bfloat16.safetensors")
    torch.save(weights, folder / "dit.pth")
    kind_of = lambda key, value: "Q8_0" if is_matrix(key, value) and "blocks" in key else "F32"  # noqa: E731
    write_gguf(folder / "dit.gguf", weights, kind_of)
    save_file(_random_lora(weights), folder / "lora.safetensors")
    loha = {}
    for key, value in weights.items():
        if is_matrix(key, value) and "blocks" in key:
            rows, columns = value.shape
            name = "diffusion_model." + key.removesuffix(".weight")
            for n in (1, 2):
                loha[f"{name}.hada_w{n}_a"] = torch.randn(rows, 2) * 0.1
                loha[f"{name}.hada_w{n}_b"] = torch.randn(2, columns) * 0.1
    save_file(loha, folder / "loha.safetensors")
    write_tiny(folder / "tiny", "t2v-A14B", layout="comfyui")
    (text,) = (folder / "tiny" / "text_encoders").iterdir()
    content = load_file(text)
    (folder / "spiece").write_bytes(content.pop("spiece_model").numpy().tobytes())
    save_file(content, folder / "text.safetensors")
    save_file({key: value.bfloat16() for key, value in content.items()}, folder / "text_bf16.safetensors")
    write_tiny(folder / "official", "t2v-A14B", layout="official")
    (folder / "text.pth").write_bytes(next((folder / "official").glob("models_t5*.pth")).read_bytes())
    (vae,) = (folder / "tiny" / "vae").iterdir()
    (folder / "vae.safetensors").write_bytes(vae.read_bytes())
    (folder / "vae.pth").write_bytes((folder / "official" / "Wan2.1_VAE.pth").read_bytes())
    return {path.name: path for path in folder.iterdir() if path.is_file()}


F32, BF16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
ANSWERED, REFUSED = "answered True", "refused"
CASES = {
    "resident": ("dit", "float32.safetensors", F32, ANSWERED),
    "resident, half": ("dit", "bfloat16.safetensors", BF16, ANSWERED),
    "resident, pickled": ("dit", "dit.pth", F32, ANSWERED),
    "all stream": ("dit", "float32.safetensors", F32 | {"swap_blocks": 3}, REFUSED),
    "some stream": ("dit", "float32.safetensors", F32 | {"swap_blocks": 1}, REFUSED),
    "all stream, half": ("dit", "bfloat16.safetensors", BF16 | {"swap_blocks": 3}, REFUSED),
    "all stream, converted": ("dit", "bfloat16.safetensors", F32 | {"swap_blocks": 3}, REFUSED),
    "all stream, pickled": ("dit", "dit.pth", F32 | {"swap_blocks": 3}, REFUSED),
    "GGUF": ("dit", "dit.gguf", F32, REFUSED),
    "GGUF, all stream": ("dit", "dit.gguf", F32 | {"swap_blocks": 3}, REFUSED),
    "packed on load": ("dit", "float32.safetensors", {"dtype": "int8"}, ANSWERED),
    "LoRA beside": ("lora", "lora.safetensors", F32, ANSWERED),
    "LoRA, merged": ("lora", "lora.safetensors", F32 | {"merge": True}, ANSWERED),
    "LoRA, streams": ("lora", "lora.safetensors", F32 | {"swap_blocks": 3}, REFUSED),
    "LoHa, streams": ("lora", "loha.safetensors", F32 | {"swap_blocks": 3}, REFUSED),
    "text": ("text", "text.safetensors", F32, REFUSED),
    "text, converted": ("text", "text_bf16.safetensors", F32, REFUSED),
    "text, pickled": ("text", "text.pth", F32, REFUSED),
    "VAE": ("vae", "vae.safetensors", {}, ANSWERED),
    "VAE, pickled": ("vae", "vae.pth", {}, ANSWERED),
    "converting": ("convert", "float32.safetensors", {"to": "int8"}, REFUSED),
    "converting GGUF": ("convert", "dit.gguf", {"to": "bf16"}, REFUSED),
}  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="Windows does not let a mapped file be truncated")
@pytest.mark.parametrize("case", CASES)
def test_the_process_lives(files: dict[str, Path], tmp_path: Path, case: str):
    kind, name, options, expected = CASES[case]
    path = tmp_path / name
    path.write_bytes(files[name].read_bytes())
    more = {
        "text": {"spiece": str(files["spiece"])},
        "lora": {"base": str(files["float32.safetensors"])},
        "convert": {"target": str(tmp_path / "out.safetensors")},
    }.get(kind, {})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(path), repr(options | more)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.startswith(expected), done.stdout
    told = "was changed while it was converted" if kind == "convert" else "was changed or removed"
    assert expected == ANSWERED or f"{name} {told}" in done.stdout
