"""Search words and folded inputs of the nodes, where the running ComfyUI knows them; no ComfyUI is needed to say it."""

from __future__ import annotations

import ast
import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))

spec = spec_from_file_location("finding", ROOT / "nodes/finding.py")
finding = module_from_spec(spec)
spec.loader.exec_module(finding)


def node_ids() -> set[str]:
    """Of every schema in nodes/, read from the source."""
    found = set()
    for file in (ROOT / "nodes").glob("*.py"):
        for part in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(part, ast.keyword) and part.arg == "node_id" and isinstance(part.value, ast.Constant):
                found.add(part.value.value)
    return found


def test_every_node_has_words_and_every_folded_input_exists():
    assert set(finding.FINDING) == node_ids() == set(NODES)
    for id, (words, advanced) in finding.FINDING.items():
        assert words and len(set(words)) == len(words)
        assert set(advanced) <= set(NODES[id]["inputs"]), id


@pytest.mark.parametrize("knows", [False, True], ids=["old ComfyUI", "new ComfyUI"])
def test_said_where_it_is_known(knows: bool):
    class Node:
        @classmethod
        def define_schema(cls):
            newer = {"advanced": None} if knows else {}
            inputs = [SimpleNamespace(id=id, **newer) for id in ("model", "first_step", "merge")]
            more = {"search_aliases": []} if knows else {}
            return SimpleNamespace(node_id="WanCoreLora", inputs=inputs, name=cls.__name__, **more)

    class Child(Node):
        pass

    finding.findable(Node)
    schema = Child.define_schema()
    assert schema.name == "Child"
    assert getattr(schema, "search_aliases", None) == (list(finding.FINDING["WanCoreLora"].words) if knows else None)
    assert [vars(field).get("advanced", "unknown") for field in schema.inputs] == (
        [None, True, True] if knows else ["unknown"] * 3
    )
