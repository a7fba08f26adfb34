"""A picture as it is sent: small, upright, without what the camera wrote beside the pixels."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

AREA = 512 * 512  # pixels, as the official code sends
_NARROWEST = 28  # pixels of a side: Qwen's vision models take no fewer
_QUALITY = 92


def small_size(width: int, height: int) -> tuple[int, int]:
    """The size in which a picture is sent: its aspect ratio, no larger than it is, of at most ``AREA`` pixels.

    Ribbons so narrow that a side would be lost keep ``_NARROWEST`` pixels of it, and give up the ratio.
    """
    scale = min(math.sqrt(AREA / (width * height)), 1.0)
    sides = (max(round(side * scale), _NARROWEST) for side in (width, height))
    longest = AREA // _NARROWEST
    wide, high = (min(side, longest) for side in sides)
    return wide, high


def encoded(picture: Image) -> bytes:
    """A picture of any size -> a JPEG file of at most about ``AREA`` pixels; the same bytes for the same picture."""
    from PIL import Image as images

    out = io.BytesIO()
    small = picture.convert("RGB").resize(small_size(*picture.size), images.Resampling.LANCZOS)
    small.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
