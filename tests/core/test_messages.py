"""What wan_core says: the same to whoever calls it, so it names neither nodes nor flags; those who show it do."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from wan_core.cli.guard import guarded
from wan_core.cli.hints import HINTS
from wan_core.errors import Hint, WanError

ROOT = Path(__file__).resolve().parents[2]
FLAG = re.compile(r"(?<![\w-])--[a-z]")
PIP = re.compile(r"pip install (--[a-z-]+ )+")  # its flags are its own
NODES = re.compile(r"\bnodes?\b|\bwidget|press R\b|\b(dis)?connect\b", re.IGNORECASE)


def display_names() -> set[str]:
    """Of our nodes, and of ComfyUI's that hints may name."""
    named = {
        name for file in ROOT.glob("nodes/*.py") for name in re.findall(r'display_name="([^"]+)"', file.read_text())
    }
    ours = {name for name in named if name.startswith(("Wan ", "Load Wan "))}
    assert len(ours) > 12
    return ours | {"Load Diffusion Model", "Load Model Patch", "CLIPLoader", "LoraLoaderModelOnly", "KSampler"}


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """The texts of a module, with their lines, without docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, PIP.sub("", node.value)


def test_messages_name_neither_nodes_nor_flags():
    """All texts of wan_core but the command line's, whichever of them are messages."""
    names = display_names()
    files = [f for f in sorted(ROOT.glob("wan_core/**/*.py")) if "cli" not in f.parts and f.name != "__main__.py"]
    assert len(files) > 100
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text}"
        for file in files
        for line, text in texts(file)
        if FLAG.search(text) or NODES.search(text) or any(name in text for name in names)
    ]
    assert not found, "\n".join(found)


def test_the_search_finds_what_it_looks_for():
    assert FLAG.search("choose another --task") and NODES.search("Check the node that made it.")
    assert not FLAG.search("a -- b") and not FLAG.search("well--known")
    assert "Wan Block Swap" in display_names()


def test_each_side_words_the_hint(capsys: pytest.CaptureFixture[str]):
    error = WanError("No such folder: x.", Hint.FOLDER)
    assert str(error) == "No such folder: x. Expected the folder of a downloaded checkpoint."

    def fail() -> None:
        raise error

    assert guarded(fail) == 2
    assert capsys.readouterr().err == f"Error: No such folder: x. {HINTS[Hint.FOLDER]}\n"
    details = WanError("T2V-A14B has no expert 'only'.", Hint.EXPERT, experts="high or low")
    assert details.worded(HINTS).endswith("Choose --expert high or low.")
    assert str(WanError("Nothing to do about it.")) == "Nothing to do about it."


def test_an_error_survives_the_way_from_another_process():
    error = pickle.loads(pickle.dumps(WanError("No expert.", Hint.EXPERT, experts="high")))
    assert error.worded(HINTS) == "No expert. Choose --expert high."


def test_every_word_for_a_hint_can_be_said():
    """Each hint is used, and its details are those that its error brings."""
    library = (file.read_text() for file in ROOT.glob("wan_core/**/*.py") if "cli" not in file.parts)
    raised = {match for text in library for match in re.findall(r"Hint\.([A-Z_]+)", text)}
    assert set(Hint.__members__) == raised | {"SWAP_HELD", "TRAIN_HELD"}  # these two by nodes
    for words in HINTS.values():
        assert set(re.findall(r"{(\w+)}", words)) <= {"experts", "name", "variable"}, words
