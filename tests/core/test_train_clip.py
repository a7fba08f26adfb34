"""Training of Wan2.1's models: what CLIP sees of a clip, LoRAs that reach the picture's layers, and the command."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.core.lora_files import merged_lora
from tests.core.test_train import CONFIG, random_data
from wan_core.__main__ import main
from wan_core.config import CLIP_CHECKPOINT, VARIANTS, Architecture
from wan_core.errors import WanError
from wan_core.loading.clip import load_clip_vision
from wan_core.loading.dit import load_dit, read_dit
from wan_core.loading.vae import load_vae
from wan_core.lora.apply import adaptation_of
from wan_core.lora.files import read_lora
from wan_core.media.geometry import condition_chunks, given_mask
from wan_core.media.video import save_video
from wan_core.models.dit.features.clip_tokens import ClipTokens, ClipTokensConfig
from wan_core.tools.tiny import TinySizes, write_tiny
from wan_core.train.cache import Cache, Entry, Latents, batches_of
from wan_core.train.data import Clip, Frame, read_folder
from wan_core.train.dit import Data, DiTTask, Recipe
from wan_core.train.lora import add_lora, lora_tensors
from wan_core.train.model import CheckpointedRunner, TrainedDiT, new_dit
from wan_core.train.objective import NoiseRange
from wan_core.train.report import read_log
from wan_core.train.run import Hooks, Request, _noise, files_in, run

I2V, FLF2V = VARIANTS["i2v-14B"], VARIANTS["flf2v-14B"]
WIDTH = 64  # of a CLIP feature in models without an encoder
CONFIGS = {
    "i2v-14B": replace(CONFIG, in_channels=36, features=(ClipTokensConfig(WIDTH),)),
    "flf2v-14B": replace(CONFIG, in_channels=36, features=(ClipTokensConfig(WIDTH, 514),)),
}
SIZES = TinySizes(dim=128, ffn_dim=64, layers=1, text_dim=32, text_layers=1, vae_dim=4, clip_layers=2)
SIZE = Frame(32, 32, 5)


def random_dit(config: Architecture, seed: int = 0) -> TrainedDiT:
    model, generator = new_dit(config, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def seen_data(task: str) -> Data:
    """Random entries with CLIP tokens."""
    plain, generator = random_data(concat=True), torch.Generator().manual_seed(7)
    tokens = [torch.randn(257 * VARIANTS[task].clip, WIDTH, generator=generator) for _ in plain.shapes]
    return replace(plain, entries=lambda i: replace(plain.entries(i), clip=tokens[i]))


def a_task(task: str, model: TrainedDiT, **more: object) -> DiTTask:
    recipe = Recipe(VARIANTS[task], NoiseRange(0.2, 0.9, 3.0), batch=2, caption_dropout=0.5, precision="fp32")
    return DiTTask(model, seen_data(task), recipe, **more)


# --- the loss


@pytest.mark.parametrize("task", CONFIGS)
def test_gradients_are_those_of_a_hand_written_loss(task: str):
    """Against the model of inference told all at once: 512 rows of text, channels behind the noise, CLIP's tokens."""
    model, data = random_dit(CONFIGS[task]), seen_data(task)
    loss, _ = a_task(task, model).loss(1, torch.Generator().manual_seed(1))
    loss.backward()

    twin, generator = random_dit(CONFIGS[task]), torch.Generator().manual_seed(1)
    entries = [data.entries(i) for i in batches_of(data.shapes, 2, 0, 0)[1]]
    x0, concat, tokens = (torch.stack([getattr(e, part) for e in entries]) for part in ("latent", "concat", "clip"))
    noise = torch.randn(x0.shape, generator=generator)
    sigma = NoiseRange(0.2, 0.9, 3.0).sigmas(2, generator)
    dropped = torch.rand(2, generator=generator) < 0.5
    text = torch.zeros(2, 512, 32)
    for row, (clip, drop) in enumerate(zip(batches_of(data.shapes, 2, 0, 0)[1], dropped, strict=True)):
        states = data.empty if drop else data.texts(clip)
        text[row, : len(states)] = states
    s = sigma[:, None, None, None, None]
    x = torch.cat([(1 - s) * x0 + s * noise, concat], dim=1)
    expected = ((twin(x, sigma * 1000, text, inputs=(ClipTokens(tokens),)) - (noise - x0)) ** 2).mean()
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 1e-3 * theirs.grad.abs().max() + 5e-8, name
        assert ("img" not in name or "k_img.bias" in name) or theirs.grad.abs().max() > 0, name


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpointed_blocks_give_the_same_gradients(rank: int):
    """Of the tokens too, which every block hears and none is given as an argument."""
    grads = []
    for offload in (None, False, True):
        model = random_dit(CONFIGS["flf2v-14B"])
        adapted = add_lora(model, rank, ["all"]) if rank else None
        if offload is not None:
            model.runner = CheckpointedRunner(offload=offload)
        for layer in (adapted or {}).values():
            torch.nn.init.normal_(layer.lora_B, std=0.05, generator=torch.Generator().manual_seed(0))
        task = a_task("flf2v-14B", model, adapted=adapted)
        task.loss(0, torch.Generator().manual_seed(0))[0].backward()
        grads.append({name: parameter.grad for name, parameter in task.parameters().items()})
    assert any("img_emb" in name and grad.abs().max() > 0 for name, grad in grads[0].items())
    for other in grads[1:]:
        assert all(torch.equal(grad, other[name]) for name, grad in grads[0].items())


