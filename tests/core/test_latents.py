"""Geometry, images, masks, noise and previews, against the official rules and ComfyUI."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as transforms

from wan_core.config import VAES, VARIANTS
from wan_core.errors import WanError
from wan_core.media import geometry as latents
from wan_core.media.geometry import (
    condition_chunks,
    given_mask,
    i2v_size,
    image_tensor,
    latent_frames,
    latent_shape,
    noise,
    pixel_frames,
    preview_rgb,
    resize_bicubic,
    ti2v_image,
    ti2v_size,
)


@pytest.mark.parametrize(
    ("task", "size", "frames", "shape"),
    [
        ("t2v-A14B", (1280, 720), 81, (16, 21, 90, 160)),
        ("i2v-A14B", (832, 480), 1, (16, 1, 60, 104)),
        ("ti2v-5B", (1280, 704), 121, (48, 31, 44, 80)),
        ("ti2v-5B", (32, 64), 5, (48, 2, 4, 2)),
    ],
)
def test_latent_shape(task: str, size: tuple, frames: int, shape: tuple):
    row = VARIANTS[task]
    assert latent_shape(row, *size, frames) == latent_shape(VAES[row.vae], *size, frames) == shape
    assert pixel_frames(latent_frames(frames)) == frames


@pytest.mark.parametrize(
    ("task", "size", "frames", "message"),
    [
        ("t2v-A14B", (832, 480), 80, "4n \\+ 1.*77 and 81"),
        ("t2v-A14B", (832, 480), 0, "nearest are 1"),
        ("t2v-A14B", (832, 480), 2, "1 and 5"),
        ("t2v-A14B", (830, 487), 81, "multiples of 16.*832x480"),
        ("ti2v-5B", (1280, 720), 121, "multiples of 32.*1280x736"),
        ("ti2v-5B", (0, 5), 121, "nearest is 32x32"),
    ],
)
def test_bad_sizes_name_the_nearest_good_ones(task: str, size: tuple, frames: int, message: str):
    with pytest.raises(WanError, match=message):
        latent_shape(VARIANTS[task], *size, frames)


# Area, image and the size that the official wan/image2video.py makes of them.
@pytest.mark.parametrize(
    ("area", "image", "size"),
    [
        (1280 * 720, (1280, 720), (1280, 720)),
        (1280 * 720, (1920, 1080), (1280, 720)),
        (832 * 480, (1024, 1024), (624, 624)),
        (1280 * 720, (1000, 1501), (768, 1168)),
        (832 * 480, (333, 777), (400, 960)),
        (832 * 480, (3000, 517), (1520, 256)),
    ],
)
def test_i2v_size_is_the_official_one(area: int, image: tuple, size: tuple):
    assert i2v_size(area, *image) == size


# The same of best_output_size with multiples of 32 in the official wan/utils/utils.py.
@pytest.mark.parametrize(
    ("area", "image", "size"),
    [
        (1280 * 704, (1280, 720), (1248, 704)),
        (1280 * 704, (1024, 1024), (960, 928)),
        (1280 * 704, (1000, 1501), (768, 1152)),
        (1280 * 704, (333, 777), (608, 1440)),
        (1280 * 704, (3000, 517), (2272, 384)),
        (1280 * 704, (720, 1280), (704, 1248)),
        (320 * 512, (640, 427), (480, 320)),
    ],
)
def test_ti2v_size_is_the_official_one(area: int, image: tuple, size: tuple):
    assert ti2v_size(area, *image) == size
    assert size[0] * size[1] <= area


@pytest.mark.parametrize("rule", [i2v_size, ti2v_size])
def test_an_image_too_narrow_for_its_area_is_refused(rule):
    with pytest.raises(WanError, match="Crop the image"):
        rule(64 * 64, 5000, 10)


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def test_images_of_every_kind_become_the_same_tensor():
    photo = picture(9, 7)
    expected = transforms.to_tensor(photo).sub(0.5).div(0.5)
    array = np.asarray(photo)
    comfy = torch.from_numpy(array.astype(np.float32) / 255)
    for image in (photo, photo.convert("RGBA"), array, comfy, torch.cat([comfy, torch.ones(7, 9, 1)], dim=-1)):
        made = image_tensor(image)
        assert made.shape == (3, 7, 9) and made.dtype == torch.float32
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("image", "size"), [((300, 200), (64, 96)), ((123, 457), (96, 64)), ((40, 30), (128, 64))])
def test_ti2v_image_is_the_official_preparation(image: tuple, size: tuple):
    """Cover the size with Lanczos, cut the centre: torchvision's crop stands in for the official arithmetic."""
    photo, (width, height) = picture(*image), size
    scale = max(width / image[0], height / image[1])
    scaled = photo.resize((round(image[0] * scale), round(image[1] * scale)), Image.LANCZOS)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    expected = transforms.to_tensor(transforms.crop(scaled, top, left, height, width)).sub(0.5).div(0.5)
    made = ti2v_image(photo, width, height)
    assert made.shape == (3, 1, height, width)
    assert torch.equal(made[:, 0], expected)
    comfy = torch.from_numpy(np.asarray(photo).astype(np.float32) / 255)
    assert torch.equal(ti2v_image(comfy, width, height), made)


