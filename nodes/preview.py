"""What the sampler's node shows while it runs: a moving picture, expert, step, noise level and the time left.

The picture goes to ``web/preview.js`` as an event of our own; clients that know nothing of it get the still frame that
ComfyUI's samplers send, through the progress bar. Whether there are pictures is ComfyUI's own preview setting, read
at every step because newer versions change it from prompt to prompt.
"""

from __future__ import annotations

import base64
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.utils import ProgressBar

from ..wan_core.config import PerExpert
from ..wan_core.errors import WanError
from ..wan_core.media.preview import Pace, Painter, moving_picture
from ..wan_core.recipe import model_calls, working
from . import host

if TYPE_CHECKING:
    from ..wan_core.models.vae.taehv import TinyDecoder
    from ..wan_core.recipe import ModelRecipe
    from ..wan_core.sampling.denoise import StepReport
    from ..wan_core.sampling.schedules import Schedule

log = logging.getLogger(__name__)

EVENT = "wan_core.preview"
_NEWS = 0.2  # seconds between two lines of text, at least
_DECODERS = {16: ("taew2_1", "lighttaew2_1"), 48: ("taew2_2", "lighttaew2_2")}  # how the files' names begin


@dataclass(frozen=True)
class Line:
    """What the node says of a run: ``sigma`` is the noise level that is left, ``left`` seconds, None if unknown,
    ``skipped`` how many steps a cache left out so far, ``computed`` whether the last one was not.
    """

    step: int
    steps: int
    expert: str
    sigma: float
    left: float | None
    skipped: int = 0
    computed: bool = True


class Steps:
    """The callbacks of a run: progress, cancel, text and pictures. Use it in a ``with``."""

    def __init__(
        self, node_id: str | None, model: ModelRecipe, guidance: PerExpert, timetable: Schedule, start: int, end: int
    ):
        self.end = min(end, timetable.steps)  # the range is checked by ``denoise``
        first = min(start, timetable.steps - 1)
        self.bar = ProgressBar(self.end - start)
        experts, calls = working(model, timetable), model_calls(model, timetable, guidance)
        if cache := model.step_cache:
            computed = cache.planned(timetable, experts, first, self.end, model.guidance.turns(timetable))
            calls = [0 if computed and i not in computed else count for i, count in enumerate(calls)]
        self.pace = Pace(experts, guidance, calls=calls)
        self.screen = Screen(node_id)
        self.painter = Painter(_Picture(self.screen, model.variant.fps))
        self.skipped = 0
        self.screen.say(Line(0, self.end - start, self.pace.experts[first], timetable.sigmas[first].item(), None))

    def block(self, *_: object) -> None:
        host.check_cancelled()
        self.pace.block()

    def __call__(self, report: StepReport) -> None:
        host.check_cancelled()
        self.pace.step(report.index)
        left, last = self.pace.left(report.index + 1, self.end), report.done == report.total
        self.skipped += not report.computed
        line = Line(report.done, report.total, report.expert, report.sigma, left, self.skipped, report.computed)
        self.screen.say(line, now=last)
        if not previews_on():
            self.bar.update_absolute(report.done, report.total)
            return
        if self.screen.there:
            self.painter.offer(report.x0[0], last=last)
        self.bar.update_absolute(report.done, report.total, still(report.x0))

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.painter.close(cancelled=kind is not None)


def previews_on() -> bool:
    return args.preview_method != LatentPreviewMethod.NoPreviews


def still(x0: torch.Tensor) -> tuple:
    """A frame from the middle of the first video [B,C,T,h,w], as ComfyUI's progress bar takes it."""
    from PIL import Image

    from ..wan_core.media.geometry import preview_rgb

    middle = x0.shape[2] // 2
    pixels = preview_rgb(x0[0, :, middle : middle + 1])[0]
    return "JPEG", Image.fromarray(pixels.numpy()), args.preview_size


class Screen:
    """The node in the browser of whoever queued the prompt, if a browser it is."""

    def __init__(self, node_id: str | None) -> None:
        from server import PromptServer

        self.server: Any = getattr(PromptServer, "instance", None)
        self.node = None if node_id is None or self.server is None else host.shown_as(node_id)
        self.client = getattr(self.server, "client_id", None)
        self.run = time.time_ns() // 1_000_000  # tells a late picture of an earlier run from one of this run
        self._said = -_NEWS

    @property
    def there(self) -> bool:
        return self.node is not None and self.client is not None

    def say(self, line: Line, *, now: bool = False) -> None:
        if now or time.monotonic() - self._said >= _NEWS:
            self._said = time.monotonic()
            self._send({"line": vars(line)})

    def show(self, picture: bytes) -> None:
        self._send({"picture": "data:image/webp;base64," + base64.b64encode(picture).decode()})

    def _send(self, news: dict) -> None:
        if self.there:
            self.server.send_sync(EVENT, {"node": self.node, "run": self.run} | news, self.client)


class _Picture:
    """Paints on a screen; looks for a tiny decoder when the first picture is due."""

    def __init__(self, screen: Screen, fps: float) -> None:
        self.screen, self.fps = screen, fps
        self._decoder: TinyDecoder | None = None
        self._looked = False

    def __call__(self, latent: torch.Tensor, _: object) -> None:
        if not self._looked:
            self._looked, self._decoder = True, _tiny_decoder(latent)
        self.screen.show(self._paint(latent))

    def _paint(self, latent: torch.Tensor) -> bytes:
        if self._decoder is not None:
            try:
                return moving_picture(latent, self.fps, args.preview_size, self._decoder)
            except RuntimeError as error:  # out of memory, above all
                log.warning("Previews go on without the tiny decoder: %s", str(error).partition("\n")[0])
                self._decoder = None
        return moving_picture(latent, self.fps, args.preview_size)


def _tiny_decoder(latent: torch.Tensor) -> TinyDecoder | None:
    """From ComfyUI's vae_approx folder, unless the preview setting asks for latent2rgb; None where there is none."""
    if args.preview_method == LatentPreviewMethod.Latent2RGB:
        return None
    begins = _DECODERS[latent.shape[0]]
    names = (name for name in host.model_names("vae_approx") if Path(name).name.startswith(begins))
    for name in sorted(names, key=len):  # plain names before those of special versions
        if (decoder := _loaded(name, latent.shape[0])) is not None:
            return decoder.to(latent.device, torch.float16 if latent.is_cuda else torch.float32)
    return None


def _loaded(name: str, channels: int) -> TinyDecoder | None:
    """A decoder, or None for a file that is none; that is said once until the file changes."""
    from ..wan_core.loading.taehv import load_tiny_decoder

    stamp = host.fingerprint("vae_approx", name)
    if stamp in _refused:
        return None
    try:
        return load_tiny_decoder(host.model_path("vae_approx", name), channels)
    except (WanError, OSError, RuntimeError) as error:
        _refused.add(stamp)
        log.warning("Previews go on without the tiny decoder %s: %s", name, error)
        return None


_refused: set[tuple] = set()
