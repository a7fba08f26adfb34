"""What a transformer is, from its keys and shapes: every family of Wan's that is known, in the order of decision.

A family is recognised by layers that only it has; where two share them, by their channels. What shapes cannot tell,
such as Wan2.1's T2V-14B from one expert of T2V-A14B, is chosen among ``config.candidates``. Keys are the official ones,
whatever the file calls them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import PATCH
from ..errors import Hint, WanError

Shapes = Mapping[str, tuple[int, ...]]
Metadata = Mapping[str, str]


@dataclass(frozen=True)
class Facts:
    """What the decision looks at."""

    shapes: Shapes
    metadata: Metadata

    def has(self, *keys: str) -> bool:
        return all(key in self.shapes for key in keys)

    def begins(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.shapes)

    @property
    def channels(self) -> tuple[int, int]:
        """Into the network and out of it; 0 where the layer is missing."""
        into = self.shapes.get("patch_embedding.weight", ())
        out = self.shapes.get("head.head.weight", ())
        return (into[1] if len(into) > 1 else 0), (out[0] // (PATCH[0] * PATCH[1] * PATCH[2]) if out else 0)

    @property
    def clip(self) -> bool:
        return self.has("img_emb.proj.0.weight")

    @property
    def reference(self) -> bool:
        return self.has("ref_conv.weight")


@dataclass(frozen=True)
class Family:
    """One row of the decision.

    Attributes:
        name: as its makers call it.
        shows: whether a file's facts are this family's, given that no row above is.
        runs: whether this version computes it.
        hint, patch: what to do where it does not; a patch is no model of its own, and this is what it goes beside.
    """

    name: str
    shows: Callable[[Facts], bool]
    runs: bool = False
    hint: Hint = Hint.RUN_ELSEWHERE
    patch: str = ""

    def refuse(self, found: str) -> WanError:
        """What to say of a file that is this family's; ``found`` begins the message."""
        if self.patch:
            return WanError(f"{found}. It is no model of its own: it goes beside {self.patch}.")
        return WanError(f"{found}.", self.hint, family=self.name)


def _channels(into: int, out: int, *, clip: bool = False) -> Callable[[Facts], bool]:
    return lambda facts: facts.channels == (into, out) and facts.clip == clip


def _is_animate_2(facts: Facts) -> bool:
    """Its keys and shapes are those of I2V-14B; only the header's configuration tells."""
    try:
        return json.loads(facts.metadata.get("config", ""))["transformer"]["model_type"] == "animate2"
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


_SELF_ATTENTION = "blocks.0.self_attn.q.weight"

