"""Reading a file before it is needed, so that the system has it at hand; nothing is kept in memory of our own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

_AT_ONCE = 8 * 1024**2
_OF_AVAILABLE = 0.5  # how much of the memory that is free may be filled with it


class ReadAhead:
    """One file set at a time, in a thread; what has been read once is not read again."""

    def __init__(self) -> None:
        self._files: tuple[Path, ...] = ()
        self._stop = threading.Event()
        self.thread: threading.Thread | None = None

    def begin(self, files: Sequence[Path]) -> None:
        if tuple(files) == self._files:
            return
        self.stop()
        self._files, self._stop = tuple(files), threading.Event()
        self.thread = threading.Thread(target=_read, args=(self._files, self._stop), name="wan-read-ahead", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._files = ()


def _read(files: Sequence[Path], stop: threading.Event) -> None:
    left = int(psutil.virtual_memory().available * _OF_AVAILABLE)
    buffer = bytearray(_AT_ONCE)
    for path in files:
        try:
            with path.open("rb", buffering=0) as file:
                while left > 0 and not stop.is_set() and (count := file.readinto(buffer)):
                    left -= count
        except OSError:  # whoever needs the file will say what is wrong with it
            return
