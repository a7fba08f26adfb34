"""Wan as ComfyUI MODEL: both experts behind one native MODEL do what our own sampler does."""

from __future__ import annotations

from urllib.parse import quote

import pytest
import torch
from comfy_server import Client, Server
from safetensors.torch import save_file

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out

STEPS, SHIFT, SEED = 6, 5.0, 3
PLAIN = {"denoise": 1.0, "sampler_name": "euler", "scheduler": "simple"}


def ours(g: Graph, m: Out, sides: dict[str, Out], latent: Out, **settings: object) -> Out:
    return wan.sample(
        g,
        m,
        sides,
        latent,
        seed=SEED,
        steps=STEPS,
        shift=SHIFT,
        cfg_high=3.0,
        cfg_low=3.0,
        **{"solver": "euler", "schedule": "simple"} | settings,
    )


def theirs(g: Graph, model: Out, sides: dict[str, Out], latent: Out, **settings: object) -> Out:
    return g.add(
        "KSampler", model=model, seed=SEED, steps=STEPS, cfg=3.0, **sides, latent_image=latent, **PLAIN | settings
    )


def to_model(g: Graph, m: Out) -> Out:
    return g.add("WanCoreToModel", model=m, shift=SHIFT)


def native(g: Graph, name: str) -> Out:
    """ComfyUI's own loader, with the same shift."""
    return g.add("ModelSamplingSD3", model=g.add("UNETLoader", unet_name=name, weight_dtype="default"), shift=SHIFT)


def run_both(client: Client, server: Server, g: Graph, name: str, mine: Out, native: Out) -> tuple[torch.Tensor, ...]:
    for which, latent in (("mine", mine), ("native", native)):
        wan.save_latent(g, latent, f"{name}_{which}")
    run = client.run(g.nodes)
    assert run.ok, run.error
    return tuple(wan.read_latent(server, f"{name}_{which}") for which in ("mine", "native"))


def assert_close(mine: torch.Tensor, native: torch.Tensor) -> None:
    """To the rounding of ComfyUI's way through x0 and its float32 sigmas: 1e-4 of the largest value."""
    assert mine.shape == native.shape and mine.std() > 0.1
    assert (mine - native).abs().max() <= 1e-4 * native.abs().max()


@pytest.mark.parametrize("mode", [{"mode": "auto"}, {"mode": "step", "boundary": 2}, {"mode": "snr", "boundary": 0.05}])
def test_ksampler_equals_our_sampler(client: Client, server: Server, mode: dict) -> None:
    g = Graph()
    m, sides = wan.model(g, "t2v", **mode), wan.prompts(g)
    latent = wan.empty(g, m)
    made = run_both(
        client,
        server,
        g,
        f"tomodel_{mode['mode']}",
        ours(g, m, sides, latent),
        theirs(g, to_model(g, m), sides, latent),
    )
    assert_close(*made)


@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_images_reach_the_model(client: Client, server: Server, task: str) -> None:
    """Through our conditioning node, and the same through a native sampler."""
    g = Graph()
    m, v = wan.model(g, task), wan.vae(g, task)
    start = g.add(
        "WanCoreImageToVideo",
        model=m,
        vae=v,
        **wan.prompts(g),
        width=64,
        height=64,
        frames=5,
        fit="exact",
        batch_size=1,
        start_image=wan.photograph(g),
    )
    sides, latent = {"positive": start, "negative": start.at(1)}, start.at(2)
    made = run_both(
        client, server, g, f"tomodel_{task}", ours(g, m, sides, latent), theirs(g, to_model(g, m), sides, latent)
    )
    assert_close(*made)


