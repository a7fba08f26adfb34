"""Wan2.1 on the graph: I2V and FLF2V with CLIP, through our nodes and ComfyUI's, on both sides of every socket."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from comfy_server import Client, PromptRejected, Run, Server
from PIL import Image
from safetensors.torch import load_file

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out
from tests.comfy.test_parity import command_line
from wan_core.config import VARIANTS
from wan_core.layouts.comfyui import NAMES
from wan_core.models.vae.vae import normalise

TASKS = ("i2v-14B", "flf2v-14B")
CLIP = "clip_vision_h.safetensors"
END = "wan21_end.png"
SEED, STEPS, SHIFT, CFG = 11, 3, 5.0, 2.0
NATIVE = {"width": 64, "height": 32, "length": 9, "batch_size": 1}
PROMPT = "A white cat on a surfboard"


def model_file(task: str) -> str:
    return NAMES[task].models[0]


@pytest.fixture(scope="module", autouse=True)
def end_image(server: Server) -> Path:
    """Another shape than the start image's, so that it must be fitted."""
    file = server.base / "input" / END
    with Image.open(server.base / "input/example.png") as start:
        start.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((300, 210)).save(file)
    return file


def our_clip(g: Graph) -> Out:
    return g.add("WanCoreLoadClipVision", clip_name=CLIP)


def their_clip(g: Graph) -> Out:
    return g.add("CLIPVisionLoader", clip_name=CLIP)


def look(g: Graph, clip: Out, image: Out, crop: str = "none") -> Out:
    return g.add("CLIPVisionEncode", clip_vision=clip, image=image, crop=crop)


def images(g: Graph, task: str) -> dict[str, Out]:
    shown = {"start_image": wan.photograph(g)}
    return shown | ({"end_image": g.add("LoadImage", image=END)} if task == "flf2v-14B" else {})


def our_start(g: Graph, m: Out, task: str, clip: dict[str, Out], **values: object) -> tuple[dict[str, Out], Out]:
    size = {"width": 64, "height": 64, "frames": 5, "fit": "area", "batch_size": 1}
    start = g.add(
        "WanCoreImageToVideo",
        **{"model": m, "vae": wan.vae(g, "i2v"), **wan.prompts(g), **size, **images(g, task), **clip} | values,
    )
    return {"positive": start, "negative": start.at(1)}, start.at(2)


def their_start(g: Graph, task: str, clip: Out | None, **more: object) -> tuple[dict[str, Out], Out]:
    """ComfyUI's own conditioning node of a task, with what CLIP saw of each picture."""
    shown = images(g, task)
    if task == "i2v-14B":
        node, ends = "WanImageToVideo", {"clip_vision_output": "start_image"}
    else:
        node = "WanFirstLastFrameToVideo"
        ends = {"clip_vision_start_image": "start_image", "clip_vision_end_image": "end_image"}
    seen = {name: look(g, clip, shown[image]) for name, image in ends.items()} if clip else {}
    start = g.add(node, **{**wan.prompts(g), "vae": wan.vae(g, "i2v"), **NATIVE, **shown, **seen} | more)
    return {"positive": start, "negative": start.at(1)}, start.at(2)


def sample(g: Graph, m: Out, sides: dict[str, Out], latent: Out, **settings: object) -> Out:
    return wan.sample(
        g,
        m,
        sides,
        latent,
        **{"seed": SEED, "steps": STEPS, "shift": SHIFT, "cfg_low": CFG, "cfg_high": CFG} | settings,
    )


def ksampler(g: Graph, model: Out, sides: dict[str, Out], latent: Out) -> Out:
    return g.add(
        "KSampler",
        model=model,
        seed=SEED,
        steps=STEPS,
        cfg=CFG,
        **sides,
        latent_image=latent,
        denoise=1.0,
        sampler_name="euler",
        scheduler="simple",
    )


