"""LoRA files: every dialect equals the float32 merge, and ComfyUI's own reading of the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.core.lora_files import DIALECTS_OF_LORA, STRENGTH, Dialect, draw, low_rank, prefixed
from wan_core.config import Architecture
from wan_core.errors import WanError
from wan_core.layouts.dit import DIALECTS
from wan_core.loading.dit import read_dit
from wan_core.lora.apply import Adaptation, PatchedLinear, adaptation_of
from wan_core.lora.files import read_lora
from wan_core.memory.build import build_dit
from wan_core.models.dit.dit import WanDiT
from wan_core.tools.tiny import TinySizes, _random_weights, make_tiny

DIFFUSERS = DIALECTS["diffusers"]
CONFIG = Architecture(16, 16, 128, 256, layers=3, text_dim=32, freq_dim=256, heads=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float32."""
    path = tmp_path_factory.mktemp("dit") / "base.safetensors"
    save_file(_random_weights(WanDiT, CONFIG, torch.Generator().manual_seed(0)), path)
    return path


def inputs(text_dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return draw(1, 16, 2, 4, 6), torch.tensor([437.0]), draw(1, 20, text_dim)


def velocity(path: Path, *loras: tuple[Path, float], merge: bool = False, **options) -> Tensor:
    file = read_dit(path)
    dit = build_dit(file, **({"dtype": "float32"} | options))
    read = [read_lora(lora, file) for lora, _ in loras]
    adaptation_of(dit, file).set(read, [strength for _, strength in loras], merge=merge)
    return dit(*inputs())


def weights_of(path: Path) -> dict[str, Tensor]:
    checkpoint = read_dit(path).checkpoint
    return {key: checkpoint.tensor(key) for key in checkpoint.tensors}


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Within a part of the largest value."""
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


@pytest.mark.parametrize("swap_blocks", [0, 3])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS_OF_LORA.values(), ids=list(DIALECTS_OF_LORA))
def test_every_dialect_equals_the_float32_merge(
    base: Path, tmp_path: Path, dialect: Dialect, merge: bool, swap_blocks: int
):
    """To 1e-5 of the largest value; without the LoRA it would be another video by more than 1 %."""
    torch.manual_seed(2)
    tensors, merged = dialect.make(weights_of(base))
    save_file(tensors, tmp_path / "lora.safetensors")
    save_file(merged, tmp_path / "merged.safetensors")
    lora = read_lora(tmp_path / "lora.safetensors", read_dit(base))
    assert (lora.matched, lora.unmatched, lora.misfits) == (len(tensors), (), ())
    expected = velocity(tmp_path / "merged.safetensors")
    found = velocity(base, (tmp_path / "lora.safetensors", STRENGTH), merge=merge, swap_blocks=swap_blocks)
    assert close(found, expected, 1e-5)
    assert not close(expected, velocity(base), 1e-2)


_COMFYUI = """
import comfy.sd, comfy.utils, comfy.model_management
model = comfy.sd.load_diffusion_model(inputs["path"], model_options={"dtype": torch.float32})
for lora, strength in inputs["loras"]:
    model = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(lora), strength, 0)[0]
comfy.model_management.load_models_gpu([model])
with torch.no_grad():
    outputs["velocity"] = model.model.diffusion_model(inputs["x"], inputs["t"], inputs["context"]).float()
comfy.model_management.unload_all_models()
"""


@pytest.fixture(scope="module")
def comfy_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ComfyUI takes for a Wan."""
    path = tmp_path_factory.mktemp("dit") / "base.safetensors"
    sizes = TinySizes(dim=128, ffn_dim=256, layers=2, text_dim=4096)
    save_file(make_tiny("t2v-A14B", sizes=sizes).experts[0], path)
    return path


def assert_as_comfyui(in_comfyui, base: Path, *loras: tuple[Path, float]) -> None:
    """To 2e-5 of the largest value, as of models without LoRAs."""
    x, t, context = inputs(4096)
    file = read_dit(base)
    dit = build_dit(file, dtype="float32")
    plain = dit(x, t, context)
    adaptation_of(dit, file).set([read_lora(lora, file) for lora, _ in loras], [strength for _, strength in loras])
    given = [(str(lora), strength) for lora, strength in loras]
    theirs = in_comfyui(_COMFYUI, path=str(base), loras=given, x=x, t=t, context=context)["velocity"]
    assert close(dit(x, t, context), theirs, 2e-5)
    assert not close(plain, theirs, 1e-2)


