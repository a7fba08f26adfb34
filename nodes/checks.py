"""One check of a node's values against its schema: type, range, choices, sockets. It knows no node."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from comfy_api.latest import io

from ..wan_core.errors import WanError
from ..wan_core.lookup import look_up
from ..wan_core.recipe import ModelRecipe

_LONGEST_TEXT = 1_000_000  # characters of a prompt
_LONGEST_NAME = 1_000  # of a choice or a name


def check_values(
    inputs: Iterable[io.Input], values: Mapping[str, object], *, named: Collection[str] = (), complete: bool = False
) -> None:
    """
    Args:
        inputs: of a schema.
        values: by name; None stands for what is not known yet.
        named: choices of files and folders, of which only the type is looked at: the node says better what is missing.
        complete: whether all is known, because the node is about to run.

    Raises:
        WanError: a value of another type, out of range, or none of the choices; or none at all.
    """
    for known in inputs:
        value = values.get(known.id)
        if value is not None:
            _check(known, value, known.id in named)
        elif complete and not known.optional:
            raise WanError(f"{known.id} has no value: set it, or connect a node that gives one.")


def _check(known: io.Input, value: object, named: bool) -> None:
    if isinstance(known, io.Combo.Input):
        _check_choice(known, value, named)
    elif isinstance(known, (io.Int.Input, io.Float.Input)):
        _check_number(known, value)
    elif isinstance(known, io.String.Input):
        _check_text(known, value)
    elif isinstance(known, io.Boolean.Input):
        if not isinstance(value, bool):
            raise WanError(f"{known.id} is {_short(value)}: expected true or false.")
    elif not _SOCKETS.get(known.get_io_type(), _is_object)(value):
        raise WanError(f"{known.id} is {_short(value)}: expected what a node gives. Connect one to this input.")


# --- widgets


def _check_choice(known: io.Combo.Input, value: object, named: bool) -> None:
    if not isinstance(value, str) or len(value) > _LONGEST_NAME:
        raise WanError(f"{known.id} is {_short(value)}: expected one of its choices.")
    if value in known.options:
        return  # also a file whose name no encoding can hold: it is there
    check_characters(known.id, value)
    if not named:
        look_up(dict.fromkeys(known.options), value, known.id)


def _check_number(known: io.Int.Input | io.Float.Input, value: object) -> None:
    whole = isinstance(known, io.Int.Input)
    if not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise WanError(f"{known.id} is {_short(value)}: expected a {'whole ' if whole else ''}number.")
    if not known.min <= value <= known.max:  # so written, NaN is refused
        raise WanError(f"{_said(known.id, value)}: expected {_range(known, value)}.{_nearest(known, value)}")


def _said(name: str, value: object) -> str:
    """ "0 steps", "The shift is 0.0"."""
    return f"{_short(value)} {name}" if name.endswith("s") else f"The {name} is {_short(value)}"


def _range(known: io.Int.Input | io.Float.Input, value: numbers.Real) -> str:
    positive = "a number above 0, " if value <= 0 < known.min and not isinstance(known, io.Int.Input) else ""
    multiple = f", a multiple of {known.step}" if _in_steps(known) else ""
    return f"{positive}at least {known.min} and at most {known.max}{multiple}"


def _nearest(known: io.Int.Input | io.Float.Input, value: numbers.Real) -> str:
    return f" The nearest is {known.min if value < known.min else known.max}." if value == value else ""


def _in_steps(known: io.Int.Input | io.Float.Input) -> bool:
    return isinstance(known, io.Int.Input) and (known.step or 1) > 1 and known.min % known.step == 0


def _check_text(known: io.String.Input, value: object) -> None:
    if not isinstance(value, str):
        raise WanError(f"{known.id} is {_short(value)}: expected text.")
    longest = _LONGEST_TEXT if known.multiline else _LONGEST_NAME
    if len(value) > longest:
        raise WanError(f"{known.id} has {len(value)} characters: expected at most {longest}.")
    check_characters(known.id, value, lines=known.multiline)


def check_characters(name: str, text: str, *, lines: bool = False) -> None:
    """
    Args:
        lines: whether line breaks and tabs may be there.

    Raises:
        WanError: half of a surrogate pair, which no file and no tokenizer can hold, or a control character.
    """
    for place, character in enumerate(text):
        code = ord(character)
        if 0xD800 <= code <= 0xDFFF:
            raise WanError(
                f"{name} holds half of a character (U+{code:04X}) at place {place + 1}, as when an emoji is "
                "cut in two: type that place again."
            )
        if code < 0x20 and not (lines and character in "\t\n\r\f\v"):
            raise WanError(f"{name} holds a control character (U+{code:04X}) at place {place + 1}: remove it.")


def _short(value: object) -> str:
    return reprlib.repr(value)


# --- sockets


def _is_object(value: object) -> bool:
    """Whether a node made it: what is typed into a prompt is text, a number, a list or a dictionary."""
    return not isinstance(value, (str, numbers.Number, list, dict))


def _is_latent(value: object) -> bool:
    return isinstance(value, Mapping) and torch.is_tensor(value.get("samples"))


def _is_conditioning(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(
            isinstance(entry, (list, tuple))
            and len(entry) == 2
            and torch.is_tensor(entry[0])
            and isinstance(entry[1], Mapping)
            for entry in value
        )
    )


_SOCKETS: dict[str, Callable[[object], bool]] = {
    "WAN_MODEL": lambda value: isinstance(value, ModelRecipe),
    "LATENT": _is_latent,
    "CONDITIONING": _is_conditioning,
    "IMAGE": torch.is_tensor,
    "SIGMAS": torch.is_tensor,
}
