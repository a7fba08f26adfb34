"""One command for one card: ours beside diffusers and ComfyUI, and what attention, linears, streaming and VAEs take.

Offline, a few minutes. Each section is written to the report as it ends, so that a limit of time loses no figure.
On a CPU (``--quick``) it only shows that it works.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import time
import traceback
from pathlib import Path

import torch

from .card import Card
from .document import publish

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "bench" / "results" / "gpu.json"
SECTIONS = ("ceilings", "attention", "dit", "linears", "pieces", "streaming", "vae")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="the JSON file (default: the published one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="some sections alone")
    parser.add_argument("--minutes", type=float, default=9.0, help="no section begins after these (default: 9)")
    parser.add_argument("--quick", action="store_true", help="tiny dimensions: shows that the benchmark works")


def run(options: argparse.Namespace) -> int:
    card = Card(torch.device(options.device), quick=options.quick)
    began = time.monotonic()
    report = {"machine": machine(card.device), "sections": {}}
    for name in options.only:
        if time.monotonic() - began > options.minutes * 60:
            report["sections"][name] = {"not_measured": f"{options.minutes:g} minutes were over"}
            continue
        start = time.monotonic()
        report["sections"][name] = measured(name, card)
        print(f"== {name}, {time.monotonic() - start:.0f} s\n{table(report['sections'][name])}\n", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.out == PUBLISHED:
        publish(report)
    failed = [name for name, rows in report["sections"].items() if "failed" in rows]
    if failed:
        print(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


def measured(name: str, card: Card) -> dict:
    """A section's rows; of one that fails the reason, for the others' figures are worth having."""
    try:
        with torch.inference_mode():
            return importlib.import_module(f"bench.gpu.{name}").rows(card)
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}
    finally:
        card.clear()


def table(rows: dict) -> str:
    lines = []
    for name, row in rows.items():
        if not isinstance(row, dict):
            lines.append(f"{name}: {row}")
            continue
        shown = "  ".join(f"{key} {_shown(value)}" for key, value in row.items())
        lines.append(f"  {name:58}{shown}")
    return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(device: torch.device) -> dict:
    found = {"torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found