COMMON = [name for name, dialect in DIALECTS_OF_LORA.items() if dialect.in_comfyui]


@pytest.mark.parametrize("name", COMMON)
def test_every_dialect_that_comfyui_reads_means_the_same(in_comfyui, comfy_base: Path, tmp_path: Path, name: str):
    torch.manual_seed(2)
    save_file(DIALECTS_OF_LORA[name].make(weights_of(comfy_base))[0], tmp_path / "lora.safetensors")
    assert_as_comfyui(in_comfyui, comfy_base, (tmp_path / "lora.safetensors", STRENGTH))


def test_differences_mean_the_same_to_comfyui(in_comfyui, comfy_base: Path, tmp_path: Path):
    """All but those of modulations: it does not know ``.diff_m``."""
    torch.manual_seed(2)
    made = DIALECTS_OF_LORA["differences"].make(weights_of(comfy_base))[0]
    made = {key: value for key, value in made.items() if not key.endswith(".diff_m")}
    save_file(made, tmp_path / "lora.safetensors")
    assert_as_comfyui(in_comfyui, comfy_base, (tmp_path / "lora.safetensors", STRENGTH))


def test_a_chain_of_every_kind_is_applied_in_its_order(in_comfyui, comfy_base: Path, tmp_path: Path):
    """DoRA depends on what was merged before it; ComfyUI merges in the order of the nodes."""
    torch.manual_seed(2)
    chain = []
    for name, strength in (("A_B", 0.8), ("dora_rows", 0.6), ("lokr_two", -0.5), ("dora_columns", 1.0), ("loha", 0.4)):
        path = tmp_path / f"{name}.safetensors"
        save_file(DIALECTS_OF_LORA[name].make(weights_of(comfy_base))[0], path)
        chain.append((path, strength))
    assert_as_comfyui(in_comfyui, comfy_base, *chain)


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    """Low-rank updates inside and outside of blocks."""
    torch.manual_seed(3)
    save_file(DIALECTS_OF_LORA["A_B_alpha_everywhere"].make(weights_of(base))[0], tmp_path / "plain.safetensors")
    return tmp_path / "plain.safetensors"


def test_strengths_change_and_go_without_a_trace(base: Path, lora: Path, tmp_path: Path):
    """What was set last counts; strength 0 and no LoRA at all give the plain model's answer to the bit."""
    torch.manual_seed(4)
    save_file(DIALECTS_OF_LORA["differences"].make(weights_of(base))[0], tmp_path / "whole.safetensors")
    file, other = read_dit(base), tmp_path / "whole.safetensors"
    read = [read_lora(path, file) for path in (lora, other)]
    for swap_blocks in (0, 2):
        dit = build_dit(file, dtype="float32", swap_blocks=swap_blocks)
        adaptation, plain = adaptation_of(dit, file), dit(*inputs())
        for merge in (False, True):
            for strengths in ((0.5, 0.2), (0.0, 0.2), (0.0, 0.0), (0.3, -1.0)):
                adaptation.set(read, strengths, merge=merge)
                expected = velocity(
                    base, (lora, strengths[0]), (other, strengths[1]), merge=merge, swap_blocks=swap_blocks
                )
                assert torch.equal(dit(*inputs()), expected)
                assert any(strengths) or torch.equal(dit(*inputs()), plain)
        adaptation.set([], [])
        assert torch.equal(dit(*inputs()), plain)
        assert not any(isinstance(module, PatchedLinear) for module in dit.modules())


def test_setting_the_same_again_does_nothing(base: Path, lora: Path):
    file = read_dit(base)
    dit = build_dit(file, dtype="float32")
    adaptation = adaptation_of(dit, file)
    adaptation.set([read_lora(lora, file)], [1.0])
    layer, revision = dit.blocks[0].self_attn.q, adaptation.revision
    adaptation.set([read_lora(lora, file)], [1.0])
    assert dit.blocks[0].self_attn.q is layer and adaptation.revision == revision
    adaptation.set([read_lora(lora, file)], [0.5])
    assert dit.blocks[0].self_attn.q is layer and adaptation.revision == revision + 1