def run(client: Client, server: Server, g: Graph, **latents: Out) -> tuple[Run, list[torch.Tensor]]:
    for name, latent in latents.items():
        wan.save_latent(g, latent, f"wan21_{name}_latent")
    done = client.run(g.nodes)
    assert done.ok, done.error
    return done, [wan.read_latent(server, f"wan21_{name}_latent") for name in latents]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the largest value."""
    assert a.shape == b.shape and a.std() > 0.1
    return ((a - b).abs().max() / b.abs().max()).item()


def text_of(done: Run, node: Out) -> str:
    return "\n".join(done.history["outputs"].get(node.node, {}).get("text", []))


# --- the same as the command line


@pytest.mark.parametrize("task", TASKS)
def test_nodes_equal_the_command_line(client: Client, server: Server, tmp_path: Path, end_image: Path, task: str):
    """float32 on one CPU; what differs is rounding on the way through ComfyUI's raw latents: 1e-4."""
    start = server.base / "input/example.png"
    file = command_line(server.base / "models", tmp_path, task, "unipc", start, end_image if "flf" in task else None)
    ours = load_file(file)["latent"]
    g, negative = Graph(), VARIANTS[task].negative
    m, encoder = wan.load(g, model_file(task)), wan.clip(g)
    texts = {
        side: g.add("CLIPTextEncode", clip=encoder, text=text)
        for side, text in (("positive", PROMPT), ("negative", negative))
    }
    sides, latent = our_start(g, m, task, {"clip_vision": our_clip(g)}, **texts)
    sampled = sample(g, m, sides, latent)
    done, (raw,) = run(client, server, g, parity=sampled)
    assert difference(normalise(raw[0], "wan2.1"), ours) <= 1e-4
    assert "CLIP" not in text_of(done, sampled)


# --- our nodes and ComfyUI's


@pytest.mark.parametrize("task", TASKS)
def test_comfyuis_nodes_feed_wan_sampler(client: Client, server: Server, task: str) -> None:
    """Both encoders see pictures that ComfyUI prepared in its own way; then the models answer the same: 1e-3, and less
    than a tenth of what the pictures make."""
    g, name = Graph(), model_file(task)
    m = wan.load(g, name)
    native = g.add("WanCoreFromModel", model=g.add("UNETLoader", unet_name=name, weight_dtype="default"))
    sides, latent = their_start(g, task, their_clip(g))
    bare = their_start(g, task, None)
    made = {
        "own": sample(g, m, sides, latent),
        "native": sample(g, native, sides, latent),
        "bare": sample(g, m, *bare),
        "bare_native": sample(g, native, *bare),
    }
    done, (own, theirs, without, theirs_without) = run(client, server, g, **made)
    assert difference(own, theirs) <= 1e-3
    assert difference(without, theirs_without) <= 1e-3, "without CLIP both hear an empty picture"
    assert difference(own, without) > 10 * difference(own, theirs)
    for kind in ("own", "native"):
        assert "CLIP" not in text_of(done, made[kind])
    for kind in ("bare", "bare_native"):
        said = text_of(done, made[kind])
        assert said.count("no CLIP tokens") == 1 and "positive and the negative" in said


@pytest.mark.parametrize("task", TASKS)
def test_comfyuis_samplers_run_it(client: Client, server: Server, task: str) -> None:
    """KSampler on ComfyUI's own MODEL, and on ours behind Wan as ComfyUI MODEL; ours equals Wan Sampler too."""
    g, name = Graph(), model_file(task)
    m = wan.load(g, name)
    ours = g.add("WanCoreToModel", model=m, shift=SHIFT)
    loaded = g.add("UNETLoader", unet_name=name, weight_dtype="default")
    theirs = g.add("ModelSamplingSD3", model=loaded, shift=SHIFT)
    sides, latent = their_start(g, task, our_clip(g))
    plain = {"solver": "euler", "schedule": "simple"}
    _, (mine, native, sampler) = run(
        client,
        server,
        g,
        tomodel=ksampler(g, ours, sides, latent),
        tomodel_native=ksampler(g, theirs, sides, latent),
        tomodel_sampler=sample(g, m, sides, latent, **plain),
    )
    assert difference(mine, native) <= 1e-3
    assert difference(mine, sampler) <= 1e-4


