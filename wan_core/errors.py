"""The one exception that speaks to the user instead of to a programmer."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from enum import Enum

from .safe_text import safe_text


class Hint(Enum):
    """What a user can do about an error, where the words depend on who shows it: the command line names its flags,
    ComfyUI's nodes name nodes. The value is what is said where neither speaks; {details} are the error's.
    """

    RELOAD = "Load it again."
    LOAD_AS = "Load it as such."
    CHOOSE_BASE = "Choose the base model here."
    RUN_ELSEWHERE = "Use a program that runs it."
    RUN_BY_ITS_MAKERS = "Use the program that it was published with."
    OVERWRITE = "Name another place, or remove it first."
    FOLDER = "Expected the folder of a downloaded checkpoint."
    OTHER_TASK = "Download the rest, or choose another task."
    IMAGES = "Give a start image, an end image, or both. For text alone use a T2V model or TI2V-5B."
    BOTH_IMAGES = "Give both."
    NO_IMAGE = "Use an I2V model or TI2V-5B, or leave the image out."
    TEXT_ENCODER = "Use a umT5-XXL text encoder."
    LORA_HELD = "Apply the LoRA where the model is held."
    SWAP_HELD = "Whoever holds it offloads it."
    TRAIN_HELD = "Load its file here."
    ONE_EACH = "Give each expert by itself."
    ALONE = "Use it by itself."
    BAD_LATENT = "Check where it comes from."
    TARGET = "Expected a floating-point format, or another layout."
    WEIGHTS = "Give a checkpoint's folder, or each of its files."
    CLIP_WEIGHTS = "Give a checkpoint's folder, or each of its files, CLIP's too."
    CLIP = "Give its file."
    EXPERT = "Expected {experts}."
    TRAIN_TASK = "Choose its task."
    LANGUAGE_MODEL = "Put its folder where language models are looked for."
    SERVER_KEY = "Set the environment variable {variable}."
    PROCESSES = "Start several."
    NO_SHARDS = "Train it without sharding."
    CALIBRATE = "Or measure its own."
    CALIBRATE_AGAIN = "Measure it again, or remove it."


class WanError(ValueError):
    """A mistake the user can mend: the message says what was found, what was expected and what to do.

    The command line prints it without a traceback; ComfyUI shows it on the node. Both say the hint in words of their
    own (``worded``).

    Args:
        hint: what to do, where that is said differently by whoever shows the message.
        details: of the hint.
    """

    def __init__(self, problem: str, hint: Hint | None = None, **details: object) -> None:
        self.problem, self.hint, self.details = problem, hint, details
        super().__init__(self.worded({}))

    def worded(self, words: Mapping[Hint, str]) -> str:
        """The problem and what to do, by words for some of the hints."""
        if self.hint is None:
            return self.problem
        return f"{self.problem} {words.get(self.hint, self.hint.value).format_map(self.details)}"

    def __reduce__(self) -> tuple:
        return _again, (type(self), self.problem, self.hint, self.details)


def _again(kind: type[WanError], problem: str, hint: Hint | None, details: dict[str, object]) -> WanError:
    return kind(problem, hint, **details)


# Beside Python's and PyTorch's own errors: what allocators of devices and of the CPU say in a RuntimeError, and what
# mapping a file says in an OSError that has lost its number.
_RAN_OUT = (
    "out of memory",
    "out_of_memory",
    "out_of_device_memory",
    "out_of_host_memory",
    "status_alloc_failed",
    "not enough memory",
    "not enough gpu video memory",
    "can't allocate memory",
    "cannot allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine had too little memory.

    By names and words, without PyTorch: not every kind of device has the error that PyTorch has for it.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = safe_text(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(words in said for words in _RAN_OUT)