@pytest.mark.parametrize(
    "key, tensor, said",
    [
        ("lora_unet_down_blocks_0_attn.lora_up.weight", torch.zeros(4, 4), "changes nothing"),
        ("diffusion_model.blocks.0.ffn.0.lora_B.weight", torch.zeros(128, 4), "changes nothing"),  # without its A
        ("diffusion_model.patch_embedding.diff", torch.zeros(128, 36, 1, 2, 2), "and 1 are of another shape"),
    ],
)
def test_a_file_that_changes_nothing_is_refused(base: Path, tmp_path: Path, key: str, tensor: Tensor, said: str):
    save_file({key: tensor}, tmp_path / "other.safetensors")
    with pytest.raises(WanError, match=said):
        read_lora(tmp_path / "other.safetensors", read_dit(base))


Q = "diffusion_model.blocks.0.self_attn.q"
BROKEN = {
    "ranks": {"lora_A.weight": (8, 128), "lora_B.weight": (128, 4)},
    "alpha": {"lora_A.weight": (4, 128), "lora_B.weight": (128, 4), "alpha": (3,)},
    "dora": {"lora_A.weight": (4, 128), "lora_B.weight": (128, 4), "dora_scale": (7, 1)},
    "loha": {"hada_w1_a": (128, 4), "hada_w1_b": (3, 128), "hada_w2_a": (128, 4), "hada_w2_b": (4, 128)},
    "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (32, 4), "lokr_w2_b": (3, 32)},
    "rank_0": {"lora_A.weight": (0, 128), "lora_B.weight": (128, 0), "alpha": ()},
    "core": {"lora_A.weight": (4, 128), "lora_B.weight": (128, 4), "lora_mid.weight": (5, 4, 1, 1)},
    "loha_no_rank": {"hada_w1_a": (128, 4), "hada_w1_b": (4, 128), "hada_w2_a": (128, 0), "hada_w2_b": (0, 128)},
    "loha_second": {"hada_w1_a": (128, 4), "hada_w1_b": (4, 128), "hada_w2_a": (64, 4), "hada_w2_b": (4, 128)},
    "loha_vector": {"hada_w1_a": (128, 4), "hada_w1_b": (4, 128), "hada_w2_a": (128,), "hada_w2_b": (4, 128)},
    "loha_one_core": {
        "hada_w1_a": (4, 128),
        "hada_w1_b": (4, 128),
        "hada_w2_a": (4, 128),
        "hada_w2_b": (4, 128),
        "hada_t1": (4, 4, 1, 1),
    },
    "lokr_core": {"lokr_w1": (4, 4), "lokr_w2_a": (4, 32), "lokr_w2_b": (4, 32), "lokr_t2": (4, 5, 1, 1)},
    "lokr_core_of_none": {"lokr_w1": (4, 4), "lokr_w2": (32, 32), "lokr_t2": (4, 4, 1, 1)},
    "lokr_split": {"lokr_w1_a": (4, 2, 3), "lokr_w1_b": (2, 4), "lokr_w2": (32, 32)},
    "glora_channels": {"a1.weight": (64, 4), "a2.weight": (4, 64), "b1.weight": (128, 4), "b2.weight": (4, 128)},
    "glora_rank_0": {"a1.weight": (128, 0), "a2.weight": (0, 128), "b1.weight": (128, 0), "b2.weight": (0, 128)},
    "oft": {"oft_blocks": (8, 16, 15)},
    "oft_alpha": {"oft_blocks": (8, 16, 16), "alpha": (2,)},
    "boft_odd": {"oft_blocks": (1, 128, 1, 1)},
    "boft_stages": {"oft_blocks": (6, 8, 16, 16)},
    "boft_no_stage": {"oft_blocks": (0, 8, 16, 16)},
    "boft_rescale": {"oft_blocks": (2, 8, 16, 16), "rescale": (64, 1)},
}


@pytest.mark.parametrize("shapes", BROKEN.values(), ids=list(BROKEN))
def test_tensors_that_contradict_each_other_are_refused_before_a_run(base: Path, tmp_path: Path, shapes: dict):
    save_file({f"{Q}.{role}": torch.zeros(shape) for role, shape in shapes.items()}, tmp_path / "broken.safetensors")
    with pytest.raises(WanError, match=r"broken: what it has for blocks\.0\.self_attn\.q.*Found diffusion_model"):
        read_lora(tmp_path / "broken.safetensors", read_dit(base))


