"""Between pixels and latents: sizes, images made ready, masks of given frames, noise, and a rough look at a latent.

Videos are [3,F,H,W] in -1..1, latents [C,T,h,w] with T = (F - 1) / 4 + 1. The first latent frame is one pixel frame,
each later one is four.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import PATCH, TEMPORAL_STRIDE, VAES, VAESpec, Variant
from ..errors import WanError

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


def latent_frames(frames: int) -> int:
    """Latent frames of so many pixel frames.

    Raises:
        WanError: not 4n + 1.
    """
    if frames < 1 or (frames - 1) % TEMPORAL_STRIDE:
        raise WanError(f"{frames} frames: Wan makes 4n + 1 frames. The nearest are {_nearest_frames(frames)}.")
    return (frames - 1) // TEMPORAL_STRIDE + 1


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of so many latent frames."""
    return (latent_frames - 1) * TEMPORAL_STRIDE + 1


def latent_shape(space: Variant | VAESpec, width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    """[C,T,h,w] of a video.

    Raises:
        WanError: frames not 4n + 1, or sides that are no multiples of VAE stride times patch (16, or 32 for the 5B);
            the nearest valid values are named.
    """
    spec = VAES[space.vae] if isinstance(space, Variant) else space
    multiple = spec.spatial_stride * PATCH[1]
    if width < 1 or height < 1 or width % multiple or height % multiple:
        nearest = f"{_nearest_multiple(width, multiple)}x{_nearest_multiple(height, multiple)}"
        raise WanError(f"{width}x{height} pixels: this model needs multiples of {multiple}. The nearest is {nearest}.")
    return spec.channels, latent_frames(frames), height // spec.spatial_stride, width // spec.spatial_stride


def _nearest_frames(frames: int) -> str:
    below = max((frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1, 1)
    return f"{below} and {below + TEMPORAL_STRIDE}" if frames > below else str(below)


def _nearest_multiple(side: int, multiple: int) -> int:
    return max(int(side / multiple + 0.5), 1) * multiple


def i2v_size(area: int, image_w: int, image_h: int, spec: VAESpec = VAES["wan2.1"]) -> tuple[int, int]:
    """Width and height of an I2V-A14B video: the image's aspect ratio, at most ``area`` pixels, each side rounded down
    to a multiple of 16 on its own (official ``image2video.py``)."""
    aspect = image_h / image_w
    latent_h = round(np.sqrt(area * aspect) // spec.spatial_stride // PATCH[1] * PATCH[1])
    latent_w = round(np.sqrt(area / aspect) // spec.spatial_stride // PATCH[2] * PATCH[2])
    if not (latent_h and latent_w):
        raise _too_narrow(area, image_w, image_h)
    return latent_w * spec.spatial_stride, latent_h * spec.spatial_stride


def ti2v_size(area: int, image_w: int, image_h: int, multiple: int = 32) -> tuple[int, int]:
    """Width and height of a TI2V-5B video made from an image (official ``best_output_size``).

    Two candidates, each within ``area``: the width rounded down to the multiple and the height fitted to it, and the
    other way round; the one nearer to the image's aspect ratio wins, the second when they tie.
    """
    ratio = image_w / image_h
    width = (area * ratio) ** 0.5
    height = area / width
    if min(width, height) < multiple:
        raise _too_narrow(area, image_w, image_h)
    wide = _round_down(width, multiple)
    tall = _round_down(height, multiple)
    by_width = wide, _round_down(area / wide, multiple)
    by_height = _round_down(area / tall, multiple), tall
    return by_width if _distortion(by_width, ratio) < _distortion(by_height, ratio) else by_height


def fitted_size(variant: Variant, size: tuple[int, int], images: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Width and height of a video: as asked for, or, where it begins with images, of the first one's aspect ratio and
    about that area.

    Args:
        images: width and height of each.
    """
    if not images:
        return size
    area, (width, height) = size[0] * size[1], images[0]
    if variant.image == "frame":
        return ti2v_size(area, width, height, variant.size_multiple)
    return i2v_size(area, width, height, VAES[variant.vae])


def fitted(
    variant: Variant, originals: Mapping[int, Image | Tensor], size: tuple[int, int], *, cover: bool = False
) -> dict[int, Tensor]:
    """Pictures by frame number -> [3,H,W] in -1..1 of the video's width and height, as the official code fits them.

    A TI2V picture is scaled to cover and cut; those of other models are scaled, after all but the first were made as
    wide and high as the first.

    Args:
        originals: PIL images, or [H,W,3] in 0..1.
        cover: whether those of any model are scaled to cover and cut, because the size is not of their aspect ratio.
    """
    width, height = size
    if cover or variant.image == "frame":
        return {place: ti2v_image(image, width, height)[:, 0] for place, image in originals.items()}
    return scaled_alike(originals, width, height)


def scaled_alike(originals: Mapping[int, Image | Tensor], width: int, height: int) -> dict[int, Tensor]:
    """Pictures by frame number -> [3,height,width] in -1..1, scaled after all are as wide and high as the first.

    Args:
        originals: PIL images, or [H,W,3] in 0..1.
    """
    alike, first = {}, None
    for place, image in originals.items():
        first = first or _size(image)
        alike[place] = image if _size(image) == first else covering(_picture(image), *first)
    return {place: resize_bicubic(image_tensor(image), height, width) for place, image in alike.items()}


def _size(image: Image | Tensor) -> tuple[int, int]:
    """Width and height."""
    return (image.shape[1], image.shape[0]) if isinstance(image, Tensor) else image.size


def covering(image: Image, width: int, height: int) -> Image:
    """A picture scaled until it covers the size, its centre cut out.

    What the official FLF2V code means to do to an end picture of another size than the start's: it computes the scale,
    and then crops without scaling, to sides that are exchanged.
    """
    from PIL import ImageOps
    from PIL.Image import Resampling

    return ImageOps.fit(image.convert("RGB"), (width, height), Resampling.BICUBIC)


def _round_down(side: float, multiple: int) -> int:
    return int(side // multiple * multiple)


def _distortion(size: tuple[int, int], ratio: float) -> float:
    made = size[0] / size[1]
    return max(ratio / made, made / ratio)


def _too_narrow(area: int, image_w: int, image_h: int) -> WanError:
    return WanError(
        f"An image of {image_w}x{image_h} does not fit into an area of {area} pixels: a side would be 0. "
        "Crop the image, or choose a larger size."
    )


def open_image(path: str | Path) -> Image:
    """A picture from a file as 8-bit RGB, upright: cameras write beside the pixels how to turn them.

    Raises:
        WanError: not there, not a picture, damaged, or too large to be one.
    """
    from PIL import Image as images

    path = Path(path)
    if not path.is_file():
        raise WanError(f"No such image: {path}. Expected the file of a picture.")
    try:
        with images.open(path) as picture:
            return upright_rgb(picture)
    except images.DecompressionBombError as error:
        raise WanError(f"{path} has too many pixels to be trusted ({error}). Scale it down first.") from error
    except WanError as error:
        raise WanError(f"{path}: {error}") from error
    except Exception as error:  # decoders fail in every way that there is on damaged files
        raise WanError(
            f"{path} is not an image that can be read ({type(error).__name__}). Expected PNG, JPEG, WebP or "
            "another format that Pillow knows."
        ) from error


def upright_rgb(picture: Image) -> Image:
    """8-bit RGB, turned as the camera says. Deeper pictures are scaled to 8 bits, not cut off at 255.

    Raises:
        WanError: values that are no numbers.
    """
    from PIL import Image as images
    from PIL import ImageOps

    sixteen = picture.mode.startswith("I;16") or picture.mode == "I" and picture.format == "PNG"
    picture.load()
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception as error:  # damaged notes beside sound pixels
        log.warning("The picture's orientation cannot be read (%s): taken as it lies.", type(error).__name__)
    if picture.mode.startswith(("I", "F")):
        picture = images.fromarray(_eight_bits(np.asarray(picture), sixteen=sixteen))
    return picture.convert("RGB")


def _eight_bits(values: np.ndarray, *, sixteen: bool) -> np.ndarray:
    """Integers of 16 or 32 bits, or floats, [H,W] -> bytes.

    What white is only 16-bit files say; else the largest value tells: 1 (floats), 255, 65535, or the most that 32 bits
    hold.
    """
    whole = np.issubdtype(values.dtype, np.integer)
    if not (whole or np.isfinite(values).all()):
        raise WanError("the picture holds values that are no numbers (NaN or infinite). Export it anew.")
    if whole and values.size and values.min() < 0:
        values = values.astype(np.int32).view(np.uint32)  # Pillow reads unsigned numbers as signed ones
    values = values.astype(np.float64)
    ends = (65535,) if sixteen else (() if whole else (1,)) + (255, 65535, 2**31 - 1)
    white = next((end for end in ends if values.size == 0 or values.max() <= end), 2**32 - 1)
    return (values.clip(0, white) * (255 / white)).round().astype(np.uint8)


def image_tensor(image: Image | np.ndarray | Tensor) -> Tensor:
    """A PIL image, or [H,W,3] with 0..1 floats (ComfyUI's IMAGE) or bytes -> [3,H,W] in -1..1, float32."""
    if not isinstance(image, (np.ndarray, Tensor)):
        image = np.asarray(upright_rgb(image) if image.mode.startswith(("I", "F")) else image.convert("RGB"))
    pixels = image if isinstance(image, Tensor) else torch.tensor(image)
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    return pixels[..., :3].permute(2, 0, 1).sub(0.5).div(0.5).contiguous()


def resize_bicubic(image: Tensor, height: int, width: int) -> Tensor:
    """[3,H,W] -> [3,height,width]; the values may overshoot -1..1 a little, as in the official ``image2video.py``."""
    return F.interpolate(image[None], size=(height, width), mode="bicubic")[0]


def middle_square(images: Tensor) -> Tensor:
    """[..., H, W] -> the square in the middle."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def stretched(images: Tensor, side: int) -> Tensor:
    """Pictures [B,H,W,3] in 0..1 -> [B,side,side,3], bicubic without antialiasing; values may lie beyond 0..1."""
    small = [resize_bicubic(image_tensor(one), side, side) for one in images]
    return torch.stack(small).movedim(1, -1).add(1).div(2)


def ti2v_image(image: Image | np.ndarray | Tensor, width: int, height: int) -> Tensor:
    """Scale to cover the size with Pillow's Lanczos filter, cut the centre out -> [3,1,height,width] in -1..1.

    As the official ``textimage2video.py``, in 8 bits; arrays are [H,W,3] in 0..1.
    """
    from PIL.Image import Resampling

    picture = _picture(image)
    scale = max(width / picture.width, height / picture.height)
    scaled = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(scaled, Resampling.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return image_tensor(picture.crop((left, top, left + width, top + height)))[:, None]


def _picture(image: Image | np.ndarray | Tensor) -> Image:
    from PIL import Image

    if not isinstance(image, (np.ndarray, Tensor)):
        return image.convert("RGB")
    pixels = np.asarray(image)[..., :3]
    if pixels.dtype != np.uint8:
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels)


def given_mask(given: Collection[int], frames: int, height: int, width: int) -> Tensor:
    """The four mask channels of an image-to-video condition, [1,4,T,h,w], 1 where a pixel frame is given.

    Args:
        given: pixel frames that are known; negative ones count from the end.
        height, width: of the latent.

    Each latent frame has one channel for each of its four pixel frames; the first, which has only one, repeats it.
    ComfyUI's ``concat_mask`` is one minus this.
    """
    known = torch.zeros(frames)
    known[_frame_numbers(given, frames)] = 1
    times = torch.cat([known[:1].expand(TEMPORAL_STRIDE), known[1:]])
    folded = times.view(latent_frames(frames), TEMPORAL_STRIDE).T
    return folded[None, :, :, None, None].expand(-1, -1, -1, height, width).contiguous()


def condition_chunks(given: Mapping[int, Tensor], frames: int) -> Iterator[Tensor]:
    """The condition video piece by piece, as the VAE encodes it: one frame, then four at a time."""
    if not given:
        raise WanError("No image is given: an image-to-video condition needs a start image, an end image, or both.")
    places = dict(zip(_frame_numbers(given, frames), given.values(), strict=True))
    grey = torch.zeros_like(next(iter(places.values())))
    starts = [0, *range(1, frames, TEMPORAL_STRIDE)]
    for start, end in zip(starts, [*starts[1:], frames], strict=True):
        yield torch.stack([places.get(i, grey) for i in range(start, end)], dim=1)[None]


def _frame_numbers(given: Collection[int], frames: int) -> list[int]:
    outside = [i for i in given if not -frames <= i < frames]
    if outside:
        raise WanError(f"Frames {outside} are given, but the video has {frames}: 0 to {frames - 1}.")
    return [i % frames for i in given]


def noise(seed: int, shape: Collection[int]) -> Tensor:
    """Standard normal noise of shape [C,T,h,w] or [B,C,T,h,w], drawn on the CPU in float32.

    The same on every device; the videos of a batch are drawn one after the other, so that the first is the one that
    the seed gives alone.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    *batch, channels, frames, height, width = shape
    one = (channels, frames, height, width)
    if not batch:
        return torch.randn(one, generator=generator)
    return torch.stack([torch.randn(one, generator=generator) for _ in range(batch[0])])


def preview_rgb(latent: Tensor) -> Tensor:
    """A rough picture of a normalised latent, [C,T,h,w] -> uint8 [T,h,w,3] on the CPU, without a VAE.

    Raises:
        WanError: a latent of neither of the two latent spaces.
    """
    if latent.shape[0] not in _PREVIEWS:
        expected = " or ".join(map(str, _PREVIEWS))
        raise WanError(f"A latent of {latent.shape[0]} channels has no preview: expected {expected}.")
    weight, bias = _preview_map(latent.shape[0])
    rgb = F.linear(latent.float().movedim(0, -1), weight.to(latent.device), bias.to(latent.device))
    return rgb.add(1).div(2).clamp(0, 1).mul(255).to("cpu", torch.uint8)


def _preview_map(channels: int) -> tuple[Tensor, Tensor]:
    colours = _PREVIEWS[channels]
    return torch.tensor([row.weights for row in colours]), torch.tensor([row.bias for row in colours])


class _Colour(NamedTuple):
    bias: float
    weights: tuple[float, ...]


# Red, green and blue of a pixel as a linear function of the normalised channels: numbers fitted to the two VAEs,
# published in ComfyUI's comfy/latent_formats.py (Wan21, Wan22).
_PREVIEWS: dict[int, tuple[_Colour, ...]] = {
    16: (
        _Colour(-0.1835, (
            -0.1299, 0.0671, 0.3568, 0.0372, 0.0313, 0.0296, -0.3477, 0.0166, -0.0412, -0.1293, 0.068, 0.0032,
            -0.1251, 0.006, 0.3477, 0.1984,
        )),
        _Colour(-0.0868, (
            -0.1692, 0.0406, 0.2548, 0.2344, 0.0189, -0.0956, -0.4059, 0.1902, 0.0267, 0.074, 0.3019, 0.0581,
            0.0927, -0.0633, 0.2275, 0.0913,
        )),
        _Colour(-0.336, (
            0.2932, 0.0442, 0.1747, 0.142, -0.0328, -0.0665, -0.2925, 0.1975, -0.1364, 0.1636, 0.1128, 0.0639,
            0.1699, 0.0005, 0.295, 0.1861,
        )),
    ),
    48: (
        _Colour(0.0317, (
            0.0119, -0.1062, 0.014, -0.0813, 0.0656, 0.0264, 0.0295, -0.0244, 0.0443, -0.0465, 0.0359, -0.0776,
            0.0564, 0.0006, -0.0319, -0.0268, 0.0539, -0.0359, -0.0285, 0.1041, -0.0086, 0.039, 0.0069, 0.0006,
            0.0313, -0.1454, 0.0714, -0.0304, 0.0401, -0.0758, 0.0568, -0.0055, 0.0239, -0.0663, -0.0416, 0.0166,
            -0.0211, 0.1833, -0.0368, -0.3441, -0.0479, -0.066, -0.0101, -0.069, -0.0145, 0.0421, 0.0504, -0.0837,
        )),
        _Colour(-0.0878, (
            0.0103, -0.0504, 0.0409, -0.0677, 0.0851, 0.0463, 0.0326, -0.027, -0.0102, -0.009, 0.0236, 0.0854,
            0.0264, 0.0594, -0.0542, 0.0024, 0.0265, -0.0312, -0.1032, 0.0537, -0.0374, 0.067, 0.0144, -0.0167,
            -0.0574, -0.0902, 0.0827, -0.0574, 0.0384, -0.0297, 0.1307, -0.031, -0.0305, -0.0673, -0.0047, 0.0112,
            0.0011, 0.1466, 0.037, -0.3543, -0.0489, -0.0153, 0.0068, -0.0452, 0.0041, 0.0451, -0.0483, 0.0168,
        )),
        _Colour(-0.1388, (
            0.0046, 0.0165, 0.0491, 0.0607, 0.0808, 0.0912, 0.059, 0.0025, 0.0288, -0.0205, 0.0082, 0.1048,
            0.0561, 0.0418, -0.0637, 0.026, 0.0358, -0.0287, -0.1237, 0.0622, -0.0051, 0.2863, 0.0082, 0.0079,
            -0.0232, -0.0481, 0.0447, -0.0196, 0.0204, -0.0014, 0.1372, -0.038, 0.0325, -0.014, -0.0023, -0.0093,
            0.0331, 0.225, 0.0295, -0.2008, -0.042, 0.08, 0.0156, -0.0927, 0.0015, 0.0373, -0.0356, 0.0055,
        )),
    ),
}  # fmt: skip
