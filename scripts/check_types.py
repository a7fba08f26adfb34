"""Types of wan_core and nodes, by mypy: how strictly a room is read stands in pyproject.toml.

``nodes`` imports ``..wan_core``, so it is read as ComfyUI loads it: within a package around both, here called ``pack``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    with TemporaryDirectory() as folder:
        Path(folder, "pack").symlink_to(ROOT, target_is_directory=True)
        words = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache", *sys.argv[1:]]
        packages = ["-p", "pack.wan_core", "-p", "pack.nodes"]
        return subprocess.run(
            [sys.executable, "-m", "mypy", *words, *packages], cwd=folder, env={**os.environ, "MYPYPATH": folder}
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