OTHER_SHAPES = {
    "vectors": {"lora_A.weight": (128,), "lora_B.weight": (128,)},
    "numbers": {"lora_A.weight": (), "lora_B.weight": ()},
    "oft_rows": {"oft_blocks": (7, 16, 16)},
    "oft_5d": {"oft_blocks": (1, 1, 8, 16, 16)},
    "oft_matrix": {"oft_blocks": (128, 128)},
    "glora_ranks": {"a1.weight": (128, 4), "a2.weight": (4, 128), "b1.weight": (128, 4), "b2.weight": (3, 128)},
    "glora_turns": {"a1.weight": (128, 4), "a2.weight": (3, 128), "b1.weight": (128, 4), "b2.weight": (4, 128)},
    "glora_vectors": {"a1.weight": (4,), "a2.weight": (4,), "b1.weight": (4,), "b2.weight": (4,)},
    "set": {"set_weight": ()},
    "huge": {"hada_w1_a": (4, 0), "hada_w1_b": (1 << 40, 0), "hada_w2_a": (4, 0), "hada_w2_b": (0, 1 << 40)},
}


@pytest.mark.parametrize("shapes", OTHER_SHAPES.values(), ids=list(OTHER_SHAPES))
def test_tensors_of_no_such_weight_are_refused_before_a_run(base: Path, tmp_path: Path, shapes: dict):
    save_file({f"{Q}.{role}": torch.empty(shape) for role, shape in shapes.items()}, tmp_path / "other.safetensors")
    with pytest.raises(WanError, match=r"another model|changes nothing"):
        read_lora(tmp_path / "other.safetensors", read_dit(base))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rotations_of_no_numbers_are_refused(base: Path, tmp_path: Path, bad: float):
    save_file({f"{Q}.oft_blocks": torch.full((8, 16, 16), bad)}, tmp_path / "oft.safetensors")
    with pytest.raises(WanError, match=r"self_attn\.q\.oft_blocks make no rotations"):
        velocity(base, (tmp_path / "oft.safetensors", 1.0))


def test_a_convolutions_cores_and_channels(base: Path, tmp_path: Path):
    """Cores, LoKr, GLoRA and DoRA by input channel on the patch embedding, which ComfyUI's formulas leave to images."""
    weight = weights_of(base)["patch_embedding.weight"]
    torch.manual_seed(2)
    one, kernel = "diffusion_model.patch_embedding", (1, 2, 2)
    a, b, core = draw(4, 128, size=0.3), draw(4, 16, size=0.3), draw(4, 4, *kernel)
    factor, second, w2 = draw(4, 2, size=0.3), draw(32, 8, *kernel, size=0.3), draw(4, 16, size=0.3)
    a1, a2, b1, b2 = draw(16, 4), draw(4, 16), draw(128, 4), draw(4, 16, *kernel)
    cored = torch.einsum("mnxyz,mr,nc->rcxyz", core, a, b)
    kron = torch.einsum("ac,rdxyz->arcdxyz", factor, second).reshape(weight.shape)
    down = draw(4, 16, *kernel, size=0.3)
    total = weight + torch.einsum("rn,ncxyz->rcxyz", a.T, down)
    length = total.square().sum((0, 2, 3, 4), keepdim=True).sqrt()
    dora = length * (1 + draw(1, 16, 1, 1, 1, size=0.2))
    cases = [
        ({"lora_up.weight": a.T.contiguous(), "lora_mid.weight": core, "lora_down.weight": b}, cored),
        (
            {"hada_w1_a": a, "hada_w1_b": b, "hada_t1": core, "hada_w2_a": a * 2, "hada_w2_b": w2, "hada_t2": core},
            cored * torch.einsum("mnxyz,mr,nc->rcxyz", core, a * 2, w2),
        ),
        ({"lokr_w1": factor, "lokr_w2": second}, kron),
        (
            {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2},
            torch.einsum("rcxyz,cj,jk->rkxyz", weight, a1, a2) + torch.einsum("rj,jcxyz->rcxyz", b1, b2),
        ),
        (
            {"lora_up.weight": a.T.contiguous(), "lora_down.weight": down, "dora_scale": dora},
            total * dora / length - weight,
        ),
    ]
    for number, (parts, update) in enumerate(cases):
        file, merged = tmp_path / f"{number}.safetensors", tmp_path / f"{number}_merged.safetensors"
        save_file({f"{one}.{role}": part.clone() for role, part in parts.items()}, file)
        save_file(weights_of(base) | {"patch_embedding.weight": weight + STRENGTH * update}, merged)
        assert close(velocity(base, (file, STRENGTH)), velocity(merged), 1e-5), parts.keys()