def test_without_clip_comfyuis_sampler_hears_an_empty_picture(client: Client, server: Server) -> None:
    """And says so; the text is never heard as a picture, as ComfyUI's own network does."""
    g = Graph()
    m = wan.load(g, model_file("i2v-14B"))
    sides, latent = their_start(g, "i2v-14B", None)
    sampled = ksampler(g, g.add("WanCoreToModel", model=m, shift=SHIFT), sides, latent)
    heard: list[str] = []
    wan.save_latent(g, sampled, "wan21_bare_tomodel")
    wan.save_latent(g, sample(g, m, sides, latent, solver="euler", schedule="simple"), "wan21_bare_sampler")
    done = client.run(g.nodes, on_event=lambda kind, data: heard.append(str(data)) if kind == "wan_core.text" else None)
    assert done.ok, done.error
    mine, ours = (wan.read_latent(server, f"wan21_bare_{name}") for name in ("tomodel", "sampler"))
    assert difference(mine, ours) <= 1e-4
    assert any("no CLIP tokens" in text for text in heard)


def test_both_encoders_see_the_same(client: Client, server: Server) -> None:
    """Wan Image to Video has ComfyUI's encoder look as the official code does: what is left is 8 bits of rounding."""
    g, task = Graph(), "flf2v-14B"
    m = wan.load(g, model_file(task))
    ways = {
        "ours": {"clip_vision": our_clip(g)},
        "theirs": {"clip_vision": their_clip(g)},
        "smoothed": {"clip_vision_output": look(g, their_clip(g), wan.photograph(g))},
        "none": {},
    }
    made = {name: sample(g, m, *our_start(g, m, task, clip)) for name, clip in ways.items()}
    _, (ours, theirs, smoothed, none) = run(client, server, g, **made)
    near = difference(theirs, ours)
    assert near <= 1e-2
    assert difference(smoothed, ours) > near and difference(none, ours) > 3 * near


def test_sides_may_differ(client: Client, server: Server) -> None:
    """CLIP tokens on one side only, and another image on the other: each is heard where it stands."""
    g, task = Graph(), "i2v-14B"
    m = wan.load(g, model_file(task))
    both, latent = their_start(g, task, our_clip(g))
    bare, _ = their_start(g, task, None)
    moved, _ = their_start(g, task, our_clip(g), start_image=g.add("LoadImage", image=END))
    mixes = {
        "both": both,
        "positive_only": both | {"negative": bare["negative"]},
        "other_image": both | {"negative": moved["negative"]},
    }
    made = {name: sample(g, m, sides, latent) for name, sides in mixes.items()}
    alone = sample(g, m, mixes["positive_only"], latent, cfg_low=1.0, cfg_high=1.0)
    done, (one, two, three, _) = run(client, server, g, **made, alone=alone)
    assert min(difference(two, one), difference(three, one), difference(three, two)) > 1e-3
    said = text_of(done, made["positive_only"])
    assert "the negative conditioning carries no CLIP tokens" in said and "positive" not in said
    assert text_of(done, made["both"]) == text_of(done, alone) == "", "without guidance the negative side is not heard"


def test_tracks_of_ati_reach_the_model(client: Client, server: Server) -> None:
    """WanTrackToVideo moves features of the first frame within the image's latent, with a mask of its own."""
    g, task = Graph(), "i2v-14B"
    name = model_file(task)
    m = wan.load(g, name)
    # To the middle of a place of so small a latent: a track that passes between them moves nothing there.
    track = str([[{"x": 8, "y": 16}, *([{"x": 18.2857, "y": 10.6667}] * 120)]]).replace("'", '"')
    seen = look(g, our_clip(g), wan.photograph(g))
    made = {}
    for kind, tracks in (("tracks", track), ("no_tracks", "[]")):
        start = g.add(
            "WanTrackToVideo",
            **wan.prompts(g),
            vae=wan.vae(g, "i2v"),
            tracks=tracks,
            **NATIVE,
            topk=2,
            temperature=220.0,
            start_image=wan.photograph(g),
            clip_vision_output=seen,
        )
        sides = {"positive": start, "negative": start.at(1)}
        made[kind] = sample(g, m, sides, start.at(2))
        if tracks == track:
            native = g.add("WanCoreFromModel", model=g.add("UNETLoader", unet_name=name, weight_dtype="default"))
            made["tracks_native"] = sample(g, native, sides, start.at(2))
            loaded = g.add("ModelSamplingSD3", model=native_model(g, name), shift=SHIFT)
            made["tracks_ksampler"] = ksampler(g, loaded, sides, start.at(2))
            made["tracks_tomodel"] = ksampler(g, g.add("WanCoreToModel", model=m, shift=SHIFT), sides, start.at(2))
    _, (own, native, ksampled, tomodel, none) = run(client, server, g, **made)
    assert difference(own, native) <= 1e-3 and difference(tomodel, ksampled) <= 1e-3
    assert difference(own, none) > 1e-2


