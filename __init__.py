"""The ComfyUI node pack. ComfyUI imports this file; the nodes themselves are imported only when it asks for them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import WanCoreExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> WanCoreExtension:
    """The pack's nodes, for ComfyUI. Logs the traceback of a failure, of which ComfyUI itself prints one line."""
    try:
        from .nodes import WanCoreExtension
        from .nodes.logs import make_log_safe

        make_log_safe(__name__)
    except Exception:
        logging.exception("The Wan2.2 nodes could not be loaded")
        raise
    return WanCoreExtension()