# --- LoRA


def adapted_dit(config: Architecture, targets: list[str]) -> tuple[TrainedDiT, dict]:
    model = random_dit(config)
    adapted = add_lora(model, 3, targets, alpha=6.0, seed=1)
    for i, layer in enumerate(adapted.values()):
        torch.nn.init.normal_(layer.lora_B, std=0.05, generator=torch.Generator().manual_seed(i))
    return model, adapted


def test_targets_of_the_picture():
    def layers(targets: list[str], config: Architecture = CONFIGS["i2v-14B"]) -> set[str]:
        return set(add_lora(new_dit(config, 0), 2, targets))

    attentions = {f"blocks.{i}.{part}_attn.{one}" for i in range(2) for part in ("self", "cross") for one in "qkvo"}
    text = attentions | {f"blocks.{i}.ffn.{one}" for i in range(2) for one in (0, 2)}
    image = {f"blocks.{i}.cross_attn.{one}" for i in range(2) for one in ("k_img", "v_img")}
    image |= {"img_emb.proj.1", "img_emb.proj.3"}
    assert layers(["all"]) == text | image and layers(["all"], CONFIG) == text
    assert layers(["q", "k", "v", "o", "ffn.0", "ffn.2"]) == text
    assert layers(["k_img", "v_img", "img_emb.proj.1", "img_emb.proj.3"]) == image
    with pytest.raises(WanError, match=r"k_img are no linear layers.*choose among q,k,v,o,ffn\.0,ffn\.2, or all"):
        layers(["q", "k_img"], CONFIG)
    with pytest.raises(WanError, match=r"LoRA targets qq.*k_img,v_img.*img_emb\.proj\.1,img_emb\.proj\.3, or all"):
        layers(["all", "qq"])