def native_model(g: Graph, name: str) -> Out:
    return g.add("UNETLoader", unet_name=name, weight_dtype="default")


def test_a_batch_of_videos_and_of_pictures(client: Client, server: Server) -> None:
    """One picture for two videos; of two pictures for one video the first is heard, which is said."""
    g, task = Graph(), "i2v-14B"
    m = wan.load(g, model_file(task))
    first, second = wan.photograph(g), g.add("ImageInvert", image=wan.photograph(g))
    two = g.add("ImageBatch", image1=first, image2=second)
    clip = our_clip(g)
    one_sides, one = their_start(g, task, clip)
    batch_sides, batch = their_start(g, task, clip, batch_size=2)
    many_sides, many = their_start(g, task, None, clip_vision_output=look(g, clip, two))
    made = {
        "one": sample(g, m, one_sides, one),
        "batch": sample(g, m, batch_sides, batch),
        "many": sample(g, m, many_sides, many),
    }
    done, (alone, pair, of_many) = run(client, server, g, **made)
    assert difference(pair[:1], alone) <= 1e-4 and difference(of_many, alone) <= 1e-4
    assert "CLIP saw 2 pictures" in text_of(done, made["many"]) and text_of(done, made["batch"]) == ""


# --- what is said, and what is refused


@pytest.fixture
def unnamed(server: Server) -> Iterator[str]:
    """A T2V file whose name tells nothing."""
    folder = server.base / "models/diffusion_models"
    copy = Path(shutil.copy(folder / wan.expert("t2v", "low"), folder / "my_video_model.safetensors"))
    yield copy.name
    copy.unlink()


def test_what_was_assumed_of_a_file_is_said(client: Client, unnamed: str) -> None:
    g = Graph()
    told = wan.load(g, unnamed)
    chosen = wan.load(g, unnamed, variant="t2v-14B")
    expert = wan.load(g, wan.expert("t2v", "low"))
    for m in (told, chosen, expert):
        wan.save_latent(g, wan.empty(g, m), "wan21_assumed")
    done = client.run(g.nodes)
    assert done.ok, done.error
    said = text_of(done, told)
    assert unnamed in said and "is taken for Wan2.1" in said and "T2V-A14B" in said and "variant" in said
    assert text_of(done, chosen) == text_of(done, expert) == ""


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("flf2v-14B", "Wan2.1 I2V-14B (i2v-14B)"),
        ("t2v-14B", "Wan2.1 I2V-14B (i2v-14B)"),
        ("wan3", "auto"),
        (5, "choices"),
        ("\ud83d", "half of a character"),
    ],
)
def test_a_variant_that_the_file_is_not_is_refused_when_queued(client: Client, variant: object, expected: str) -> None:
    g = Graph()
    m = wan.load(g, model_file("i2v-14B"), variant=variant)
    wan.save_latent(g, wan.empty(g, m), "wan21_variant")
    with pytest.raises(PromptRejected) as rejected:
        client.submit(g.nodes)
    assert expected in str(rejected.value)