FAMILIES: tuple[Family, ...] = (
    Family("a VACE module", lambda f: f.has("vace_patch_embedding.weight") and not f.has(_SELF_ATTENTION),
           patch="a T2V model of the same width"),
    Family("VACE", lambda f: f.has("vace_patch_embedding.weight")),
    Family("Wan2.1 Fun Control-Camera", lambda f: f.has("control_adapter.conv.weight") and f.clip),
    Family("Wan2.2 Fun Control-Camera", lambda f: f.has("control_adapter.conv.weight")),
    Family("Wan2.2 S2V (speech)", lambda f: f.has("casual_audio_encoder.encoder.final_linear.weight")),
    Family("HuMo", lambda f: f.has("audio_proj.audio_proj_glob_1.layer.bias")),
    Family("Wan2.2 Animate", lambda f: f.has("face_adapter.fuser_blocks.0.k_norm.weight")),
    Family("SCAIL-2", lambda f: f.has("patch_embedding_mask.weight")),
    Family("SCAIL", lambda f: f.has("patch_embedding_pose.weight")),
    Family("Wan-Dancer", lambda f: f.has("patch_embedding_global.weight")),
    Family("ReCamMaster", lambda f: f.has("blocks.0.cam_encoder.weight", "blocks.0.projector.weight"),
           hint=Hint.RUN_BY_ITS_MAKERS),
    Family("SteadyDancer", lambda f: f.has("patch_embedding_fuse.weight") or f.begins("condition_embedding_spatial."),
           hint=Hint.RUN_BY_ITS_MAKERS),
    Family("Wan-Animate-2", _is_animate_2),
    Family("Wan2.1 FLF2V", lambda f: f.has("img_emb.emb_pos") and f.channels == (36, 16), runs=True),
    Family("Wan2.1 I2V", _channels(36, 16, clip=True), runs=True),
    Family("Wan2.1 Fun Control V1.1", lambda f: f.channels == (48, 16) and f.clip and f.reference),
    Family("Wan2.1 Fun Control", _channels(48, 16, clip=True)),
    Family("Wan2.2 TI2V-5B", _channels(48, 48), runs=True),
    Family("Wan2.2 Fun-5B-InP", _channels(100, 48)),
    Family("Wan2.2 Fun-5B-Control", _channels(148, 48)),
    Family("Wan2.2 Fun-A14B-Control", _channels(52, 16)),
    Family("T2V", lambda f: f.channels == (16, 16) and not f.clip and not f.reference, runs=True),
    Family("Wan2.2 I2V", lambda f: f.channels == (36, 16) and not f.clip and not f.reference, runs=True),
)  # fmt: skip

# Files that lie where models lie and are none.
PATCHES: tuple[Family, ...] = (
    Family("a speed control for T2V-1.3B", lambda f: f.has("linear.0.weight", "linear.4.weight") and len(f.shapes) < 8,
           patch="Wan2.1 T2V-1.3B"),
    Family("a MultiTalk or InfiniteTalk patch", lambda f: f.begins("audio_proj.proj1."), patch="I2V-14B"),
    Family("a Uni3C control network", lambda f: f.begins("controlnet_patch_embedding."), patch="I2V-14B"),
)  # fmt: skip


def family_of(shapes: Shapes, metadata: Metadata | None = None) -> Family | None:
    """The family that official keys and shapes show; None where no row fits."""
    facts = Facts(shapes, metadata or {})
    rows = FAMILIES if facts.has(_SELF_ATTENTION) or facts.has("vace_patch_embedding.weight") else PATCHES
    return next((family for family in rows if family.shows(facts)), None)


def nearest(shapes: Shapes) -> str:
    """For a model that no row fits: what it has, and the families whose channels are next to its own."""
    facts = Facts(shapes, {})
    into, out = facts.channels
    known = {
        "T2V": (16, 16),
        "I2V": (36, 16),
        "Fun Control": (48, 16),
        "Fun-A14B-Control": (52, 16),
        "TI2V-5B": (48, 48),
        "Fun-5B-InP": (100, 48),
        "Fun-5B-Control": (148, 48),
    }
    near = sorted(known, key=lambda name: (abs(known[name][1] - out), abs(known[name][0] - into)))[:2]
    listed = ", ".join(f"{name} ({known[name][0]} in, {known[name][1]} out)" for name in near)
    extras = [name for name, there in (("CLIP tokens", facts.clip), ("a reference frame", facts.reference)) if there]
    return f"{into} channels in, {out} out{', with ' + ' and '.join(extras) if extras else ''}; nearest: {listed}"


def check_runs(path: Path, shapes: Shapes, metadata: Metadata) -> None:
    """Refuse a model that this version does not compute, by its name.

    Raises:
        WanError: one of its families, or none that is known.
    """
    if 0 in Facts(shapes, metadata).channels:
        return  # not whole: who reads the dimensions says what is missing
    family = family_of(shapes, metadata)
    if family is None:
        raise WanError(
            f"{path} is a relative of Wan which this version does not run: {nearest(shapes)}.", Hint.RUN_BY_ITS_MAKERS
        )
    if not family.runs:
        raise family.refuse(f"{path} is {family.name}, which this version does not run")
