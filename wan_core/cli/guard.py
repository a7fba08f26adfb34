"""What stands between a command and its user: every failure in words, none as Python's traceback."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from ..errors import WanError, is_out_of_memory
from .hints import HINTS

MISTAKE, FAILURE, CANCELLED = 2, 1, 130


def guarded(work: Callable[[], int | None], *, debug: bool = False, cancelled: str = "Cancelled.") -> int:
    """Do the work and return the exit code; what went wrong is told on stderr.

    Args:
        debug: show Python's traceback of an error that is none of the user's making; else it goes to a file.
        cancelled: what Ctrl-C is answered with.
    """
    with _patient_streams():
        try:
            return work() or 0
        except WanError as error:
            _say(f"Error: {error.worded(HINTS)}")
            if debug:
                traceback.print_exc()
            return MISTAKE
        except KeyboardInterrupt as error:
            _say(str(error) or cancelled)
            return CANCELLED
        except (SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a panic in a Rust library is no Exception
            if debug:
                traceback.print_exc()
            words, code = _in_words(error)
            _say(f"Error: {words}" if code == MISTAKE or debug else f"Error: {words} {_logged()}")
            return code


def _in_words(error: BaseException) -> tuple[str, int]:
    """What is told of an error that nobody foresaw, and whether its cause is the machine or us."""
    if is_out_of_memory(error):
        return (
            "The memory ran out. Choose a smaller size or fewer frames, set a memory limit, or close other programs."
        ), MISTAKE
    if isinstance(error, OSError) and error.strerror:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{names or 'The system'}: {error.strerror}.", MISTAKE
    return f"Something unforeseen happened ({type(error).__name__}: {first_line(error)}).", FAILURE


def first_line(error: BaseException, most: int = 200) -> str:
    return (str(error).splitlines() or [""])[0][:most]


def _logged() -> str:
    """Where the traceback of the current exception lies."""
    try:
        name = f"wan_core-error-{datetime.now():%Y%m%d-%H%M%S}-"
        number, file = tempfile.mkstemp(prefix=name, suffix=".log")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as out:
            traceback.print_exc(file=out)
    except OSError:
        return "The same command with --debug shows where."
    return f"Where, for a report: {Path(file)}, or the same command with --debug."


def _say(text: str) -> None:
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def _patient_streams() -> Iterator[None]:
    """Words for a terminal that is gone are dropped, and letters it does not know are spelled out: neither ends the
    work, whose result is a file."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Patient(stream) for stream in before)
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        sys.stdout, sys.stderr = before


class _Patient:
    """A text stream that never fails."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        fit = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._try(lambda stream: stream.write(fit))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        with suppress(AttributeError, OSError, ValueError):
            return self.stream is not None and self.stream.isatty()
        return False

    def _try(self, act: Callable[[TextIO], object]) -> None:
        if self.stream is None:
            return
        try:
            act(self.stream)
        except (OSError, ValueError):  # a closed pipe, a full disk, a closed file
            self._give_up(self.stream)

    def _give_up(self, stream: TextIO) -> None:
        """Python writes out what is left when it ends, and must not fail then either."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        self.stream = None
