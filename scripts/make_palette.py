"""Write web/palette_terms.js from wan_core/prompt: ``python scripts/make_palette.py``; a test compares them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "web/palette_terms.js"
_HEAD = """/** What wan_core/prompt knows of terms. Written by scripts/make_palette.py: edit that. */

/** @typedef {{ id: string, en: string, zh: string }} Named */
"""


def written() -> str:
    sys.path.insert(0, str(ROOT))
    from wan_core.prompt import palette
    from wan_core.prompt.conflicts import CONFLICTS
    from wan_core.prompt.looks import LOOKS
    from wan_core.prompt.synonyms import SYNONYMS
    from wan_core.prompt.vocabulary import GROUPS

    groups = [{"id": group.id, "en": group.en, "zh": group.zh} for group in GROUPS.values()]
    terms = [
        {"id": term.id, "group": group.id, "en": term.en, "zh": term.zh, "also": SYNONYMS.get(term.id, ())}
        for group in GROUPS.values()
        for term in group.terms
    ]
    looks = [{"id": look.id, "en": look.en, "zh": look.zh, "terms": look.terms} for look in LOOKS.values()]
    tables = (
        ("GROUPS", "Named[]", groups),
        ("TERMS", "(Named & { group: string, also: string[] })[]", terms),
        ("LOOKS", "(Named & { terms: string[] })[]", looks),
        ("CONFLICTS", "string[][][]", CONFLICTS),
        ("ROLLED", "string[]", palette.ROLLED),
    )
    return _HEAD + "".join(_table(*table) for table in tables)


def _table(name: str, kind: str, rows: object) -> str:
    listed = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    return f"\n/** @type {{{kind}}} */\nexport const {name} = [\n{listed}\n]\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
