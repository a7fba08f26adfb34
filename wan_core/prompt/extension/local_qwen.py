"""Qwen on this machine, through transformers: loaded for one question, and let go after it."""

from __future__ import annotations

import gc
import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...errors import Hint, WanError
from ...safe_text import safe_text
from .question import Answer, AnswerFailed, Check, Question

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

# The official script's names, and what they stand for. The first of each list that there is answers where none is
# named; the official script takes the first only.
HUB = {
    "Qwen2.5_14B": "Qwen/Qwen2.5-14B-Instruct",
    "Qwen2.5_7B": "Qwen/Qwen2.5-7B-Instruct",
    "Qwen2.5_3B": "Qwen/Qwen2.5-3B-Instruct",
    "QwenVL2.5_7B": "Qwen/Qwen2.5-VL-7B-Instruct",
    "QwenVL2.5_3B": "Qwen/Qwen2.5-VL-3B-Instruct",
}
FOR_TEXT = ("Qwen2.5_14B", "Qwen2.5_7B", "Qwen2.5_3B")
FOR_PICTURES = ("QwenVL2.5_7B", "QwenVL2.5_3B")
_MOST_TOKENS = 512  # of an answer, as in the official script
_WEIGHTS = "*.safetensors"


class Place(NamedTuple):
    """Where a model runs and in which format."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class LocalQwen:
    """A model of Qwen's, or any other chat model of transformers, in a folder.

    Attributes:
        model: a folder, a name of ``HUB``, or a name on Hugging Face; "": the first official one that is found.
        find: name -> the folder of its files; None where it is not there.
        place: bytes of the weights -> where there is room for them; it may make room first.
        pictures: whether the question will have some, for which another model is needed.
        seconds: for the answer, loading not counted.
    """

    model: str
    find: Callable[[str], Path | None]
    place: Callable[[int], Place]
    pictures: bool = False
    seconds: float = 300.0

    @property
    def identity(self) -> tuple[str, ...]:
        return "local_qwen", self.model

    def check(self) -> None:
        """
        Raises:
            WanError: transformers is missing.
        """
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise WanError("local_qwen needs the package transformers: pip install transformers.") from None

    def folder(self) -> Path:
        """
        Raises:
            WanError: the model is not there.
        """
        names = [self.model] if self.model else list(FOR_PICTURES if self.pictures else FOR_TEXT)
        for name in names:
            if found := self.find(HUB.get(name, name)):
                return found
        wanted = [HUB.get(name, name) for name in names]
        smallest = {"name": wanted[-1], "folder": wanted[-1].rpartition("/")[2]}
        raise WanError(f"There is no language model {' or '.join(wanted)} here.", Hint.LANGUAGE_MODEL, **smallest)

    def ask(self, question: Question, check: Check) -> Answer:
        """
        Raises:
            WanError: the model is not there.
            AnswerFailed: it cannot be loaded or run, or takes too long.
        """
        folder, cancelled = self.folder(), []

        def noted() -> None:
            try:
                check()
            except BaseException as error:
                cancelled.append(error)
                raise

        noted()
        try:
            return self._ask(folder, question, noted)
        except (WanError, AnswerFailed):
            raise
        except Exception as error:  # of transformers, of the files, of the model: each has its own
            if error in cancelled:
                raise
            raise AnswerFailed(f"{folder.name} could not be run ({_first_line(error)})") from error
        finally:
            gc.collect()

    def _ask(self, folder: Path, question: Question, check: Check) -> Answer:
        place = self.place(weight_bytes(folder))
        log.info("Extending the prompt with %s on %s.", folder.name, place.device)
        chat = _Pictures(folder, place) if question.pictures else _Words(folder, place)
        check()
        inputs = chat.inputs(question).to(place.device)
        return chat.answer(inputs, question.seed, _Watch(check, time.monotonic() + self.seconds, self.seconds))


def _first_line(error: Exception) -> str:
    first = (safe_text(error, 200).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def weight_bytes(folder: Path) -> int:
    """Of the files of a model.

    Raises:
        AnswerFailed: there are none in safetensors: pickles of a folder that came from anywhere are not opened.
    """
    files = list(folder.glob(_WEIGHTS))
    if not files:
        raise AnswerFailed(f"{folder.name} holds no {_WEIGHTS}")
    return sum(file.stat().st_size for file in files)


class _Words:
    """A model of text alone."""

    def __init__(self, folder: Path, place: Place):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **_TRUSTED)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **_weights(place))
        self.model = model.to(place.device).eval()

    def inputs(self, question: Question) -> Any:
        messages = [{"role": "system", "content": question.instructions}, {"role": "user", "content": question.text}]
        chat = self.tokenizer.apply_chat_template(messages, enable_thinking=False, **_CHAT)  # where a model can
        return self.tokenizer([chat], return_tensors="pt")

    def answer(self, inputs: Any, seed: int, watch: _Watch) -> Answer:
        from transformers import StoppingCriteriaList

        with torch.inference_mode(), _seeded(seed, self.model.device):
            ids = self.model.generate(
                **inputs, max_new_tokens=_MOST_TOKENS, stopping_criteria=StoppingCriteriaList([watch])
            )
        new = ids[0, inputs["input_ids"].shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return Answer(text, ended=len(new) < _MOST_TOKENS)


class _Pictures(_Words):
    """A model that sees."""

    def __init__(self, folder: Path, place: Place):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder, **_TRUSTED)
        self.tokenizer = self.processor.tokenizer
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, **_weights(place))
        self.model = model.to(place.device).eval()

    def inputs(self, question: Question) -> Any:
        pictures = [_opened(picture) for picture in question.pictures]
        user = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question.text}]
        messages = [
            {"role": "system", "content": [{"type": "text", "text": question.instructions}]},
            {"role": "user", "content": user},
        ]
        chat = self.processor.apply_chat_template(messages, **_CHAT)
        return self.processor(text=[chat], images=pictures, return_tensors="pt")


_CHAT = {"tokenize": False, "add_generation_prompt": True}
# No code of a model's folder runs, and nothing is fetched.
_TRUSTED = {"trust_remote_code": False, "local_files_only": True}


def _weights(place: Place) -> dict[str, Any]:
    from transformers import __version__

    dtype = "dtype" if int(__version__.partition(".")[0]) >= 5 else "torch_dtype"
    return {**_TRUSTED, "use_safetensors": True, dtype: place.dtype}


def _opened(picture: bytes) -> Image:
    from PIL import Image as images

    return images.open(io.BytesIO(picture)).convert("RGB")


class _Watch:
    """Looks between tokens whether the user has cancelled, or the time is up: transformers' stopping criterion."""

    def __init__(self, check: Check, end: float, seconds: float):
        self.check, self.end, self.seconds = check, end, seconds

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.check()
        if time.monotonic() > self.end:
            raise AnswerFailed(f"the language model did not finish within {self.seconds:g} seconds")
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The random numbers of a seed, in a generation that takes no generator; those of everything else stay."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        yield


# --- where models lie


def in_cache(name: str) -> Path | None:
    """The folder of a model of Hugging Face's that was fetched before; nothing is fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return None


def fetched(name: str) -> Path | None:
    """As ``in_cache``, but fetched where it is not there, as the official script does: many gigabytes.

    Raises:
        AnswerFailed: it could not be fetched.
    """
    if found := in_cache(name):
        return found
    from huggingface_hub import snapshot_download

    log.info("Fetching %s from Hugging Face.", name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:  # the library raises its own, the network's and the HTTP library's
        raise AnswerFailed(f"{name} could not be fetched ({_first_line(error)})") from None
