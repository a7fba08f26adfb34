"""A look at a video while it is sampled: a small moving picture, made beside the sampler, and the time that is left."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TEMPORAL_STRIDE, PerExpert
from .geometry import preview_rgb

if TYPE_CHECKING:
    from ..models.vae.taehv import TinyDecoder

log = logging.getLogger(__name__)

SHARE = 0.01  # of the time, at most, is spent on pictures
PAUSE = 0.3  # seconds between two pictures, at least
_FRAMES = 40  # of a picture, at most
_DECODED_SIDE = 400  # pixels: how large a decoder's picture may become
_QUALITY = 70  # of the WebP


def small_frames(latent: Tensor, side: int, decoder: TinyDecoder | None = None) -> Tensor:
    """A normalised latent [C,T,h,w] -> bytes [T,h',w',3] on the CPU, one frame per latent frame.

    Args:
        side: the longest side in pixels, at most. Without a decoder a frame is not larger than the latent.
        decoder: where the latent is.

    Raises:
        WanError: a latent of no known space.
    """
    rgb = preview_rgb(latent) if decoder is None else _decoded(latent, min(side, _DECODED_SIDE), decoder)
    scale = side / max(rgb.shape[1:3])
    if scale >= 1:
        return rgb
    size = [max(round(edge * scale), 1) for edge in rgb.shape[1:3]]
    return F.interpolate(rgb.movedim(-1, 1).float(), size=size, mode="area").round().byte().movedim(1, -1)


def _decoded(latent: Tensor, side: int, decoder: TinyDecoder) -> Tensor:
    largest = max(latent.shape[2:]) * decoder.config.patch
    doublings = max((n for n in range(4) if largest << n <= side), default=0)
    pixels = [frame.mul(255).round().byte().cpu() for frame in decoder.frames(latent, doublings)]
    return torch.stack(pixels).movedim(1, -1)


def thinned(latent: Tensor) -> tuple[Tensor, list[int]]:
    """At most ``_FRAMES`` evenly chosen frames of a latent [C,T,h,w], and for how many pixel frames each stands.

    The first latent frame is one pixel frame, each later one four: together they last as long as the clip.
    """
    total = latent.shape[1]
    chosen = torch.linspace(0, total - 1, min(total, _FRAMES)).round().int().tolist()
    begins = [0, *((index - 1) * TEMPORAL_STRIDE + 1 for index in chosen[1:]), (total - 1) * TEMPORAL_STRIDE + 1]
    return latent[:, chosen], [end - begin for begin, end in zip(begins, begins[1:], strict=False)]


def animated_webp(frames: Tensor, durations: Sequence[int]) -> bytes:
    """Bytes [T,H,W,3], and how many milliseconds each is shown -> a picture that loops for ever."""
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in frames.numpy()]
    file = io.BytesIO()
    first.save(
        file, "WEBP", save_all=True, append_images=rest, duration=list(durations), loop=0, quality=_QUALITY, method=0
    )
    return file.getvalue()


def moving_picture(latent: Tensor, fps: float, side: int, decoder: TinyDecoder | None = None) -> bytes:
    """A normalised latent [C,T,h,w] -> an animated WebP that loops at the clip's speed. See ``small_frames``."""
    latent, frames = thinned(latent)
    ends = [round(1000 * sum(frames[: place + 1]) / fps) for place in range(len(frames))]
    durations = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    return animated_webp(small_frames(latent, side, decoder), durations)


