"""The rehearsal's table: made, held against the committed one, and written into docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .. import document
from .files import ROOT, Shelf
from .scenes import CODINGS, RUNS, TEXTS, decoded, encoded, rehearse

PUBLISHED = ROOT / "bench" / "results" / "rehearse.json"
_BEGIN, _END = "<!-- rehearsal: written by python -m bench rehearse -->", "<!-- end of the rehearsal -->"
# What may not grow; a figure may by chance of rounding.
GUARDED = (
    "block_kernels",
    "block_gb",
    "waits",
    "uploads",
    "kernels",
    "gb_per_latent_frame",
    "up_gb_per_latent_frame",
    "down_gb_per_latent_frame",
    "peak_gb",
)
TOLERANCE = 1.005
Report = dict[str, dict[str, dict]]


def rehearsed(only: str = "") -> Iterator[tuple[str, str, dict]]:
    """(table, name, figures) of every scene whose name holds a word."""
    with TemporaryDirectory() as folder:
        shelf = Shelf(Path(folder))
        for run in RUNS:
            if only in str(run):
                yield "runs", str(run), rounded(rehearse(run, shelf).row(run))
        for coding in CODINGS:
            for name, code in (("decode", decoded), ("encode", encoded)):
                if only in f"{coding}, {name}":
                    yield "autoencoders", f"{coding}, {name}", rounded(code(coding, shelf))
        for name, encode in TEXTS.items():
            if only in name:
                yield "text", name, rounded(encode(shelf))


def rounded(row: Mapping[str, object]) -> dict:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def grown(before: Report, now: Report) -> list[str]:
    """What is more than it was, in words."""
    found = []
    for table, rows in now.items():
        for name, row in rows.items():
            old = before.get(table, {}).get(name, {})
            for key in GUARDED:
                if _is_chance(key, name):
                    continue
                if key in row and row[key] > old.get(key, 0) * TOLERANCE + 1e-4:
                    found.append(f"{name}: {key} is {row[key]}, was {old.get(key)}")
    return found


def _is_chance(key: str, name: str) -> bool:
    """What depends on when the other thread paints, or reads the next piece of a block."""
    return (key == "peak_gb" and "previews" in name) or (key == "uploads" and ("stream" in name or "allowed" in name))


def save(report: Report, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"torch": torch.__version__, **report}, indent=1) + "\n", encoding="utf-8")


def load(file: Path = PUBLISHED) -> Report:
    report = json.loads(file.read_text(encoding="utf-8"))
    report.pop("torch")
    return report


def publish(report: Report) -> None:
    document.publish(tables(report), _BEGIN, _END)


def tables(report: Report) -> str:
    return "\n".join(_table(_COLUMNS[name], rows) for name, rows in report.items() if rows)


def _table(columns: Mapping[str, tuple[str, str]], rows: Mapping[str, dict]) -> str:
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, row in rows.items():
        cells = (format(row[key], how) if key in row else "" for key, how in columns.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_COLUMNS = {
    "runs": {
        "tokens": ("tokens", ",d"),
        "kernels a block": ("block_kernels", "d"),
        "GB a block": ("block_gb", ".1f"),
        "of these between products": ("block_between_gb", ".1f"),
        "the same in X": ("block_between_x", ".0f"),
        "TFLOP a block": ("block_tflop", ".1f"),
        "waits a step": ("waits", "d"),
        "peak, GB": ("peak_gb", ".2f"),
        "plan, GB": ("planned_gb", ".2f"),
        "over the plan, %": ("over_plan_percent", "+.2f"),
    },
    "autoencoders": {
        "kernels": ("kernels", "d"),
        "GB a latent frame": ("gb_per_latent_frame", ".1f"),
        "copied up, GB": ("up_gb_per_latent_frame", ".3f"),
        "copied down, GB": ("down_gb_per_latent_frame", ".3f"),
        "peak, GB": ("peak_gb", ".2f"),
        "plan, GB": ("planned_gb", ".2f"),
    },
    "text": {
        "kernels": ("kernels", "d"),
        "waits": ("waits", "d"),
        "peak, GB": ("peak_gb", ".2f"),
        "plan, GB": ("planned_gb", ".2f"),
    },
}
