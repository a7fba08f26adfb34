"""Write web/sampler_presets.js from the table of wan_core: ``python scripts/make_presets.py``; a test compares them."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "web/sampler_presets.js"
_HEAD = """/**
 * The presets of Wan Sampler. Written by scripts/make_presets.py from wan_core/sampling/presets.py: edit that.
 * @type {Record<string, { says: string, values: Record<string, number | string> }>}
 */
export const SAMPLER = {
"""


def written() -> str:
    sys.path.insert(0, str(ROOT))
    from wan_core.sampling.presets import PRESETS

    rows = [f"  '{name}': {{\n{_row(preset)}\n  }}" for name, preset in PRESETS.items()]
    return _HEAD + ",\n".join(rows) + "\n}\n"


def _row(preset) -> str:
    values = ", ".join(f"{name}: {_literal(value)}" for name, value in preset.values.items())
    return f"    says: '{preset.described()}',\n    values: {{ {values} }}"


def _literal(value: object) -> str:
    return f"'{value}'" if isinstance(value, str) else f"{value:g}"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