def test_two_native_loaders_and_samplers_do_the_same(client: Client, server: Server) -> None:
    """ComfyUI's own way with a pair, euler: the third step is the last of the high-noise expert."""
    g = Graph()
    m, sides = wan.model(g, "t2v"), wan.prompts(g)
    latent = wan.empty(g, m)
    halves = {"high": (latent, 0, 3, "enable"), "low": (None, 3, 10000, "disable")}
    for noise, (given, start, end, add) in halves.items():
        latent = g.add(
            "KSamplerAdvanced",
            model=native(g, wan.expert("t2v", noise)),
            **sides,
            latent_image=given or latent,
            noise_seed=SEED,
            steps=STEPS,
            cfg=3.0,
            sampler_name="euler",
            scheduler="simple",
            start_at_step=start,
            end_at_step=end,
            add_noise=add,
            return_with_leftover_noise="enable" if noise == "high" else "disable",
        )
    start = wan.empty(g, m)
    one = theirs(g, to_model(g, m), sides, start)
    wan.save_latent(g, one, "tomodel_one")
    made = run_both(client, server, g, "tomodel_two", ours(g, m, sides, start), latent)
    assert_close(*made)
    assert_close(made[0], wan.read_latent(server, "tomodel_one"))


CONDITIONED = {"WanImageToVideo": "i2v", "WanFirstLastFrameToVideo": "i2v", "Wan22ImageToVideoLatent": "ti2v"}


@pytest.mark.parametrize("node", CONDITIONED)
def test_native_conditioning_nodes(client: Client, server: Server, node: str) -> None:
    """Our MODEL and ComfyUI's own of the same file are told the same, and answer the same."""
    g, task = Graph(), CONDITIONED[node]
    name = wan.DENSE if task == "ti2v" else wan.expert(task, "low")
    given = {
        "vae": wan.vae(g, task),
        "start_image": wan.photograph(g),
        "width": 64,
        "height": 32,
        "length": 9,
        "batch_size": 1,
    }
    if "Last" in node:
        given["end_image"] = g.add("ImageInvert", image=given["start_image"])
    sides = wan.prompts(g)
    if task == "i2v":
        start = g.add(node, **sides, **given)
        sides, latent = {"positive": start, "negative": start.at(1)}, start.at(2)
    else:
        latent = g.add(node, **given)
    made = run_both(
        client,
        server,
        g,
        f"tomodel_{node}",
        theirs(g, to_model(g, wan.load(g, name)), sides, latent),
        theirs(g, native(g, name), sides, latent),
    )
    assert_same(*made)


def assert_same(mine: torch.Tensor, native: torch.Tensor) -> None:
    """Two implementations of the network in float32: 1e-3 of the largest value, as in test_mixes.py."""
    assert mine.shape == native.shape and mine.std() > 0.1
    assert (mine - native).abs().max() <= 1e-3 * native.abs().max()


GUIDERS = ("BasicGuider", "CFGGuider", "DualCFGGuider")


@pytest.mark.parametrize("kind", GUIDERS)
def test_custom_sampling(client: Client, server: Server, kind: str) -> None:
    g, name = Graph(), wan.expert("t2v", "low")
    m, sides = wan.load(g, name), wan.prompts(g)
    third = g.add("CLIPTextEncode", clip=wan.clip(g), text="a surfboard")
    inputs = {
        "BasicGuider": {"conditioning": sides["positive"]},
        "CFGGuider": sides | {"cfg": 3.0},
        "DualCFGGuider": {
            "cond1": sides["positive"],
            "cond2": third,
            "negative": sides["negative"],
            "cfg_conds": 3.0,
            "cfg_cond2_negative": 2.0,
            "style": "regular",
        },
    }
    latent, made = wan.empty(g, m), []
    for model in (to_model(g, m), native(g, name)):
        sigmas = g.add("BasicScheduler", model=model, scheduler="beta", steps=STEPS, denoise=1.0)
        guider = g.add(kind, model=model, **inputs[kind])
        made.append(
            g.add(
                "SamplerCustomAdvanced",
                noise=g.add("RandomNoise", noise_seed=SEED),
                guider=guider,
                sampler=g.add("KSamplerSelect", sampler_name="dpmpp_2m"),
                sigmas=sigmas,
                latent_image=latent,
            )
        )
    assert_same(*run_both(client, server, g, f"tomodel_{kind}", *made))