class Painter:
    """Makes pictures of the newest latent in a thread of its own; the sampler only hands a reference over.

    A picture is begun when the one before is out and ``SHARE`` of the time since allows for what that one took. The
    last one of a run is always made. Whatever fails is logged once and ends the pictures, not the run.

    Args:
        paint: [C,T,h,w] and what was offered with it, called in the thread.
    """

    def __init__(self, paint: Callable[[Tensor, object], None]) -> None:
        self.paint = paint
        self._offer: _Offer | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def offer(self, latent: Tensor, about: object = None, *, last: bool = False) -> None:
        """The newest latent; one that was not painted yet is forgotten."""
        self._put(_Offer(_handed_over(latent), about, last))

    def close(self, *, cancelled: bool = False) -> None:
        """No more offers. Does not wait: a last picture may be under way."""
        with self._changed:
            self._closed = True
            if cancelled:
                self._offer = None
            self._changed.notify()

    def _put(self, offer: _Offer) -> None:
        with self._changed:
            self._offer = offer
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="wan_core preview", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        pause = 0.0
        try:
            while (offer := self._take(pause)) is not None:
                began = time.monotonic()
                offer.paint(self.paint)
                pause = max(PAUSE, (time.monotonic() - began) / SHARE)
                del offer
        except Exception:
            log.exception("Previews have stopped; the run goes on without them")

    def _take(self, pause: float) -> _Offer | None:
        """The newest offer once the pause is over, or at once if it is the last; None at the end."""
        ready = time.monotonic() + pause
        with self._changed:
            while True:
                offer, left = self._offer, ready - time.monotonic()
                if self._closed and (offer is None or not offer.last):
                    return None
                if offer is not None and (offer.last or left <= 0):
                    self._offer = None
                    return offer
                self._changed.wait(None if offer is None else left)


def _handed_over(latent: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A latent that another thread may read, and on CUDA what it must wait for; other devices are not asked to."""
    if latent.device.type == "cuda":
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(latent.device))
        return latent, ready
    return latent.cpu(), None


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all pictures: what is freed in a stream is kept for that stream."""
    return torch.cuda.Stream(device, priority=-1)


@dataclass(frozen=True, eq=False)
class _Offer:
    source: tuple[Tensor, torch.cuda.Event | None]
    about: object
    last: bool

    @torch.no_grad()
    def paint(self, paint: Callable[[Tensor, object], None]) -> None:
        """In a stream of its own on CUDA, so that it does not wait for what the sampler has launched since."""
        latent, ready = self.source
        stream = _stream(latent.device) if ready else None
        with torch.cuda.stream(stream) if stream else nullcontext():
            if ready and stream:
                stream.wait_event(ready)
            paint(latent, self.about)
        if stream:
            stream.synchronize()  # before the latent's memory may serve the sampler again


@dataclass(eq=False)
class Pace:
    """How long the steps of each expert take, without the loading before them; and so the time that is left.

    Args:
        experts: who works at each step of the schedule.
        guidance: a scale of 1 halves the work of an expert's step; this tells of one that was not yet seen.
        calls: how often the model is asked at each step, where guidance alone does not tell; 0 where it is known that a
            step cache leaves it out.
    """

    experts: Sequence[str]
    guidance: PerExpert
    clock: Callable[[], float] = time.monotonic
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each expert's steps, by call
    calls: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.calls = self.calls or [self._passes(expert) for expert in self.experts]
        self._began = self._ended = self.clock()
        self._working = False

    def block(self) -> None:
        """A block of the model is about to work: the first one after a step begins the next."""
        if not self._working:
            self._working, self._began = True, self.clock()

    def step(self, index: int) -> None:
        """A step is done."""
        now = self.clock()
        began = self._began if self._working else self._ended
        if self.calls[index]:
            self.seconds.setdefault(self.experts[index], []).append((now - began) / self.calls[index])
        self._working, self._ended = False, now

    def left(self, done: int, end: int) -> float | None:
        """Seconds from after step ``done`` (excluded) up to step ``end``; None before anything was measured."""
        if not self.seconds:
            return None
        coming = zip(self.experts[done:end], self.calls[done:end], strict=True)
        return sum(calls * self._mean(expert) for expert, calls in coming)

    def _mean(self, expert: str) -> float:
        if expert in self.seconds:
            return sum(self.seconds[expert]) / len(self.seconds[expert])
        return self._mean(next(iter(self.seconds)))

    def _passes(self, expert: str) -> int:
        return 1 if (self.guidance.high if expert == "high" else self.guidance.low) == 1 else 2
