"""Whether files are still what their headers said: mapped weights of a replaced or truncated file are wrong or gone."""

from __future__ import annotations

from typing import Any, Protocol

from ..mapped import changed
from .checkpoint import Checkpoint


class HeaderRead(Protocol):
    """What reading a header leaves behind."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Of the files when the header was read."""


def check_unchanged(file: HeaderRead) -> None:
    """Refuse a file that was replaced, truncated or removed after its header was read.

    Reading a mapped page past the new end of a file would kill the process, so this is asked before every read. What
    changes beside the files, such as a config, does not concern weights that are being read.

    Raises:
        WanError: it was.
    """
    try:
        same = set(file.checkpoint.state_of_files) <= set(file.fingerprint)
    except OSError:
        same = False
    if not same:
        raise changed(file.checkpoint.path)
