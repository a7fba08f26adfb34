"""What comes from other programs as raw latents and masks, against ComfyUI's own handling of them, in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wan_core.config import VARIANTS
from wan_core.media.geometry import noise
from wan_core.models.vae.vae import normalise
from wan_core.sampling import raw
from wan_core.sampling.schedules import schedule

SHAPE = (3, 16, 3, 8, 6)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CONCAT_COND = """
    import types
    from comfy import latent_formats, model_base
    model = types.SimpleNamespace(
        diffusion_model=types.SimpleNamespace(patch_embedding=types.SimpleNamespace(weight=torch.empty(1, 36))),
        image_to_video=True,
        latent_format=latent_formats.Wan21(),
        process_latent_in=latent_formats.Wan21().process_in,
    )
    keys = {"concat_latent_image": inputs["image"].clone()}
    if "mask" in inputs:
        keys["concat_mask"] = inputs["mask"]
    outputs["channels"] = model_base.WAN21.concat_cond(model, noise=inputs["noise"], device="cpu", **keys)
"""


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ((3, 16, 3, 8, 6), None),
        ((1, 16, 3, 8, 6), (1, 4, 3, 8, 6)),
        ((1, 16, 3, 10, 6), (1, 4, 3, 10, 6)),  # too high: its middle
        ((1, 16, 3, 4, 8), (1, 1, 3, 4, 8)),  # too wide, one channel of mask
        ((2, 16, 3, 8, 6), (2, 4, 2, 8, 6)),  # two for three videos, a mask that ends early
        ((5, 16, 3, 16, 12), (1, 2, 3, 16, 12)),
    ],
)
def test_given_channels_are_comfyuis(in_comfyui, image: tuple[int, ...], mask: tuple[int, ...] | None):
    given = {"image": normal(*image)} | ({} if mask is None else {"mask": normal(*mask, seed=1).sigmoid()})
    theirs = in_comfyui(CONCAT_COND, noise=torch.zeros(SHAPE), **given)["channels"]
    ours = raw.given_channels(given["image"], given.get("mask"), SHAPE, "wan2.1").channels
    assert ours.shape == theirs.shape == (3, 20, 3, 8, 6)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", [(8, 6), (1, 8, 6), (3, 16, 12), (2, 1, 3, 4, 3), (1, 1, 1, 8, 6), (5, 16, 3, 8, 6)])
def test_masks_are_fitted_as_comfyui_does(in_comfyui, shape: tuple[int, ...]):
    mask = normal(*shape).sigmoid()
    code = """
        from comfy.utils import reshape_mask
        outputs["mask"] = reshape_mask(inputs["mask"], inputs["like"].shape)
    """
    like = torch.zeros(SHAPE)
    theirs = in_comfyui(code, mask=mask, like=like)["mask"]
    assert torch.equal(raw.fitted_mask(mask, like), theirs)


def test_an_empty_latent_is_empty_in_both_spaces():
    assert not raw.from_raw(torch.zeros(SHAPE), "wan2.1").any()
    assert torch.equal(raw.from_raw(normal(*SHAPE), "wan2.1"), normalise(normal(*SHAPE), "wan2.1"))


def test_what_is_stored_in_the_middle_goes_on_where_it_was():
    along, x = schedule("simple", 6, 5.0), normal(*SHAPE)
    kept = raw.from_raw(raw.stored(x, along, 2, "wan2.1"), "wan2.1")
    again = raw.first_sample(kept, torch.zeros(SHAPE), along, 2, add_noise=False, pure=False)
    assert (again - x).abs().max() <= 1e-5
    assert (kept - x).abs().max() > 0.1
    assert (raw.from_raw(raw.stored(x, along, 100, "wan2.1"), "wan2.1") - x).abs().max() <= 1e-5  # all steps done


def test_the_first_sample_has_the_noise_of_its_step():
    along, clean, drawn = schedule("simple", 6, 5.0), normal(*SHAPE), normal(*SHAPE, seed=1)
    sigma = along.sigmas[3].item()
    made = raw.first_sample(clean, drawn, along, 3, add_noise=True, pure=False)
    assert torch.equal(made, sigma * drawn + (1 - sigma) * clean)
    assert raw.first_sample(clean, drawn, along, 0, add_noise=True, pure=True) is drawn


def test_a_video_of_a_batch_keeps_the_noise_of_its_place():
    whole = noise(7, (4, *SHAPE[1:]))
    assert torch.equal(raw.noise_of(7, [3, 0], SHAPE[1:]), whole[[3, 0]])


def test_first_frames_are_kept():
    encoded = normal(1, 48, 2, 4, 4)
    samples, mask = raw.first_frames(encoded, (48, 5, 4, 4), "wan2.2", 2)
    assert samples.shape == (2, 48, 5, 4, 4) and mask.shape == (2, 1, 5, 4, 4)
    assert torch.equal(samples[1, :, :2], encoded[0]) and mask.amax(dim=(0, 1, 3, 4)).tolist() == [0, 0, 1, 1, 1]
    clean = raw.from_raw(samples, "wan2.2")
    assert clean[:, :, 2:].abs().max() <= 1e-6  # the rest is empty
    known = raw.kept(mask, clean, normal(2, 48, 5, 4, 4), VARIANTS["ti2v-5B"])
    assert known.clean and torch.equal(known.put_back(torch.zeros_like(clean))[:, :, :2], clean[:, :, :2])
    assert raw.free_content(clean, mask) <= 1e-6 < raw.free_content(clean, None)
