"""Cases that need ComfyUI's modules in their own process: this pack and ComfyUI both have a module named nodes.

A script of cases prints one JSON object: case -> traceback, empty when it passed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).parent


def outcomes(script: str, comfyui: Path, *arguments: object) -> dict[str, str]:
    """Run a script of this folder with ComfyUI at hand: case -> traceback."""
    done = subprocess.run(
        [sys.executable, HERE / script, *map(str, arguments), "--cpu"],
        cwd=comfyui,
        env=dict(os.environ, PYTHONPATH=str(comfyui)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def import_pack() -> None:
    """As ComfyUI does it, under the name wan_pack."""
    root = HERE.resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        "wan_pack", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    sys.modules["wan_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["wan_pack"])


def report(cases: Iterable[Callable[[], None]]) -> None:
    """What a script ends with."""
    logging.disable(logging.INFO)
    print(json.dumps({case.__name__: _outcome(case) for case in cases}))


def _outcome(case: Callable[[], None]) -> str:
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return ""