@pytest.mark.parametrize("task", CONFIGS)
def test_what_is_saved_is_what_was_learnt(task: str, tmp_path: Path):
    """Read by the pack's own loader, within 1e-5 of the model in training; every key takes part."""
    model, adapted = adapted_dit(CONFIGS[task], ["all"])
    a_task(task, model, adapted=adapted).save(tmp_path / "lora.safetensors")
    save_file(
        {key: value.contiguous() for key, value in random_dit(CONFIGS[task]).state_dict().items()},
        tmp_path / "base.safetensors",
    )
    file = read_dit(tmp_path / "base.safetensors")
    lora = read_lora(tmp_path / "lora.safetensors", file)
    assert not lora.unmatched and not lora.misfits and set(lora.parts) == {f"{name}.weight" for name in adapted}
    assert "diffusion_model.img_emb.proj.1.lora_A.weight" in load_file(tmp_path / "lora.safetensors")
    dit = load_dit(tmp_path / "base.safetensors")
    x, t, text = torch.randn(1, 36, 2, 4, 4), torch.tensor([600.0]), torch.randn(1, 512, 32)
    inputs = (ClipTokens(torch.randn(1, 257 * VARIANTS[task].clip, WIDTH)),)
    with torch.no_grad():
        plain, learnt = dit(x, t, text, inputs=inputs), model(x, t, text, inputs=inputs)
        adaptation_of(dit, file).set([lora], [1.0])
        assert (dit(x, t, text, inputs=inputs) - learnt).abs().max() < 1e-5 * learnt.abs().max()
    assert (plain - learnt).abs().max() > 1e-2


def test_comfyui_reads_the_lora(in_comfyui: Callable[..., dict]):
    """By its own list of a model's keys, the picture's layers among them; what it adds is what was learnt."""
    model, adapted = adapted_dit(CONFIGS["i2v-14B"], ["all"])
    weights, made = random_dit(CONFIGS["i2v-14B"]).state_dict(), lora_tensors(adapted)
    found = in_comfyui(
        """
        import comfy.lora, comfy.lora_convert
        class Model:
            model_config = type("C", (), {"unet_config": {}})()
            def state_dict(self):
                return {"diffusion_model." + key: value for key, value in inputs["weights"].items()}
        keys = comfy.lora.model_lora_keys_unet(Model(), {})
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(inputs["lora"]), keys)
        for key, patch in patches.items():
            name = key.removeprefix("diffusion_model.")
            weight = inputs["weights"][name].clone()
            outputs[name] = comfy.lora.calculate_weight([(0.7, patch, 1.0, None, None)], weight, key)
        """,
        lora=made,
        weights=weights,
    )
    assert set(found) == {f"{name}.weight" for name in adapted} and "blocks.0.cross_attn.k_img.weight" in found
    for name, layer in adapted.items():
        expected = weights[f"{name}.weight"] + 0.7 * layer.update()
        assert torch.allclose(found[f"{name}.weight"], expected, atol=1e-6), name


# --- what CLIP sees


class Encoder:
    """Stands for CLIP: the mean colour of each picture, and how often it was asked."""

    asked = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.asked += 1
        return images.mean(dim=(2, 3)).repeat(1, 22)[:, None, :WIDTH].expand(-1, 257, -1)


def clip_of(given: dict[int, Tensor], frames: int = 5) -> Clip:
    """Frame i has the brightness i / 10."""
    video = (torch.arange(frames) / 10).view(1, -1, 1, 1).expand(3, -1, 16, 16)
    return Clip("a", "a clip", f"key{sorted(given)}", lambda: video, lambda: given)


def picture(value: float) -> Tensor:
    return torch.full((3, 16, 16), value)


