"""Damaged files of every kind through every reader: 3,000, or 20,000 with ``WAN_FUZZ_MANY=1``."""

from __future__ import annotations

import os

from tests.core.fuzz import FEW, MANY, fuzz


def test_damaged_files_are_read_or_refused():
    table = fuzz(MANY if os.environ.get("WAN_FUZZ_MANY") else FEW)
    print(table.text())
    assert not table.bad, "\n".join(
        f"file {one.number}, {one.damage}: {one.outcome}: {one.detail}" for one in table.bad
    )
    assert {row[0] for row in table.rows()} == {"safetensors", "gguf", "pickle", "index", "other"}
    assert sum(one.outcome == "refused" for one in table.results) > len(table.results) / 2
