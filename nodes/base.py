"""What every node of the pack has in common: its inputs are checked, and nothing but a readable error leaves it.

ComfyUI checks no range of an input that ``validate_inputs`` names, none of what comes through a link, and no number
that is not one (NaN); its worker ends for good on an exception that is none of ``Exception``, or on a message that
cannot be written as UTF-8. So each node derives from ``WanNode``.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import comfy.model_management as management
from comfy_api.latest import io

from ..wan_core.errors import WanError, is_out_of_memory
from ..wan_core.safe_text import safe_text
from .checks import check_values
from .hints import worded

log = logging.getLogger(__name__)

_GUARDED = ("execute", "fingerprint_inputs")

Class = TypeVar("Class", bound=type)


class WanNode(io.ComfyNode):
    """A node whose values are checked against its schema: when it is queued, and again when it runs.

    Subclasses write ``check_inputs`` instead of ``validate_inputs``, with the inputs they want to look at. It must be
    quick, because it runs in the web server's loop, and raises `WanError`. An input that comes through a link is None
    when the graph is queued.
    """

    files: ClassVar[tuple[str, ...]] = ()  # inputs that choose a file or folder, which ``check_inputs`` looks for

    if TYPE_CHECKING:  # each node has inputs of its own
        check_inputs: ClassVar[Callable[..., None]]
    else:

        @classmethod
        def check_inputs(cls) -> None:
            """What a node's own inputs cannot be together. Ranges and choices have been checked before."""

    @classmethod
    def validate_inputs(cls, **inputs: object) -> bool:
        """ComfyUI's check when the graph is queued. It raises: a returned text would be repeated for each input."""
        with readable_errors():
            check(cls, inputs)
        return True

    def __init_subclass__(cls, **options: object) -> None:
        """Wrap what ComfyUI calls. ComfyUI derives a copy of the class for each call, which is wrapped already."""
        super().__init_subclass__(**options)
        for name in _GUARDED:
            own = cls.__dict__.get(name)
            if isinstance(own, classmethod) and not hasattr(own.__func__, "guarded"):
                setattr(cls, name, classmethod(_checked(own.__func__) if name == "execute" else guarded(own.__func__)))


def check(node: type[WanNode], inputs: Mapping[str, object], *, complete: bool = False) -> None:
    """
    Args:
        complete: whether all values are known, because the node is about to run.

    Raises:
        WanError: a value outside of what the schema says, or what ``check_inputs`` finds.
    """
    check_values(node.define_schema().inputs, inputs, named=node.files, complete=complete)
    wanted = inspect.signature(node.check_inputs).parameters
    absent = {name for name, parameter in wanted.items() if parameter.default is parameter.empty} - inputs.keys()
    node.check_inputs(**{name: inputs[name] for name in wanted if name in inputs}, **dict.fromkeys(absent))


def _checked(execute: Callable[..., Any]) -> Callable[..., Any]:
    """A node's ``execute`` that looks at its values first: those that came through links are known only now."""

    @functools.wraps(execute)
    def run(cls: type[WanNode], **inputs: object) -> Any:
        with readable_errors():
            check(cls, inputs, complete=True)
            return execute(cls, **inputs)

    return _marked(run)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, from which nothing but readable errors and cancelling come."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        with readable_errors():
            return function(*args, **options)

    return _marked(run)


def _marked(function: Any) -> Any:
    function.guarded = True
    return function


def guarded_methods(*names: str) -> Callable[[Class], Class]:
    """For the objects on sockets, whose methods ComfyUI's own nodes call."""

    def wrap(cls: Class) -> Class:
        for name in names:
            setattr(cls, name, guarded(cls.__dict__[name]))
        return cls

    return wrap


# --- errors


@contextmanager
def readable_errors() -> Iterator[None]:
    """Whatever goes wrong inside becomes a `WanError` with a text that can be written and shown.

    Cancelling passes, and Ctrl+C where it ends the program. ``SystemExit`` does not: a library that wants to end the
    program would end ComfyUI's worker. The traceback is kept, the chain of causes is not: their texts are not safe.
    """
    try:
        yield
    except (management.InterruptProcessingException, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        _leave(error)


def _leave(error: BaseException) -> NoReturn:
    text, traceback = _text_of(error), error.__traceback__
    if is_out_of_memory(error):
        _free()
    raise WanError(safe_text(text)).with_traceback(traceback) from None


def _text_of(error: BaseException) -> str:
    if isinstance(error, WanError):
        return safe_text(worded(error))
    said = safe_text(error)
    if is_out_of_memory(error):
        first = said.partition("\n")[0]
        return (
            f"Memory ran out ({first or type(error).__name__}). Choose a smaller size, fewer frames or a smaller "
            "batch, use Wan Block Swap, or close other programs."
        )
    if isinstance(error, RecursionError):
        return "Something is nested too deeply to be read (RecursionError). Look at the inputs of this node."
    if isinstance(error, OSError):
        return f"A file or device could not be used: {said}."
    return (
        f"Unexpected {type(error).__name__}: {said or '(no text)'}\nThis is a fault of the Wan nodes or of a "
        "library they use: please report it with ComfyUI's log."
    )


def _free() -> None:
    """As ComfyUI does after such an error of its own type."""
    log.error("Memory ran out: all loaded models are unloaded.")
    management.unload_all_models()
