"""The package's lists agree with each other."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_requirements_repeat_the_package_metadata() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    dependencies = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert dependencies
    assert re.findall(r'"(.*?)"', dependencies[1]) == [line for line in lines if not line.startswith("#")]


def test_every_dependency_has_a_lower_bound_only() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", line) for line in lines if not line.startswith("#"))


def test_what_is_called_slow_is_there() -> None:
    for line in (ROOT / "tests/slow.txt").read_text(encoding="utf-8").split():
        file, function = line.split("::")
        found = [path.read_text(encoding="utf-8") for path in ROOT.glob(f"tests/*/{file}.py")]
        assert any(f"\ndef {function}(" in text for text in found), line


def test_every_room_has_its_floor() -> None:
    """What the list of floors leaves out, the linter does not look at."""
    floors = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    named = set(re.findall(r"wan_core\.(\w+)", floors[1])) if floors else set()
    found = [path for path in (ROOT / "wan_core").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    rooms = {path.stem for path in found}
    assert rooms - {"__init__"} == named


def test_the_files_that_contributing_names_are_there() -> None:
    """Also those of one latent's way, which are at most twelve."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w]+/)*[\w]+\.(?:py|txt|toml))`", text)
    paths = [name for name in named if "/" in name]
    assert paths and all((ROOT / name).exists() or (ROOT / "wan_core" / name).exists() for name in paths)
    assert all(any((ROOT / "wan_core").rglob(name)) or (ROOT / name).exists() for name in {*named} - {*paths})
    way = re.search(r"One latent's way.*?:(.*?)\.\n\n", text, re.S)
    assert way and 0 < len(re.findall(r"`[\w/]+\.py`", way[1])) <= 12


def test_without_comfyui_the_quick_part_leaves_out_what_compares_with_it() -> None:
    without_parity = runpy.run_path(str(ROOT / "scripts/test.py"))["without_parity"]
    assert without_parity(["tests/core", "-q"]) == ["-m", "not parity", "tests/core", "-q"]
    assert without_parity(["tests/core", "-m", "not slow"]) == ["tests/core", "-m", "(not slow) and not parity"]


def test_comfyui_finds_the_workflows_in_one_folder() -> None:
    """It looks for templates under five names, lists what lies in any of them, and serves the first that is there."""
    names = ("example_workflows", "example", "examples", "workflow", "workflows")
    assert [name for name in names if (ROOT / name).exists()] == ["workflows"]