def test_an_empty_file_is_refused(base: Path, tmp_path: Path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(WanError, match="is empty"):
        read_lora(tmp_path / "empty.safetensors", read_dit(base))


def test_a_lora_of_another_model_is_refused_by_its_shapes(base: Path, tmp_path: Path):
    wider = Architecture(16, 16, 3072, 3072, layers=1, text_dim=32, freq_dim=256, heads=24)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in WanDiT(wider).state_dict().items()}
    q = "blocks.0.self_attn.q.weight"
    made = low_rank({q: torch.zeros(shapes[q])}, prefixed, ".lora_A.weight", ".lora_B.weight", alpha=False)[0]
    save_file(made, tmp_path / "ti2v.safetensors")
    with pytest.raises(WanError, match=r"made for another model \(TI2V-5B\).*3072x3072.*128x128"):
        read_lora(tmp_path / "ti2v.safetensors", read_dit(base))


def test_unknown_keys_and_other_channels_are_left_out_and_told(base: Path, lora: Path, tmp_path: Path):
    """A Wan2.1 I2V LoRA has an image branch, and a patch embedding for 36 channels."""
    from safetensors.torch import load_file

    extra = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": torch.zeros(4, 128),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_B.weight": torch.zeros(128, 4),
        "diffusion_model.patch_embedding.diff": torch.zeros(128, 36, 1, 2, 2),
    }
    tensors = {key: value for key, value in load_file(lora).items() if "patch" not in key}
    save_file(tensors | extra, tmp_path / "i2v.safetensors")
    read = read_lora(tmp_path / "i2v.safetensors", read_dit(base))
    assert read.matched == len(tensors)
    assert len(read.unmatched) == 2 and read.misfits == ("diffusion_model.patch_embedding.diff",)
    assert "k_img" in read.report() and "patch_embedding.diff" in read.report()
    assert f"{len(tensors)} of {len(tensors) + 3} keys matched" in read.report()


def test_a_file_of_both_experts_gives_each_its_own(base: Path, tmp_path: Path):
    """As diffusers names them; and a key that comes twice is told, not taken."""
    q = {"blocks.0.self_attn.q.weight": weights_of(base)["blocks.0.self_attn.q.weight"]}
    torch.manual_seed(6)
    sides = [
        low_rank(
            q,
            lambda path, top=top: f"{top}.{DIFFUSERS.to_theirs(path)}",
            ".lora_A.weight",
            ".lora_B.weight",
            alpha=False,
        )[0]
        for top in ("transformer", "transformer_2")
    ]
    save_file(sides[0] | sides[1], tmp_path / "both.safetensors")
    for expert, side in zip(("high", "low"), sides, strict=True):
        read = read_lora(tmp_path / "both.safetensors", read_dit(base), expert)
        (part,) = read.parts["blocks.0.self_attn.q.weight"]
        assert set(part.keys.values()) == set(side) and (read.matched, read.unmatched) == (2, ())
    twice = low_rank(q, str, ".lora_A.weight", ".lora_B.weight", alpha=False)[0]
    save_file(sides[0] | twice, tmp_path / "twice.safetensors")
    assert len(read_lora(tmp_path / "twice.safetensors", read_dit(base)).unmatched) == 2


def test_what_fails_half_way_leaves_the_plain_model(base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch):
    file = read_dit(base)
    dit = build_dit(file, dtype="float32")
    plain, read, put = dit(*inputs()), read_lora(lora, file), Adaptation._put
    monkeypatch.setattr(Adaptation, "_put", _fails_once(put))
    with pytest.raises(torch.OutOfMemoryError):
        adaptation_of(dit, file).set([read], [1.0])
    assert torch.equal(dit(*inputs()), plain)
    adaptation_of(dit, file).set([read], [1.0])
    assert torch.equal(dit(*inputs()), velocity(base, (lora, 1.0)))


def _fails_once(put):
    calls = []

    def run(self: Adaptation, key: str, active: list) -> None:
        calls.append(key)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("none left")
        put(self, key, active)

    return run
