"""The package's lists agree with each other."""

from __future__ import annotations

import re
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
        (found,) = ROOT.glob(f"tests/*/{file}.py")
        assert f"\ndef {function}(" in found.read_text(encoding="utf-8"), line