@pytest.mark.parametrize(
    ("task", "given", "seen"),
    [
        ("i2v-14B", {}, [0.0]),
        ("i2v-14B", {0: picture(0.7)}, [0.7]),
        ("i2v-14B", {-1: picture(0.9)}, [0.9]),
        ("i2v-14B", {0: picture(0.7), -1: picture(0.9)}, [0.7]),
        ("flf2v-14B", {}, [0.0, 0.4]),
        ("flf2v-14B", {0: picture(0.7)}, [0.7, 0.4]),
        ("flf2v-14B", {-1: picture(0.9)}, [0.0, 0.9]),
        ("flf2v-14B", {-1: picture(0.9), 0: picture(0.7)}, [0.7, 0.9]),
    ],
)
def test_which_pictures_are_seen(tmp_path: Path, vae: Path, task: str, given: dict, seen: list[float]):
    """The table's, else the clip's own frames; and the channels show the same ones."""
    encoder, variant = Encoder(), VARIANTS[task]
    model = load_vae(vae)
    latents = Latents(Cache(tmp_path), lambda: model, "vae", variant, clip=lambda: encoder, clip_key="clip")
    entry = latents(clip_of(given))
    assert entry.clip.shape == (257 * len(seen), WIDTH)
    assert entry.clip[::257, 0].tolist() == pytest.approx(seen)
    shown = given or {0: picture(0.0)}
    if task == "flf2v-14B":
        shown = {0: picture(seen[0]), -1: picture(seen[1])}
    assert torch.equal(entry.concat[:4], given_mask(list(shown), 5, 2, 2)[0])
    assert torch.allclose(entry.concat[4:], model.encode(torch.cat(list(condition_chunks(shown, 5)), 2))[0], atol=1e-5)
    latents(clip_of(given))
    assert encoder.asked == 1


def test_one_cache_for_all_variants_and_encoders(tmp_path: Path, vae: Path):
    """What FLF2V is shown of a clip is not what I2V is; another CLIP sees anew; A14B has none."""
    model, encoder, cache, clip = load_vae(vae), Encoder(), Cache(tmp_path), clip_of({})

    def entry(task: str, clip_key: str = "one") -> Entry:
        return Latents(cache, lambda: model, "vae", VARIANTS[task], clip=lambda: encoder, clip_key=clip_key)(clip)

    i2v, flf2v, a14b = entry("i2v-14B"), entry("flf2v-14B"), entry("i2v-A14B")
    assert len(i2v.clip) == 257 and len(flf2v.clip) == 514 and a14b.clip is None
    assert torch.equal(i2v.concat, a14b.concat) and not torch.equal(i2v.concat, flf2v.concat)
    assert torch.equal(i2v.latent, flf2v.latent) and encoder.asked == 2
    entry("i2v-14B"), entry("i2v-14B", "other")
    assert encoder.asked == 3


def test_pictures_are_prepared_as_the_official_code_does(checkpoints: Path, clips: Path, tmp_path: Path):
    """What is cached of a real table is what the encoder makes of the frame, or of the start image."""
    encoder = load_clip_vision(checkpoints / "i2v-14B" / CLIP_CHECKPOINT)
    latents = Latents(
        Cache(tmp_path),
        lambda: load_vae(checkpoints / "i2v-14B/Wan2.1_VAE.pth"),
        "vae",
        I2V,
        clip=lambda: encoder,
        clip_key="clip",
    )
    plain, pictured = read_folder(clips, SIZE)[:2]
    assert torch.equal(latents(plain).clip, encoder(plain.pixels()[None, :, 0])[0])
    assert torch.equal(latents(pictured).clip, encoder(pictured.given()[0][None])[0])
    assert not torch.equal(latents(pictured).clip, encoder(pictured.pixels()[None, :, 0])[0])