PATCHES = {
    "CFGZeroStar": {}, "CFGNorm": {}, "RescaleCFG": {"multiplier": 1.0}, "APG": {"eta": 0.5, "momentum": -0.3},
    "TCFG": {}, "Mahiro": {}, "Epsilon Scaling": {"scaling_factor": 1.1}, "TemporalScoreRescaling": {},
    "FreSca": {"freq_cutoff": 1},  # its default is beyond all frequencies of a video this small
    "EasyCache": {"reuse_threshold": 3.0, "start_percent": 0.1}, "LazyCache": {"reuse_threshold": 3.0},
    "WanContextWindowsManual": {"context_length": 17, "context_overlap": 8},
    "ContextWindowsManual": {"context_length": 5, "context_overlap": 2, "dim": 2},
}  # fmt: skip


@pytest.mark.parametrize("node", PATCHES)
def test_patches_of_sampling_do_what_they_do_to_native_models(client: Client, server: Server, node: str) -> None:
    """And something: ten times more than what the two implementations differ by."""
    g, name = Graph(), wan.expert("t2v", "low")
    m, sides, settings = wan.load(g, name), wan.prompts(g), defaults(client, node) | PATCHES[node]
    latent = wan.empty(g, m, 32, 32, 33)
    mine, plain = (
        theirs(g, model, sides, latent) for model in (g.add(node, model=to_model(g, m), **settings), to_model(g, m))
    )
    wan.save_latent(g, plain, "tomodel_unpatched")
    made = run_both(
        client,
        server,
        g,
        f"tomodel_{node.replace(' ', '')}",
        mine,
        theirs(g, g.add(node, model=native(g, name), **settings), sides, latent),
    )
    assert_same(*made)
    changed = (made[0] - wan.read_latent(server, "tomodel_unpatched")).abs().max()
    assert changed > 10 * (made[0] - made[1]).abs().max()


def defaults(client: Client, node: str) -> dict[str, object]:
    """What a node's widgets show before they are touched."""
    found = {}
    for name, (kind, *rest) in client.object_info(quote(node))[node]["input"]["required"].items():
        options = rest[0] if rest else {}
        if isinstance(kind, list) or kind == "COMBO":
            choices = kind if isinstance(kind, list) else options["options"]
            found[name] = options.get("default", choices[0])
        elif "default" in options:
            found[name] = options["default"]
    return found


@pytest.mark.parametrize(
    ("node", "settings", "named"),
    [
        (
            "SkipLayerGuidanceDiT",
            {"double_layers": "1", "start_percent": 0.0, "end_percent": 1.0},
            "skip-layer guidance",
        ),
        ("SkipLayerGuidanceDiTSimple", {"double_layers": "1"}, "skip-layer guidance"),
        ("ScaleROPE", {"scale_x": 2.0}, "positions"),
        ("TorchCompileModel", {}, "torch.compile"),
    ],
)
def test_patches_of_the_network_are_refused(client: Client, node: str, settings: dict, named: str) -> None:
    g = Graph()
    m = wan.load(g, wan.expert("t2v", "low"))
    patched = g.add(node, model=to_model(g, m), **defaults(client, node) | settings)
    wan.save_latent(g, theirs(g, patched, wan.prompts(g), wan.empty(g, m)), "tomodel_refused")
    run = client.run(g.nodes)
    assert named in run.error and "Load Diffusion Model" in run.error, run.error


def test_conditions_of_other_models_are_refused(client: Client) -> None:
    g = Graph()
    m, sides = wan.load(g, wan.expert("t2v", "low")), wan.prompts(g)
    start = g.add(
        "WanPhantomSubjectToVideo",
        **sides,
        vae=wan.vae(g, "t2v"),
        width=64,
        height=32,
        length=5,
        batch_size=1,
        images=wan.photograph(g),
    )
    sides = {"positive": start, "negative": start.at(1)}
    wan.save_latent(g, theirs(g, to_model(g, m), sides, start.at(3)), "tomodel_phantom")
    run = client.run(g.nodes)
    assert "Phantom" in run.error, run.error


