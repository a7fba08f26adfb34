"""Where a run's results go: checked before the work, and never lost once the work is done."""

from __future__ import annotations

import logging
import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import WanError
from .guard import first_line
from .hints import HINTS

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MADE_BY = "made_by"  # in the header of our safetensors files


@dataclass(frozen=True)
class Output:
    """The files of a run.

    Attributes:
        file: the video.
        tensors: 'latent' and 'video' too, if asked for.
        overwrite: replace files that are not ours.
        inputs: files that the run reads, and so must not replace.
    """

    file: Path
    tensors: Path | None = None
    overwrite: bool = False
    inputs: Sequence[Path] = field(default=())

    def check(self) -> None:
        """Before anything is loaded.

        Raises:
            WanError: an ending that is not known, a place that cannot be written to, or a file in the way.
        """
        from ..media.video import check_ending, check_writable, in_the_way

        check_ending(self.file)
        for target in filter(None, (self.file, self.tensors)):
            check_writable(target)
            if any(target.exists() and file.exists() and target.samefile(file) for file in self.inputs):
                raise WanError(f"{target} is what this run reads: choose another name to save under.")
        if self.tensors and self.tensors.absolute() == self.file.absolute():
            raise WanError(f"The video and the tensors cannot both be {self.file}: choose two names.")
        foreign = in_the_way(self.file)
        if self.tensors and self.tensors.exists() and not _is_ours(self.tensors):
            foreign.append(self.tensors)
        if foreign and not self.overwrite:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise WanError(
                f"{foreign[0]}{more} exists and was not saved by this program. Choose another name, or "
                "replace it with --overwrite."
            )

    def check_size(self, width: int, height: int, frames: int, latent: Sequence[int]) -> None:
        """Once the size is known.

        Raises:
            WanError: frames that the format cannot hold, or a disk without room for the tensors.
        """
        from ..media.video import check_ending, check_writable

        check_ending(self.file, width, height)
        if self.tensors:
            check_writable(self.tensors, 4 * (3 * frames * width * height + math.prod(latent)))

    def save(
        self, latent: Tensor, video: Iterator[Tensor], fps: float, notes: Mapping[str, str], how: str | None = None
    ) -> None:
        """Decode and write. The latent lies beside the video until that is whole.

        Args:
            latent: [C, T, h, w], normalised.
            how: the options that `decode` needs to find the VAE; None where the latent is in a file already.

        Raises:
            WanError: decoding or writing failed; tells where the latent is and how to decode it.
        """
        kept = keep_latent(latent, self.file, {**notes, "fps": f"{fps:g}"}) if how is not None else None
        try:
            written = self._write(latent, video, fps, notes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"Cancelled. {self._rescue(kept, how)}".strip()) from None
        except Exception as error:
            reason = (
                error.worded(HINTS) if isinstance(error, WanError) else f"{type(error).__name__}: {first_line(error)}"
            )
            raise WanError(
                f"The video could not be decoded and saved ({reason.rstrip('.')}). {self._rescue(kept, how)}".strip()
            ) from error
        if kept:
            kept.unlink(missing_ok=True)
        if self.tensors:
            print(f"Tensors: {self.tensors}")
        shown = f"{written[0]} to {written[-1].name}" if len(written) > 1 else str(written[0])
        print(f"Video: {shown}" + (f" (seed {notes['seed']})" if "seed" in notes else ""))

    def _write(self, latent: Tensor, video: Iterator[Tensor], fps: float, notes: Mapping[str, str]) -> list[Path]:
        from ..media.video import save_video

        if not self.tensors:
            return save_video(video, self.file, fps)
        chunks: list[Tensor] = []
        written = save_video(_gathered(video, chunks), self.file, fps)
        import torch

        save_tensors({"latent": latent, "video": torch.cat(chunks, dim=1)}, self.tensors, notes)
        return written

    def _rescue(self, kept: Path | None, how: str | None) -> str:
        if how is None:
            return ""
        if kept is None:
            return "The latent could not be kept either: run again with the same seed."
        return (
            f"The latent is in {kept}. To decode it: python -m wan_core decode {shlex.quote(str(kept))} {how} "
            f"--save_file {shlex.quote(str(self.file))}  (--vae_tile 256 takes less memory)"
        )


def keep_latent(latent: Tensor, file: Path, notes: Mapping[str, str]) -> Path | None:
    """Save a latent beside the video that is to come, or where there is room; None where there is none."""
    from ..files.atomic import beside

    for folder in (file.absolute().parent, Path(tempfile.gettempdir())):
        kept = beside(folder / file.name, ".latent.safetensors")
        try:
            save_tensors({"latent": latent}, kept, notes)
        except (OSError, WanError) as error:
            log.warning("The latent cannot be kept in %s: %s", folder, error)
            continue
        print(f"Latent: {kept} (until the video is saved)", flush=True)
        return kept
    return None


def save_tensors(tensors: Mapping[str, Tensor], file: Path, notes: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    from ..files.atomic import unfinished

    ready = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    with unfinished(file) as partial:
        save_file(ready, partial, metadata={MADE_BY: "wan_core", **notes})


def _is_ours(file: Path) -> bool:
    """A file of tensors whose header names us, or holds what ``--save_tensors`` writes and nothing else."""
    from safetensors import SafetensorError, safe_open

    with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as content:
        return MADE_BY in (content.metadata() or {}) or set(content.keys()) == {"latent", "video"}
    return False


def _gathered(chunks: Iterator[Tensor], into: list[Tensor]) -> Iterator[Tensor]:
    for chunk in chunks:
        into.append(chunk)
        yield chunk
