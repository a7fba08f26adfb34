"""Whether the parts of a model belong together."""

from __future__ import annotations

from ..config import VAES, Variant
from ..errors import WanError
from ..models.dit.features.clip_tokens import ClipTokensConfig
from .clip import ClipFile
from .dit import DiTFile
from .text import TextFile
from .vae import VAEFile


def check_compatible(
    variant: Variant, dit: DiTFile, vae: VAEFile, text: TextFile, clip: ClipFile | None = None
) -> None:
    """
    Args:
        variant: what the transformer is taken for.
        clip: None where there is none.

    Raises:
        WanError: a VAE of another kind, or a text encoder or a CLIP of another width.
    """
    if vae.config.kind != variant.vae:
        raise WanError(
            f"{vae.path} is a {vae.config.kind} VAE, but {variant.display_name} needs {variant.vae} "
            f"({VAES[variant.vae].checkpoint})."
        )
    if text.config.dim != dit.config.text_dim:
        raise WanError(
            f"{text.path} gives embeddings {text.config.dim} wide, but {dit.path} takes "
            f"{dit.config.text_dim}. Use the text encoder of the same model."
        )
    heard = dit.config.feature(ClipTokensConfig)
    if clip and heard and clip.config.dim != heard.width:
        raise WanError(
            f"{clip.path} gives CLIP tokens {clip.config.dim} wide, but {dit.path} takes {heard.width}: use the CLIP "
            "of the same model."
        )
