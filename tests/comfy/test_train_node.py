"""Wan Train LoRA on a real server: the file works in ComfyUI's own LoRA loader, cancel and resume, mistakes."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from comfy_server import Client, PromptRejected, Run, Server
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out
from wan_core.layouts.comfyui import NAMES
from wan_core.media.video import save_video
from wan_core.train.report import read_log

SIZE = (32, 32)
STEPS = 20
LOW = wan.expert("t2v", "low")


@pytest.fixture(scope="module")
def dataset(server: Server) -> Iterator[str]:
    """Two clips in the server's input folder, and tables that are wrong."""
    folder, loras = server.base / "input/shapes", server.base / "models/loras"
    folder.mkdir()
    loras.mkdir(exist_ok=True)
    before = set(loras.iterdir())
    generator = torch.Generator().manual_seed(0)
    for name in ("a.mp4", "b.mp4"):
        save_video([torch.rand(3, 5, *SIZE, generator=generator) * 2 - 1], folder / name, 16)
    write_table(folder, ["video", "prompt"], *([name, f"a clip, {name}"] for name in ("a.mp4", "b.mp4")))
    write_table(server.base / "input/wrong_columns", ["file", "text"], ["a.mp4", "b"])
    write_table(server.base / "input/no_rows", ["video", "prompt"])
    (server.base / "input/linked").symlink_to(folder)  # as if it lay on another disk
    yield "shapes"
    (server.base / "input/linked").unlink()
    for made in (folder, server.base / "input/wrong_columns", server.base / "input/no_rows"):
        shutil.rmtree(made)
    for made in set(loras.iterdir()) - before:
        shutil.rmtree(made) if made.is_dir() else made.unlink()