def test_bicubic_is_neither_clamped_nor_antialiased():
    """At half size torch's bicubic (a = -0.75) weighs four neighbours -3/32, 19/32, 19/32, -3/32."""
    step = torch.full((3, 8, 8), -1.0)
    step[..., 4:] = 1
    expected = torch.tensor([-1, -38 / 32, 38 / 32, 1]).expand(3, 6, 4)
    torch.testing.assert_close(resize_bicubic(step, 6, 4), expected, rtol=0, atol=1e-6)


def test_masks_are_comfyui_s(in_comfyui):
    """WanFirstLastFrameToVideo writes concat_mask with 0 = given; ours is what its model makes of it, 1 = given."""
    cases = [(17, 1, 0), (17, 0, 1), (17, 1, 1), (33, 5, 2), (9, 3, 4), (5, 2, 3), (1, 1, 0)]
    theirs = in_comfyui(
        """
        from comfy_extras.nodes_wan import WanFirstLastFrameToVideo

        class VAE:
            latent_channels = 16
            spacial_compression_encode = lambda self: 8
            encode = lambda self, image: image

        image = lambda count: torch.rand(count, 32, 48, 3) if count else None
        for length, start, end in inputs["cases"]:
            positive, _, _ = WanFirstLastFrameToVideo.execute(
                [[None, {}]], [[None, {}]], VAE(), 48, 32, length, 1, image(start), image(end)).args
            outputs[(length, start, end)] = positive[0][1]["concat_mask"]
        """,
        cases=cases,
    )
    assert len(theirs) == len(cases)
    for (length, start, end), mask in theirs.items():
        given = [*range(start), *range(-end, 0)]
        assert torch.equal(given_mask(given, length, 4, 6), 1 - mask)


def test_the_mask_of_a_start_image_is_the_official_one():
    """The official image2video.py: ones for the first frame, repeated four times, folded by four."""
    made = given_mask([0], 9, 2, 3)
    assert made.shape == (1, 4, 3, 2, 3)
    assert (made[:, :, 0] == 1).all() and (made[:, :, 1:] == 0).all()


def test_given_frames_take_their_places_between_grey():
    frames = {0: torch.full((3, 4, 6), 0.5), -1: torch.full((3, 4, 6), -0.25), 6: torch.ones(3, 4, 6)}
    video = torch.cat(list(condition_chunks(frames, 9)), 2)
    assert video.shape == (1, 3, 9, 4, 6)
    assert video[0, 0, :, 0, 0].tolist() == [0.5, 0, 0, 0, 0, 0, 1, 0, -0.25]
    chunks = list(condition_chunks(frames, 9))
    assert [c.shape[2] for c in chunks] == [1, 4, 4]
    assert torch.equal(torch.cat(chunks, dim=2), video)


@pytest.mark.parametrize("frame", [9, -10])
def test_frames_outside_the_video_are_refused(frame: int):
    with pytest.raises(WanError, match="0 to 8"):
        given_mask([frame], 9, 2, 2)
    with pytest.raises(WanError, match="0 to 8"):
        list(condition_chunks({frame: torch.zeros(3, 2, 2)}, 9))


def test_a_condition_without_an_image_is_refused():
    with pytest.raises(WanError, match="start image"):
        list(condition_chunks({}, 9))