def test_patches_and_caches_of_comfyui_work(client: Client, server: Server) -> None:
    """ModelSamplingSD3 replaces the shift; EasyCache skips steps and still ends in numbers."""
    g = Graph()
    m, sides = wan.model(g, "t2v"), wan.prompts(g)
    latent, model = wan.empty(g, m), g.add("WanCoreToModel", model=m, shift=1.0)
    shifted = g.add("ModelSamplingSD3", model=model, shift=SHIFT)
    made = run_both(client, server, g, "tomodel_shift", ours(g, m, sides, latent), theirs(g, shifted, sides, latent))
    assert_close(*made)
    g = Graph()
    m, sides = wan.model(g, "t2v"), wan.prompts(g)
    cached = g.add(
        "EasyCache", model=to_model(g, m), reuse_threshold=3.0, start_percent=0.1, end_percent=0.95, verbose=False
    )
    _, skipped = run_both(
        client,
        server,
        g,
        "tomodel_cache",
        ours(g, m, sides, wan.empty(g, m)),
        theirs(g, cached, sides, wan.empty(g, m)),
    )
    assert torch.isfinite(skipped).all() and (skipped - made[0]).abs().max() > 1e-4


def _merged(g: Graph, first: Out, second: Out, sides: dict[str, Out], latent: Out) -> Out:
    return theirs(g, g.add("ModelMergeSimple", model1=first, model2=second, ratio=0.5), sides, latent)


def _with_lora(g: Graph, ours: Out, native: Out, sides: dict[str, Out], latent: Out) -> Out:
    patched = g.add("LoraLoaderModelOnly", model=ours, lora_name="nothing.safetensors", strength_model=1.0)
    return theirs(g, patched, sides, latent)


def _with_hook(g: Graph, ours: Out, native: Out, sides: dict[str, Out], latent: Out) -> Out:
    hook = g.add("CreateHookLoraModelOnly", lora_name="nothing.safetensors", strength_model=1.0)
    hooked = g.add(
        "ConditioningSetProperties", cond_NEW=sides["positive"], strength=1.0, set_cond_area="default", hooks=hook
    )
    return theirs(g, ours, sides | {"positive": hooked}, latent)


def _saved(g: Graph, ours: Out, native: Out, sides: dict[str, Out], latent: Out) -> Out:
    g.add("ModelSave", model=ours, filename_prefix="models/tomodel_no")
    return latent


NEED_WEIGHTS = {
    "lora": _with_lora, "hook": _with_hook, "save": _saved, "merged into": _merged,
    "merged from": lambda g, ours, native, *rest: _merged(g, native, ours, *rest),
    "merged with its like": lambda g, ours, native, *rest: _merged(g, ours, ours, *rest),
}  # fmt: skip


@pytest.mark.parametrize("kind", NEED_WEIGHTS)
def test_nodes_that_need_weights_are_refused(client: Client, server: Server, kind: str) -> None:
    """They would find none: LoRAs without effect, models merged with nothing, empty files."""
    folder = server.base / "models/loras"
    folder.mkdir(exist_ok=True)
    layer = "diffusion_model.blocks.0.self_attn.q"
    weights = {f"{layer}.lora_A.weight": torch.zeros(1, 256), f"{layer}.lora_B.weight": torch.zeros(256, 1)}
    save_file(weights, folder / "nothing.safetensors")
    g = Graph()
    m = wan.model(g, "t2v")
    made = NEED_WEIGHTS[kind](g, to_model(g, m), native(g, wan.expert("t2v", "high")), wan.prompts(g), wan.empty(g, m))
    wan.save_latent(g, made, "tomodel_refused")
    run = client.run(g.nodes)
    assert not run.ok and "put Wan LoRA" in str(run.error)
    assert not list(server.base.glob("output/models/tomodel_no*"))