def write_table(folder: Path, *rows: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows(rows)


def train(g: Graph, dataset: str, name: str, model: Out | None = None, **settings: object) -> Out:
    defaults = {
        "dataset": dataset,
        "expert": "auto",
        "width": SIZE[0],
        "height": SIZE[1],
        "frames": 5,
        "steps": 4,
        "learning_rate": 0.01,
        "rank": 2,
        "alpha": 0.0,
        "targets": "q,k,v,o,ffn.0,ffn.2",
        "batch_size": 1,
        "seed": 1,
        "checkpointing": "on",
        "skip_bad_clips": False,
        "save_name": name,
        "resume": True,
    }
    return g.add(
        "WanCoreTrainLora",
        model=model or wan.load(g, LOW),
        vae=wan.vae(g, "t2v"),
        clip=wan.clip(g),
        **defaults | settings,
    )


def lora_of(server: Server, name: str) -> Path:
    return server.base / "models/loras" / f"{name}.safetensors"


def native_video(g: Graph, lora: str | None) -> Out:
    """ComfyUI's own nodes alone: UNETLoader, LoraLoaderModelOnly, KSampler."""
    model = g.add("UNETLoader", unet_name=LOW, weight_dtype="default")
    if lora:
        model = g.add("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
    sides = wan.prompts(g, g.add("CLIPLoader", clip_name=wan.TEXT_ENCODER, type="wan", device="default"))
    latent = g.add("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1)
    sampled = g.add(
        "KSampler",
        model=model,
        **sides,
        latent_image=latent,
        seed=1,
        steps=2,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    return wan.save_latent(g, sampled, "native_lora" if lora else "native_plain")


def test_the_lora_works_in_comfyuis_own_loader(client: Client, server: Server, dataset: str) -> None:
    g = Graph()
    node = train(g, dataset, "looks/shapes")
    text = g.add("PreviewAny", source=node)
    run = client.run(g.nodes)
    assert run.ok, run.error
    file = lora_of(server, "looks/shapes")
    assert run.history["outputs"][text.node]["text"] == [str(file)]
    assert run.progress(node.node)[-1] == (4, 4)
    (said,) = run.history["outputs"][node.node]["text"]
    assert f"Wrote {file}" in said and "step 4 of 4, loss " in said
    assert [p.format for p in run.previews if p.node == node.node][-1] == "image/png"
    assert plot_of(client, run).size == (800, 400)
    assert any(t.abs().max() > 0 for key, t in load_file(file).items() if key.endswith("lora_B.weight"))

    before = len(server.said())
    g = Graph()
    native_video(g, None), native_video(g, "looks/shapes.safetensors")
    assert client.run(g.nodes).ok
    said = server.said(before)
    assert "lora key not loaded" not in said and "NOT LOADED" not in said
    plain, changed = (wan.read_latent(server, f"native_{name}") for name in ("plain", "lora"))
    assert (plain - changed).abs().max() > 1e-3


def plot_of(client: Client, run: Run) -> Image.Image:
    (file,) = run.files
    return Image.open(io.BytesIO(client.download(file)))


def test_datasets_are_offered(client: Client, dataset: str) -> None:
    about = client.object_info("WanCoreTrainLora")["WanCoreTrainLora"]
    assert about["output_node"] and about["category"] == "Wan 2.2/training"
    assert set(about["input"]["required"]["dataset"][1]["options"]) >= {"shapes", "linked"}


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
def test_models_that_see_through_clip(client: Client, server: Server, dataset: str, task: str) -> None:
    """The LoRA of every layer loads whole in ComfyUI; without CLIP, or with another loader's, nothing is trained."""
    file = NAMES[task].models[0]
    g = Graph()
    seen = g.add("WanCoreLoadClipVision", clip_name="clip_vision_h.safetensors")
    train(g, dataset, f"looks/{task}", wan.load(g, file), clip_vision=seen, targets="all")
    run = client.run(g.nodes)
    assert run.ok, run.error
    lora = load_file(lora_of(server, f"looks/{task}"))
    image = [key for key in lora if "img" in key and key.endswith("lora_B.weight")]
    assert any("k_img" in key for key in image) and any("img_emb.proj.1" in key for key in image)
    assert all(lora[key].abs().max() > 0 for key in image)

    before = len(server.log.read_text())
    g = Graph()
    model = g.add("UNETLoader", unet_name=file, weight_dtype="default")
    model = g.add("LoraLoaderModelOnly", model=model, lora_name=f"looks/{task}.safetensors", strength_model=1.0)
    sides = wan.prompts(g, g.add("CLIPLoader", clip_name=wan.TEXT_ENCODER, type="wan", device="default"))
    start = g.add(
        "WanImageToVideo",
        vae=wan.vae(g, "t2v"),
        width=64,
        height=64,
        length=5,
        batch_size=1,
        start_image=wan.photograph(g),
        **sides,
    )
    sampled = g.add(
        "KSampler",
        model=model,
        positive=start,
        negative=start.at(1),
        latent_image=start.at(2),
        seed=1,
        steps=1,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    wan.save_latent(g, sampled, f"trained_{task}")
    assert client.run(g.nodes).ok
    said = server.log.read_text()[before:]
    assert "lora key not loaded" not in said and "NOT LOADED" not in said

    theirs = {"clip_vision": ("CLIPVisionLoader", {"clip_name": "clip_vision_h.safetensors"})}
    for more, wanted in (({}, "connect Load Wan CLIP Vision to clip_vision"), (theirs, "connect Load Wan CLIP Vision")):
        g = Graph()
        more = {name: g.add(kind, **values) for name, (kind, values) in more.items()}
        train(g, dataset, "blind", wan.load(g, file), **more)
        refused = client.run(g.nodes)
        assert not refused.ok and wanted in str(refused.error)
    assert not (server.base / "output/wan_training/blind").exists()


def test_cancelled_and_queued_again_it_goes_on_to_the_same_lora(client: Client, server: Server, dataset: str) -> None:
    """The sampler has run before: the tables it keeps from ComfyUI's inference mode must not hurt the gradients."""
    g = Graph()
    m = wan.load(g, LOW)
    wan.save_latent(g, wan.sample(g, m, wan.prompts(g), wan.empty(g, m, *SIZE), steps=1), "before_training")
    assert client.run(g.nodes).ok
    g = Graph()
    node = train(g, dataset, "parts", steps=STEPS)
    cancelled: list[int] = []

    def cancel_at_step_two(kind: str, data: dict) -> None:
        if kind == "progress" and data["max"] == STEPS and data["value"] >= 2 and not cancelled:
            client.interrupt()
            cancelled.append(data["value"])

    run = client.run(g.nodes, on_event=cancel_at_step_two)
    assert run.interrupted and not lora_of(server, "parts").exists()
    done = len(read_log(server.base / "output/wan_training/parts/log.csv"))
    assert 2 <= done < STEPS
    again = client.run(g.nodes)
    assert again.ok, again.error
    assert min(value for value, total in again.progress(node.node) if total == STEPS) == done + 1

    whole = Graph()
    train(whole, dataset, "whole", steps=STEPS)
    assert client.run(whole.nodes).ok
    one, other = (load_file(lora_of(server, name)) for name in ("parts", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)

    g.set(node, resume=False, steps=2)  # begins anew, although the steps are others
    assert client.run(g.nodes).ok
    assert len(read_log(server.base / "output/wan_training/parts/log.csv")) == 2


def test_a_clip_below_the_folder_that_changes_is_seen(client: Client, server: Server, dataset: str) -> None:
    folder = server.base / "input" / dataset
    (folder / "more").mkdir()
    shutil.copy(folder / "a.mp4", folder / "more/a.mp4")
    write_table(server.base / "input/below", ["video", "prompt"], ["../shapes/more/a.mp4", "a"])
    g = Graph()
    node = train(g, "below", "below", steps=2)
    for expected in ([node.node], []):
        run = client.run(g.nodes)
        assert run.ok and [name for name in run.executed if name == node.node] == expected
    shutil.copy(folder / "b.mp4", folder / "more/a.mp4")
    run = client.run(g.nodes)
    assert "the clips, their prompts, size or number are others" in (run.error or "")
    shutil.rmtree(server.base / "input/below")


@pytest.mark.parametrize(("task", "noise"), [("i2v", ("0.9", "1.0")), ("ti2v", ("0.0", "1.0"))])
def test_every_variant_trains_on_its_own_noise(
    client: Client, server: Server, dataset: str, task: str, noise: tuple[str, str]
) -> None:
    """I2V as a pair whose high-noise expert is asked for; the 5B, which has only one."""
    g = Graph()
    node = train(g, "linked", task, wan.model(g, task), steps=2, targets="self_attn.q, ffn.0", alpha=1.0)
    g.set(node, vae=wan.vae(g, task), expert="high" if task == "i2v" else "auto", checkpointing="offload")
    run = client.run(g.nodes)
    assert run.ok, run.error
    with safe_open(lora_of(server, task), "pt") as file:
        assert (file.metadata()["noise_from"], file.metadata()["noise_to"]) == noise
        assert {key.split(".", 3)[3].rpartition(".lora")[0] for key in file.keys() if "lora_A" in key} == {  # noqa: SIM118
            "self_attn.q",
            "ffn.0",
        }
        assert file.get_tensor("diffusion_model.blocks.0.ffn.0.alpha") == 1


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"dataset": "nowhere"}, ["There is no folder", "nowhere", "shapes"]),
        ({"dataset": "../models"}, ["dataset is '../models'", "expected a name below"]),
        ({"dataset": "wrong_columns"}, ["has the columns file, text; expected video,prompt"]),
        ({"dataset": "no_rows"}, ["has no rows"]),
        ({"frames": 6}, ["6 frames", "4n + 1"]),
        ({"save_name": "../../escape"}, ["save_name", "expected a name below"]),
    ],
)
def test_widgets_that_cannot_be_are_refused_at_once(
    client: Client, dataset: str, settings: dict, parts: list[str]
) -> None:
    g = Graph()
    g.set(train(g, dataset, "bad"), **settings)
    with pytest.raises(PromptRejected) as rejected:
        client.submit(g.nodes)
    assert [part for part in parts if part not in str(rejected.value)] == []


@pytest.fixture
def quantised(server: Server) -> Iterator[str]:
    folder = server.base / "models/diffusion_models"
    weights = load_file(folder / LOW)
    name = "wan2.2_t2v_low_noise_fp8.safetensors"
    save_file(
        {
            key: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 and "blocks" in key else tensor
            for key, tensor in weights.items()
        },
        folder / name,
    )
    yield name
    (folder / name).unlink()


def test_a_quantised_model_is_trained_on(client: Client, server: Server, dataset: str, quantised: str) -> None:
    g = Graph()
    train(g, dataset, "on_fp8", wan.load(g, quantised))
    run = client.run(g.nodes)
    assert run.ok, run.error
    assert any(t.abs().max() > 0 for key, t in load_file(lora_of(server, "on_fp8")).items() if "lora_B" in key)


def test_what_does_not_fit_is_told_before_anything_is_read(client: Client, server: Server, dataset: str) -> None:
    (server.base / "models/loras/mine.safetensors").write_bytes(b"precious")
    nameless = "merged.safetensors"
    (server.base / "models/diffusion_models" / nameless).symlink_to(server.base / "models/diffusion_models" / LOW)
    before = wan.loads(server)
    for change, parts in (
        ({"frames": 9}, ["a.mp4 has 5 frames, expected at least 9", "b.mp4", "skip_bad_clips"]),
        ({"width": 40}, ["40x32", "multiples of 16"]),
        ({"targets": "q,k_img"}, ["LoRA targets k_img"]),
        ({"expert": "high"}, ["low-noise expert by its name, but expert is high"]),
        ({"model": "pair"}, ["pair of experts", "set expert to high or low"]),
        ({"model": "nameless"}, ["does not say which expert", "set expert to high or low", "Wan2.1 T2V"]),
        ({"model": "ti2v"}, ["wan2.1 VAE", "needs wan2.2"]),
        ({"vae": "native"}, ["vae comes from another loader", "Load Wan VAE"]),
        ({"save_name": "mine"}, ["mine.safetensors exists", "choose another save_name"]),
    ):
        g = Graph()
        models = {
            "pair": lambda g=g: wan.model(g, "t2v"),
            "ti2v": lambda g=g: wan.load(g, wan.DENSE),
            "nameless": lambda g=g: wan.load(g, nameless),
        }
        model = models.get(change.pop("model", ""))
        native = change.pop("vae", None)
        node = train(g, dataset, "bad", model() if model else None)
        g.set(node, **change)
        if native:
            g.set(node, vae=g.add("VAELoader", vae_name=wan.VAES["t2v"]))
        run = client.run(g.nodes)
        assert run.error and [part for part in parts if part not in run.error] == [], run.error
        assert run.of("execution_error")[0]["exception_type"].endswith("WanError")
    assert wan.loads(server) == before
    g = Graph()  # what is asked for answers the guess
    train(g, dataset, "named", wan.load(g, nameless), expert="high", steps=1)
    dense = train(g, dataset, "dense", wan.load(g, nameless, variant="t2v-14B"), expert="high", steps=1)
    run = client.run(g.nodes)
    assert run.ok, run.error
    ranges = {}
    for name in ("named", "dense"):
        with safe_open(lora_of(server, name), "pt") as file:
            ranges[name] = file.metadata()
    assert ranges["named"]["wan_task"] == "t2v-A14B" and float(ranges["named"]["noise_from"]) == 0.875
    assert ranges["dense"]["wan_task"] == "t2v-14B" and float(ranges["dense"]["noise_from"]) == 0.0
    assert "expert high has no effect: Wan2.1 T2V-14B is one model" in run.history["outputs"][dense.node]["text"][0]
    (server.base / "models/diffusion_models" / nameless).unlink()
    assert (server.base / "models/loras/mine.safetensors").read_bytes() == b"precious"