# --- the command


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One clip with its own frames, one with pictures of its own, and one picture."""
    folder = tmp_path_factory.mktemp("clips")
    generator = torch.Generator().manual_seed(0)
    for name in ("a.mp4", "b.mp4"):
        save_video([torch.rand(3, 5, 32, 32, generator=generator) * 2 - 1], folder / name, 16)
    for name, colour in (("start.png", 200), ("end.png", 60), ("c.png", 120)):
        Image.fromarray(np.full((40, 80, 3), (colour, 90, 10), np.uint8)).save(folder / name)
    with (folder / "metadata.csv").open("w", newline="") as out:
        csv.writer(out).writerows(
            [
                ["video", "prompt", "start_image", "end_image"],
                ["a.mp4", "a clip", "", ""],
                ["b.mp4", "another", "start.png", "end.png"],
                ["c.png", "a picture", "", ""],
            ]
        )
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for task in ("i2v-14B", "flf2v-14B", "i2v-A14B", "t2v-1.3B"):
        write_tiny(folder / task, task, sizes=SIZES)
    return folder


@pytest.fixture(scope="module")
def vae(checkpoints: Path) -> Path:
    return checkpoints / "i2v-14B/Wan2.1_VAE.pth"


def flags(clips: Path, out: Path, task: str, *more: object, **given: object) -> list[str]:
    given = {"max_steps": 3, "lora_rank": 2, "learning_rate": 1e-2, "precision": "fp32", "device": "cpu"} | given
    words = [
        "train",
        "--task",
        task,
        "--dataset_base_path",
        clips,
        "--output_path",
        out,
        "--width",
        32,
        "--height",
        32,
        "--num_frames",
        5,
        *more,
    ]
    return [str(word) for word in (*words, *(part for name, value in given.items() for part in (f"--{name}", value)))]


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B", "t2v-1.3B"])
def test_the_command_with_samples(checkpoints: Path, clips: Path, tmp_path: Path, task: str):
    """A LoRA of every layer; the grids draw the clips of the full length, each shown its own pictures."""
    more = {"lora_target_modules": "all", "sample_every": 3, "sample_steps": 2}
    assert main(flags(clips, tmp_path, task, "--ckpt_dir", checkpoints / task, **more)) == 0
    lora = load_file(tmp_path / "lora.safetensors")
    image = [key for key in lora if "img" in key and key.endswith("lora_B.weight")]
    assert len(image) == (4 if VARIANTS[task].clip else 0) and all(lora[key].abs().max() > 0 for key in image)
    base = files_in(checkpoints / task, task, "only").dit
    assert not read_lora(tmp_path / "lora.safetensors", read_dit(base)).unmatched
    merged = merged_lora(load_dit(base).state_dict(), tmp_path / "lora.safetensors")
    assert set(merged) == set(load_dit(base).state_dict())
    assert Image.open(tmp_path / "sample_000003.png").size == (5 * 32, 2 * (32 + 14))


def test_stopped_and_gone_on_it_ends_the_same(checkpoints: Path, clips: Path, tmp_path: Path):
    """To the last bit; the encoders are not loaded again."""

    def request(out: Path) -> Request:
        return Request(
            task="flf2v-14B",
            expert="only",
            clips=clips,
            out=out,
            frame=SIZE,
            rank=2,
            steps=4,
            seed=3,
            learning_rate=1e-2,
            precision="fp32",
            targets=["all"],
            batch=2,
            ema=0.9,
        )

    class Stopped(Exception):
        pass

    def stop(report) -> None:
        if report.step == 2:
            raise Stopped

    files = files_in(checkpoints / "flf2v-14B", "flf2v-14B", "only")
    run(request(tmp_path / "whole"), files)
    with pytest.raises(Stopped):
        run(request(tmp_path / "parts"), files, hooks=Hooks(on_step=stop))
    run(request(tmp_path / "parts"), files)
    one, other = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one) and len(one) == len(other)
    losses = [[row["loss"] for row in read_log(tmp_path / name / "log.csv")] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_another_clip_is_another_run(checkpoints: Path, clips: Path, tmp_path: Path):
    request = Request(
        task="i2v-14B", expert="only", clips=clips, out=tmp_path / "out", frame=SIZE, rank=2, steps=2, precision="fp32"
    )
    files = files_in(checkpoints / "i2v-14B", "i2v-14B", "only")
    run(request, files)
    write_tiny(tmp_path / "other", "i2v-14B", sizes=SIZES, seed=5)
    with pytest.raises(WanError, match="the clips, their prompts, size or number are others"):
        run(request, replace(files, clip=tmp_path / "other" / CLIP_CHECKPOINT))


def test_single_files_in_place_of_a_folder(checkpoints: Path, clips: Path, tmp_path: Path, capsys):
    folder = checkpoints / "i2v-14B"
    single = [
        "--dit",
        folder / "diffusion_pytorch_model.safetensors.index.json",
        "--vae",
        folder / "Wan2.1_VAE.pth",
        "--text_encoder",
        folder / "models_t5_umt5-xxl-enc-bf16.pth",
        "--tokenizer",
        folder / "google/umt5-xxl",
    ]
    assert main(flags(clips, tmp_path / "folder", "i2v-14B", "--ckpt_dir", folder)) == 0
    assert main(flags(clips, tmp_path / "single", "i2v-14B", *single, "--clip", folder / CLIP_CHECKPOINT)) == 0
    one, other = (load_file(tmp_path / name / "lora.safetensors") for name in ("folder", "single"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    capsys.readouterr()
    assert main(flags(clips, tmp_path / "without", "i2v-14B", *single)) == 2
    assert "--dit, --vae, --text_encoder and --clip" in capsys.readouterr().err
    assert (
        main(
            flags(
                clips,
                tmp_path / "beside",
                "t2v-1.3B",
                "--ckpt_dir",
                checkpoints / "t2v-1.3B",
                "--clip",
                folder / CLIP_CHECKPOINT,
            )
        )
        == 0
    )
    assert f"{CLIP_CHECKPOINT} takes no part: Wan2.1 T2V-1.3B hears no picture" in capsys.readouterr().out


def test_mistakes_are_told_before_anything_is_loaded(checkpoints: Path, clips: Path, tmp_path: Path, monkeypatch):
    for name in ("load_vae", "load_text_encoder", "load_clip_vision"):
        monkeypatch.setattr(f"wan_core.train.run.{name}", None)
    request = Request(task="i2v-14B", expert="only", clips=clips, out=tmp_path / "out", frame=SIZE, rank=2, steps=2)
    files = files_in(checkpoints / "i2v-14B", "i2v-14B", "only")
    other = {
        task: files_in(checkpoints / task, task, "high" if VARIANTS[task].experts == 2 else "only").dit
        for task in ("i2v-A14B", "flf2v-14B")
    }
    for changed, said in (
        ({"clip": None}, "I2V-14B hears its picture through CLIP, whose model is missing: expected clip_vision_h"),
        ({"clip": files.vae}, "CLIP"),
        ({"dit": other["i2v-A14B"]}, "takes 36 channels, but Wan2.1 I2V-14B takes 36 channels and a picture through"),
        ({"dit": other["flf2v-14B"]}, "takes 36 channels and two pictures through CLIP, but Wan2.1 I2V-14B takes"),
    ):
        with pytest.raises(WanError, match=said):
            run(request, replace(files, **changed))
    narrow = {
        key: value[..., :640] if "img_emb.proj.1" in key or key.startswith("img_emb.proj.0") else value
        for key, value in load_dit(files.dit).state_dict().items()
    }
    narrow = {
        key: value[:640] if key.startswith("img_emb.proj.1") else value[:, :640] if "proj.3.weight" in key else value
        for key, value in narrow.items()
    }
    save_file({key: value.contiguous() for key, value in narrow.items()}, tmp_path / "narrow.safetensors")
    with pytest.raises(WanError, match=r"gives CLIP tokens 1280 wide, but .*narrow\.safetensors takes 640"):
        run(request, replace(files, dit=tmp_path / "narrow.safetensors"))


def test_noise_follows_the_size_where_the_model_does():
    small, large = (
        Request(task="i2v-14B", expert="only", clips=[], out=Path(), frame=frame)
        for frame in (Frame(832, 480, 81), Frame(1280, 720, 81))
    )
    assert (_noise(small, I2V).shift, _noise(large, I2V).shift) == (3.0, 5.0)
    assert _noise(replace(small, shift=7.0), I2V).shift == 7.0