def test_a_file_that_is_no_clip_is_refused_when_queued(client: Client, server: Server) -> None:
    folder = server.base / "models/clip_vision"
    copy = Path(shutil.copy(server.base / "models/vae" / wan.VAES["t2v"], folder / "no_clip.safetensors"))
    try:
        g = Graph()
        seen = look(g, g.add("WanCoreLoadClipVision", clip_name=copy.name), wan.photograph(g))
        g.add("PreviewAny", source=seen)
        with pytest.raises(PromptRejected) as rejected:
            client.submit(g.nodes)
        assert "no_clip.safetensors" in str(rejected.value) and "CLIP" in str(rejected.value)
    finally:
        copy.unlink()


def _twice(g: Graph, m: Out) -> tuple[dict[str, Out], Out]:
    clip = our_clip(g)
    return our_start(g, m, "i2v-14B", {"clip_vision": clip, "clip_vision_output": look(g, clip, wan.photograph(g))})


def _too_many(g: Graph, m: Out) -> tuple[dict[str, Out], Out]:
    clip, image = our_clip(g), wan.photograph(g)
    start = g.add(
        "WanFirstLastFrameToVideo",
        **wan.prompts(g),
        vae=wan.vae(g, "i2v"),
        **NATIVE,
        start_image=image,
        clip_vision_start_image=look(g, clip, image),
        clip_vision_end_image=look(g, clip, image),
    )
    again = g.add(
        "WanFirstLastFrameToVideo",
        positive=start,
        negative=start.at(1),
        vae=wan.vae(g, "i2v"),
        **NATIVE,
        start_image=image,
        clip_vision_start_image=look(g, clip, image),
    )
    return {"positive": again, "negative": again.at(1)}, again.at(2)


REFUSED = {
    "no end image": (
        "flf2v-14B",
        "connect start_image and end_image",
        lambda g, m: our_start(g, m, "i2v-14B", {"clip_vision": our_clip(g)}),
    ),
    "no image": ("i2v-14B", "animates an image", lambda g, m: our_start(g, m, "i2v-14B", {}, start_image=None)),
    "both ways": ("i2v-14B", "choose one", _twice),
    "no CLIP in the model": (
        "i2v-A14B",
        "disconnect clip_vision",
        lambda g, m: our_start(g, m, "i2v-14B", {"clip_vision": our_clip(g)}),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_together_is_refused(client: Client, server: Server, kind: str) -> None:
    task, expected, build = REFUSED[kind]
    g = Graph()
    m = wan.load(g, wan.expert("i2v", "low") if task == "i2v-A14B" else model_file(task))
    sides, latent = build(g, m)
    for node in g.nodes.values():
        node["inputs"] = {name: value for name, value in node["inputs"].items() if value is not None}
    wan.save_latent(g, sample(g, m, sides, latent), "wan21_refused")
    before = wan.loads(server)
    done = client.run(g.nodes)
    assert not done.ok and expected in done.error, done.error
    assert "Unexpected" not in done.error
    assert "dit" not in server.log.read_text(errors="replace").splitlines()[-1] and wan.loads(server) - before <= 2


def test_clip_tokens_of_no_use_are_said(client: Client) -> None:
    """A model without CLIP hears them neither in our sampler nor behind ComfyUI's."""
    g = Graph()
    m = wan.load(g, wan.expert("i2v", "low"))
    sides, latent = their_start(g, "i2v-14B", our_clip(g))
    sampled = sample(g, m, sides, latent, steps=1)
    wan.save_latent(g, sampled, "wan21_no_use")
    done = client.run(g.nodes)
    assert done.ok, done.error
    assert "clip_vision_output" in text_of(done, sampled) and "no effect" in text_of(done, sampled)


def test_nodes_that_want_more_of_clip_are_told_what_to_use(client: Client) -> None:
    """SVD's node looks at a picture's one embedding."""
    g = Graph()
    asked = g.add(
        "SVD_img2vid_Conditioning",
        clip_vision=our_clip(g),
        init_image=wan.photograph(g),
        vae=wan.vae(g, "t2v"),
        width=64,
        height=64,
        video_frames=5,
        motion_bucket_id=127,
        fps=6,
        augmentation_level=0.0,
    )
    g.add("PreviewAny", source=asked)
    done = client.run(g.nodes)
    assert not done.ok and "image_embeds" in done.error and "ComfyUI's Load CLIP Vision" in done.error
