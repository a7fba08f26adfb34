"""The pack's log: what it says of files and prompts reaches ComfyUI's log, and its terminal in the browser, as text."""

from __future__ import annotations

import logging
import traceback

from ..wan_core.safe_text import safe_text


def make_log_safe(package: str) -> None:
    """From now on every record of the package's loggers passes through ``safe_text`` on its way to the others."""
    logger = logging.getLogger(package)
    if not any(isinstance(handler, SafeRecords) for handler in logger.handlers):
        logger.addHandler(SafeRecords())
        logger.propagate = False


class SafeRecords(logging.Handler):
    """Hands records on to the root's handlers, with nothing in them that a terminal obeys or UTF-8 cannot hold."""

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = safe_text(record.getMessage()), None
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = safe_text("".join(traceback.format_exception(*record.exc_info)).rstrip(), 20_000)
        logging.getLogger().callHandlers(record)
