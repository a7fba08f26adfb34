"""The one socket that ComfyUI has no type for."""

from __future__ import annotations

from comfy_api.latest import io

WanModel = io.Custom("WAN_MODEL")  # carries wan_core.recipe.ModelRecipe
