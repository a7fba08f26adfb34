"""The measured figures as tables in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping

from .. import document

_BEGIN, _END = "<!-- gpu: written by python -m bench gpu -->", "<!-- end of the gpu's figures -->"
_TITLES = {
    "ceilings": "What the card can do",
    "dit": "8 of the layers, forward",
    "attention": "Self-attention of one layer",
    "linears": "Products with packed matrices",
    "pieces": "Between the products of one layer",
    "streaming": "Blocks that stream from a file",
    "vae": "Decoding",
}


def publish(report: Mapping[str, dict]) -> None:
    document.publish(tables(report), _BEGIN, _END)


def tables(report: Mapping[str, dict]) -> str:
    machine = report["machine"]
    parts = [", ".join(f"{key} {value}" for key, value in machine.items()) + "."]
    for name, rows in report["sections"].items():
        parts.append(f"### {_TITLES[name]}\n\n{_table(rows)}")
    return "\n\n".join(parts) + "\n"


def _table(rows: Mapping[str, object]) -> str:
    remarks = [f"{key.replace('_', ' ')}: {value}" for key, value in rows.items() if not isinstance(value, dict)]
    measured = {name: row for name, row in rows.items() if isinstance(row, dict)}
    columns = list(dict.fromkeys(key for row in measured.values() for key in row))
    lines = [
        f"| | {' | '.join(column.replace('_', ' ') for column in columns)} |",
        "| --- |" + " ---: |" * len(columns),
    ]
    lines += [
        f"| {name} | {' | '.join(_shown(row.get(column)) for column in columns)} |" for name, row in measured.items()
    ]
    return "\n".join([*(f"({remark})\n" for remark in remarks), *(lines if measured else [])])


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else str(round(value))
    return str(value)
