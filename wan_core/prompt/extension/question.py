"""What a language model is asked, and how it fails to answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Check = Callable[[], None]  # called often while something is waited for; raises to cancel


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        instructions: the system's message.
        text: the user's message, never empty.
        pictures: JPEG files: the first frame, and perhaps the last.
        seed: 0 or more.
    """

    instructions: str
    text: str
    pictures: tuple[bytes, ...]
    seed: int


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        text: as the model wrote it.
        ended: False where a limit of tokens cut it.
    """

    text: str
    ended: bool = True


class AnswerFailed(Exception):
    """No usable answer came, though nothing about the question is wrong: the prompt may stay as it was.

    The text is shown and logged: it never holds a key.
    """


class Method(Protocol):
    """A way to ask a language model."""

    @property
    def identity(self) -> tuple[str, ...]:
        """What answers depend on beside the question: the address, the model."""

    def check(self) -> None:
        """
        Raises:
            WanError: it cannot be asked at all: a key, a model or a library is missing.
        """

    def ask(self, question: Question, check: Check) -> Answer:
        """
        Raises:
            AnswerFailed: nothing usable came back.
        """