def test_a_seed_is_a_picture():
    shape = (16, 3, 5, 7)
    expected = torch.randn(*shape, generator=torch.Generator().manual_seed(42), dtype=torch.float32)
    assert torch.equal(noise(42, shape), expected)
    batch = noise(42, (2, *shape))
    assert torch.equal(batch[0], expected) and not torch.equal(batch[1], expected)
    assert noise(2**64 - 1, shape).dtype == torch.float32  # the largest seed of ComfyUI's widget


def test_previews_are_comfyui_s(in_comfyui):
    latents = {c: noise(c, (c, 3, 4, 5)) for c in (16, 48)}
    theirs = in_comfyui(
        """
        import numpy, latent_preview
        from comfy import latent_formats
        for space in (latent_formats.Wan21, latent_formats.Wan22):
            previewer = latent_preview.Latent2RGBPreviewer(space.latent_rgb_factors, space.latent_rgb_factors_bias)
            latent = inputs["latents"][space.latent_channels]
            frames = [previewer.decode_latent_to_preview(latent[None, :, i : i + 1]) for i in range(latent.shape[1])]
            outputs[space.latent_channels] = torch.from_numpy(numpy.stack([numpy.asarray(f) for f in frames]))
        """,
        latents=latents,
    )
    for channels, expected in theirs.items():
        made = preview_rgb(latents[channels])
        assert made.shape == (3, 4, 5, 3) and made.dtype == torch.uint8
        assert (made.int() - expected.int()).abs().max() <= 1  # sums in another order may cut to the neighbour


def test_a_latent_of_no_known_space_has_no_preview():
    with pytest.raises(WanError, match="4 channels.*16 or 48"):
        preview_rgb(torch.zeros(4, 1, 2, 2))


# --- picture files


RAMP = np.tile(np.linspace(0, 1, 256), (32, 1))
EXPECTED = (RAMP * 255).round().astype(int)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("8.png", (RAMP * 255).round().astype(np.uint8)),
        ("16.png", (RAMP * 65535).astype(np.uint16)),
        ("16.tif", (RAMP * 65535).astype(np.uint16)),
        ("16big.tif", (RAMP * 65535).astype(">u2")),
        ("32.tif", (RAMP * 65535).astype(np.int32)),
        ("32bytes.tif", (RAMP * 255).round().astype(np.int32)),
        ("32whole.tif", (RAMP * (2**31 - 1)).astype(np.int32)),
        ("32unsigned.tif", (RAMP * (2**32 - 1)).astype(np.uint32)),
        ("float.tif", RAMP.astype(np.float32)),
        ("dark16.png", (RAMP * 200).astype(np.uint16)),
    ],
)
def test_deep_pictures_keep_their_greys(tmp_path: Path, name: str, pixels: np.ndarray):
    """Within one of 255 grey values; a dark 16-bit picture stays dark."""
    Image.fromarray(pixels).save(tmp_path / name)
    opened = latents.open_image(tmp_path / name)
    expected = EXPECTED if name != "dark16.png" else np.zeros_like(EXPECTED)
    assert opened.mode == "RGB" and np.abs(np.asarray(opened)[..., 0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("deep", [False, True])
def test_pictures_are_turned_upright(tmp_path: Path, ending: str, deep: bool):
    """All eight orientations of Exif, against Pillow's own transpositions; 16 bits in PNG alone."""
    picture = np.zeros((32, 48), np.uint8)
    picture[:16, :24] = 200
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = number
        stored = Image.fromarray(picture.astype(np.uint16) * 257 if deep and ending == "png" else picture)
        stored.save(tmp_path / f"{number}.{ending}", exif=exif)
        method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(number)
        expected = Image.fromarray(picture) if method is None else Image.fromarray(picture).transpose(method)
        opened = np.asarray(latents.open_image(tmp_path / f"{number}.{ending}"), dtype=int)[..., 0]
        assert opened.shape == np.asarray(expected).shape and np.abs(opened - np.asarray(expected)).mean() < 6


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x89PNG\r\n\x1a\n\0\0", b"BM" + b"\xff" * 60])
def test_what_is_no_picture(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(WanError, match="No such image" if content is None else "not an image"):
        latents.open_image(tmp_path / "x.png")
