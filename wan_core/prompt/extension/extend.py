"""Prompt extension from beginning to end: asked once for each input, and never in the way of the video."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import WanError
from ...lookup import look_up
from ..compose import has_chinese
from . import KEEP, ON_FAILURE, STOP
from .answer import prompt_of
from .instructions import LANGUAGES, instructions, no_words
from .picture import encoded
from .question import AnswerFailed, Check, Method, Question

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

_KEPT = 64  # answers, of a few kilobytes each
_LONGEST = 10_000  # characters of a prompt that is sent; what is longer needs no extension


@dataclass(frozen=True)
class Extended:
    """
    Attributes:
        prompt: to make the video of: the extended one, or the given one where that failed.
        notes: what is to be said of it.
        failed: whether it is the given one.
    """

    prompt: str
    notes: tuple[str, ...] = ()
    failed: bool = False


class PromptExtender:
    """Asks language models, and owns the last answers of its process: the same question is not asked twice.

    Whoever runs the program holds one. Of several processes that make one video only the first asks: ``extend`` depends
    on its arguments alone, and its result is plain text that can be sent to the others.

    Attributes:
        failures: how many questions to a method failed, by its identity; whoever remembers results asks again when
            it has grown.
    """

    def __init__(self, kept: int = _KEPT):
        self.failures: Counter[tuple[str, ...]] = Counter()
        self._kept = kept
        self._answers: OrderedDict[str, tuple[str, tuple[str, ...]]] = OrderedDict()
        self._lock = threading.Lock()

    def extend(
        self,
        method: Method,
        prompt: str,
        *,
        pictures: Sequence[Image] = (),
        language: str = "auto",
        seed: int = 0,
        on_failure: str = KEEP,
        check: Check = lambda: None,
    ) -> Extended:
        """
        Args:
            pictures: none for text to video; the first frame; the first and the last frame.
            language: of the extended prompt, "en" or "zh"; "auto": Chinese when the given one contains Chinese.
            seed: for the model, and one more answer for each.
            on_failure: "keep prompt" gives the given prompt back with a note, "stop" raises.
            check: called often while waiting; raises to cancel.

        Raises:
            WanError: nothing to extend; a method that cannot be asked; a failure, where that is to stop.
        """
        question, language = _question(prompt, pictures, language, seed)
        look_up(dict.fromkeys(ON_FAILURE), on_failure, "choice for a failure")
        method.check()
        if len(prompt) > _LONGEST:
            return self._failed(method, prompt, f"it has {len(prompt)} characters already", on_failure)
        key = _key(question, method, language)
        with self._lock:
            known = self._answers.get(key)
        if known is not None:
            return Extended(*known)
        try:
            text, notes = prompt_of(method.ask(question, check), language)
        except AnswerFailed as error:
            return self._failed(method, prompt, str(error), on_failure)
        self._keep(key, text, tuple(notes))
        return Extended(text, tuple(notes))

    def _keep(self, key: str, text: str, notes: tuple[str, ...]) -> None:
        with self._lock:
            self._answers[key] = text, notes
            while len(self._answers) > self._kept:
                self._answers.popitem(last=False)

    def _failed(self, method: Method, prompt: str, reason: str, on_failure: str) -> Extended:
        self.failures[method.identity] += 1
        said = f"The prompt could not be extended: {reason.rstrip('.。 ')}."
        if on_failure == STOP:
            raise WanError(said)
        if not prompt.strip():
            raise WanError(f"{said} There is no prompt to go on with: write one.")
        log.warning("%s The prompt is used as it was given.", said)
        return Extended(prompt, (f"{said} The prompt is used as it was given.",), failed=True)


def _question(prompt: str, pictures: Sequence[Image], language: str, seed: int) -> tuple[Question, str]:
    """The question and its language."""
    if language == "auto":
        language = "zh" if has_chinese(prompt) else "en"
    look_up(dict.fromkeys(LANGUAGES), language, "language of a prompt")
    empty = not prompt.strip()
    if empty and not pictures:
        raise WanError("There is nothing to extend: write a prompt, give a picture, or both.")
    told = instructions(len(pictures), language, empty=empty)
    text = no_words(language) if empty else prompt.strip()
    return Question(told, text, tuple(map(encoded, pictures)), max(seed, 0)), language


def _key(question: Question, method: Method, language: str) -> str:
    """What an answer depends on; a key of a server is no part of it."""
    pictures = [hashlib.sha256(picture).hexdigest() for picture in question.pictures]
    parts = [*method.identity, language, question.instructions, question.text, question.seed, pictures]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
